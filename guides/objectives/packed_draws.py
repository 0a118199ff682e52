"""Draws of every group at once, with what gradient estimators need to know of each.

    u_g ~ q_g( . | u_before)          all in packed, unconstrained space

``outer`` draws of the global latents, and ``inner`` draws of the rows' latents for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from guides.draws import over_draws
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.layout import Layout
from guides.sites import Group

__all__ = [
    "GroupDraws",
    "PackedDraws",
    "draw_packed",
    "joint_of",
    "random_rows",
    "through_draws",
]


@dataclass(frozen=True)
class GroupDraws:
    """Draws of one group.

    Args:
        group: The group.
        q: Its distribution.
        value: The draws at the plates' dimensions, ``(S, B, 1, .., 1, K)`` or ``(S, K)``.
        seen: Draws of the groups before it, as its q saw them; tensors of its own, so that a
            derivative with respect to them is that of this q alone.
        mask: Rows whose latents count, ``(B, 1, .., 1)``; None for all of them.
    """

    group: Group
    q: TorchDistribution
    value: Tensor
    seen: dict[str, Tensor]
    mask: Tensor | None = None

    @property
    def num_draws(self) -> int:
        """Number of draws S."""
        return self.value.shape[0]

    @property
    def packed(self) -> Tensor:
        """The draws, ``(S, B, K)`` or ``(S, K)``."""
        return self.value.reshape(self.num_draws, *self.group.shape)

    def log_q(self, value: Tensor | None = None) -> Tensor:
        """Log density of the draws, or of other points of the same shape; ``(S, B)``, ``(S,)``."""
        score = self._counted(self.q.log_prob(self.value if value is None else value))
        return score.reshape(self.num_draws, *self.group.shape[:-1])

    def entropy(self) -> Tensor | None:
        """Entropy given the draws before, ``(S, B)`` or ``(S,)``; None without closed form."""
        try:
            found = self._counted(self.q.entropy())
        except NotImplementedError:
            return None
        rows = self.group.shape[:-1]
        lead = found.shape[
            : found.dim() - (0 if self.group.plate is None else -self.group.plate.dim)
        ]
        return found.reshape((*lead, *rows)).expand((self.num_draws, *rows))

    def _counted(self, term: Tensor) -> Tensor:
        return term if self.mask is None else torch.where(self.mask, term, torch.zeros_like(term))

    def spread(self, moment: Tensor) -> Tensor:
        """A moment of q for every draw, ``(S, B, K)`` or ``(S, K)``."""
        return moment.expand(self.value.shape).reshape(self.num_draws, *self.group.shape)


@dataclass(frozen=True)
class PackedDraws:
    """Draws of all groups.

    Args:
        layout: Layout of the call.
        groups: The groups in the order in which they are drawn.
        outer: Draws of the global latents.
        inner: Draws of the rows' latents for each of those.
    """

    layout: Layout
    groups: tuple[GroupDraws, ...]
    outer: int
    inner: int

    @property
    def rowwise(self) -> bool:
        """Whether there are latents in the data plate; without, all draws are inner ones."""
        return any(draws.group.plate is not None for draws in self.groups)

    @property
    def within(self) -> tuple[GroupDraws, ...]:
        """The groups that are drawn ``outer * inner`` times."""
        rows = tuple(draws for draws in self.groups if draws.group.plate is not None)
        return rows or self.groups

    @property
    def above(self) -> tuple[GroupDraws, ...]:
        """The groups that are drawn ``outer`` times."""
        return tuple(draws for draws in self.groups if draws not in self.within)

    def packed(self, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """All draws by group, ``(outer * inner, B, K)`` or ``(outer * inner, K)``.

        Args:
            replaced: Values to take in place of draws, of the shape of ``GroupDraws.value``.
        """
        replaced = {} if replaced is None else replaced
        result = {}
        for draws in self.groups:
            value = replaced.get(draws.group.name, draws.value)
            value = value.reshape(draws.num_draws, *draws.group.shape)
            times = self.outer * self.inner // draws.num_draws
            result[draws.group.name] = value.repeat_interleave(times, 0) if times > 1 else value
        return result

    def log_q_within(self, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Log density of the inner draws, ``(outer, inner, R)``: R rows, or one for all latents.

        Args:
            values: Points to score in place of the draws, by group.
        """
        values = {} if values is None else values
        total = sum(draws.log_q(values.get(draws.group.name)) for draws in self.within)
        return total.reshape(self.outer, self.inner, -1)  # type: ignore[union-attr]

    def log_q_above(self) -> Tensor:
        """Log density of the outer draws, ``(outer,)``."""
        zeros = self.groups[0].value.new_zeros(self.outer)
        return sum((draws.log_q() for draws in self.above), zeros)


def draw_packed(
    guide: ProgramGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    outer: int,
    inner: int = 1,
) -> PackedDraws:
    """Draw from all groups, differentiably.

    Args:
        guide: A guide of this package.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        outer: Draws of the global latents.
        inner: Draws of the rows' latents for each of those; of all latents where there are none
            in the data plate.
    """
    read = random_rows(guide._layout(args, kwargs, None), guide, args, kwargs)
    call = guide._call(args, kwargs, read)
    rowwise = any(group.plate is not None for group in read.groups)
    num_batch = 0 if read.data_plate is None else -read.data_plate.dim
    upstream: dict[str, Tensor] = {}
    drawn: list[GroupDraws] = []
    with guide._pyro_context:
        for group in read.groups:
            count = outer if rowwise and group.plate is None else outer * inner
            seen = {name: _seen(value, count) for name, value in upstream.items()}
            q = guide.group_distribution(group, call, seen)
            # q of a group with upstream draws is batched over them already.
            batched = len(q.batch_shape) > (0 if group.plate is None else num_batch)
            value = q.rsample(() if batched else (count,))
            drawn.append(GroupDraws(group, q, value, seen, guide.group_mask(group)))
            ones = (1,) * num_batch
            upstream[group.name] = (
                value.reshape(count, *ones, group.size) if group.plate is None else value
            )
    return PackedDraws(read, tuple(drawn), outer, inner)


def _seen(value: Tensor, count: int) -> Tensor:
    times = count // value.shape[0]
    return value.repeat_interleave(times, 0) if times > 1 else value.view_as(value)


def random_rows(
    read: Layout, guide: ProgramGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Layout:
    """The layout at freshly drawn rows, where the program subsamples at random."""
    fresh = read.fresh_indices()
    return guide._layout(args, kwargs, fresh) if fresh else read


def joint_of(
    draws: PackedDraws,
    log_joint: LogJoint,
    *,
    jacobian: bool,
    replaced: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log joint of the draws.

    Args:
        draws: The draws.
        log_joint: The log joint of the call.
        jacobian: See :meth:`guides.energy.LogJoint.packed`.
        replaced: Values to take in place of draws; see :meth:`PackedDraws.packed`.

    Returns:
        Terms of the inner draws ``(outer, inner, R)``, and of what is above them ``(outer,)``. R
        is B, or 1 where no latents are in the data plate: then all terms are within.
    """
    rows, other = over_draws(
        lambda packed: log_joint.packed(packed, jacobian=jacobian),
        draws.packed(replaced),
        draws.layout,
    )
    rows = rows.reshape(draws.outer, draws.inner, -1)
    other = other.reshape(draws.outer, draws.inner)
    if draws.rowwise:
        return rows, other[:, 0]
    total = draws.layout.scale * rows.sum(-1) + other
    return total.unsqueeze(-1), total.new_zeros(draws.outer)


def through_draws(target: Tensor, fixed: list[Tensor], live: list[Tensor]) -> Tensor:
    """A term whose gradient is that of ``target``, through given tensors alone.

    Args:
        target: A scalar function of ``fixed``.
        fixed: Tensors of its graph.
        live: The same values, with the graph through which the gradient is to flow.

    Returns:
        A scalar with value of no meaning: subtract its own detached value.
    """
    pairs = [(a, b) for a, b in zip(fixed, live, strict=True) if a.requires_grad]
    if not pairs or not target.requires_grad:
        return target.new_zeros(())
    gradients = torch.autograd.grad(
        target, [a for a, _ in pairs], retain_graph=True, allow_unused=True
    )
    terms = [(g * b).sum() for g, (_, b) in zip(gradients, pairs, strict=True) if g is not None]
    return sum(terms, target.new_zeros(()))

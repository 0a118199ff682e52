"""Bounds from importance weights, per datum even where the model has global latents."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guides.draws import (
    check_density,
    check_same_program,
    draws_rows_outside,
    guide_terms,
    over_draws,
)
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.layout import Layout, layout
from guides.objectives.objective import (
    ExposedLogJoint,
    Objective,
    check_count,
    check_has_density,
)
from guides.objectives.packed_draws import draw_packed, joint_of
from guides.pairs import check_follows, check_order
from guides.probe import Program

__all__ = ["Ratios", "Weighted", "check_rowwise"]

Ratios = tuple[Tensor, Tensor, float]
"""Log p / q within the rows ``(S, K, R)``, above them ``(S,)``, and the scale of the rows."""


class Weighted(Objective):
    """A bound that combines the importance weights of K draws, row by row.

        g_s     ~ q(g)                       s = 1..num_outer
        z_nsk   ~ q(z_n | g_s)               k = 1..num_particles
        log w_nsk = log p(x_n, z_nsk | g_s) / q(z_nsk | g_s)

        bound = mean_s [ log p(g_s) / q(g_s)  +  N/B sum_n combine_k(log w_nsk) ]

    Weights are per datum, conditional on a draw of the global latents that all rows share: one
    joint weight for all rows would collapse to a single draw. Where no latents are in the data
    plate, nothing is left to weigh row by row, and K draws of everything have joint weights.

    Args:
        num_particles: Draws K of the rows' latents for each draw of the global latents.
        num_outer: Draws of the global latents.
    """

    def __init__(self, num_particles: int = 1, *, num_outer: int = 1) -> None:
        super().__init__(num_particles)
        check_count("num_outer", num_outer)
        self.num_outer = num_outer

    @abc.abstractmethod
    def combine(self, log_w: Tensor) -> Tensor:
        """From log weights ``(S, K, R)`` to terms of the rows ``(S, R)``."""

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound for all N rows."""
        within, above, scale = self.ratios(model, guide, args, kwargs)
        rows = self.combine(within)
        return -(scale * rows.sum(-1) + above).mean()

    def ratios(
        self,
        model: Program,
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Ratios:
        """Log ratios ``log p - log q`` of fresh draws.

        Returns:
            Those within the rows ``(num_outer, K, B)`` (``(num_outer, K, 1)`` where no latents
            are in the data plate), those above them ``(num_outer,)``, and the rows' scale N/B.
        """
        check_order(f"{type(self).__name__}.loss(model, guide, *args)", model, guide)
        if not isinstance(guide, ProgramGuide):
            return self._any_guide(model, guide, args, kwargs)
        check_has_density(self, guide)
        outer, inner = self.num_outer, self.num_particles
        draws = draw_packed(guide, args, kwargs, outer=outer, inner=inner)
        log_joint = ExposedLogJoint(model, args, kwargs, layout=draws.layout)
        if guide.model is not model and self._is_first("program", model, guide):
            check_same_program(guide, model, args, kwargs)
            check_follows(guide, model, args, kwargs)
        if inner > 1 and self._is_first("rows", model, guide):
            first = {name: value[0] for name, value in draws.packed().items()}
            check_rowwise(self, log_joint, draws.layout.constrain(first))
        rows, other = joint_of(draws, log_joint, jacobian=True)
        within = rows - draws.log_q_within()
        return within, other - draws.log_q_above(), draws.layout.scale if draws.rowwise else 1.0

    def _any_guide(
        self,
        model: Program,
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Ratios:
        read = layout(model, args, kwargs)
        if fresh := read.fresh_indices():
            read = layout(model, args, kwargs, indices=fresh)
        rowwise = any(site.row_dim is not None for site in read.sites.values())
        has_global = any(site.row_dim is None for site in read.sites.values())
        log_q, log_q_above, drawn = [], [], []
        for _ in range(self.num_outer):
            shared: dict[str, Tensor] | None = None
            for k in range(self.num_particles):
                terms = _run(self, guide, args, kwargs, read, shared)
                q_rows, q_other = terms.total()
                if rowwise:
                    log_q.append(q_rows)
                    if k == 0:
                        log_q_above.append(q_other)
                        if has_global:
                            shared = _outside(terms)
                else:
                    log_q.append((read.scale * q_rows.sum() + q_other).reshape(1))
                drawn.append(
                    {n: terms.values[n].expand(site.shape) for n, site in read.sites.items()}
                )
        values = {name: torch.stack([draw[name] for draw in drawn]) for name in read.sites}
        log_joint = ExposedLogJoint(model, args, kwargs, layout=read)
        if self.num_particles > 1 and self._is_first("rows", model, guide):
            check_rowwise(self, log_joint, drawn[0])
        rows, other = over_draws(log_joint.rows, values, read)
        shape = (self.num_outer, self.num_particles, -1)
        other = other.reshape(shape[:2])
        if rowwise:
            within = rows.reshape(shape) - torch.stack(log_q).reshape(shape)
            return within, other[:, 0] - torch.stack(log_q_above), read.scale
        total = read.scale * rows.sum(-1).reshape(shape[:2]) + other
        within = total.unsqueeze(-1) - torch.stack(log_q).reshape(shape)
        return within, within.new_zeros(self.num_outer), 1.0

    def __repr__(self) -> str:
        """Numbers of draws, and what the weights are conditional on."""
        return (
            f"{type(self).__name__}({self._options()}num_particles={self.num_particles}, "
            f"num_outer={self.num_outer}; weights per datum, conditional on shared draws of the "
            "global latents)"
        )

    def _options(self) -> str:
        return ""


def _run(
    objective: Objective,
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    shared: Mapping[str, Tensor] | None,
) -> SiteTerms:
    """One run of a guide of Pyro or written by hand, checked."""
    name = type(objective).__name__
    terms = guide_terms(guide, args, kwargs, read, shared, expose_params=True)
    missing = [site for site in read.sites if site not in terms.values]
    if missing:
        raise ValueError(
            f"Guide has no site {missing[0]!r}, which the model samples. Sites in the guide: "
            f"{', '.join(terms.values) or 'none'}."
        )
    check_density(terms, read)
    rough = [site for site, fn in terms.fns.items() if not fn.has_rsample]
    if rough:
        raise TypeError(
            f"{name} differentiates through the draws, but guide site {rough[0]!r} "
            f"({type(terms.fns[rough[0]]).__name__}) has no reparameterized draws (rsample). Give "
            "it a distribution that has them, or use Trace_ELBO."
        )
    if draws_rows_outside(terms, read):
        raise TypeError(
            f"{name} weighs every datum by itself, so the guide must draw the latents of plate "
            f"{read.data_plate.name!r} inside that plate. This guide draws them outside. Use "  # type: ignore[union-attr]
            "a guide of this package (guides.make), AutoNormal with create_plates=, or Trace_ELBO."
        )
    if shared and any(terms.values[site] is not value for site, value in shared.items()):
        raise TypeError(
            f"{name} holds the draws of global latents while it draws those of the rows, which "
            f"{type(guide).__name__} does not allow. Use num_particles=1, or a guide of this "
            "package (guides.make)."
        )
    return terms


def _outside(terms: SiteTerms) -> dict[str, Tensor]:
    return {name: terms.values[name] for name, term in terms.terms.items() if term.dim() == 0}


def check_rowwise(objective: Objective, log_joint: LogJoint, values: Mapping[str, Tensor]) -> None:
    """Raise where rows cannot be weighed one by one.

    Args:
        objective: The objective, for messages.
        log_joint: The log joint of the call.
        values: Constrained values of all latents, where to look.

    Raises:
        ValueError: For rows that talk to each other, or a minibatch of a model whose latents are
            all global: its joint weight is no estimate of that of all rows.
    """
    read = log_joint.layout
    local = [name for name, site in read.sites.items() if site.row_dim is not None]
    if not local:
        if read.scale != 1.0:
            raise ValueError(
                f"{type(objective).__name__} gives draws of global latents joint weights over all "
                f"rows, and a minibatch has {read.num_rows} of {read.data_plate.size}. "  # type: ignore[union-attr]
                "Pass all rows, or use AnalyticELBO, STL or Trace_ELBO."
            )
        return
    shared = [name for name in read.sites if name not in local]
    groups = {"global": shared, "data": local} if shared else {"data": local}
    whole = LogJoint(log_joint.model, log_joint.args, log_joint.kwargs, layout=read.split(groups))
    with torch.no_grad():
        packed = whole.layout.pack({name: value.detach() for name, value in values.items()})
    whole.check_rows(packed)

"""The path of an annealing: from a density that can be drawn from to the log joint.

    log f_b(u) = (1 - b) log f_0(u) + b log f_1(u)          0 <= b <= 1
    f_1(u) = p(x, z(u)) |dz/du|                             the log joint, in unconstrained space
    f_0(u) = p(z(u)) |dz/du|, or the density of a guide     normalized

The density of the prior is that of running the program forward: every latent given the latents
before it, and given the data where the program reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from guides.draws import check_same_program, over_draws
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.layout import Layout
from guides.layout import layout as read_layout
from guides.probe import Program

__all__ = ["Path", "Point", "path"]

Point = dict[str, Tensor]
"""Packed latents of all chains by group, ``(C, B, K)`` or ``(C, K)``."""


class _Forward(SiteTerms):
    """Site terms with the density of a forward run beside them.

    Latents count as they are drawn, without the scales and masks that act on the log joint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.forward: dict[str, Tensor] = {}

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        term = super().density_of(site)
        if site["name"] in self.layout.sites:
            self.forward[site["name"]] = self.reduce(term, site)
        return term


@dataclass(frozen=True)
class Path:
    """A path for one call of a program.

    A *unit* is what is weighted, and accepted or rejected, alone: a row where the rows have no
    latents in common, everything at once otherwise.

    Args:
        log_joint: The log joint of the call.
        joint: Whether there is one unit for all rows.
        draw: Draws from the start: a number of chains to packed latents.
        density: Log density of the start by group, None for the prior.
    """

    log_joint: LogJoint
    joint: bool
    draw: Callable[[int], Point]
    density: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None

    @property
    def layout(self) -> Layout:
        """The layout of the call."""
        return self.log_joint.layout

    @property
    def num_units(self) -> int:
        """Number of units U."""
        return 1 if self.joint else self.layout.num_rows

    def ends(self, point: Point) -> tuple[Tensor, Tensor]:
        """Log densities of start and target, each ``(C, U)``."""
        return over_draws(self._ends, point, self.layout)

    def gradient(self, point: Point, b: float) -> Point:
        """Gradient of ``log f_b`` of all chains."""

        def total(one: Point) -> Tensor:
            start, target = self._ends(one)
            return ((1 - b) * start + b * target).sum()

        return over_draws(torch.func.grad(total), point, self.layout)

    def constant(self) -> float:
        """The part of the log evidence that no latent reaches: sites outside the data plate."""
        if self.joint:
            return 0.0
        point = {name: value[0] for name, value in self.draw(1).items()}
        return float(self.log_joint.packed(point)[1])

    def _ends(self, one: Point) -> tuple[Tensor, Tensor]:
        values, _, log_dets = self.log_joint.unpack(one)
        terms = self.log_joint.run(values, terms=_Forward)
        start, target = self._units(terms.forward), self._units(terms.terms)  # type: ignore[attr-defined]
        jacobian = self._units(log_dets)
        if self.density is not None:
            with pyro.validation_enabled(False):
                return self._units(self.density(one)), target + jacobian
        return start + jacobian, target + jacobian

    def _units(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Terms of rows ``(B,)`` and scalars, summed to units."""
        some = next(iter(terms.values()), torch.zeros(()))
        if self.joint:
            return sum((term.sum() for term in terms.values()), some.new_zeros(())).reshape(1)
        rows = [term for term in terms.values() if term.dim() == 1]
        return sum(rows, some.new_zeros(self.num_units))


def path(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    guide: ProgramGuide | None = None,
    data_plate: str | None = "auto",
    read: Layout | None = None,
) -> Path:
    """The path of a call.

    Args:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        guide: Where the path starts; None for the prior.
        data_plate: See :func:`guides.layout.layout`; a guide brings its own.
        read: A layout of the call, if it was read already.

    Raises:
        ValueError: Where there is no start with a density, a latent is masked, or a minibatch
            would stand for all rows of a program with global latents.
    """
    density = None
    if read is None:
        read = read_layout(model, args, kwargs, data_plate=data_plate)
    if guide is not None:
        if not guide.has_density:
            raise ValueError(
                "Annealing needs a start with a density, and a delta guide is a point mass. Start "
                "at the prior (guide=None), or at the Laplace posterior of the point: "
                "guides.inference.laplace(model, guide.locations(...), args, kwargs)."
            )
        if guide.model is not model:
            check_same_program(guide, model, args, kwargs)
        density, read = guide.packed_density(args, kwargs, read.indices)
        point = guide.rsample_packed(1, args, kwargs, read.indices)[0]
        try:
            density({name: value[0] for name, value in point.items()})
        except NotImplementedError as error:
            raise ValueError(
                "Annealing scores points that its start did not draw, which this guide cannot: "
                f"{error} Start at the prior (guide=None), or at a guide of another family."
            ) from error
    masked = [site.name for site in read.sites.values() if site.masked]
    if masked:
        raise ValueError(
            f"Latent site {masked[0]!r} is masked: where its mask is off nothing holds it, and "
            "the evidence is infinite. Sample it without the mask (mask only what is observed)."
        )
    joint = read.data_plate is None or any(group.plate is None for group in read.groups)
    if joint and read.scale != 1.0:
        raise ValueError(
            "The evidence of a program with global latents is one number for all rows, which a "
            f"minibatch ({read.num_rows} rows that stand for {read.scale * read.num_rows:.0f}) "
            "does not have. Call with all rows."
        )
    log_joint = LogJoint(model, args, kwargs, layout=read)

    def draw(num_chains: int) -> Point:
        if guide is not None:
            return guide.rsample_packed(num_chains, args, kwargs, read.indices)[0]
        return _forward(log_joint, num_chains)

    return Path(log_joint, joint, draw, density)


def _forward(log_joint: LogJoint, num_chains: int) -> Point:
    """Latents of forward runs of the program, packed."""
    read = log_joint.layout
    found = []
    for _ in range(num_chains):
        try:
            with poutine.block(), SiteTerms(read, density=False, complete=False) as terms:
                log_joint.model(*log_joint.args, **log_joint.kwargs)
        except NotImplementedError as error:
            raise ValueError(
                f"The prior cannot be drawn from ({error}), so annealing cannot start there. "
                "Start at a guide with a density: guide=guides.make(...)."
            ) from error
        packed = read.pack(terms.values)
        for group in read.groups:
            for site, part in group.slices():
                if not bool(torch.isfinite(packed[group.name][..., part]).all()):
                    raise ValueError(
                        f"The prior of site {site.name!r} draws values on the edge of its "
                        "support, where numbers of this precision end. Use float64, or start at "
                        "a guide with a density: guide=guides.make(...)."
                    )
        found.append(packed)
    return {group.name: torch.stack([one[group.name] for one in found]) for group in read.groups}

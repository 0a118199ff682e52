"""VariationalFilter: iterative inference at every step, from the prediction to the belief."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from guides.energy import LogJoint, SiteTerms
from guides.families.family import Family, inverse_positive
from guides.layout import Layout
from guides.location_scale import is_location_scale, location
from guides.probe import Program
from guides.sequences.guide import SequenceCall, SequenceGuide
from guides.sequences.window import Window, center, step_terms
from guides.sites import Group
from guides.supports import unwrap

__all__ = ["VariationalFilter"]


_LIMIT = 3.0
"""Standard deviations of q that a natural step, or a move, may take a coordinate."""


class _Centered(SiteTerms):
    """Gives every latent the center of its prior: what the program predicts of a step."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_sample(msg)
        if not site_is_subsample(msg):
            msg["value"] = center(msg["fn"])


class VariationalFilter(SequenceGuide):
    """Amortized variational filtering.

        lam_0 = q as the program predicts the step: p(z_t | z_<t, x_<t)
        for i = 1 .. num_iterations:
            g     = d/dlam E_q[ log q(z_t) - log p(x_t | z_<=t, x_<t) p(z_t | z_<t, x_<t) ]
            e     = [asinh((lam_{i-1} - lam_0) / root_0), asinh(root g), x_t]
            lam_i = lam_{i-1} - rate(e) * natural(g) + root * move(e)

    Perception as prediction and correction, a learned Kalman filter: without corrections q is the
    prediction, and one network corrects every step of every sequence. Steps and moves are taken in
    units of q's own scale (:meth:`guides.families.family.Family.natural`), at most three of them.
    The inverse hyperbolic sine keeps signs and orders of magnitude apart, row by row, which layer
    normalization over the few coordinates of a small state does not. The network learns from all
    iterations, each weighted equally; the program learns from the last one.

    Factors count at the step whose sites come before them. In programs that sample all latents
    before all data, later latents stand at the centers of their priors while a step is corrected.

    The program is run again up to each step, so that a sequence of T steps costs T (T + 1) / 2
    evaluations of a step for every iteration: the price of knowing nothing of the program but that
    it can be run.

    References:
        | A general method for amortizing variational filtering (Marino, Cvitkovic & Yue, 2018)
        | https://arxiv.org/abs/1811.05090

    Args:
        model: Any Pyro program with a data plate over sequences.
        *args: Positional arguments of an example call.
        family: A callable from a packed size K to a family.
        num_iterations: Updates of q at every step.
        num_particles: Draws behind a gradient.
        network: Width of the two hidden layers of the update.
        observations: Whether the update sees x_t beside the gradient.
        missing: See :class:`guides.sequences.guide.SequenceGuide`.
        model_kwargs: Keyword arguments of the example call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide's parameters in Pyro's store; unique by default.

    Raises:
        ValueError: Where the program has no steps that look alike, or an option fits none.
        NotImplementedError: For a factor that belongs to no step.

    Example:
        >>> import pyro.distributions as dist
        >>> from guides.families.normal import Normal
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = torch.zeros(len(x))
        ...         for t in pyro.markov(range(x.shape[1])):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> guide = VariationalFilter(model, torch.randn(5, 3), family=Normal, network=8)
        >>> len(guide(torch.randn(2, 4)))
        4
    """

    def __init__(
        self,
        model: Program,
        *args: Any,
        family: Callable[[int], Family],
        num_iterations: int = 1,
        num_particles: int = 1,
        network: int = 64,
        observations: bool = True,
        missing: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        data_plate: str | None = "auto",
        name: str | None = None,
    ) -> None:
        for what, value in (
            ("num_iterations", num_iterations),
            ("num_particles", num_particles),
            ("network", network),
        ):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}.")
        super().__init__(
            model,
            *args,
            family=family,
            past=False,
            future=False,
            markov=False,
            recurrent=1,
            hidden=1,
            missing=missing,
            model_kwargs=model_kwargs,
            data_plate=data_plate,
            name=name,
        )
        if not self.has_density:
            raise ValueError(
                "A variational filter follows the bound of a density, which a point mass does not "
                "have. Use a family with a density, for example filtering_normal."
            )
        self.num_iterations, self.num_particles = num_iterations, num_particles
        self.observations = observations
        # What the parent reads parameters off is replaced by the update.
        del self.inner, self.skip, self.head
        size = len(self.init)
        width = 2 * size + (self.network.size if observations else 0)
        self.update = nn.Sequential(
            nn.Linear(width, network), nn.SiLU(), nn.Linear(network, network), nn.SiLU()
        ).to(self.init)
        self.rate = nn.Linear(network, size).to(self.init)
        self.move = nn.Linear(network, size).to(self.init)
        with torch.no_grad():
            self.rate.weight.mul_(0.1)
            # Half of a natural step at the start, over all iterations: the gradients are of few
            # draws, and as many steps of a half would add up their noise.
            self.rate.bias.fill_(math.log(2.0 ** (1.0 / num_iterations) - 1.0))
            self.move.weight.mul_(0.1)
            self.move.bias.zero_()
        self._surrogates: list[Tensor] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latents; in training the earlier iterations add their gradients."""
        found = self._surrogates = []
        try:
            values = super().forward(*args, **kwargs)
        finally:
            self._surrogates = None
        if found and torch.is_grad_enabled():
            read = self._layout(args, kwargs, None)
            plate = read.data_plate
            assert plate is not None
            total = read.scale * sum(found[1:], found[0]).sum(-1)  # (*S,)
            if total.dim():
                total = total.reshape(*total.shape, *(1,) * -plate.dim)
            # Zero, with the gradient of the earlier iterations: the value of the bound is that
            # of the last one. Outside the plate, which cannot be entered anew; hence its scale.
            pyro.factor(f"_{self._pyro_name}_iterations", total - total.detach(), has_rsample=True)
        return values

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Layout
    ) -> SequenceCall:
        call = super()._call(args, kwargs, read)
        terms = step_terms(self.model, args, kwargs, read, call.steps)
        return replace(call, terms=tuple(terms))

    def step_parameters(self, position: int, call: SequenceCall) -> Tensor:
        """Parameters of q of a step after all iterations, ``(*S, B, P)``."""
        group = self._group(position, call)
        known = self._known(position, call)
        lam = predicted = self._predicted(group, known, call)
        x = None
        if self.observations:
            x = call.context[position]
        for iteration in range(self.num_iterations):
            gradient = self._gradient(lam.detach(), group, known, call)
            # Objectives that draw from the steps themselves take none of earlier iterations.
            if self._surrogates is not None and iteration and lam.requires_grad:
                self._surrogates.append((gradient * lam).sum(-1))
            lam = self._updated(lam.detach(), gradient, predicted, x)
        return lam

    def _updated(
        self, lam: Tensor, gradient: Tensor, predicted: Tensor, x: Tensor | None
    ) -> Tensor:
        direction, whitened = self.family.natural(lam, gradient, limit=_LIMIT)
        root = self.family.root(predicted)
        parts = [torch.asinh((lam - predicted) / root), torch.asinh(whitened)]
        if x is not None:
            parts.append(x.expand(*lam.shape[:-1], -1))
        features = self.update(torch.cat(parts, -1))
        rate = torch.sigmoid(self.rate(features))
        move = _LIMIT * torch.tanh(self.move(features) / _LIMIT)
        moved: Tensor = lam - rate * direction + self.family.root(lam) * move
        return moved

    def _group(self, position: int, call: SequenceCall) -> Group:
        group = call.layout.group(f"step_{position + 1}")
        assert group is not None
        return group

    def _known(self, position: int, call: SequenceCall) -> dict[str, Tensor]:
        """Constrained values of everything before the step, without gradients."""
        values = {}
        for name, packed in call.upstream.items():
            earlier = call.layout.group(name)
            assert earlier is not None
            if name.startswith("step_") and int(name.removeprefix("step_")) > position:
                continue
            for site, value in earlier.unpack(packed.detach()).items():
                values[site] = call.layout.sites[site].constrain(value)[0]
        return values

    def _predicted(self, group: Group, known: Mapping[str, Tensor], call: SequenceCall) -> Tensor:
        """The family as near as it comes to what the program predicts, ``(*S, B, P)``."""
        with torch.no_grad():
            # Sites of one step follow each other: each is predicted at the center of those before
            # it.
            names = [site.name for site in group.sites]
            window = LogJoint(
                Window(self.model, known, names), call.args, call.kwargs, layout=call.layout
            )
            fns = window.run(terms=_Centered, density=False, complete=False).fns
            locs, scales = [], []
            for site in group.sites:
                fn = fns[site.name]
                left = fn.batch_shape[: len(fn.batch_shape) - len(site.batch_shape)]
                whole = left + site.shape
                if site.transform is None and is_location_scale(fn):
                    base = unwrap(fn)
                    spread = base.stddev if hasattr(base, "scale_tril") else base.scale
                    loc, scale = location(fn).expand(whole), spread.expand(whole)
                else:
                    loc = site.unconstrain(center(fn))
                    scale = torch.ones_like(loc)
                locs.append(_flat(loc, site, left))
                scales.append(_flat(scale, site, left))
            lam = self.family.init(torch.cat(locs, -1))
            if self.family.has_scale:
                raw = inverse_positive(torch.cat(scales, -1))
                size = self.step_size
                lam = torch.cat([lam[..., :size], raw, lam[..., 2 * size :]], -1)
            return lam

    def _gradient(
        self, lam: Tensor, group: Group, known: Mapping[str, Tensor], call: SequenceCall
    ) -> Tensor:
        """Gradient of minus the step's own bound, one a row, ``(*S, B, P)``."""
        plate = group.plate
        assert plate is not None
        position = int(group.name.removeprefix("step_")) - 1
        names = [site.name for site in group.sites]
        window = LogJoint(
            Window(self.model, known, names, call.terms[position]),
            *(call.args, call.kwargs),
            layout=call.layout,
        )
        mask = call.steps[position].mask
        noise = [self.family.noise(lam.shape[:-1], lam) for _ in range(self.num_particles)]

        def loss(lam: Tensor) -> Tensor:
            total = torch.zeros((), dtype=lam.dtype, device=lam.device)
            for draw in noise:
                u, log_q = self.family.push(lam, draw)
                values, log_dets = {}, torch.zeros_like(log_q)
                for name, value in group.unpack(group.batch(u)).items():
                    site = call.layout.sites[name]
                    values[name], log_det = site.constrain(value)
                    if log_det is not None:
                        log_dets = log_dets + _rows_of(log_det, site.row_dim)
                terms = window.sites(values).values()
                bound = log_dets - log_q
                if mask is not None:
                    bound = torch.where(mask, bound, torch.zeros_like(bound))
                total = total - bound.sum() - sum(term.sum() for term in terms)
            return total / len(noise)

        with torch.no_grad():
            gradient: Tensor = torch.func.grad(loss)(lam)
        return gradient

    def __repr__(self) -> str:
        """What the filter does at every step."""
        return (
            f"VariationalFilter({type(self.family).__name__}, {self.step_size} coordinates a "
            f"step, {self.num_iterations} iterations of {self.num_particles} draws, "
            "amortized: yes)"
        )


def _flat(value: Tensor, site: Any, left: torch.Size) -> Tensor:
    """Unconstrained values with draws on the left, ``(*left, B, size)``."""
    if not left:
        return site.flatten(value)
    return torch.stack(
        [site.flatten(v) for v in value.reshape(-1, *value.shape[len(left) :])]
    ).reshape(*left, -1, site.size)


def _rows_of(term: Tensor, row_dim: int) -> Tensor:
    return (
        term.movedim(row_dim, -1)
        .reshape(*term.shape[: term.dim() + row_dim], term.shape[row_dim], -1)
        .sum(-1)
    )

"""AnalyticELBO: the ELBO with closed forms where there are any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal

from guides.capture.arguments import flatten
from guides.draws import over_draws
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.layout import Layout
from guides.objectives.objective import ExposedLogJoint, Objective, own_guide
from guides.objectives.packed_draws import GroupDraws, PackedDraws, draw_packed
from guides.probe import Program
from guides.ripple import ripple
from guides.sites import Site
from guides.supports import unwrap

__all__ = ["AnalyticELBO"]

_KEPT = 7
_KINDS = 256
_GAUSSIAN = (Normal, MultivariateNormal, LowRankMultivariateNormal)


class AnalyticELBO(Objective):
    """The ELBO with analytic terms where the family and the model allow them.

        ELBO = E_q[log p(x, u)] + H[q]              u: packed, unconstrained latents

        H[q]                    closed form where the family states its entropy
        E_q[log p(z | parents)] closed form for a real, Normal (independent) latent under a
                                Gaussian q, given the draws of its parents
        everything else         sampled

    A latent's parents are at most those that the program has sampled before it, in the very run.
    They have to be drawn before it by the guide, too, or in one group with it by a q of
    independent coordinates: then a draw of theirs says no more about it than its q does. A latent
    for which that fails is in closed form where its prior depends on no latent at all.

    Where both are analytic, the KL divergence from q to the prior, given the parents, has no noise
    left, and only the likelihood is sampled. :meth:`analytic_terms` says which terms are which.
    That pays while q is far from the posterior, and for latents that the data leave at their
    prior. Near the posterior the noise of log p and of log q cancel when both are sampled, and
    :class:`guides.objectives.STL` has less of it.

    Whether a prior depends on no latent is read from the graph of its parameters and from
    their numbers at moved latents, once for each model, guide and kind of call: its latents, the
    shapes of its tensors, and its arguments that are none, such as switches. A switch that comes
    as a tensor, or as an attribute of the model, is not seen to make such a prior depend on one.

    The loss is minus the ELBO of all N rows (lower is better): an upper bound on -log p(x) in
    expectation, and equal to ``Trace_ELBO``'s in expectation. For a point mass it is an energy,
    -log p(x, z) at the point, and no bound.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014), appendix B
        | https://arxiv.org/abs/1312.6114

    Args:
        num_particles: Number of draws.

    Raises:
        TypeError: For a guide that is not of this package.

    Example:
        >>> import torch, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("amortized_normal", model, x)
        >>> AnalyticELBO().analytic_terms(model, guide, x)
        {'entropy': ('data',), 'prior': ('z',), 'sampled': ('x',)}
    """

    def __init__(self, num_particles: int = 1) -> None:
        super().__init__(num_particles)
        self._priors: list[tuple[Program, ProgramGuide, dict[Any, tuple[str, ...]]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_priors": []}

    def analytic_terms(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, tuple[str, ...]]:
        """Which terms have a closed form.

        Returns:
            ``"entropy"``: groups whose entropy is exact; ``"prior"``: latent sites whose expected
            log prior is exact; ``"sampled"``: the sites, and ``log q(group)``, that are sampled.
        """
        own = own_guide(self, model, guide, args, kwargs, density=False)
        with torch.no_grad(), poutine.block():
            draws = draw_packed(own, args, kwargs, outer=1)
            log_joint = LogJoint(model, args, kwargs, layout=draws.layout)
            free = self._independent(model, own, draws, log_joint)
            _, _, taken = _expected_joint(draws, log_joint, free, plain=own.plain)
        exact = tuple(d.group.name for d in draws.groups if d.entropy() is not None)
        rest = [f"log q({d.group.name})" for d in draws.groups if d.group.name not in exact]
        priors = tuple(name for name in draws.layout.sites if name in taken)
        sites = (*draws.layout.sites, *draws.layout.observed)
        sampled = (*(name for name in sites if name not in priors), *rest)
        return {"entropy": exact, "prior": priors, "sampled": sampled}

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the ELBO of all N rows."""
        own = own_guide(self, model, guide, args, kwargs, density=False)
        draws = draw_packed(own, args, kwargs, outer=self.num_particles)
        log_joint = ExposedLogJoint(model, args, kwargs, layout=draws.layout)
        free = self._independent(model, own, draws, log_joint)
        scale = draws.layout.scale
        rows, other, _ = _expected_joint(draws, log_joint, free, plain=own.plain)
        elbo = scale * rows.sum(-1).mean() + other.mean()
        for group in draws.groups:
            found = group.entropy()
            entropy = -group.log_q() if found is None else found
            factor = 1.0 if group.group.plate is None else scale
            elbo = elbo + factor * entropy.sum() / self.num_particles
        return -elbo

    def _independent(
        self, model: Program, guide: ProgramGuide, draws: PackedDraws, log_joint: LogJoint
    ) -> tuple[str, ...]:
        """Latents whose prior no latent moves, looked at once for each kind of call."""
        pairs = (kinds for m, g, kinds in self._priors if m is model and g is guide)
        kinds: dict[Any, tuple[str, ...]] | None = next(pairs, None)
        if kinds is None:
            # Held, because the identity of an object that is gone passes to another one.
            self._priors = [*self._priors[-_KEPT:], (model, guide, kinds := {})]
        kind = (flatten(log_joint.args, dict(log_joint.kwargs)).key, tuple(draws.layout.sites))
        if kind in kinds:
            return kinds[kind]
        found = _independent_normals(log_joint, draws.packed(), draws.layout)
        if len(kinds) == _KINDS:
            del kinds[next(iter(kinds))]
        kinds[kind] = found
        return found


def _independent_normals(
    log_joint: LogJoint, packed: Mapping[str, Tensor], read: Layout
) -> tuple[str, ...]:
    """Real latents with an independent Normal prior that no latent moves."""
    point = {name: value[0].detach() for name, value in packed.items()}
    with torch.enable_grad():
        values = {n: v.requires_grad_() for n, v in read.constrain(point).items()}
        first = log_joint.run(values, density=False, expose_params=False).fns
        names = [name for name, site in read.sites.items() if _is_plain_normal(site, first[name])]
        structural = [name for name in names if not _follows(first[name], list(values.values()))]
    with torch.no_grad():
        # The graph does not see indexing or control flow by a latent; moved numbers do.
        moved = read.constrain({n: v + 0.37 + ripple(v) for n, v in point.items()})
        second = log_joint.run(moved, density=False, expose_params=False).fns
    return tuple(
        name
        for name in structural
        if _is_plain_normal(read.sites[name], second[name]) and _equal(first[name], second[name])
    )


def _is_plain_normal(site: Site, fn: TorchDistribution) -> bool:
    layers = []
    while hasattr(fn, "base_dist"):
        layers.append(type(fn).__name__)
        fn = fn.base_dist
    plain = all(layer in ("Independent", "ExpandedDistribution") for layer in layers)
    return site.transform is None and plain and type(fn).__name__ == "Normal"


def _follows(fn: TorchDistribution, latents: list[Tensor]) -> bool:
    """Whether loc or scale is in the graph of a latent."""
    base = unwrap(fn)
    live = [number for number in (base.loc, base.scale) if number.requires_grad]
    if not live:
        return False
    found = torch.autograd.grad(
        sum(number.sum() for number in live), latents, allow_unused=True, retain_graph=True
    )
    return any(gradient is not None for gradient in found)


def _equal(first: TorchDistribution, second: TorchDistribution) -> bool:
    a, b = unwrap(first), unwrap(second)
    return torch.equal(a.loc, b.loc) and torch.equal(a.scale, b.scale)


def _expected_joint(
    draws: PackedDraws, log_joint: LogJoint, free: tuple[str, ...], *, plain: Collection[str]
) -> tuple[Tensor, Tensor, set[str]]:
    """The log joint of the draws with priors in expectation.

    Args:
        draws: The draws.
        log_joint: The log joint of the call.
        free: Latents whose prior depends on no latent.
        plain: Latents without a Jacobian.

    Returns:
        Terms of the rows ``(S, B)``, all others ``(S,)``, and the latents in expectation.
    """
    inputs = draws.packed()
    gaussian = [d for d in draws.groups if isinstance(unwrap(d.q), _GAUSSIAN)]
    for d in gaussian:
        inputs[_mean(d)] = d.spread(d.q.mean)
        inputs[_variance(d)] = d.spread(d.q.variance)
    taken: set[str] = set()

    def terms(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, _, log_dets = log_joint.unpack(given)
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        for d in gaussian:
            group = d.group
            mean = group.unpack(group.batch(given[_mean(d)]))
            variance = group.unpack(group.batch(given[_variance(d)]))
            moments |= {n: (mean[n], variance[n]) for n in mean}
        found = _ExpectedTerms(log_joint.layout, values, moments, draws, free)
        with (
            pyro.validation_enabled(False),
            poutine.block(hide_types=["sample"]),
            found,
        ):
            log_joint.model(*log_joint.args, **log_joint.kwargs)
        taken.update(found.taken)
        rows, other = found.total()
        for name, log_det in log_dets.items():
            if name in plain:
                continue
            if log_joint.layout.sites[name].row_dim is None:
                other = other + log_det
            else:
                rows = rows + log_det
        return rows, other

    rows, other = over_draws(terms, inputs, draws.layout)
    return rows, other, taken


def _mean(draws: GroupDraws) -> str:
    return f"mean of {draws.group.name}"


def _variance(draws: GroupDraws) -> str:
    return f"variance of {draws.group.name}"


class _ExpectedTerms(SiteTerms):
    """Terms of the sites, those of priors in expectation over q wherever that is exact.

    It is decided in the run itself: which latents come before another, and of what family it is,
    may change from draw to draw.

    Args:
        layout: The layout of the call.
        values: The draws, by site.
        moments: Mean and variance of a Gaussian q, by site.
        draws: The groups, in the order in which the guide draws them.
        free: Latents whose prior depends on no latent.
    """

    def __init__(
        self,
        layout: Layout,
        values: Mapping[str, Tensor],
        moments: Mapping[str, tuple[Tensor, Tensor]],
        draws: PackedDraws,
        free: tuple[str, ...],
    ) -> None:
        super().__init__(layout, values)
        self.moments = moments
        self.free = free
        self.sites = layout.sites
        numbered = list(enumerate(draws.groups))
        self.place = {site.name: number for number, d in numbered for site in d.group.sites}
        # A normal of a type of the user's own may tie its coordinates together.
        self.apart = {n for n, d in numbered if type(unwrap(d.q)).__name__ == "Normal"}
        self.latest = -1  # place of the latents that the program has sampled so far
        self.taken: set[str] = set()

    def record(self, site: Mapping[str, Any]) -> None:
        """Write down one site; scales, masks and plates act on an expected term as on any."""
        name = site["name"]
        if name in self.moments and self._is_exact(name, site["fn"]):
            self.taken.add(name)
            mean, variance = self.moments[name]
            site = {**site, "fn": _ExpectedNormal(site["fn"], variance), "value": mean}
        super().record(site)
        self.latest = max(self.latest, self.place.get(name, -1))

    def _is_exact(self, name: str, fn: TorchDistribution) -> bool:
        """Whether what came before says no more about a latent than its q does."""
        place = self.place[name]
        if not _is_plain_normal(self.sites[name], fn):
            return False
        last = place - 1 if place not in self.apart else place
        return name in self.free or self.latest <= last


class _ExpectedNormal:
    """E log Normal(z; loc, scale) for z with a given mean and variance."""

    def __init__(self, fn: TorchDistribution, variance: Tensor) -> None:
        self.fn = fn
        self.variance = variance

    def log_prob(self, mean: Tensor) -> Tensor:
        """The expectation, at the batch shape of the site."""
        penalty = 0.5 * self.variance / unwrap(self.fn).scale.square()
        penalty = penalty.flatten(-self.fn.event_dim).sum(-1) if self.fn.event_dim else penalty
        return self.fn.log_prob(mean) - penalty

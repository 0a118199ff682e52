"""Which sites of a program depend on which latents, read from the program itself.

    children(z) = sites whose log density moves when z alone is moved, z left out
    parents(y)  = latents that y is a child of
    order       = reverse topological: every latent comes before its parents

The sites are moved and their terms compared, bit by bit, at several irregular points: no
dependence is lost in data types, in-place writes or values that a program reads, as it may be
where a tracer follows tensors. A dependence through a threshold that no point crosses stays
hidden. Gradients are taken beside it: a term that moves but has no gradient cannot pull a latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.inference.particle_density import ParticleDensity, Particles

__all__ = ["Dependencies", "dependencies"]

_POINTS = 6


@dataclass(frozen=True)
class Dependencies:
    """Dependence between the sites of a program.

    Args:
        parents: Latents that a site's log density depends on, for latent and observed sites, in
            the order of the program.
        children: Sites, latent and observed, whose log density depends on a latent.
        order: Latents, children before parents.
    """

    parents: Mapping[str, tuple[str, ...]]
    children: Mapping[str, tuple[str, ...]]
    order: tuple[str, ...]

    def blanket(self, name: str) -> tuple[str, ...]:
        """Markov blanket of a latent: its parents, its children, and their other parents."""
        near = {*self.parents[name], *self.children[name]}
        near |= {parent for child in self.children[name] for parent in self.parents[child]}
        return tuple(site for site in self.parents if site in near - {name})


def dependencies(density: ParticleDensity) -> Dependencies:
    """Read the dependence structure of a program.

    Args:
        density: The program's density at particles.

    Returns:
        Parents, children and the order of a sweep.

    Raises:
        ValueError: Where a site moves with a latent but has no gradient with respect to it.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from guides.energy import LogJoint
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         a = pyro.sample("a", dist.Normal(0.0, 1.0))
        ...         b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        ...         c = pyro.sample("c", dist.Normal(a, b))
        ...         pyro.sample("x", dist.Normal(c, 1.0), obs=x)
        >>> found = dependencies(ParticleDensity(LogJoint(model, (torch.zeros(3),))))
        >>> found.order, found.children["a"], found.blanket("a")
        (('c', 'b', 'a'), ('c',), ('b', 'c'))
    """
    names = tuple(density.sites)
    point, other = _points(density, 0), _points(density, 1)
    with torch.no_grad():
        before = density.terms(point)
        children: dict[str, tuple[str, ...]] = {}
        for name in names:
            after = density.terms({**point, name: other[name]})
            moved = tuple(
                site for site in before if site != name and _differ(before[site], after[site])
            )
            _check_pull(density, point, name, moved)
            children[name] = moved
    parents = {site: tuple(n for n in names if site in children[n]) for site in before}
    # Values flow forward through a program, so that its order is topological.
    return Dependencies(parents, children, tuple(reversed(names)))


def _points(density: ParticleDensity, seed: int) -> Particles:
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, site in density.sites.items():
        shape = (_POINTS, *density.shape(site))
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        spread = torch.linspace(0.3, 1.5, _POINTS, dtype=torch.float64)
        result[name] = (draw * spread.reshape(-1, *(1,) * (len(shape) - 1))).to(
            dtype=site.dtype, device=site.device
        )
    return result


def _differ(first: Tensor, second: Tensor) -> bool:
    return bool(((first != second) & ~(first.isnan() & second.isnan())).any())


def _check_pull(
    density: ParticleDensity, point: Particles, name: str, moved: tuple[str, ...]
) -> None:
    for site in moved:
        gradient = density.gradient(point, name, site)
        if bool((gradient == 0).all()):
            raise ValueError(
                f"Site {site!r} depends on latent {name!r}, but has no gradient with respect to "
                "it: the value was detached, rounded, compared or read as a number on the way. "
                "Particles move by gradients of the log density; keep the path differentiable, "
                "or sample such a latent with another method."
            )

"""The log joint of a program at K particles of every row, tempered from the prior.

    log g_beta(u) = (1 - beta) log p(z) + beta log p(x, z) + log|dz/du|,    z = z(u)

beta = 0 is the prior, a normalized density that can be sampled; beta = 1 is the log joint in
unconstrained space. Particles are kept by site, packed and unconstrained, ``(K, B, d)`` in the
data plate and ``(K, d)`` outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guides.draws import over_draws
from guides.energy import LogJoint, SiteTerms
from guides.sites import Site

__all__ = ["ParticleDensity", "Particles"]

Particles = dict[str, Tensor]


class _Terms(SiteTerms):
    """Beside the terms the densities of latents by themselves, without scales of the user's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.priors: dict[str, Tensor] = {}

    def record(self, site: Mapping[str, Any]) -> None:
        super().record(site)
        name = site["name"]
        if self.density and name in self.layout.sites:
            raw = site["fn"].log_prob(site["value"])
            self.priors[name] = self.layout.sites[name].rows(raw)


class ParticleDensity:
    """Log densities of a program at particles, by row.

    Args:
        log_joint: The log joint of the call.

    Attributes:
        joint: Whether a particle is one state of all rows: there are global latents, or there is
            no data plate. Then weights are joint; otherwise every row has its own.
    """

    def __init__(self, log_joint: LogJoint) -> None:
        read = log_joint.layout
        self.log_joint = log_joint
        self.layout = read
        self.sites: dict[str, Site] = read.sites
        self.joint = read.data_plate is None or read.group("global") is not None
        self._groups = {site.name: group for group in read.groups for site in group.sites}

    def shape(self, site: Site) -> tuple[int, ...]:
        """Shape of one particle of a site."""
        return (site.size,) if site.row_dim is None else (self.layout.num_rows, site.size)

    def prior(self, num_particles: int) -> Particles:
        """Draw particles from the prior."""

        def one() -> dict[str, Tensor]:
            values = self.log_joint.run(complete=False, density=False).values
            return {
                name: site.flatten(site.unconstrain(values[name].expand(site.shape)))
                for name, site in self.sites.items()
            }

        with torch.no_grad():
            try:
                with warnings.catch_warnings():
                    # A missing batching rule costs time, not correctness.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    dummy = torch.zeros(num_particles)
                    draws = torch.func.vmap(lambda _: one(), randomness="different")(dummy)
            except NotImplementedError as error:
                raise ValueError(
                    "Particles start at draws from the prior, and a latent of this program has a "
                    f"prior that cannot be sampled ({error}). Give every latent a proper prior."
                ) from error
            except RuntimeError:
                # Samplers without a batching rule, such as that of the Gamma, draw one by one.
                single = [one() for _ in range(num_particles)]
                draws = {name: torch.stack([s[name] for s in single]) for name in self.sites}
        for name, value in draws.items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(
                    f"Draws from the prior of site {name!r} are not finite, so that particles "
                    "cannot start there. Give it a prior inside the range of its numbers."
                )
        return {name: value.to(self.sites[name].dtype) for name, value in draws.items()}

    def values(self, particle: Particles) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Constrained values of one particle, and the log-determinants by site."""
        values, log_dets = {}, {}
        for name, packed in particle.items():
            site = self.sites[name]
            placed = site.place(self._groups[name].batch(packed))
            values[name], log_det = site.constrain(placed)
            if log_det is not None:
                log_dets[name] = site.rows(log_det)
        return values, log_dets

    def constrained(self, particles: Particles) -> dict[str, Tensor]:
        """Constrained values of particles, ``(K,) + site shape``."""

        def one(particle: Particles) -> dict[str, Tensor]:
            found = self.values(particle)[0]
            return {name: value.expand(self.sites[name].shape) for name, value in found.items()}

        with torch.no_grad():
            return self.over(one, particles)

    def over(self, function: Callable[[Particles], Any], particles: Particles) -> Any:
        """A function of one particle at all of them."""
        return over_draws(function, particles, self.layout)

    def terms(self, particles: Particles) -> dict[str, Tensor]:
        """Log density of every site: ``(K, B)`` in the data plate, else ``(K,)``."""
        return self.over(lambda p: self.log_joint.sites(self.values(p)[0]), particles)

    def log_joint_of(self, particles: Particles) -> tuple[Tensor, Tensor]:
        """Log p(x, z) of rows ``(K, B)`` and of everything else ``(K,)``, without Jacobians."""
        return self.over(lambda p: self.log_joint.run(self.values(p)[0]).total(), particles)

    def over_values(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log joint at constrained values ``(K,) + site shape``, its parameters exposed."""

        def one(value: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.log_joint.run(value, expose_params=True).total()

        return over_draws(one, dict(values), self.layout)

    def constant(self) -> float:
        """What is observed outside the data plate, where it depends on no latent."""
        if self.joint:
            return 0.0
        with torch.no_grad():
            return float(self.log_joint.run(self.log_joint.predictions()).total()[1])

    def likelihood_of(self, particles: Particles) -> tuple[Tensor, Tensor]:
        """Log p(x, z) - log p(z), what a temperature scales: rows ``(K, B)``, rest ``(K,)``."""

        def one(particle: Particles) -> tuple[Tensor, Tensor]:
            run = self.log_joint.run(self.values(particle)[0], terms=_Terms)
            rows, other = run.total()
            own_rows, own_other = _priors(run)
            return rows - own_rows, other - own_other

        with torch.no_grad():
            return self.over(one, particles)

    def _tempered(self, particle: Particles, beta: float) -> tuple[Tensor, Tensor]:
        values, log_dets = self.values(particle)
        if beta == 1.0:
            rows, other = self.log_joint.run(values).total()
        else:
            run = self.log_joint.run(values, terms=_Terms)
            rows, other = run.total()
            own_rows, own_other = _priors(run)
            rows = beta * rows + (1 - beta) * own_rows
            other = beta * other + (1 - beta) * own_other
        rows = rows + sum(term for term in log_dets.values() if term.dim() == 1)
        other = other + sum(term for term in log_dets.values() if term.dim() == 0)
        return rows, other

    def scored(
        self, particles: Particles, name: str, beta: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tempered log density, and the score of one site's complete conditional.

        The score is the gradient of the whole log density: the site's own term, the terms of its
        children through its map to the support, and the log-determinant.

        Returns:
            Rows ``(K, B)``, everything else ``(K,)``, and the score, shaped as the particles of
            the site. Local scores are without N/B.
        """
        rest = {key: value for key, value in particles.items() if key != name}

        def total(own: Tensor, others: Particles) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            rows, other = self._tempered({**others, name: own}, beta)
            return rows.sum() + other, (rows, other)

        def one(particle: Particles) -> tuple[Tensor, Tensor, Tensor]:
            others = {key: particle[key] for key in rest}
            score, (rows, other) = torch.func.grad(total, has_aux=True)(particle[name], others)
            return rows, other, score

        with torch.no_grad():
            return self.over(one, particles)

    def gradient(self, particles: Particles, name: str, site: str) -> Tensor:
        """Gradient of the log density of ``site`` with respect to latent ``name``."""

        def one(particle: Particles) -> Tensor:
            def term(own: Tensor) -> Tensor:
                return self.log_joint.sites(self.values({**particle, name: own})[0])[site].sum()

            return torch.func.grad(term)(particle[name])

        with torch.no_grad():
            return self.over(one, particles)

    def units(self, rows: Tensor, other: Tensor) -> Tensor:
        """What is weighted together: ``(K, B)`` row by row, or ``(K, 1)`` jointly."""
        return (rows.sum(-1) + other).unsqueeze(-1) if self.joint else rows

    def take(self, particles: Particles, indices: Tensor) -> Particles:
        """Particles by index of their unit, ``(K, B)`` or ``(K, 1)``."""
        return {
            name: value[indices[:, 0]]
            if self.joint
            else value.gather(0, indices.unsqueeze(-1).expand(value.shape))
            for name, value in particles.items()
        }


def _priors(run: SiteTerms) -> tuple[Any, Any]:
    """Densities of the latents by themselves, of rows and of everything else."""
    own = list(run.priors.values()) if isinstance(run, _Terms) else []
    return sum(t for t in own if t.dim() == 1), sum(t for t in own if t.dim() == 0)

"""Sweeps over the latents of a program, and a fresh start that estimates the evidence.

    sweep:  for site in reverse topological order: move, weight, resample where few are effective
    anneal: u ~ prior; for t = 1..T: w *= (p(x, z) / p(z))^(beta_t - beta_(t-1)); sweep at beta_t

With kernels that do not depend on the particles the product of the mean weights is an unbiased
estimate of p(x): an SMC sampler on an extended space, whose backward kernels are the reverse
proposals (or the reversals of a Metropolis kernel). Resampling where the effective sample size
falls keeps it unbiased. A preconditioner taken from the same particles would not: a pilot run
finds one for every temperature, site and row, and the runs that count hold them fixed.

References:
    | Sequential Monte Carlo Samplers (Del Moral, Doucet & Jasra, 2006)
    | https://doi.org/10.1111/j.1467-9868.2006.00553.x

    | On the Convergence of Adaptive Sequential Monte Carlo Methods (Beskos et al., 2016)
    | https://arxiv.org/abs/1306.6462
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from guides.inference import resampling
from guides.inference.dependencies import Dependencies
from guides.inference.particle_density import ParticleDensity, Particles
from guides.inference.particle_moves import (
    corrected_move,
    precondition,
    published_move,
    settled_spread,
    spread_of,
)

__all__ = ["Cloud", "Sampler"]

_POWER = 3  # temperatures (t/T)^3: many near the prior, where a sharp likelihood changes most


@dataclass(frozen=True)
class Cloud:
    """Weighted particles.

    Args:
        particles: By site, packed and unconstrained, ``(K, B, d)`` or ``(K, d)``.
        log_weights: Since the last resampling, ``(K, B)``, or ``(K, 1)`` where weights are joint.
        spread: Variance of the score by site, from which the next preconditioner follows.
        log_normalizer: Log of the mean weights at the resamplings so far, ``(B,)`` or ``(1,)``.
    """

    particles: Particles
    log_weights: Tensor
    spread: dict[str, Tensor] = field(default_factory=dict)
    log_normalizer: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def num_particles(self) -> int:
        """Number of particles K."""
        return self.log_weights.shape[0]

    def log_evidence(self) -> Tensor:
        """Log of the estimate of p(x), ``(B,)`` or ``(1,)``; of a fresh start only."""
        mean = self.log_weights.logsumexp(0) - math.log(self.num_particles)
        return self.log_normalizer + mean


@dataclass(frozen=True)
class Sampler:
    """How particles move; see :class:`guides.inference.divide_and_conquer.DivideAndConquer`."""

    step_size: float
    variant: str
    correction: str
    resampler: str
    preconditioner: str
    threshold: float

    def prior(self, density: ParticleDensity, num_particles: int) -> Cloud:
        """Particles at draws from the prior, of equal weight."""
        particles = density.prior(num_particles)
        like = next(iter(particles.values()))
        units = 1 if density.joint else density.layout.num_rows
        return Cloud(
            particles,
            like.new_zeros(num_particles, units),
            log_normalizer=like.new_zeros(units),
        )

    @torch.no_grad()
    def anneal(
        self,
        density: ParticleDensity,
        graph: Dependencies,
        num_particles: int,
        num_sweeps: int,
        *,
        steps: Sequence[Mapping[str, Tensor]] | None = None,
        record: list[dict[str, Tensor]] | None = None,
    ) -> Cloud:
        """A fresh start: from the prior to the posterior in ``num_sweeps`` temperatures.

        Args:
            density: The program's density.
            graph: Its dependence structure.
            num_particles: Number of particles K.
            num_sweeps: Number of temperatures, and of sweeps.
            steps: Step times preconditioner by sweep and site; taken from the particles where
                not given.
            record: Receives the steps that were made, by sweep and site.

        Returns:
            The particles. The published variant has no temperatures: it sweeps at the posterior.
        """
        cloud = self.prior(density, num_particles)
        before = 0.0
        for t in range(1, num_sweeps + 1):
            beta = 1.0 if t == num_sweeps else (t / num_sweeps) ** _POWER
            made: dict[str, Tensor] = {}
            if self.variant == "corrected":
                gain = density.units(*density.likelihood_of(cloud.particles))
                log_weights = cloud.log_weights + (beta - before) * gain
                cloud = self._resampled(density, replace(cloud, log_weights=log_weights))
            fixed = None if steps is None else steps[t - 1]
            cloud = self.sweep(density, graph, cloud, beta=beta, steps=fixed, record=made)
            if record is not None:
                record.append(made)
            before = beta
        self.check(cloud)
        return cloud

    def check(self, cloud: Cloud) -> None:
        """Raise where a row has no particle left that carries weight."""
        if not bool(torch.isfinite(cloud.log_evidence()).all()):
            raise ValueError(
                "No particle of a row has weight left: every proposal left the range of numbers. "
                f"Lower step_size={self.step_size}, or use the corrected variant with "
                'correction="metropolis", which stays where a proposal fails.'
            )

    @torch.no_grad()
    def sweep(
        self,
        density: ParticleDensity,
        graph: Dependencies,
        cloud: Cloud,
        *,
        beta: float = 1.0,
        steps: Mapping[str, Tensor] | None = None,
        record: dict[str, Tensor] | None = None,
        settled: bool = False,
    ) -> Cloud:
        """Move every site once, children before parents.

        Args:
            density: The program's density.
            graph: Its dependence structure.
            cloud: The particles.
            beta: Temperature.
            steps: Step times preconditioner by site; taken from the particles where not given.
            record: Receives the steps that were made, by site.
            settled: Whether the particles persist from sweep to sweep at one target, so that
                steps follow an average over sweeps.
        """
        if self.variant == "published":
            return self._published_sweep(density, graph, cloud)
        for name in graph.order:
            scored = density.scored(cloud.particles, name, beta)
            before = cloud.spread.get(name)
            if settled and before is not None:
                spread = settled_spread(scored[2], before)
            else:
                spread = spread_of(scored[2], before)
            step = self._step(spread, cloud.num_particles) if steps is None else steps[name]
            if record is not None:
                record[name] = step
            here = cloud.particles[name]
            particles, log_ratio = corrected_move(
                density,
                cloud.particles,
                name,
                step=step,
                noise=torch.randn_like(here),
                beta=beta,
                scored=scored,
            )
            spreads = {**cloud.spread, name: spread}
            if self.correction == "metropolis":
                accepted = torch.rand_like(log_ratio).log() < log_ratio
                kept = torch.where(accepted.unsqueeze(-1), particles[name], here)
                cloud = replace(cloud, particles={**particles, name: kept}, spread=spreads)
                continue
            if log_ratio.dim() == 1:
                log_ratio = log_ratio.unsqueeze(-1)
            elif density.joint:
                log_ratio = log_ratio.sum(-1, keepdim=True)
            cloud = replace(
                cloud,
                particles=particles,
                log_weights=cloud.log_weights + log_ratio,
                spread=spreads,
            )
            cloud = self._resampled(density, cloud)
        return cloud

    def _step(self, spread: Tensor, num_particles: int) -> Tensor:
        return self.step_size * precondition(spread, num_particles, self.preconditioner)

    def _resampled(self, density: ParticleDensity, cloud: Cloud) -> Cloud:
        """Copies in proportion to the weights, in the units where few particles are effective."""
        log_weights = cloud.log_weights
        few = resampling.effective_fraction(log_weights) < self.threshold  # (U,)
        indices = self._indices(log_weights)
        kept = torch.arange(cloud.num_particles, device=indices.device).unsqueeze(-1)
        indices = torch.where(few, indices, kept)
        mean = log_weights.logsumexp(0) - math.log(cloud.num_particles)
        return replace(
            cloud,
            particles=density.take(cloud.particles, indices),
            log_weights=torch.where(few, torch.zeros_like(log_weights), log_weights),
            log_normalizer=cloud.log_normalizer + torch.where(few, mean, torch.zeros_like(mean)),
        )

    @torch.no_grad()
    def equalized(self, density: ParticleDensity, cloud: Cloud) -> Cloud:
        """Copies in proportion to the weights in every unit: particles of equal weight."""
        if self.variant == "published":
            return cloud
        return replace(self, threshold=math.inf)._resampled(density, cloud)

    def _indices(self, log_weights: Tensor) -> Tensor:
        num, units = log_weights.shape
        if self.resampler == "published":
            return resampling.published(log_weights, log_weights.new_empty(units, num).uniform_())
        return resampling.systematic(log_weights, log_weights.new_empty(units).uniform_())

    def _published_sweep(
        self, density: ParticleDensity, graph: Dependencies, cloud: Cloud
    ) -> Cloud:
        """Every site is resampled by itself, as published; the weight compares with the joint.

        log w = log p(x, z) - sum over sites of (log g_site(z_site) - log of the mean weight)
        """
        particles = dict(cloud.particles)
        spread, total = dict(cloud.spread), torch.zeros_like(cloud.log_weights)
        for name in graph.order:
            _, _, score = density.scored(particles, name)
            spread[name] = spread_of(score)
            here = particles[name]
            proposed, conditional, log_weights = published_move(
                density,
                particles,
                name,
                graph.children[name],
                step=self._step(spread[name], cloud.num_particles),
                noise=torch.randn_like(here),
                score=score,
            )
            mean = log_weights.logsumexp(0) - math.log(cloud.num_particles)
            local = density.sites[name].row_dim is not None
            indices = self._indices(log_weights if local else log_weights.unsqueeze(-1))
            if local:
                moved = proposed[name]
                particles[name] = moved.gather(0, indices.unsqueeze(-1).expand(moved.shape))
                q = conditional.gather(0, indices) - mean
                total = total + (q.sum(-1, keepdim=True) if density.joint else q)
            else:
                particles[name] = proposed[name][indices[:, 0]]
                total = total + (conditional[indices[:, 0]] - mean).unsqueeze(-1)
        log_joint = density.units(*density.log_joint_of(particles))
        return replace(
            cloud,
            particles=particles,
            log_weights=log_joint - total,
            spread=spread,
            log_normalizer=torch.zeros_like(cloud.log_normalizer),
        )

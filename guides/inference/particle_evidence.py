"""The evidence by particles: fresh annealed runs whose mean is unbiased for p(x).

    pilot:   anneal, steps taken from the particles; thrown away but for its steps
    runs:    R times anneal with those steps; p_hat_n = mean over runs

See :mod:`guides.inference.particle_sampler` for why the pilot is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guides.diagnostics.scores import Score
from guides.inference.dependencies import Dependencies
from guides.inference.particle_density import ParticleDensity
from guides.inference.particle_sampler import Sampler

__all__ = ["particle_evidence"]


def particle_evidence(
    sampler: Sampler,
    density: ParticleDensity,
    graph: Dependencies,
    *,
    num_sweeps: int,
    num_particles: int,
    num_repeats: int,
) -> Score:
    """Estimate log p(x) by annealing particles from the prior.

    Args:
        sampler: How particles move.
        density: The program's density.
        graph: Its dependence structure.
        num_sweeps: Temperatures of a run.
        num_particles: Particles of a run.
        num_repeats: Runs that are averaged.

    Returns:
        The score by row, or a joint one where weights are joint.
    """
    steps: list[dict[str, Tensor]] | None = None
    if sampler.variant == "corrected":
        steps = []
        sampler.anneal(density, graph, num_particles, num_sweeps, record=steps)
    runs = torch.stack(
        [
            sampler.anneal(density, graph, num_particles, num_sweeps, steps=steps).log_evidence()
            for _ in range(num_repeats)
        ]
    )  # (R, U)
    estimate = runs.logsumexp(0) - math.log(num_repeats)
    error = torch.full_like(estimate, math.nan)
    if num_repeats > 1:
        error = (runs - estimate).exp().std(0) / num_repeats**0.5
    scale = 1.0 if density.joint else density.layout.scale
    kind = "SMC sampler" if sampler.variant == "corrected" else "published weights, biased"
    return Score(
        rows=None if density.joint else estimate,
        rows_error=None if density.joint else error,
        total=float(estimate.sum()) * scale + density.constant(),
        standard_error=float(error.square().sum().sqrt()) * scale,
        joint=density.joint,
        num_samples=num_particles,
        estimator=(
            f"{'joint ' if density.joint else ''}evidence by particles ({kind}), "
            f"K={num_particles}, {num_sweeps} sweeps, {num_repeats} runs"
        ),
    )

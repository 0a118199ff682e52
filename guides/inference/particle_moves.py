"""Moves of particles: one preconditioned Langevin step of one site, and what it does to weights.

    e        = d log g(u) / du_site                     score of the complete conditional
    P        = 1 / (Var_k[e] + 1/K)                     variance over the particles of a row
    u'       = u + eta P e + sqrt(2 eta P) noise        q(u' | u)

    reverse kernel:  w = g(u') q(u | u') / (g(u) q(u' | u))     near one at stationarity
    Metropolis:      keep u' with probability min(1, w), else u; weights stay
    published:       w = g(u') / q(u' | u)              infinite variance for eta P <= C / 4, with
                                                        C the variance of the conditional

At stationarity the variance of the score is the precision of the conditional, so that P has the
units of its variance and one ``eta`` serves every site.

References:
    | Divide-and-Conquer Predictive Coding (Sennesh, Wu & Salvatori, 2024)
    | https://arxiv.org/abs/2408.05834

    | Sequential Monte Carlo Samplers (Del Moral, Doucet & Jasra, 2006)
    | https://doi.org/10.1111/j.1467-9868.2006.00553.x
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from guides.inference.particle_density import ParticleDensity, Particles

__all__ = [
    "PRECONDITIONERS",
    "corrected_move",
    "precondition",
    "published_move",
    "settled_spread",
    "spread_of",
]

PRECONDITIONERS = ("variance", "normalized", "identity")
_GAIN = 0.02
_FAR = 10.0


def spread_of(score: Tensor, before: Tensor | None = None) -> Tensor:
    """Variance of the score over particles, which one sweep can lower by half at most.

    Copies that a resampling made have equal scores; a preconditioner that followed them at once
    would take steps far too wide. A single particle has variance zero.

    Args:
        score: ``(K, B, d)`` or ``(K, d)``.
        before: What this function returned one sweep before.
    """
    variance = score.var(0) if score.shape[0] > 1 else torch.zeros_like(score[0])
    return variance if before is None else torch.maximum(variance, 0.5 * before)


def settled_spread(score: Tensor, before: Tensor) -> Tensor:
    """The spread for particles that persist: an average over many sweeps.

    A step that is long where the particles are close together and short where they are apart
    leaves them too far apart, whatever the weights: they correct for a step of any length, but not
    for one that depends on the particles. Only a variance far beyond the average is followed.

    Args:
        score: ``(K, B, d)`` or ``(K, d)``.
        before: The spread one sweep before.
    """
    variance = spread_of(score)
    return torch.where(variance > _FAR * before, variance, torch.lerp(before, variance, _GAIN))


def precondition(spread: Tensor, num_particles: int, kind: str = "variance") -> Tensor:
    """The preconditioner P of one site.

    Args:
        spread: Variance of the score, ``(B, d)`` or ``(d,)``.
        num_particles: Number of particles K.
        kind: ``"variance"`` for 1 / (Var + 1/K); ``"normalized"`` for the same divided by its
            mean over the site's coordinates; ``"identity"`` for one.
    """
    if kind == "identity":
        return torch.ones_like(spread)
    found = 1 / (spread + 1 / num_particles)
    return found / found.mean(-1, keepdim=True) if kind == "normalized" else found


def _log_normal(value: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log density of independent normals, summed over the last dimension."""
    square = (value - mean).square() / variance
    return -0.5 * (square + variance.log() + math.log(2 * math.pi)).sum(-1)


def corrected_move(
    density: ParticleDensity,
    particles: Particles,
    name: str,
    *,
    step: Tensor,
    noise: Tensor,
    beta: float = 1.0,
    scored: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Particles, Tensor]:
    """Propose for one site, with the log weight of forward and reverse kernel.

    Args:
        density: The program's density.
        particles: All particles.
        name: The site that moves.
        step: Step times preconditioner, ``(B, d)`` or ``(d,)``; it must not depend on where the
            particles are, up to what a frozen or stationary preconditioner allows.
        noise: Standard normal, shaped as the particles of the site.
        beta: Temperature of the target.
        scored: What ``density.scored`` returns at the particles, if it is known.

    Returns:
        The proposed particles, and log w: ``(K, B)`` for a site in the data plate, ``(K,)`` for
        a global one; minus infinity where the proposal left the range of numbers.
    """
    if scored is None:
        scored = density.scored(particles, name, beta)
    rows, other, score = scored
    here = particles[name]
    mean = here + step * score
    there = mean + (2 * step).sqrt() * noise
    proposed = {**particles, name: there}
    new_rows, new_other, new_score = density.scored(proposed, name, beta)
    forward = _log_normal(there, mean, 2 * step)
    reverse = _log_normal(here, there + step * new_score, 2 * step)
    if density.sites[name].row_dim is None:
        target = (new_rows.sum(-1) + new_other) - (rows.sum(-1) + other)
    else:
        target = new_rows - rows
    log_ratio = target + reverse - forward
    finite = torch.isfinite(log_ratio)
    # A weight of zero frees the state: kept where numbers hold it.
    kept = torch.where(finite.unsqueeze(-1), there, here)
    return {**particles, name: kept}, torch.where(finite, log_ratio, -torch.inf)


def published_move(
    density: ParticleDensity,
    particles: Particles,
    name: str,
    children: tuple[str, ...],
    *,
    step: Tensor,
    noise: Tensor,
    score: Tensor,
) -> tuple[Particles, Tensor, Tensor]:
    """Propose for one site, with the published log weight.

    Returns:
        The proposed particles; the log density of the complete conditional in constrained space,
        up to its constant; and the log weight. ``(K, B)`` for a site in the data plate, ``(K,)``
        for a global one.
    """
    here = particles[name]
    mean = here + step * score
    there = mean + (2 * step).sqrt() * noise
    proposed = {**particles, name: there}
    log_dets = density.over(lambda p: _log_det(density, p, name), {name: there})
    conditional = _own(density, density.terms(proposed), (name, *children), name)
    log_weights = conditional + log_dets - _log_normal(there, mean, 2 * step)
    finite = torch.isfinite(log_weights)
    kept = torch.where(finite.unsqueeze(-1), there, here)
    return {**particles, name: kept}, conditional, torch.where(finite, log_weights, -torch.inf)


def _log_det(density: ParticleDensity, particle: Particles, name: str) -> Tensor:
    log_det = density.values(particle)[1].get(name)
    return particle[name].sum(-1) * 0 if log_det is None else log_det


def _own(
    density: ParticleDensity, terms: Mapping[str, Tensor], names: tuple[str, ...], name: str
) -> Tensor:
    """Terms of some sites, by row for a site in the data plate, else summed."""
    local = density.sites[name].row_dim is not None
    found: Tensor = torch.zeros(())
    for site in names:
        term = terms[site]
        if term.dim() == 2 and not local:
            term = term.sum(-1)
        found = found + term
    return found

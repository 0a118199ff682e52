"""Hamiltonian transitions along a path, and pilot chains that tune their steps.

    v ~ Normal(0, I)
    L times:  u <- u + e/2 S v;  v <- v + e S grad log f_b(u);  u <- u + e/2 S v
    accept with probability min(1, f_b(u') N(v') / f_b(u) N(v))

A trajectory begins and ends with half a step of the position, so that it takes L gradients
whatever the temperature before was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guides.diagnostics.path import Path, Point

__all__ = ["PILOT_CHAINS", "spread_of", "transition", "tune"]

PILOT_CHAINS = 6
_WARM_UP = 15
_LEAST = 30  # transitions of a pilot, beside the warm-up
_RATE = 0.7


def transition(
    part: Path,
    point: Point,
    ends: tuple[Tensor, Tensor],
    b: float,
    spread: Point,
    step: Tensor,
    num_leapfrog: int,
) -> tuple[Point, tuple[Tensor, Tensor], Tensor]:
    """One Hamiltonian transition that leaves ``f_b`` invariant; also acceptance ``(C, U)``."""
    # A step that differs a little from transition to transition meets no period of the orbit.
    step = (step * (0.9 + 0.2 * torch.rand(()))).to(ends[0])
    moves = {k: _expand(step, v) * spread[k] for k, v in point.items()}  # (B, K) or (K,)
    velocity = {k: torch.randn_like(v) for k, v in point.items()}
    kinetic = _kinetic(part, velocity)
    moved = dict(point)
    for i in range(num_leapfrog):
        half = 0.5 if i == 0 else 1.0
        moved = {k: v + half * moves[k] * velocity[k] for k, v in moved.items()}
        gradient = part.gradient(moved, b)
        velocity = {k: v + moves[k] * gradient[k] for k, v in velocity.items()}
    moved = {k: v + 0.5 * moves[k] * velocity[k] for k, v in moved.items()}
    after = part.ends(moved)
    log_ratio = _interpolate(after, b) - _interpolate(ends, b)
    log_ratio = log_ratio + kinetic - _kinetic(part, velocity)
    # A trajectory that left the range of numbers is rejected.
    valid = torch.isfinite(after[0]) & torch.isfinite(after[1]) & ~torch.isnan(log_ratio)
    rate = torch.where(valid, log_ratio.clamp_max(0.0).exp(), 0.0)
    accepted = _accept(rate)
    return (
        {k: torch.where(_expand(accepted, v), moved[k], v) for k, v in point.items()},
        (
            torch.where(accepted, after[0], ends[0]),
            torch.where(accepted, after[1], ends[1]),
        ),
        rate,
    )


def _accept(rate: Tensor) -> Tensor:
    return torch.rand_like(rate) < rate


def _interpolate(ends: tuple[Tensor, Tensor], b: float) -> Tensor:
    return (1 - b) * ends[0].double() + b * ends[1].double()


def _kinetic(part: Path, velocity: Point) -> Tensor:
    """Kinetic energy by unit, ``(C, U)``."""
    energies = [0.5 * v.double().square().sum(-1) for v in velocity.values()]
    if part.joint:
        return sum(e.reshape(len(e), -1).sum(-1, keepdim=True) for e in energies)  # type: ignore[return-value]
    return sum(energies)  # type: ignore[return-value]


def _expand(unit: Tensor, value: Tensor) -> Tensor:
    """A number a unit, ``(U,)`` or ``(C, U)``, at packed latents of all chains."""
    if value.dim() == 3:
        return unit.unsqueeze(-1)  # U is B, or one for all rows
    return unit


def spread_of(draws: Point) -> Point:
    """Spread of the start by coordinate, from quartiles: a prior may have no variance."""
    result = {}
    for name, value in draws.items():
        low, high = value.quantile(0.25, 0), value.quantile(0.75, 0)
        spread = (high - low) / 1.349
        result[name] = torch.where(torch.isfinite(spread) & (spread > 0), spread, 1.0)
    return result


def tune(
    part: Path, betas: Sequence[float], spread: Point, num_leapfrog: int, target: float
) -> tuple[Tensor, int]:
    """Steps of the units along the path ``(T, U)`` by pilot chains, and their transitions."""
    size = sum(math.prod(group.shape[-1 - part.joint :]) for group in part.layout.groups)
    log_step = torch.full((part.num_units,), -0.25 * math.log(size), dtype=torch.float64)
    point = part.draw(PILOT_CHAINS)
    ends = part.ends(point)
    inner = betas[1:-1]
    every = max(1, round(len(inner) / max(20, len(inner) // 2)))
    chosen = inner[::every]
    repeats = -(-_LEAST // max(1, len(chosen)))
    log_step = log_step.to(ends[0].device)
    found, transitions = [], 0
    for i, b in enumerate(chosen):
        for _ in range(repeats + (_WARM_UP if i == 0 else 0)):
            point, ends, rate = transition(
                part, point, ends, b, spread, log_step.exp(), num_leapfrog
            )
            log_step = log_step + _RATE * (rate.mean(0) - target)
            transitions += 1
        found.append(log_step)
    if not found:
        return log_step.exp().expand(len(betas), -1), 0
    position = torch.arange(len(betas)) // every
    return torch.stack(found).exp()[position.clamp_max(len(found) - 1)], transitions

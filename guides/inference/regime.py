"""The regime of a relaxation: how far it goes, and whether its steps are stable.

    a mode of curvature lambda keeps (1 - eta lambda)^T of its distance after T steps of size eta

What a relaxation moves first is what its first gradient g excites, of curvature

    lambda_g = g^T H g / g^T g                   at the start

References:
    | Goemaere et al. (2026), Theorem C.9: one step in standardized coordinates from the
    | feed-forward state is backpropagation
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.inference.relaxation import Relaxed, curvature
from guides.inference.solvers.solver import Solver
from guides.inference.units import Packed, Units, dot

__all__ = ["Regime", "measure", "verdict_of", "warn_regime"]

_SMALL, _NEAR = 0.1, 0.05


@dataclass(frozen=True)
class Regime:
    """How far a relaxation goes, for every unit: a row, or all latents where globals relax too.

    Args:
        step_curvature: Step times lambda_max ``(U,)``, stable below 2 for gradient descent; where
            the solver finds its steps itself there is no such number, and this is None.
        excited: ``lambda_g`` over lambda_max ``(U,)``: what share of the fastest rate the first
            gradient is relaxed by.
        relaxed: ``1 - (1 - eta lambda_g)^T`` ``(U,)``, the fraction of what is excited that T
            steps relax; None with ``step_curvature``.
        residual: Gradient left at the end over that at the start ``(U,)``, as measured.
        num_steps: Updates that were made.
        verdict: ``"unstable"``, ``"backpropagation"``, ``"partial"`` or ``"equilibrium"``.
    """

    step_curvature: Tensor | None
    excited: Tensor
    relaxed: Tensor | None
    residual: Tensor
    num_steps: int
    verdict: str

    def __str__(self) -> str:
        """One line, with quartiles over the units."""
        parts = [f"{self.verdict} after {self.num_steps} steps"]
        if self.step_curvature is not None and self.relaxed is not None:
            parts.append(f"step x lambda_max {_quartiles(self.step_curvature)}")
            parts.append(f"fraction relaxed {_quartiles(self.relaxed)}")
        parts.append(f"gradient left {_quartiles(self.residual)}")
        return ", ".join(parts)


def measure(
    units: Units,
    start: Packed,
    relaxed: Relaxed,
    step_size: float | None,
    *,
    feed_forward: bool,
    solver: Solver,
) -> Regime:
    """The regime of a relaxation that was made.

    Args:
        units: The energy, at the start.
        start: Packed latents at the start.
        relaxed: What came out.
        step_size: The step if it was a number.
        feed_forward: Whether it began where standardized errors are zero, and moved those.
        solver: What made it.
    """
    with torch.no_grad():
        x = units.flatten(start)
        point = units.at(x)
        g = point.gradient
        tiny = torch.finfo(g.dtype).tiny
        excited = dot(g, units.product(x)(g)) / dot(g, g).clamp_min(tiny)
        largest = _largest(units, start)
        ended = units.at(units.flatten(relaxed.packed)).gradient
        residual = dot(ended, ended).sqrt() / dot(g, g).sqrt().clamp_min(tiny)
        share = excited / largest.clamp_min(tiny)
        if not solver.uses_curvature:
            verdict = verdict_of(None, None, residual, feed_forward)
            return Regime(None, share, None, residual, relaxed.num_steps, verdict)
        # What steps from the curvature start with; backtracking only shortens them.
        rate = 1 / (1.1 * (2.0 if len(units.moving) > 1 else 1.0))
        product = largest * step_size if step_size is not None else torch.full_like(largest, rate)
        fraction = 1 - (1 - product * share) ** relaxed.num_steps
        verdict = verdict_of(product * 2 / solver.stable, fraction, residual, feed_forward)
        return Regime(product, share, fraction, residual, relaxed.num_steps, verdict)


def _largest(units: Units, start: Packed) -> Tensor:
    """Lambda_max of every unit ``(U,)``; of the whole where everything is one unit."""
    if not units.joint:
        return curvature(units.function, start, units.scale)["data"]
    whole = {"all": units.flatten(start).squeeze(0)}

    def energy(packed: Packed) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return units.function(units.packed(packed["all"].unsqueeze(0)))

    return curvature(energy, whole, 1.0)["all"]


def verdict_of(
    step_curvature: Tensor | None, fraction: Tensor | None, residual: Tensor, feed_forward: bool
) -> str:
    """What the numbers of a relaxation say; see :class:`Regime`."""
    if step_curvature is not None and bool((step_curvature >= 2).any()):
        return "unstable"
    done = 1 - residual if fraction is None else fraction
    if feed_forward and float(done.median()) < _SMALL:
        return "backpropagation"
    return "equilibrium" if float(residual.median()) < _NEAR else "partial"


def warn_regime(verdict: str) -> None:
    """Warn where a relaxation is not what it is taken for."""
    if verdict == "unstable":
        warnings.warn(
            "The step of the latents is not below 2 / lambda_max, so the relaxation moves away "
            'from the equilibrium. Use step_size="auto", or a smaller number; lambda_max grows '
            "while weights are learned.",
            UserWarning,
            stacklevel=3,
        )
    if verdict == "backpropagation":
        warnings.warn(
            "This relaxation hardly leaves the feed-forward state, and what is learned there is "
            "backpropagation's gradient times a small number. Make more steps (num_steps), or "
            'larger ones (step_size="auto"), or train by SVI, which is cheaper.',
            UserWarning,
            stacklevel=3,
        )


def _quartiles(values: Tensor) -> str:
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype, device=values.device)
    low, middle, high = values.quantile(levels).tolist()
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"

"""Nonlinear conjugate gradients with an exact step along every direction of a quadratic.

References:
    | Function minimization by conjugate gradients (Fletcher & Reeves, 1964)
    | https://doi.org/10.1093/comjnl/7.2.149

    | Note sur la convergence de methodes de directions conjuguees (Polak & Ribiere, 1969)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units, dot

__all__ = ["ConjugateGradient"]


class ConjugateGradient(Descent):
    """One gradient and one Hessian product a step.

        beta = <g, M (g - g_before)> / <g_before, M g_before>
        d <- -M g + max(0, beta) d_before
        d <- -M g                            for a unit where <g, d> >= 0
        u <- u + a d                         a = |<g, d>| / |<d, H d>|

    The length is exact along a direction of a quadratic, whose minimum is reached in as many
    steps as its Hessian has different eigenvalues. Along a concave direction it is that of the
    mirrored, convex one. A unit whose energy would rise stays and starts over from its gradient.
    """

    uses_curvature: ClassVar[bool] = False
    numeric: ClassVar[bool] = False

    def memory(self, point: Point) -> State:
        """No direction."""
        zero = torch.zeros_like(point.x)
        return {"direction": zero, "before": zero}

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """No direction, and full steps."""
        return super().start(units, point, weights, False)

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """Along the conjugate direction, by its length."""
        tiny = torch.finfo(point.x.dtype).tiny
        factor, metric = state["factor"].unsqueeze(-1), state["weights"]
        g, before = point.gradient, state["before"]
        beta = dot(g, metric * (g - before)) / dot(before, metric * before).clamp_min(tiny)
        beta = torch.where(state["used"] > 0, beta.clamp_min(0), torch.zeros_like(beta))
        direction = beta.unsqueeze(-1) * state["direction"] - metric * g
        slope = dot(g, direction)
        descends = (slope < 0) & torch.isfinite(slope)
        direction = torch.where(descends.unsqueeze(-1), direction, -metric * g)
        slope = dot(g, direction)
        curvature = dot(direction, units.product(point.x)(direction))
        length = slope.abs() / curvature.abs().clamp_min(tiny)
        return factor * length.unsqueeze(-1) * direction, {"direction": direction, "before": g}

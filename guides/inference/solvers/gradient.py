"""Gradient descent: the textbook dynamics of predictive coding."""

from __future__ import annotations

from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units

__all__ = ["Gradient"]


class Gradient(Descent):
    """``u <- u - eta dE/du``; one gradient a step.

    On a quadratic a mode of curvature lambda keeps ``(1 - eta lambda)^T`` of its distance after T
    steps, so that it converges if and only if ``eta < 2 / lambda_max``.
    """

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """Down the gradient."""
        return -weights * point.gradient, {}

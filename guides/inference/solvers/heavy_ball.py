"""Heavy ball: gradient descent with momentum.

References:
    | Some methods of speeding up the convergence of iteration methods (Polyak, 1964)
    | https://doi.org/10.1016/0041-5553(64)90137-5

    | Adaptive restart for accelerated gradient schemes (O'Donoghue & Candes, 2015)
    | https://arxiv.org/abs/1204.3982
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units

__all__ = ["HeavyBall"]


@dataclass
class HeavyBall(Descent):
    """``v <- momentum v - eta dE/du;  u <- u + v``; one gradient a step.

    A unit whose energy would rise drops its velocity. With a numeric step size it never does, and
    on a quadratic it then converges if and only if ``eta < 2 (1 + momentum) / lambda_max``.

    Args:
        momentum: What is kept of the velocity.
    """

    momentum: float = 0.9

    @property
    def stable(self) -> float:  # type: ignore[override]
        """Twice one plus the momentum."""
        return 2 * (1 + self.momentum)

    def memory(self, point: Point) -> State:
        """No velocity."""
        return {"velocity": torch.zeros_like(point.x)}

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """The velocity."""
        velocity = self.momentum * state["velocity"] - weights * point.gradient
        return velocity, {"velocity": velocity}

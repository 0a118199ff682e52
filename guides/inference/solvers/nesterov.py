"""Nesterov's accelerated gradient, restarted where it overshoots.

References:
    | A method for solving the convex programming problem with convergence rate O(1/k^2)
    | (Nesterov, 1983)

    | Adaptive restart for accelerated gradient schemes (O'Donoghue & Candes, 2015)
    | https://arxiv.org/abs/1204.3982
"""

from __future__ import annotations

import torch
from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units

__all__ = ["Nesterov"]


class Nesterov(Descent):
    """One gradient a step, taken at the extrapolated state ``y``, which is also what is returned.

        x  <- y - eta dE/dy
        t' <- (1 + sqrt(1 + 4 t^2)) / 2
        y  <- x + (t - 1) / t' (x - x_before)

    A unit whose energy would rise starts over with t = 1.
    """

    stable = 4.0 / 3.0  # of the largest extrapolation

    def memory(self, point: Point) -> State:
        """At rest."""
        return {"before": point.x, "t": torch.ones_like(point.energy)}

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """To the next extrapolated state."""
        t = state["t"]
        after = 0.5 * (1 + (1 + 4 * t.square()).sqrt())
        x = point.x - weights * point.gradient
        y = x + ((t - 1) / after).unsqueeze(-1) * (x - state["before"])
        return y - point.x, {"before": x, "t": after}

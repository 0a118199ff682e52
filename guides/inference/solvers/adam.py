"""Adam on latents, its moments new in every relaxation.

References:
    | Adam: A Method for Stochastic Optimization (Kingma & Ba, 2015)
    | https://arxiv.org/abs/1412.6980
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units

__all__ = ["Adam"]


@dataclass
class Adam(Descent):
    """Every coordinate moves by about ``lr``, whatever its curvature; one gradient a step.

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        u <- u - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    A unit whose energy would rise forgets its moments, and then halves its ``lr``.

    Args:
        lr: Step; a numeric ``step_size`` of the loop takes its place.
        beta1: What is kept of the first moment.
        beta2: What is kept of the second moment.
        eps: Keeps the denominator from zero.
    """

    uses_curvature: ClassVar[bool] = False

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def memory(self, point: Point) -> State:
        """No moments."""
        zero = torch.zeros_like(point.x)
        return {"first": zero, "second": zero, "time": torch.zeros_like(point.energy)}

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """The moments; a numeric step is the same in every coordinate."""
        state = super().start(units, point, weights, fixed)
        if not fixed:
            state["weights"] = torch.full_like(weights, self.lr)
        elif units.joint:
            # A step is no multiple of the gradient here, so the N/B has no place in it.
            packed = {k: units.packed(weights)[k] for k in units.moving}
            state["weights"] = units.flatten(
                {k: v * units.scale if v.dim() == 2 else v for k, v in packed.items()}
            )
        return state

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """The first moment over the root of the second."""
        time = state["time"] + 1
        first = self.beta1 * state["first"] + (1 - self.beta1) * point.gradient
        second = self.beta2 * state["second"] + (1 - self.beta2) * point.gradient.square()
        mean = first / (1 - self.beta1**time).unsqueeze(-1)
        root = (second / (1 - self.beta2**time).unsqueeze(-1)).sqrt()
        delta = -weights * mean / (root + self.eps)
        return delta, {"first": first, "second": second, "time": time}

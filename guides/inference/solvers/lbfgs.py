"""Limited-memory BFGS, every datum with a memory of its own.

References:
    | Updating quasi-Newton matrices with limited storage (Nocedal, 1980)
    | https://doi.org/10.1090/S0025-5718-1980-0572855-7
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guides.inference.solvers.solver import Descent, State
from guides.inference.units import Point, Units, dot

__all__ = ["LBFGS"]


@dataclass
class LBFGS(Descent):
    """One gradient a step, and one Hessian product in all, for the length of the first step.

    The direction is the two-loop recursion over the last ``history`` pairs ``s = u - u_before``,
    ``y = g - g_before`` with ``<s, y> > 0``; other pairs are left out. A unit whose energy would
    rise forgets its pairs, and then halves its step.

    Args:
        history: Number of pairs.
    """

    uses_curvature: ClassVar[bool] = False
    numeric: ClassVar[bool] = False

    history: int = 8

    def memory(self, point: Point) -> State:
        """No pairs."""
        none = point.x.new_zeros((len(point.x), self.history, point.x.shape[-1]))
        return {"s": none, "y": none, "x": point.x, "g": point.gradient}

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """The first step is exact along the gradient of a quadratic."""
        direction = weights * point.gradient
        curvature = dot(direction, units.product(point.x)(direction)).abs()
        tiny = torch.finfo(point.x.dtype).tiny
        length = dot(point.gradient, direction) / curvature.clamp_min(tiny)
        return super().start(units, point, weights * length.unsqueeze(-1), False)

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """The two-loop recursion on all units at once."""
        tiny = torch.finfo(point.x.dtype).tiny
        s, y = point.x - state["x"], point.gradient - state["g"]
        # A pair without curvature, or none at all, is written as zeros, and then has no weight.
        good = (dot(s, y) > 1e-10 * dot(y, y).sqrt() * dot(s, s).sqrt()).unsqueeze(-1)
        zero = torch.zeros_like(s)
        past_s = torch.cat([state["s"][:, 1:], torch.where(good, s, zero).unsqueeze(1)], 1)
        past_y = torch.cat([state["y"][:, 1:], torch.where(good, y, zero).unsqueeze(1)], 1)
        inner = (past_s * past_y).sum(-1)  # (U, history)
        rho = torch.where(inner > 0, 1 / inner.clamp_min(tiny), torch.zeros_like(inner))
        q = point.gradient
        alphas = []
        for i in reversed(range(self.history)):
            alpha = rho[:, i] * dot(past_s[:, i], q)
            q = q - alpha.unsqueeze(-1) * past_y[:, i]
            alphas.append(alpha)
        # The scale of the newest pair that counts; the plain step where there is none.
        scaled = weights * q
        for i in range(self.history):
            known = (rho[:, i] > 0).unsqueeze(-1)
            gamma = inner[:, i] / dot(past_y[:, i], past_y[:, i]).clamp_min(tiny)
            scaled = torch.where(known, gamma.unsqueeze(-1) * q, scaled)
        for i in range(self.history):
            beta = rho[:, i] * dot(past_y[:, i], scaled)
            scaled = scaled + (alphas[self.history - 1 - i] - beta).unsqueeze(-1) * past_s[:, i]
        paired = (rho > 0).any(-1, keepdim=True)
        scaled = torch.where(paired, state["factor"].unsqueeze(-1) * scaled, scaled)
        memory = {"s": past_s, "y": past_y, "x": point.x, "g": point.gradient}
        return -scaled, memory

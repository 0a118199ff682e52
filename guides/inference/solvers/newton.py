"""Newton's method as a relaxation: the whole Hessian of every unit, for small latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guides.inference.curvature import hessian
from guides.inference.newton import newton_direction
from guides.inference.solvers.solver import Solver, State, falls
from guides.inference.switched_off import decoupled, empty
from guides.inference.units import EnergyFunction, Point, Units

__all__ = ["Newton"]


@dataclass
class Newton(Solver):
    """``u <- u - t |H|^-1 dE/du``; one gradient and K Hessian products a step.

    Eigenvalues of the Hessian are replaced by their absolute values, so that every step goes down
    and leaves saddles; where global latents move too, the arrow form of the Hessian is solved
    (:mod:`guides.inference.newton`). A unit whose energy would rise stays, and its t becomes a
    quarter; the Hessian is taken anew only after a step that was accepted by some unit.

    Args:
        most: Coordinates of a row, and of the global latents, at most.
    """

    uses_curvature: ClassVar[bool] = False
    numeric: ClassVar[bool] = False
    uncapturable: ClassVar[str | None] = "Newton steps decompose Hessians by their values"

    most: int = 256

    def energy(self, units: Units, point: Point) -> EnergyFunction:
        """The energy whose Hessian is taken at a point."""
        return units.function

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """Full steps."""
        size = max(units.held[name].shape[-1] for name in units.moving)
        if size > self.most:
            raise ValueError(
                f"This solver takes whole Hessians, and a group of latents has {size} coordinates "
                f'of at most {self.most}. Use solver="truncated_newton", or "auto".'
            )
        one = torch.ones_like(point.energy)
        none = torch.zeros_like(point.x)
        return {"factor": one, "direction": none, "stale": one}

    def step(
        self, units: Units, point: Point, state: State, last: bool = False
    ) -> tuple[Point, State]:
        """A Newton step, or a shorter one along the direction that was refused."""
        stale = state["stale"] > 0
        direction = state["direction"]
        if bool(stale.any()):
            found = self._direction(units, point)
            direction = torch.where(stale.unsqueeze(-1), found, direction)
        factor = state["factor"]
        trial = units.at(point.x - factor.unsqueeze(-1) * direction)
        accepted = falls(point, trial)
        factor = torch.where(accepted, torch.ones_like(factor), 0.25 * factor)
        state = {"factor": factor, "direction": direction, "stale": accepted.to(factor)}
        return point.where(accepted, trial), state

    def _direction(self, units: Units, point: Point) -> Tensor:
        packed = units.packed(point.x)
        moving = {name: packed[name] for name in units.moving}
        held = {name: value for name, value in packed.items() if name not in moving}
        # Of the rows' latents, and of the global ones.
        units.count(products=sum(value.shape[-1] for value in moving.values()))
        blocks = hessian(
            units.log_joint,
            moving,
            jacobian=units.jacobian,
            energy=self.energy(units, point),
            held=held,
        )
        finite = torch.stack([torch.isfinite(block).all() for block in blocks.values()]).all()
        if not bool(finite):
            # No Hessian to divide by: a short step down the gradient.
            return point.gradient / (1 + point.gradient.norm(dim=-1, keepdim=True))
        gradients = units.packed(point.gradient)
        totals = {
            name: gradients[name] * (1.0 if units.joint else units.scale) for name in units.moving
        }
        blocks = decoupled(blocks, empty(units.log_joint.layout, blocks))
        return units.flatten(newton_direction(totals, blocks, units.scale))

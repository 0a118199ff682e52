"""What a solver is: a step on all units at once, with a state of its own a unit.

    step:  (point, state) -> (point, state)     one gradient, or what the solver states beside it

Rows never see each other: whatever a solver decides (step lengths, restarts, acceptance) it
decides for every unit alone, by ``torch.where``, so that a batch is as good as its rows one by
one and a relaxation can be written down as a graph.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from guides.inference import solvers
from guides.inference.units import Point, Units, dot

__all__ = ["Descent", "Solver", "State", "check_solver", "falls", "pick"]

State = dict[str, Tensor]
"""Tensors by name, units first: rows that are done can be taken out."""


def falls(old: Point, new: Point) -> Tensor:
    """Which units go down ``(U,)``.

    Rounding may raise a converged energy by an ulp or so, and hides what a step does to it; there
    the gradient decides.
    """
    change = new.energy - old.energy
    slack = 8 * torch.finfo(old.energy.dtype).eps * (1 + old.energy.abs())
    calmer = dot(new.gradient, new.gradient) <= 1.001 * dot(old.gradient, old.gradient)
    return ((change < -slack) | ((change <= slack) & calmer)) & new.finite()


def pick(accepted: Tensor, new: State, old: State) -> State:
    """The new state where accepted ``(U,)``, the old one elsewhere."""
    return {
        name: torch.where(accepted.reshape(-1, *(1,) * (value.dim() - 1)), value, old[name])
        for name, value in new.items()
    }


class Solver:
    """A solver of one relaxation; made anew for each.

    Attributes:
        uses_curvature: Whether its steps are multiples of 1 / lambda_max of the unit.
        stable: Step times lambda_max from which on it is unstable, where it uses the curvature.
        numeric: Whether a numeric ``step_size`` means something to it.
        uncapturable: Why its steps cannot be written down as a graph; None where they can.
        idle: Whether nothing is pending, so that rows may be taken out between two steps.
    """

    uses_curvature: ClassVar[bool] = True
    stable = 2.0
    numeric: ClassVar[bool] = True
    uncapturable: ClassVar[str | None] = None
    idle: bool = True

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """The state at the start.

        Args:
            units: The energy.
            point: Where the relaxation starts.
            weights: What the flat gradient is multiplied by in a plain step ``(U, K)``.
            fixed: Whether the step is a number that the user gave: no backtracking then.
        """
        raise NotImplementedError

    def step(
        self, units: Units, point: Point, state: State, last: bool = False
    ) -> tuple[Point, State]:
        """Make one step.

        Args:
            units: The energy.
            point: Where the units are.
            state: The solver's state there.
            last: Whether no step follows, so that nothing may be left pending.
        """
        raise NotImplementedError


class Descent(Solver):
    """Solvers that propose one displacement a step and evaluate it once.

    A unit whose energy would rise stays; its memory of earlier steps is forgotten, and where it
    had none its step is halved. The step grows back slowly, up to the one from the curvature.
    """

    growth: ClassVar[float] = 1.2
    largest: ClassVar[float] = 1.0

    def memory(self, point: Point) -> State:
        """What the solver remembers, as it is before the first step."""
        return {}

    def move(
        self, units: Units, point: Point, state: State, weights: Tensor
    ) -> tuple[Tensor, State]:
        """The displacement ``(U, K)``, and the memory after it."""
        raise NotImplementedError

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """The memory, the weights, and a factor of the step of every unit."""
        self.fixed = fixed
        factor = torch.ones_like(point.energy)
        used = torch.zeros_like(point.energy)
        return {**self.memory(point), "weights": weights, "factor": factor, "used": used}

    def step(
        self, units: Units, point: Point, state: State, last: bool = False
    ) -> tuple[Point, State]:
        """One displacement, one gradient; units that would rise stay."""
        factor, weights = state["factor"], state["weights"]
        delta, memory = self.move(units, point, state, weights * factor.unsqueeze(-1))
        trial = units.at((point.x + delta).to(point.x.dtype))
        used = torch.ones_like(state["used"])
        if self.fixed:
            return trial, {**memory, "weights": weights, "factor": factor, "used": used}
        accepted = falls(point, trial)
        fresh = self.memory(point)
        remembered = (state["used"] > 0) if fresh else torch.zeros_like(accepted)
        shorter = torch.where(remembered, factor, 0.5 * factor)
        factor = torch.where(accepted, (factor * self.growth).clamp_max(self.largest), shorter)
        memory = pick(accepted, memory, fresh)
        used = torch.where(accepted, used, torch.zeros_like(used))
        state = {**memory, "weights": weights, "factor": factor, "used": used}
        return point.where(accepted, trial), state


def check_solver(solver: str | Solver, step_size: object) -> None:
    """Raise for a solver that does not exist, or that takes no number as its step.

    Args:
        solver: A key of ``SOLVERS``, or a solver.
        step_size: What it is to be given.
    """
    method = solvers.make(solver)
    if step_size != "auto" and isinstance(step_size, (int, float)) and not method.numeric:
        raise ValueError(
            f"{type(method).__name__} finds the length of its steps itself and takes no number "
            'as step_size. Leave it at "auto", or use solver="gradient".'
        )

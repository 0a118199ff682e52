"""Rows that are done leave the batch: what is left is relaxed as a smaller call of the program.

A unit is done when its gradient is nowhere larger than the tolerance. It then stays where it is;
and when half of the rows of a call are done, the call is sliced by the model's data arguments
(:mod:`guides.rows`) and only the others go on. Where a call cannot be sliced, rows only stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.solvers.solver import Solver, State, pick
from guides.inference.units import Point, Units
from guides.layout import layout as read_layout
from guides.rows import take_rows

__all__ = ["Batch"]


class Batch:
    """The rows that still move, and those that are done.

    Args:
        units: The energy of the whole call.
        point: Where it is.
        state: The solver's state.
        data_args: See :func:`guides.rows.data_args_of`.
    """

    def __init__(
        self, units: Units, point: Point, state: State, data_args: Mapping[str, int] | None
    ) -> None:
        self.full = point
        self.factors = state.get("factor", torch.ones_like(point.energy))
        self.units = units
        self.point = point
        self.state = state
        self.data_args = data_args
        self.moves: Tensor | None = None
        self.rows: Tensor | None = None
        self.can_slice = not units.joint

    def settle(self, tolerance: float) -> bool:
        """Find the units that are done; whether any is left."""
        self.moves = self.units.size(self.point.gradient) > tolerance
        # What is not finite is not done, and stays refused.
        self.moves = self.moves | ~self.point.finite()
        left = int(self.moves.sum())
        if left and self.can_slice and 2 * left <= len(self.moves):
            self._slice()
        return left > 0

    def step(self, method: Solver, last: bool) -> None:
        """One step of the solver on the units that move."""
        point, state = method.step(self.units, self.point, self.state, last)
        if self.moves is not None and not bool(self.moves.all()):
            point = self.point.where(self.moves, point)
            state = pick(self.moves, state, self.state)
        self.point, self.state = point, state

    def gather(self) -> tuple[Point, Tensor]:
        """All rows of the call, and the factors of their steps."""
        factors = self.state.get("factor", torch.ones_like(self.point.energy))
        if self.rows is None:
            return self.point, factors
        self._keep(factors)
        return self.full, self.factors

    def _keep(self, factors: Tensor) -> None:
        """Write the rows at hand into the whole call."""
        rows, point = self.rows, self.point
        if rows is None:
            self.full, self.factors = point, factors
            return

        def put(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, rows, new)

        self.full = Point(
            put(self.full.x, point.x),
            put(self.full.gradient, point.gradient),
            put(self.full.energy, point.energy),
            put(self.full.rows, point.rows),
            self.full.other,
        )
        self.factors = put(self.factors, factors)

    def _slice(self) -> None:
        kept = self.moves.nonzero().flatten()  # type: ignore[union-attr]
        units = self._sliced_units(kept)
        if units is None:
            self.can_slice = False
            return
        self._keep(self.state.get("factor", torch.ones_like(self.point.energy)))
        self.rows = kept if self.rows is None else self.rows[kept]
        self.point = self.point.take(kept)
        self.state = {name: value[kept] for name, value in self.state.items()}
        self.moves = None
        self.units = units

    def _sliced_units(self, kept: Tensor) -> Units | None:
        """The energy of some of the rows at hand; None where the program cannot be sliced."""
        log_joint = self.units.log_joint
        read = log_joint.layout
        plate = read.data_plate
        if plate is None or plate.random:
            return None
        try:
            args, kwargs = take_rows(
                log_joint.model, log_joint.args, log_joint.kwargs, kept, read, self.data_args
            )
            smaller = read_layout(log_joint.model, args, kwargs, data_plate=plate.name)
            held = {**self.units.held, "data": self.point.x[kept]}
            units = Units(
                LogJoint(log_joint.model, args, kwargs, layout=smaller),
                held,
                jacobian=self.units.jacobian,
                noncentered=self.units.noncentered,
                hold_globals=True,
                counts=self.units.counts,
            )
            found = units.at(self.point.x[kept])
        except (ValueError, RuntimeError, IndexError):
            return None
        # A program may know its rows by other ways than its arguments: then it is not sliced.
        expected = self.point.energy[kept]
        root = torch.finfo(expected.dtype).eps ** 0.5
        if found.energy.shape != expected.shape or not torch.allclose(
            found.energy, expected, rtol=root, atol=root, equal_nan=True
        ):
            return None
        return units

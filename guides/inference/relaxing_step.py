"""How a loop relaxes: where it starts, in which coordinates, how far, and what it keeps.

A loop of predictive coding is a step that learns around one relaxation. This class holds the
relaxation and the state that persists between steps: global latents, curvatures, rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from guides import location_scale
from guides.capturing import is_capturing
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.inference import solvers
from guides.inference.captured_step import CapturedStep
from guides.inference.checks import capture, check_ownership
from guides.inference.regime import warn_regime
from guides.inference.relaxation import Relaxed, curvature, energy_function, relax
from guides.inference.row_memory import RowMemory
from guides.inference.same_data import CallData
from guides.inference.solvers.auto import Choice, choose
from guides.inference.solvers.solver import Solver
from guides.inference.start import insert, off_center
from guides.inference.switched_off import check_masks
from guides.inference.warm_start import keep_last, recall_last
from guides.layout import Layout, layout

__all__ = ["RelaxingStep", "holds_globals"]

_REFRESH = 50


class RelaxingStep(CapturedStep):
    """The relaxation of a loop and its state; arguments are those of ``PredictiveCoding``."""

    num_steps: int
    step_size: float | str
    parameterization: str
    solver: str | Solver
    jacobian: bool
    data_plate: str | None
    data_args: Mapping[str, int] | None
    warm_start: str | None
    rows_by_position: bool
    global_rate: float | None
    num_products: int
    _globals: dict[str, Tensor] | None
    _curvature: dict[str, Tensor] | None
    _checked: set[tuple[str, ...]]
    _chosen: Choice | None
    _memory: RowMemory

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters: global latents and curvatures."""
        return {
            "globals": None if self._globals is None else dict(self._globals),
            "curvature": None if self._curvature is None else dict(self._curvature),
            "steps": self._steps,
            "gradient_evaluations": self.gradient_evaluations,
            "rows": self._memory.state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        self._globals = state["globals"]
        self._curvature = state["curvature"]
        self._steps = state["steps"]
        self.gradient_evaluations = state["gradient_evaluations"]
        if "rows" in state:
            self._memory.set_state(state["rows"])

    def _tensors(self) -> dict[str, Tensor]:
        found = {} if self._curvature is None else dict(self._curvature)
        result = {f"curvature {name}": value for name, value in found.items()}
        kept = {} if self._globals is None else self._globals
        return result | {f"global {name}": value for name, value in kept.items()}

    def _put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        def named(kind: str) -> dict[str, Tensor] | None:
            start = f"{kind} "
            found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            return found or None

        self._curvature, self._globals = named("curvature"), named("global")

    def _settings(self) -> tuple[Any, ...]:
        return (
            id(self.model),
            id(self.guide),
            self.num_steps,
            self.step_size,
            self.parameterization,
            self.solver if isinstance(self.solver, str) else id(self.solver),
            self.jacobian,
            self.data_plate,
            self.tolerance,
            self.warm_start,
            self.global_rate,
            tuple(self._tensors()),
        )

    def _refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._curvature is not None and self._steps % _REFRESH == 0:
            log_joint = self._log_joint(args, kwargs)
            packed, moved = self._start_packed(log_joint)
            self._cached_curvature(log_joint, packed, moved)

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        first = not self._checked
        read = layout(self.model, args, kwargs, data_plate=self.data_plate, check=first)
        if not read.groups:
            raise ValueError("The model has no latent sites, so there is nothing to relax.")
        if fresh := read.fresh_indices():
            read = layout(self.model, args, kwargs, data_plate=self.data_plate, indices=fresh)
        log_joint = LogJoint(self.model, args, kwargs, layout=read)
        if first:
            self._check(log_joint, args, kwargs)
        return log_joint

    def _check(
        self, log_joint: LogJoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        programs: dict[str, Any] = {"model": self.model}
        if self.guide is not None:
            programs["guide"] = self.guide
        check_ownership(programs, {role: capture(p, args, kwargs) for role, p in programs.items()})
        if self.jacobian:
            check_masks(log_joint.layout)
        # Distributions check the data once; the relaxation itself runs without checks.
        values = log_joint.predictions()
        with torch.no_grad():
            log_joint.run(values, validate=True)
        log_joint.check_rows(log_joint.layout.pack(values), jacobian=self.jacobian)
        self._checked.add(tuple(log_joint.layout.sites))

    def _relax(
        self, log_joint: LogJoint, learning: bool = False, hold_globals: bool = False
    ) -> tuple[dict[str, Tensor], Relaxed]:
        read = log_joint.layout
        packed, moved = self._start_packed(log_joint)
        step_size: Any = self.step_size
        solver = self._solver(read)
        if step_size == "auto" and learning and (solver.uses_curvature or hold_globals):
            step_size = self._cached_curvature(log_joint, packed, moved)
        relaxed = relax(
            log_joint,
            packed,
            num_steps=self.num_steps,
            step_size=step_size,
            jacobian=self.jacobian,
            noncentered=moved,
            tolerance=self.tolerance,
            hold_globals=hold_globals,
            solver=solver,
            data_args=self.data_args,
        )
        self.gradient_evaluations += relaxed.row_gradients
        self.num_products += relaxed.num_products
        values = self._values(log_joint, relaxed.packed)
        if learning:
            self._watch(log_joint, packed, moved)
            if self.warm_start == "last":
                keep_last(self._memory, log_joint, values, self._data_of(log_joint))
        return values, relaxed

    def _watch(
        self, log_joint: LogJoint, start: dict[str, Tensor], moved: tuple[str, ...]
    ) -> None:
        """Warn, now and then, of a step that has become too long or that is backpropagation's."""
        if is_capturing() or self.step_size == "auto":
            return
        if self._feeds_forward(moved) and self.num_steps == 1 and self._steps == 0:
            warn_regime("backpropagation")
        if self._steps % _REFRESH != _REFRESH - 1:
            return
        solver = self._solver(log_joint.layout)
        if not solver.uses_curvature:
            return
        energy = energy_function(log_joint, jacobian=self.jacobian, noncentered=moved)
        found = curvature(energy, start, log_joint.layout.scale)
        self.gradient_evaluations += 24 * len(start) * max(1, log_joint.layout.num_rows)
        bound = solver.stable / float(self.step_size)
        if any(bool((c > bound).any()) for c in found.values()):
            warn_regime("unstable")

    def _feeds_forward(self, moved: tuple[str, ...]) -> bool:
        """Whether a relaxation begins with standardized errors of zero, and moves those."""
        return bool(moved) and self.guide is None and self.warm_start is None

    def _start_packed(self, log_joint: LogJoint) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Where a relaxation starts, in its own coordinates, and what is standardized there."""
        values = self._start(log_joint)
        if self.warm_start == "last":
            values = recall_last(self._memory, log_joint, values, self._data_of(log_joint))
        moved = self._noncentered(log_joint.layout)
        packed = log_joint.layout.pack(values)
        if moved:
            standardized = log_joint.standardize(values, moved)
            packed = insert(packed, standardized, log_joint.layout)
        return packed, moved

    def _data_of(self, log_joint: LogJoint) -> CallData | None:
        """What tells rows without numbers apart from those of other calls."""
        return None if self.rows_by_position else CallData(log_joint.args, log_joint.kwargs)

    def _values(self, log_joint: LogJoint, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constrained values of packed latents in the coordinates of the relaxation."""
        with torch.no_grad():
            given, errors, _ = log_joint.unpack(packed, self._noncentered(log_joint.layout))
            if errors:
                given = log_joint.run(given, errors=errors, density=False).values
        return {name: given[name].detach() for name in log_joint.layout.sites}

    def _moved_globals(self, log_joint: LogJoint, relaxed: Relaxed) -> dict[str, Tensor]:
        """Values after one gradient step of the global latents at the relaxed rows."""
        rate = 1.0 / log_joint.layout.scale if self.global_rate is None else self.global_rate
        step: Any
        if self._curvature is None:
            step = float(self.step_size)
        else:
            step = 1.0 / self._curvature["global"].clamp_min(1e-12)
        moved = relaxed.packed["global"] - rate * step * relaxed.gradient["global"]
        return self._values(log_joint, {**relaxed.packed, "global": moved})

    def _start(self, log_joint: LogJoint) -> dict[str, Tensor]:
        known = {} if self._globals is None else self._globals
        known = {name: value for name, value in known.items() if name in log_joint.layout.sites}
        if self.guide is None:
            if not known:
                known = off_center(log_joint)
            return log_joint.predictions(known)
        with torch.no_grad():
            if isinstance(self.guide, ProgramGuide):
                start = self.guide.locations(*log_joint.args, **log_joint.kwargs)
            else:
                with (
                    poutine.block(),
                    SiteTerms(log_joint.layout, density=False, complete=False) as terms,
                ):
                    self.guide(*log_joint.args, **log_joint.kwargs)
                start = terms.values
        absent = [n for n in log_joint.layout.sites if n not in known and n not in start]
        if absent:
            raise ValueError(
                f"The guide has no site {absent[0]!r}, which is a latent of the model. A guide "
                "that starts a relaxation samples every latent: add the site, or pass guide=None, "
                f"which starts at predictions. Sites of the guide: {', '.join(start) or 'none'}."
            )
        return {
            name: known.get(name, start[name].detach()).expand(site.shape)
            for name, site in log_joint.layout.sites.items()
        }

    def _noncentered(self, read: Layout) -> tuple[str, ...]:
        """Sites that move in standardized coordinates; the others stay centered."""
        chosen = self.parameterization
        if chosen == "auto":
            chosen = self._choice(read).parameterization
        if chosen == "centered":
            return ()
        return tuple(
            name for name, site in read.sites.items() if location_scale.is_location_scale(site.fn)
        )

    def _choice(self, read: Layout) -> Choice:
        """What ``"auto"`` stands for in a call."""
        self._chosen = choose(read)
        return self._chosen

    def _solver(self, read: Layout) -> Solver:
        """A fresh solver for a relaxation."""
        return solvers.make(self._choice(read).solver if self.solver == "auto" else self.solver)

    def _refusal(self) -> str | None:
        if self.warm_start == "last":
            return 'warm_start="last" looks rows up by their numbers'
        return None if self.solver == "auto" else solvers.make(self.solver).uncapturable

    def _cached_curvature(
        self, log_joint: LogJoint, packed: dict[str, Tensor], moved: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Curvatures for a learning step: refreshed now and then, guarded by backtracking."""
        read = log_joint.layout
        if self._curvature is None or self._steps % _REFRESH == 0:
            energy = energy_function(log_joint, jacobian=self.jacobian, noncentered=moved)
            found = curvature(energy, packed, read.scale)
            self.gradient_evaluations += 24 * len(packed) * max(1, read.num_rows)
            # A high quantile suits the rows of other batches too.
            self._curvature = {k: c.quantile(0.9).reshape(1) for k, c in found.items()}
        return {
            group.name: self._curvature[group.name].expand(
                1 if group.plate is None else read.num_rows
            )
            for group in read.groups
        }

    def _keep_globals(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> None:
        group = log_joint.layout.group("global")
        if group is not None:
            self._globals = {site.name: values[site.name] for site in group.sites}


def holds_globals(log_joint: LogJoint) -> bool:
    """Whether global latents wait while the rows of a minibatch relax."""
    return log_joint.layout.scale != 1.0 and log_joint.layout.group("global") is not None

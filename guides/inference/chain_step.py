"""How a loop samples: where chains start, by which kernel they move, and what is kept of them.

    start:  z <- argmin_z E, or z ~ q(z | x) from a guide, or where the row's chain was left
    mix, sample: guides.inference.langevin

Chains of rows persist by the number of the row, in the memory that every loop of predictive coding
has; those of global latents from step to step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guides.capture.steps import rng_devices
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.langevin import Chain, Metric, RunningMoment, State, langevin
from guides.inference.langevin_kernel import (
    check_finite,
    check_layout,
    evaluate_chains,
    hessian_metric,
    own_metric,
)
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.relaxation import curvature, energy_function, relax
from guides.inference.row_memory import RowMemory
from guides.layout import Layout

__all__ = ["ChainStep"]

Packed = dict[str, Tensor]
_MOST_ADAPTED = 100  # discarded updates of a persistent chain after which MALA's step is final
_ULA_STEP = 0.1  # of 1 / lambda_max: 5 percent too wide where the posterior is narrowest


class ChainStep(PredictiveCoding):
    """The chains of a loop; arguments are those of ``LangevinPredictiveCoding``."""

    sampler: str
    langevin_step: float | str
    num_mixing: int
    num_samples: int
    num_chains: int
    momentum: float
    preconditioner: str | Mapping[str, Tensor] | None
    persistent: bool
    _chains: Packed
    _rows: Packed | None

    @property
    def memory(self) -> RowMemory:
        """Where the chains of every row were left."""
        return self._memory

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        log_joint = super()._log_joint(args, kwargs)
        check_layout(log_joint.layout, self.sampler)
        return log_joint

    def _sample(
        self,
        log_joint: LogJoint,
        start: tuple[Packed, Packed],
        num_mixing: int | None = None,
        num_samples: int | None = None,
        *,
        learning: bool = False,
    ) -> Chain:
        """Run chains from packed latents (C, ...), with what their kernels were left with."""
        packed, left = start
        read = log_joint.layout
        evaluate = evaluate_chains(log_joint)
        with torch.no_grad():
            state = State.at(evaluate, packed, momentum=self.momentum > 0)
            check_finite(log_joint, state, "at the start of the chains")
            velocity = {k: left[f"velocity {k}"] for k in packed if f"velocity {k}" in left}
            if velocity:
                state = state._replace(velocity=velocity)
            step, metric = self._kernel(log_joint, packed, learning)
            chain = langevin(
                evaluate,
                state,
                step=step,
                num_mixing=self.num_mixing if num_mixing is None else num_mixing,
                num_samples=self.num_samples if num_samples is None else num_samples,
                sampler=self.sampler,
                momentum=self.momentum,
                metric=metric,
                factor=left.get("factor"),
                adapted=left.get("adapted"),
                most_adapted=_MOST_ADAPTED if learning else float("inf"),
                scale=read.scale,
            )
            check_finite(log_joint, chain.state, "after the last update")
        num_chains = next(iter(packed.values())).shape[0]
        self.gradient_evaluations += (1 + chain.num_gradients) * num_chains * max(1, read.num_rows)
        return chain

    def _kernel(
        self, log_joint: LogJoint, packed: Packed, learning: bool
    ) -> tuple[Packed, Mapping[str, Metric] | RunningMoment | None]:
        """Steps by group before adaptation, and the preconditioner."""
        read = log_joint.layout
        first = {name: value[0] for name, value in packed.items()}
        one = next(iter(first.values())).new_ones(1)
        found = {name: one for name in first}
        moment = self.preconditioner in ("second_moment", "running")
        if moment or (self.preconditioner is None and self.langevin_step == "auto"):
            found = self._curvatures(log_joint, first, learning)
        metric: Mapping[str, Metric] | RunningMoment | None = None
        if moment:
            metric = RunningMoment(found, moving=self.preconditioner == "running")
        elif self.preconditioner == "hessian":
            metric = hessian_metric(log_joint, first)
            self.gradient_evaluations += 2 * _size(read) * max(1, read.num_rows)
        elif isinstance(self.preconditioner, Mapping):
            metric = own_metric(self.preconditioner, read)
        if self.langevin_step == "auto":
            part = _ULA_STEP if self.sampler == "ula" else _size(read) ** (-1 / 3)
            # Two blocks of one unit can at most double each other's curvature.
            step = {name: part / (len(first) * value) for name, value in found.items()}
        else:
            step = {name: float(self.langevin_step) * one for name in first}
        if read.scale != 1.0 and "global" in step:
            rate = 1.0 / read.scale if self.global_rate is None else self.global_rate
            step["global"] = rate * step["global"]
        return step, metric

    def _curvatures(self, log_joint: LogJoint, first: Packed, learning: bool) -> Packed:
        read = log_joint.layout
        if learning:
            found = self._cached_curvature(log_joint, first, ())
        else:
            found = curvature(energy_function(log_joint, jacobian=True), first, read.scale)
            self.gradient_evaluations += 24 * len(first) * max(1, read.num_rows)
        return {name: value.clamp_min(1e-12) for name, value in found.items()}

    def _fresh(
        self, log_joint: LogJoint, num_chains: int, *, kept: bool = True, learning: bool = False
    ) -> Packed:
        """New chains: draws of a guide, or starts around one point, moved towards the mode."""
        read = log_joint.layout
        if isinstance(self.guide, ProgramGuide) and self.guide.has_density:
            with torch.no_grad():
                drawn, _, own = self.guide.rsample_packed(
                    num_chains, log_joint.args, log_joint.kwargs, read.indices
                )
                # A guide may have groups of its own, one a level.
                starts = [
                    read.pack(own.constrain({k: v[c] for k, v in drawn.items()}))
                    for c in range(num_chains)
                ]
        else:
            first = read.pack(self._start(log_joint))
            # Within 2 in every unconstrained coordinate: chains that start far apart.
            starts = [first] + [
                {k: v + 4 * (torch.rand_like(v) - 0.5) for k, v in first.items()}
                for _ in range(num_chains - 1)
            ]
        chains = self._chains.get("global") if kept else None
        if chains is not None and chains.shape[0] == num_chains:
            starts = [{**start, "global": chains[c]} for c, start in enumerate(starts)]
        elif chains is not None:
            chains = None
        if self.num_steps:
            step: Any = "auto"
            if learning:
                step = self._cached_curvature(log_joint, starts[0], ())
            hold = "global" in starts[0] and (read.scale != 1.0 or chains is not None)
            for c, start in enumerate(starts):
                relaxed = relax(
                    log_joint, start, num_steps=self.num_steps, step_size=step, hold_globals=hold
                )
                self.gradient_evaluations += relaxed.row_gradients
                starts[c] = relaxed.packed
        return {g.name: torch.stack([start[g.name] for start in starts]) for g in read.groups}

    def _begin(self, log_joint: LogJoint, *, learning: bool = False) -> tuple[Packed, Packed]:
        """Where the chains of a call go on, and what their kernels were left with."""
        read = log_joint.layout
        left = {k: v for k, v in self._chains.items() if k != "global"}
        rows = self._rows
        if rows is None and self.persistent and read.group("data") is not None:
            rows = self._gather(log_joint, learning=learning)
        if rows is not None:
            packed = {"data": rows["data"].movedim(0, 1)}
            left |= {k: v.movedim(0, 1) for k, v in rows.items() if k not in ("data", "global")}
            if "global" in self._chains:
                packed["global"] = self._chains["global"]
            elif "global" in rows:
                packed["global"] = rows["global"]
        elif read.group("data") is None and "global" in self._chains:
            packed = {"global": self._chains["global"]}
        else:
            packed = self._fresh(log_joint, self.num_chains, learning=learning)
        return {group.name: packed[group.name] for group in read.groups}, left

    def _gather(self, log_joint: LogJoint, *, learning: bool = False) -> Packed:
        """What is remembered of the rows of a call, rows first; new chains for new rows."""
        plate = log_joint.layout.data_plate
        found, known = self._memory.read(plate, self._data_of(log_joint))  # type: ignore[arg-type]
        if found and bool(known.all()):
            return found
        # A stream of their own: then a captured step draws what this one does.
        with torch.random.fork_rng(rng_devices()):
            torch.manual_seed(int(torch.randint(2**31, ())))
            fresh = self._fresh(log_joint, self.num_chains, learning=learning)
        new = {"data": fresh["data"].movedim(0, 1)}  # (B, C, K)
        rows = {}
        for name, value in {**new, **found}.items():
            first = new["data"] if name == "data" else value.new_full((), name == "factor")
            shape = (-1,) + (1,) * (value.dim() - 1)
            rows[name] = torch.where(known.reshape(shape), value, first)
        if "global" in fresh:
            rows["global"] = fresh["global"]
        return rows

    def _remember(self, log_joint: LogJoint, chain: Chain) -> None:
        """Where the chains are left: those of global latents, and of rows if they persist."""
        read, state = log_joint.layout, chain.state
        left = {"factor": chain.factor, "adapted": chain.adapted}
        left = {} if self.sampler == "ula" else left
        velocity = state.velocity or {}
        if "global" in state.packed:
            self._chains = {"global": state.packed["global"], **left}
            if velocity:
                self._chains["velocity global"] = velocity["global"]
        if self.persistent and read.group("data") is not None:
            rows = {"data": state.packed["data"]}
            if not state.joint:
                rows |= left
            if velocity:
                rows["velocity data"] = velocity["data"]
            self._rows = {k: v.movedim(0, 1) for k, v in rows.items()}

    def _store(self, log_joint: LogJoint) -> None:
        """Put the rows of a step back into the memory."""
        if self._rows is not None:
            rows = {k: v for k, v in self._rows.items() if k != "global"}
            plate: Any = log_joint.layout.data_plate
            self._memory.write(plate, rows, self._data_of(log_joint))
            self._rows = None

    def _compiled_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The step by a graph, which takes the remembered rows of the batch and returns them."""
        if not self.persistent:
            return super()._compiled_step(args, kwargs)
        with torch.random.fork_rng(rng_devices()):
            log_joint = self._log_joint(args, kwargs)
            plate = log_joint.layout.data_plate
            if plate is not None and plate.random:
                return None  # the program draws its rows inside the step
            if log_joint.layout.group("data") is not None:
                self._rows = self._gather(log_joint, learning=True)
        try:
            return super()._compiled_step(args, kwargs)
        finally:
            self._store(log_joint)

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters: chains, curvatures."""
        state = super().get_state()
        state["memory"] = state.pop("rows")
        return state | {"chains": {k: v.clone() for k, v in self._chains.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        super().set_state({**state, "rows": state["memory"]})
        self._chains = {k: v.clone() for k, v in state["chains"].items()}

    def _tensors(self) -> dict[str, Tensor]:
        rows = {} if self._rows is None else self._rows
        return (
            super()._tensors()
            | {f"chain {name}": value for name, value in self._chains.items()}
            | {f"row {name}": value for name, value in rows.items()}
        )

    def _put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super()._put_tensors(tensors)

        def named(kind: str) -> Packed:
            return {k[len(kind) :]: v for k, v in tensors.items() if k.startswith(kind)}

        self._chains, self._rows = named("chain "), named("row ") or None


def _size(read: Layout) -> int:
    return sum(group.size for group in read.groups)

"""Workbench: one model of one run, and the steps that methods take on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation, AutoNormalizingFlow

from benchmarks.autoguides import admit, follow_rows, is_autoguide, minibatch_fault, two_batches
from benchmarks.fit import (
    Meter,
    batches,
    fit,
    frozen,
    make_optim,
    parameters_of,
    refinements,
    row_count,
)
from benchmarks.methods import Method
from benchmarks.modes import mode_for, report_of
from benchmarks.scores import elbo_estimate
from benchmarks.task import Task
from guides.inference import SVI, CompiledSVI, IndefiniteHessianError, PredictiveCoding, laplace
from guides.objectives.refinement import RefinementELBO

__all__ = ["Call", "Tick", "Workbench", "silent"]

Program = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]
Tick = Callable[[str, float], None]


def silent(phase: str, fraction: float) -> None:
    """Report progress to nobody."""


class Workbench:
    """One model of one run; build it inside the run's own parameter store.

    Args:
        task: The task.
        tick: Told the phase, in a word, and the fraction of it done.
        mode: How updates are computed; see `benchmarks.modes`.

    Attributes:
        computed: How the updates of every phase so far were computed, for the record.
    """

    def __init__(self, task: Task, tick: Tick = silent, mode: str = "auto") -> None:
        self.task = task
        self.budget = task.budget
        self.tick = tick
        self.mode = mode
        self.computed: dict[str, dict[str, Any]] = {}
        self.model = task.build_model()
        self.train: Call = (task.args, dict(task.kwargs))
        self.scored: Call = (task.scored_args, task.scored_kwargs)

    def guide(self, method: Method, program: Program, call: Call) -> Program:
        """Build a method's guide for a program and its data.

        Raises:
            RefusedError: For an autoguide of Pyro on a target that is too large for it, or on
                minibatches that it would silently get wrong.
        """
        args, kwargs = call
        plate, data_args = self.task.data_plate, self.task.data_args
        guide = method.make_guide(program, args, kwargs, data_plate=plate)
        if not is_autoguide(guide):
            return guide
        admit(program, call, self.task.autoguide_limit, plate)
        if call is self.train and self.budget.batch_size is not None:
            size = self.budget.batch_size
            pair = two_batches(program, call, size, plate, data_args)
            if pair is not None:
                fault = minibatch_fault(
                    lambda: method.make_guide(program, args, kwargs, data_plate=plate),
                    program,
                    pair,
                    call,
                    plate,
                )
                if fault is not None:
                    raise fault
            follow_rows(guide, program, plate)
        return guide

    def loop(
        self,
        method: Method,
        program: Program,
        guide: Program | None,
        call: Call,
        num_steps: int,
        mode: str = "eager",
    ) -> Any:
        """Build a method's loop, with the larger step size for free parameters."""
        networks = parameters_of(self.model, call)
        # Free parameters take larger steps than the weights of networks do.
        weights = method.grid is not None or isinstance(guide, AutoNormalizingFlow)
        optim = make_optim(
            self.budget,
            num_steps,
            model=networks.__contains__,
            local=lambda name: name not in networks and (not weights or name.endswith("table")),
        )
        if method.relaxes:
            steps = self.budget.relaxation_steps
            plate = self.task.data_plate
            return PredictiveCoding(program, optim, num_steps=steps, data_plate=plate, mode=mode)
        if method.loop == "svi":
            # A refined guide learns from all iterations; for others this is Trace_ELBO itself.
            loss = RefinementELBO(Trace_ELBO(num_particles=self.budget.num_particles))
            objective = loss if refinements(guide) else loss.objective
            if mode == "eager":
                return SVI(program, guide, optim, objective)
            return CompiledSVI(program, guide, optim, objective, mode=mode)
        return method.loop(program, guide, optim)

    def run_fit(
        self,
        method: Method,
        program: Program,
        guide: Program | None,
        call: Call,
        phase: str,
        *,
        watch: Call | None,
        num_steps: int | None = None,
    ) -> tuple[Any, Meter]:
        """Fit a method to a call.

        Args:
            method: The method.
            program: The model, trainable or frozen.
            guide: Its guide, None for predictive coding.
            call: Arguments of the updates.
            phase: What progress calls this.
            watch: Arguments of the learning curve; None leaves it out.
            num_steps: Number of updates; those of the budget by default.

        Returns:
            The loop, and what it cost.
        """
        num_steps = self.budget.num_steps if num_steps is None else num_steps
        mode, why = mode_for(self.mode, num_steps)
        loop = self.loop(method, program, guide, call, num_steps, mode)
        meter = Meter()
        # Minibatches are for training, and for guides that can be told their rows.
        told = method.grid is not None or method.relaxes or is_autoguide(guide)
        minibatched = call is self.train and told
        size = self.budget.batch_size if minibatched else None
        plate, data_args = self.task.data_plate, self.task.data_args
        calls = batches(program, call, batch_size=size, data_plate=plate, data_args=data_args)
        num_rows = row_count(program, *call, plate)
        gradients = 1 + sum(refinements(guide))

        def monitor() -> tuple[float, float, int | None] | None:
            try:
                posterior = self.posterior(method, program, guide, loop, watch or call)
                samples = self.budget.num_curve_samples
                return elbo_estimate(program, posterior, *(watch or call), samples, plate)
            except (IndefiniteHessianError, RuntimeError):
                # A point without a Laplace covariance yet has no ELBO yet: its curve starts later.
                return None

        fit(
            loop,
            calls,
            num_steps,
            meter=meter,
            rows=lambda now: (
                gradients * (num_rows if size is None else row_count(program, *now, plate))
            ),
            num_particles=self.budget.num_particles,
            several=size is None,
            checkpoints=self.checkpoints(num_steps) if watch is not None else set(),
            monitor=monitor,
            tick=lambda fraction: self.tick(phase, fraction),
        )
        self.computed[phase] = report_of(loop, self.mode, mode, why)
        return loop, meter

    def posterior(
        self, method: Method, program: Program, guide: Program | None, loop: Any, call: Call
    ) -> Program:
        """Return the guide that is scored: the fitted one, or a Laplace guide at its point."""
        args, kwargs = call
        if method.relaxes:
            return _program(loop.posterior(*args, **kwargs))
        if isinstance(guide, AutoLaplaceApproximation):
            return _program(guide.laplace_approximation(*args, **kwargs))
        if guide is None:
            raise ValueError(f"Method '{method.name}' has no guide to score.")
        if method.point:
            with torch.no_grad():
                autoguide = isinstance(guide, AutoGuide)
                point = guide.median if autoguide else guide.locations  # type: ignore[attr-defined]
                values = point(*args, **kwargs)
            plate = self.task.data_plate
            return _program(laplace(program, values, args, kwargs, data_plate=plate))
        return guide

    def at_mode(self, program: Program, guide: Program, call: Call, meter: Meter) -> Program:
        """Return the Laplace guide of a fitted point, brought to the mode that it nears.

        A Laplace posterior is one of the mode. Free points are a few Newton steps from it; the
        point of an encoder is not, and stays where it is.
        """
        return self._relaxed(program, call, 0, meter, guide=guide)

    def relax(self, call: Call) -> tuple[Program, Meter]:
        """Relax to the mode, the model fixed: a fresh relaxation for every point of the curve."""
        meter = Meter()
        program = frozen(self.model)
        posterior: Program | None = None
        total = self.budget.inference_steps
        for steps in sorted(self.checkpoints(total)):
            try:
                posterior = self._relaxed(program, call, steps, meter)
            except IndefiniteHessianError:
                if steps == total:
                    raise
            self.tick("relax", steps / total)
        return _program(posterior), meter

    def _relaxed(
        self,
        program: Program,
        call: Call,
        steps: int,
        meter: Meter,
        guide: Program | None = None,
    ) -> Program:
        """Relax for a number of steps, go to the mode, and note the cost on the curve."""
        args, kwargs = call
        loop = PredictiveCoding(
            program,
            make_optim(self.budget, 1),
            guide,
            num_steps=steps,
            data_plate=self.task.data_plate,
        )
        start = time.perf_counter()
        posterior = _program(loop.posterior(*args, **kwargs))
        seconds = time.perf_counter() - start
        cost = int(loop.gradient_evaluations)
        if guide is None:
            # Each relaxation begins anew; what counts is the last.
            meter.seconds, meter.gradient_evaluations = seconds, cost
        else:
            meter.seconds += seconds
            meter.gradient_evaluations += cost
        samples, plate = self.budget.num_curve_samples, self.task.data_plate
        value = elbo_estimate(program, posterior, *call, samples, plate)
        meter.look(steps if guide is None else self.budget.num_steps + 1, *value)
        return posterior

    def checkpoints(self, num_steps: int) -> set[int]:
        """Steps at which to look, evenly spaced on a logarithmic axis, the last one included."""
        start = max(1, min(10, num_steps // 5))
        last = max(1, self.budget.num_curve_points - 1)
        return {round(start * (num_steps / start) ** (i / last)) for i in range(last)} | {
            num_steps
        }


def _program(value: Any) -> Program:
    if not callable(value):
        raise TypeError(f"A posterior must be a guide, got {type(value).__name__}.")
    return value

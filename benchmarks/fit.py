"""Fit: run a loop for a number of updates and meter what it costs.

Cost is counted in gradient evaluations, one for the gradient of one row's log joint at one draw:
an update with P draws on B rows costs P B, and more by what a guide refines before it draws. A
program without a data plate counts as one row.
Seconds are those of the updates alone; scoring along the way is left out of both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
from pyro import poutine
from torch import nn

from benchmarks.budget import Budget
from guides.inference.checks import capture

__all__ = [
    "Meter",
    "batches",
    "fit",
    "frozen",
    "make_optim",
    "parameters_of",
    "refinements",
    "row_count",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]
Program = Callable[..., Any]


@dataclass
class Meter:
    """What a fit has cost so far, and how it went.

    Args:
        gradient_evaluations: Gradients of one row's log joint at one draw.
        seconds: Wall seconds of the updates.
        curve: Points of the learning curve.
    """

    gradient_evaluations: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def look(self, step: int, elbo: float, error: float, num_rows: int | None) -> None:
        """Add a point to the curve at the cost so far.

        Args:
            step: Updates so far.
            elbo: The ELBO per row, or the joint one.
            error: Its standard error.
            num_rows: Rows that it is the mean of; None for a joint one.
        """
        point = {
            "step": step,
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": round(self.seconds, 3),
            "elbo": round(elbo, 4),
        }
        if num_rows is not None:
            point["rows"] = num_rows
        if math.isfinite(error):
            point["error"] = round(error, 5)
        self.curve.append(point)


def row_count(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], plate: Any) -> int:
    """Return the rows of a call's data plate; one for a program without."""
    from guides.layout import layout

    data_plate = layout(model, args, kwargs, data_plate=plate).data_plate
    return 1 if data_plate is None else int(data_plate.num_rows)


def refinements(guide: Any) -> list[int]:
    """Return the gradients a row and draw that each refined group of a guide takes beforehand.

    A step of refinement takes one for each draw of its inner bound; a Newton step one for the
    gradient and one for every row of the curvature.
    """
    from guides.schemes.laplace import LaplaceRefinement
    from guides.schemes.refinement import Refinement

    found = []
    for scheme in getattr(guide, "schemes", {}).values():
        if isinstance(scheme, Refinement):
            newton = isinstance(scheme, LaplaceRefinement)
            each = 1 + scheme.size if newton else scheme.num_particles
            found.append(scheme.num_iterations * each)
    return found


def frozen(model: Program) -> Program:
    """Return a program whose parameters no optimizer sees.

    The parameters of a module are switched off in place. Those of a plain function live in
    Pyro's store, where blocking their sites hides them from the loop.
    """
    if isinstance(model, nn.Module):
        return model.requires_grad_(False)
    return poutine.block(model, hide_types=["param"])


def parameters_of(model: Program, call: Call) -> set[str]:
    """Return the names, in Pyro's store, of the parameters of a program."""
    args, kwargs = call
    with pyro.get_param_store().scope():
        return set(capture(model, args, kwargs))


def make_optim(
    budget: Budget,
    num_steps: int,
    *,
    model: Callable[[str], bool] = lambda name: False,
    local: Callable[[str], bool] = lambda name: False,
) -> Any:
    """Return Adam whose step sizes fall geometrically.

    Args:
        budget: Step sizes, their decay, and the weight decay of the model's parameters.
        num_steps: Updates over which step sizes fall.
        model: Whether a parameter, by name, is the model's.
        local: Whether it is free, one set a row or one in all, rather than a network's weight.
    """
    decay = budget.lr_decay ** (1 / max(1, num_steps))

    def options(name: str) -> dict[str, float]:
        return {
            "lr": budget.local_lr if local(name) else budget.lr,
            "lrd": decay,
            "clip_norm": 1e4,  # a guard against overflow; gradients are sums over rows
            "weight_decay": budget.weight_decay if model(name) else 0.0,
        }

    return pyro.optim.ClippedAdam(options)  # type: ignore[arg-type]


def batches(
    model: Program,
    call: Call,
    *,
    batch_size: int | None,
    data_plate: str | None,
    data_args: Mapping[str, int] | None,
) -> Iterator[Call]:
    """Return calls without end: the whole call again and again, or shuffled minibatches of it."""
    if batch_size is None:
        while True:
            yield call
    from guides.layout import layout
    from guides.rows import minibatches

    args, kwargs = call
    read = layout(model, args, kwargs, data_plate=data_plate)
    while True:
        yield from minibatches(
            model, args, kwargs, batch_size=batch_size, layout=read, data_args=data_args
        )


def fit(
    loop: Any,
    calls: Iterator[Call],
    num_steps: int,
    *,
    meter: Meter,
    rows: Callable[[Call], int],
    num_particles: int,
    several: bool = False,
    checkpoints: set[int] | None = None,
    monitor: Callable[[], tuple[float, float, int | None] | None] | None = None,
    tick: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Run a loop, meter it, and look at it at checkpoints.

    Args:
        loop: Anything with `step(*args, **kwargs)`; one that counts its own
            `gradient_evaluations` is believed.
        calls: Arguments of each update.
        num_steps: Number of updates.
        meter: Gradient evaluations and seconds are added to it.
        rows: Rows of a call.
        num_particles: Draws of the objective.
        several: Whether all calls are one and the same, so that a loop with
            `steps(most, *args, **kwargs) -> list[float]` may make several updates at once.
        checkpoints: Updates after which `monitor` is asked for a point of the learning curve.
        monitor: Returns an ELBO, its error and its rows, or None where there is none yet.
        tick: Told the fraction done.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    counts = hasattr(loop, "gradient_evaluations")
    at_once = getattr(loop, "steps", None) if several else None
    looks = sorted(step for step in checkpoints or () if step <= num_steps)
    step = told = 0
    while step < num_steps:
        call = next(calls)
        args, kwargs = call
        before = loop.gradient_evaluations if counts else 0
        start = time.perf_counter()
        if at_once is None:
            losses = [loop.step(*args, **kwargs)]
        else:
            # Looks come in between, so no call goes beyond the next of them.
            most = next((look for look in looks if look > step), num_steps) - step
            losses = at_once(most, *args, **kwargs)
        meter.seconds += time.perf_counter() - start
        meter.gradient_evaluations += (
            loop.gradient_evaluations - before
            if counts
            else rows(call) * num_particles * len(losses)
        )
        for loss in losses:
            step += 1
            if not math.isfinite(float(loss)):
                raise FloatingPointError(f"The loss is {float(loss)} after {step} updates.")
        if step in looks and monitor is not None:
            value = monitor()
            if value is not None and math.isfinite(value[0]):
                meter.look(step, *value)
        if step - told >= 20 or step == num_steps:
            told = step
            tick(step / num_steps)

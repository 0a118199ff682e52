"""Checks: what is wrong with a task before anything runs, and which cells apply to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine

from benchmarks.methods import as_methods
from benchmarks.task import Task
from guides.layout import layout

__all__ = ["check_call", "check_held_out", "left_out"]


def check_held_out(task: Task) -> None:
    """Refuse held-out rows where a latent is shared by all rows.

    Its posterior belongs to the training rows; fitted to the held-out ones it would score
    something else than the reader asked for.

    Raises:
        ValueError: With the names of such latents.
    """
    if task.held_out is None:
        return
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        read = layout(task.build_model(), task.args, task.kwargs, data_plate=task.data_plate)
    shared = read.group("global")
    if shared is not None:
        names = ", ".join(repr(site.name) for site in shared.sites)
        raise ValueError(
            f"held_out scores rows that share no latent with the training rows, but in task "
            f"'{task.name}' these latents are outside the data plate: {names}. Leave held_out "
            "out: the task is then scored on its training rows, jointly."
        )


def check_call(task: Task) -> None:
    """Refuse arguments that the program cannot be called with, before anything is run.

    Raises:
        ValueError: With the error of the program.
    """
    calls = {"args": (task.args, task.kwargs)}
    if task.held_out is not None:
        calls["held_out"] = (task.held_out, task.held_out_kwargs)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        model = task.build_model()
        for name, (args, kwargs) in calls.items():
            try:
                _run_once(model, args, kwargs, task.data_plate)
            except Exception as error:
                shown = ", ".join(
                    [_shown(item) for item in args]
                    + [f"{key}={_shown(item)}" for key, item in kwargs.items()]
                )
                raise ValueError(
                    f"The program of task '{task.name}' must run when it is called with {name} = "
                    f"({shown}), but raised {type(error).__name__}: {error}"
                ) from error


def _run_once(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], plate: str | None
) -> None:
    try:
        with poutine.block():
            poutine.trace(model).get_trace(*args, **kwargs)
    except Exception as error:
        try:
            # Improper priors cannot be drawn from, but have feasible points.
            layout(model, args, kwargs, data_plate=plate)
        except Exception:
            raise error from None


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {kind}"
    return repr(value)[:40]


def left_out(task: Task) -> dict[str, str]:
    """Return the cells of the default grid that do not apply to a task, and why.

    A cell applies if its guide can be built and draws. Guides that the task names itself are
    never left out: where they do not apply, that is a result.
    """
    if not task.chooses:
        return {}
    reasons = {}
    for method in as_methods(task.guides, model=task.model, options=task.guide_options):
        with pyro.get_param_store().scope(), torch.random.fork_rng():
            model = task.build_model()
            try:
                guide = method.make_guide(
                    model, task.args, task.kwargs, data_plate=task.data_plate
                )
                guide(*task.args, **task.kwargs)
            except (ValueError, NotImplementedError) as error:
                reasons[method.name] = str(error)
    return reasons

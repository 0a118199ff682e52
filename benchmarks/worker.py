"""Worker: what a process of the pool does with a job, errors included."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.autoguides import RefusedError
from benchmarks.execute import execute, train_shared_model
from benchmarks.methods import Method, as_methods
from benchmarks.shared_model import read_state, write_state
from benchmarks.task import Task
from benchmarks.task_file import load_tasks

__all__ = ["attempt", "failure", "undisturbed", "work"]

_PACKAGES = ("benchmarks", "guides", "zoo")


def failure(error: BaseException) -> dict[str, Any]:
    """Return an error as a record keeps it: type, message, and the line of this project."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        parts = Path(frame.filename).parts
        for package in _PACKAGES:
            if package in parts:
                start = len(parts) - 1 - parts[::-1].index(package)
                where = f"{'/'.join(parts[start:])}:{frame.lineno} in {frame.name}"
    message = str(error).strip() or "no message"
    return {"type": type(error).__name__, "message": message, "where": where}


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something; return what it returns with status `ok`, how it failed, or why it was refused.

    Warnings are kept with the result rather than printed across a progress bar.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            result = {"status": "ok", **action()}
        except RefusedError as error:
            result = {"status": "refused", "refusal": {"why": error.why, "message": str(error)}}
        except Exception as error:  # any failure of a method is a result
            result = {"status": "failed", "error": failure(error)}
    texts = dict.fromkeys(f"{item.category.__name__}: {item.message}" for item in caught)
    if texts:
        result["warnings"] = [text[:300] for text in texts][:5]
    return result


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back the caller's random states afterwards: torch's, NumPy's and Python's."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@cache
def _task(source: str, name: str, budget: Any, data: str) -> tuple[Task, dict[str, Method]]:
    (task,) = load_tasks(source, [name])
    if task.data_digest != data:
        raise ValueError(
            f"Task '{name}' must have the same data whenever it is loaded, but they differ from "
            "process to process, so no two runs could be compared. Seed what draws them: "
            "torch.manual_seed(0), or a generator of their own."
        )
    task = replace(task, budget=budget)
    methods = as_methods(task.guides, task.loops, model=task.model, options=task.guide_options)
    return task, {method.name: method for method in methods}


def work(payload: dict[str, Any], tick: Callable[[str, float], None]) -> dict[str, Any]:
    """Do one job of the pool.

    Args:
        payload: `source`, `task`, `budget` and `mode` say what; `kind` is `shared` (train the
            model that the frozen regime shares) or `run`.
        tick: Told how far it is.
    """

    def shared() -> dict[str, Any]:
        task, _ = _task(*(payload[name] for name in ("source", "task", "budget", "data")))
        state, about = train_shared_model(task, payload["seed"], tick, payload["mode"])
        write_state(Path(payload["state"]), state, about)
        return {"shared_model": about}

    def run() -> dict[str, Any]:
        task, methods = _task(*(payload[name] for name in ("source", "task", "budget", "data")))
        state, about = read_state(Path(payload["state"])) if payload["state"] else (None, None)
        outcome = execute(
            task,
            methods[payload["method"]],
            payload["regime"],
            payload["seed"],
            state=state,
            tick=tick,
            images=payload["images"],
            mode=payload["mode"],
        )
        return outcome if about is None else {**outcome, "shared_model": about}

    return attempt(shared if payload["kind"] == "shared" else run)

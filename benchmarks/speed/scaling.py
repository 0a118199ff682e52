"""How the cost of compiled steps grows: `python -m benchmarks.speed.scaling`.

Rows of a batch, rows of the data, latents of a mean field, steps made, restarts; and how soon the
first compiled steps are done in a new process.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from benchmarks.speed.runner import start_seconds
from benchmarks.study import StudyLog
from guides.inference import CompiledSVI

__all__ = ["RECORDS", "main", "run"]

RECORDS = Path(__file__).parents[1] / "records" / "speed_scaling" / "study.jsonl"

_OPTIM: Any = pyro.optim  # its names are made when it is imported
_ROUNDS = 7


def _regression(x: Tensor, y: Tensor) -> None:
    """Weights for the columns of x; the rows are data."""
    zero = x.new_zeros(x.shape[1])
    weights = pyro.sample("weights", dist.Normal(zero, 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * weights).sum(-1), 1.0), obs=y)


def _coordinates(x: Tensor) -> None:
    """Independent latents, one observation each."""
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def _timed(loop: CompiledSVI, args: tuple[Any, ...], num_steps: int) -> list[float]:
    """Seconds a step in each of some blocks, after the first steps."""
    calls: Any = (args, {})
    loop.run(1 + num_steps, calls, progress=False)
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        loop.run(num_steps, calls, progress=False)
        times.append((time.perf_counter() - start) / num_steps)
    return times


def _loop(
    model: Any, args: tuple[Any, ...], name: str, options: dict[str, Any], **more: Any
) -> CompiledSVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guides.make(name, model, *args, **options)
    optim = _OPTIM.Adam({"lr": 0.01})
    return CompiledSVI(model, guide, optim, Trace_ELBO(), mode="inductor", **more)


def _case(what: str, size: int) -> tuple[CompiledSVI, tuple[Any, ...], int]:
    """A loop, its call, and the steps of a block."""
    torch.manual_seed(0)
    steps = max(8, min(400, 400_000 // size))
    if what == "rows of a batch":
        model: Any = zoo.make("vae", x_dim=64, z_dim=8, hidden=(64,))
        args: tuple[Any, ...] = ((torch.rand(size, 64) > 0.5).float(),)
        options: dict[str, Any] = {"hidden": (64,)}
        return _loop(model, args, "amortized_normal", options, steps_per_call=1), args, steps
    if what == "rows of the data":
        x = torch.randn(size, 8)
        args = (x, x.sum(-1) + torch.randn(size))
        options = {"data_plate": None}
        return _loop(_regression, args, "normal", options, steps_per_call=1), args, steps
    args = (torch.randn(size),)
    return _loop(_coordinates, args, "normal", {}, steps_per_call=1), args, steps


_SIZES = {
    "rows of a batch": (100, 1_000, 10_000, 100_000),
    "rows of the data": (1_000, 10_000, 100_000, 1_000_000),
    "latents of a mean field": (1_000, 10_000, 100_000, 1_000_000),
}


def run(path: str | Path = RECORDS, threads: int = 1) -> None:
    """Measure, and write the record.

    Args:
        path: The file.
        threads: Threads of torch.
    """
    torch.set_num_threads(threads)
    with StudyLog(
        path,
        title="How compiled steps scale",
        question="How does the cost of a compiled step grow?",
        protocol=(
            f"{threads} thread; medians of {_ROUNDS} blocks of steps, one step a call (eight "
            "schools: as many as by default). Memory: the most that the process held so far."
        ),
        command="python -m benchmarks.speed.scaling",
        columns={
            "ms": "milliseconds a step",
            "microseconds_each": "microseconds a step for each row or latent",
            "ratio": "times a single run",
            "mb": "megabytes at most",
        },
        modules=("benchmarks.speed.scaling",),
    ) as log:
        for what, sizes in _SIZES.items():
            for size in sizes:
                loop, args, steps = _case(what, size)
                seconds = statistics.median(_timed(loop, args, steps))
                values = {
                    "ms": _digits(1e3 * seconds),
                    "microseconds_each": _digits(1e6 * seconds / size),
                }
                log.add(key={"what": what, "size": size}, values=values)
                print(what, size, values, flush=True)
        _restarts(log)
        _memory(log)
        _start(log)


def _eight_schools(**more: Any) -> tuple[CompiledSVI, tuple[Any, ...]]:
    model = zoo.make("eight_schools")
    args: tuple[Any, ...] = (model.y, model.sigma)
    return _loop(model, args, "normal", {"data_plate": None}, **more), args


def _restarts(log: StudyLog) -> None:
    """Restarts of eight schools, blocks in turn with those of a single run."""
    counts = (None, 4, 16, 64)
    loops = {count: _eight_schools(num_restarts=count) for count in counts}
    times: dict[int | None, list[float]] = {count: [] for count in counts}
    for count, (loop, args) in loops.items():
        _timed(loop, args, 160)
        del count
    for _ in range(3):
        for count, (loop, args) in loops.items():
            times[count].append(statistics.median(_timed(loop, args, 1600)))
    single = times[None]
    for count in counts:
        ratios = [mine / one for mine, one in zip(times[count], single, strict=True)]
        values = {
            "ms": _digits(1e3 * statistics.median(times[count])),
            "ratio": _digits(statistics.median(ratios)),
        }
        log.add(key={"what": "restarts of eight schools", "size": count or 1}, values=values)
        print("restarts", count, values, flush=True)


def _memory(log: StudyLog) -> None:
    """The most memory held after more and more steps."""
    loop, args = _eight_schools()
    calls: Any = (args, {})
    done = 0
    for total in (1_000, 10_000, 100_000):
        loop.run(total - done, calls, progress=False)
        done = total
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        log.add(key={"what": "steps made", "size": total}, values={"mb": _digits(most)})
        print("steps", total, most, flush=True)


def _start(log: StudyLog) -> None:
    """Seconds to the first compiled steps, in a first and in a second process."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("first process", "second process"):
            own, whole = start_seconds(cache)
            values = {"seconds_to_first_steps": _digits(own), "with_imports": _digits(whole)}
            log.add(key={"what": f"eight schools, {name}", "size": 1}, values=values)
            print(name, values, flush=True)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    run(options.records, options.threads)


if __name__ == "__main__":
    main()

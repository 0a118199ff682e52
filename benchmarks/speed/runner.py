"""The speed comparison: every side in a process of its own, blocks of steps taken in turn.

    python -m benchmarks speed --peers DIR

A round gives each side one block of steps on the same arrays, one side at a time, so that a busy
moment of the machine falls on all. Figures are medians over rounds; ratios are taken within each
round, and their median and range are told. Before any step all sides compute the loss at the same
parameters and noise, and must agree.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.peers import problems
from benchmarks.speed.peers.client import Peer, PeerError
from benchmarks.speed.peers.environments import interpreter
from benchmarks.study import StudyLog

__all__ = ["COMPARISONS", "RECORDS", "Comparison", "Side", "compare_speed", "start_seconds"]

RECORDS = Path(__file__).parents[1] / "records" / "speed" / "study.jsonl"

_PAUSE = 0.25  # seconds in which threads of the side before stop waiting for work
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Side:
    """One way to make the steps.

    Args:
        label: Its name in the record.
        peer: The process that makes them, a key of ``MODULES``.
        num_steps: Steps in a block, for about half a second.
        options: Options of the program.
    """

    label: str
    peer: str
    num_steps: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One task and its sides; the first is this project's, to which the others are related.

    Args:
        task: A task of :mod:`benchmarks.speed.peers.problems`.
        name: Its name in the record.
        sides: The sides.
        guide: The guide of the Gaussian tasks.
    """

    task: str
    name: str
    sides: tuple[Side, ...]
    guide: str | None = None


def _gaussian(task: str, name: str, guide: str, scale: float) -> Comparison:
    def steps(number: int) -> int:
        return max(16, 16 * round(number * scale / 16))

    return Comparison(
        task,
        name,
        (
            Side("compiled", "zoo", steps(16000), {"by": "inductor"}),
            Side("captured", "zoo", steps(320), {"by": "graph"}),
            Side("Pyro SVI", "zoo", steps(96), {"by": "pyro"}),
            Side("hand-written torch", "torch", steps(1600)),
            Side("NumPyro, jitted update", "numpyro", steps(8000), {"loop": "update"}),
            Side("NumPyro, svi.run as one scan", "numpyro", steps(32000), {"loop": "scan"}),
        ),
        guide,
    )


COMPARISONS = (
    _gaussian("eight_schools", "eight schools, mean field", "normal", 1.0),
    _gaussian("eight_schools", "eight schools, full covariance", "multivariate_normal", 0.8),
    _gaussian("radon", "radon, 90 latents, mean field", "normal", 0.4),
    _gaussian("radon", "radon, 90 latents, full covariance", "multivariate_normal", 0.2),
    Comparison(
        "vae",
        "VAE 16-32-784, batch 128",
        (
            Side("compiled", "zoo", 100, {"by": "inductor"}),
            Side("captured", "zoo", 60, {"by": "graph"}),
            Side("Pyro SVI", "zoo", 30, {"by": "pyro"}),
            Side("hand-written torch", "torch", 60),
            Side("NumPyro, jitted update", "numpyro", 100, {"loop": "update"}),
            Side("NumPyro, svi.run as one scan", "numpyro", 100, {"loop": "scan"}),
            Side("matrix products alone", "torch", 200, {"of": "vae"}),
        ),
    ),
    Comparison(
        "pc",
        "predictive coding 16-32-784, batch 128, 20 updates",
        (
            Side("compiled", "zoo", 24, {"by": "inductor"}),
            Side("captured", "zoo", 10, {"by": "graph"}),
            Side("Pyro traced at each update", "zoo", 4, {"by": "eager"}),
            Side("hand-written torch", "torch", 16),
            Side("hand-written JAX, one scan", "jax", 24, {"loop": "scan"}),
            Side("matrix products alone", "torch", 32, {"of": "pc"}),
        ),
    ),
    Comparison(
        "pcx_decoder",
        "PCX's decoder 64-128-128-784, batch 200, 20 updates",
        (
            Side("compiled", "zoo", 32, {"by": "inductor"}),
            Side("hand-written torch", "torch", 16, {"momentum": 0.0}),
            Side("PCX", "pcx", 24, {"momentum": 0.0}),
            Side("PCX, scan", "pcx", 24, {"momentum": 0.0, "loop": "scan"}),
            Side("matrix products alone", "torch", 32, {"of": "pcx_decoder"}),
        ),
    ),
    Comparison(
        "fabricpc_mnist",
        "FabricPC's classifier 784-256-64-10, batch 200, 20 updates",
        (
            Side("compiled", "zoo", 60, {"by": "inductor"}),
            Side("hand-written torch", "torch", 16),
            Side("FabricPC", "fabricpc", 30),
            Side("matrix products alone", "torch", 100, {"of": "fabricpc_mnist"}),
        ),
    ),
)
"""What is compared."""


def compare_speed(
    peers: str | Path | None,
    path: str | Path = RECORDS,
    *,
    rounds: int = 9,
    threads: int = 2,
    only: Sequence[str] | None = None,
) -> None:
    """Run the comparison and write its record.

    Args:
        peers: Folder of the peers' environments; None leaves out those that need one, which the
            record then says.
        path: The file.
        rounds: Blocks of each side.
        threads: Threads of each side.
        only: Tasks to keep.

    Raises:
        ValueError: For an unknown task.
    """
    known = {comparison.task for comparison in COMPARISONS}
    unknown = sorted(set(only or ()) - known)
    if unknown:
        raise ValueError(f"Unknown task {unknown[0]!r}. Available: {', '.join(sorted(known))}.")
    with StudyLog(
        path,
        title="Speed, side by side",
        question="What does one step cost, compiled, beside other programs of the same steps?",
        protocol=(
            f"{threads} threads and {rounds} rounds; in a round each side makes one block of "
            "steps, one side at a time. Milliseconds: median over rounds, and the quartiles. "
            "Ratio: the side's time to that of the compiled program in the same round, median "
            "and range. All sides start from the same arrays and computed the same loss there."
        ),
        command="python -m benchmarks speed --peers DIR",
        columns={
            "ms": "milliseconds a step, median",
            "ms_low": "first quartile",
            "ms_high": "third quartile",
            "ratio": "times the compiled program, median over rounds",
            "ratio_low": "least ratio of a round",
            "ratio_high": "greatest ratio of a round",
            "compile_s": "seconds to build, capture and compile",
            "break_even": "steps after which compiling has paid for itself against Pyro",
        },
        modules=("benchmarks.speed.runner", "benchmarks.speed.peers.zoo_peer"),
    ) as log:
        for comparison in COMPARISONS:
            if only is None or comparison.task in only:
                _compare(comparison, peers, log, rounds, threads)


def _compare(
    comparison: Comparison, peers: str | Path | None, log: StudyLog, rounds: int, threads: int
) -> None:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder) / "arrays.npz"
        made = problems.arrays(comparison.task, 0, guide=comparison.guide or "normal")
        problems.save(file, made)
        running: dict[str, Peer] = {}
        sides: list[Side] = []
        for side in comparison.sides:
            if side.peer in ("zoo", "torch"):
                python = None
            elif peers is None:
                log.note(f"{comparison.name}: {side.label} left out, no environment was given.")
                continue
            else:
                python = interpreter(side.peer, peers)
            # Programs of one library share a process; ours and Pyro's keep apart.
            key = f"{side.peer} {side.options.get('by', '')}"
            if key not in running:
                running[key] = stack.enter_context(Peer(side.peer, python, threads=threads))
            sides.append(side)

        def ask(side: Side) -> dict[str, Any]:
            peer = running[f"{side.peer} {side.options.get('by', '')}"]
            time.sleep(_PAUSE)
            if "of" in side.options:
                return peer.ask("floor", num_steps=side.num_steps, **side.options)
            options = {"arrays": str(file), **side.options}
            if comparison.guide is not None:
                options["guide"] = comparison.guide
            return peer.ask(comparison.task, num_steps=side.num_steps, **options)

        first = {side.label: ask(side) for side in sides}
        _check_losses(comparison.name, first)
        times: dict[str, list[float]] = {side.label: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                times[side.label].append(ask(side)["seconds"] / side.num_steps)
    own = times[sides[0].label]
    for side in sides:
        seconds = times[side.label]
        ratios = [other / mine for other, mine in zip(seconds, own, strict=True)]
        low, _, high = statistics.quantiles(seconds, n=4)
        values: dict[str, Any] = {
            "ms": _digits(1e3 * statistics.median(seconds)),
            "ms_low": _digits(1e3 * low),
            "ms_high": _digits(1e3 * high),
            "ratio": _digits(statistics.median(ratios)),
            "ratio_low": _digits(min(ratios)),
            "ratio_high": _digits(max(ratios)),
            "compile_s": _digits(first[side.label]["compile_seconds"]),
            "loss": first[side.label]["loss"],
            "versions": ", ".join(
                f"{name} {number}" for name, number in first[side.label]["versions"].items()
            ),
        }
        if side is sides[0] and "Pyro SVI" in times:
            saved = statistics.median(times["Pyro SVI"]) - statistics.median(own)
            values["break_even"] = round(values["compile_s"] / saved)
        log.add(key={"task": comparison.name, "side": side.label}, values=values)
        print(f"{comparison.name}, {side.label}: {values['ms']} ms, {values['ratio']} times")


def _check_losses(name: str, answers: dict[str, dict[str, Any]]) -> None:
    losses = {label: a["loss"] for label, a in answers.items() if a["loss"]}
    (reference, expected), *others = losses.items()
    for label, loss in others:
        if abs(loss - expected) > _TOLERANCE * abs(expected):
            raise PeerError(
                f"{name}: {label} computes the loss {loss}, {reference} {expected}. They make "
                "other steps, so their times cannot be compared."
            )


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


_START = """
import time
start = time.time()
import pyro, torch
import guides, zoo
from guides.inference import CompiledSVI
imported = time.time()
pyro.set_rng_seed(0)
model = zoo.make("eight_schools")
guide = guides.make("normal", model, model.y, data_plate=None)
loop = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
loop.run(17, ((model.y,), {}))
print(time.time() - imported, time.time() - start)
"""


def start_seconds(cache: str | Path) -> tuple[float, float]:
    """Seconds before the first compiled steps of eight schools are done, in a new process.

    Args:
        cache: Folder of compiled code; empty for a machine that never compiled it.

    Returns:
        Without and with the imports of Pyro and torch.
    """
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", _START],
        capture_output=True,
        text=True,
        check=True,
        env=variables,
    )
    own, whole = map(float, done.stdout.split())
    return own, whole

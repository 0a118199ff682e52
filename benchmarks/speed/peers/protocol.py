"""What a peer says: one JSON object a line in, one out, on standard input and output.

A request names a task, a number of steps and what else decides the program:

    {"task": "eight_schools", "num_steps": 1000, "seed": 0, "options": {"guide": "normal"}}

The first request of a program builds it, computes its loss at the given parameters and noise,
compiles it and makes `num_steps` steps to warm up; this and every later request then makes
`num_steps` timed steps, which go on from where the last ones ended. The answer:

    {"seconds": 0.0831,          wall time of the timed steps, all work done
     "compile_seconds": 1.92,    building, tracing and compiling; 0.0 where that was done before
     "loss": 31.7269,            at the given parameters and noise, before any step
     "last_loss": 31.3301,       of the last step
     "versions": {...},          Python, the library and what it computes with
     "threads": 2}

With `"num_steps": 0` nothing is compiled, and `seconds` is 0.0. A request that fails is answered
by `{"error": "..."}` and the peer goes on. The end of the input ends the peer.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Protocol, TextIO

__all__ = ["Program", "Server", "limit_threads", "num_threads", "options_of", "serve"]


class Program(Protocol):
    """One task, ready to be stepped."""

    def check(self) -> float:
        """The loss at the given parameters and noise; called before any step."""

    def prepare(self, num_steps: int) -> None:
        """Compile what :meth:`advance` needs."""

    def advance(self, num_steps: int) -> float:
        """Make steps, wait until they are done, and return the last one's loss."""


Build = Callable[[str, int, Mapping[str, Any]], Program]


def num_threads() -> int:
    """Threads that a peer may use: OMP_NUM_THREADS, or all cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"OMP_NUM_THREADS must be a positive number, got {given!r}.")
        return int(given)
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def limit_threads() -> int:
    """Keep this process on as many cores as it has threads; call before JAX is imported.

    XLA's thread pool has one thread for each core that its process may run on, and no option of
    its own. So the process is bound to that many cores. With one, XLA's kernels are told not to
    split either.

    Returns:
        The number of threads.
    """
    threads = num_threads()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
    if threads == 1:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return threads


class Server:
    """Programs by request, each built once.

    Args:
        build: Makes the program of a task, a seed and options.
        distributions: Installed distributions whose versions are told.
        threads: Threads in use.
    """

    def __init__(self, build: Build, distributions: tuple[str, ...], threads: int) -> None:
        self.build = build
        self.threads = threads
        self.versions = {"python": platform.python_version()}
        self.versions |= {name: version(name) for name in distributions}
        self._programs: dict[str, tuple[Program, float, set[int]]] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a request asks.

        Args:
            request: `task`, `num_steps`, and optionally `seed` and `options`.

        Raises:
            ValueError: For a request without a task, or a negative number of steps.
        """
        if not isinstance(request.get("task"), str):
            raise ValueError('A request needs "task", the name of one.')
        num_steps = request.get("num_steps", 0)
        if not isinstance(num_steps, int) or num_steps < 0:
            raise ValueError(f"num_steps must be a number of steps, got {num_steps!r}.")
        task, seed = request["task"], int(request.get("seed", 0))
        options = dict(request.get("options") or {})
        key = json.dumps([task, seed, options], sort_keys=True)
        compile_seconds = 0.0
        if key not in self._programs:
            start = time.perf_counter()
            program = self.build(task, seed, options)
            compile_seconds = time.perf_counter() - start
            self._programs[key] = (program, program.check(), set())
        program, loss, prepared = self._programs[key]
        seconds, last_loss = 0.0, None
        if num_steps:
            if num_steps not in prepared:
                start = time.perf_counter()
                program.prepare(num_steps)
                compile_seconds += time.perf_counter() - start
                program.advance(num_steps)
                prepared.add(num_steps)
            start = time.perf_counter()
            last_loss = program.advance(num_steps)
            seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "compile_seconds": compile_seconds,
            "loss": loss,
            "last_loss": last_loss,
            "versions": self.versions,
            "threads": self.threads,
        }

    def loop(self, source: TextIO, target: TextIO) -> None:
        """Answer every line of a stream.

        Args:
            source: Requests.
            target: Where answers go.
        """
        for line in source:
            if not line.strip():
                continue
            try:
                answer = self.answer(json.loads(line))
            except Exception as error:  # whatever a library raises is the runner's to report
                answer = {"error": f"{type(error).__name__}: {error}"}
            target.write(json.dumps(answer) + "\n")
            target.flush()


def serve(build: Build, distributions: tuple[str, ...], threads: int) -> None:
    """Serve standard input and output until the input ends.

    Args:
        build: Makes the program of a task, a seed and options.
        distributions: Installed distributions whose versions are told.
        threads: Threads in use.
    """
    # What a library prints must not stand between the answers: it goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        Server(build, distributions, threads).loop(sys.stdin, answers)


def options_of(options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Fill in defaults, and refuse what a program does not know.

    Args:
        options: Options of a request.
        **defaults: All options with their defaults.

    Raises:
        ValueError: For an unknown option.
    """
    unknown = sorted(set(options) - set(defaults))
    if unknown:
        raise ValueError(f"Unknown option {unknown[0]!r}. Available: {', '.join(defaults)}.")
    return {**defaults, **options}

"""Pool: run jobs in fresh processes, and survive whatever a job does to its own.

Each worker is a spawned process with one torch thread. A worker that dies (killed for memory, a
crash in native code) fails its job and is replaced; the other jobs go on. Interrupting the parent
stops the workers at once: what has been finished has been handed over already.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Event", "Job", "results", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """One piece of work for a worker.

    Args:
        name: Identifies it, and is what progress shows.
        payload: Handed to the worker's function; it must pickle.
        after: Jobs that must have ended first.
    """

    name: Hashable
    payload: dict[str, Any]
    after: frozenset[Hashable] = frozenset()


@dataclass(frozen=True)
class Event:
    """Something a worker reported: `started`, `tick`, `done` or `died`."""

    job: Job
    kind: str
    content: Any = None


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None


def _function(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _serve(connection: Connection, target: str) -> None:
    """Run in the worker: take payloads, call the target, hand results back."""
    # Ctrl-C reaches the whole process group; only the parent acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    function = _function(target)
    last = 0.0

    def tick(phase: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.2:
            last = now
            connection.send(("tick", (phase, fraction)))

    while True:
        try:
            payload = connection.recv()
        except EOFError:
            return
        if payload is None:
            return
        connection.send(("done", function(payload, tick)))


def results(
    target: str, payloads: Sequence[dict[str, Any]], num_workers: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Call a function with every payload, and yield each with its result as it comes.

    With one worker the calls are made in this process, in order.

    Args:
        target: `"module:function"`, called as `function(payload, tick)`.
        payloads: They must pickle.
        num_workers: Processes at a time.

    Raises:
        RuntimeError: Where a worker died.
    """
    if num_workers == 1:
        function = _function(target)
        for payload in payloads:
            yield payload, function(payload, lambda phase, fraction: None)
        return
    jobs = [Job(number, payload) for number, payload in enumerate(payloads)]
    for event in run_jobs(jobs, num_workers, target):
        if event.kind == "died":
            raise RuntimeError(
                f"The process that worked on {event.job.payload} died with exit code "
                f"{event.content}: its own message stands above. Results that are there are kept."
            )
        if event.kind == "done":
            yield event.job.payload, event.content


def run_jobs(jobs: Sequence[Job], num_workers: int, target: str) -> Iterator[Event]:
    """Run jobs and yield what happens to them.

    Args:
        jobs: In the order they should start, as far as what they wait for allows.
        num_workers: Processes at a time.
        target: `"module:function"`, called in the worker as `function(payload, tick)`.

    Yields:
        An event `started`, `tick` (phase, fraction), `done` (the function's result) or `died`
        (the worker's exit code) at a time.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)
    unfinished = {job.name for job in jobs}
    workers: list[_Worker] = []

    def hire() -> _Worker:
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, target), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def next_job() -> Job | None:
        for job in waiting:
            if not job.after & unfinished:
                return job
        return None

    try:
        while unfinished:
            idle = [worker for worker in workers if worker.job is None]
            while (job := next_job()) is not None:
                if not idle and len(workers) >= num_workers:
                    break
                if not idle:
                    workers.append(hire())
                    idle.append(workers[-1])
                worker = idle.pop(0)
                waiting.remove(job)
                worker.job = job
                worker.connection.send(job.payload)
                yield Event(job, "started")
            # A signal that comes just before the wait begins is seen when it ends.
            for ready in wait([worker.connection for worker in workers], timeout=1.0):
                worker = next(item for item in workers if item.connection is ready)
                try:
                    kind, content = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    kind, content = "died", worker.process.exitcode
                    workers.remove(worker)
                current = worker.job
                if current is None:
                    continue
                if kind != "tick":
                    worker.job = None
                    unfinished.discard(current.name)
                yield Event(current, kind, content)
    finally:
        for worker in workers:
            if worker.job is not None:
                worker.process.terminate()
            else:
                worker.connection.send(None)
        for worker in workers:
            worker.process.join(timeout=5)

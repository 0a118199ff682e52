"""Runner: make the runs of a plan that are not recorded yet, and record each as it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.checks import left_out
from benchmarks.plan import (
    Plan,
    command_record,
    plan,
    plans_of,
    shared_key,
    task_record,
)
from benchmarks.pool import Job, run_jobs
from benchmarks.progress import Progress, duration
from benchmarks.provenance import machine, versions
from benchmarks.records import Records, append, read_records
from benchmarks.suites import SUITES
from benchmarks.task import Task
from benchmarks.words import first_sentence

__all__ = ["Outcome", "compare_here", "run", "run_line"]

RECORDS = "runs.jsonl"


@dataclass
class Outcome:
    """What a command came to.

    Args:
        done: Runs that finished now.
        failed: Runs that failed now.
        refused: Runs that were refused now, for a reason that is no failure.
        fruitless: Whether no run that was asked for is recorded as finished.
        skipped: Runs that were recorded already.
        total: Runs in all.
        seconds: Wall seconds.
        interrupted: Whether it was stopped.
    """

    done: int = 0
    failed: int = 0
    refused: int = 0
    skipped: int = 0
    total: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    fruitless: bool = False

    @property
    def ended(self) -> int:
        """Runs that ended now, however."""
        return self.done + self.failed + self.refused


def run_line(record: Mapping[str, Any]) -> str:
    """Return one line about a finished run.

    Example:
        >>> from benchmarks.runner import run_line
        >>> run_line({"task": "vae", "regime": "joint", "method": "normal", "seed": 0,
        ...           "status": "failed", "error": {"type": "ValueError", "message": "no"}})
        'vae joint normal seed 0: FAILED ValueError: no'
    """
    name = f"{record['task']} {record['regime']} {record['method']} seed {record['seed']}"
    if record["status"] == "failed":
        error = record["error"]
        return f"{name}: FAILED {error['type']}: {first_sentence(error['message'])}"
    if record["status"] == "refused":
        return f"{name}: refused: {first_sentence(record['refusal']['message'])}"
    word, score = "ELBO", record["scores"].get("elbo")
    if score is None:
        word, score = "no ELBO, evidence", record["scores"]["log_evidence"]
    value = "not finite" if score["value"] is None else f"{score['value']:.3f}"
    unit = "nats in all" if score["joint"] else "nats a row"
    return f"{name}: {word} {value} {unit}, {duration(sum(record['wall_seconds'].values()))}"


def _record(item: Plan, result: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return {**item.header(), **result, **here, "finished": finished}


def _headers(
    plans: Sequence[Plan],
    todo: Sequence[Plan],
    source: str | None,
    budget: str,
    jobs: int,
    command: Sequence[str],
) -> list[dict[str, Any]]:
    regimes: dict[str, dict[str, None]] = {}
    for item in plans:
        regimes.setdefault(item.task.name, {})[item.regime] = None
    tasks = {item.task.name: item.task for item in plans}
    return [
        command_record(todo, command, budget, jobs),
        *(
            task_record(task, source, regimes[name], left_out(task))
            for name, task in tasks.items()
        ),
    ]


def _jobs(todo: Sequence[Plan], source: str, out: Path) -> list[Job]:
    """Runs as jobs; a frozen run waits for the model it shares, unless that is there."""
    jobs: dict[str, Job] = {}
    for item in todo:
        payload: dict[str, Any] = {
            "source": source if source in SUITES else str(Path(source).resolve()),
            "task": item.task.name,
            "budget": item.task.budget,
            "data": item.data,
            "mode": item.mode,
            "seed": item.seed,
            "state": None,
        }
        after: frozenset[str] = frozenset()
        if item.regime == "frozen":
            state = out / "state" / f"{item.task.name}-{shared_key(item, source)}.pt"
            payload["state"] = str(state.resolve())
            name = f"{item.task.name} shared model seed {item.seed}"
            if not state.exists():
                after = frozenset({name})
                jobs.setdefault(name, Job(name, {**payload, "kind": "shared"}))
        details = {"method": item.method.name, "regime": item.regime, "images": item.seed == 0}
        jobs[item.name] = Job(item.name, {**payload, **details, "kind": "run"}, after)
    return list(jobs.values())


def run(
    source: str,
    out: str | Path,
    *,
    jobs: int = 1,
    seeds: int = 3,
    budget: str = "full",
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    regimes: Sequence[str] | None = None,
    retry_failed: bool = False,
    mode: str = "auto",
    command: Sequence[str] = (),
    progress: bool = True,
) -> Outcome:
    """Make every run that is not recorded yet, in worker processes.

    Args:
        source: A suite or a task file.
        out: Folder of the records.
        jobs: Processes at a time, one torch thread each.
        seeds: Number of seeds.
        budget: `full`, `demo` or `smoke`.
        models: Tasks to keep.
        methods: Methods to keep.
        regimes: Regimes to keep.
        retry_failed: Whether to make runs again that are recorded as failed.
        mode: How updates are computed; see `benchmarks.modes`.
        command: What the reader types to do the same, for the report.
        progress: Whether to show progress.

    Returns:
        Counts. Stopping by Ctrl-C is an outcome too: `interrupted`.
    """
    folder = Path(out)
    start = time.monotonic()
    plans = plan(
        source,
        seeds=seeds,
        budget=budget,
        models=models,
        methods=methods,
        regimes=regimes,
        mode=mode,
    )
    known: dict[str, str] = {}
    if any(folder.glob("*.jsonl")):
        known = {record["key"]: record["status"] for record in read_records(folder).runs}
    kept = {key for key, status in known.items() if not (retry_failed and status == "failed")}
    todo = [item for item in plans if item.key not in kept]
    outcome = Outcome(skipped=len(plans) - len(todo), total=len(plans))
    finished = sum(known.get(item.key) == "ok" for item in plans)
    if not todo:
        outcome.fruitless = finished == 0
        return outcome
    append(folder / RECORDS, _headers(plans, todo, source, budget, jobs, command))
    by_name = {item.name: item for item in todo}
    here = {"versions": versions(), "machine": machine(jobs)}
    broken: dict[Any, dict[str, Any]] = {}
    bar = Progress(len(todo), shown=progress)
    try:
        for event in run_jobs(_jobs(todo, source, folder), jobs, "benchmarks.worker:work"):
            name = event.job.name
            if event.kind == "started":
                bar.started(name)
            elif event.kind == "tick":
                bar.tick(name, *event.content)
            else:
                result = event.content if event.kind == "done" else _death(event.content)
                if name not in by_name:
                    if result["status"] == "failed":
                        broken[name] = result
                    bar.finished(name, f"{name}: {result['status']}", counts=False)
                    continue
                # Without the shared model a run can only say why that is missing.
                result = next((broken[item] for item in event.job.after if item in broken), result)
                record = _record(by_name[str(name)], result, here)
                append(folder / RECORDS, [record])
                failed = record["status"] == "failed"
                outcome.failed += failed
                outcome.refused += record["status"] == "refused"
                outcome.done += record["status"] == "ok"
                bar.finished(name, run_line(record), failed=failed)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        bar.close()
    outcome.seconds = time.monotonic() - start
    outcome.fruitless = finished + outcome.done == 0
    return outcome


def _death(exit_code: int | None) -> dict[str, Any]:
    reason = "killed, most likely for want of memory" if exit_code == -9 else "crashed"
    message = f"The process was {reason} (exit code {exit_code})."
    return {
        "status": "failed",
        "error": {"type": "WorkerDied", "message": message, "where": ""},
    }


def compare_here(task: Task, *, seeds: int, progress: bool, mode: str = "auto") -> Records:
    """Make the runs of one task in this process, one after another.

    Args:
        task: The task.
        seeds: Number of seeds.
        progress: Whether to show progress.
        mode: How updates are computed; see `benchmarks.modes`.

    Returns:
        Their records. Ctrl-C stops it, as it should in a notebook.
    """
    from benchmarks.execute import execute, train_shared_model
    from benchmarks.shared_model import State
    from benchmarks.worker import attempt, undisturbed

    plans = plans_of(task, None, seeds=seeds, mode=mode)
    records = Records()
    for header in _headers(plans, plans, None, "full", 1, ()):
        records.add(header)
    here = {"versions": versions(), "machine": machine(1)}
    shared: dict[int, tuple[State, dict[str, Any]]] = {}
    bar = Progress(len(plans), shown=progress)
    try:
        with undisturbed():
            for item in plans:
                name = item.name
                bar.started(name)

                def tick(phase: str, fraction: float, name: str = name) -> None:
                    bar.tick(name, phase, fraction)

                def action(item: Plan = item, tick: Any = tick) -> dict[str, Any]:
                    seed = item.seed
                    extra: dict[str, Any] = {}
                    state: State | None = None
                    if item.regime == "frozen":
                        if seed not in shared:
                            shared[seed] = train_shared_model(task, seed, tick, mode)
                        state, extra["shared_model"] = shared[seed]
                    outcome = execute(
                        task,
                        item.method,
                        item.regime,
                        seed,
                        state=state,
                        tick=tick,
                        images=seed == 0,
                        mode=mode,
                    )
                    return {**outcome, **extra}

                record = _record(item, attempt(action), here)
                records.add(record)
                bar.finished(name, run_line(record), failed=record["status"] == "failed")
    finally:
        bar.close()
    return records

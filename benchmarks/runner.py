"""Runner: from a suite or a task file to records, leaving out what is recorded already."""

from __future__ import annotations

import ast
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.digest import closure, code_digest
from benchmarks.methods import Method, as_methods
from benchmarks.pool import Job, run_jobs
from benchmarks.progress import Progress, duration
from benchmarks.provenance import machine, versions
from benchmarks.records import append, read_records, run_key
from benchmarks.suites import SUITES
from benchmarks.task import Task, load_tasks

__all__ = ["Outcome", "Plan", "plan", "run", "run_line", "task_record"]

RECORDS = "runs.jsonl"
_DECIDING = ("python", "torch", "pyro", "numpy", "zuko")


@dataclass(frozen=True)
class Plan:
    """One run to be made, with everything known before it starts.

    Args:
        task: The task, its budget included.
        method: The method.
        regime: `joint` or `frozen`.
        seed: The seed.
        key: Finds the run again among records.
        digest: Digest of the code it runs.
        modules: The modules behind that digest.
    """

    task: Task
    method: Method
    regime: str
    seed: int
    key: str
    digest: str
    modules: tuple[str, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """What progress calls it."""
        return f"{self.task.name} {self.regime} {self.method.name} seed {self.seed}"

    def header(self) -> dict[str, Any]:
        """The part of the record that is known before the run."""
        return {
            "kind": "run",
            "key": self.key,
            "task": self.task.name,
            "model": self.task.model_name or self.task.name,
            "regime": self.regime,
            "method": self.method.name,
            "family": self.method.family,
            "scheme": self.method.scheme,
            "loop": self.method.loop_name,
            "seed": self.seed,
            "config": {**self.task.budget.as_config(), "method": self.method.as_config()},
            "digest": self.digest,
            **({"note": self.method.note} if self.method.note else {}),
        }


@dataclass
class Outcome:
    """What a command came to.

    Args:
        done: Runs that finished now.
        failed: Runs that failed now.
        skipped: Runs that were recorded already.
        total: Runs in all.
        seconds: Wall seconds.
        interrupted: Whether it was stopped.
    """

    done: int = 0
    failed: int = 0
    skipped: int = 0
    total: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def _roots(source: str, method: Method) -> tuple[list[str], list[Path]]:
    """Where the walk over imports starts, and the user's own file."""
    roots = ["benchmarks.worker"]
    files: list[Path] = []
    if source in SUITES:
        roots.append(SUITES[source])
    else:
        path = Path(source).resolve()
        files.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                roots.append(node.module)
                roots.extend(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                roots.extend(alias.name for alias in node.names)
    if method.grid is not None:
        import guides

        entry: Any = guides.GUIDES[method.grid]
        roots.extend([entry] if isinstance(entry, str) else entry)
    return roots, files


def plan(
    source: str,
    *,
    seeds: int,
    budget: str = "full",
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    regimes: Sequence[str] | None = None,
) -> list[Plan]:
    """Return every run that a command asks for.

    Args:
        source: A suite or a task file.
        seeds: Number of seeds, counted from 0.
        budget: `full`, `demo` or `smoke`.
        models: Tasks to keep, all by default.
        methods: Methods to keep, all by default.
        regimes: Regimes to keep, all by default.

    Raises:
        ValueError: For names that nothing has.
    """
    from benchmarks.execute import regimes_of

    used = {name: text for name, text in versions().items() if name in _DECIDING}
    plans: list[Plan] = []
    seen: set[str] = set()
    for loaded in load_tasks(source, models):
        task = replace(loaded, budget=loaded.budget.scaled(budget))
        found = as_methods(task.guides, task.loops, model=task.model, options=task.guide_options)
        seen |= {method.name for method in found}
        for regime in regimes_of(task):
            for method in found:
                if methods is not None and method.name not in methods:
                    continue
                if regimes is not None and regime not in regimes:
                    continue
                roots, files = _roots(source, method)
                modules = closure(roots)
                digest = code_digest(modules, files)
                names = (*modules, *(f"file:{path.name}" for path in files))
                for seed in range(seeds):
                    key = run_key(
                        task=task.name,
                        regime=regime,
                        method=method.as_config(),
                        seed=seed,
                        budget=task.budget.as_config(),
                        shared=task.decoder_guide if regime == "frozen" else None,
                        evidence=task.evidence_guide,
                        digest=digest,
                        versions=used,
                    )
                    plans.append(Plan(task, method, regime, seed, key, digest, names))
    for name in methods or ():
        if name not in seen:
            raise ValueError(
                f"No method is called '{name}'. There are: {', '.join(sorted(seen))}."
            )
    # All methods of the first seed come first, so that an early stop leaves a fair comparison.
    return sorted(plans, key=lambda item: item.seed)


def task_record(task: Task, source: str, regimes: Sequence[str]) -> dict[str, Any]:
    """Return what a report says about a task."""
    shape = [list(value.shape) for value in task.args if hasattr(value, "shape")]
    held = [list(value.shape) for value in task.held_out or () if hasattr(value, "shape")]
    return {
        "kind": "task",
        "name": task.name,
        "source": source if source in SUITES else Path(source).name,
        "model": task.model_name or task.name,
        "description": task.description,
        "about_data": task.about_data,
        "binarization": task.binarization,
        "training_shapes": shape,
        "held_out_shapes": held,
        "scored": task.scored_rows,
        "regimes": list(regimes),
        "decoder_guide": task.decoder_guide,
        "evidence_guide": task.evidence_guide,
        "baseline": task.baseline,
        "expected_order": list(task.expected_order),
        "budget": task.budget.as_config(),
        "image_shape": list(task.image_shape) if task.image_shape else None,
    }


def run_line(record: dict[str, Any]) -> str:
    """Return one line about a finished run.

    Example:
        >>> from benchmarks.runner import run_line
        >>> run_line({"task": "vae", "regime": "joint", "method": "normal", "seed": 0,
        ...           "status": "failed", "error": {"type": "ValueError", "message": "no"}})
        'vae joint normal seed 0: FAILED ValueError: no'
    """
    name = f"{record['task']} {record['regime']} {record['method']} seed {record['seed']}"
    if record["status"] != "ok":
        error = record["error"]
        return f"{name}: FAILED {error['type']}: {error['message'].splitlines()[0][:160]}"
    elbo = record["scores"]["elbo"]
    value = "not finite" if elbo["value"] is None else f"{elbo['value']:.3f}"
    unit = "nats in all" if elbo["joint"] else "nats a row"
    return f"{name}: ELBO {value} {unit}, {duration(sum(record['wall_seconds'].values()))}"


def _jobs(todo: Sequence[Plan], source: str, out: Path) -> tuple[list[Job], dict[str, Plan]]:
    jobs: list[Job] = []
    by_name: dict[str, Plan] = {}
    shared: set[str] = set()
    where = source if source in SUITES else str(Path(source).resolve())
    for item in todo:
        payload = {
            "source": where,
            "task": item.task.name,
            "budget": item.task.budget,
            "seed": item.seed,
            "state": None,
        }
        after: frozenset[str] = frozenset()
        if item.regime == "frozen":
            key = run_key(
                shared=payload["task"],
                seed=item.seed,
                digest=_shared_digest(item, source),
                budget=item.task.budget.as_config(),
                guide=item.task.decoder_guide,
            )
            state = out / "state" / f"{item.task.name}-seed{item.seed}-{key}.pt"
            payload["state"] = str(state.resolve())
            name = f"{item.task.name} shared model seed {item.seed}"
            if not state.exists():
                after = frozenset({name})
                if name not in shared:
                    shared.add(name)
                    jobs.append(Job(name, {**payload, "kind": "shared"}))
        by_name[item.name] = item
        details = {"method": item.method.name, "regime": item.regime, "images": item.seed == 0}
        jobs.append(Job(item.name, {**payload, **details, "kind": "run"}, after))
    return jobs, by_name


def _shared_digest(item: Plan, source: str) -> str:
    from benchmarks.methods import as_method

    roots, files = _roots(source, as_method(item.task.decoder_guide))
    return code_digest(closure(roots), files)


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
    command: Sequence[str] = (),
    progress: bool = True,
) -> Outcome:
    """Make every run that is not recorded yet, and record each as soon as it ends.

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
        command: What the reader types to do the same, for the report.
        progress: Whether to show progress.

    Returns:
        Counts. Stopping by Ctrl-C is an outcome too: `interrupted`.
    """
    folder = Path(out)
    start = time.monotonic()
    plans = plan(
        source, seeds=seeds, budget=budget, models=models, methods=methods, regimes=regimes
    )
    known: dict[str, str] = {}
    if any(folder.glob("*.jsonl")):
        known = {record["key"]: record["status"] for record in read_records(folder).runs}
    todo = [
        item
        for item in plans
        if item.key not in known or (retry_failed and known[item.key] == "failed")
    ]
    outcome = Outcome(skipped=len(plans) - len(todo), total=len(plans))
    if not todo:
        return outcome
    append(folder / RECORDS, _headers(plans, todo, source, budget, jobs, command))
    queue, by_name = _jobs(todo, source, folder)
    shared_failures: dict[str, dict[str, Any]] = {}
    bar = Progress(len(todo), shown=progress)
    here, used = machine(jobs) | {"threads": 1}, versions()
    try:
        for event in run_jobs(queue, jobs, "benchmarks.worker:work"):
            name = str(event.job.name)
            if event.kind == "started":
                bar.started(name)
                continue
            if event.kind == "tick":
                bar.tick(name, *event.content)
                continue
            result = event.content if event.kind == "done" else _death(event.content)
            if name not in by_name:
                if result["status"] == "failed":
                    shared_failures[name] = result
                    bar.finished(
                        name,
                        f"{name}: FAILED {result['error']['message']}",
                        failed=True,
                        counts=False,
                    )
                else:
                    bar.finished(name, f"{name}: trained", counts=False)
                continue
            blocked = next(
                (shared_failures[x] for x in event.job.after if x in shared_failures), None
            )
            record = {
                **by_name[name].header(),
                **(result if blocked is None else blocked),
                "versions": used,
                "machine": here,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            append(folder / RECORDS, [record])
            failed = record["status"] == "failed"
            outcome.failed += failed
            outcome.done += not failed
            bar.finished(name, run_line(record), failed=failed)
    except KeyboardInterrupt:
        outcome.interrupted = True
    finally:
        bar.close()
    outcome.seconds = time.monotonic() - start
    return outcome


def _death(exit_code: int | None) -> dict[str, Any]:
    reason = "killed, most likely for memory" if exit_code == -9 else "crashed"
    return {
        "status": "failed",
        "error": {
            "type": "WorkerDied",
            "message": f"The process was {reason} (exit code {exit_code}).",
            "where": "",
        },
    }


def _headers(
    plans: Sequence[Plan],
    todo: Sequence[Plan],
    source: str,
    budget: str,
    jobs: int,
    command: Sequence[str],
) -> list[dict[str, Any]]:
    tasks = {item.task.name: item.task for item in plans}
    regimes = {
        name: list(dict.fromkeys(item.regime for item in plans if item.task.name == name))
        for name in tasks
    }
    return [
        {
            "kind": "command",
            "command": shlex.join(command),
            "budget": budget,
            "jobs": jobs,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "machine": machine(jobs) | {"threads": 1},
            "digests": {item.digest: list(item.modules) for item in todo},
        },
        *(task_record(task, source, regimes[name]) for name, task in tasks.items()),
    ]

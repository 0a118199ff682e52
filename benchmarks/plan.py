"""Plan: every run that a command asks for, with all that is known before it starts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.checks import check_call, check_held_out, left_out
from benchmarks.digest import closure, code_digest, imported_names, local_files
from benchmarks.methods import Method, as_method, as_methods, family_and_scheme
from benchmarks.modes import check_mode
from benchmarks.provenance import machine, versions
from benchmarks.records import run_key
from benchmarks.suites import SUITES
from benchmarks.task import Task
from benchmarks.task_file import load_tasks
from guides.arguments import did_you_mean

__all__ = [
    "Plan",
    "command_record",
    "digest_of",
    "plan",
    "plans_of",
    "shared_key",
    "task_record",
]

_DECIDING = ("python", "torch", "pyro", "numpy", "zuko")


@dataclass(frozen=True)
class Plan:
    """One run to be made.

    Args:
        task: The task, its budget included.
        method: The method.
        regime: `joint` or `frozen`.
        seed: The seed.
        key: Finds the run again among records.
        digest: Digest of the code it runs.
        modules: The modules behind that digest.
        data: Digest of the task's data.
        mode: How updates are computed; see `benchmarks.modes`.
    """

    task: Task
    method: Method
    regime: str
    seed: int
    key: str
    digest: str
    modules: tuple[str, ...] = field(repr=False)
    data: str = ""
    mode: str = "auto"

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
            "data_digest": self.data,
            **({"note": self.method.note} if self.method.note else {}),
        }


def _roots(source: str | None, method: Method) -> tuple[list[str], list[Path]]:
    """Where the walk over imports starts, and the user's own file."""
    roots = ["benchmarks.worker"]
    files: list[Path] = []
    if source in SUITES:
        roots.append(SUITES[source])
    elif source is not None:
        files = local_files(Path(source))
        for path in files:
            roots.extend(imported_names(path))
    if method.grid is not None:
        import guides

        cells = [method.grid] if isinstance(method.grid, str) else method.grid.values()
        for cell in cells:
            entry: Any = guides.GUIDES[cell if isinstance(cell, str) else cell[0]]
            roots.extend([entry] if isinstance(entry, str) else entry)
    return roots, files


def digest_of(source: str | None, method: Method) -> tuple[str, tuple[str, ...]]:
    """Return the digest of the code that a method of a source runs, and the modules behind it."""
    roots, files = _roots(source, method)
    modules = closure(roots)
    folder = Path(source).resolve().parent if files and source is not None else Path()
    names = (f"file:{path.relative_to(folder).as_posix()}" for path in files)
    return code_digest(modules, files), (*modules, *names)


def _used_versions() -> dict[str, str]:
    return {name: number for name, number in versions().items() if name in _DECIDING}


def shared_key(item: Plan, source: str | None) -> str:
    """Return the key of the model that a frozen run shares with the others of its seed."""
    task = item.task
    digest, _ = digest_of(source, as_method(task.decoder_guide))
    return run_key(
        task=task.name,
        seed=item.seed,
        guide=task.decoder_guide,
        options=repr(task.guide_options.get(task.decoder_guide)),
        budget=task.budget.as_config(),
        data=item.data,
        digest=digest,
        mode=item.mode,
        versions=_used_versions(),
    )


def plans_of(
    task: Task,
    source: str | None,
    *,
    seeds: int,
    methods: Iterable[str] | None = None,
    regimes: Iterable[str] | None = None,
    mode: str = "auto",
) -> list[Plan]:
    """Return every run of one task.

    Args:
        task: The task.
        source: The suite or file it comes from; None for one made in this process.
        seeds: Number of seeds, counted from 0.
        methods: Methods to keep, all by default.
        regimes: Regimes to keep, all by default.
        mode: How updates are computed; see `benchmarks.modes`.

    Raises:
        ValueError: For an unknown mode, where the program cannot be called with its arguments,
            or held-out rows cannot be scored; see `check_call` and `check_held_out`.
    """
    from benchmarks.execute import regimes_of

    check_mode(mode)
    check_call(task)
    check_held_out(task)
    used, data = _used_versions(), task.data_digest
    plans = []
    out = left_out(task)
    entries = [entry for entry in task.guides if not (isinstance(entry, str) and entry in out)]
    found = as_methods(entries, task.loops, model=task.model, options=task.guide_options)
    _check_names(task, [method.name for method in found], out)
    if not found:
        name, reason = next(iter(out.items()), ("", "guides= is empty"))
        raise ValueError(
            f"Nothing can be compared on task '{task.name}': no guide applies. "
            + (f"{name}: {reason}" if name else f"{reason}; name some.")
        )
    for regime in regimes_of(task):
        if regimes is not None and regime not in regimes:
            continue
        for method in found:
            if methods is not None and method.name not in methods:
                continue
            digest, modules = digest_of(source, method)
            for seed in range(seeds):
                key = run_key(
                    task=task.name,
                    regime=regime,
                    method=method.as_config(),
                    seed=seed,
                    budget=task.budget.as_config(),
                    shared=task.decoder_guide if regime == "frozen" else None,
                    evidence=task.evidence_guide,
                    data=data,
                    digest=digest,
                    mode=mode,
                    versions=used,
                )
                plans.append(Plan(task, method, regime, seed, key, digest, modules, data, mode))
    # All methods of the first seed come first, so that an early stop leaves a fair comparison.
    return sorted(plans, key=lambda item: item.seed)


def _check_names(task: Task, found: Sequence[str], out: Mapping[str, str]) -> None:
    """Raise where fields of a task name methods or guides that there are not."""
    if task.baseline is not None and task.baseline not in (*found, *out):
        raise ValueError(
            f"baseline='{task.baseline}' of task '{task.name}' is none of its methods. "
            f"{did_you_mean(task.baseline, found)}Methods: {', '.join(found)}."
        )
    for name in task.guide_options:
        # Options of a guide that this task does not compare are harmless; those of none are lost.
        family_and_scheme(name)


def plan(
    source: str,
    *,
    seeds: int,
    budget: str = "full",
    models: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    regimes: Sequence[str] | None = None,
    mode: str = "auto",
) -> list[Plan]:
    """Return every run that a command asks for.

    Args:
        source: A suite or a task file.
        seeds: Number of seeds, counted from 0.
        budget: `full`, `demo` or `smoke`.
        models: Tasks to keep, all by default.
        methods: Methods to keep, all by default.
        regimes: Regimes to keep, all by default.
        mode: How updates are computed; see `benchmarks.modes`.

    Raises:
        ValueError: For names that nothing has, or a choice that leaves nothing.
    """
    loaded = load_tasks(source, models)
    tasks = [replace(task, budget=task.budget.scaled(budget)) for task in loaded]
    known = {
        method.name
        for task in tasks
        for method in as_methods(task.guides, task.loops, model=task.model)
    }
    for name in methods or ():
        if name not in known:
            raise ValueError(
                f"No method is called '{name}'. {did_you_mean(name, known)}There are: "
                f"{', '.join(sorted(known))}."
            )
    plans = [
        item
        for task in tasks
        for item in plans_of(
            task, source, seeds=seeds, methods=methods, regimes=regimes, mode=mode
        )
    ]
    if not plans:
        raise ValueError("Nothing is left to run: no task has such a regime.")
    return sorted(plans, key=lambda item: item.seed)


def task_record(
    task: Task, source: str | None, regimes: Iterable[str], out: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a report says about a task.

    Args:
        task: The task.
        source: The suite or file it comes from.
        regimes: Its regimes.
        out: What `left_out` returned for it.
    """

    def shapes(args: Iterable[Any]) -> list[list[int]]:
        return [list(value.shape) for value in args if hasattr(value, "shape")]

    return {
        "kind": "task",
        "name": task.name,
        "source": source if source is None or source in SUITES else Path(source).name,
        "model": task.model_name or task.name,
        "description": task.description,
        "about_data": task.about_data,
        "binarization": task.binarization,
        "training_shapes": shapes((*task.args, *task.kwargs.values())),
        "held_out_shapes": shapes((*(task.held_out or ()), *task.held_out_kwargs.values())),
        "scored": task.scored_rows,
        "regimes": list(regimes),
        "decoder_guide": task.decoder_guide,
        "evidence_guide": task.evidence_guide,
        "baseline": task.baseline,
        "expected_order": list(task.expected_order),
        "budget": task.budget.as_config(),
        "image_shape": list(task.image_shape) if task.image_shape else None,
        "data_digest": task.data_digest,
        "left_out": dict(out),
    }


def command_record(
    plans: Iterable[Plan], command: Sequence[str], budget: str, jobs: int
) -> dict[str, Any]:
    """Return how the runs were started, and which modules their digests cover."""
    return {
        "kind": "command",
        "command": shlex.join(command),
        "budget": budget,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine(jobs),
        "digests": {item.digest: list(item.modules) for item in plans},
    }

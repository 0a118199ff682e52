"""Task file: tasks from a suite by name, or from a Python file of the user's own."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.suites import SUITES
from benchmarks.task import Task

__all__ = ["load_module", "load_tasks", "task_names"]


def load_module(source: str) -> ModuleType:
    """Import a suite by name or a task file by path.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if source in SUITES:
        return import_module(SUITES[source])
    path = Path(source)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(
            f"'{source}' is neither a suite ({', '.join(SUITES)}) nor a Python file. "
            "A task file defines TASK, TASKS, or variables such as model, args and guides."
        )
    name = f"pyro_zoo_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"'{source}' cannot be imported as Python code.")
    module = importlib.util.module_from_spec(spec)
    # Classes of the file pickle and deepcopy only if their module can be looked up.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = _line_of(error, path)
        raise ValueError(
            f"Task file '{source}' cannot be imported{line}: {type(error).__name__}: {error}"
        ) from error
    return module


def _line_of(error: BaseException, path: Path) -> str:
    """Where in a task file an error arose, in words."""
    if isinstance(error, SyntaxError):
        return f" (line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f" (line {frames[-1].lineno})" if frames else ""


def _entries(module: ModuleType, source: str) -> dict[str, Any]:
    stem = Path(source).stem
    if hasattr(module, "TASK"):
        return {module.TASK.name: module.TASK}
    if hasattr(module, "TASKS"):
        tasks = module.TASKS
        return dict(tasks) if isinstance(tasks, Mapping) else {task.name: task for task in tasks}
    # A file may well import a package called `guides`.
    named = {
        item.name
        for item in fields(Task)
        if not isinstance(getattr(module, item.name, module), ModuleType)
    }
    if not named & {"model", "make_model"}:
        raise ValueError(
            f"Task file '{source}' must define TASK, TASKS, or at least `model` (a Pyro program) "
            f"and `args` (its data); it defines {', '.join(sorted(named)) or 'none of them'}."
        )
    values = {item: getattr(module, item) for item in named}
    values.setdefault("name", stem)
    values.setdefault("description", (module.__doc__ or "").strip().split("\n\n")[0])
    try:
        return {values["name"]: Task(**values)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"In task file '{source}': {error}") from error


def task_names(source: str) -> dict[str, str]:
    """Return the names of a suite's or file's tasks, each with one line about it."""
    lines = {}
    for name, entry in _entries(load_module(source), source).items():
        text = entry.description if isinstance(entry, Task) else (entry.__doc__ or "")
        lines[name] = text.strip().split("\n")[0]
    return lines


def load_tasks(source: str, names: Iterable[str] | None = None) -> list[Task]:
    """Return the tasks of a suite or of a file.

    Args:
        source: A name of `benchmarks.suites.SUITES`, or the path of a Python file.
        names: Which of them; all by default.

    Raises:
        ValueError: For a name that is not among them.
    """
    entries = _entries(load_module(source), source)
    wanted = list(entries) if names is None else list(names)
    for name in wanted:
        if name not in entries:
            raise ValueError(
                f"'{source}' has no task '{name}'. It has: {', '.join(entries) or 'none'}."
            )
    chosen = [entries[name] for name in wanted]
    return [entry if isinstance(entry, Task) else entry() for entry in chosen]

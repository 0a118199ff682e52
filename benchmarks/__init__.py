"""Benchmarks: compare posteriors on one model, keep every run as a record, and report on them.

Two ways in: `compare` in a notebook or script, on any Pyro program, and `python -m benchmarks`
(the console command `pyro-zoo`) for suites and for task files of one's own.

Names are loaded on first use, so that `import benchmarks` costs nothing.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Budget": "benchmarks.budget",
    "Comparison": "benchmarks.comparison",
    "Method": "benchmarks.methods",
    "StudyLog": "benchmarks.study",
    "Task": "benchmarks.task",
    "compare": "benchmarks.comparison",
    "load_tasks": "benchmarks.task_file",
    "read_records": "benchmarks.records",
    "write_report": "benchmarks.report",
}

__all__ = [
    "Budget",
    "Comparison",
    "Method",
    "StudyLog",
    "Task",
    "compare",
    "load_tasks",
    "read_records",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'benchmarks' has no attribute {name!r}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

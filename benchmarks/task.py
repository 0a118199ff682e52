"""Task: one model, its data, the rows held out, and what is to be compared on them."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.suites import SUITES

__all__ = ["Task", "load_module", "load_tasks", "modules_of", "task_names"]

REGIMES = ("joint", "frozen")
GRID = tuple(
    f"{scheme}{family}"
    for scheme in ("", "amortized_")
    for family in ("delta", "normal", "multivariate_normal", "spline_coupling")
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A comparison to be made: everything that a run needs, and what a reader is told about it.

    A file gives tasks to `python -m benchmarks run FILE.py` in one of three ways: a `TASK`, a
    list or dictionary `TASKS`, or simply variables named as the fields below, for example

        model = ...            # any Pyro program, or make_model = a function that builds it
        args = (x,)            # its data
        held_out = (x_test,)   # rows it is scored on
        guides = ["normal", "amortized_normal", AutoDiagonalNormal, MyGuide]

    Args:
        name: Short name; the file's own name by default.
        model: A Pyro program. A module is copied for each run, and so starts from the same
            weights with every seed.
        make_model: Builds the program afresh for each run, after the seed is set.
        args: Positional arguments of the program in training; one tensor stands for `(tensor,)`.
        kwargs: Keyword arguments of the program in training.
        held_out: Positional arguments on which it is scored; None scores the training data.
        held_out_kwargs: Keyword arguments with `held_out`.
        guides: What is compared: names of `guides.GUIDES`, Pyro guide classes, functions of one
            argument `model` that build a guide, guides, or `benchmarks.Method`.
        loops: `"svi"`, `"predictive_coding"`, or functions `(model, guide, optim)` that build a
            loop; every loop but predictive coding is crossed with every guide.
        regimes: `"joint"` trains model and guide together; `"frozen"` trains the model first,
            with `decoder_guide`, and compares every guide on that same model. By default joint,
            or frozen for a program that has no parameters.
        decoder_guide: The guide the model is trained with before it is frozen.
        evidence_guide: A guide that is fitted afresh to every trained model to estimate its
            evidence, so that models are not judged by their own guides; None uses these.
        baseline: The method that paired differences are taken to; by default the first one.
        data_plate: Name of the plate whose rows are data; see `guides.layout`.
        data_args: Arguments that hold rows, and their row axis; see `guides.rows`.
        guide_options: Options of grid guides by name.
        budget: Numbers of updates and draws.
        model_name: What the model is called in records.
        description: The comparison in plain words.
        about_data: The data in plain words, with the split.
        binarization: How real data became binary, where they did.
        image_shape: Shape of one row as an image, which makes the report show images.
        tier: What the scores are measured against; found out by default.
        expected_order: Methods in an order that theory demands of their ELBOs on a frozen model.
    """

    name: str
    model: Callable[..., Any] | None = None
    make_model: Callable[[], Callable[..., Any]] | None = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    held_out: tuple[Any, ...] | None = None
    held_out_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guides: tuple[Any, ...] = GRID
    loops: tuple[Any, ...] = ("svi",)
    regimes: tuple[str, ...] = ()
    decoder_guide: str = "amortized_normal"
    evidence_guide: str | None = None
    baseline: str | None = None
    data_plate: str | None = "auto"
    data_args: Mapping[str, int] | None = None
    guide_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    model_name: str = ""
    description: str = ""
    about_data: str = ""
    binarization: str = ""
    image_shape: tuple[int, int] | None = None
    tier: str = ""
    expected_order: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.model is None) == (self.make_model is None):
            raise ValueError(
                f"Task {self.name!r} needs either model= (a Pyro program) or make_model= (a "
                "function that builds one), got both or neither."
            )
        for name in ("args", "held_out"):
            if isinstance(getattr(self, name), torch.Tensor):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("guides", "loops", "regimes", "args", "expected_order"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.held_out is not None:
            object.__setattr__(self, "held_out", tuple(self.held_out))
        wrong = [regime for regime in self.regimes if regime not in REGIMES]
        if wrong:
            raise ValueError(f"A regime is one of {', '.join(REGIMES)}; got {wrong[0]!r}.")

    def build_model(self) -> Callable[..., Any]:
        """Return a program of its own for one run."""
        if self.make_model is not None:
            return self.make_model()
        return copy.deepcopy(self.model)  # type: ignore[return-value]

    @property
    def scored_args(self) -> tuple[Any, ...]:
        """Positional arguments of the scores."""
        return self.args if self.held_out is None else self.held_out

    @property
    def scored_kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the scores."""
        return dict(self.kwargs if self.held_out is None else self.held_out_kwargs)

    @property
    def scored_rows(self) -> str:
        """Which rows the scores are of, in words."""
        return "training rows" if self.held_out is None else "held-out rows"


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
    spec.loader.exec_module(module)
    return module


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
    return {values["name"]: Task(**values)}


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


def modules_of(source: str) -> list[str]:
    """Return the project modules that stand for a source in a digest: none for a file."""
    return [SUITES[source]] if source in SUITES else []

"""Task: one model, its data, the rows held out, and what is to be compared on them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.budget import Budget
from guides.arguments import did_you_mean

__all__ = ["GRID", "Task", "listed"]

REGIMES = ("joint", "frozen")
GRID = tuple(
    f"{scheme}{family}"
    for scheme in ("", "amortized_")
    for family in ("delta", "normal", "multivariate_normal", "spline_coupling")
)


def listed(value: Any) -> tuple[Any, ...]:
    """Return entries as a tuple: a name, a mapping, a class or a guide stands alone."""
    alone = isinstance(value, (str, Mapping)) or callable(value)
    if alone or not isinstance(value, Iterable):
        return (value,)
    return tuple(value)


def _positional(value: Any, name: str) -> tuple[Any, ...]:
    """Return positional arguments as a tuple; a tensor or an array stands for itself."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value = (value,)
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be a tuple of positional arguments of the model, such as (x,) or (x, y);"
            f" got a {type(value).__name__}. Keyword arguments belong into kwargs."
        )
    return tuple(_tensor(item, f"{name}[{i}]") for i, item in enumerate(value))


def _tensor(value: Any, name: str) -> Any:
    """Return an array as a tensor, of the default dtype where it is floating; others as is."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    if value.dtype.kind not in "fiub":
        raise TypeError(
            f"{name} is a NumPy array of dtype {value.dtype}, which no tensor holds. Turn it into "
            "numbers first."
        )
    tensor = torch.as_tensor(value)
    return tensor.to(torch.get_default_dtype()) if value.dtype.kind == "f" else tensor


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
            NumPy arrays become tensors, floating ones of torch's default dtype; so do those in
            the other arguments.
        kwargs: Keyword arguments of the program in training.
        held_out: Positional arguments on which it is scored; None scores the training data.
        held_out_kwargs: Keyword arguments with `held_out`.
        guides: What is compared: names of `guides.GUIDES`, mappings of cells to names (composite
            guides, as `guides.make` takes them), Pyro guide classes, functions of one
            argument `model` that build a guide, guides, or `benchmarks.Method`. By default `GRID`,
            of which cells that do not apply to the program are left out, with the reason.
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
        autoguide_limit: The most latents, over all rows, that Pyro's autoguides are run on; None
            for no limit.
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
    autoguide_limit: int | None = 200
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
        for name in ("model", "make_model"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"{name} must be a Pyro program, something to call; got a "
                    f"{type(value).__name__}."
                )
        if not isinstance(self.budget, Budget):
            raise TypeError(
                f"budget must be a benchmarks.Budget, got {self.budget!r}. For as many updates: "
                "Budget(num_steps=1000); for less of everything: Budget().scaled('demo')."
            )
        for name in ("args", "held_out"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _positional(value, name))
        for name in ("kwargs", "held_out_kwargs"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"{name} must be a dictionary of keyword arguments, got a "
                    f"{type(value).__name__}."
                )
            object.__setattr__(
                self, name, {key: _tensor(item, f"{name}[{key!r}]") for key, item in value.items()}
            )
        for name in ("guides", "loops", "regimes", "expected_order"):
            object.__setattr__(self, name, listed(getattr(self, name)))
        wrong = [regime for regime in self.regimes if regime not in REGIMES]
        if wrong:
            hint = did_you_mean(wrong[0], REGIMES)
            raise ValueError(
                f"A regime is one of {', '.join(REGIMES)}; got {wrong[0]!r}. {hint}".strip()
            )

    def build_model(self) -> Callable[..., Any]:
        """Return a program of its own for one run."""
        if self.make_model is not None:
            return self.make_model()
        return copy.deepcopy(self.model)  # type: ignore[return-value]

    @property
    def data_digest(self) -> str:
        """Digest of the arguments, those in training and those of the scores."""
        total = hashlib.sha256()
        calls = (self.args, self.kwargs, self.held_out or (), self.held_out_kwargs)
        for call in calls:
            items = call.items() if isinstance(call, Mapping) else enumerate(call)
            for name, value in items:
                total.update(f"{name}:".encode())
                if isinstance(value, torch.Tensor):
                    plain = value.detach().cpu().contiguous()
                    total.update(f"{tuple(plain.shape)}:{plain.dtype};".encode())
                    # As bytes: NumPy lacks some of torch's dtypes.
                    total.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
                else:
                    total.update(repr(value).encode())
            total.update(b"|")
        return total.hexdigest()[:16]

    @property
    def chooses(self) -> bool:
        """Whether it compares the default grid, of which it takes the cells that apply."""
        return self.guides == GRID

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

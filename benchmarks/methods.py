"""Method: one way to a posterior, whatever it was given as: a name, a class, a guide, a loop."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from pyro.infer.autoguide import AutoDelta, AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import nn

from guides.arguments import did_you_mean

__all__ = ["Method", "as_method", "as_methods", "family_and_scheme"]

Program = Callable[..., Any]

PREDICTIVE_CODING = "predictive_coding"


@dataclass(frozen=True)
class Method:
    """One row of a leaderboard.

    Args:
        name: What it is called, unique within a task.
        build: Builds the guide for a model; None for predictive coding, which needs none.
        refit: Whether its parameters belong to the rows it was fitted to, so that held-out rows
            need a fresh guide fitted to them. Scores of such a guide are of that fresh one.
        family: The shapes q can take.
        scheme: How the parameters of q are found.
        loop: `"svi"`, `"predictive_coding"`, or a function `(model, guide, optim)`.
        point: Whether q is a point, which has no density and is scored by its Laplace covariance.
        grid: Name in `guides.GUIDES`, for a cell of the grid; cells by key for a composite guide.
        options: Options of that cell, or of the composite guide.
        note: What a reader should know about it.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from benchmarks import Method
        >>> Method("wide start", build=lambda model: AutoNormal(model, init_scale=1.0)).name
        'wide start'
    """

    name: str
    build: Callable[[Program], Program] | None = None
    refit: bool | None = None
    family: str = "own"
    scheme: str = "own"
    loop: Any = "svi"
    point: bool = False
    grid: str | Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def loop_name(self) -> str:
        """The loop in one word."""
        return self.loop if isinstance(self.loop, str) else _name_of(self.loop)

    @property
    def relaxes(self) -> bool:
        """Whether this is predictive coding."""
        return self.loop == PREDICTIVE_CODING

    def make_guide(
        self,
        model: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        data_plate: str | None = "auto",
    ) -> Program:
        """Build the guide for a model and its data."""
        if self.grid is not None:
            import guides

            options = {"data_plate": data_plate, **self.options}
            # The Laplace covariance of a point is taken in unconstrained space; so is its mode.
            options |= {"jacobian": True} if self.point and "jacobian" not in options else {}
            return guides.make(self.grid, model, *args, model_kwargs=dict(kwargs), **options)
        if self.build is None:
            raise ValueError(f"Method {self.name!r} has no guide: its loop finds the posterior.")
        return self.build(model)

    def as_config(self) -> dict[str, Any]:
        """Return what identifies the method in a record's key."""
        return {
            "name": self.name,
            "loop": self.loop_name,
            "grid": self.grid if self.grid is None or isinstance(self.grid, str) else self.name,
            "options": {key: repr(value) for key, value in sorted(self.options.items())},
        }


def family_and_scheme(name: str) -> tuple[str, str]:
    """Split a name of the grid: `amortized_normal` is the family `normal`, found by an encoder.

    Raises:
        ValueError: For a name that the grid does not have.

    Example:
        >>> from benchmarks.methods import family_and_scheme
        >>> family_and_scheme("amortized_spline_coupling")
        ('spline_coupling', 'Encoder')
    """
    import guides
    from guides.families import FAMILIES

    if name not in guides.GUIDES:
        raise ValueError(
            f"'{name}' is not a guide of the grid. {did_you_mean(name, guides.GUIDES, 3)}It has: "
            f"{', '.join(guides.GUIDES)}. Guides of your own are passed as a class, a function of "
            "`model`, or a guide."
        )
    scheme, family = guides.GUIDES[name]
    names = {path: key for key, path in FAMILIES.items()}
    return names[family], scheme.rpartition(":")[2]


def _is_amortized(name: str) -> bool:
    """Whether the scheme of a grid guide gives parameters to rows that it has not seen."""
    import guides

    module, _, attribute = guides.GUIDES[name][0].partition(":")
    return bool(getattr(import_module(module), attribute).amortized)


def _name_of(thing: Any) -> str:
    if isinstance(thing, partial):
        return _name_of(thing.func)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        return str(thing.__name__)
    return type(thing).__name__


def _is_factory(thing: Any) -> bool:
    """A class, or a function whose one required argument is called `model`."""
    if inspect.isclass(thing):
        return True
    if isinstance(thing, nn.Module) or not callable(thing):
        return False
    if isinstance(thing, partial) and inspect.isclass(thing.func):
        return True
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return len(required) == 1 and required[0].name == "model"


def _grid_method(name: str, options: Mapping[str, Any]) -> Method:
    family, scheme = family_and_scheme(name)
    return Method(
        name,
        refit=not _is_amortized(name),
        family=family,
        scheme=scheme,
        point=family == "delta",
        grid=name,
        options=dict(options),
    )


def _composite_method(cells: Mapping[str, Any]) -> Method:
    """A composite guide, named by its cells."""
    words, names = [], []
    for key, entry in cells.items():
        pair = (entry, {}) if isinstance(entry, str) else tuple(entry)
        if len(pair) != 2 or not isinstance(pair[1], Mapping):
            raise TypeError(
                f"Cell {key!r} of a composite guide is a name of the grid, or a pair of a name "
                f"and its options; got {entry!r}."
            )
        name, options = pair
        family_and_scheme(name)
        names.append(name)
        listed = ", ".join(f"{option}={value}" for option, value in options.items())
        words.append(f"{key}: {name}({listed})" if listed else f"{key}: {name}")
    return Method(
        " + ".join(words),
        family="composite",
        scheme="composite",
        point=bool(names) and all(name == "delta" for name in names),
        grid=dict(cells),
    )


def _own_guide(original: Any, guide: Any, model: Any) -> Any:
    """Build for a guide instance: a copy that belongs to the run's model."""
    if not isinstance(guide, nn.Module):
        return guide
    # What the guide shares with its model, its copy shares with the run's model.
    memo: dict[int, Any] = {id(original): model}
    if isinstance(original, nn.Module) and isinstance(model, nn.Module):
        here = dict(model.named_modules()) | dict(model.named_parameters())
        there = dict(original.named_modules()) | dict(original.named_parameters())
        memo |= {id(part): here[name] for name, part in there.items() if name in here}
    copy_of_guide = _deepcopy(guide, memo)
    reference = getattr(copy_of_guide, "_reference", None)
    if reference is not None:
        # A guide of this project never copies its model.
        copy_of_guide._reference = type(reference)(model)
    return copy_of_guide


def _deepcopy(guide: Any, memo: dict[int, Any]) -> Any:
    """Copy a guide; Pyro's autoguides forget their model then, and are given it back."""
    held = getattr(guide, "_model", None)
    try:
        result = copy.deepcopy(guide, memo)
    finally:
        if held is not None:
            guide._model = held
    if held is not None:
        result._model = copy.deepcopy(held, memo)
    return result


def as_method(
    entry: Any, *, model: Any = None, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Method:
    """Return the method that an entry of `guides=` stands for.

    Args:
        entry: A `Method`, a name of the grid, a mapping of cells (a composite guide, as
            `guides.make` takes it), a class or factory, a guide.
        model: The program that a guide instance was made for.
        options: Options of grid guides by name.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(entry, Method):
        return entry
    if isinstance(entry, str):
        return _grid_method(entry, (options or {}).get(entry, {}))
    if isinstance(entry, Mapping):
        return _composite_method(entry)
    name = _name_of(entry)
    if _is_factory(entry):
        kind = entry.func if isinstance(entry, partial) else entry
        auto = inspect.isclass(kind) and issubclass(kind, AutoGuide | GuideMessenger)
        return Method(
            name,
            build=entry,
            refit=True if auto else None,
            family=name.removeprefix("Auto") if auto else "own",
            scheme="Local" if auto else "own",
            point=inspect.isclass(kind) and issubclass(kind, AutoDelta),
        )
    if callable(entry):
        return Method(
            name,
            build=partial(_own_guide, model, entry),
            refit=False,
            point=isinstance(entry, AutoDelta),
            note="a guide instance: every seed starts from the state it was given in",
        )
    raise TypeError(
        "A guide is a name of the grid, a mapping of cells to names (a composite guide), a class "
        "such as AutoNormal, a function of `model` that builds a guide, a guide, or a "
        f"benchmarks.Method; got {type(entry).__name__}."
    )


def as_methods(
    entries: Iterable[Any],
    loops: Iterable[Any] = ("svi",),
    *,
    model: Any = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Method]:
    """Return guides crossed with loops; predictive coding, which needs no guide, comes once.

    Raises:
        ValueError: For two methods of one name, or an unknown loop.
    """
    guided = [as_method(entry, model=model, options=options) for entry in entries]
    methods: list[Method] = []
    for loop in loops:
        if loop == PREDICTIVE_CODING:
            methods.append(
                Method(
                    PREDICTIVE_CODING,
                    refit=True,
                    family="delta",
                    scheme="Local",
                    loop=PREDICTIVE_CODING,
                    point=True,
                )
            )
        elif loop == "svi":
            methods.extend(guided)
        elif callable(loop):
            methods.extend(
                Method(**{**vars(method), "name": f"{method.name}+{_name_of(loop)}", "loop": loop})
                for method in guided
            )
        else:
            raise ValueError(
                f"A loop is 'svi', '{PREDICTIVE_CODING}', or a function (model, guide, optim) "
                f"that returns an object with step(); got {loop!r}. "
                f"{did_you_mean(loop, ('svi', PREDICTIVE_CODING))}".strip()
            )
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two methods are called '{name}'. Name one of them: "
                f"benchmarks.Method('another name', build=lambda model: ...)."
            )
    return methods

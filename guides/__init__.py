"""Everything that infers, for any Pyro program.

A guide is a family (what shapes can q take?) times a scheme (how are q's parameters found?):

    guide = guides.make("amortized_normal", model, x)

``GUIDES`` is the whole registry: a plain dict from names to the scheme and the family behind them,
every cell of the grid that makes sense.
The package also holds the one inference loop that is not SVI: predictive coding, in
:mod:`guides.inference`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from guides.arguments import check_options, did_you_mean, remedy
from guides.families import FAMILIES
from guides.grid import cell_name, refusal
from guides.schemes import SCHEMES
from guides.sequences import SEQUENCE_GUIDES, build

if TYPE_CHECKING:
    from guides.guide import Guide
    from guides.loading import load
    from guides.saving import save

__all__ = ["GUIDES", "Guide", "load", "make", "pair", "save"]

GUIDES = {
    cell_name(scheme, family): (SCHEMES[scheme], FAMILIES[family])
    for scheme in SCHEMES
    for family in FAMILIES
    if refusal(scheme, family) is None
}


def make(
    name: str | Mapping[str, str | tuple[str, Mapping[str, Any]]],
    model: Any,
    /,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Guide:
    """Build a guide for any Pyro program by name.

    Args:
        name: A key of ``GUIDES``: the family alone for free parameters per datum, prefixed by
            the scheme otherwise (``amortized_``, ``iterative_``, ...). A mapping makes a
            composite guide: from ``"global"``, ``"data"``, the name of a plate or a pattern of
            site names to a name, or to a pair of a name and its options. Names of guides of
            sequences (``filtering_normal``) are in ``guides.sequences.SEQUENCE_GUIDES``.
        model: The program.
        *args: Positional arguments of an example call of the program. Only shapes are taken from
            it, and for amortized guides the scale of the inputs.
        model_kwargs: Keyword arguments of the example call.
        **options: Options of the guide (``data_plate``, ``jacobian``, ``name``), of its family
            (``init_scale``, ...) and of its scheme (``inputs``, ``encoder``, ``hidden``). Where
            family and scheme both know an option, prefix it: ``family_hidden``.

    Returns:
        The guide, with all its parameters.

    Raises:
        ValueError: For an unknown name, or where the program and the guide do not fit.
        TypeError: For an unknown option, one of another type, or arguments in another order.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = make("amortized_normal", model, torch.randn(10), hidden=(16,))
        >>> guide(torch.randn(3))["z"].shape
        torch.Size([3])
    """
    from guides.guide import Guide
    from guides.recipe import Recipe

    _check_program(name, model)
    known = {"guide": ["data_plate", "jacobian", "name"]}
    if isinstance(name, str) and name in SEQUENCE_GUIDES:
        sequence = build(name, model, args, model_kwargs, options)
        sequence.recipe = Recipe.of("make", name, options, args, model_kwargs)
        # A guide of steps has no groups known in advance, and is a ProgramGuide in all else.
        return cast("Guide", sequence)
    if isinstance(name, str):
        family, scheme, rest = _cell(name, options, known, model)
        check_options(Guide.__init__, rest, f"guide {name!r}")
        guide = Guide(
            model, *args, family=family, scheme=scheme, model_kwargs=model_kwargs, **rest
        )
        guide.recipe = Recipe.of("make", name, options, args, model_kwargs)
        return guide
    cells = {}
    for key, entry in name.items():
        *cells[key], _ = _cell(*_entry(key, entry), {}, model)
    unknown = [option for option in options if option not in known["guide"]]
    if unknown:
        raise TypeError(
            f"A composite guide has no option {unknown[0]!r}; its own options are "
            f"{', '.join(known['guide'])}. {remedy(unknown[0], known['guide'], model)}Options of "
            'a cell stand beside its name: {"data": ("amortized_normal", {"hidden": (64,)})}.'
        )
    check_options(Guide.__init__, options, "a composite guide")
    guide = Guide(
        model,
        *args,
        cells={key: (cell[0], cell[1]) for key, cell in cells.items()},
        model_kwargs=model_kwargs,
        **options,
    )
    guide.recipe = Recipe.of("make", name, options, args, model_kwargs)
    return guide


def _check_program(name: Any, model: Any) -> None:
    """Raise where name and model stand in each other's place, or are neither."""
    if not isinstance(name, (str, Mapping)):
        swapped = " The two seem to be swapped." if isinstance(model, (str, Mapping)) else ""
        raise TypeError(
            "The order is guides.make(name, model, *args): first the name of a guide, or a "
            f"mapping from cells to names; got {type(name).__name__}.{swapped}"
        )
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else repr(model)[:60]
        fix = " Build it first: model = Model(...)." if isinstance(model, type) else ""
        raise TypeError(
            "The order is guides.make(name, model, *args), and the model is a Pyro program: a "
            f"function or a module, something to call; got {got}.{fix}"
        )


def _entry(key: str, entry: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and options of a cell of a composite guide."""
    if isinstance(entry, str):
        return entry, {}
    pair = tuple(entry) if isinstance(entry, (tuple, list)) else ()
    if len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping):
        return pair
    raise TypeError(
        f"Cell {key!r} must be the name of a guide, or a pair of a name and its options, "
        f'("amortized_normal", {{"hidden": (64,)}}); got {entry!r}.'
    )


def _cell(
    name: str, options: Mapping[str, Any], more: Mapping[str, list[str]], model: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Family and scheme of a name with their options, and the options of neither."""
    if name in SEQUENCE_GUIDES:
        raise ValueError(
            f"{name!r} is a guide of sequences, which reads the whole program and is no part of a "
            f"composite guide. guides.make({name!r}, model, ...) covers latents of every step, "
            "and those outside of the data plate, too."
        )
    if name not in GUIDES:
        reason = next(
            (
                found
                for scheme in SCHEMES
                for family in FAMILIES
                if cell_name(scheme, family) == name
                and (found := refusal(scheme, family)) is not None
            ),
            None,
        )
        if reason is not None:
            raise ValueError(f"There is no guide {name!r}: {reason}")
        raise ValueError(
            f"Unknown guide {name!r}. {did_you_mean(name, [*GUIDES, *SEQUENCE_GUIDES], 3)}"
            f"A name is a family ({', '.join(FAMILIES)}), prefixed by a scheme unless it is "
            f"local ({', '.join(s for s in SCHEMES if s != 'local')}): amortized_normal."
        )
    scheme, family = (_resolve(path) for path in GUIDES[name])
    known = {
        "scheme": _options(scheme, skip=("init", "group", "call")),
        "family": _options(family, skip=("size",)),
        **more,
    }
    sorted_options: dict[str, dict[str, Any]] = {part: {} for part in (*known, "guide")}
    for option, value in options.items():
        prefix, _, rest = option.partition("_")
        if prefix in ("scheme", "family") and rest in known[prefix]:
            sorted_options[prefix][rest] = value
            continue
        owner = next((part for part in known if option in known[part]), None)
        if owner is None:
            listed = sorted({o for names in known.values() for o in names})
            raise TypeError(
                f"Guide {name!r} has no option {option!r}. {remedy(option, listed, model)}Its "
                f"options: {', '.join(listed)}."
            )
        sorted_options[owner][option] = value
    for part, function in (("family", family), ("scheme", scheme)):
        check_options(function, sorted_options[part], f"guide {name!r}")
    if "init_scale" in sorted_options["family"] and "start_scale" in known["scheme"]:
        # Asked for, it is the scale at the start; otherwise a scheme may know a better one.
        sorted_options["scheme"].setdefault("start_scale", "family")
    return (
        functools.partial(family, **sorted_options["family"]),
        functools.partial(scheme, **sorted_options["scheme"]),
        sorted_options["guide"],
    )


def pair(
    model: Any, /, *args: Any, model_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Any, Guide]:
    """A model and its usual partner, the guide that its attribute ``default_guide`` names.

    Args:
        model: A model with an attribute ``default_guide``, as all of the zoo have.
        *args: Positional arguments of an example call.
        model_kwargs: Keyword arguments of the example call.
        **options: Options of the guide, see :func:`make`.

    Returns:
        The model and the guide.

    Raises:
        ValueError: If the model names no guide.
    """
    name = getattr(model, "default_guide", None)
    if name is None:
        raise ValueError(
            "The model has no attribute default_guide. Name a guide: guides.make(name, model, "
            f"*args), with name one of {', '.join(GUIDES)}."
        )
    return model, make(name, model, *args, model_kwargs=model_kwargs, **options)


def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _options(function: Any, skip: tuple[str, ...]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in skip]


_SUBMODULES = (
    "diagnostics",
    "draws",
    "energy",
    "families",
    "inference",
    "layout",
    "objectives",
    "rows",
)


def __getattr__(name: str) -> Any:
    if name == "Guide":
        from guides.guide import Guide

        return Guide
    if name in ("load", "save"):
        home = {"load": "guides.loading", "save": "guides.saving"}[name]
        return getattr(importlib.import_module(home), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"guides.{name}")
    known = (*__all__, *_SUBMODULES)
    hint = did_you_mean(name, known)
    raise AttributeError(f"module 'guides' has no attribute {name!r}. {hint}".strip())

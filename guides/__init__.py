"""Everything that infers, for any Pyro program.

A guide is a family (what shapes can q take?) times a scheme (how are q's parameters found?):

    guide = guides.make("amortized_normal", model, x)

``GUIDES`` is the whole registry: a plain dict from names to the scheme and the family behind them.
The package also holds the one inference loop that is not SVI: predictive coding, in
:mod:`guides.inference`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guides.guide import Guide

__all__ = ["GUIDES", "Guide", "make", "pair"]

GUIDES = {
    "delta": ("guides.schemes.local:Local", "guides.families.delta:Delta"),
    "normal": ("guides.schemes.local:Local", "guides.families.normal:Normal"),
    "multivariate_normal": (
        "guides.schemes.local:Local",
        "guides.families.multivariate_normal:MultivariateNormal",
    ),
    "spline_coupling": (
        "guides.schemes.local:Local",
        "guides.families.spline_coupling:SplineCoupling",
    ),
    "amortized_delta": ("guides.schemes.encoder:Encoder", "guides.families.delta:Delta"),
    "amortized_normal": ("guides.schemes.encoder:Encoder", "guides.families.normal:Normal"),
    "amortized_multivariate_normal": (
        "guides.schemes.encoder:Encoder",
        "guides.families.multivariate_normal:MultivariateNormal",
    ),
    "amortized_spline_coupling": (
        "guides.schemes.encoder:Encoder",
        "guides.families.spline_coupling:SplineCoupling",
    ),
}


def make(
    name: str,
    model: Any,
    /,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Guide:
    """Build a guide for any Pyro program by name.

    Args:
        name: A key of ``GUIDES``: the family alone for free parameters per datum, prefixed
            ``amortized_`` for an encoder.
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
        TypeError: For an unknown option.

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

    if name not in GUIDES:
        raise ValueError(f"Unknown guide {name!r}. Available guides: {', '.join(GUIDES)}.")
    scheme, family = (_resolve(path) for path in GUIDES[name])
    known = {
        "scheme": _options(scheme, skip=("init", "group", "call")),
        "family": _options(family, skip=("size",)),
        "guide": ["data_plate", "jacobian", "name"],
    }
    sorted_options: dict[str, dict[str, Any]] = {part: {} for part in known}
    for option, value in options.items():
        prefix, _, rest = option.partition("_")
        if prefix in ("scheme", "family") and rest in known[prefix]:
            sorted_options[prefix][rest] = value
            continue
        owner = next((part for part in known if option in known[part]), None)
        if owner is None:
            listed = ", ".join(sorted({o for names in known.values() for o in names}))
            raise TypeError(f"Guide {name!r} has no option {option!r}. Its options: {listed}.")
        sorted_options[owner][option] = value
    return Guide(
        model,
        *args,
        family=functools.partial(family, **sorted_options["family"]),
        scheme=functools.partial(scheme, **sorted_options["scheme"]),
        model_kwargs=model_kwargs,
        **sorted_options["guide"],
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


_SUBMODULES = ("diagnostics", "draws", "energy", "families", "inference", "layout", "rows")


def __getattr__(name: str) -> Any:
    if name == "Guide":
        from guides.guide import Guide

        return Guide
    if name in _SUBMODULES:
        return importlib.import_module(f"guides.{name}")
    raise AttributeError(f"module 'guides' has no attribute {name!r}")

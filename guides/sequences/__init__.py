"""Guides of sequences: q of a step given draws and data of the steps around it.

``SEQUENCE_GUIDES`` is the registry: from names to the class, what it fixes, and the family. A name
is a family prefixed by how q of a step looks at the rest,

    filtering_              q(z_t | z_{t-1}, x_1 .. x_t)
    smoothing_              q(z_t | z_{t-1}, x_t .. x_T)     the form of the exact posterior
    two_sided_smoothing_    q(z_t | z_{t-1}, x_1 .. x_T)
    mean_field_smoothing_   q(z_t | x_1 .. x_T)              no draws of other steps
    mean_field_             q(z_t | x_t)                     nothing of other steps
    iterative_filtering_    the prediction, corrected by learned steps on the bound of the step
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from guides.arguments import check_options, remedy
from guides.families import FAMILIES

if TYPE_CHECKING:
    from guides.sequences.guide import SequenceGuide

__all__ = ["SEQUENCE_GUIDES", "SEQUENCE_SCHEMES", "build"]

_GUIDE = "guides.sequences.guide:SequenceGuide"

SEQUENCE_SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "filtering": (_GUIDE, {"past": True, "future": False, "markov": True}),
    "smoothing": (_GUIDE, {"past": False, "future": True, "markov": True}),
    "two_sided_smoothing": (_GUIDE, {"past": True, "future": True, "markov": True}),
    "mean_field_smoothing": (_GUIDE, {"past": True, "future": True, "markov": False}),
    "mean_field": (_GUIDE, {"past": False, "future": False, "markov": False}),
    "iterative_filtering": ("guides.sequences.filter:VariationalFilter", {}),
}

SEQUENCE_GUIDES = {
    f"{scheme}_{family}": (scheme, family)
    for scheme in SEQUENCE_SCHEMES
    for family in FAMILIES
    if scheme != "iterative_filtering" or family != "delta"
}


def build(
    name: str,
    model: Any,
    args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> SequenceGuide:
    """Build a guide of sequences by name; :func:`guides.make` calls it.

    Args:
        name: A key of ``SEQUENCE_GUIDES``.
        model: Any Pyro program with a data plate over sequences.
        args: Positional arguments of an example call.
        model_kwargs: Keyword arguments of the example call.
        options: Options of the guide and of its family; ``family_`` before one of the family's
            that both have.

    Raises:
        TypeError: For an unknown option, or one of another type.
    """
    scheme, family_name = SEQUENCE_GUIDES[name]
    path, fixed = SEQUENCE_SCHEMES[scheme]
    guide_class, family = _resolve(path), _resolve(FAMILIES[family_name])
    taken = ("self", "model", "args", "family", "model_kwargs", *fixed)
    own = [key for key in inspect.signature(guide_class.__init__).parameters if key not in taken]
    of_family = [key for key in inspect.signature(family).parameters if key != "size"]
    chosen: dict[str, Any] = {}
    family_options: dict[str, Any] = {}
    for option, value in options.items():
        rest = option.removeprefix("family_")
        if option in own:
            chosen[option] = value
        elif option in of_family:
            family_options[option] = value
        elif option != rest and rest in of_family:
            family_options[rest] = value
        else:
            known = sorted({*own, *of_family})
            raise TypeError(
                f"Guide {name!r} has no option {option!r}. {remedy(option, known, model)}Its "
                f"options: {', '.join(known)}."
            )
    check_options(guide_class.__init__, chosen, f"guide {name!r}")
    check_options(family, family_options, f"guide {name!r}")
    guide: SequenceGuide = guide_class(
        model,
        *args,
        family=lambda size: family(size, **family_options),
        model_kwargs=model_kwargs,
        **fixed,
        **chosen,
    )
    return guide


def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)

"""What arguments must be: checks whose errors say the requirement, the offender and the fix."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

__all__ = [
    "check_annotated",
    "check_number",
    "check_options",
    "check_widths",
    "did_you_mean",
    "remedy",
]

_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "True or False",
    "str": "a string",
    "None": "None",
    "Sequence[int]": "a sequence of integers",
}


def did_you_mean(name: Any, known: Iterable[str], count: int = 1) -> str:
    """The names that a misspelt one may stand for, as a sentence with a space behind it.

    Example:
        >>> did_you_mean("hiden", ["hidden", "inputs"])
        "Did you mean 'hidden'? "
        >>> did_you_mean("rows", ["hidden", "inputs"])
        ''
    """
    close = difflib.get_close_matches(str(name), list(known), count, 0.6)
    return f"Did you mean {' or '.join(map(repr, close))}? " if close else ""


def check_number(
    name: str, value: Any, *, integer: bool = False, least: float | None = None
) -> None:
    """Raise unless a value is a number of its kind.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        integer: Whether it counts something.
        least: The smallest value allowed.

    Raises:
        TypeError: For another type; truth values are no numbers here.
        ValueError: For a value below ``least``.
    """
    kind = "int" if integer else "float"
    if not _fits(kind, value):
        raise TypeError(f"{name} must be {_WORDS[kind]}, got {_shown(value)}.")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value!r}.")


def check_widths(name: str, value: Any) -> tuple[int, ...]:
    """The widths of layers as a tuple.

    Raises:
        TypeError: For anything but a sequence of integers.

    Example:
        >>> check_widths("hidden", [64, 64])
        (64, 64)
    """
    check_annotated(name, value, "Sequence[int]")
    return tuple(int(width) for width in value)


def check_annotated(name: str, value: Any, annotation: Any) -> None:
    """Raise where a value does not fit the annotation of its argument.

    Only numbers, truth values, strings, None and sequences of integers are looked at; a value of
    an argument that may be anything else passes.

    Args:
        name: Name of the argument.
        value: What was passed for it.
        annotation: As in the source, ``"int | None"``.

    Raises:
        TypeError: Naming the argument, what it takes and what it got.

    Example:
        >>> check_annotated("hidden", 32, "Sequence[int]")
        Traceback (most recent call last):
        TypeError: hidden must be a sequence of integers, got 32 (int). One entry: (32,).
    """
    kinds = [kind.strip() for kind in str(annotation).split("|")]
    if any(kind not in _WORDS for kind in kinds) or any(_fits(kind, value) for kind in kinds):
        return
    hint = ""
    if "Sequence[int]" in kinds and _fits("int", value):
        hint = f" One entry: ({value},)."
    wanted = " or ".join(_WORDS[kind] for kind in kinds)
    raise TypeError(f"{name} must be {wanted}, got {_shown(value)}.{hint}")


def check_options(function: Callable[..., Any], options: Mapping[str, Any], where: str) -> None:
    """Raise where an option does not fit its annotation in the signature of a function.

    Args:
        function: What takes the options.
        options: Their values by name.
        where: Whose options they are, for the message.
    """
    parameters = inspect.signature(function).parameters
    for option, value in options.items():
        annotation = parameters[option].annotation
        # A class that evaluates its annotations has types here, whose names are the same.
        annotation = getattr(annotation, "__name__", annotation)
        check_annotated(f"Option {option} of {where}", value, annotation)


def _fits(kind: str, value: Any) -> bool:
    truth = isinstance(value, (bool, np.bool_))
    if kind == "int":
        return isinstance(value, Integral) and not truth
    if kind == "float":
        return isinstance(value, Real) and not truth
    if kind == "bool":
        return truth
    if kind == "str":
        return isinstance(value, str)
    if kind == "None":
        return value is None
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return listed and all(_fits("int", item) for item in value)


def _shown(value: Any) -> str:
    text = repr(value)
    if value is None:
        return text
    kind = type(value).__name__
    return f"{text} ({kind})" if len(text) <= 40 else f"a {kind}"


def remedy(option: str, known: Iterable[str], model: Any) -> str:
    """What an unknown option may have been meant for."""
    try:
        function = model.forward if hasattr(model, "forward") else model
        arguments = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        arguments = []
    if option in arguments:
        return (
            f"{option!r} is an argument of the model: pass model_kwargs={{{option!r}: ...}}, the "
            "keyword arguments of the example call. "
        )
    return did_you_mean(option, known)

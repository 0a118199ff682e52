"""Rows: which arguments of a model hold data, and the one way to slice them.

``data_args={"x": 0}`` names, for each argument of the model that holds data, the axis of its
rows. Models may state it as an attribute; otherwise it is inferred from axes as long as the data
plate. Minibatches, chunked scores and ArviZ export slice a model's arguments through it and
through nothing else.

A program takes part in minibatches if its data plate can be told its rows:

    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guides.layout import Layout
from guides.layout import layout as read_layout
from guides.probe import Program

__all__ = ["bind", "can_take_index", "data_args_of", "minibatches", "take_rows"]


def bind(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the model's own signature.

    Positional arguments that land in ``*args`` are named by their position.
    """
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {str(len(named) + i): item for i, item in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def data_args_of(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    layout: Layout,
    data_args: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The arguments that hold rows, and the axis of the rows in each.

    Args:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        layout: The layout of this call.
        data_args: What the caller states; takes precedence over the model's attribute
            ``data_args`` and over inference from sizes.

    Raises:
        ValueError: Without a data plate, for an argument that the call lacks, for an axis of
            another length than the data plate, or where sizes do not decide.
    """
    if layout.data_plate is None:
        raise ValueError(
            "Rows can be sliced only along a data plate, and this program has none. "
            + (
                f"Several plates hold every observed site: pass data_plate= one of "
                f"{', '.join(layout.ambiguous)}."
                if layout.ambiguous
                else "Put the data into one vectorized pyro.plate."
            )
        )
    num_rows = layout.data_plate.num_rows
    bound = bind(model, args, kwargs)
    stated = data_args if data_args is not None else getattr(model, "data_args", None)
    if stated is not None:
        if data_args is not None:
            for name in stated:
                if name not in bound:
                    raise ValueError(
                        f"data_args names {name!r}, which the call does not have. Arguments of "
                        f"the call: {', '.join(bound) or 'none'}."
                    )
        result = {name: axis for name, axis in stated.items() if bound.get(name) is not None}
        for name, axis in result.items():
            shape = tuple(bound[name].shape)
            if not -len(shape) <= axis < len(shape) or shape[axis] != num_rows:
                raise ValueError(
                    f"data_args says that axis {axis} of argument {name!r} holds the rows, but "
                    f"its shape is {shape} and the data plate has {num_rows} rows."
                )
        return result
    result = {}
    for name, value in bound.items():
        if name == "index" or not isinstance(value, Tensor):
            continue
        axes = [axis for axis, size in enumerate(value.shape) if size == num_rows]
        if len(axes) > 1:
            raise ValueError(
                f"Axes {axes} of argument {name!r} (shape {tuple(value.shape)}) could all hold "
                f"the {num_rows} rows. State it: data_args={{{name!r}: {axes[0]}}}."
            )
        if axes:
            result[name] = axes[0]
    return result


def take_rows(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rows: Tensor,
    layout: Layout,
    data_args: Mapping[str, int] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call ``model(*args, **kwargs)`` restricted to some of its rows.

    Args:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        rows: Positions ``(b,)`` among the rows of this call.
        layout: The layout of this call.
        data_args: See :func:`data_args_of`.

    Returns:
        Positional and keyword arguments of the sliced call; where the program takes ``size``
        and ``index``, they tell its plate the full size and the numbers of the rows.
    """
    axes = data_args_of(model, args, kwargs, layout, data_args)
    if not axes:
        raise ValueError(
            f"No argument of the call has an axis of {layout.num_rows} rows, so it cannot be "
            "sliced. State the arguments that hold rows: data_args={name: axis}."
        )
    plate = layout.data_plate
    parameters = _parameters(model)
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]

    def sliced(name: str, value: Any) -> Any:
        return value.index_select(axes[name], rows.to(value.device)) if name in axes else value

    names = positional[: len(args)]
    # What lands in *args is named by its number, as in `bind`.
    names += [str(i) for i in range(len(names), len(args))]
    new_args = [sliced(name, value) for name, value in zip(names, args, strict=True)]
    new_kwargs = {name: sliced(name, value) for name, value in kwargs.items()}
    if plate is not None and can_take_index(model):
        number = rows if plate.index is None else plate.index.to(rows.device)[rows]
        for name, value in (("size", plate.size), ("index", number)):
            if name in names:
                new_args[names.index(name)] = value
            else:
                new_kwargs[name] = value
    return tuple(new_args), new_kwargs


def can_take_index(model: Program) -> bool:
    """Whether a program can be told its rows: it takes ``size`` and ``index``."""
    return {"size", "index"} <= {parameter.name for parameter in _parameters(model)}


def _parameters(model: Program) -> list[inspect.Parameter]:
    """Parameters of a program's own signature; none where it has no readable one."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def minibatches(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    batch_size: int,
    layout: Layout | None = None,
    data_args: Mapping[str, int] | None = None,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """One pass over the rows in minibatches, each a call ``(args, kwargs)`` of the model.

    Args:
        model: The program; it must take ``size`` and ``index``.
        args: Its positional arguments, all rows.
        kwargs: Its keyword arguments.
        batch_size: Rows a batch; the last one may be smaller.
        layout: The layout of the full call; read here by default.
        data_args: See :func:`data_args_of`.
        shuffle: Whether to permute the rows.
        generator: Source of the permutation.

    Raises:
        ValueError: Where the program cannot be told its rows.
    """
    kwargs = {} if kwargs is None else kwargs
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    layout = read_layout(model, args, kwargs) if layout is None else layout
    if not can_take_index(model):
        raise ValueError(
            "Minibatches need a program that can be told its rows: give it the keyword arguments "
            "size=None and index=None and use them in its data plate, "
            'pyro.plate("data", size or len(x), subsample=index).'
        )
    order = torch.randperm(layout.num_rows, generator=generator) if shuffle else None
    rows = torch.arange(layout.num_rows) if order is None else order
    for part in rows.split(batch_size):
        yield take_rows(model, args, kwargs, part, layout, data_args)

"""All rows of a program as calls that hold a part of them each.

A program that is told its rows is sliced by :mod:`guides.rows`. A program that draws its own
minibatches (``pyro.plate("data", N, subsample_size=B)``) is called unchanged, with the row
numbers of its plate replaced: by 0..B-1, B..2B-1 and so on, the last part reaching back so that
it has B rows too, of which only the new ones are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from guides.diagnostics.resimulation import Call
from guides.layout import Layout, layout
from guides.probe import Program
from guides.rows import take_rows

__all__ = ["split_calls"]


def split_calls(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    batch_size: int | None,
    data_args: Mapping[str, int] | None,
) -> list[Call]:
    """Split a call into calls of at most ``batch_size`` rows.

    Args:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        read: The layout of the call.
        batch_size: Rows a call; None for all at once.
        data_args: See :func:`guides.rows.data_args_of`.

    Raises:
        ValueError: For a batch size that the program cannot follow, or where slicing its
            arguments does not slice its data plate.
    """
    plate = read.data_plate
    if plate is not None and plate.random:
        if batch_size not in (None, plate.num_rows):
            raise ValueError(
                f"The program draws its own minibatches of {plate.num_rows} rows, so batch_size "
                f"is {plate.num_rows}, not {batch_size}. Leave it out."
            )
        return _windows(model, args, kwargs, read)
    if batch_size is None:
        return [Call(args, kwargs, read, torch.arange(read.num_rows))]
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if plate is None:
        hint = f" data_plate= one of {', '.join(read.ambiguous)}." if read.ambiguous else ""
        raise ValueError(
            "batch_size splits the rows of a data plate, and there is none: no plate holds all "
            "the data, or the guide was built with data_plate=None. "
            f"Leave it out, or say where the rows are:{hint or ' put the data into a plate.'}"
        )
    calls = []
    for rows in torch.split(torch.arange(plate.num_rows), batch_size):
        part_args, part_kwargs = take_rows(model, args, kwargs, rows, read, data_args)
        part = layout(model, part_args, part_kwargs, data_plate=plate.name)
        if part.num_rows != len(rows):
            raise ValueError(
                f"Taking {len(rows)} of the {plate.num_rows} rows left the data plate "
                f"{plate.name!r} with {part.num_rows} rows. State which arguments hold rows, "
                "data_args={'x': 0}, and let the plate take its size from them, or from the "
                "arguments size and index."
            )
        calls.append(Call(part_args, part_kwargs, part, rows))
    return calls


def _windows(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Layout
) -> list[Call]:
    plate = read.data_plate
    if plate is None:
        raise ValueError("A data plate is needed.")
    calls = []
    for start in range(0, plate.size, plate.num_rows):
        first = min(start, plate.size - plate.num_rows)
        rows = torch.arange(first, first + plate.num_rows)
        part = layout(model, args, kwargs, data_plate=plate.name, indices={plate.name: rows})
        calls.append(Call(args, kwargs, part, rows, start - first))
    return calls

"""Constant data of an export: arrays among a call's arguments that no site observes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guides.diagnostics.axis_names import Axes
from guides.diagnostics.export_draws import Assembly
from guides.layout import Layout
from guides.probe import Program
from guides.rows import bind, data_args_of

__all__ = ["constant_data"]


def constant_data(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    data_args: Mapping[str, int] | None,
    assembly: Assembly,
) -> Iterator[tuple[str, tuple[Tensor, Axes]]]:
    """Arrays among the arguments that are neither observed values nor row numbers."""
    bound = bind(model, args, kwargs)
    plate = read.data_plate
    stated: Mapping[str, int] = {}
    if plate is not None and (data_args or getattr(model, "data_args", None)) and not plate.random:
        stated = data_args_of(model, args, kwargs, read, data_args)
    observed = [value for value, _ in assembly.groups.get("observed_data", {}).values()]
    for name, value in _arrays(bound):
        if name == "index" or any(_same(value, other) for other in observed):
            continue
        if plate is not None and plate.index is not None and _same(value, plate.index):
            continue
        label = f"{name}_arg" if name in read.plates else name
        axis = stated.get(name)
        if axis is None and plate is not None:
            num_rows = plate.size if plate.random else plate.num_rows
            axes = [i for i, size in enumerate(value.shape) if size == num_rows]
            # A label only: where sizes do not decide, the axis stays unnamed.
            axis = axes[0] if len(axes) == 1 else None
        names = [f"{label}_dim_{i}" for i in range(value.dim())]
        if axis is not None and plate is not None:
            names[axis] = plate.name
        yield label, (value, Axes(tuple(names), value.dim(), None))


def _arrays(named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            yield name, torch.as_tensor(value)
        elif isinstance(value, Mapping):
            yield from _arrays({f"{name}.{key}": item for key, item in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _arrays({f"{name}.{i}": item for i, item in enumerate(value)})


def _same(value: Tensor, other: Tensor) -> bool:
    value, other = value.detach().cpu().reshape(-1), other.detach().cpu().reshape(-1)
    return value.shape == other.shape and bool((value == other).all())

"""The plate over the data: checks rows before Pyro broadcasts what should have been an error."""

from __future__ import annotations

import pyro
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

__all__ = ["check_rows", "data_plate"]


def data_plate(
    x: Tensor | None,
    size: int | None,
    index: Tensor | None,
    *,
    site: str = "x",
    event_shape: tuple[int, ...],
    name: str = "data",
    values: str = "real",
) -> pyro.plate:
    """The plate of one call of a model, after checking that its data are rows of that plate.

    Checks of values (finite, 0 or 1, index in range) run while Pyro's validation is on, so that
    ``torch.func`` transforms, which cannot read values, run with it off.

    Args:
        x: Data ``(B,) + event_shape``, or None to simulate.
        size: Rows N of the whole data set; by default those of ``x``.
        index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.
        site: The observed site, for messages.
        event_shape: Shape of one row.
        name: Name of the plate.
        values: What a row may hold: ``"real"``, ``"unit"`` (from 0 to 1) or ``"binary"``.

    Returns:
        The plate; a minibatch is scaled by N/B in it.

    Raises:
        ValueError: Where the data are no rows of the plate.
        TypeError: Where ``x`` or ``index`` has the wrong type.

    Example:
        >>> plate = data_plate(torch.zeros(2, 3), 10, torch.tensor([4, 7]), event_shape=(3,))
        >>> plate.size, plate.subsample_size
        (10, 2)
    """
    if x is not None:
        check_rows(x, site, event_shape=event_shape, values=values)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}: pass the number of rows.")
    if index is not None:
        _check_index(x, size, index, site)
    elif x is None:
        if size is None:
            raise ValueError(
                f"Site {site!r} has neither data nor a number of rows to simulate. Pass {site}=, "
                "or size= with the number of rows."
            )
    elif size is None:
        size = len(x)
    elif size != len(x):
        raise ValueError(
            f"Site {site!r} has {len(x)} rows, but size={size}. Pass index= with the numbers of "
            "these rows among all of them, or leave size out."
        )
    return pyro.plate(name, size, subsample=index)


def check_rows(
    x: Tensor, site: str = "x", *, event_shape: tuple[int, ...], values: str = "real"
) -> None:
    """Check that data are rows of a model.

    Args:
        x: Data ``(B,) + event_shape``.
        site: The observed site, for messages.
        event_shape: Shape of one row.
        values: What a row may hold: ``"real"``, ``"unit"`` (from 0 to 1) or ``"binary"``.

    Raises:
        ValueError: For a wrong shape, no rows, NaN or infinity, values out of range.
        TypeError: For no tensor, or one of another than a floating type.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Site {site!r} needs a tensor, got {type(x).__name__}: pass torch.as_tensor({site})."
        )
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[1:]) != event_shape:
        expected = ", ".join(("rows", *map(str, event_shape)))
        raise ValueError(
            f"Site {site!r} needs data of shape ({expected}), got {tuple(x.shape)}. Reshape the "
            "data (one row a datum, features flattened), or build the model for their size."
        )
    if not x.is_floating_point():
        raise TypeError(
            f"Site {site!r} needs floating point data, got {x.dtype}: pass "
            f"{site}.to(torch.get_default_dtype())."
        )
    if len(x) == 0:
        raise ValueError(f"Site {site!r} got an empty batch. Leave batches without rows out.")
    if not is_validation_enabled():
        return
    broken = ~torch.isfinite(x)
    if broken.any():
        first = int(broken.reshape(len(x), -1).any(1).nonzero()[0])
        raise ValueError(
            f"Site {site!r} needs finite data, but {int(broken.sum())} of {x.numel()} values are "
            f"NaN or infinite, the first in row {first}. Drop or impute those rows."
        )
    if values == "binary" and not ((x == 0) | (x == 1)).all():
        raise ValueError(
            f"Site {site!r} is Bernoulli and needs data of zeros and ones, got values from "
            f"{x.min().item():g} to {x.max().item():g}. Binarize the data, or build the model "
            'with likelihood="continuous_bernoulli" (for values from 0 to 1) or "gaussian".'
        )
    if values == "unit" and not ((x >= 0) & (x <= 1)).all():
        raise ValueError(
            f"Site {site!r} is continuous Bernoulli and needs data from 0 to 1, got values from "
            f"{x.min().item():g} to {x.max().item():g}. Rescale the data, or build the model "
            'with likelihood="gaussian".'
        )


def _check_index(x: Tensor | None, size: int | None, index: Tensor, site: str) -> None:
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be a tensor of integers (row numbers), got {kind}.")
    if size is None:
        raise ValueError(
            "index= needs size= too: the number of rows of the whole data set, which scales the "
            "minibatch."
        )
    if index.dim() != 1 or len(index) == 0:
        raise ValueError(
            f"index must hold one number a row, shape (rows,), got {tuple(index.shape)}."
        )
    if x is not None and len(index) != len(x):
        raise ValueError(
            f"Site {site!r} has {len(x)} rows, but index has {len(index)} numbers. Pass one row "
            f"number a row: {site}=data[index], index=index."
        )
    if is_validation_enabled() and not ((index >= 0) & (index < size)).all():
        raise ValueError(
            f"index must lie between 0 and size - 1 = {size - 1}, got numbers from "
            f"{int(index.min())} to {int(index.max())}. size is that of the whole data set."
        )

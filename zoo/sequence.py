"""Sequences as rows: lengths that differ, checked, and the mask of one time step.

Data are ``(B, T, D)``: B sequences of the plate, T steps. Sequences of different lengths are
padded to the longest and pass ``lengths`` ``(B,)``; steps from a sequence's length on are masked,
latents and data alike, so that they change no density.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.mask_messenger import MaskMessenger
from torch import Tensor

__all__ = ["Steps", "steps"]


class Steps:
    """The time steps of one call of a sequence model.

    Args:
        number: Steps T.
        lengths: Steps of every row ``(B,)``, or None where all have T.
    """

    def __init__(self, number: int, lengths: Tensor | None) -> None:
        self.number = number
        self.lengths = lengths

    def active(self, t: int) -> AbstractContextManager[Any]:
        """The handler of step ``t``, counted from 0: masks the rows that have ended."""
        if self.lengths is None:
            return contextlib.nullcontext()
        return MaskMessenger(mask=cast("torch.BoolTensor", t < self.lengths))


def steps(x: Tensor | None, lengths: Tensor | None, default: int, site: str = "x") -> Steps:
    """The time steps of a call, after checking that the lengths fit the data.

    Args:
        x: Data ``(B, T, D)``, or None to simulate.
        lengths: Steps of every row ``(B,)``, integers from 1 to T, or None.
        default: Steps to simulate.
        site: The observed site, for messages.

    Raises:
        ValueError: Where ``x`` has no time axis or no steps, or lengths do not fit it.
        TypeError: Where lengths are no integers.

    Example:
        >>> steps(torch.zeros(2, 5, 3), torch.tensor([5, 2]), 10).number
        5
    """
    if x is None:
        number = default
    elif not isinstance(x, Tensor) or x.dim() < 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"Site {site!r} needs sequences of shape (rows, steps, features), got {shape}. For a "
            "single sequence pass x[None], for scalar steps x[..., None]."
        )
    else:
        number = x.shape[1]
    if number < 1:
        raise ValueError(f"Site {site!r} needs at least one time step, got {number}.")
    if lengths is None:
        return Steps(number, None)
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of integers (steps of a row), got {kind}.")
    if lengths.dim() != 1 or (x is not None and len(lengths) != len(x)):
        rows = "" if x is None else f" for {len(x)} rows"
        raise ValueError(
            f"lengths must hold one number a row, shape (rows,), got {tuple(lengths.shape)}{rows}."
        )
    if is_validation_enabled() and not ((lengths >= 1) & (lengths <= number)).all():
        raise ValueError(
            f"lengths must lie between 1 and the {number} steps of the data, got numbers from "
            f"{int(lengths.min())} to {int(lengths.max())}. Leave empty sequences out."
        )
    return Steps(number, lengths)

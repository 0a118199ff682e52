"""Autoguides: where Pyro's own guides may run, and where they would be silently wrong.

Pyro's autoguides hold the parameters of all latents of a call at once. Two things are looked at
before one is fitted:

* size: on targets of more than `Task.autoguide_limit` latents they are refused;
* minibatches: most of them allocate parameters for the rows of the first minibatch, and give them
  by position to whatever rows come next, without an error. Which ones do is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from guides.layout import Layout, layout

__all__ = [
    "RefusedError",
    "admit",
    "follow_rows",
    "is_autoguide",
    "minibatch_fault",
    "num_latents",
    "two_batches",
]

Program = Callable[..., Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]


class RefusedError(ValueError):
    """A method that is not run on a task, for a reason that is no failure of its own.

    Args:
        why: `"latents"` (too many of them), `"minibatches"` (it would be silently wrong on them)
            or `"declined"` (it raises on them).
        message: The reason, for a reader.
    """

    def __init__(self, why: str, message: str) -> None:
        super().__init__(message)
        self.why = why


def is_autoguide(guide: Any) -> bool:
    """Whether a guide is one of Pyro's own."""
    return isinstance(guide, AutoGuide | GuideMessenger)


def num_latents(read: Layout) -> int:
    """Return the number of unconstrained latents of a call, those of all rows together."""
    rows = 1 if read.data_plate is None else read.data_plate.num_rows
    return sum(group.size * (1 if group.plate is None else rows) for group in read.groups)


def admit(program: Program, call: Call, limit: int | None, plate: str | None) -> None:
    """Refuse an autoguide where the target is too large for it.

    Args:
        program: The model.
        call: Its arguments.
        limit: The largest number of latents; None for no limit.
        plate: See `guides.layout`.

    Raises:
        RefusedError: With the number of latents.
    """
    if limit is None:
        return
    args, kwargs = call
    total = num_latents(layout(program, args, kwargs, data_plate=plate))
    if total > limit:
        raise RefusedError(
            "latents",
            f"Pyro's autoguides hold parameters for all latents at once (a dense covariance grows "
            f"with their square), so they run on targets of at most {limit} latents; this one has "
            f"{total:,}. To run it all the same pass autoguide_limit=None to compare or Task; "
            "else pass fewer rows, or compare guides of the grid, which have no limit.",
        )


def follow_rows(guide: Any, program: Program, plate: str | None) -> None:
    """Let an autoguide meet the rows that a call names, where it can follow them at all.

    Left alone, an autoguide makes plates of its own, which draw rows at random, and the rows that
    the caller names are ignored.
    """
    if not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        return

    def create_plates(*args: Any, **kwargs: Any) -> Any:
        found = layout(program, args, kwargs, data_plate=plate).data_plate
        if found is None:
            return []
        return pyro.plate(found.name, found.size, subsample=found.index, dim=found.dim)

    guide.create_plates = create_plates


def minibatch_fault(
    build: Callable[[], Any],
    program: Program,
    batches: tuple[Call, Call],
    full: Call,
    plate: str | None,
) -> RefusedError | None:
    """Try whether an autoguide keeps the parameters of rows apart over two minibatches.

    It is built on the first, all its parameters are moved at random, and it draws for both with
    the same noise: for rows of their own parameters, the draws must differ.

    Args:
        build: Builds it afresh.
        program: The model.
        batches: Calls on two minibatches of as many rows, with no row in common.
        full: The call on all rows.
        plate: See `guides.layout`.

    Returns:
        What is wrong, None if nothing is.
    """
    (first, second), (args, kwargs) = batches, full
    read = layout(program, args, kwargs, data_plate=plate)
    local = [site.name for group in read.groups if group.plate is not None for site in group.sites]
    if not local:
        return None

    def draws(guide: Any, call: Call) -> dict[str, Tensor]:
        torch.manual_seed(1)
        with torch.no_grad():
            values: dict[str, Tensor] = guide(*call[0], **call[1])
        return {name: values[name].detach().clone() for name in local}

    with torch.random.fork_rng():
        try:
            with pyro.get_param_store().scope():
                guide = build()
                follow_rows(guide, program, plate)
                guide(*first[0], **first[1])
                num_first = _num_parameters(guide)
                with torch.no_grad():
                    for value in _parameters(guide):
                        value.add_(0.3 * torch.randn_like(value))
                one, other = draws(guide, first), draws(guide, second)
        except Exception as error:  # whatever it raises is its own refusal
            lines = str(error).strip().splitlines() or ["no message"]
            return RefusedError(
                "declined",
                f"It cannot be run on minibatches: {type(error).__name__}: {lines[0]}",
            )
        shared = [
            name
            for name in local
            if one[name].shape == other[name].shape and torch.equal(one[name], other[name])
        ]
        if not shared:
            return None
        with pyro.get_param_store().scope():
            guide = build()
            guide(*args, **kwargs)
            num_full = _num_parameters(guide)
    size = layout(program, *first, data_plate=plate).num_rows
    return RefusedError(
        "minibatches",
        f"It is silently wrong on minibatches: different rows get the same q of "
        f"{', '.join(map(repr, shared))}, by their position in the minibatch. Built on "
        f"{size} rows it has {num_first:,} parameters, on all {read.num_rows} rows {num_full:,}. "
        "It raises no error, and its ELBO would be that of no posterior.",
    )


def _parameters(guide: Any) -> list[Tensor]:
    if isinstance(guide, nn.Module):
        return [value for value in guide.parameters() if value.dtype.is_floating_point]
    return []


def _num_parameters(guide: Any) -> int:
    return sum(value.numel() for value in _parameters(guide))


def two_batches(
    program: Program, call: Call, size: int, plate: str | None, data_args: Mapping[str, int] | None
) -> tuple[Call, Call] | None:
    """Return the calls of the first and of the last rows; None for fewer than two rows."""
    from guides.rows import take_rows

    args, kwargs = call
    read = layout(program, args, kwargs, data_plate=plate)
    size = min(size, read.num_rows // 2)
    if size < 1:
        return None
    rows = torch.arange(size), torch.arange(read.num_rows - size, read.num_rows)
    first, second = (take_rows(program, args, kwargs, r, read, data_args) for r in rows)
    return first, second

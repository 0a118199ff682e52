"""What an encoder reads in one call: observed values by default, or what ``inputs=`` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from guides.arguments import did_you_mean
from guides.layout import Layout
from guides.rows import bind
from guides.schemes.scheme import Call
from guides.sites import Observed

__all__ = ["Input", "alike", "read_inputs"]

Selection = Callable[..., Tensor] | tuple[str, ...] | None


@dataclass(frozen=True)
class Input:
    """One input of a call.

    Args:
        name: Name of the observed site, or of the argument.
        value: Its value, rows first ``(B, ...)``.
        mask: Which entries count, broadcastable to ``value``; None where there is no mask.
        num_inner: Number of dimensions behind the rows that are plates of the program.
        site: The observed site, None for an argument or a computed input.
    """

    name: str
    value: Tensor
    mask: Tensor | None = None
    num_inner: int = 0
    site: Observed | None = None


def read_inputs(selection: Selection, call: Call) -> list[Input]:
    """The inputs of a call.

    Args:
        selection: A callable of the model's arguments, names of arguments, or None for the
            observed values in the data plate.
        call: The call.

    Raises:
        ValueError: Where there are none, where the call lacks an argument, or where an input has
            another number of rows than the data plate.
    """
    if callable(selection):
        inputs = [Input("inputs", _tensor("inputs", selection(*call.args, **call.kwargs)))]
    elif selection is not None:
        bound = bind(call.model, call.args, call.kwargs)
        missing = [name for name in selection if name not in bound]
        if missing:
            raise ValueError(
                f"inputs= names arguments that the call does not have: {', '.join(missing)}. "
                f"{did_you_mean(missing[0], bound)}Arguments of the call: "
                f"{', '.join(bound) or 'none'}."
            )
        inputs = [Input(name, _tensor(name, bound[name])) for name in selection]
    else:
        inputs = [_observed(s) for s in call.layout.observed.values() if s.row_dim is not None]
        if not inputs:
            raise ValueError(
                "An amortized guide reads the observed values in the data plate, and there "
                "are none in this call. Call with data, or pass inputs= (a callable of the "
                "model's arguments, or names of them)."
            )
    num_rows = call.layout.num_rows
    for item in inputs:
        if item.value.dim() == 0 or item.value.shape[0] != num_rows:
            raise ValueError(
                f"Encoder input {item.name!r} must have one row per datum ({num_rows}), got "
                f"shape {tuple(item.value.shape)}."
            )
    return inputs


def _tensor(name: str, value: Any) -> Tensor:
    if value is None:
        raise ValueError(
            f"Encoder input {name!r} is None in this call. Pass its value, one row per datum."
        )
    value = torch.as_tensor(value)
    return value.unsqueeze(-1) if value.dim() == 1 else value


def _observed(site: Observed) -> Input:
    value = site.rows_first(site.value)
    mask = None if site.mask is None else site.rows_first(site.mask)
    num_inner = max(site.value.dim() - site.event_dim - 1, 0)
    return Input(site.name, value, mask, num_inner, site)


def alike(item: Input, layout: Layout) -> bool:
    """Whether the elements of an inner plate are exchangeable, as far as the program shows.

    They are where the distribution is the same at each of them and no latent of the row belongs
    to one of them: then their order says nothing about the row. Items of a test, which differ in
    difficulty, or pixels are not.

    Args:
        item: The input.
        layout: The layout of its call.
    """
    site = item.site
    if site is None or item.num_inner == 0:
        return False
    inner = {plate.name for plate in site.plates if plate.dim != site.row_dim}
    if not inner or any(
        plate.name in inner
        for latent in layout.sites.values()
        if latent.row_dim is not None
        for plate in latent.plates
    ):
        return False
    batch = site.value.dim() - site.event_dim
    dims = [d for d in range(batch) if d - batch != site.row_dim and site.value.shape[d] > 1]
    first = site.value
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    with torch.no_grad():
        # The latents stand at irregular values, so distributions that depend on them differ.
        terms = _unmasked(site.fn).log_prob(first.expand(site.value.shape))
    terms = terms.expand(site.value.shape[:batch])
    reference = terms
    for dim in dims:
        reference = reference.narrow(dim, 0, 1)
    return torch.allclose(terms, reference.expand_as(terms), rtol=1e-5, atol=1e-6)


def _unmasked(fn: Any) -> Any:
    """The distribution without the masks inside it."""
    if isinstance(fn, MaskedDistribution):
        return _unmasked(fn.base_dist)
    if type(fn).__name__ == "Independent":
        return _unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if type(fn).__name__ == "ExpandedDistribution":
        return _unmasked(fn.base_dist).expand(fn.batch_shape)
    return fn

"""What a site looks like at given latents: prediction, error and energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from guides import location_scale
from guides.energy import SiteTerms

__all__ = ["SiteState", "site_state"]


@dataclass(frozen=True)
class SiteState:
    """A site at the end of a relaxation.

    Args:
        value: Its constrained value.
        prediction: The mean its parents predict, None where its family has none.
        error: Its prediction error, shaped as the value; None where the family has neither
            location nor mean and variance.
        formula: What the error is: ``"d log p / d loc"`` or ``"(value - mean) / variance"``.
        energy: Minus its log density, ``(B,)`` in the data plate, else a scalar.
    """

    value: Tensor
    prediction: Tensor | None
    error: Tensor | None
    formula: str | None
    energy: Tensor


def site_state(terms: SiteTerms, name: str) -> SiteState:
    """The state of a site in a run of the program."""
    fn, value = terms.fns[name], terms.values[name]
    mask = terms.masks[name]
    try:
        error, formula = location_scale.error(fn, value)
        if isinstance(mask, Tensor):
            shape = mask.shape + (1,) * fn.event_dim
            error = torch.where(mask.reshape(shape), error, torch.zeros_like(error))
    except (NotImplementedError, AttributeError):
        error, formula = None, None
    try:
        prediction = (
            location_scale.location(fn) if location_scale.is_location_scale(fn) else fn.mean
        )
    except (NotImplementedError, AttributeError):
        prediction = None
    return SiteState(value, prediction, error, formula, -terms.terms[name])

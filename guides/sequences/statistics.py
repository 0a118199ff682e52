"""Statistics: what observations are centered and scaled by before the networks read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guides.encoders.source import unit
from guides.sequences.steps import Step, present_entries

__all__ = ["statistics"]


def statistics(steps: Sequence[Step], like: Tensor, missing: bool) -> tuple[Tensor, Tensor]:
    """Center of every feature, one scale for a site: rare features must not be blown up.

    Args:
        steps: The steps of a call; rows without a step do not count.
        like: A tensor of the dtype and device of the networks.
        missing: Whether to leave out data that a mask takes from steps that their rows have.

    Returns:
        Shift and scale, ``(F,)`` each.
    """
    inputs = torch.stack([step.inputs for step in steps], 1).to(like)  # (B, T, F)
    on = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    for t, step in enumerate(steps):
        if step.mask is not None:
            on[:, t] = step.mask
    seen = inputs[on]  # (rows, F)
    widths = list(steps[0].widths)
    if missing:
        present = present_entries(steps)[on]
        zero = seen.new_zeros(())
        shift = torch.where(present, seen, zero).sum(0) / present.sum(0).clamp(min=1)
        squares = torch.where(present, seen - shift, zero).square()
        counts = [part.sum().clamp(min=1) for part in present.split(widths, -1)]
        variances = [
            part.sum() / count
            for part, count in zip(squares.split(widths, -1), counts, strict=True)
        ]
    else:
        shift = seen.mean(0) if len(seen) else torch.zeros_like(inputs[0, 0])
        variances = [
            part.square().mean() if len(seen) else part.new_zeros(())
            for part in (seen - shift).split(widths, -1)
        ]
    scales = [
        unit(variance, center).expand(len(center))
        for variance, center in zip(variances, shift.split(widths), strict=True)
    ]
    return shift, torch.cat(scales)

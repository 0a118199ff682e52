"""Statistics: what observations are centered and scaled by before the networks read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guides.encoders.source import standardization
from guides.sequences.steps import Step, present_entries, present_rows

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
    on = present_rows(steps)
    seen = inputs[on]  # (rows, F)
    # Of no rows at all nothing is known: a mask of none makes them zero and one.
    present = present_entries(steps)[on] if missing or not len(seen) else None
    widths = list(steps[0].widths)
    parts = [
        standardization(value, there)
        for value, there in zip(
            seen.split(widths, -1),
            [None] * len(widths) if present is None else present.split(widths, -1),
            strict=True,
        )
    ]
    return torch.cat([shift for shift, _ in parts]), torch.cat([scale for _, scale in parts])

"""Irregular numbers that take no random draw: where a program is looked at beside a point."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ripple"]


def ripple(like: Tensor) -> Tensor:
    """Numbers between -1 and 1, no two alike, the same ones every time.

    What is flat, equal or zero at a point by chance is not so a step of these away.

    Args:
        like: A tensor of the shape, dtype and device that is wanted.

    Example:
        >>> ripple(torch.zeros(3))
        tensor([0.8415, 0.9093, 0.1411])
    """
    steps = torch.arange(1, like.numel() + 1).to(like)
    return torch.sin(steps).reshape(like.shape)

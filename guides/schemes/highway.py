"""A highway network: every layer lets its input pass, more or less."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Highway"]


class Highway(nn.Module):
    """Layers that mix what comes in with what they make of it.

        h_1 = g W_0 e + (1 - g) f(W_1 e);  h_k = g h_{k-1} + (1 - g) f(W h_{k-1})

    Args:
        features: Length of e.
        widths: Widths of the layers.
        **options: Type and device.
    """

    def __init__(self, features: int, widths: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        sizes = (features, *widths)
        pairs = list(itertools.pairwise(sizes))
        self.values = nn.ModuleList(nn.Linear(a, b, **options) for a, b in pairs)
        self.gates = nn.ModuleList(nn.Linear(a, b, **options) for a, b in pairs)
        # A skip needs a projection only where the width changes.
        self.skips = nn.ModuleList(
            nn.Identity() if a == b and i else nn.Linear(a, b, **options)
            for i, (a, b) in enumerate(pairs)
        )

    def forward(self, e: Tensor) -> Tensor:
        """The last layer ``(..., H)``."""
        h = e
        for value, gate, skip in zip(self.values, self.gates, self.skips, strict=True):
            g = torch.sigmoid(gate(h))
            h = g * skip(h) + (1 - g) * nn.functional.elu(value(h))
        return h

"""Matrices of a datum's own, filled from its parameter vector; reflections."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["placed", "reflected"]


def placed(entries: Tensor, positions: Tensor, size: int) -> Tensor:
    """Square matrices ``(..., n, n)`` with given entries, zero elsewhere.

    Args:
        entries: Entries ``(..., m)``.
        positions: Their rows and columns ``(2, m)``, no two equal.
        size: Number n of rows.
    """
    rows, columns = positions
    flat = (rows * size + columns).expand(entries.shape)
    # Out of place, so that torch.func transforms can trace it.
    zeros = entries.new_zeros(*entries.shape[:-1], size * size)
    return zeros.scatter(-1, flat, entries).unflatten(-1, (size, size))


def reflected(normal: Tensor, z: Tensor) -> Tensor:
    """Points mirrored at the plane through zero with the given normal.

        H z = z - 2 v (v^T z) / |v|^2

    H is its own inverse, with determinant minus one; a normal of zero mirrors nothing.

    Args:
        normal: Normals v ``(..., K)``, of any length.
        z: Points ``(*S, ..., K)``.
    """
    tiny = torch.finfo(normal.dtype).tiny ** 0.75
    projection = (normal * z).sum(-1, keepdim=True)
    return z - 2 * normal * projection / (normal.square().sum(-1, keepdim=True) + tiny)

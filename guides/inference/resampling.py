"""Resampling: how often each particle is copied.

    systematic:  positions (i + u) / K, one u ~ U(0, 1) for all i = 0..K-1; E[copies of k] = K W_k

Every index can be drawn, the last one too, and a particle has K W_k copies up to one.

References:
    | Comparison of Resampling Schemes for Particle Filtering (Douc, Cappé & Moulines, 2005)
    | https://arxiv.org/abs/cs/0507025
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_fraction", "published", "systematic"]


def systematic(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices of the copies, for every unit by itself.

    Args:
        log_weights: Log weights ``(K, U)``, up to a constant a unit.
        uniform: One uniform number a unit, ``(U,)``.

    Returns:
        Indices ``(K, U)``, increasing.

    Example:
        >>> log_weights = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().unsqueeze(-1)
        >>> systematic(log_weights, torch.tensor([0.5])).flatten()
        tensor([1, 2, 3, 3])
    """
    num = log_weights.shape[0]
    steps = torch.arange(num, dtype=log_weights.dtype, device=log_weights.device)
    return _search(log_weights, (steps + uniform.unsqueeze(-1)) / num)


def published(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """The resampler of the published code, for comparison: biased.

    Every copy of the last particle becomes one of the first: weights .1, .2, .3, .4 give copies
    in proportions .5, .2, .3, 0.

    Args:
        log_weights: Log weights ``(K, U)``.
        uniform: One uniform number a copy and unit, ``(U, K)``.
    """
    num = log_weights.shape[0]
    steps = torch.arange(num, dtype=log_weights.dtype, device=log_weights.device)
    index = _search(log_weights, (steps + uniform) / num)
    return torch.where(index >= num - 1, torch.zeros_like(index), index)


def _search(log_weights: Tensor, positions: Tensor) -> Tensor:
    edges = log_weights.softmax(0).T.cumsum(-1)
    # Rounding may leave the last edge below a position. (U, K)
    edges = edges / edges[:, -1:]
    found = torch.searchsorted(edges.contiguous(), positions.contiguous(), right=True)
    return found.clamp_max(log_weights.shape[0] - 1).T


def effective_fraction(log_weights: Tensor) -> Tensor:
    """Effective sample size of every unit as a fraction of K: 1 / (K sum of squared weights)."""
    first, second = log_weights.logsumexp(0), (2 * log_weights).logsumexp(0)
    return (2 * first - second).exp() / log_weights.shape[0]

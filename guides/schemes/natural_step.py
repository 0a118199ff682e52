"""A step in the natural parameters of q, for families with location and scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guides.families.family import Family, inverse_positive, limited, positive

__all__ = ["TRUST", "natural_step"]

# Standard deviations of q that a step can move a coordinate at a rate of one.
TRUST = 2.0
# How much more precise than q an estimate of the curvature may be.
_SHARPER = 20.0


def natural_step(
    family: Family, lam: Tensor, gradient: Tensor, rate: Tensor, move: Tensor
) -> Tensor:
    """Precisions first, then locations by the new covariance.

        1 / s'^2 = (1 - rate) / s^2 + rate E[-d^2 log p]       from d L / d log s
        loc'     = loc + rate s'^2 dL / d loc                  at most two s long
        s', loc' = s' exp(move / sqrt 2), loc' + s move

    At a rate of one, and with the expectation itself, a single step finds the best diagonal
    Gaussian of a Gaussian posterior with independent coordinates, however wide q was.

    References:
        | The Bayesian learning rule (Khan & Rue, 2023) https://arxiv.org/abs/2107.04562

    Args:
        family: A family with a scale.
        lam: Parameters ``(B, P)``.
        gradient: Gradient of the rows' bounds ``(B, P)``.
        rate: Rate of every parameter ``(B, P)``.
        move: What is added in units of q's own scale ``(B, P)``.
    """
    size = family.size
    raw = lam[..., size : 2 * size]
    scale = positive(raw)
    whitened = family.natural(lam, gradient)[1]
    # Of a log-concave bound it is at most one, where the expected curvature is zero.
    in_log_scale = (math.sqrt(2) * whitened[..., size : 2 * size]).clamp(-_SHARPER, 1.0)
    precision = (1 - rate[..., size : 2 * size] * in_log_scale).clamp_min(0.1)
    new = scale * (move[..., size : 2 * size] / math.sqrt(2)).exp() / precision.sqrt()
    # The trust region is that of the old q: the new one may be far narrower than the way is long.
    steps = limited(new.square() * gradient[..., :size] / scale, TRUST)
    loc = lam[..., :size] + scale * (rate[..., :size] * steps + move[..., :size])
    # What bends the family has no natural parameters of its own, and takes the limited step.
    rest = rate[..., 2 * size :] * limited(whitened[..., 2 * size :], TRUST)
    unit = family.root(lam)[..., 2 * size :]
    rest = lam[..., 2 * size :] + unit * (rest + move[..., 2 * size :])
    return torch.cat([loc, inverse_positive(new), rest], -1)

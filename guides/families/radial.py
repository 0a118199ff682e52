"""Radial: steps that contract or expand space around a point."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.family import inverse_softplus, positive
from guides.families.flow import SteppedFlow, directions
from guides.families.roots import above_minus_one

__all__ = ["Radial"]


class Radial(SteppedFlow):
    """A radial flow with steps of the datum's own.

        loc, raw, (center, a, b)_1..T, base = split(lam)
        alpha = softplus(a)
        beta  = alpha m(b)                                m > -1, so every step is invertible
        r     = |z_{t-1} - center|
        z_t   = z_{t-1} + beta / (alpha + r) (z_{t-1} - center)

    Distances from the center solve a quadratic equation, so the inverse is in closed form and
    any point can be scored. It starts at the identity (all b zero). A step changes the density
    near its center and, far away, only shifts along rays.

    References:
        | Variational inference with normalizing flows (Rezende & Mohamed, 2015)
        | https://arxiv.org/abs/1505.05770

    Args:
        size: Length K of the packed latents.
        transforms: Number T of steps, of K + 2 parameters each.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1.

    Example:
        >>> family = Radial(3, transforms=2)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        size: int,
        *,
        transforms: int = 4,
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        center = directions(transforms, size)
        alpha = torch.full_like(center[:, :1], inverse_softplus(1.0))
        start = torch.cat([center, alpha, torch.zeros_like(alpha)], -1)
        super().__init__(size, start, init_scale=init_scale, base=base)

    def step(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Along the ray from the center."""
        center, alpha, beta, total = self._parts(parameters)
        offset = z - center
        r = _length(offset)
        stretch = beta / (alpha + r)
        # With total = alpha + beta, no term below is negative.
        tangential = (r + total).log() - (alpha + r).log()
        radial = (r.square() + 2 * alpha * r + alpha * total).log() - 2 * (alpha + r).log()
        log_det = (self.size - 1) * tangential + radial
        return z + stretch * offset, log_det.squeeze(-1)

    def step_inverse(self, parameters: Tensor, y: Tensor) -> Tensor:
        """By the positive root of ``r^2 + (alpha + beta - |y|) r - alpha |y| = 0``."""
        center, alpha, _, total = self._parts(parameters)
        offset = y - center
        length = _length(offset)
        half = 0.5 * (total - length)
        root = (half.square() + alpha * length).sqrt()
        # Of the two forms of the root, the one that adds numbers of equal sign.
        upper = torch.where(half > 0, half, 0.0)
        lower = torch.where(half > 0, 0.0, half)
        r = torch.where(half > 0, alpha * length / (root + upper), root - lower)
        return center + offset * (alpha + r) / (r + total)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Center ``(..., K)``; alpha, beta and their sum ``(..., 1)``."""
        center, a, b = parameters.split([self.size, 1, 1], -1)
        alpha = positive(a)
        factor, above = above_minus_one(b)
        return center, alpha, alpha * factor, alpha * above


def _length(offset: Tensor) -> Tensor:
    """Euclidean length ``(..., 1)``, differentiable at zero."""
    tiny = torch.finfo(offset.dtype).tiny ** 0.75
    return (offset.square().sum(-1, keepdim=True) + tiny).sqrt()

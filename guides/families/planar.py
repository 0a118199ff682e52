"""Planar: steps that move points along one direction, by their position on another."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.flow import SteppedFlow, directions
from guides.families.roots import above_minus_one, increasing_root

__all__ = ["Planar"]


class Planar(SteppedFlow):
    """A planar flow with steps of the datum's own.

        loc, raw, (u, w, b)_1..T, base = split(lam)
        z_t = z_{t-1} + u' tanh(w^T z_{t-1} + b)
        u'  = u + (m(w^T u) - w^T u) w / |w|^2            m > -1, so every step is invertible

    The inverse reduces to one increasing function of one variable, ``s + w^T u' tanh(s + b)``
    with ``s = w^T z``, solved to rounding error: any point can be scored. It starts at the
    identity (all u zero). With K = 1 it is a monotone function of the noise.

    References:
        | Variational inference with normalizing flows (Rezende & Mohamed, 2015)
        | https://arxiv.org/abs/1505.05770

    Args:
        size: Length K of the packed latents.
        transforms: Number T of steps, of 2 K + 1 parameters each.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1.

    Example:
        >>> family = Planar(3, transforms=2)
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
        w = directions(transforms, size)
        start = torch.cat([torch.zeros_like(w), w, torch.zeros_like(w[:, :1])], -1)
        super().__init__(size, start, init_scale=init_scale, base=base)

    def step(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Along u' by ``tanh(w^T z + b)``."""
        u, w, b, _, above = self._parts(parameters)
        t = torch.tanh((w * z).sum(-1) + b)
        # 1 + (1 - t^2) w^T u', written as a sum of terms that are not negative.
        log_det = (t.square() + (1 - t.square()) * above).log()
        return z + u * t.unsqueeze(-1), log_det

    def step_inverse(self, parameters: Tensor, y: Tensor) -> Tensor:
        """By the root ``s = w^T z``, which lies within ``|w^T u'|`` of ``w^T y``."""
        u, w, b, inner, above = self._parts(parameters)
        target = (w * y).sum(-1)

        def along(s: Tensor) -> tuple[Tensor, Tensor]:
            t = torch.tanh(s + b)
            return s + inner * t, t.square() + (1 - t.square()) * above

        s = increasing_root(along, target, target - inner.abs(), target + inner.abs())
        return y - u * torch.tanh(s + b).unsqueeze(-1)

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Constrained u and w ``(..., K)``; b, ``w^T u`` and one plus it, ``(...)``."""
        u, w, b = parameters.split([self.size, self.size, 1], -1)
        raw = (w * u).sum(-1)
        inner, above = above_minus_one(raw)
        norm = w.square().sum(-1) + torch.finfo(w.dtype).tiny ** 0.75
        u = u + ((inner - raw) / norm).unsqueeze(-1) * w
        return u, w, b.squeeze(-1), inner, above

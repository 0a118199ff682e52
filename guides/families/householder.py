"""Householder: a diagonal Gaussian turned by reflections."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.family import inverse_positive, positive
from guides.families.flow import SteppedFlow, directions
from guides.families.matrices import reflected

__all__ = ["Householder"]


class Householder(SteppedFlow):
    """A Householder flow: scales first, then reflections of the datum's own.

        loc, raw, v_1..T, base = split(lam)
        z_0 = softplus(raw) * e
        z_t = (I - 2 v_t v_t^T / |v_t|^2) z_{t-1}
        u   = loc + z_T

    Reflections preserve volumes and spheres, so here the scales act before the map: over
    Gaussian noise q is a Gaussian with covariance ``H diag(scale^2) H^T``, every one of them with
    T = K - 1. It starts at the mean-field Gaussian: the first reflections come in equal pairs,
    which cancel. With K = 1 a reflection is a change of sign.

    References:
        | Improving variational auto-encoders using Householder flow (Tomczak & Welling, 2016)
        | https://arxiv.org/abs/1611.09630

    Args:
        size: Length K of the packed latents.
        transforms: Number T of reflections, of K parameters each.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1.

    Example:
        >>> family = Householder(3, transforms=2)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    volume_preserving = True

    def __init__(
        self,
        size: int,
        *,
        transforms: int = 4,
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        start = directions((transforms + 1) // 2, size).repeat_interleave(2, 0)[:transforms]
        if transforms % 2:
            # Without a partner: the change of one coordinate's sign.
            start[-1] = torch.eye(size)[0]
        super().__init__(size, start, init_scale=init_scale, base=base)

    def step(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One reflection."""
        y = reflected(parameters, z)
        return y, torch.zeros_like(y[..., 0])

    def step_inverse(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The same reflection."""
        return reflected(parameters, y)

    def outward(self, raw: Tensor, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Scales, then reflections."""
        scale = positive(raw)
        y, log_det = self.transform(flow, scale * e)
        return y, log_det + scale.log().sum(-1)

    def inward(self, raw: Tensor, flow: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Reflections in reverse, then scales."""
        scale = positive(raw)
        z, log_det = self.inverse(flow, centered)
        return z / scale, log_det + scale.log().sum(-1)

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters of a given Gaussian, from the axes of its covariance.

        Args:
            loc: Mean ``(..., K)``.
            scale_tril: Cholesky factor ``(..., K, K)`` of the covariance.

        Raises:
            NotImplementedError: With fewer than K - 1 reflections, or over another base.
        """
        self._needs_normal_base()
        if self.transforms < self.size - 1:
            raise NotImplementedError(
                f"A Gaussian over {self.size} coordinates needs {self.size - 1} reflections, "
                f"this family has {self.transforms}. Pass transforms={self.size - 1}."
            )
        vectors, scale, _ = torch.linalg.svd(scale_tril)
        packed, tau = torch.geqrf(vectors)
        eye = torch.eye(self.size, dtype=loc.dtype, device=loc.device).expand_as(vectors)
        normals = (packed.tril(-1) + eye).mT[..., : self.size - 1, :]
        # Where there is nothing to mirror, the change of a column's sign is harmless.
        idle = (tau == 0)[..., : self.size - 1].unsqueeze(-1)
        normals = torch.where(idle, eye[..., : self.size - 1, :], normals).flip(-2)
        spare = eye[..., :1, :].expand(*loc.shape[:-1], self.transforms - self.size + 1, -1)
        flow = torch.cat([spare, normals], -2).flatten(-2)
        return torch.cat([loc, inverse_positive(scale), flow], -1)

"""LateralSymmetric: mutual lateral weights, a full-covariance Gaussian as a symmetric flow."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.family import inverse_positive, positive
from guides.families.flow import Flow
from guides.families.matrices import placed

__all__ = ["LateralSymmetric"]


class LateralSymmetric(Flow):
    """A linear flow whose lateral weights are symmetric and positive definite.

        loc, raw, lateral, base = split(lam)
        A = diag(log softplus(raw)) + symmetric(lateral)        (K, K), any symmetric matrix
        u = loc + exp(A) e                                      matrix exponential

    This is lateral inhibition as Marino reads it, with mutual weights: unit i acts on j as j
    acts on i. Its inverse ``exp(-A)`` is the symmetric whitening of the posterior (ZCA), the one
    that moves points least, whose filters on natural images are center-surround.
    :class:`~guides.families.lateral_cholesky.LateralCholesky` is the one-directional case.

    The exponential maps symmetric matrices one to one onto positive definite ones, so over
    Gaussian noise these are all Gaussians, each once: covariance ``exp(2 A)``. The
    log-determinant is the trace, ``sum_k log softplus(raw_k)``. With K = 1 there are no lateral
    weights.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022)
        | https://arxiv.org/abs/2011.07464
        | Optimal whitening and decorrelation (Kessy, Lewin & Strimmer, 2018)
        | https://arxiv.org/abs/1512.00809

    Args:
        size: Length K of the packed latents.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Example:
        >>> family = LateralSymmetric(3)
        >>> family.num_params
        9
    """

    volume_preserving = True
    lower: Tensor
    diagonal: Tensor

    def __init__(self, size: int, *, init_scale: float = 0.1, base: Base = None) -> None:
        start = torch.zeros(size * (size - 1) // 2)
        super().__init__(size, start, init_scale=init_scale, base=base)
        self.register_buffer("lower", torch.tril_indices(size, size, -1), persistent=False)
        both = torch.arange(size).expand(2, -1)
        self.register_buffer("diagonal", both, persistent=False)

    def lateral(self, raw: Tensor, flow: Tensor) -> Tensor:
        """The symmetric matrix A ``(..., K, K)``."""
        diagonal = placed(positive(raw).log(), self.diagonal, self.size)
        return self._symmetric(flow) + diagonal

    def outward(self, raw: Tensor, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(A) e``."""
        centered = _exponential(self.lateral(raw, flow), e)
        return centered, positive(raw).log().sum(-1).expand(centered.shape[:-1])

    def inward(self, raw: Tensor, flow: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(-A) centered``."""
        e = _exponential(-self.lateral(raw, flow), centered)
        return e, positive(raw).log().sum(-1).expand(e.shape[:-1])

    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The map with unit scales, of determinant one."""
        y = _exponential(self._symmetric(flow), e)
        return y, torch.zeros_like(y[..., 0])

    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`transform`."""
        e = _exponential(-self._symmetric(flow), y)
        return e, torch.zeros_like(e[..., 0])

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters ``(..., P)`` of a given Gaussian: half the logarithm of its covariance.

        Args:
            loc: Mean ``(..., K)``.
            scale_tril: Cholesky factor ``(..., K, K)`` of the covariance.

        Raises:
            NotImplementedError: Over another base than Gaussian noise.
        """
        self._needs_normal_base()
        # Singular values of the factor: its product with itself would square their condition.
        vectors, scales, _ = torch.linalg.svd(scale_tril)
        lateral = (vectors * scales.log().unsqueeze(-2)) @ vectors.mT
        rows, columns = self.lower
        diagonal = lateral.diagonal(dim1=-2, dim2=-1)
        return torch.cat([loc, inverse_positive(diagonal.exp()), lateral[..., rows, columns]], -1)

    def _symmetric(self, flow: Tensor) -> Tensor:
        lower = placed(flow, self.lower, self.size)
        return lower + lower.mT


def _exponential(matrix: Tensor, vector: Tensor) -> Tensor:
    """``exp(matrix) vector``."""
    return (torch.linalg.matrix_exp(matrix) @ vector.unsqueeze(-1)).squeeze(-1)

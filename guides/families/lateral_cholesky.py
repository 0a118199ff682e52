"""LateralCholesky: lateral weights in one direction, a full-covariance Gaussian as a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.family import inverse_positive
from guides.families.flow import Flow
from guides.families.matrices import placed

__all__ = ["LateralCholesky"]


class LateralCholesky(Flow):
    """A linear flow whose lateral weights are lower triangular.

        loc, raw, lateral, base = split(lam)
        y = (I + strictly_lower(lateral)) e
        u = loc + softplus(raw) * y

    This is lateral inhibition as Marino reads it: the weights between the units of one level
    carry the covariance of their posterior, and the linear map that generates correlated
    variables from noise inverts the one that whitens them. With triangular weights each unit
    hears only those before it: Cholesky whitening, an affine autoregressive flow of one linear
    step. :class:`~guides.families.lateral_symmetric.LateralSymmetric` is the symmetric case.

    Over Gaussian noise these are all Gaussians, exactly those of
    :class:`~guides.families.multivariate_normal.MultivariateNormal` at the same parameters.
    With K = 1 there are no lateral weights.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022)
        | https://arxiv.org/abs/2011.07464

    Args:
        size: Length K of the packed latents.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Example:
        >>> family = LateralCholesky(3)
        >>> family.num_params
        9
    """

    volume_preserving = True
    lower: Tensor

    def __init__(self, size: int, *, init_scale: float = 0.1, base: Base = None) -> None:
        start = torch.zeros(size * (size - 1) // 2)
        super().__init__(size, start, init_scale=init_scale, base=base)
        self.register_buffer("lower", torch.tril_indices(size, size, -1), persistent=False)

    def lateral(self, flow: Tensor) -> Tensor:
        """The map ``(..., K, K)``, with ones on its diagonal."""
        eye = torch.eye(self.size, dtype=flow.dtype, device=flow.device)
        return placed(flow, self.lower, self.size) + eye

    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """``L e``, of determinant one."""
        y = (self.lateral(flow) @ e.unsqueeze(-1)).squeeze(-1)
        return y, torch.zeros_like(y[..., 0])

    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """By forward substitution."""
        e = torch.linalg.solve_triangular(
            self.lateral(flow), y.unsqueeze(-1), upper=False, unitriangular=True
        ).squeeze(-1)
        return e, torch.zeros_like(e[..., 0])

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters ``(..., P)`` of a given mean and Cholesky factor.

        Raises:
            NotImplementedError: Over another base than Gaussian noise.
        """
        self._needs_normal_base()
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)
        unit = scale_tril / scale.unsqueeze(-1)
        rows, columns = self.lower
        return torch.cat([loc, inverse_positive(scale), unit[..., rows, columns]], -1)

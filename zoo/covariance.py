"""Covariance: a learned full covariance, as lateral weights that are triangular or symmetric."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["Covariance", "floored", "learned_covariance"]


class Covariance(nn.Module):
    """A covariance S = A A' that is learned through A, an invertible map of white noise.

        cholesky    A = lower triangular, diagonal exp(log_scale)      one-directional weights
        symmetric   A = exp(M), M symmetric                            mutual weights

    Both reach every covariance, once; it is A A', not A'A as the paper prints it. The inverse of
    A whitens: the triangular one by regressing each unit on those before it, the symmetric one by
    lateral inhibition among all units, ZCA.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022)
        | https://arxiv.org/abs/2011.07464
        | Optimal whitening and decorrelation (Kessy, Lewin & Strimmer, 2018)
        | https://arxiv.org/abs/1512.00809

    Args:
        dim: Dimension D.
        parameterization: ``"cholesky"`` or ``"symmetric"``.
        scale: Standard deviation at the start, where nothing is correlated.

    Raises:
        ValueError: For an unknown parameterization, a size below 1, or a scale not positive.

    Example:
        >>> noise = Covariance(3, "symmetric")
        >>> noise(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    parameterizations: ClassVar[tuple[str, ...]] = ("cholesky", "symmetric")

    def __init__(self, dim: int, parameterization: str = "cholesky", scale: float = 1.0) -> None:
        super().__init__()
        if parameterization not in self.parameterizations:
            raise ValueError(
                f"parameterization must be one of {', '.join(self.parameterizations)}, got "
                f"{parameterization!r}."
            )
        if dim < 1 or not scale > 0:
            raise ValueError(f"dim must be at least 1 and scale positive, got {dim} and {scale}.")
        self.dim, self.parameterization = dim, parameterization
        self.log_scale = nn.Parameter(torch.full((dim,), float(scale)).log())
        number = dim * (dim - 1) // 2
        self.lateral = nn.Parameter(torch.zeros(number)) if number else None

    def _below(self) -> Tensor:
        """The lateral weights below the diagonal, ``(D, D)``."""
        empty = torch.zeros(self.dim, self.dim).to(self.log_scale)
        if self.lateral is None:
            return empty
        rows, columns = torch.tril_indices(self.dim, self.dim, -1, device=empty.device)
        return empty.index_put((rows, columns), self.lateral)

    @property
    def scale(self) -> Tensor:
        """The map A from white noise, ``(D, D)``."""
        below = self._below()
        if self.parameterization == "cholesky":
            return below + torch.diag(self.log_scale.exp())
        return torch.matrix_exp(below + below.mT + torch.diag(self.log_scale))

    @property
    def whitening(self) -> Tensor:
        """The inverse of A, which whitens, ``(D, D)``."""
        below = self._below()
        if self.parameterization == "cholesky":
            eye = torch.eye(self.dim).to(below)
            triangular = below + torch.diag(self.log_scale.exp())
            return torch.linalg.solve_triangular(triangular, eye, upper=False)
        return torch.matrix_exp(-(below + below.mT + torch.diag(self.log_scale)))

    @property
    def log_det(self) -> Tensor:
        """Log |det A|, a scalar; in both cases the sum of ``log_scale``."""
        return self.log_scale.sum()

    def forward(self, loc: Tensor) -> dist.TorchDistribution:
        """The Gaussian with this covariance, event shape ``(D,)``.

        Args:
            loc: Means ``(..., D)``.
        """
        scale = self.scale
        if self.parameterization == "cholesky":
            return dist.MultivariateNormal(loc, scale_tril=scale)
        return dist.MultivariateNormal(loc, covariance_matrix=scale @ scale)


def floored(factor: Tensor, min_scale: float) -> Tensor:
    """Cholesky factor ``(..., D, D)`` of A A' + min_scale^2 I, a floor in every direction.

    It is the triangle of a QR of [A', min_scale I]; A A' itself is never formed, as its condition
    is the square of A's, more than single precision holds for strong lateral weights.

    Args:
        factor: The map A ``(..., D, D)``.
        min_scale: Least standard deviation in any direction, positive.
    """
    floor = (min_scale * torch.eye(factor.shape[-1]).to(factor)).expand(factor.shape)
    triangle = torch.linalg.qr(torch.cat([factor.mT, floor], -2)).R
    # R is unique up to the sign of each row; a Cholesky factor has a positive diagonal.
    sign = triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return triangle.mT * sign


def learned_covariance(dim: int, name: str, plain: str = "unit") -> Covariance | None:
    """The covariance of a prior by name, starting at the identity; None where it stays there.

    Args:
        dim: Dimension K.
        name: ``"cholesky"``, ``"symmetric"``, or the plain one.
        plain: Name of the one that is not learned.

    Raises:
        ValueError: For an unknown name.
    """
    if name == plain:
        return None
    if name not in Covariance.parameterizations:
        raise ValueError(
            f"prior_covariance must be one of {plain}, "
            f"{', '.join(Covariance.parameterizations)}, got {name!r}."
        )
    return Covariance(dim, name)

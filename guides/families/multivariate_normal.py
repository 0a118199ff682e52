"""MultivariateNormal: the Gaussian with full covariance."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import _standard_normal
from torch.types import _size

from guides.families.family import (
    Family,
    inverse_positive,
    inverse_softplus,
    limited,
    positive,
    standard_normal_log_prob,
)

__all__ = ["MultivariateNormal"]


class MultivariateNormal(Family):
    """A Gaussian with full covariance in unconstrained space.

        loc, raw, lower = split(lam)
        L = diag(softplus(raw)) (I + strictly_lower(lower))
        q(u) = Normal(u; loc, L L^T)

    Rows of L scale together with their diagonal, which keeps the problem well conditioned when
    posterior scales differ. P = K (K + 3) / 2 grows fast; the whole covariance of many latents
    is better served by a low-rank family.

    Args:
        size: Length K of the packed latents.
        init_scale: Standard deviation at the start.

    Example:
        >>> family = MultivariateNormal(3)
        >>> family.num_params
        9
    """

    lower: Tensor

    path_gradient = True
    has_scale = True

    def __init__(self, size: int, *, init_scale: float = 0.1) -> None:
        super().__init__(size)
        self.raw_scale = inverse_softplus(init_scale)
        self.register_buffer("lower", torch.tril_indices(size, size, -1), persistent=False)

    @property
    def num_params(self) -> int:
        """K (K + 3) / 2."""
        return self.size * (self.size + 3) // 2

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with independent coordinates of standard deviation ``init_scale``."""
        zeros = loc.new_zeros(*loc.shape[:-1], self.num_params - 2 * self.size)
        return torch.cat([loc, torch.full_like(loc, self.raw_scale), zeros], -1)

    def scale_tril(self, lam: Tensor) -> Tensor:
        """The Cholesky factor ``(..., K, K)`` of the covariance."""
        size = self.size
        _, raw, lower = lam.split([size, size, self.num_params - 2 * size], -1)
        unit = torch.eye(size, dtype=lam.dtype, device=lam.device)
        unit = unit.expand(*lam.shape[:-1], size, size)
        rows, columns = self.lower
        # Out of place, so that torch.func transforms can trace it.
        position = (rows * size + columns).expand(lower.shape)
        unit = unit.flatten(-2).scatter(-1, position, lower).unflatten(-1, (size, size))
        return positive(raw).unsqueeze(-1) * unit

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``loc + L noise``."""
        tril = self.scale_tril(lam)
        value = lam[..., : self.size] + (tril @ noise.unsqueeze(-1)).squeeze(-1)
        return value, standard_normal_log_prob(noise) - self._log_det(lam)

    def natural(
        self, lam: Tensor, gradient: Tensor, limit: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """As for independent coordinates, but for the location, whose information is known."""
        direction, whitened = super().natural(lam, gradient, limit)
        tril = self.scale_tril(lam)
        along = (tril.mT @ gradient[..., : self.size].unsqueeze(-1)).squeeze(-1)
        along = limited(along, limit)
        moved = (tril @ along.unsqueeze(-1)).squeeze(-1)
        rest = slice(self.size, None)
        return (
            torch.cat([moved, direction[..., rest]], -1),
            torch.cat([along, whitened[..., rest]], -1),
        )

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        centered = (value - lam[..., : self.size]).unsqueeze(-1)
        noise = torch.linalg.solve_triangular(self.scale_tril(lam), centered, upper=False)
        return standard_normal_log_prob(noise.squeeze(-1)) - self._log_det(lam)

    def entropy(self, lam: Tensor) -> Tensor:
        """The Gaussian's entropy."""
        return self._log_det(lam) + 0.5 * self.size * math.log(2 * math.pi * math.e)

    def _log_det(self, lam: Tensor) -> Tensor:
        return positive(lam[..., self.size : 2 * self.size]).log().sum(-1)

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters ``(..., P)`` of a given mean and Cholesky factor."""
        scale = scale_tril.diagonal(dim1=-2, dim2=-1)
        unit = scale_tril / scale.unsqueeze(-1)
        rows, columns = self.lower
        return torch.cat([loc, inverse_positive(scale), unit[..., rows, columns]], -1)

    def distribution(self, lam: Tensor) -> dist.TorchDistribution:
        """A Gaussian with full covariance."""
        return _Gaussian(lam[..., : self.size], scale_tril=self.scale_tril(lam))


class _Gaussian(dist.MultivariateNormal):
    """Pyro's, which remembers the noise of its last draw: that needs no system solved."""

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``loc + L noise``, as in the class above."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        value: Tensor = self.loc + (self._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(
            -1
        )
        version = None if value.is_inference() else value._version
        self._drawn = (value, noise, version, torch.is_grad_enabled())
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density; of the last draw through its noise, which is the same function."""
        drawn = getattr(self, "_drawn", None)
        if drawn is None or drawn[0] is not value:
            return super().log_prob(value)
        _, _, version, followed = drawn
        # A draw without gradient is a fixed point, whose density has another derivative; and a
        # draw may have been written over.
        if torch.is_grad_enabled() and not followed:
            return super().log_prob(value)
        if version != (None if value.is_inference() else value._version):
            return super().log_prob(value)
        diagonal = self._unbroadcasted_scale_tril.diagonal(dim1=-2, dim2=-1)
        return standard_normal_log_prob(drawn[1]) - diagonal.log().sum(-1)

"""Normal: the mean-field Gaussian."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.families.family import (
    Family,
    inverse_positive,
    inverse_softplus,
    positive,
    standard_normal_log_prob,
)

__all__ = ["Normal"]


class Normal(Family):
    """Independent Gaussians in unconstrained space.

        loc, raw = split(lam)
        q(u) = Normal(u; loc, softplus(raw)^2 I)

    Its best member for a Gaussian posterior with precision P has the exact mean and variances
    1 / P_ii; it loses 1/2 (sum_i log P_ii - log det P) nats.

    Args:
        size: Length K of the packed latents.
        init_scale: Standard deviation at the start.

    Example:
        >>> family = Normal(3)
        >>> family.distribution(family.init(torch.zeros(5, 3))).event_shape
        torch.Size([3])
    """

    path_gradient = True
    has_scale = True

    def __init__(self, size: int, *, init_scale: float = 0.1) -> None:
        super().__init__(size)
        self.raw_scale = inverse_softplus(init_scale)

    @property
    def num_params(self) -> int:
        """2 K."""
        return 2 * self.size

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale``."""
        return torch.cat([loc, torch.full_like(loc, self.raw_scale)], -1)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``loc + scale * noise``."""
        loc, raw = lam.split(self.size, -1)
        scale = positive(raw)
        return loc + scale * noise, standard_normal_log_prob(noise) - scale.log().sum(-1)

    def distribution(self, lam: Tensor) -> dist.TorchDistribution:
        """A factorized Gaussian."""
        loc, raw = lam.split(self.size, -1)
        return dist.Normal(loc, positive(raw)).to_event(1)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        loc, raw = lam.split(self.size, -1)
        scale = positive(raw)
        return standard_normal_log_prob((value - loc) / scale) - scale.log().sum(-1)

    def entropy(self, lam: Tensor) -> Tensor:
        """Sum of the coordinates' entropies."""
        scale = positive(lam[..., self.size :])
        return (scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The best member for that Gaussian: its mean, and variances one over its precisions."""
        precision = torch.cholesky_inverse(scale_tril).diagonal(dim1=-2, dim2=-1)
        return torch.cat([loc, inverse_positive(precision.rsqrt())], -1)

"""Normal: the mean-field Gaussian."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.families.family import Family, inverse_softplus, positive

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

    def distribution(self, lam: Tensor) -> dist.TorchDistribution:
        """A factorized Gaussian."""
        loc, raw = lam.split(self.size, -1)
        return dist.Normal(loc, positive(raw)).to_event(1)

    def location(self, lam: Tensor) -> Tensor:
        """The mean."""
        return lam[..., : self.size]

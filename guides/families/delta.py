"""Delta: a point mass, for MAP estimates and as the belief of predictive coding."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.families.family import Family

__all__ = ["Delta"]


class Delta(Family):
    """A point of unconstrained space.

        q(u) = delta(u - lam)

    It has no density: its "ELBO" is the log joint, an energy and no bound. For an evidence, take
    the Laplace posterior at its point (:func:`guides.inference.laplace`).

    Args:
        size: Length K of the packed latents.

    Example:
        >>> import torch
        >>> Delta(3).distribution(torch.zeros(5, 3)).rsample().shape
        torch.Size([5, 3])
    """

    has_density = False

    @property
    def num_params(self) -> int:
        """K."""
        return self.size

    def init(self, loc: Tensor) -> Tensor:
        """The point itself."""
        return loc.clone()

    def distribution(self, lam: Tensor) -> dist.TorchDistribution:
        """A point mass at ``lam``."""
        return dist.Delta(lam, event_dim=1)

    @property
    def noise_size(self) -> int:
        """Zero: a point needs no noise."""
        return 0

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The point for every draw, with log density zero: its bound is the log joint."""
        shape = torch.broadcast_shapes(noise.shape[:-1], lam.shape[:-1])
        return lam.expand(*shape, self.size), lam.new_zeros(shape)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Zero at the point, minus infinity elsewhere."""
        return self.distribution(lam).log_prob(value)

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The Gaussian's mode."""
        return loc

"""The contract of a family: parameters of one datum to a distribution over its packed latents."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

__all__ = ["Family", "inverse_softplus", "positive"]

_FLOOR = 1e-8


class Family(nn.Module, abc.ABC):
    """q(u; lam) over packed, unconstrained latents u of length K.

    A family may have weights of its own (a flow's networks), shared by all rows; what belongs to
    one row is its parameter vector ``lam`` of length :attr:`num_params`.

    Args:
        size: Length K of the packed latents.
    """

    has_density: bool = True
    """Whether ``log_prob`` is a density; False for a point mass."""

    scores_external_points: bool = True
    """Whether ``log_prob`` can be evaluated at points that the family did not draw."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        self.size = size

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Length P of the parameter vector of one row."""

    @abc.abstractmethod
    def init(self, loc: Tensor) -> Tensor:
        """Parameters ``(..., P)`` of a narrow q around ``loc`` of shape ``(..., K)``."""

    @abc.abstractmethod
    def distribution(self, lam: Tensor) -> TorchDistribution:
        """The distribution: batch shape ``lam.shape[:-1]``, event shape ``(K,)``."""

    @abc.abstractmethod
    def location(self, lam: Tensor) -> Tensor:
        """Its center ``(..., K)``: the point that stands for q where one is needed."""

    def rsample_and_log_prob(
        self, lam: Tensor, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Reparameterized draws and their log density, ``(*S, ..., K)`` and ``(*S, ...)``."""
        q = self.distribution(lam)
        value = q.rsample(torch.Size(sample_shape))
        return value, q.log_prob(value)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density ``(...)`` of points ``(..., K)``.

        Raises:
            NotImplementedError: Where the family cannot score points that it did not draw.
        """
        return self.distribution(lam).log_prob(value)


def positive(raw: Tensor) -> Tensor:
    """The map from unconstrained parameters to scales: softplus, which grows only linearly.

    The floor keeps a scale from rounding to zero, where a density no longer exists.
    """
    return nn.functional.softplus(raw) + _FLOOR


def inverse_softplus(value: float) -> float:
    """The raw parameter of a scale."""
    if not value > 0:
        raise ValueError(f"init_scale must be positive, got {value}.")
    return value + math.log(-math.expm1(-value))

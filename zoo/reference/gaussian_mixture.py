"""GaussianMixture: a posterior with a narrow core inside a wide one."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.model import Model
from zoo.rows import data_plate

__all__ = ["GaussianMixture"]

_SCALES = (1.0, 0.1)


class GaussianMixture(Model):
    """One point from two Gaussians with the same center, one wide and one narrow.

        theta ~ Uniform(-10, 10)                                   two coordinates
        x     ~ 1/2 Normal(theta, I) + 1/2 Normal(theta, 0.01 I)

    Which of the two it was is summed out. One row is one data set with parameters of its own, so
    that a guide that is trained on simulated rows is an amortized posterior.

    References:
        | Sequential Monte Carlo without likelihoods (Sisson, Fan & Tanaka, 2007)
        | https://doi.org/10.1073/pnas.0607208104
        | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.7
        | https://arxiv.org/abs/2101.04653

    Sites:
        theta: Latent, support interval, ``(rows, 2)`` in plate ``"data"``.
        x: Observed, support real, ``(rows, 2)`` in plate ``"data"``.

    Example:
        >>> GaussianMixture()(size=3).shape
        torch.Size([3, 2])
    """

    default_guide: ClassVar[str] = "amortized_spline_coupling"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bound", torch.full((2,), 10.0), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Data ``(B, 2)``; None simulates.
            size: Number of all rows, if ``x`` is a part of them.
            index: Numbers ``(B,)`` of the rows of ``x`` among all.

        Returns:
            The data ``(B, 2)``.
        """
        with data_plate(x, size, index, event_shape=(2,)):
            theta = pyro.sample("theta", dist.Uniform(-self.bound, self.bound).to_event(1))
            return pyro.sample("x", self.likelihood(theta), obs=x)

    def likelihood(self, theta: Tensor) -> dist.TorchDistribution:
        """The distribution of data given parameters.

        Args:
            theta: Parameters ``(..., 2)``.

        Returns:
            Batch shape ``(...)``, event shape ``(2,)``.
        """
        scales = theta.new_tensor(_SCALES).unsqueeze(-1)  # (2, 1)
        parts = dist.Normal(theta.unsqueeze(-2), scales).to_event(1)  # (..., 2), event (2,)
        weights = dist.Categorical(logits=theta.new_zeros(*theta.shape[:-1], len(_SCALES)))
        return dist.MixtureSameFamily(weights, parts)

"""SLCP: a simple likelihood with a complex posterior."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from zoo.model import Model
from zoo.rows import data_plate

__all__ = ["SLCP"]

_NUM_DRAWS = 4
_JITTER = 1e-6


class SLCP(Model):
    """Four points of one Gaussian in the plane; squares give the posterior four modes.

        theta ~ Uniform(-3, 3)                                     five coordinates
        x_1..4 ~ Normal((theta_1, theta_2), S)                     independent, two coordinates
            S = [[s_1^2, rho s_1 s_2], [rho s_1 s_2, s_2^2]] + 1e-6 I
            s_1 = theta_3^2,  s_2 = theta_4^2,  rho = tanh(theta_5)

    The signs of theta_3 and theta_4 cannot be told from data. The 1e-6 is the benchmark's own: it
    keeps S positive definite where both squares vanish. One row is one data set with parameters
    of its own, its four points one after the other.

    References:
        | Sequential Neural Likelihood (Papamakarios, Sterratt & Murray, 2019)
        | https://arxiv.org/abs/1805.07226
        | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.3
        | https://arxiv.org/abs/2101.04653

    Sites:
        theta: Latent, support interval, ``(rows, 5)`` in plate ``"data"``.
        x: Observed, support real, ``(rows, 8)`` in plate ``"data"``.

    Example:
        >>> SLCP()(size=3).shape
        torch.Size([3, 8])
    """

    default_guide: ClassVar[str] = "amortized_spline_coupling"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bound", torch.full((5,), 3.0), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Data ``(B, 8)``; None simulates.
            size: Number of all rows, if ``x`` is a part of them.
            index: Numbers ``(B,)`` of the rows of ``x`` among all.

        Returns:
            The data ``(B, 8)``.
        """
        with data_plate(x, size, index, event_shape=(2 * _NUM_DRAWS,)):
            theta = pyro.sample("theta", dist.Uniform(-self.bound, self.bound).to_event(1))
            return pyro.sample("x", self.likelihood(theta), obs=x)

    def likelihood(self, theta: Tensor) -> dist.TorchDistribution:
        """The distribution of data given parameters.

        Args:
            theta: Parameters ``(..., 5)``.

        Returns:
            Batch shape ``(...)``, event shape ``(8,)``.
        """
        loc = theta[..., :2]
        first, second = theta[..., 2].square(), theta[..., 3].square()
        rho = theta[..., 4].tanh()
        # The Cholesky factor of S by hand: `1 - rho^2` in the form that keeps its digits, so
        # that S stays positive definite in float32 where its points lie on a line.
        variance = first.square() + _JITTER
        a = variance.sqrt()
        b = rho * first * second / a
        rest = second.square() * (
            1 / theta[..., 4].cosh().square() + rho.square() * _JITTER / variance
        )
        c = (rest + _JITTER).sqrt()
        zero = torch.zeros_like(a)
        tril = torch.stack([a, zero, b, c], -1).unflatten(-1, (2, 2))
        point = dist.MultivariateNormal(loc.unsqueeze(-2), scale_tril=tril.unsqueeze(-3))
        points = point.expand((*theta.shape[:-1], _NUM_DRAWS)).to_event(1)
        flat = ReshapeTransform(torch.Size((_NUM_DRAWS, 2)), torch.Size((2 * _NUM_DRAWS,)))
        return dist.TransformedDistribution(points, [flat])

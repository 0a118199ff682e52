"""TwoMoons: a posterior of two narrow crescents, with its exact density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from zoo.model import Model
from zoo.rows import data_plate

__all__ = ["Crescent", "TwoMoons"]

_RADIUS, _WIDTH, _OFFSET = 0.1, 0.01, 0.25
_LEAK_SCALE = 0.5


class Crescent(TorchDistribution):
    """Half a ring of points, blurred along its radius.

        a ~ Uniform(-pi/2, pi/2)
        r ~ Normal(radius, width)
        x = loc + (r cos a, r sin a)

    The density is that of polar coordinates, ``Normal(r) / (pi r)`` in the half plane to the
    right of ``loc`` and zero to its left. Negative radii are left out: at a width of a tenth of
    the radius they have probability 1e-23.

    With ``leak > 0`` a wide Gaussian around ``loc`` is mixed in,

        x ~ (1 - leak) * crescent + leak * Normal(loc, leak_scale)

    which is a density that is positive everywhere, with finite gradients.

    Args:
        loc: Center of the ring ``(..., 2)``.
        radius: Radius of the ring.
        width: Standard deviation of the radius.
        leak: Weight of the wide Gaussian, 0 or above and below 1.
        leak_scale: Standard deviation of the wide Gaussian.

    Raises:
        ValueError: For a leak out of range.

    Example:
        >>> crescent = Crescent(torch.zeros(2))
        >>> right, left = torch.tensor([0.1, 0.0]), torch.tensor([-0.1, 0.0])
        >>> crescent.log_prob(right), crescent.log_prob(left)
        (tensor(4.8441), tensor(-inf))
    """

    arg_constraints = {"loc": constraints.real_vector}
    support = constraints.real_vector

    def __init__(
        self,
        loc: Tensor,
        radius: float = _RADIUS,
        width: float = _WIDTH,
        leak: float = 0.0,
        leak_scale: float = _LEAK_SCALE,
        validate_args: bool | None = None,
    ) -> None:
        if not 0 <= leak < 1:
            raise ValueError(f"leak must be 0 or above and below 1, got {leak}.")
        self.loc = loc
        self.radius, self.width = radius, width
        self.leak, self.leak_scale = leak, leak_scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Crescent:
        """The same distribution with more rows."""
        loc = self.loc.expand(*batch_shape, 2)
        return Crescent(
            loc, self.radius, self.width, self.leak, self.leak_scale, validate_args=False
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample_shape, ..., 2)``."""
        with torch.no_grad():
            loc = self.loc.expand(*sample_shape, *self.loc.shape)
            angle = math.pi * (torch.rand_like(loc[..., 0]) - 0.5)
            r = self.radius + self.width * torch.randn_like(angle)
            ring = torch.stack([r * angle.cos(), r * angle.sin()], -1)
            if self.leak:
                wide = self.leak_scale * torch.randn_like(loc)
                leaks = torch.rand_like(angle) < self.leak
                ring = torch.where(leaks.unsqueeze(-1), wide, ring)
            return loc + ring

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density ``(...)`` of points ``(..., 2)``."""
        u, v = (value - self.loc).unbind(-1)
        inside = u > 0
        # Outside, and at the center itself, the radius is put on the ring before anything is
        # divided by it: a gradient through the branch not taken would be NaN otherwise.
        square = u.square() + v.square()
        proper = inside & (square > 0)
        r = torch.where(proper, square, torch.full_like(square, self.radius**2)).sqrt()
        standard = (r - self.radius) / self.width
        ring = (
            -0.5 * standard.square()
            - math.log(self.width * math.sqrt(2 * math.pi) * math.pi)
            - r.log()
        )
        if not self.leak:
            return torch.where(proper, ring, torch.full_like(ring, -math.inf))
        variance = self.leak_scale**2
        wide = -0.5 * square / variance - math.log(2 * math.pi * variance) + math.log(self.leak)
        # log(exp(ring) + exp(wide)): torch.logaddexp's second derivative is NaN where they differ
        # by much.
        excess = ring + math.log1p(-self.leak) - wide
        return wide + torch.where(proper, torch.nn.functional.softplus(excess), 0.0)


class TwoMoons(Model):
    """Two parameters whose posterior is two narrow crescents, mirror images of each other.

        theta ~ Uniform(-1, 1)                                     two coordinates
        x     ~ Crescent((0.25 - |theta_1 + theta_2| / sqrt(2), (theta_2 - theta_1) / sqrt(2)))

    where the crescent is half a ring of radius 0.1 and width 0.01. The absolute value makes the
    posterior bimodal. One row is one data set with parameters of its own, so that a guide that is
    trained on simulated rows is an amortized posterior.

    The likelihood is exact, and so minus infinity wherever ``x`` is not on the right-hand side of
    the ring's center. The reverse KL divergence from any density that is positive everywhere is
    then infinite. Training by it needs ``leak``: the share of data that come from a wide Gaussian
    around the center instead, which moves the posterior by about as much and keeps every gradient
    finite.

    References:
        | Automatic Posterior Transformation for Likelihood-Free Inference (Greenberg et al., 2019)
        | https://arxiv.org/abs/1905.07488
        | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), task T.8
        | https://arxiv.org/abs/2101.04653

    Args:
        leak: Weight of the wide Gaussian, 0 or above and below 1.

    Sites:
        theta: Latent, support interval, ``(rows, 2)`` in plate ``"data"``.
        x: Observed, support real, ``(rows, 2)`` in plate ``"data"``.

    Example:
        >>> TwoMoons()(size=3).shape
        torch.Size([3, 2])
    """

    default_guide: ClassVar[str] = "amortized_spline_coupling"

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        if not 0 <= leak < 1:
            raise ValueError(f"leak must be 0 or above and below 1, got {leak}.")
        self.leak = leak
        self.register_buffer("bound", torch.ones(2), persistent=False)

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
            prior = dist.Uniform(-self.bound, self.bound).to_event(1)
            theta = pyro.sample("theta", prior)
            return pyro.sample("x", self.likelihood(theta), obs=x)

    def likelihood(self, theta: Tensor) -> Crescent:
        """The distribution of data given parameters.

        Args:
            theta: Parameters ``(..., 2)``.

        Returns:
            Batch shape ``(...)``, event shape ``(2,)``.
        """
        first, second = theta.unbind(-1)
        shift = torch.stack([-(first + second).abs(), second - first], -1) / math.sqrt(2)
        offset = torch.stack([torch.full_like(first, _OFFSET), torch.zeros_like(first)], -1)
        return Crescent(shift + offset, leak=self.leak)

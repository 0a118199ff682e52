"""MaskedFlow: masked autoregressive flows over the coordinates of a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform, constraints

__all__ = ["MaskedFlow"]


class _Level(Transform):
    """One level as a transform from u to v: v_d = shift(v_<d) + scale(v_<d) u_d.

    The density needs the inverse, which takes one pass; drawing takes one pass a coordinate.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, network: Any, flip: bool, log_bound: float) -> None:
        super().__init__()
        self.network, self.flip, self.log_bound = network, flip, log_bound

    def _maps(self, v: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.network(v)
        return shift, self.log_bound * torch.tanh(raw / self.log_bound)

    def _order(self, v: Tensor) -> Tensor:
        return v.flip(-1) if self.flip else v

    def _inverse(self, v: Tensor) -> Tensor:
        shift, log_scale = self._maps(self._order(v))
        return self._order((self._order(v) - shift) * (-log_scale).exp())

    def _call(self, u: Tensor) -> Tensor:
        u = self._order(u)
        v = torch.zeros_like(u)
        for _ in range(u.shape[-1]):
            # Each pass settles one more coordinate: those before it no longer change.
            shift, log_scale = self._maps(v)
            v = shift + log_scale.exp() * u
        return self._order(v)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of log scales, ``(...)``."""
        return self._maps(self._order(y))[1].sum(-1)


class MaskedFlow(nn.Module):
    """A masked autoregressive flow over a vector, for priors and conditional likelihoods.

        u ~ base
        v_d = shift_l(v_<d) + scale_l(v_<d) u_d           for each level l, coordinates reversed
                                                          in every second one

    References:
        | Masked autoregressive flow for density estimation (Papamakarios, Pavlakou & Murray, 2017)
        | https://arxiv.org/abs/1705.07057

    Args:
        dim: Dimension D; at least 2, since a single coordinate has nothing before it.
        hidden: Sizes of the hidden layers of each level, each at least D.
        levels: Levels.
        bound: Largest scale of a level, and inverse of the smallest.

    Raises:
        ValueError: For sizes that are too small.

    Example:
        >>> flow = MaskedFlow(3)
        >>> q = flow(dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> q.sample((5,)).shape, q.log_prob(torch.zeros(5, 3)).shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self, dim: int, hidden: Sequence[int] = (64,), levels: int = 2, bound: float = 10.0
    ) -> None:
        super().__init__()
        if dim < 2 or levels < 1 or any(size < dim for size in hidden) or not hidden:
            raise ValueError(
                f"A masked flow needs dim at least 2, a level and hidden sizes of at least dim, "
                f"got dim={dim}, levels={levels}, hidden={tuple(hidden)}."
            )
        self.log_bound = float(torch.tensor(bound).log())
        order = cast("torch.LongTensor", torch.arange(dim))
        self.networks = nn.ModuleList(
            AutoRegressiveNN(dim, list(hidden), permutation=order, nonlinearity=nn.SiLU())
            for _ in range(levels)
        )
        with torch.no_grad():
            for network in self.networks:
                # Levels start near the identity.
                network.layers[-1].weight.mul_(0.1)  # type: ignore[union-attr, index]
                network.layers[-1].bias.zero_()  # type: ignore[union-attr, index]

    def transforms(self) -> list[Transform]:
        """The levels, the one nearest the base first."""
        return [
            _Level(network, position % 2 == 1, self.log_bound)
            for position, network in enumerate(self.networks)
        ]

    def forward(self, base: dist.TorchDistribution) -> dist.TorchDistribution:
        """The distribution of v, with the batch shape of the base.

        Args:
            base: Distribution of u, event shape ``(D,)``.
        """
        pushed: dist.TorchDistribution = dist.TransformedDistribution(base, self.transforms())
        return pushed

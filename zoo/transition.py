"""Transitions: how the next state follows from the last one, in deep state space models."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedTransition"]


class GatedTransition(nn.Module):
    """A Gaussian whose mean is a gated mixture of a linear and a nonlinear map.

        gate  = sigmoid(G2 f(G1 z))
        prop  = P2 f(P1 z)
        loc   = (1 - gate) * (W z + b) + gate * prop           W starts as the identity
        scale = min_scale + softplus(V f(prop))

    f is a rectifier in the paper; SiLU, its smooth relative, by default here, because Laplace
    posteriors take exact Hessians. Their softplus is the variance, the scale here, with a floor.

    References:
        | Structured inference networks for nonlinear state space models (Krishnan, Shalit &
        | Sontag, 2017) https://arxiv.org/abs/1609.09869

    Args:
        z_dim: Dimension K of the state.
        hidden: Size of the hidden layers.
        activation: Constructor of f.

    Example:
        >>> GatedTransition(3, 8)(torch.zeros(5, 3)).event_shape
        torch.Size([3])
    """

    min_scale: ClassVar[float] = 0.01

    def __init__(
        self, z_dim: int, hidden: int, activation: Callable[[], nn.Module] = nn.SiLU
    ) -> None:
        super().__init__()
        self.activation = activation()
        self.gate = nn.Sequential(nn.Linear(z_dim, hidden), activation(), nn.Linear(hidden, z_dim))
        self.proposal = nn.Sequential(
            nn.Linear(z_dim, hidden), activation(), nn.Linear(hidden, z_dim)
        )
        self.linear = nn.Linear(z_dim, z_dim)
        self.raw_scale = nn.Linear(z_dim, z_dim)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(z_dim))
            self.linear.bias.zero_()

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        """Distribution of the next state, event shape ``(K,)``.

        Args:
            z: The last state ``(..., K)``.
        """
        gate = torch.sigmoid(self.gate(z))
        proposal = self.proposal(z)
        loc = (1 - gate) * self.linear(z) + gate * proposal
        scale = self.min_scale + F.softplus(self.raw_scale(self.activation(proposal)))
        state: dist.TorchDistribution = dist.Normal(loc, scale).to_event(1)
        return state

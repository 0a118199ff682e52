"""HierarchicalVAE: levels of latents, each predicting the one below; predictive coding's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.covariance import Covariance, floored, learned_covariance
from zoo.likelihood import make_likelihood
from zoo.model import Model, latent_names
from zoo.networks import inverse_softplus, mlp
from zoo.rows import data_plate

__all__ = ["Conditional", "HierarchicalVAE"]


class Conditional(nn.Module):
    """A Gaussian whose location and scale a network computes from the levels above.

        z ~ Normal(loc(parents), min_scale + softplus(raw(parents)))                  diagonal
        z ~ Normal(loc(parents), D A A' D + min_scale^2 I), D = softplus(raw(parents))

    the latter with lateral weights A that are triangular or symmetric, see
    :class:`zoo.covariance.Covariance`. The scale starts at about 1. Its floor of 0.05, in every
    direction, keeps a level from collapsing onto its prediction, where the density, and with it
    every objective, is unbounded.

    Args:
        parent_dim: Dimension of all parents together.
        dim: Dimension of the level.
        hidden: Sizes of the network's hidden layers.
        activation: Constructor of the activation.
        covariance: ``"diagonal"``, ``"cholesky"`` or ``"symmetric"``.
    """

    min_scale: ClassVar[float] = 0.05

    def __init__(
        self,
        parent_dim: int,
        dim: int,
        hidden: Sequence[int],
        activation: Callable[[], nn.Module],
        covariance: str = "diagonal",
    ) -> None:
        super().__init__()
        self.network, features = mlp(parent_dim, hidden, activation)
        self.loc = nn.Linear(features, dim)
        self.raw_scale = nn.Linear(features, dim)
        self.lateral = None if covariance == "diagonal" else Covariance(dim, covariance)
        with torch.no_grad():
            self.raw_scale.bias.fill_(inverse_softplus(torch.tensor(1.0 - self.min_scale)))

    def forward(self, parents: Tensor) -> dist.TorchDistribution:
        """Distribution of the level, batch shape ``(...)`` and event shape ``(dim,)``.

        Args:
            parents: Values of the levels above ``(..., parent_dim)``.
        """
        features = self.network(parents)
        loc, scale = self.loc(features), F.softplus(self.raw_scale(features))
        level: dist.TorchDistribution
        if self.lateral is None:
            level = dist.Normal(loc, self.min_scale + scale).to_event(1)
            return level
        whole = floored(scale.unsqueeze(-1) * self.lateral.scale, self.min_scale)
        return dist.MultivariateNormal(loc, scale_tril=whole)


class HierarchicalVAE(Model):
    """A deep latent Gaussian model with any number of levels.

        z_L ~ Normal(0, I)
        z_l ~ Normal(loc_l(parents), diag(scale_l(parents))^2)         l = L-1 .. 1
        x   ~ likelihood(network(parents))                             see zoo.likelihood

    with parents the level above, or, with skip connections, all levels above (for x: all levels).

    References:
        | Ladder variational autoencoders (Sonderby et al., 2016) https://arxiv.org/abs/1602.02282
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022)
        | https://arxiv.org/abs/2011.07464

    Args:
        x_dim: Dimension D of a row.
        z_dims: Dimensions of the latents, z1 (nearest the data) first.
        hidden: Sizes of the hidden layers of each network between two levels.
        skip: Whether every level is conditioned on all higher levels, not only on the next.
        likelihood: ``"bernoulli"``, ``"continuous_bernoulli"`` or ``"gaussian"``.
        activation: Constructor of the activation; smooth by default, see :class:`zoo.vae.VAE`.
        data_mean: Mean of the data ``(D,)``, from which the output bias starts.
        likelihood_covariance: Of a Gaussian likelihood: ``"isotropic"``, ``"diagonal"``, or with
            lateral weights between features ``"cholesky"`` or ``"symmetric"``.
        prior_covariance: Of every level given those above: ``"diagonal"``, which is the identity
            at the top, or with lateral weights ``"cholesky"`` or ``"symmetric"``.

    Sites:
        z1 .. zL: Latents, support real, event shapes ``(z_dims[l - 1],)``, in plate ``"data"``;
            ``z`` where there is only one.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: Without levels, for an unknown likelihood or covariance, sizes below 1, or a
            mean that is none of such data.

    Example:
        >>> model = HierarchicalVAE(x_dim=64, z_dims=(8, 4), hidden=(32,))
        >>> trace = pyro.poutine.trace(model).get_trace(size=5)
        >>> [name for name in trace.stochastic_nodes if name != "data"]
        ['z2', 'z1', 'x']
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (16, 8),
        hidden: Sequence[int] = (200,),
        skip: bool = False,
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
        likelihood_covariance: str = "isotropic",
        prior_covariance: str = "diagonal",
    ) -> None:
        super().__init__()
        if not z_dims:
            raise ValueError("z_dims must name at least one level, for example z_dims=(16, 8).")
        self.x_dim = x_dim
        self.z_dims = tuple(z_dims)
        self.skip = skip
        top, *below = reversed(self.z_dims)
        self.prior_covariance = learned_covariance(top, prior_covariance, "diagonal")
        levels = []
        parent_dim = top
        for dim in below:
            levels.append(Conditional(parent_dim, dim, hidden, activation, prior_covariance))
            parent_dim = parent_dim + dim if skip else dim
        self.levels = nn.ModuleList(levels)
        self.network, features = mlp(parent_dim, hidden, activation)
        self.likelihood = make_likelihood(
            likelihood, features, x_dim, data_mean, likelihood_covariance
        )
        self.register_buffer("prior_loc", torch.zeros(top), persistent=False)
        self.register_buffer("prior_scale", torch.ones(top), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Data ``(B, D)``; None simulates.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The rows ``(B, D)``.

        Raises:
            ValueError: Where the data are no rows of this model; see :func:`zoo.rows.data_plate`.
        """
        top, *below = latent_names(len(self.z_dims))
        event_shape, values = (self.x_dim,), self.likelihood.values
        with data_plate(x, size, index, event_shape=event_shape, values=values):
            parents = pyro.sample(top, self.prior())
            for name, level in zip(below, self.levels, strict=True):
                z = pyro.sample(name, level(parents))
                parents = torch.cat([parents, z], -1) if self.skip else z
            return pyro.sample("x", self.likelihood(self.network(parents)), obs=x)

    def prior(self) -> dist.TorchDistribution:
        """p(z_L): event shape ``(z_dims[-1],)``."""
        if self.prior_covariance is not None:
            return self.prior_covariance(self.prior_loc)
        unit: dist.TorchDistribution = dist.Normal(self.prior_loc, self.prior_scale).to_event(1)
        return unit

    def decode(self, *latents: Tensor) -> dist.TorchDistribution:
        """p(x | z1, .., zL): batch shape ``(...)``, event shape ``(D,)``.

        Args:
            *latents: All latents, z1 first, each ``(..., z_dims[l - 1])``.
        """
        if len(latents) != len(self.z_dims):
            raise ValueError(
                f"decode needs all {len(self.z_dims)} levels, z1 first, got {len(latents)}."
            )
        parents = torch.cat(latents[::-1], -1) if self.skip else latents[0]
        row: dist.TorchDistribution = self.likelihood(self.network(parents))
        return row

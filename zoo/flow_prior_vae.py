"""FlowPriorVAE: a deep latent Gaussian model whose prior is a normalizing flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.likelihood import make_likelihood
from zoo.masked_flow import MaskedFlow
from zoo.model import Model
from zoo.networks import mlp
from zoo.rows import data_plate

__all__ = ["FlowPriorVAE"]


class FlowPriorVAE(Model):
    """A VAE whose latents depend on each other in the prior.

        u ~ Normal(0, I_K)
        z = flow(u)                                   so z has a density; see zoo.masked_flow
        x ~ likelihood(network(z))                    see zoo.likelihood

    Dependence within a level, which lateral weights carry, is here in the prior.

    References:
        | Variational lossy autoencoder (Chen et al., 2017) https://arxiv.org/abs/1611.02731
        | Masked autoregressive flow for density estimation (Papamakarios, Pavlakou & Murray, 2017)
        | https://arxiv.org/abs/1705.07057

    Args:
        x_dim: Dimension D of a row.
        z_dim: Dimension K of the latent, at least 2.
        hidden: Sizes of the decoder's hidden layers.
        flow_hidden: Sizes of the hidden layers of each level of the flow, at least K.
        levels: Levels of the flow.
        likelihood: A key of ``zoo.likelihood.LIKELIHOODS``.
        activation: Constructor of the decoder's activation.
        data_mean: Mean of the data ``(D,)``, from which the output bias starts.

    Sites:
        z: Latent, support real, event shape ``(K,)``, in plate ``"data"``.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown likelihood or sizes that are too small.

    Example:
        >>> model = FlowPriorVAE(x_dim=16, z_dim=3)
        >>> model(size=5).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        flow_hidden: Sequence[int] = (64,),
        levels: int = 2,
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.flow = MaskedFlow(z_dim, flow_hidden, levels)
        self.network, features = mlp(z_dim, hidden, activation)
        self.likelihood = make_likelihood(likelihood, features, x_dim, data_mean)
        self.register_buffer("base_loc", torch.zeros(z_dim), persistent=False)

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
        event_shape, values = (self.x_dim,), self.likelihood.values
        with data_plate(x, size, index, event_shape=event_shape, values=values):
            z = pyro.sample("z", self.flow(dist.Normal(self.base_loc, 1.0).to_event(1)))
            data: Tensor = pyro.sample("x", self.likelihood(self.network(z)), obs=x)
            return data

"""FlowLikelihoodVAE: a VAE in a whitened space, to which a flow maps the data."""

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

__all__ = ["FlowLikelihoodVAE"]


class FlowLikelihoodVAE(Model):
    """A VAE whose conditional likelihood is a normalizing flow.

        z ~ Normal(0, I_K)
        v ~ Normal(network(z), scale)                 factorized, in the whitened space
        x = flow(v)                                   so x | z has full dependence

    Early stages that take redundancy away, and latents that explain what is left.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022),
        | section 4.3 https://arxiv.org/abs/2011.07464
        | f-VAEs: improve VAEs with conditional flows (Su & Wu, 2018)
        | https://arxiv.org/abs/1809.05861

    Args:
        x_dim: Dimension D of a row, at least 2.
        z_dim: Dimension K of the latent.
        hidden: Sizes of the decoder's hidden layers.
        flow_hidden: Sizes of the hidden layers of each level of the flow, at least D.
        levels: Levels of the flow.
        activation: Constructor of the decoder's activation.
        data_mean: Mean of the data ``(D,)``, from which the output bias starts.

    Sites:
        z: Latent, support real, event shape ``(K,)``, in plate ``"data"``.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes that are too small, or a mean that is none of such data.

    Example:
        >>> model = FlowLikelihoodVAE(x_dim=16, z_dim=3)
        >>> x = model(size=5)
        >>> model.whiten(x).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        flow_hidden: Sequence[int] = (64,),
        levels: int = 1,
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.network, features = mlp(z_dim, hidden, activation)
        self.likelihood = make_likelihood("gaussian", features, x_dim, data_mean)
        self.flow = MaskedFlow(x_dim, flow_hidden, levels)
        self.register_buffer("prior_loc", torch.zeros(z_dim), persistent=False)

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
        with data_plate(x, size, index, event_shape=(self.x_dim,)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, 1.0).to_event(1))
            data: Tensor = pyro.sample("x", self.decode(z), obs=x)
            return data

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z): batch shape ``(...)``, event shape ``(D,)``.

        Args:
            z: Latents ``(..., K)``.
        """
        row: dist.TorchDistribution = self.flow(self.likelihood(self.network(z)))
        return row

    def whiten(self, x: Tensor) -> Tensor:
        """The data in the space of v, ``(B, D)``."""
        for level in reversed(self.flow.transforms()):
            x = level.inv(x)
        return x

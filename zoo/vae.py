"""VAE: a deep latent Gaussian model with one level, the generative half of the autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.covariance import learned_covariance
from zoo.likelihood import make_likelihood
from zoo.model import Model
from zoo.networks import mlp
from zoo.rows import data_plate

__all__ = ["VAE"]


class VAE(Model):
    """A deep latent Gaussian model with one level.

        z_n ~ Normal(0, I_K)                          n = 1..N, or Normal(0, S_z), S_z learned
        x_n ~ likelihood(network(z_n))                see zoo.likelihood

    The other half, the encoder, is a guide: ``guides.make("amortized_normal", model, x)``.

    References:
        | Auto-encoding variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114
        | Stochastic backpropagation and approximate inference in deep generative models
        | (Rezende, Mohamed & Wierstra, 2014) https://arxiv.org/abs/1401.4082

    Args:
        x_dim: Dimension D of a row.
        z_dim: Dimension K of the latent.
        hidden: Sizes of the network's hidden layers.
        likelihood: ``"bernoulli"``, ``"continuous_bernoulli"`` or ``"gaussian"``.
        activation: Constructor of the activation. Smooth by default: Laplace posteriors take
            exact Hessians, which for ReLU miss what the network does.
        data_mean: Mean of the data ``(D,)``, from which the output bias starts.
        likelihood_covariance: Of a Gaussian likelihood: ``"isotropic"``, ``"diagonal"``, or with
            lateral weights between features ``"cholesky"`` or ``"symmetric"``.
        prior_covariance: ``"unit"``, or learned ``"cholesky"`` or ``"symmetric"``.

    Sites:
        z: Latent, support real, event shape ``(K,)``, in plate ``"data"``.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown likelihood or covariance, sizes below 1, or a mean that is
            none of such data.

    Example:
        >>> model = VAE(x_dim=64, z_dim=8, hidden=(32,), likelihood="gaussian")
        >>> x = model(size=5)
        >>> x.shape
        torch.Size([5, 64])
        >>> model.decode(torch.zeros(5, 8)).mean.shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (200, 200),
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
        likelihood_covariance: str = "isotropic",
        prior_covariance: str = "unit",
    ) -> None:
        super().__init__()
        self.x_dim = x_dim
        self.z_dim = z_dim
        self.network, features = mlp(z_dim, hidden, activation)
        self.likelihood = make_likelihood(
            likelihood, features, x_dim, data_mean, likelihood_covariance
        )
        self.prior_covariance = learned_covariance(z_dim, prior_covariance)
        self.register_buffer("prior_loc", torch.zeros(z_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(z_dim), persistent=False)

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
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)

    def prior(self) -> dist.TorchDistribution:
        """p(z): event shape ``(K,)``."""
        if self.prior_covariance is not None:
            return self.prior_covariance(self.prior_loc)
        unit: dist.TorchDistribution = dist.Normal(self.prior_loc, self.prior_scale).to_event(1)
        return unit

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z): batch shape ``(...)``, event shape ``(D,)``.

        Args:
            z: Latents ``(..., K)``.
        """
        row: dist.TorchDistribution = self.likelihood(self.network(z))
        return row

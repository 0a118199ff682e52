"""ConvVAE: a deep latent Gaussian model of images, with a convolutional network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.likelihood import likelihood_class
from zoo.model import Model
from zoo.rows import data_plate

__all__ = ["ConvVAE"]


class ConvVAE(Model):
    """A deep latent Gaussian model of images.

        z_n ~ Normal(0, I_K)                          n = 1..N
        x_n ~ likelihood(network(z_n))                an image (C, H, W), see zoo.likelihood

    The network is linear to a small image of ``channels[0]`` channels, and then doubles height
    and width once a transposed convolution, the last of which goes to the C channels of x. What
    exceeds H x W is cut off. Its output has a bias for every pixel and not only for every channel,
    so that it can start at the mean image.

    The guide ``guides.make("amortized_normal", model, x)`` reads x by convolutions.

    References:
        | Unsupervised representation learning with deep convolutional generative adversarial
        | networks (Radford, Metz & Chintala, 2016) https://arxiv.org/abs/1511.06434
        | Auto-encoding variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114

    Args:
        x_shape: Shape ``(C, H, W)`` of an image.
        z_dim: Dimension K of the latent.
        channels: Channels before each doubling, from the latent to the image.
        likelihood: ``"bernoulli"``, ``"continuous_bernoulli"`` or ``"gaussian"``.
        activation: Constructor of the activation, smooth by default; see :class:`zoo.VAE`.
        data_mean: Mean of the data ``(C, H, W)``, from which the output bias starts.

    Sites:
        z: Latent, support real, event shape ``(K,)``, in plate ``"data"``.
        x: Observed, event shape ``(C, H, W)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown likelihood, sizes below 1, more doublings than the image has
            room for, or a mean that is none of such data.

    Example:
        >>> model = ConvVAE(x_shape=(1, 28, 28), z_dim=8, channels=(16, 8))
        >>> x = model(size=5)
        >>> x.shape
        torch.Size([5, 1, 28, 28])
        >>> model.decode(torch.zeros(5, 8)).mean.shape
        torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        z_dim: int,
        channels: Sequence[int] = (64, 32),
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if len(x_shape) != 3:
            raise ValueError(
                f"x_shape must be (channels, height, width), got {tuple(x_shape)}. Gray images "
                "have one channel: (1, height, width)."
            )
        wrong = [size for size in (*x_shape, z_dim, *channels) if size < 1]
        if wrong or not channels:
            raise ValueError(
                "x_shape, z_dim and channels must hold sizes of at least 1 and channels at least "
                f"one, got {tuple(x_shape)}, {z_dim} and {tuple(channels)}."
            )
        num_channels, height, width = x_shape
        factor = 2 ** len(channels)
        if factor > min(height, width):
            raise ValueError(
                f"{len(channels)} channels= double the image to at least {factor} x {factor}, "
                f"but x_shape is {tuple(x_shape)}. Pass fewer channels."
            )
        self.x_shape = (num_channels, height, width)
        self.z_dim = z_dim
        small = (channels[0], -(-height // factor), -(-width // factor))
        layers: list[nn.Module] = [
            nn.Linear(z_dim, small[0] * small[1] * small[2]),
            nn.Unflatten(-1, small),
            activation(),
        ]
        for before, after in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), activation()]
        self.network = nn.Sequential(*layers)
        chosen = likelihood_class(likelihood)
        self.likelihood = chosen(_Output(channels[-1], self.x_shape), data_mean)
        self.register_buffer("prior_loc", torch.zeros(z_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(z_dim), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Images ``(B, C, H, W)``; None simulates.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The images ``(B, C, H, W)``.

        Raises:
            ValueError: Where the data are no rows of this model; see :func:`zoo.rows.data_plate`.
        """
        values = self.likelihood.values
        with data_plate(x, size, index, event_shape=self.x_shape, values=values):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", self.decode(z), obs=x)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z): batch shape ``(...)``, event shape ``(C, H, W)``.

        Args:
            z: Latents ``(..., K)``.
        """
        # Convolutions take one batch dimension, particles and samples stand to its left.
        features = self.network(z.reshape(-1, self.z_dim))
        features = features.reshape(*z.shape[:-1], *features.shape[1:])
        row: dist.TorchDistribution = self.likelihood(features)
        return row


class _Output(nn.Module):
    """The last doubling, and a bias for every pixel.

    Args:
        channels: Channels before it.
        x_shape: Shape ``(C, H, W)`` of its output.
    """

    def __init__(self, channels: int, x_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(
            channels, x_shape[0], 4, stride=2, padding=1, bias=False
        )
        self.bias = nn.Parameter(torch.zeros(x_shape))

    def forward(self, features: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` of features ``(..., channels, h, w)``."""
        _, height, width = self.bias.shape
        image = self.convolution(features.reshape(-1, *features.shape[-3:]))
        image = image[..., :height, :width] + self.bias
        return image.reshape(*features.shape[:-3], *self.bias.shape)

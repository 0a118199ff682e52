"""Likelihoods: from what a decoder computes to a distribution over one row of data.

    bernoulli               x_d ~ Bernoulli(logits = (A h + a)_d)
    continuous_bernoulli    x_d ~ ContinuousBernoulli(logits = (A h + a)_d)
    gaussian                x_d ~ Normal((A h + a)_d, scale)
                            x   ~ Normal(A h + a, S), S a full covariance, where asked for

Each starts from the data: with ``data_mean`` the bias a is such that the mean of x is that mean
where A h is zero, so that no training is spent on finding it.

References:
    | The continuous Bernoulli: fixing a pervasive error in variational autoencoders
    | (Loaiza-Ganem & Cunningham, 2019) https://arxiv.org/abs/1907.06845
    | Simple and effective VAE training with calibrated decoders (Rybkin et al., 2021)
    | https://arxiv.org/abs/2006.13202
"""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.covariance import Covariance, floored
from zoo.networks import inverse_softplus

__all__ = [
    "COVARIANCES",
    "LIKELIHOODS",
    "BernoulliLikelihood",
    "ContinuousBernoulliLikelihood",
    "GaussianLikelihood",
    "Likelihood",
    "likelihood_class",
    "make_likelihood",
]


class Likelihood(nn.Module):
    """An output layer and the distribution that it parameterizes.

    Args:
        output: The output layer, from the decoder's features to one number a feature of x; its
            ``bias`` has the event shape of x.
        data_mean: Mean of the data, of that shape, from which the bias starts.
    """

    values: ClassVar[str] = "real"

    def __init__(self, output: nn.Module, data_mean: Tensor | None = None) -> None:
        super().__init__()
        self.output = output
        bias = output.bias
        if not isinstance(bias, Tensor):
            raise ValueError("output must have a bias of the event shape of x.")
        self.event_dim = bias.dim()
        if data_mean is None:
            return
        mean = torch.as_tensor(data_mean)
        if mean.shape != bias.shape or not torch.isfinite(mean).all():
            raise ValueError(
                f"data_mean must hold one finite mean a feature, shape {tuple(bias.shape)}, got "
                f"{tuple(mean.shape)}"
                f"{'' if mean.shape != bias.shape else ' with NaN or infinity'}. "
                "Pass x.mean(0)."
            )
        if self.values != "real" and not ((mean >= 0) & (mean <= 1)).all():
            raise ValueError(
                f"data_mean must lie between 0 and 1 for this likelihood, got values from "
                f"{mean.min().item():g} to {mean.max().item():g}. Pass the mean of data from 0 "
                'to 1, or use likelihood="gaussian".'
            )
        with torch.no_grad():
            bias.copy_(self.initial_bias(mean))

    def initial_bias(self, mean: Tensor) -> Tensor:
        """The bias that makes ``mean`` the mean of x."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its bias starts.")

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Distribution over rows, batch shape ``(...)`` and the event shape of x.

        Args:
            features: The decoder's features, ``(..., H)`` for a linear output layer.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what x follows.")


class BernoulliLikelihood(Likelihood):
    """Binary data. Means start between 0.001 and 0.999: logits of constant pixels are finite."""

    values = "binary"

    def initial_bias(self, mean: Tensor) -> Tensor:
        """The logit of the clamped mean."""
        return torch.logit(mean.clamp(0.001, 0.999))

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Independent Bernoulli pixels."""
        logits = self.output(features)
        pixels: dist.TorchDistribution = dist.Bernoulli(logits=logits).to_event(self.event_dim)
        return pixels


class ContinuousBernoulliLikelihood(Likelihood):
    """Data from 0 to 1, with the normalizing constant that a Bernoulli density on them lacks.

    Means start between 0.05 and 0.95: the mean approaches 0 only as -1 / logit.
    """

    values = "unit"

    def initial_bias(self, mean: Tensor) -> Tensor:
        """The logit at which the mean is the clamped mean, by bisection: no closed form."""
        target = mean.double().clamp(0.05, 0.95)
        low, high = torch.full_like(target, -40.0), torch.full_like(target, 40.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = _continuous_bernoulli_mean(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Independent continuous Bernoulli pixels."""
        logits = self.output(features)
        pixels: dist.TorchDistribution
        pixels = dist.ContinuousBernoulli(logits=logits).to_event(self.event_dim)
        return pixels


class GaussianLikelihood(Likelihood):
    """Real data, by default with one learned scale for all features.

        isotropic               scale = min_scale + softplus(raw_scale)          one number
        diagonal                the same, one a feature
        cholesky, symmetric     S = A A' + min_scale^2 I, A as in zoo.covariance

    All start at scale 1. One scale and not one a feature by default: a feature that is constant
    in the data, as the corner pixels of digits, would drive its own scale to the floor and swamp
    the likelihood. The floor of 0.01, in units of the data, bounds what a perfect reconstruction
    can gain, in every direction: without it the likelihood is unbounded.

    Args:
        output: The output layer, see :class:`Likelihood`.
        data_mean: Mean of the data, from which the bias starts.
        covariance: ``"isotropic"``, ``"diagonal"``, ``"cholesky"`` or ``"symmetric"``.

    Raises:
        ValueError: For an unknown covariance, or a full one of data that are no vectors.
    """

    min_scale: ClassVar[float] = 0.01

    def __init__(
        self,
        output: nn.Module,
        data_mean: Tensor | None = None,
        covariance: str = "isotropic",
    ) -> None:
        super().__init__(output, data_mean)
        if covariance not in COVARIANCES:
            raise ValueError(
                f"The covariance of a likelihood must be one of {', '.join(COVARIANCES)}, got "
                f"{covariance!r}."
            )
        bias = output.bias
        assert isinstance(bias, Tensor)
        self.raw_scale: nn.Parameter | None = None
        self.lateral: Covariance | None = None
        if covariance in Covariance.parameterizations:
            shape = tuple(bias.shape)
            if len(shape) != 1:
                raise ValueError(
                    f"A full covariance is one of vectors, but rows have shape {shape}. Flatten "
                    'them, or use covariance="diagonal".'
                )
            start_scale = (1.0 - self.min_scale**2) ** 0.5
            self.lateral = Covariance(shape[0], covariance, start_scale)
            return
        start = inverse_softplus(torch.tensor(1.0 - self.min_scale))
        alike = bias if covariance == "diagonal" else start
        self.raw_scale = nn.Parameter(start.expand_as(alike).clone())

    def initial_bias(self, mean: Tensor) -> Tensor:
        """The mean itself."""
        return mean

    @property
    def scale(self) -> Tensor:
        """The scale, at least ``min_scale``; of a full covariance, that of every feature."""
        if self.raw_scale is None:
            return self.scale_tril.square().sum(-1).sqrt()
        return self.min_scale + F.softplus(self.raw_scale)

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of a full covariance, ``(D, D)``.

        Raises:
            ValueError: Where features are independent, which have ``scale`` alone.
        """
        if self.lateral is None:
            raise ValueError(
                "Independent features have no factor: read scale, or build the likelihood with "
                'covariance="cholesky" or "symmetric".'
            )
        return floored(self.lateral.scale, self.min_scale)

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        """Normal rows: independent features, or correlated ones."""
        loc = self.output(features)
        row: dist.TorchDistribution
        if self.lateral is None:
            row = dist.Normal(loc, self.scale).to_event(self.event_dim)
        else:
            row = dist.MultivariateNormal(loc, scale_tril=self.scale_tril)
        return row


def _continuous_bernoulli_mean(logits: Tensor) -> Tensor:
    # 1 / (1 - exp(-l)) - 1 / l, whose two poles at l = 0 cancel
    small = logits.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(logits), logits)
    return torch.where(small, 0.5 + logits / 12, -1 / torch.expm1(-safe) - 1 / safe)


COVARIANCES = ("isotropic", "diagonal", *Covariance.parameterizations)
LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "continuous_bernoulli": ContinuousBernoulliLikelihood,
    "gaussian": GaussianLikelihood,
}


def likelihood_class(name: str) -> type[Likelihood]:
    """The class of a likelihood, for decoders that bring their own output layer.

    Args:
        name: A key of ``LIKELIHOODS``.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"Unknown likelihood {name!r}. Available: {', '.join(LIKELIHOODS)}.")
    return LIKELIHOODS[name]


def make_likelihood(
    name: str,
    in_features: int,
    x_dim: int,
    data_mean: Tensor | None = None,
    covariance: str = "isotropic",
) -> Likelihood:
    """Build a likelihood with a linear output layer by name.

    Args:
        name: A key of ``LIKELIHOODS``.
        in_features: Size H of the decoder's features.
        x_dim: Dimension D of a row.
        data_mean: Mean of the data ``(D,)``.
        covariance: Of ``"gaussian"`` features, see :class:`GaussianLikelihood`.

    Raises:
        ValueError: For an unknown name or covariance, a covariance of a likelihood that has
            none, or a mean that is none of such data.

    Example:
        >>> make_likelihood("gaussian", 8, 3)(torch.zeros(5, 8)).event_shape
        torch.Size([3])
    """
    chosen = likelihood_class(name)
    if x_dim < 1:
        raise ValueError(f"x_dim must be at least 1, got {x_dim}.")
    output = nn.Linear(in_features, x_dim)
    if chosen is GaussianLikelihood:
        return GaussianLikelihood(output, data_mean, covariance)
    if covariance != "isotropic":
        raise ValueError(
            f"Likelihood {name!r} has no covariance to learn, got {covariance!r}: leave it out, "
            'or use likelihood="gaussian".'
        )
    return chosen(output, data_mean)

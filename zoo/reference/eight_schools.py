"""EightSchools: the smallest hierarchical model that is hard, with its exact answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from zoo.model import Model
from zoo.rows import check_rows, data_plate

__all__ = ["EightSchools"]


class EightSchools(Model):
    """Effects of coaching in eight schools, pooled partially.

        mu      ~ Normal(0, 5)
        tau     ~ HalfCauchy(5)
        theta_j ~ Normal(mu, tau)                                    j = 1..8, centered
        theta_j = mu + tau * theta_trans_j, theta_trans_j ~ Normal(0, 1)      non-centered
        y_j     ~ Normal(theta_j, sigma_j)

    The centered form is a funnel: where tau is small, so is the room for theta. The non-centered
    form has the same posterior without it. Given tau everything is Gaussian, so that evidence and
    moments are one-dimensional integrals, which quadrature gives to many digits.

    The data, ``model.y`` and ``model.sigma``, are embedded: ``model(model.y)`` conditions on them,
    ``model()`` simulates eight new schools.

    References:
        | Estimation in parallel randomized experiments (Rubin, 1981)
        | https://doi.org/10.3102/10769986006004377
        | posteriordb: posteriors eight_schools-eight_schools_centered and -noncentered. Stan drops
        | the factor 2 of a Cauchy cut at zero, so that its log density is lower by log 2.
        | https://github.com/stan-dev/posteriordb

    Args:
        centered: Which form.

    Sites:
        mu: Latent, support real, scalar.
        tau: Latent, support positive, scalar.
        theta: Latent, support real, in plate ``"schools"``; deterministic if non-centered.
        theta_trans: Latent, support real, in plate ``"schools"``; non-centered only.
        y: Observed, support real, in plate ``"schools"``.

    Example:
        >>> model = EightSchools()
        >>> model(model.y).shape
        torch.Size([8])
        >>> f"{model.log_evidence().item():.4f}"
        '-31.3113'
        >>> mean, sd = model.moments()["tau"]
        >>> f"{mean.item():.4f} {sd.item():.4f}"
        '3.5977 3.2200'
    """

    default_guide: ClassVar[str] = "multivariate_normal"
    data_args: ClassVar[Mapping[str, int]] = {"y": 0, "sigma": 0}

    def __init__(self, centered: bool = False) -> None:
        super().__init__()
        self.centered = centered
        y = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
        sigma = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
        self.register_buffer("y", torch.tensor(y), persistent=False)
        self.register_buffer("sigma", torch.tensor(sigma), persistent=False)

    def forward(
        self,
        y: Tensor | None = None,
        sigma: Tensor | None = None,
        *,
        size: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The generative process.

        Args:
            y: Estimated effects ``(B,)``; None simulates.
            sigma: Their standard errors ``(B,)``; by default those of the eight schools.
            size: Number of all schools, if ``y`` is a part of them.
            index: Numbers ``(B,)`` of the schools of ``y`` among all.

        Returns:
            The effects ``(B,)``.

        Raises:
            ValueError: Where there is not one standard error a school.
        """
        if y is None and size is None:
            size = len(self.sigma if sigma is None else sigma)
        plate = data_plate(y, size, index, site="y", event_shape=(), name="schools")
        if sigma is None:
            sigma = self.sigma if index is None else self.sigma[index]
        self._check_sigma(sigma, plate.subsample_size)
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(sigma[0]), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(torch.full_like(sigma[0], 5.0)))
        with plate:
            if self.centered:
                theta = pyro.sample("theta", dist.Normal(mu, tau))
            else:
                standard = dist.Normal(torch.zeros_like(sigma), 1.0)
                theta = pyro.deterministic(
                    "theta", mu + tau * pyro.sample("theta_trans", standard)
                )
            return pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def log_evidence(
        self, y: Tensor | None = None, sigma: Tensor | None = None, *, num_nodes: int = 200
    ) -> Tensor:
        """The exact log p(y), a float64 scalar.

        Args:
            y: Estimated effects ``(B,)``; by default those of the eight schools.
            sigma: Their standard errors ``(B,)``.
            num_nodes: Nodes of the quadrature over tau.
        """
        return self._quadrature(y, sigma, num_nodes)[2]

    def moments(
        self, y: Tensor | None = None, sigma: Tensor | None = None, *, num_nodes: int = 200
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The exact posterior mean and standard deviation of every latent, in float64.

        Args:
            y: Estimated effects ``(B,)``; by default those of the eight schools.
            sigma: Their standard errors ``(B,)``.
            num_nodes: Nodes of the quadrature over tau.

        Returns:
            ``{site: (mean, sd)}`` for mu, tau, theta and theta_trans, whichever form samples.
        """
        conditional, weights, _ = self._quadrature(y, sigma, num_nodes)
        result = {}
        for name, (mean, variance) in conditional.items():
            weight = weights.reshape(-1, *(1,) * (mean.dim() - 1))
            first = (weight * mean).sum(0)
            second = (weight * (variance + (mean - first) ** 2)).sum(0)
            result[name] = (first, second.sqrt())
        return result

    def _quadrature(
        self, y: Tensor | None, sigma: Tensor | None, num_nodes: int
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Moments given tau at the nodes, posterior weights of the nodes, log evidence."""
        y = self.y if y is None else y
        sigma = self.sigma if sigma is None else sigma
        check_rows(y, "y", event_shape=())
        self._check_sigma(sigma, len(y))
        y, sigma = y.double(), sigma.double()
        # tau = 5 tan(pi u / 2) maps HalfCauchy(5) to the uniform distribution of u: the weights
        # of Gauss-Legendre are prior weights, and the integrand is smooth and vanishes at u = 1.
        nodes, gauss = np.polynomial.legendre.leggauss(num_nodes)
        tau = 5.0 * torch.tan(torch.as_tensor((nodes + 1) * math.pi / 4).to(y.device))  # (Q,)
        variance = sigma**2 + tau.unsqueeze(-1) ** 2  # (Q, B), of y given mu and tau
        mu_variance = 1 / (1 / 25 + (1 / variance).sum(-1))  # (Q,)
        mu = mu_variance * (y / variance).sum(-1)
        log_likelihood = (
            -0.5 * (y**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
            + 0.5 * (mu_variance / 25).log()
            + 0.5 * mu**2 / mu_variance
        )
        log_terms = log_likelihood + torch.as_tensor(gauss / 2).to(y.device).log()
        log_evidence = log_terms.logsumexp(0)
        mu_, tau_, mu_variance_ = (value.unsqueeze(-1) for value in (mu, tau, mu_variance))
        pull = sigma**2 / variance  # towards mu
        conditional = {
            "mu": (mu, mu_variance),
            "tau": (tau, torch.zeros_like(tau)),
            "theta": (pull * mu_ + (1 - pull) * y, pull * tau_**2 + pull**2 * mu_variance_),
            "theta_trans": (
                tau_ * (y - mu_) / variance,
                pull + (tau_ / variance) ** 2 * mu_variance_,
            ),
        }
        return conditional, (log_terms - log_evidence).exp(), log_evidence

    @staticmethod
    def _check_sigma(sigma: Tensor, num_schools: int) -> None:
        if sigma.shape != (num_schools,):
            raise ValueError(
                f"sigma must hold one standard error for each of the {num_schools} schools of y, "
                f"got shape {tuple(sigma.shape)}. Pass sigma= with y=."
            )
        if is_validation_enabled() and not (torch.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError("sigma must hold positive standard errors; got one that is not.")

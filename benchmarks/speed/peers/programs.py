"""Pyro programs of tasks that are no models of the zoo."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

__all__ = ["radon"]


def radon(floor: Tensor, uranium: Tensor, county: Tensor, y: Tensor | None = None) -> Tensor:
    """Radon in homes, pooled partially by county: 90 latents, non-centered.

        mu_alpha ~ Normal(0, 10)   sigma_alpha ~ HalfNormal(1)   sigma_y ~ HalfNormal(1)
        beta_k ~ Normal(0, 10)                                                    k = 1, 2
        alpha_raw_j ~ Normal(0, 1)                                                j = 1..85
        y_n ~ Normal(alpha[county_n] + beta_1 uranium_n + beta_2 floor_n, sigma_y)

    with alpha = mu_alpha + sigma_alpha alpha_raw.

    References:
        | Data Analysis Using Regression and Multilevel/Hierarchical Models (Gelman & Hill, 2006)
        | posteriordb: radon_mn-radon_hierarchical_intercept_noncentered
        | https://github.com/stan-dev/posteriordb

    Args:
        floor: Where radon was measured ``(N,)``, 1 for the first floor.
        uranium: Log uranium of the home's county ``(N,)``.
        county: Number of the county ``(N,)``, from 0 to 84.
        y: Log radon ``(N,)``; None simulates.

    Sites:
        mu_alpha, sigma_alpha, sigma_y: Latents, scalars; the scales are positive.
        beta: Latent, event shape ``(2,)``.
        alpha_raw: Latent, in plate ``"counties"``, ``(85,)``.
        y: Observed, in plate ``"homes"``.
    """
    zero = floor.new_zeros(())
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(zero, 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(zero + 1.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(zero + 1.0))
    beta = pyro.sample("beta", dist.Normal(floor.new_zeros(2), 10.0).to_event(1))
    with pyro.plate("counties", 85):
        alpha_raw = pyro.sample("alpha_raw", dist.Normal(zero, 1.0))
    alpha = mu_alpha + sigma_alpha * alpha_raw
    with pyro.plate("homes", len(floor)):
        loc = alpha[..., county] + beta[..., 0] * uranium + beta[..., 1] * floor
        return pyro.sample("y", dist.Normal(loc, sigma_y), obs=y)

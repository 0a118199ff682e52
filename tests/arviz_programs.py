"""Small programs with exact posteriors, and the guides that are exact for them."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from torch import Tensor

SIGMA = 0.7


def one_mean(x: Tensor) -> None:
    """One level: mu ~ N(0, 1), x[n] ~ N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def one_mean_exact(x: Tensor) -> None:
    precision = 1.0 + len(x)
    pyro.sample("mu", dist.Normal(x.sum() / precision, precision**-0.5))


def one_mean_evidence(x: Tensor) -> Tensor:
    covariance = torch.eye(len(x)) + 1.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


def two_levels(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Two levels: mu ~ N(0, 2), z[n] ~ N(mu, 1), x[n] ~ N(z[n], SIGMA)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x)


class TwoLevelsExact:
    """p(mu | all of x) and p(z[n] | mu, x[n]): exact in every minibatch."""

    def __init__(self, x: Tensor) -> None:
        variance = 1.0 + SIGMA**2
        precision = 0.25 + len(x) / variance
        self.mean, self.sd = x.sum() / variance / precision, precision**-0.5

    def __call__(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(self.mean, self.sd))
        precision = 1.0 + SIGMA**-2
        with pyro.plate("data", size or len(x), subsample=index):
            mean = (mu + x / SIGMA**2) / precision
            pyro.sample("z", dist.Normal(mean, precision**-0.5))


def two_levels_evidence(x: Tensor) -> Tensor:
    covariance = (1.0 + SIGMA**2) * torch.eye(len(x)) + 4.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


def own_minibatch(x: Tensor, batch: int) -> None:
    """``two_levels``, the program itself drawing its rows."""
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, SIGMA), obs=x[rows])


class OwnMinibatchExact(TwoLevelsExact):
    """The exact guide that draws its rows as ``own_minibatch`` does."""

    def __call__(self, x: Tensor, batch: int) -> None:
        mu = pyro.sample("mu", dist.Normal(self.mean, self.sd))
        precision = 1.0 + SIGMA**-2
        with pyro.plate("data", len(x), subsample_size=batch) as rows:
            mean = (mu + x[rows] / SIGMA**2) / precision
            pyro.sample("z", dist.Normal(mean, precision**-0.5))


def nested(x: Tensor, w: Tensor) -> None:
    """Plates in plates, named and unnamed event axes, a simplex, an axis of length one."""
    level = pyro.sample("level", dist.Normal(torch.zeros(1), 1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("region", 2, dim=-2):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))  # (2, 1)
        with pyro.plate("data", x.shape[1], dim=-1):
            z = pyro.sample(
                "z",
                dist.Normal(torch.zeros(3), 1.0).to_event(1),
                infer={"event_dims": ["feature"]},
            )  # (2, N, 3)
            mean = level + slope + (z * share).sum(-1) * w
            pyro.deterministic("mean", mean)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


EIGHT_SCHOOLS = (
    torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
)


def normal_log_density(x: Tensor, loc: Tensor | float, scale: float) -> Tensor:
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


AUTOGUIDES = {
    name: getattr(autoguide, name)
    for name in (
        "AutoNormal",
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
        "AutoIAFNormal",
        "AutoStructured",
        "AutoNormalMessenger",
        "AutoHierarchicalNormalMessenger",
    )
}

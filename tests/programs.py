"""Pyro programs as readers write them: nobody thought of this project when writing these.

Group indexing (``offset[group]``), improvised shapes, positive and simplex sites, globals and
locals mixed. ``PROGRAMS`` maps a name to a :class:`Program` with simulated data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor


@dataclass(frozen=True)
class Program:
    """A program, its data, and where its global latents are."""

    model: Callable[..., Any]
    args: tuple[Tensor, ...]
    global_sites: tuple[str, ...]
    local_sites: tuple[str, ...]


def hierarchical_regression(x: Tensor, group: Tensor, y: Tensor | None = None) -> Tensor:
    """Varying intercepts, and features that share one simplex of weights."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((x.shape[1],), 2.0)))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("groups", 16):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    mean = level + spread * offset[group] + slope * (x @ weights)
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(mean, noise), obs=y)


# Which of the six counts each of the two factors reaches.
PATTERN = torch.tensor(
    [[1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float32
)


def gamma_poisson(counts: Tensor, size: int | None = None, index: Tensor | None = None) -> Tensor:
    """A confirmatory Poisson factor model: a pattern of zeros tells the factors apart."""
    with pyro.plate("factors", 2):
        loadings = pyro.sample(
            "loadings", dist.Gamma(torch.full_like(PATTERN, 2.0).to(counts), 0.5).to_event(1)
        )
    with pyro.plate("data", size or len(counts), subsample=index):
        z = pyro.sample(
            "z", dist.Gamma(torch.full((2,), 2.0, dtype=counts.dtype), 2.0).to_event(1)
        )
        rate = z @ (loadings * PATTERN.to(counts))
        return pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def random_effects(
    dose: Tensor, y: Tensor | None = None, size: int | None = None, index: Tensor | None = None
) -> Tensor:
    """A logistic dose response with a level of its own for every subject, 50 trials each."""
    effect = pyro.sample("effect", dist.Normal(0.0, 1.5))
    base = pyro.sample("base", dist.Normal(0.0, 1.5))
    spread = pyro.sample("spread", dist.LogNormal(-0.5, 0.5))
    with pyro.plate("subjects", size or len(dose), subsample=index):
        # Standardized: in the other form the joint mode lies at spread = 0, where point estimates
        # of the subjects collapse.
        own = pyro.sample("own", dist.Normal(0.0, 1.0))
        logits = base + effect * dose + spread * own
        return pyro.sample("y", dist.Binomial(50, logits=logits), obs=y)


def _hierarchical_regression() -> Program:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 3, generator=generator, dtype=torch.float32)
    group = torch.arange(80) % 16
    truth = {
        "weights": torch.tensor([0.6, 0.3, 0.1], dtype=torch.float32),
        "slope": torch.tensor(1.5),
        "level": torch.tensor(0.5),
        "spread": torch.tensor(1.0),
        "noise": torch.tensor(0.5),
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        y = poutine.condition(hierarchical_regression, truth)(x, group)
    names = ("weights", "slope", "level", "spread", "noise", "offset")
    return Program(hierarchical_regression, (x, group, y), names, ())


def _gamma_poisson() -> Program:
    generator = torch.Generator().manual_seed(2)
    z = 0.2 + 2 * torch.rand(40, 2, generator=generator, dtype=torch.float32)
    loadings = PATTERN * torch.tensor([[5.0], [7.0]], dtype=torch.float32)
    counts = torch.poisson(z @ loadings, generator=generator)
    return Program(gamma_poisson, (counts,), ("loadings",), ("z",))


def _random_effects() -> Program:
    generator = torch.Generator().manual_seed(3)
    dose = torch.linspace(-1.5, 1.5, 40, dtype=torch.float32)
    logits = 0.3 + 1.2 * dose + 0.8 * torch.randn(40, generator=generator, dtype=torch.float32)
    y = torch.binomial(
        torch.full((40,), 50.0, dtype=torch.float32), torch.sigmoid(logits), generator=generator
    )
    return Program(random_effects, (dose, y), ("effect", "base", "spread"), ("own",))


PROGRAMS: dict[str, Callable[[], Program]] = {
    "hierarchical_regression": _hierarchical_regression,
    "gamma_poisson": _gamma_poisson,
    "random_effects": _random_effects,
}

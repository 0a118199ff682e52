"""Regression with simplex weights, per-datum effects and a guide of one's own.

A task file as a reader writes it, outside the repository; CI runs it with the wheel installed:

    pyro-zoo run user_task.py --seeds 1
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from benchmarks import Budget


def model(x, y=None, size=None, index=None):
    """Effects around a multiple of a weighted mean of covariates; the weights sum to one."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    slope = pyro.sample("slope", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        effect = pyro.sample("effect", dist.Normal(slope * (x * weights).sum(-1), 0.5))
        return pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


generator = torch.Generator().manual_seed(0)
x = torch.randn(100, 3, generator=generator)
noise = torch.randn(100, generator=generator)
y = 2.0 * x @ torch.tensor([0.6, 0.3, 0.1]) + 0.7 * noise

args = (x, y)
data_args = {"x": 0, "y": 0}
guides = ["normal", "amortized_multivariate_normal", AutoNormal]
loops = ["svi", "predictive_coding"]
budget = Budget(num_steps=300, num_samples=100, num_evidence_samples=500, num_khat_samples=200)

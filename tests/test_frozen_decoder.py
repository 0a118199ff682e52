"""Guides on one frozen decoder and held-out rows: the orders that theory guarantees.

The best member of a larger family is no worse than that of a smaller one, an encoder is no better
than the best member of its family, and no bound is above the evidence. No order is asserted for
richer amortized families or for joint training, where none is guaranteed.
"""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.diagnostics import elbo, log_evidence
from guides.inference import SVI
from zoo.data import digits

NUM_ROWS = 80


def decoder_and_encoder(train: Tensor) -> tuple[zoo.VAE, guides.Guide]:
    """A VAE trained on digits, then frozen."""
    model = zoo.VAE(x_dim=64, z_dim=6, hidden=(64,), data_mean=train.mean(0))
    guide = guides.make("amortized_normal", model, train, hidden=(64,))
    steps = 800
    optim = pyro.optim.ClippedAdam({"lr": 5e-3, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optim, Trace_ELBO())
    batches = [
        call
        for epoch in range(4)
        for call in guides.rows.minibatches(
            model, (train,), batch_size=200, generator=torch.Generator().manual_seed(epoch)
        )
    ]
    svi.run(steps, batches)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, guide


def fit_local(model: zoo.VAE, name: str, x: Tensor, steps: int) -> guides.Guide:
    guide = guides.make(name, model, x, init_scale=0.5)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.01 ** (1 / steps)})
    objective = Trace_ELBO(num_particles=8, vectorize_particles=True)
    SVI(model, guide, optim, objective).run(steps, ((x,), {}))
    return guide


@pytest.mark.slow
def test_bounds_are_ordered_on_held_out_rows() -> None:
    data = digits.load()
    model, encoder = decoder_and_encoder(data.train)
    x = data.test[:NUM_ROWS]
    scores = {"amortized_normal": elbo(model, encoder, x, num_samples=1000)}
    for name in ("normal", "multivariate_normal"):
        guide = fit_local(model, name, x, 1500)
        scores[name] = elbo(model, guide, x, num_samples=1000)
    scores["IW-5000"] = log_evidence(model, guide, x, num_samples=5000)
    order = ["amortized_normal", "normal", "multivariate_normal", "IW-5000"]
    for low, high in itertools.pairwise(order):
        difference = scores[high].rows - scores[low].rows
        error = difference.std() / NUM_ROWS**0.5
        assert difference.mean() >= -2 * error, f"{low} above {high}: {difference.mean():.3f}"
    # The orders must be visible, or equal numbers would pass.
    gap = (scores["normal"].rows - scores["amortized_normal"].rows).mean()
    assert gap > 0.1, f"the encoder loses only {gap:.3f} nats"

"""Active units: shares of variance against closed forms, and what must not count."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import guides
import zoo
from guides.diagnostics import ActiveUnits, active_units

pytestmark = pytest.mark.usefixtures("float64")

SLOPES = torch.tensor([2.0, 0.5, 0.0])


def model(x: Tensor, lengths: Tensor | None = None) -> None:
    on = torch.ones(len(x), dtype=torch.bool) if lengths is None else lengths > 0
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=on):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1) + level, scale), obs=x)


def guide(x: Tensor, lengths: Tensor | None = None) -> None:
    on = torch.ones(len(x), dtype=torch.bool) if lengths is None else lengths > 0
    pyro.sample("level", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)), poutine.mask(mask=on):
        pyro.sample("z", dist.Normal(x[:, None] * SLOPES, 0.7).to_event(1))
        pyro.sample("scale", dist.LogNormal(-x, 0.5))


def test_shares_are_those_of_the_closed_form() -> None:
    pyro.set_rng_seed(0)
    x = torch.randn(300)
    found = active_units(model, guide, x, num_samples=400)
    variance = x.var()
    signal = SLOPES.double().square() * variance
    expected = signal / (signal + 0.49)
    assert torch.allclose(found.shares["z"], expected, atol=0.005)
    # Of the logarithm, which is where the coordinate is unconstrained.
    share = float(variance / (variance + 0.25))
    assert float(found.shares["scale"]) == pytest.approx(share, abs=0.005)
    assert set(found.shares) == {"z", "scale"}  # a global latent has no rows to compare
    assert found.active["z"].tolist() == [True, True, False]
    assert repr(found) == "ActiveUnits(z: 2 of 3, scale: 1 of 1 above 0.01)"


def test_a_silent_unit_stays_silent_with_few_draws() -> None:
    """The noise of S draws spreads the means by within / S, which is taken away."""
    pyro.set_rng_seed(0)
    shares = torch.stack(
        [active_units(model, guide, torch.randn(40), num_samples=2).shares["z"] for _ in range(30)]
    )
    error = shares[:, 2].std() / 30**0.5
    assert shares[:, 2].mean() < 0.1 + 3 * error  # would be a third
    assert shares[:, 0].min() > 0.5


def test_rows_without_a_latent_do_not_count() -> None:
    pyro.set_rng_seed(0)
    x = 3 + torch.randn(200)
    lengths = (torch.arange(200) % 2).long()
    wild = torch.where(lengths > 0, x, 100 * x)
    found = active_units(model, guide, wild, lengths, num_samples=400)
    alone = active_units(model, guide, x[lengths > 0], num_samples=400)
    assert torch.allclose(found.shares["z"], alone.shares["z"], atol=0.01)
    one = (torch.arange(200) == 3).long()
    assert active_units(model, guide, x, one).shares["z"].isnan().all()


def test_guides_of_the_package_and_of_pyro() -> None:
    pyro.set_rng_seed(0)
    vae = zoo.make("vae", x_dim=6, z_dim=4, hidden=(8,))
    x = vae(size=30).detach()
    own = guides.make("amortized_normal", vae, x, hidden=(8,))
    assert active_units(vae, own, x).shares["z"].shape == (4,)
    auto = AutoNormal(model)
    auto(x[:, 0])
    found = active_units(model, auto, x[:, 0])
    assert found.shares["z"].shape == (3,)
    chain = zoo.make("deep_markov", x_dim=5, z_dim=2, emission=4, transition=4)
    data, lengths = torch.bernoulli(torch.full((6, 3, 5), 0.4)), torch.tensor([3, 3, 2, 2, 1, 3])
    smoothing = guides.make("smoothing_normal", chain, data, lengths, recurrent=4)
    steps = active_units(chain, smoothing, data, lengths)
    assert list(steps.shares) == ["z_1", "z_2", "z_3"]
    assert all(share.shape == (2,) and share.isfinite().all() for share in steps.shares.values())


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(5)
    with pytest.raises(ValueError, match="Call with at least two"):
        active_units(model, guide, x[:1])
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\)"):
        active_units(model, guide, x, threshold=1.0)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        active_units(model, guide, x, num_samples=1)

    def flat(x: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(level, 1.0), obs=x)

    with pytest.raises(ValueError, match="no latent of this program is in a data plate"):
        active_units(flat, guides.make("normal", flat, x), x)


def test_it_prints_and_holds_what_it_was_asked() -> None:
    found = ActiveUnits({"z": torch.tensor([0.5, 0.02, 0.0])}, 0.05, 10)
    assert found.counts == {"z": 1}
    assert repr(found) == "ActiveUnits(z: 1 of 3 above 0.05)"

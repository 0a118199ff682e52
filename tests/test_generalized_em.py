"""Generalized EM: finished steps are alternating least squares, unfinished ones still descend."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import GeneralizedEM, PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")

SCALE = 0.7
START = torch.tensor([[1.0, 0.2], [-0.3, 1.0], [0.5, -0.6], [0.1, 0.4]]).double()


def factors(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Probabilistic principal components: z ~ N(0, I), x ~ N(W z, s^2 I)."""
    weight = pyro.param("weight", lambda: START.clone())
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ weight.T, SCALE).to_event(1), obs=x)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    loading = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return 1.5 * torch.randn(12, 2, generator=generator, dtype=torch.float64) @ loading


def latents(x: Tensor, weight: Tensor) -> Tensor:
    """The mean, and mode, of p(z | x)."""
    return x @ weight @ torch.linalg.inv(weight.T @ weight + SCALE**2 * torch.eye(2))


def energy(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    terms = dist.Normal(0.0, 1.0).log_prob(z).sum()
    return -terms - dist.Normal(z @ weight.T, SCALE).log_prob(x).sum()


def test_finished_steps_are_alternating_least_squares() -> None:
    x = data()
    loop = GeneralizedEM(
        factors, pyro.optim.SGD({"lr": 0.05}), num_steps=1, weight_steps=120, solver="newton"
    )
    weight = START
    for _ in range(3):
        found = loop.step(x)
        z = latents(x, weight)
        assert found == pytest.approx(float(energy(x, z, weight)), rel=1e-8)
        weight = x.T @ z @ torch.linalg.inv(z.T @ z)
        torch.testing.assert_close(pyro.param("weight").detach(), weight, rtol=1e-6, atol=1e-6)


def test_a_partial_m_step_is_gradient_steps_at_the_same_latents() -> None:
    """All of them at the state where the E step ended, and the energy is that in between."""
    x = data()
    loop = GeneralizedEM(
        factors, pyro.optim.SGD({"lr": 0.02}), num_steps=1, weight_steps=3, solver="newton"
    )
    weight = START
    z = latents(x, weight)
    assert loop.step(x) == pytest.approx(float(energy(x, z, weight)), rel=1e-10)
    for _ in range(3):
        weight = weight + 0.02 * (x - z @ weight.T).T @ z / SCALE**2
    torch.testing.assert_close(pyro.param("weight").detach(), weight, rtol=1e-10, atol=1e-10)


def test_minibatches_count_for_all_rows_and_go_on_where_they_were_left() -> None:
    """One gradient step of the latents a visit; the rows meet in another order."""
    x, rows = data(), torch.tensor([7, 2, 5])
    loop = GeneralizedEM(
        factors, pyro.optim.SGD({"lr": 0.0}), num_steps=1, weight_steps=2, step_size=0.05
    )
    other = torch.tensor([5, 7, 2])
    loop.step(x[rows], size=12, index=rows)
    loop.step(x[other], size=12, index=other)
    weight = START
    z = torch.zeros(3, 2)
    for _ in range(3):
        z = z - 0.05 * (z - (x[rows] - z @ weight.T) @ weight / SCALE**2)
    found = loop.infer(x[rows], size=12, index=rows)["z"]
    torch.testing.assert_close(found, z)
    before = pyro.param("weight").detach().clone()
    loop.optim = pyro.optim.SGD({"lr": 1e-6})
    loop.step(x[rows], size=12, index=rows)
    slope = 4 * (x[rows] - z @ weight.T).T @ z / SCALE**2  # N/B
    torch.testing.assert_close(
        (pyro.param("weight").detach() - before) / 2e-6, slope, rtol=1e-4, atol=1e-4
    )


def bent(x: Tensor) -> None:
    first = pyro.param("first", lambda: torch.linspace(-1.0, 1.0, 6).reshape(3, 2).cos())
    second = pyro.param("second", lambda: torch.linspace(-1.0, 1.0, 12).reshape(4, 3).sin())
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal((z2 @ first.T).tanh(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z1 @ second.T).tanh(), 0.5).to_event(1), obs=x)


def test_the_energy_falls_from_step_to_step() -> None:
    """Unfinished steps of both kinds; a fresh start of the rows would lose what was gained."""
    x = data()
    losses = []
    loop = GeneralizedEM(bent, pyro.optim.SGD({"lr": 0.002}), num_steps=2, weight_steps=3)
    for _ in range(40):
        losses.append(loop.step(x))
    changes = torch.tensor(losses).diff()
    assert (changes <= 1e-9).all()
    assert losses[-1] < losses[0] - 10


def test_stationary_points_are_those_of_predictive_coding() -> None:
    """T22: where both gradients vanish nothing moves."""
    x = data()
    # With a prior on the weights in the form of decay: without one they grow without end.
    decay = {"lr": 0.03, "weight_decay": 5.0}
    pc = PredictiveCoding(factors, pyro.optim.SGD(decay), solver="newton", num_steps=1)
    for _ in range(80):
        pc.step(x)
    weight = pyro.param("weight").detach().clone()
    assert weight.abs().max() > 0.1
    options = {"num_steps": 200, "weight_steps": 4}
    GeneralizedEM(factors, pyro.optim.SGD(decay), **options).step(x)
    torch.testing.assert_close(pyro.param("weight").detach(), weight, rtol=1e-6, atol=1e-6)


def test_one_weight_step_from_a_fresh_start_is_predictive_coding() -> None:
    x, found = data(), []
    for build in (PredictiveCoding, GeneralizedEM):
        pyro.clear_param_store()
        own = {"weight_steps": 1, "warm_start": None} if build is GeneralizedEM else {}
        loop = build(bent, pyro.optim.Adam({"lr": 0.01}), num_steps=5, **own)
        losses = [loop.step(x) for _ in range(4)]
        found.append((losses, loop.gradient_evaluations, pyro.param("second").detach().clone()))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


def test_gradients_of_the_m_step_are_counted() -> None:
    x, spent = data(), []
    for weight_steps in (1, 4):
        loop = GeneralizedEM(factors, pyro.optim.SGD({"lr": 0.0}), weight_steps=weight_steps)
        loop.step(x)
        spent.append(loop.gradient_evaluations)
    assert spent[1] - spent[0] == 3 * len(x)


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_steps must be at least 1, got 0"):
        GeneralizedEM(factors, pyro.optim.SGD({}), weight_steps=0)
    loop = GeneralizedEM(factors, pyro.optim.SGD({"lr": 0.0}), warm_start=None, mode="graph")
    loop.step(data())
    loop.step(data())
    assert [kind.reason for kind in loop.compiled] == ["the parameters move several times a step"]

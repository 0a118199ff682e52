"""Learned covariances of prediction errors, their floor, and the guard against collapse."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from guides.inference import LearnedPrecision, PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")
SGD = pyro.optim.SGD


def clamped(x: Tensor) -> None:
    """No latent reaches the data, so their errors are known: x - 1."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.ones(3), 2.0).to_event(1), obs=x)


def test_the_learned_covariance_is_that_of_the_errors_and_whitens_them() -> None:
    """T19: Sigma = E[eps eps^T] to 1e-14, Sigma^-1/2 eps has identity covariance."""
    x = torch.randn(50, 3) @ torch.randn(3, 3)
    program = LearnedPrecision(clamped, {"x": "full"}, floor=1e-9)
    pc = PredictiveCoding(program, SGD({}), num_steps=1)
    program.update(pc, x)
    error = x - 1
    sigma = program.covariance["x"]
    assert torch.allclose(sigma, error.T @ error / 50, rtol=1e-13, atol=1e-13)
    values, vectors = torch.linalg.eigh(sigma)
    white = error @ (vectors / values.sqrt()) @ vectors.T
    assert torch.allclose(white.T @ white / 50, torch.eye(3), atol=1e-12)

    # and it is the minimum of the energy in Sigma: the gradient there is zero
    moving = sigma.clone().requires_grad_()
    loss = -dist.MultivariateNormal(torch.ones(3), moving).log_prob(x).sum()
    (gradient,) = torch.autograd.grad(loss, moving)
    assert gradient.abs().max() < 1e-10
    # the diagonal of the same, blended with the first guess
    program = LearnedPrecision(clamped, {"x": "diagonal"}, floor=1e-9, rate=0.25)
    pc = PredictiveCoding(program, SGD({}), num_steps=1)
    program.update(pc, x)
    expected = 0.75 * 4 + 0.25 * error.square().mean(0)
    assert torch.allclose(program.covariance["x"], expected.diag(), atol=1e-13)


def chain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.9).to_event(1), obs=x)


def test_with_the_laplace_term_learning_is_expectation_maximization() -> None:
    """X ~ Normal(0, I + Sigma): the optimum is Sigma = cov(x) - I, and a step is the EM step."""
    root = torch.tensor([[2.0, 0.0], [0.9, 1.8]])
    x = torch.randn(400, 2) @ root.T
    x = torch.cat([x, -x])
    program = LearnedPrecision(chain, {"x": "full"}, floor=1e-6)
    pc = PredictiveCoding(program, SGD({}), num_steps=5)
    program.update(pc, x, laplace=True)
    noise = 0.81 * torch.eye(2)
    gain = torch.linalg.inv(torch.eye(2) + noise)
    left = x - x @ gain  # E[x - z | x]
    step = left.T @ left / len(x) + torch.eye(2) - gain
    assert torch.allclose(program.covariance["x"], step, atol=1e-10)
    optimum = x.T @ x / len(x) - torch.eye(2)
    program.covariance["x"].copy_(optimum)
    program.update(pc, x, laplace=True)
    assert torch.allclose(program.covariance["x"], optimum, atol=1e-10)


def test_without_it_the_floor_holds() -> None:
    """Point estimates: errors shrink the covariance, which shrinks the errors, to the floor."""
    x = torch.randn(20, 2)
    program = LearnedPrecision(chain, {"x": "diagonal"}, floor=0.01)
    pc = PredictiveCoding(program, SGD({}), num_steps=40)
    for _ in range(5):
        program.update(pc, x)
    assert torch.allclose(program.covariance["x"], 0.01 * torch.eye(2))


def test_the_floor_holds_in_directions_without_errors() -> None:
    """Two rows have errors in at most two directions of three; the third gets the floor."""
    x = 1 + torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
    program = LearnedPrecision(clamped, {"x": "full"}, floor=0.01)
    program.update(PredictiveCoding(program, SGD({}), num_steps=1), x)
    exact = torch.tensor([[4.5, 0.0, 6.0], [0.0, 2.0, 0.0], [6.0, 0.0, 8.0]])
    empty = torch.tensor([0.8, 0.0, -0.6])
    exact = exact + 0.01 * torch.outer(empty, empty)
    torch.testing.assert_close(program.covariance["x"], exact, rtol=0, atol=1e-12)


def test_learned_precision_without_a_floor_is_refused() -> None:
    for floor in (None, 0.0):
        with pytest.raises(ValueError, match=r"Learned precision needs a floor.*Pass floor="):
            LearnedPrecision(chain, {"x": "full"}, floor=floor)
    with pytest.raises(ValueError, match=r'site \'x\' must be "diagonal" or "full"'):
        LearnedPrecision(chain, {"x": "dense"}, floor=0.1)
    with pytest.raises(ValueError, match="no site 'q' to learn a covariance of"):
        LearnedPrecision(chain, {"q": "full"}, floor=0.1)(torch.zeros(1, 2))

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(1.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    with pytest.raises(NotImplementedError, match=r"Site 'x' \(Poisson"):
        LearnedPrecision(counts, {"x": "full"}, floor=0.1)(torch.zeros(2))


@pytest.mark.parametrize("inside", [True, False])
def test_a_masked_site_has_no_covariance_to_learn(inside: bool) -> None:
    """Its mask would be lost, or what it leaves out would count."""
    on = torch.tensor([True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z, 1.0)
            with pyro.poutine.mask(mask=True if inside else on):
                pyro.sample("x", fn.mask(on) if inside else fn, obs=x)

    with pytest.raises(NotImplementedError, match=r"Site 'x' is masked.*take the site out"):
        LearnedPrecision(model, {"x": "diagonal"}, floor=0.1)(torch.tensor([2.0, 100.0]))


def collapsing(x: Tensor) -> None:
    scale = pyro.param("spread", lambda: torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def test_a_scale_that_collapses_is_told_by_name() -> None:
    x = torch.randn(10)
    pc = PredictiveCoding(collapsing, pyro.optim.Adam({"lr": 0.5}), num_steps=2, solver="newton")
    with pytest.warns(UserWarning, match=r"site 'x' collapses.*parameter spread.*floor.*Langevin"):
        pc.run(25, ((x,), {}), progress=False)


@pytest.mark.filterwarnings("error")
def test_a_scale_that_only_learns_is_left_alone() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.param("spread", lambda: torch.tensor(5.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    pc = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.5}), num_steps=2)
    x = 0.05 * torch.randn(50)
    for _ in range(40):
        pc.step(x)

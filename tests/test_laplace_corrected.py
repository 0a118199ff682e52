"""Learning from the Laplace evidence, beside point estimates that diverge (T15)."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import LaplaceCorrected, PredictiveCoding
from guides.inference.laplace_guide import IndefiniteHessianError
from tests.pc_oracles import chain

pytestmark = pytest.mark.usefixtures("float64")

# Mean 1 and variance 5, exactly.
X = 1.0 + 5.0**0.5 * torch.tensor([1.0, -1.0], dtype=torch.float64)


def toy(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Maximum likelihood: w ** 2 + 1 = 5 and w mu = 1."""
    w = pyro.param("w", torch.tensor(1.0))
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)


def curved(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Non-quadratic, with a constrained latent: the mode moves with theta, and so does Lambda."""
    theta = pyro.param("theta", torch.tensor(0.4))
    with pyro.plate("data", size or len(x), subsample=index):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(rate * (theta * z[..., 0]).exp() + z[..., 1] ** 2), obs=x)


def gradient(model: Any, x: Tensor, names: list[str], **kwargs: Any) -> list[float]:
    """What a step adds to the parameters, by plain gradient descent of a tiny rate."""
    lr = 1e-7
    LaplaceCorrected(model, pyro.optim.SGD({"lr": 0.0})).step(x, **kwargs)
    store = pyro.get_param_store()
    before = {name: store[name].item() for name in names}
    LaplaceCorrected(model, pyro.optim.SGD({"lr": lr})).step(x, **kwargs)
    found = [(before[name] - store[name].item()) / lr for name in names]
    for name in names:
        store[name] = torch.tensor(before[name])
    return found


def test_on_a_linear_gaussian_program_it_is_the_evidence_and_its_gradient() -> None:
    model = chain(2, seed=1)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loop = LaplaceCorrected(model, pyro.optim.SGD({"lr": 1.0}))
    evidence = model.exact(x).log_evidence.sum()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(evidence, parameters)
    before = [p.detach().clone() for p in parameters]
    assert loop.evaluate_loss(x) == pytest.approx(-evidence.item(), rel=1e-10)
    assert loop.step(x) == pytest.approx(-evidence.item(), rel=1e-10)
    for parameter, old, grad in zip(parameters, before, grads, strict=True):
        torch.testing.assert_close(parameter.detach() - old, grad, rtol=1e-8, atol=1e-8)


def test_a_minibatch_stands_for_all_rows() -> None:
    """N/B times the evidence of its rows, the determinant included."""
    w, mu = 1.3, 0.4
    pyro.param("w", torch.tensor(w))
    pyro.param("mu", torch.tensor(mu))
    evidence = dist.Normal(w * mu, (w**2 + 1) ** 0.5).log_prob(X).sum()
    loop = LaplaceCorrected(toy, pyro.optim.SGD({"lr": 0.0}))
    found = loop.evaluate_loss(X, size=12, index=torch.tensor([7, 3]))
    assert found == pytest.approx(-6 * float(evidence), rel=1e-10)


@pytest.mark.parametrize("size", [3, 30])
def test_the_gradient_follows_the_mode(size: int) -> None:
    """Against central differences of the loss, relaxed anew; the partial derivative differs."""
    x = torch.tensor([1.0, 4.0, 9.0])
    kwargs = {"size": size, "index": torch.arange(3)}
    (found,) = gradient(curved, x, ["theta"], **kwargs)
    losses = []
    for theta in (0.4 + 1e-4, 0.4 - 1e-4):
        pyro.get_param_store()["theta"] = torch.tensor(theta)
        loop = LaplaceCorrected(curved, pyro.optim.SGD({"lr": 0.0}), num_steps=100)
        losses.append(loop.evaluate_loss(x, **kwargs))
    expected = (losses[0] - losses[1]) / 2e-4
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-3


def test_the_toy_lands_at_maximum_likelihood() -> None:
    """T15: w = 2 and mu = 1/2, where point estimates go on growing."""
    loop = LaplaceCorrected(toy, pyro.optim.Adam({"lr": 0.1}), num_steps=1)
    for _ in range(60):
        loop.step(X)
    loop.optim = pyro.optim.SGD({"lr": 0.3})
    for _ in range(50):
        loop.step(X)
    assert pyro.param("w").item() == pytest.approx(2.0, abs=1e-3)
    assert pyro.param("mu").item() == pytest.approx(0.5, abs=1e-3)


def test_point_estimates_leave_the_maximum_of_the_likelihood() -> None:
    """T15: started there, the energy still falls towards larger weights."""
    pyro.param("w", torch.tensor(2.0))
    pyro.param("mu", torch.tensor(0.5))
    loop = PredictiveCoding(toy, pyro.optim.SGD({"lr": 0.01}), solver="newton", num_steps=1)
    for _ in range(60):
        loop.step(X)
    assert pyro.param("w").item() > 2.1


def test_bad_use_is_refused() -> None:
    optim = pyro.optim.SGD({"lr": 0.1})
    with pytest.raises(ValueError, match="newton_steps must be at least 1, got 0"):
        LaplaceCorrected(toy, optim, newton_steps=0)
    with pytest.raises(ValueError, match="needs jacobian=True"):
        LaplaceCorrected(toy, optim, jacobian=False)

    def both(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(NotImplementedError, match="loc are outside of it"):
        LaplaceCorrected(both, optim).step(X)
    flat = LaplaceCorrected(both, optim, data_plate=None)
    evidence = dist.MultivariateNormal(torch.zeros(2), 2 * torch.eye(2) + 1.0).log_prob(X)
    assert flat.evaluate_loss(X) == pytest.approx(-evidence.item(), rel=1e-9)

    def saddle(x: Tensor) -> None:
        pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    # The mean of the prior is a saddle that no gradient leaves.
    with pytest.raises(IndefiniteHessianError, match="not positive definite at site 'z'"):
        LaplaceCorrected(saddle, optim).step(X.abs())

"""ForwardKL: guides trained on simulations, against exact posteriors."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.objectives import ForwardKL

pytestmark = pytest.mark.usefixtures("float64")


def exact(model: zoo.LinearGaussian, x: Tensor) -> guides.Guide:
    """An encoder that is the exact posterior, which for a linear model is linear in the data."""
    network = nn.Linear(x.shape[1], 5)
    guide = guides.make("amortized_multivariate_normal", model, x, encoder=network)
    with torch.no_grad():
        posterior = model.posterior(x)
        lam = guide.families["data"].of_gaussian(posterior.mean, posterior.scale_tril)
        scheme = guide.schemes["data"]
        inputs = torch.cat([(x - scheme.shift) / scheme.scale, torch.ones(len(x), 1)], -1)
        solution = torch.linalg.lstsq(inputs, lam).solution
        assert torch.allclose(inputs @ solution, lam)
        network.weight.copy_(solution[:-1].mT)
        network.bias.copy_(solution[-1])
    return guide


def test_the_optimum_is_the_exact_posterior() -> None:
    model = zoo.LinearGaussian(dims=(2, 4))
    x = model(size=400).detach()
    guide = exact(model, x)
    found, losses = [], []
    for _ in range(60):
        losses.append(ForwardKL().loss_and_grads(model, guide, x))
        found.append(torch.cat([p.grad.flatten() for p in guide.parameters()]))
        guide.zero_grad()
    gradients = torch.stack(found)
    z = gradients.mean(0) / (gradients.std(0) / math.sqrt(60))
    assert z.abs().max() < 4.5
    # The value is the mean entropy of the posteriors, the same for all rows of a linear model.
    entropy = float(model.posterior(x).entropy().detach().mean())
    error = float(torch.tensor(losses).std()) / math.sqrt(60)
    assert sum(losses) / 60 == pytest.approx(entropy, abs=4 * error)


def test_training_finds_it() -> None:
    model = zoo.LinearGaussian(dims=(2, 4))
    x = model(size=400).detach()
    guide = exact(model, x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    posterior = model.posterior(x)

    def distance() -> float:
        q = guide.families["data"].distribution(guide.parameters_of(x)["data"])
        return float(torch.distributions.kl_divergence(posterior, q).mean().detach())

    assert distance() > 0.2
    optim = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.99}
    )
    svi = SVI(model, guide, optim, ForwardKL())
    for _ in range(350):
        svi.step(x)
        optim.step()
    assert distance() < 0.02


@pytest.mark.parametrize("options", [{}, {"size": 50}, {"num_particles": 3}])
def test_only_the_guide_learns_and_the_data_do_not_matter(options: dict[str, int]) -> None:
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,))
    x = model(size=20).detach()
    guide = guides.make("amortized_normal", model, x, hidden=(4,))
    objective = ForwardKL(**options)
    losses = []
    for data in (x, 1 - x, x[:20]):
        torch.manual_seed(0)
        losses.append(objective.loss_and_grads(model, guide, data))
    assert losses[0] == losses[1] == losses[2]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in guide.parameters())
    simulated = objective.draw(model, x)
    assert len(simulated[2]["z1"]) == options.get("size", 20)
    assert not simulated[2]["z1"].requires_grad
    if "size" in options:
        assert objective.loss(model, guide) < math.inf


def test_a_call_without_data_simulates() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    x = model(size=20).detach()
    guide = guides.make("amortized_normal", model, x)
    args, kwargs, values = ForwardKL().draw(model, size=7)
    bound = {**dict(zip(("x",), args, strict=False)), **kwargs}
    assert bound["x"].shape == (7, 4)
    assert values["z"].shape == (7, 2)
    assert math.isfinite(ForwardKL().loss(model, guide, size=7))


def positive(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Constrained latents: a rate and a simplex."""
    with pyro.plate("data", size or len(x), subsample=index):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.deterministic("twice", 2 * rate)
        pyro.sample("x", dist.Poisson(rate.unsqueeze(-1) * weights).to_event(1), obs=x)


@pytest.mark.parametrize("name", ["amortized_normal", "amortized_spline_coupling"])
def test_constrained_latents_are_scored_with_their_jacobians(name: str) -> None:
    x = torch.poisson(torch.ones(6, 3))
    guide = guides.make(name, positive, x)
    values = {"rate": torch.rand(6) + 0.5, "weights": dist.Dirichlet(torch.ones(3)).sample((6,))}
    found = ForwardKL().log_q(guide, values, x)
    assert found.shape == (6,)
    q = guide.families["data"].distribution(guide.parameters_of(x)["data"])
    maps = [
        torch.distributions.biject_to(site.fn.support) for site in guide.layout(x).sites.values()
    ]
    raw = [m.inv(values[n]) for m, n in zip(maps, values, strict=True)]
    expected = q.log_prob(torch.cat([raw[0].unsqueeze(-1), raw[1]], -1))
    expected = expected - maps[0].log_abs_det_jacobian(raw[0], values["rate"])
    expected = expected - maps[1].log_abs_det_jacobian(raw[1], values["weights"])
    assert torch.allclose(found, expected)
    assert math.isfinite(ForwardKL(2).loss(positive, guide, x))
    rows = torch.tensor([1, 4])
    assert math.isfinite(ForwardKL().loss(positive, guide, x[rows], size=6, index=rows))


def test_the_simulator_of_the_caller() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.log())

    def simulate(x: Tensor) -> Any:
        z = torch.randn(len(x))
        return ((z + torch.randn(len(x))).exp(),), {}, {"z": z}

    x = torch.rand(5) + 0.5
    guide = guides.make("amortized_normal", model, x)
    assert math.isfinite(ForwardKL(simulate=simulate).loss(model, guide, x))
    with pytest.raises(ValueError, match="no argument of the model is its value itself"):
        ForwardKL().loss(model, guide, x)
    assert "simulate" in repr(ForwardKL(simulate=simulate))


def test_handwritten_guides() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(slope * x, 1.0))

    x = torch.randn(6)
    z = torch.rand(6)
    found = ForwardKL().log_q(guide, {"z": z}, x, model=model)
    assert torch.allclose(found, dist.LogNormal(0.3 * x, 1.0).log_prob(z))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), ForwardKL())
    before = pyro.param("slope").item()
    svi.step(x)
    assert pyro.param("slope").item() != before
    with pytest.raises(TypeError, match="needs model="):
        ForwardKL().log_q(guide, {"z": z}, x)
    auto = pyro.infer.autoguide.AutoNormal(
        model, create_plates=lambda x: pyro.plate("data", len(x), dim=-1)
    )
    auto(x)
    with pytest.raises(TypeError, match="no density of the latents themselves"):
        ForwardKL().loss(model, auto, x)


def test_what_cannot_be_trained_so_is_refused() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    x = model(size=4).detach()
    with pytest.raises(ValueError, match="needs an amortized guide"):
        ForwardKL().loss(model, guides.make("normal", model, x), x)

    def with_global(x: Tensor) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    y = torch.randn(4)
    with pytest.raises(ValueError, match="g would be simulated"):
        ForwardKL().loss(with_global, guides.make("amortized_normal", with_global, y), y)

    def with_factor(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("extra", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guides.make("amortized_normal", with_factor, y)
    with pytest.raises(ValueError, match="adds a factor"):
        ForwardKL().loss(with_factor, guide, y)
    with pytest.raises(ValueError, match="size= needs a model that simulates by itself"):
        ForwardKL(size=5).loss(with_factor, guide, y)
    with pytest.raises(ValueError, match="size must be an integer"):
        ForwardKL(size=0)
    with pytest.raises(ValueError, match="not both"):
        ForwardKL(size=3, simulate=lambda x: x)
    delta = guides.make("amortized_delta", model, x)
    with pytest.raises(ValueError, match="needs a guide with a density"):
        ForwardKL().loss(model, delta, x)


@pytest.mark.parametrize("name", ["top_down_normal", "semi_amortized_normal"])
def test_the_model_gets_no_gradient_through_a_guide_that_runs_it(name: str) -> None:
    class Chain(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                top = pyro.sample("top", dist.Normal(0.0, 1.0))
                low = pyro.sample("low", dist.Normal(self.weight * top, 1.0))
                pyro.sample("x", dist.Normal(low, 0.5), obs=x)

    model, x = Chain(), torch.linspace(-1.0, 1.0, 5)
    guide = guides.make(name, model, x, hidden=(4,))
    objective = ForwardKL()
    torch.manual_seed(0)
    objective(model, guide)(x).backward()
    assert model.weight.grad is None or model.weight.grad.abs() < 1e-6
    # Those of the guide are untouched.
    torch.manual_seed(0)
    args, kwargs, values = objective.draw(model, x)
    wanted = torch.autograd.grad(
        -objective.log_q(guide, values, *args, **kwargs).mean(), list(guide.parameters())
    )
    for parameter, gradient in zip(guide.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_parameter_of_the_store_learns_nothing_from_simulations() -> None:
    """Nor later: a step of another objective after a step of sleep is that step alone."""

    def model(x: Tensor) -> None:
        weight = pyro.param("weight", torch.tensor(1.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)

    x = torch.randn(20)
    guide = guides.make("semi_amortized_normal", model, x)
    still = pyro.optim.SGD({"lr": 0.0})
    found = []
    for sleep in (0, 2):
        for _ in range(sleep):
            SVI(model, guide, still, ForwardKL()).step(x)
        weight = pyro.get_param_store()["weight"]
        assert weight.grad is None or weight.grad == 0
        torch.manual_seed(1)
        Trace_ELBO().loss_and_grads(model, guide, x)
        found.append(weight.grad.clone())
        weight.grad = None
        guide.zero_grad()
    assert found[0] != 0
    assert found[0] == found[1]


def test_a_step_that_a_row_lacks_counts_for_nothing() -> None:
    def model(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(on)):
            z = torch.zeros(len(on))
            for t in range(on.shape[1]):
                with poutine.mask(mask=on[:, t]):
                    z = pyro.sample(f"z_{t}", dist.LogNormal(0.5 * z, 0.5))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x = torch.randn(3, 4)
    on = torch.arange(4) < torch.tensor([[4], [2], [0]])
    guide = guides.make("filtering_normal", model, x, on, recurrent=4, hidden=4)
    values = {f"z_{t}": torch.rand(3) + 0.5 for t in range(4)}
    found = ForwardKL().log_q(guide, values, x, on)
    short = {f"z_{t}": values[f"z_{t}"][1:2] for t in range(2)}
    alone = ForwardKL().log_q(guide, short, x[1:2, :2], on[1:2, :2])
    torch.testing.assert_close(found[1:2], alone)
    assert found[2] == 0
    loss = ForwardKL(simulate=lambda x, on: ((x, on), {}, values)).loss_and_grads(
        *(model, guide, x, on & False)
    )
    assert loss == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in guide.parameters())

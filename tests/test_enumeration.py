"""Discrete latents summed out exactly (T23e)."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import guides
from guides.draws import over_draws
from guides.energy import LogJoint
from guides.enumeration import enumerated
from guides.inference import PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")

LOCS = [-2.0, 0.5, 3.0]
WEIGHTS = [0.2, 0.5, 0.3]


def mixture(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    locs = pyro.param("locs", lambda: torch.tensor(LOCS))
    with pyro.plate("data", size or len(x), subsample=index):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        z = pyro.sample("z", dist.Normal(locs[k], 0.7))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def by_hand(x: Tensor, z: Tensor) -> Tensor:
    """The joint as a mixture distribution of z."""
    prior = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor(WEIGHTS)), dist.Normal(torch.tensor(LOCS), 0.7)
    )
    return prior.log_prob(z) + dist.Normal(z, 1.0).log_prob(x)


def test_the_energy_is_that_of_the_mixture_distribution() -> None:
    x = torch.tensor([-1.0, 0.4, 2.0, 2.5])
    z = torch.randn(4)
    rows, other = LogJoint(enumerated(mixture), (x,)).rows({"z": z})
    assert torch.allclose(rows, by_hand(x, z), atol=1e-12)
    assert float(other) == 0
    # a minibatch: no N/B in a row
    index = torch.tensor([3, 1])
    part, _ = LogJoint(enumerated(mixture), (x[index],), {"size": 4, "index": index}).rows(
        {"z": z[index]}
    )
    assert torch.allclose(part, rows[index], atol=1e-12)


def test_predictive_coding_on_the_marginal_is_exact_enumeration() -> None:
    """The relaxed state is the minimum over a grid, the responsibilities are Bayes' rule."""
    x = torch.tensor([-1.0, 0.4, 2.0, 2.5])
    program = enumerated(mixture)
    pc = PredictiveCoding(program, pyro.optim.SGD({}), num_steps=200)
    z = pc.infer(x)["z"]
    moving = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(by_hand(x, moving).sum(), moving)
    assert gradient.abs().max() < 1e-8
    found = program.probabilities({"z": z}, x)["k"]
    log = dist.Normal(torch.tensor(LOCS), 0.7).log_prob(z.unsqueeze(-1))
    expected = (log + torch.tensor(WEIGHTS).log()).softmax(-1)
    assert torch.allclose(found, expected, atol=1e-12)


def test_parameters_learn_at_the_gradient_of_the_sum() -> None:
    x = torch.tensor([-1.0, 2.5])
    pc = PredictiveCoding(enumerated(mixture), pyro.optim.SGD({"lr": 1.0}), num_steps=100)
    z = pc.infer(x)["z"]
    locs = torch.tensor(LOCS).requires_grad_()
    prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor(WEIGHTS)), dist.Normal(locs, 0.7))
    (gradient,) = torch.autograd.grad(prior.log_prob(z).sum(), locs)
    pc.step(x)
    assert torch.allclose(pyro.param("locs"), torch.tensor(LOCS) + gradient, atol=1e-8)


def test_draws_of_a_score_are_kept_apart() -> None:
    x = torch.tensor([-1.0, 2.5])
    log_joint = LogJoint(enumerated(mixture), (x,))
    z = torch.randn(5, 2)
    rows, _ = over_draws(log_joint.rows, {"z": z}, log_joint.layout)
    assert torch.allclose(rows, by_hand(x, z), atol=1e-12)


def test_several_sites_are_summed_jointly() -> None:
    """Two choices a row, one of them a switch of the data: evidence in closed form."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.OneHotCategorical(torch.tensor([0.6, 0.4])))
            z = pyro.sample("z", dist.Normal(2 * a + (b * torch.tensor([0.0, 0.5])).sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + a), obs=x)

    x = torch.tensor([0.3, 2.0])
    marginal = enumerated(program)
    exact = [
        torch.tensor(p * q).log() + dist.Normal(2 * a + m, (1 + (1 + a) ** 2) ** 0.5).log_prob(x)
        for a, p in ((0, 0.7), (1, 0.3))
        for m, q in ((0.0, 0.6), (0.5, 0.4))
    ]
    grid = torch.linspace(-12, 14, 2601)
    for value, expected in zip(x, torch.stack(exact).logsumexp(0), strict=True):
        # every point of the grid is a row
        rows, _ = LogJoint(marginal, (value.expand(len(grid)),)).rows({"z": grid})
        assert torch.allclose(torch.trapezoid(rows.exp(), grid).log(), expected, atol=1e-8)
    found = marginal.probabilities({"z": torch.zeros(2)}, x)
    assert found["a"].shape == found["b"].shape == (2, 2)
    assert torch.allclose(found["a"].sum(-1), torch.ones(2))


def test_discrete_latents_without_enumeration_are_refused_with_the_fix() -> None:
    x = torch.zeros(2)
    with pytest.raises(NotImplementedError, match=r"site 'k' is discrete.*enumerated\(model\)"):
        PredictiveCoding(mixture, pyro.optim.SGD({})).infer(x)
    with pytest.raises(NotImplementedError, match=r"site 'k' is discrete"):
        guides.make("normal", mixture, x)


def test_what_cannot_be_summed_row_by_row_is_refused() -> None:
    x = torch.zeros(2)

    def nested(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("inner", 3):
            pyro.sample("k", dist.Bernoulli(0.5))

    def outside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("sum", dist.Normal(k.sum(), 1.0), obs=torch.tensor(1.5))

    def endless(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Poisson(1.0))

    with pytest.raises(NotImplementedError, match="several values a row"):
        enumerated(nested)(x)
    with pytest.raises(ValueError, match="Site 'sum' lies outside plate 'data'"):
        enumerated(outside)(x)
    with pytest.raises(NotImplementedError, match="no finite support"):
        enumerated(endless)(x)
    with pytest.raises(ValueError, match="3 joint values a row, more than limit=2"):
        enumerated(mixture, limit=2)(x)
    with pytest.raises(ValueError, match="no discrete latent"):
        enumerated(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)))(x)

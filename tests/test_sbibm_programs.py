"""The likelihoods of the three sbibm tasks, against reference draws and independent densities.

The excerpt holds 500 draws of one observation a task that the benchmark's authors made, by closed
forms for the tasks in two dimensions and by rejection for SLCP.
"""

import json
import math
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

import zoo
from zoo.reference.two_moons import Crescent

pytestmark = pytest.mark.usefixtures("float64")

EXCERPT = json.loads(Path(__file__).with_name("sbibm_excerpt.json").read_text())["tasks"]
TWO_D = ("two_moons", "gaussian_mixture")


def excerpt(task: str) -> tuple[Tensor, Tensor]:
    return torch.tensor(EXCERPT[task]["x"]), torch.tensor(EXCERPT[task]["draws"])


def log_posterior(model, theta: Tensor, x: Tensor) -> Tensor:
    """Log prior + log likelihood ``(...)`` from the program itself, theta ``(..., K)``."""
    rows = theta.reshape(-1, theta.shape[-1])
    data = x.expand(len(rows), -1)
    trace = poutine.trace(poutine.condition(model, {"theta": rows})).get_trace(data)
    trace.compute_log_prob()
    total = trace.nodes["theta"]["log_prob"] + trace.nodes["x"]["log_prob"]
    return total.detach().reshape(theta.shape[:-1])


# --- against the reference draws --------------------------------------------------------------


@pytest.mark.parametrize("task", TWO_D)
def test_reference_draws_follow_the_posterior_on_a_grid(task) -> None:
    """Rosenblatt's transform: F(theta_1) and F(theta_2 | theta_1) of true draws are uniform."""
    model = zoo.make(task)
    x, draws = excerpt(task)
    bound = float(model.bound[0])
    # The core of the mixture and the width of the moons are 1 / 200 of the box.
    grid = torch.linspace(-bound, bound, 2001)
    cells = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    density = log_posterior(model, cells, x).exp()
    marginal = torch.trapezoid(density, grid, dim=-1)
    first = cumulative(marginal, grid, draws[:, 0])
    lines = torch.stack(
        torch.broadcast_tensors(draws[:, 0, None], grid.unsqueeze(0)), -1
    )  # (500, 2001, 2)
    second = torch.stack(
        [
            cumulative(row, grid, value)
            for row, value in zip(log_posterior(model, lines, x).exp(), draws[:, 1], strict=True)
        ]
    )
    for transformed in (first, second):
        assert stats.kstest(transformed.numpy(), "uniform").pvalue > 1e-3
    assert abs(stats.spearmanr(first, second).statistic) < 4 / len(draws) ** 0.5


def cumulative(density: Tensor, grid: Tensor, at: Tensor) -> Tensor:
    areas = torch.cumulative_trapezoid(density, grid)
    total = torch.cat([areas.new_zeros(1), areas]) / areas[-1]
    return torch.as_tensor(np.interp(at.numpy(), grid.numpy(), total.numpy()))


def stein_z_scores(log_likelihood, theta: Tensor, bound: float) -> Tensor:
    """E[f d log p / d theta + d f / d theta] = 0 for f that vanishes at the edge of the box.

    Two f a coordinate, ``bound^2 - theta^2`` and that times theta: means over standard errors.
    """
    theta = theta.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_likelihood(theta).sum(), theta)
    theta = theta.detach()
    edge = bound**2 - theta**2
    terms = torch.stack([score * edge - 2 * theta, score * edge * theta + edge - 2 * theta**2], 1)
    return terms.mean(0) / (terms.std(0) / len(terms) ** 0.5)


def test_reference_draws_of_slcp_satisfy_steins_identity() -> None:
    """Five dimensions are too many for a grid."""
    model = zoo.make("slcp")
    x, draws = excerpt("slcp")
    z = stein_z_scores(lambda theta: model.likelihood(theta).log_prob(x), draws, 3.0)
    assert z.abs().max() < 4

    def without_squares(theta: Tensor) -> Tensor:
        first, scales, last = theta.split([2, 2, 1], -1)
        return model.likelihood(torch.cat([first, scales.abs().sqrt(), last], -1)).log_prob(x)

    def arctangent(theta: Tensor) -> Tensor:
        return model.likelihood(torch.cat([theta[:, :4], theta[:, 4:].atan()], -1)).log_prob(x)

    for wrong in (without_squares, arctangent):
        assert stein_z_scores(wrong, draws, 3.0).abs().max() > 10


# --- against independent densities ------------------------------------------------------------


def test_slcp_is_four_points_of_a_gaussian() -> None:
    model = zoo.make("slcp")
    theta = model.bound * (2 * torch.rand(50, 5) - 1)
    x = 3 * torch.randn(50, 8)
    found = model.likelihood(theta).log_prob(x)
    for row, point, value in zip(theta.numpy(), x.numpy(), found, strict=True):
        s1, s2, rho = row[2] ** 2, row[3] ** 2, math.tanh(row[4])
        covariance = np.array([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]]) + 1e-6 * np.eye(2)
        expected = stats.multivariate_normal(row[:2], covariance).logpdf(point.reshape(4, 2))
        assert value.item() == pytest.approx(expected.sum(), rel=1e-7)


def test_slcp_is_finite_where_its_covariance_is_singular() -> None:
    """In float32, with both scales at zero or the correlation at its end."""
    model = zoo.make("slcp").float()
    theta = torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 1e-4, 3, 3], [0, 0, 3, 3, 3]]).float()
    theta.requires_grad_()
    total = model.likelihood(theta).log_prob(torch.ones(3, 8).float())
    (gradient,) = torch.autograd.grad(total.sum(), theta)
    assert torch.isfinite(total).all()
    assert torch.isfinite(gradient).all()


def test_gaussian_mixture_shares_its_scale_between_coordinates() -> None:
    theta, x = torch.randn(50, 2), torch.randn(50, 2)
    found = zoo.make("gaussian_mixture").likelihood(theta).log_prob(x)
    parts = [dist.Normal(theta, scale).log_prob(x).sum(-1) for scale in (1.0, 0.1)]
    expected = torch.logaddexp(*parts) - math.log(2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("leak", [0.0, 0.2])
def test_the_crescent_integrates_to_one(leak) -> None:
    crescent = Crescent(torch.tensor([0.3, -0.2]), leak=leak)
    step = 2e-4
    fine = step * (torch.arange(-1000, 1000) + 0.5)  # the density jumps at 0, between two cells
    points = crescent.loc + torch.stack(torch.meshgrid(fine, fine, indexing="ij"), -1)
    inside = crescent.log_prob(points).exp().sum().item() * step**2
    square = math.erf(0.2 / (0.5 * math.sqrt(2))) ** 2  # of the wide Gaussian's mass
    assert inside == pytest.approx((1 - leak) + leak * square, abs=2e-4)


def test_the_crescent_is_half_a_ring() -> None:
    """Draws have uniform angles and Gaussian radii, and the entropy of polar coordinates."""
    crescent = Crescent(torch.tensor([0.3, -0.2]))
    draws = crescent.sample((20_000,)) - crescent.loc
    angle = torch.atan2(draws[:, 1], draws[:, 0]) / math.pi + 0.5
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(draws.norm(dim=-1).numpy(), "norm", (0.1, 0.01)).pvalue > 1e-3
    r = 0.1 + 0.01 * torch.linspace(-8, 8, 4001)
    mean_log_r = torch.trapezoid(dist.Normal(0.1, 0.01).log_prob(r).exp() * r.log(), r).item()
    entropy = math.log(math.pi) + mean_log_r + 0.5 * math.log(2 * math.pi * math.e * 1e-4)
    log_p = crescent.log_prob(draws + crescent.loc)
    error = 4 * log_p.std().item() / len(draws) ** 0.5
    assert -log_p.mean().item() == pytest.approx(entropy, abs=error)


def test_the_crescent_ends_where_its_half_plane_does() -> None:
    points = torch.tensor([[-0.1, 0.0], [0.0, 0.1], [0.0, 0.0]])
    assert Crescent(torch.zeros(2)).log_prob(points).tolist() == [-math.inf] * 3


def test_a_leak_keeps_densities_and_gradients_finite() -> None:
    loc = torch.zeros(5, 2, requires_grad=True)
    points = torch.tensor([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.0], [5.0, 5.0], [1e-9, 0.0]])
    log_p = Crescent(loc, leak=1e-3).log_prob(points)
    (gradient,) = torch.autograd.grad(log_p.sum(), loc, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), loc)
    assert torch.isfinite(log_p).all()
    assert torch.isfinite(gradient).all()
    assert torch.isfinite(second).all()
    wide = dist.Normal(torch.zeros(2), 0.5).to_event(1).log_prob(points) + math.log(1e-3)
    torch.testing.assert_close(log_p[1:4], wide[1:4])
    exact = Crescent(torch.zeros(2)).log_prob(points[0])
    assert log_p[0].item() == pytest.approx(
        math.log(0.999 * exact.exp() + math.exp(wide[0])), abs=1e-12
    )
    leaking = Crescent(torch.zeros(2), leak=0.5).sample((10_000,))
    share = (leaking.norm(dim=-1) > 0.15).double().mean().item()
    assert share == pytest.approx(0.5 * math.exp(-(0.15**2) / (2 * 0.25)), abs=0.02)


@pytest.mark.parametrize("leak", [-0.1, 1.0])
def test_a_leak_out_of_range(leak) -> None:
    with pytest.raises(ValueError, match="leak must be 0 or above and below 1"):
        zoo.make("two_moons", leak=leak)
    with pytest.raises(ValueError, match="leak must be 0 or above and below 1"):
        Crescent(torch.zeros(2), leak=leak)


def test_two_moons_are_mirror_images() -> None:
    """The sign of theta_1 + theta_2 cannot be told from data."""
    model = zoo.make("two_moons")
    theta = 2 * torch.rand(50, 2) - 1
    x = model.likelihood(theta).sample()
    found = model.likelihood(theta).log_prob(x)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(model.likelihood(-theta.flip(-1)).log_prob(x), found)

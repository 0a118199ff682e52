"""Gradient estimators: unbiased, and quiet where their papers say so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.guide import Guide, ProgramGuide
from guides.objectives import IWELBO, STL, AnalyticELBO, DReG, Renyi
from guides.schemes.scheme import Call
from guides.sites import Group

pytestmark = pytest.mark.usefixtures("float64")


def flat_gradient(objective: Any, model: Any, guide: Any, *args: Any, of: Any = None) -> Tensor:
    """The gradient of the guide's parameters (or others) as one vector."""
    parameters = list((guide if of is None else of).parameters())
    for parameter in parameters:
        parameter.grad = None
    objective.loss_and_grads(model, guide, *args)
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


def many(objective: Any, model: Any, guide: Any, *args: Any, number: int) -> Tensor:
    return torch.stack([flat_gradient(objective, model, guide, *args) for _ in range(number)])


def agree(first: Tensor, second: Tensor) -> None:
    """Two samples of gradients have one mean: a chi-square of all coordinates, and each alone."""
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    live = error > 1e-12
    z = ((first - second.mean(0)).mean(0) / error)[live]
    assert live.any()
    assert z.abs().max() < 5
    assert z.square().mean() < 1 + 6 * math.sqrt(2 / len(z))
    assert torch.allclose(first.mean(0)[~live], second.mean(0)[~live], atol=1e-9)


def exact_ppca() -> tuple[zoo.LinearGaussian, Tensor, Guide]:
    model = zoo.LinearGaussian(dims=(3, 6), covariance=("unit", "isotropic"), bias=(False, True))
    x = model(size=5).detach()
    guide = guides.make("multivariate_normal", model, x)
    posterior = model.posterior(x)
    with torch.no_grad():
        family = guide.families["data"]
        table = guide.schemes["data"].table
        table.copy_(family.of_gaussian(posterior.mean, posterior.scale_tril))
        # Scales have a floor of 1e-8, which of_gaussian leaves in; here q is to be exact.
        raw = table[:, 3:6]
        target = posterior.scale_tril.diagonal(dim1=-2, dim2=-1)
        for _ in range(3):
            raw -= (family.scale_tril(table).diagonal(dim1=-2, dim2=-1) - target) / raw.sigmoid()
    return model, x, guide


def test_stl_is_zero_at_the_exact_posterior_for_every_draw() -> None:
    model, x, guide = exact_ppca()
    for num_particles in (1, 3):
        found = flat_gradient(STL(num_particles), model, guide, x)
        assert found.abs().max() < 1e-8
    assert flat_gradient(Trace_ELBO(), model, guide, x).abs().max() > 1e-2
    # The model's gradient is the ordinary one: that of the log evidence, at the exact posterior.
    number = 200
    found = torch.stack([flat_gradient(STL(20), model, guide, x, of=model) for _ in range(number)])
    for parameter in model.parameters():
        parameter.grad = None
    (-model.log_evidence(x).sum()).backward()
    exact = torch.cat([p.grad.flatten() for p in model.parameters()])
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(number))
    assert z.abs().max() < 5


@pytest.mark.parametrize("family", ["normal", "multivariate_normal", "spline_coupling"])
def test_stl_is_unbiased_elsewhere(family: str) -> None:
    options = {
        "spline_coupling": {"transforms": 2, "bins": 3, "family_hidden": (4,), "context": 2}
    }
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    x = model(size=3).detach()
    guide = guides.make(f"amortized_{family}", model, x, hidden=(3,), **options.get(family, {}))
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    agree(
        many(STL(200), model, guide, x, number=40),
        many(Renyi(1.0, 200), model, guide, x, number=40),
    )


def test_analytic_gradients_are_unbiased() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    x = model(size=3).detach()
    guide = guides.make("amortized_normal", model, x, hidden=(3,), init_scale=0.7)
    agree(
        many(AnalyticELBO(200), model, guide, x, number=40),
        many(Renyi(1.0, 200), model, guide, x, number=40),
    )


def shared_mean(x: Tensor) -> None:
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Conditional(ProgramGuide):
    """q(g) q(z_n | g): the rows' mean follows the global draw."""

    def __init__(self, model: Any, x: Tensor) -> None:
        super().__init__(model, (x,), {})
        precision = 1 + len(x) / 2
        self.loc = nn.Parameter((x.sum() / 2 / precision).reshape(1))
        self.log_scale = nn.Parameter(torch.tensor([-0.5 * math.log(precision)]))
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.offset = nn.Parameter((x / 2).reshape(-1, 1))
        self.log_row_scale = nn.Parameter(torch.full((len(x), 1), -0.5 * math.log(2)))

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        if group.plate is None:
            return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        loc = self.offset + self.slope * upstream["global"]
        return dist.Normal(loc, self.log_row_scale.exp()).to_event(1)


def test_groups_that_follow_others_keep_the_path_through_them() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])
    guide = Conditional(shared_mean, x)
    assert flat_gradient(STL(3), shared_mean, guide, x).abs().max() < 1e-10
    # The rows are exact given g, so whatever K the inner weights are constant.
    found = flat_gradient(DReG(4, num_outer=2), shared_mean, guide, x)
    names = [name for name, p in guide.named_parameters() for _ in range(p.numel())]
    local = torch.tensor([name not in ("loc", "log_scale") for name in names])
    assert found[local].abs().max() < 1e-10
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    agree(
        many(STL(300), shared_mean, guide, x, number=40),
        many(Renyi(1.0, 1, num_outer=300), shared_mean, guide, x, number=40),
    )
    agree(
        many(DReG(5, num_outer=400), shared_mean, guide, x, number=40),
        many(IWELBO(5, num_outer=400), shared_mean, guide, x, number=40),
    )


class TwoLevels(ProgramGuide):
    """q(top) q(bottom | top), both of the data plate."""

    def __init__(self, model: Any, x: Tensor) -> None:
        super().__init__(model, (x,), {})
        self._split({"top": ["z2"], "bottom": ["z1"]})
        self.top = nn.Parameter(torch.zeros(len(x), 2))
        self.bottom = nn.Parameter(torch.zeros(len(x), 2))
        self.slope = nn.Parameter(torch.tensor(0.4))
        self.scales = nn.Parameter(torch.tensor([0.8, 0.5]))

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        if group.name == "top":
            return dist.Normal(self.top, self.scales[0]).to_event(1)
        loc = self.bottom + self.slope * upstream["top"]
        return dist.Normal(loc, self.scales[1]).to_event(1)


@pytest.mark.parametrize("objective", ["stl", "dreg"])
def test_levels_of_a_row_are_unbiased(objective: str) -> None:
    model = zoo.LinearGaussian(dims=(2, 2, 3))
    x = model(size=2).detach()
    guide = TwoLevels(model, x)
    pairs = {
        "stl": (STL(400), Renyi(1.0, 400)),
        "dreg": (DReG(4, num_outer=400), IWELBO(4, num_outer=400)),
    }
    first, second = pairs[objective]
    agree(many(first, model, guide, x, number=40), many(second, model, guide, x, number=40))


def shifted_ppca() -> tuple[zoo.LinearGaussian, Tensor, Guide]:
    """Near the posterior, but off: where gradients have a mean, and weights differ."""
    model, x, guide = exact_ppca()
    with torch.no_grad():
        table = guide.schemes["data"].table
        table.add_(0.15 * torch.randn_like(table))
    return model, x, guide


def test_dreg_is_unbiased() -> None:
    model, x, guide = shifted_ppca()
    agree(
        many(DReG(8, num_outer=300), model, guide, x, number=40),
        many(IWELBO(8, num_outer=300), model, guide, x, number=40),
    )


def test_dreg_with_one_draw_is_stl() -> None:
    model, x, guide = shifted_ppca()
    torch.manual_seed(0)
    first = flat_gradient(DReG(1), model, guide, x)
    torch.manual_seed(0)
    assert torch.allclose(first, flat_gradient(STL(1), model, guide, x), atol=1e-12)


def test_the_models_gradient_is_that_of_the_bound() -> None:
    model, x, guide = shifted_ppca()
    torch.manual_seed(0)
    first = flat_gradient(DReG(16), model, guide, x, of=model)
    torch.manual_seed(0)
    second = flat_gradient(IWELBO(16), model, guide, x, of=model)
    assert torch.allclose(first, second, atol=1e-12)


def test_dregs_signal_stands_above_its_noise() -> None:
    model, x, guide = shifted_ppca()

    def signal_to_noise(objective: Any) -> float:
        found = many(objective, model, guide, x, number=150)
        return float((found.mean(0).abs() / found.std(0)).median())

    ours, plain = signal_to_noise(DReG(64)), signal_to_noise(IWELBO(64))
    assert ours > 2 * plain


def test_families_that_cannot_score_points_are_refused() -> None:
    model, x, guide = exact_ppca()
    guide.families["data"].scores_external_points = False
    for objective in (STL(), DReG(2)):
        with pytest.raises(NotImplementedError, match="cannot score points that it did not draw"):
            objective.loss(model, guide, x)
    assert math.isfinite(IWELBO(2).loss(model, guide, x))

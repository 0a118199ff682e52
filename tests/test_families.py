"""Families: densities that integrate to one, derivatives, exact parameters, torch.func."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

from guides.families import FAMILIES
from guides.families.delta import Delta
from guides.families.family import Family, inverse_softplus, positive
from guides.families.multivariate_normal import MultivariateNormal
from guides.families.normal import Normal
from guides.families.spline_coupling import SplineCoupling

pytestmark = pytest.mark.usefixtures("float64")

_NETWORK = {"hidden": (8,), "context": 3}

# One row a family: its smallest options.
DENSITIES: dict[str, dict[str, Any]] = {
    "normal": {},
    "multivariate_normal": {},
    "low_rank_normal": {},
    "student_t": {},
    "mixture": {"components": 3},
    "lateral_cholesky": {},
    "lateral_symmetric": {},
    "planar": {"transforms": 2},
    "radial": {"transforms": 2},
    "householder": {"transforms": 3},
    "sylvester": {"transforms": 2},
    "iaf": {**_NETWORK, "transforms": 2},
    "affine_coupling": {**_NETWORK, "transforms": 2},
    "spline_coupling": {**_NETWORK, "transforms": 3, "bins": 5},
    "monotone": {**_NETWORK, "transforms": 1, "signal": 2},
}
GAUSSIANS = ("multivariate_normal", "lateral_cholesky", "lateral_symmetric", "householder")


def make(name: str, size: int, **options: Any) -> Family:
    module, _, attribute = FAMILIES[name].partition(":")
    made: Family = getattr(importlib.import_module(module), attribute)(size, **options)
    return made


def randomized(
    name: str, size: int, batch: int = 4, strength: float = 1.0
) -> tuple[Family, torch.Tensor]:
    """A family away from its start: weights far from small, parameters of every row its own."""
    torch.manual_seed(size)
    family = make(name, size, **DENSITIES[name])
    with torch.no_grad():
        for parameter in family.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.copy_(strength * torch.randn_like(parameter) / math.sqrt(fan_in))
    lam = torch.randn(batch, family.num_params)
    lam[..., : 2 * size] *= 0.7
    return family, lam


def test_every_family_with_a_density_is_tested_here() -> None:
    # What auxiliary returns is a bound; its tests are in a file of their own.
    missing = set(FAMILIES) - set(DENSITIES) - {"delta", "auxiliary"}
    assert not missing, f"add rows to DENSITIES in tests/test_families.py: {sorted(missing)}"
    assert set(DENSITIES) < set(FAMILIES)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_draws_carry_the_density_of_their_points(name: str, size: int) -> None:
    family, lam = randomized(name, size)
    value, log_q = family.rsample_and_log_prob(lam, (7,))
    assert value.shape == (7, 4, size)
    assert log_q.shape == (7, 4)
    # A clone hides that the points are the family's own: they are scored by the inverse pass.
    assert torch.allclose(family.log_prob(lam, value.clone()), log_q, atol=1e-6)
    q = family.distribution(lam)
    assert q.batch_shape == (4,)
    assert q.event_shape == (size,)


@pytest.mark.parametrize("name", DENSITIES)
def test_the_density_integrates_to_one(name: str) -> None:
    # A grid sees only densities without spikes; the Jacobian tests bend the flows harder.
    family, lam = randomized(name, 2, batch=1, strength=0.5)
    draws = family.rsample_and_log_prob(lam[0], (20_000,))[0].detach()
    low, high = draws.amin(0) - 1.0, draws.amax(0) + 1.0
    number = 100 if name == "monotone" else 450
    axes = [torch.linspace(float(a), float(b), number) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    with torch.no_grad():
        mass = family.log_prob(lam[0].expand(len(grid), -1), grid).exp().sum() * cell
    assert mass.item() == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 3])
def test_the_start_is_narrow_and_where_it_should_be(name: str, size: int) -> None:
    family = make(name, size, **DENSITIES[name])
    loc = torch.linspace(-2.0, 3.0, size)
    lam = family.init(loc)
    assert lam.shape == (family.num_params,)
    assert torch.equal(family.location(lam), loc)
    assert torch.equal(family.location(family.moved(lam, loc + 1)), loc + 1)
    assert family.init(loc.expand(4, 2, size)).shape == (4, 2, family.num_params)
    draws = family.rsample_and_log_prob(lam, (4000,))[0]
    assert torch.allclose(draws.std(0), torch.full((size,), 0.1), rtol=0.1)
    assert torch.allclose(draws.mean(0), loc, atol=0.02)


@pytest.mark.parametrize("name", DENSITIES)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    family, lam = randomized(name, 2, batch=2)
    noise = family.noise((2,), lam)
    lam.requires_grad_()

    def push(lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return family.push(lam, noise)

    # The mixture's draws are attached by an implicit derivative, which differences do not see.
    if name != "mixture":
        assert torch.autograd.gradcheck(push, (lam,))
    if family.twice_differentiable:
        assert torch.autograd.gradgradcheck(push, (lam,))
    else:
        assert name == "mixture"


class Pushed(nn.Module):
    """What ``functional_call`` calls."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def forward(self, lam: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        value, log_q = self.family.push(lam, noise)
        return (value.square().sum(-1) + log_q).mean()


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 3])
def test_push_runs_under_torch_func(name: str, size: int) -> None:
    family, lam = randomized(name, size)
    noise = family.noise((5, 4), lam)
    module = Pushed(family)
    weights = {key: value.detach() for key, value in module.named_parameters()}

    def loss(
        weights: dict[str, torch.Tensor], lam: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(module, weights, (lam, noise))
        return result

    variable = lam.clone().requires_grad_()
    module(variable, noise).backward()
    assert variable.grad is not None
    by_weights, by_lam = torch.func.grad(loss, argnums=(0, 1))(weights, lam, noise)
    assert torch.allclose(by_lam, variable.grad)
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None, key
        assert torch.allclose(by_weights[key], parameter.grad), key
    # One draw at a time under vmap is all draws at once; so are its gradients, and one row's.
    by_draw = torch.func.vmap(family.push, in_dims=(None, 0))(lam, noise)
    assert all(map(torch.allclose, by_draw, family.push(lam, noise)))
    gradients = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, None, 0))
    assert torch.allclose(gradients(weights, lam, noise).mean(0), by_lam)
    by_row = torch.func.vmap(family.push, in_dims=(0, 1), out_dims=1)(lam, noise)
    assert all(map(torch.allclose, by_row, family.push(lam, noise)))


@pytest.mark.parametrize("name", DENSITIES)
def test_one_parameter_vector_serves_a_batch(name: str) -> None:
    family, lam = randomized(name, 3)
    noise = family.noise((6, 4), lam)
    value, log_q = family.push(lam[0], noise)
    assert value.shape == (6, 4, 3)
    each = family.push(lam[:1].expand(4, -1), noise)
    assert torch.allclose(value, each[0])
    assert torch.allclose(log_q, each[1])
    # One draw of noise for all rows.
    value, log_q = family.push(lam, noise[0, 0])
    assert value.shape == (4, 3)
    assert log_q.shape == (4,)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 4])
def test_single_precision_holds_for_parameters_of_size_ten(name: str, size: int) -> None:
    family, _ = randomized(name, size)
    family = family.float()
    lam = 10 * (2 * torch.rand(200, family.num_params) - 1).sign().float()
    lam.requires_grad_()
    value, log_q = family.rsample_and_log_prob(lam, (3,))
    assert value.dtype == log_q.dtype == torch.float32
    assert torch.isfinite(value).all()
    assert torch.isfinite(log_q).all()
    log_q.sum().backward()
    assert lam.grad is not None
    assert torch.isfinite(lam.grad).all()


@pytest.mark.parametrize("name", DENSITIES)
def test_everything_follows_the_device_of_the_parameters(name: str) -> None:
    # A tensor that stayed on the processor cannot meet one of the device without values.
    family = make(name, 3, **DENSITIES[name]).to("meta")
    lam = family.init(torch.zeros(4, 3, device="meta"))
    assert lam.device.type == "meta"
    noise = torch.empty(2, 4, family.noise_size, device="meta")
    value, log_q = family.push(lam, noise)
    assert value.device.type == log_q.device.type == "meta"
    assert family.log_prob(lam, value).device.type == "meta"


@pytest.mark.parametrize("name", DENSITIES)
def test_the_entropy_is_minus_the_mean_log_density(name: str) -> None:
    family, lam = randomized(name, 3)
    entropy = family.entropy(lam)
    if entropy is None:
        with pytest.raises(NotImplementedError, match="no closed-form entropy"):
            family.distribution(lam).entropy()
        return
    with torch.no_grad():
        log_q = family.rsample_and_log_prob(lam, (20_000,))[1]
    error = log_q.std(0) / math.sqrt(20_000)
    assert entropy.shape == (4,)
    assert ((entropy + log_q.mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_given_gaussian_is_found_exactly(name: str, size: int) -> None:
    family = make(name, size, **{**DENSITIES[name], **_enough(name, size)})
    loc = torch.randn(4, size)
    tril = torch.randn(4, size, size).tril(-1) + torch.diag_embed(torch.rand(4, size) + 0.2)
    tril[0] = torch.eye(size)
    reference = torch.distributions.MultivariateNormal(loc, scale_tril=tril)
    lam = family.of_gaussian(loc, tril)
    assert lam.shape == (4, family.num_params)
    value = reference.sample((6,)) + torch.randn(6, 4, size)
    # Up to the floor of scales, 1e-8.
    assert torch.allclose(family.log_prob(lam, value), reference.log_prob(value), rtol=1e-5)
    # Noise to draws is linear: its matrix is a square root of the covariance.
    jacobian = torch.func.vmap(torch.func.jacrev(lambda lam, e: family.push(lam, e)[0], 1))
    root = jacobian(lam, torch.randn(4, size))
    assert torch.allclose(root @ root.mT, reference.covariance_matrix, atol=1e-7)


def _enough(name: str, size: int) -> dict[str, int]:
    return {"transforms": size + 1} if name == "householder" else {}


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_gaussians_are_torchs(size: int) -> None:
    family, lam = randomized("multivariate_normal", size)
    assert isinstance(family, MultivariateNormal)
    tril = family.scale_tril(lam)
    covariance = tril @ tril.mT
    reference = torch.distributions.MultivariateNormal(lam[:, :size], covariance)
    value = torch.randn(4, size)
    assert torch.allclose(family.log_prob(lam, value), reference.log_prob(value))
    again = family.of_gaussian(lam[:, :size], tril)
    assert torch.allclose(family.scale_tril(again), tril, atol=1e-7)
    # With no correlation it is the mean-field family.
    diagonal, shared = Normal(size), family.init(torch.zeros(size))
    mean_field = diagonal.init(torch.zeros(size))
    assert torch.allclose(
        family.log_prob(shared, value), diagonal.log_prob(mean_field, value), atol=1e-10
    )


def test_delta_is_a_point() -> None:
    family = Delta(3)
    lam = torch.randn(4, 3)
    value, log_q = family.rsample_and_log_prob(lam)
    assert torch.equal(value, lam)
    assert not log_q.any()
    assert not family.has_density


def test_scales_invert_and_never_vanish() -> None:
    for scale in (1e-6, 0.1, 1.0, 30.0):
        raw = torch.tensor(inverse_softplus(scale))
        assert float(positive(raw)) == pytest.approx(scale, rel=0.02)
    assert positive(torch.tensor(-1e4)) > 0


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Normal(0)
    with pytest.raises(ValueError, match="transforms must be at least 1"):
        SplineCoupling(2, transforms=0)

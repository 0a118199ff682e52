"""Families: densities that integrate to one, log-determinants by autodiff, exact parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from guides.families import FAMILIES
from guides.families.delta import Delta
from guides.families.family import Family, inverse_softplus, positive
from guides.families.multivariate_normal import MultivariateNormal
from guides.families.normal import Normal
from guides.families.spline_coupling import SplineCoupling

pytestmark = pytest.mark.usefixtures("float64")

DENSITIES: dict[str, Any] = {
    "normal": Normal,
    "multivariate_normal": MultivariateNormal,
    "spline_coupling": lambda size: SplineCoupling(size, transforms=3, bins=5, context=3),
}


def randomized(
    name: str, size: int, batch: int = 4, strength: float = 200.0
) -> tuple[Family, torch.Tensor]:
    """A family away from its start: large parameters, strongly bent splines."""
    torch.manual_seed(size)
    family = DENSITIES[name](size)
    with torch.no_grad():
        for path, parameter in family.named_parameters():
            # Last layers start near zero; this brings them past the usual initialization.
            parameter.mul_(strength if ".2." in path or "phi" in path else 1)
    lam = torch.randn(batch, family.num_params)
    lam[..., : 2 * size] *= 0.7
    return family, lam


def test_every_family_with_a_density_is_tested_here() -> None:
    assert set(DENSITIES) | {"delta"} == set(FAMILIES)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_draws_carry_the_density_of_their_points(name: str, size: int) -> None:
    family, lam = randomized(name, size)
    value, log_q = family.rsample_and_log_prob(lam, (7,))
    assert value.shape == (7, 4, size)
    assert log_q.shape == (7, 4)
    # A clone hides that the points are the family's own: they are scored by the inverse pass.
    assert torch.allclose(family.log_prob(lam, value.clone()), log_q, atol=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
def test_the_density_integrates_to_one(name: str) -> None:
    # A grid sees only densities without spikes; the Jacobian test bends the splines harder.
    family, lam = randomized(name, 2, batch=1, strength=15.0)
    draws = family.rsample_and_log_prob(lam[0], (20_000,))[0].detach()
    low, high = draws.amin(0) - 1.0, draws.amax(0) + 1.0
    axes = [torch.linspace(float(a), float(b), 900) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    with torch.no_grad():
        mass = family.log_prob(lam[0].expand(len(grid), -1), grid).exp().sum() * cell
    assert mass.item() == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_flows_log_determinant_is_that_of_its_jacobian(size: int) -> None:
    family, lam = randomized("spline_coupling", size, batch=1)
    q = family.distribution(lam[0])

    def push(e: torch.Tensor) -> torch.Tensor:
        return q.loc + q.scale * q.flow(e)

    for _ in range(5):
        e = (2 * torch.randn(size)).clamp(-4, 4)
        jacobian = torch.autograd.functional.jacobian(push, e)
        expected = torch.distributions.Normal(0.0, 1.0).log_prob(e).sum()
        expected = expected - torch.linalg.slogdet(jacobian)[1]
        with torch.no_grad():
            assert torch.allclose(q.log_prob(push(e)), expected, atol=1e-7)
            assert torch.allclose(q.flow.inv(q.flow(e)), e, atol=1e-7)
            assert (q.flow(e) - e).abs().max() > 0.05, "a flow at the identity tests nothing"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_gaussians_are_torchs(size: int) -> None:
    family, lam = randomized("multivariate_normal", size)
    q = family.distribution(lam)
    tril = family.scale_tril(lam)
    covariance = tril @ tril.mT
    reference = torch.distributions.MultivariateNormal(lam[:, :size], covariance)
    value = torch.randn(4, size)
    assert torch.allclose(q.log_prob(value), reference.log_prob(value))
    again = family.parameters_of(lam[:, :size], tril)
    assert torch.allclose(family.scale_tril(again), tril, atol=1e-7)
    # With no correlation it is the mean-field family.
    diagonal, shared = Normal(size), family.init(torch.zeros(size))
    mean_field = diagonal.init(torch.zeros(size))
    assert torch.allclose(
        family.log_prob(shared, value), diagonal.log_prob(mean_field, value), atol=1e-10
    )


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("size", [1, 3])
def test_the_start_is_narrow_and_where_it_should_be(name: str, size: int) -> None:
    family = DENSITIES[name](size)
    loc = torch.linspace(-2.0, 3.0, size)
    lam = family.init(loc)
    assert lam.shape == (family.num_params,)
    assert torch.equal(family.location(lam), loc)
    draws = family.rsample_and_log_prob(lam, (4000,))[0]
    assert torch.allclose(draws.std(0), torch.full((size,), 0.1), rtol=0.1)
    assert torch.allclose(draws.mean(0), loc, atol=0.02)


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

"""VAE and HierarchicalVAE: densities by hand, where training starts, what bounds the scales."""

import math

import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies

import zoo
from tests.model_cases import MODEL_CASES
from zoo.likelihood import LIKELIHOODS


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("key", ["vae", "hierarchical_vae"])
def test_output_bias_starts_at_the_data_mean(key, likelihood) -> None:
    data_mean = torch.tensor([0.1, 0.5, 0.7, 0.95])
    sizes = {"z_dim": 3} if key == "vae" else {"z_dims": (3,)}
    model = zoo.make(key, x_dim=4, hidden=(), likelihood=likelihood, data_mean=data_mean, **sizes)
    mean = model.decode(torch.zeros(1, 3)).mean[0]
    torch.testing.assert_close(mean, data_mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli"])
def test_constant_pixels_start_with_finite_logits(likelihood) -> None:
    model = zoo.make(
        "vae", x_dim=2, z_dim=2, likelihood=likelihood, data_mean=torch.tensor([0.0, 1.0])
    )
    low, high = model.likelihood.output.bias.tolist()
    assert low == pytest.approx(-high, abs=1e-4)
    assert -25 < low < -5


def test_gaussian_scale_has_a_floor() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,), likelihood="gaussian")
    assert model.likelihood.scale.item() == pytest.approx(1.0)
    with torch.no_grad():
        model.likelihood.raw_scale.fill_(-1e4)
    assert model.likelihood.scale.item() == pytest.approx(model.likelihood.min_scale)


def test_conditional_scales_have_a_floor() -> None:
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,))
    (level,) = model.levels
    with torch.no_grad():
        level.raw_scale.weight.zero_()
        assert torch.allclose(level(torch.randn(5, 2)).base_dist.scale, torch.ones(()))
        level.raw_scale.bias.fill_(-1e4)
    assert torch.allclose(level(torch.randn(5, 2)).base_dist.scale, torch.tensor(level.min_scale))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("skip", [False, True])
def test_levels_depend_on_the_levels_that_are_stated(skip) -> None:
    """Read off Pyro's own provenance tracking."""
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2, 2), hidden=(3,), skip=skip)
    (x,) = MODEL_CASES["vae"].args(model)
    parents = {
        name: set(found) - {name}
        for name, found in get_dependencies(model, (x,))["prior_dependencies"].items()
    }
    if skip:
        assert parents == {
            "z3": set(), "z2": {"z3"}, "z1": {"z3", "z2"}, "x": {"z3", "z2", "z1"}
        }  # fmt: skip
    else:
        assert parents == {"z3": set(), "z2": {"z3"}, "z1": {"z2"}, "x": {"z1"}}


def log_joint(model, latents, x) -> torch.Tensor:
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(x)
    trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"] for name in (*latents, "x"))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_vae_density_by_hand(likelihood) -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,), likelihood=likelihood)
    (x,) = MODEL_CASES["vae"].args(model)
    z = torch.randn(6, 2)
    output = model.likelihood.output(torch.nn.functional.silu(model.network[0](z)))
    if likelihood == "gaussian":
        scale = 0.01 + torch.log1p(model.likelihood.raw_scale.exp())
        terms = -0.5 * ((x - output) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    else:
        terms = x * torch.sigmoid(output).log() + (1 - x) * torch.sigmoid(-output).log()
    if likelihood == "continuous_bernoulli":
        # the constant in terms of the logit l: l / tanh(l / 2); torch cuts it near 0
        terms = terms + (output / torch.tanh(output / 2)).log()
    expected = terms.sum(1) - 0.5 * (z**2).sum(1) - math.log(2 * math.pi)
    found = log_joint(model, {"z": z}, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("skip", [False, True])
def test_hierarchical_vae_density_by_hand(skip) -> None:
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(5,), skip=skip)
    (x,) = MODEL_CASES["vae"].args(model)
    z2, z1 = torch.randn(6, 2), torch.randn(6, 3)
    level = model.levels[0]
    features = torch.nn.functional.silu(level.network[0](z2))
    scale = 0.05 + torch.log1p(level.raw_scale(features).exp())
    logits = model.decode(z1, z2).base_dist.logits
    expected = (
        -0.5 * (z2**2).sum(1)
        - (0.5 * ((z1 - level.loc(features)) / scale) ** 2 + scale.log()).sum(1)
        - 2.5 * math.log(2 * math.pi)
        + (x * torch.sigmoid(logits).log() + (1 - x) * torch.sigmoid(-logits).log()).sum(1)
    )
    rows = log_joint(model, {"z2": z2, "z1": z1}, x)
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-12)


def test_the_default_activation_is_smooth() -> None:
    """The reason it is not ReLU: the curvature of the network reaches the Hessian."""
    for build in (MODEL_CASES["vae"].build, MODEL_CASES["hierarchical_vae"].build):
        assert any(isinstance(module, torch.nn.SiLU) for module in build().modules())
    relu = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,), activation=torch.nn.ReLU)
    assert any(isinstance(module, torch.nn.ReLU) for module in relu.modules())


CONSTRUCTION_ERRORS = {
    "likelihood": ({"likelihood": "poisson"}, "Unknown likelihood 'poisson'. Available: bern"),
    "mean of another size": (
        {"data_mean": torch.zeros(3)},
        r"data_mean must .* shape \(4,\), got",
    ),
    "mean with NaN": ({"data_mean": torch.full((4,), math.nan)}, "data_mean must .* NaN"),
    "mean out of range": ({"data_mean": torch.full((4,), 2.0)}, "data_mean must lie between 0"),
    "layers": ({"hidden": (0,)}, "Layer sizes must be at least 1, got 0"),
    "x_dim": ({"x_dim": 0}, "x_dim must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", CONSTRUCTION_ERRORS)
@pytest.mark.parametrize(("key", "sizes"), [("vae", {"z_dim": 2}), ("hierarchical_vae", {})])
def test_options_that_fit_no_model(key, sizes, name) -> None:
    options, message = CONSTRUCTION_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        zoo.make(key, **{"x_dim": 4, **sizes, **options})


def test_levels_that_are_none() -> None:
    with pytest.raises(ValueError, match="z_dims must name at least one level"):
        zoo.make("hierarchical_vae", x_dim=4, z_dims=())
    with pytest.raises(ValueError, match="Layer sizes must be at least 1, got 0"):
        zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 0))
    with pytest.raises(ValueError, match="decode needs all 2 levels, z1 first, got 1"):
        MODEL_CASES["hierarchical_vae"].build().decode(torch.zeros(1, 3))

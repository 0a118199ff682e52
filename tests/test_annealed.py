"""Annealed importance sampling against exact evidence, with controls that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import guides
import zoo
from guides.diagnostics import (
    annealed,
    annealed_importance_sampling,
    hamiltonian,
    log_evidence,
    path,
)
from guides.inference import laplace

pytestmark = pytest.mark.usefixtures("float64")


def gaussian(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def gamma_poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def beta_bernoulli(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Bernoulli(p.unsqueeze(-1).expand(len(x), 6)).to_event(1), obs=x)


def two_modes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.3), obs=x)


def with_global(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def pooled_counts(x: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Poisson(rate), obs=x)


X = torch.tensor([0.3, -2.0, 2.5], dtype=torch.float64)
COUNTS = torch.tensor([0.0, 3.0, 14.0], dtype=torch.float64)
COINS = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).double()
SQUARES = torch.tensor([2.0, 0.0, -0.5], dtype=torch.float64)


def exact_gaussian(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.25**0.5).log_prob(x)


def exact_gamma_poisson(x: Tensor) -> Tensor:
    return dist.GammaPoisson(2.0, 0.5).log_prob(x)


def exact_beta_bernoulli(x: Tensor) -> Tensor:
    heads = x.sum(-1)
    tails = x.shape[-1] - heads
    numerator = torch.lgamma(2 + heads) + torch.lgamma(3 + tails) - torch.lgamma(5 + heads + tails)
    return numerator - (math.lgamma(2.0) + math.lgamma(3.0) - math.lgamma(5.0))


def exact_two_modes(x: Tensor) -> Tensor:
    z = torch.linspace(-8, 8, 40_001)[:, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z.square(), 0.3).log_prob(x)
    return torch.logsumexp(log_joint, 0) + math.log(16 / 40_000)


def exact_with_global(x: Tensor) -> Tensor:
    covariance = torch.eye(len(x)) * 1.25 + 4.0
    return dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x)


def exact_pooled(x: Tensor) -> Tensor:
    shape = 3.0 + x.sum()
    return (
        torch.lgamma(shape)
        - math.lgamma(3.0)
        - shape * math.log(1.0 + len(x))
        - torch.lgamma(x + 1).sum()
    )


Case = tuple[Callable[..., None], Tensor, Callable[[Tensor], Tensor]]
CASES: dict[str, Case] = {
    "gaussian": (gaussian, X, exact_gaussian),
    "gamma_poisson": (gamma_poisson, COUNTS, exact_gamma_poisson),
    "beta_bernoulli": (beta_bernoulli, COINS, exact_beta_bernoulli),
    "two_modes": (two_modes, SQUARES, exact_two_modes),
    "with_global": (with_global, X, exact_with_global),
    "pooled_counts": (pooled_counts, COUNTS, exact_pooled),
}


def deviation(case: Case, **options: Any) -> Tensor:
    """(mean weight / p(x) - 1) in standard errors of the mean, by unit."""
    model, x, exact = case
    torch.manual_seed(1)
    score = annealed_importance_sampling(model, x, **options)
    estimate = torch.tensor(score.total) if score.rows is None else score.rows
    error = torch.tensor(score.standard_error) if score.rows is None else score.rows_error
    ratio = torch.exp(estimate - exact(x))
    return (ratio - 1) / (ratio * error)


@pytest.mark.parametrize("name", CASES)
def test_the_mean_weight_is_unbiased_for_the_evidence(name: str) -> None:
    """A few temperatures only, so that the weights vary; thousands of chains are repetitions."""
    options = {"num_chains": 2000, "num_temperatures": 6, "num_leapfrog": 3}
    if name == "with_global":  # four latents at once: the weights have tails at six temperatures
        options |= {"num_chains": 1000, "num_temperatures": 16}
    assert deviation(CASES[name], **options).abs().max() < 4


@pytest.mark.parametrize("fault", ["no_accept_step", "weight_after_transition", "no_jacobian"])
def test_faults_of_the_walk_are_visible(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: the same test sees a dropped accept step, a wrong order, a wrong measure."""
    options: dict[str, Any] = {"num_chains": 3000, "num_temperatures": 10, "num_leapfrog": 3}
    name, options["step_size"] = "gaussian", 0.5
    if fault == "no_accept_step":
        options["step_size"] = 0.9
    elif fault == "no_jacobian":
        name = "gamma_poisson"
    assert deviation(CASES[name], **options).abs().max() < 4
    if fault == "no_accept_step":
        monkeypatch.setattr(hamiltonian, "_accept", lambda rate: torch.ones_like(rate).bool())
    elif fault == "weight_after_transition":
        _weigh_late(monkeypatch, 10)
    else:
        _forget_jacobian(monkeypatch)
    assert deviation(CASES[name], **options).abs().max() > 8


def _weigh_late(monkeypatch: pytest.MonkeyPatch, num_temperatures: int) -> None:
    """The weight of a temperature is taken at the point that was moved there already."""
    betas = annealed.temperatures(num_temperatures, "sigmoid")
    original = annealed.transition

    def late(part: Any, point: Any, ends: Any, b: float, *rest: Any) -> Any:
        return original(part, point, ends, betas[betas.index(b) + 1], *rest)

    monkeypatch.setattr(annealed, "transition", late)


def _forget_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is walked without the change of variables of the target."""
    original = path.Path._ends

    def plain(self: Any, one: Any) -> Any:
        start, target = original(self, one)
        log_dets = self.log_joint.unpack(one)[2]
        return start, target - self._units(log_dets)

    monkeypatch.setattr(path.Path, "_ends", plain)


def test_a_linear_gaussian_chain_has_its_exact_evidence() -> None:
    pyro.set_rng_seed(0)
    model = zoo.make("linear_gaussian", dims=(2, 3, 4)).requires_grad_(False)
    x = model(size=5)
    score = annealed_importance_sampling(model, x, num_chains=60, num_temperatures=25)
    assert ((score.rows - model.log_evidence(x)) / score.rows_error).abs().max() < 4
    assert score.total == pytest.approx(float(score.rows.sum()))
    assert (score.effective_sample_size > 12).all()
    assert ((score.acceptance > 0.4) & (score.acceptance < 0.95)).all()
    assert "60 chains, 25 temperatures" in score.estimator
    assert repr(score).startswith("Score(")


def test_slower_annealing_tightens_the_bound() -> None:
    """With one chain the bound is the mean log weight, and its gap falls with temperatures."""
    torch.manual_seed(0)
    gaps = []
    for count in (2, 8, 32):
        x = torch.full((400,), 2.5)
        score = annealed_importance_sampling(
            gaussian, x, num_chains=1, num_temperatures=count, step_size=0.5, num_leapfrog=3
        )
        gaps.append(float((exact_gaussian(x) - score.rows).mean()))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 0


def test_two_modes_that_one_gaussian_misses_are_found() -> None:
    """Importance sampling from one mode is off by log 2, and its error does not say so."""
    x = torch.full((20,), 2.0)
    guide = laplace(two_modes, {"z": torch.full((20,), 1.4)}, (x,))
    torch.manual_seed(0)
    one_mode = log_evidence(two_modes, guide, x, num_samples=500)
    missed = exact_two_modes(x) - one_mode.rows
    assert (missed.mean() - math.log(2)).abs() < 0.05
    assert (one_mode.rows_error < 0.1).all()
    score = annealed_importance_sampling(two_modes, x, num_chains=50, num_temperatures=40)
    error = score.rows_error.square().sum().sqrt()
    assert ((score.rows - exact_two_modes(x)).sum() / error).abs() < 4


@pytest.mark.parametrize("name", ["normal", "multivariate_normal", "spline_coupling"])
def test_any_start_with_a_density_gives_the_evidence(name: str) -> None:
    pyro.set_rng_seed(0)
    model = zoo.make("linear_gaussian", dims=(2, 3)).requires_grad_(False)
    x = model(size=3)
    # Wide enough a start: from a narrow one the weights have no variance at three temperatures.
    guide = guides.make(name, model, x, init_scale=1.2)
    options = {"num_chains": 400, "num_temperatures": 3, "num_leapfrog": 2}
    score = annealed_importance_sampling(model, x, guide=guide, **options)
    assert ((score.rows - model.log_evidence(x)) / score.rows_error).abs().max() < 4


def test_a_start_on_a_support_gives_the_evidence() -> None:
    """The guide's density is of unconstrained values, so the target needs its Jacobian."""
    x = torch.tensor([1.0, 2.0, 4.0])
    guide = guides.make("mean_field_normal", gamma_poisson, x, init_scale=1.0)
    options = {"num_chains": 400, "num_temperatures": 20, "num_leapfrog": 4}
    score = annealed_importance_sampling(gamma_poisson, x, guide=guide, **options)
    assert ((score.rows - exact_gamma_poisson(x)) / score.rows_error).abs().max() < 4
    assert score.rows_error.max() < 0.2


def test_the_exact_posterior_as_a_start_has_constant_weights() -> None:
    """Local latents given global ones, constrained sites, an encoder: all densities line up."""
    guide = laplace(with_global, {"mean": torch.zeros(()), "z": torch.zeros(3)}, (X,))
    covariance = torch.eye(3) * 1.25 + 4.0
    mean = 4.0 * torch.linalg.solve(covariance, X).sum()
    z = mean + (X - mean) / 1.25
    guide = laplace(with_global, {"mean": mean, "z": z}, (X,))
    score = annealed_importance_sampling(
        with_global, X, guide=guide, num_chains=5, num_temperatures=4
    )
    assert score.joint
    assert score.rows is None
    assert score.standard_error < 1e-6
    assert score.total == pytest.approx(float(exact_with_global(X)), abs=1e-6)
    assert float(score.effective_sample_size) == pytest.approx(5)


def test_rows_of_a_minibatch_are_rows_of_the_data() -> None:
    index = torch.tensor([2, 0])
    options = {"num_chains": 400, "num_temperatures": 10}
    score = annealed_importance_sampling(
        gaussian, X[index], model_kwargs={"size": 3, "index": index}, **options
    )
    assert ((score.rows - exact_gaussian(X[index])) / score.rows_error).abs().max() < 4
    assert score.total == pytest.approx(1.5 * float(score.rows.sum()))


def test_chunks_of_rows_and_single_rows_give_the_same_evidence() -> None:
    whole = torch.cat([X, -X, X + 0.1])
    guide = guides.make("normal", gaussian, whole, init_scale=1.2)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    for start in (None, guide):
        for chunk in (5, 9):
            score = annealed_importance_sampling(
                gaussian, whole, guide=start, num_chains=200, num_temperatures=3, chunk_rows=chunk
            )
            assert ((score.rows - exact_gaussian(whole)) / score.rows_error).abs().max() < 4.5


def test_masks_scales_and_sites_outside_the_plate_count() -> None:
    """The log joint of the program as it is written: tempered rows, missing rows, a constant."""

    def model(x: Tensor) -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=torch.tensor([True, False, True])), poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    score = annealed_importance_sampling(model, X, num_chains=500, num_temperatures=6)
    z = torch.linspace(-9, 9, 20_001)[:, None]
    power = torch.tensor([0.5, 0.0, 0.5])
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + power * dist.Normal(z, 0.5).log_prob(X)
    exact = torch.logsumexp(log_joint, 0) + math.log(18 / 20_000)
    assert (score.rows - exact).abs().max() < 4 * score.rows_error.max()
    assert score.rows[1] == pytest.approx(0.0, abs=1e-12)
    constant = float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.7)))
    assert score.total == pytest.approx(float(score.rows.sum()) + constant)


def test_single_precision_and_one_row() -> None:
    torch.set_default_dtype(torch.float32)
    x = torch.tensor([1.5])
    score = annealed_importance_sampling(
        gaussian, x, num_chains=200, num_temperatures=10, schedule="linear"
    )
    assert score.rows.dtype == torch.float32
    assert ((score.rows - exact_gaussian(x)) / score.rows_error).abs().max() < 4


def test_a_repeat_with_one_seed_is_the_same() -> None:
    totals = []
    for _ in range(2):
        torch.manual_seed(3)
        totals.append(annealed_importance_sampling(gaussian, X, num_temperatures=4).total)
    assert totals[0] == totals[1]


def test_log_evidence_says_how_many_draws_count() -> None:
    guide = guides.make("normal", gaussian, X)
    score = log_evidence(gaussian, guide, X, num_samples=300, chunk_size=70)
    relative = score.rows_error.square() + 1 / 300
    assert torch.allclose(score.effective_sample_size, 1 / relative)


def test_misuse_is_refused_with_the_fix() -> None:
    call = annealed_importance_sampling
    with pytest.raises(ValueError, match=r"delta guide is a point mass.*guide=None"):
        call(gaussian, X, guide=guides.make("delta", gaussian, X))
    with pytest.raises(TypeError, match=r"guide of this package.*got a function"):
        call(gaussian, X, guide=gaussian)
    with pytest.raises(ValueError, match=r"rise strictly from 0 to 1"):
        call(gaussian, X, schedule=[0.0, 0.5, 0.4, 1.0])
    with pytest.raises(ValueError, match=r"schedule must be \"sigmoid\""):
        call(gaussian, X, schedule="cosine")
    with pytest.raises(ValueError, match=r"step_size must be positive"):
        call(gaussian, X, step_size=-1.0)
    with pytest.raises(ValueError, match=r"target_acceptance must lie in"):
        call(gaussian, X, target_acceptance=1.0)
    with pytest.raises(ValueError, match=r"only where they have no latents in common"):
        call(with_global, X, chunk_rows=2)
    with pytest.raises(ValueError, match=r"points that its start did not draw.*another family"):
        call(gaussian, X, guide=guides.make("auxiliary", gaussian, X))


def test_programs_without_this_evidence_are_refused() -> None:
    call = annealed_importance_sampling

    def minibatch(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"one number for all rows.*Call with all rows"):
        call(minibatch, X, model_kwargs={"size": 30, "index": torch.arange(3)})

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=x > 0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"'z' is masked.*mask only what is observed"):
        call(masked, X)

    def improper(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    with pytest.raises(ValueError, match=r"prior cannot be drawn from.*guide=guides.make"):
        call(improper, X)

    def coupled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 0.5), obs=x)

    with pytest.raises(ValueError, match=r"Rows of plate 'data' are coupled"):
        call(coupled, X)

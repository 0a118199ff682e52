"""Divide-and-conquer predictive coding: weights, resampling, evidence, and the loop."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.inspect import get_dependencies
from torch import Tensor

from guides.energy import LogJoint
from guides.inference import DivideAndConquer, resampling
from guides.inference.dependencies import dependencies
from guides.inference.particle_density import ParticleDensity
from guides.inference.particle_moves import (
    corrected_move,
    precondition,
    published_move,
    spread_of,
)
from guides.inference.particle_sampler import Cloud, Sampler
from tests.pc_oracles import ORACLES

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTS = (0.1, 0.2, 0.3, 0.4)


def loop_of(model: Any, **options: Any) -> DivideAndConquer:
    return DivideAndConquer(model, pyro.optim.Adam({"lr": 0.01}), **options)


def density_of(model: Any, *args: Any, **kwargs: Any) -> ParticleDensity:
    return ParticleDensity(LogJoint(model, args, kwargs))


# Resampling


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_every_particle_is_copied_in_proportion_to_its_weight(shift: int) -> None:
    """T18: every index, the last one too, whichever particle has which weight."""
    weights = torch.tensor(WEIGHTS).roll(shift)
    log_weights = weights.log().unsqueeze(-1).expand(4, 20_000) + 5.0
    indices = resampling.systematic(log_weights, torch.rand(20_000))
    for k in range(4):
        copies = (indices == k).sum(0).double()
        assert float(copies.mean()) == pytest.approx(4 * float(weights[k]), abs=0.02)
        # Systematic: the number of copies is right up to one.
        assert float((copies - 4 * weights[k]).abs().max()) < 1


def test_the_published_resampler_never_keeps_the_last_particle() -> None:
    """T18: weights .1 .2 .3 .4 give copies in proportions .50 .20 .30 .00."""
    log_weights = torch.tensor(WEIGHTS).log().unsqueeze(-1).expand(4, 50_000)
    indices = resampling.published(log_weights, torch.rand(50_000, 4))
    found = torch.stack([(indices == k).double().mean() for k in range(4)])
    assert torch.allclose(found, torch.tensor([0.5, 0.2, 0.3, 0.0]), atol=0.005)


def test_effective_fraction() -> None:
    log_weights = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]) + 3.0
    assert torch.allclose(resampling.effective_fraction(log_weights), torch.tensor([1.0, 0.5]))


# Weights of moves (T18)


def standard_normal(dim: int) -> ParticleDensity:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    return density_of(model, torch.zeros(1))


def ess(dim: int, step: float, reverse: bool, num: int = 20_000) -> float:
    """Effective fraction of one move from stationarity, no preconditioner."""
    density = standard_normal(dim)
    particles = {"z": torch.randn(num, 1, dim)}
    noise, steps = torch.randn(num, 1, dim), torch.full((1, dim), step)
    if reverse:
        log_weights = corrected_move(density, particles, "z", step=steps, noise=noise)[1]
    else:
        score = -particles["z"]
        moved = published_move(density, particles, "z", (), step=steps, noise=noise, score=score)
        log_weights = moved[2]
    return float(resampling.effective_fraction(log_weights))


def test_published_weights_lose_a_factor_in_every_dimension() -> None:
    """At eta = 1 the effective fraction is sqrt(3) / 2 a dimension: .866, and .056 in twenty."""
    assert ess(1, 1.0, reverse=False) == pytest.approx(math.sqrt(3) / 2, abs=0.01)
    # Heavy tails: the empirical fraction converges slowly in twenty dimensions.
    assert ess(20, 1.0, reverse=False) == pytest.approx((math.sqrt(3) / 2) ** 20, abs=0.02)


def test_published_weights_degenerate_at_small_steps() -> None:
    """Infinite variance for eta <= 1/4: 1.5e-3 at eta = .01, and worse with more particles."""
    fractions = [ess(1, 0.01, reverse=False, num=num) for num in (1_000, 100_000)]
    assert fractions[1] < 0.01
    assert fractions[1] < 0.2 * fractions[0]


def test_reverse_kernel_weights_are_near_one() -> None:
    assert ess(20, 0.1, reverse=True) == pytest.approx(0.99, abs=0.005)
    assert ess(1, 0.01, reverse=True) > 0.9999
    assert ess(20, 0.01, reverse=True) > ess(20, 0.1, reverse=True) > ess(20, 0.5, reverse=True)


def test_reverse_kernel_weights_have_their_closed_form() -> None:
    """On a standard normal log w = eta / 4 (u^2 - u'^2)."""
    density, step = standard_normal(3), 0.2
    particles = {"z": torch.randn(50, 1, 3)}
    noise = torch.randn(50, 1, 3)
    moved, log_w = corrected_move(
        density, particles, "z", step=torch.full((1, 3), step), noise=noise
    )
    here, there = particles["z"], moved["z"]
    assert torch.allclose(there, (1 - step) * here + math.sqrt(2 * step) * noise)
    assert torch.allclose(log_w, step / 4 * (here.square() - there.square()).sum(-1))


def test_published_weights_divide_by_the_density_of_the_kernel() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.tensor([1.0, -2.0, 0.5])
    density = density_of(model, x)
    here, noise, score = torch.randn(3, 4, 3, 2).unbind(0)
    step = torch.full((3, 2), 0.2)
    particles, conditional, log_weights = published_move(
        density, {"z": here}, "z", ("x",), step=step, noise=noise, score=score
    )
    there = here + step * score + (2 * step).sqrt() * noise
    torch.testing.assert_close(particles["z"], there)
    own = dist.Normal(0, 1).log_prob(there).sum(-1) + dist.Normal(there.sum(-1), 1).log_prob(x)
    kernel = dist.Normal(here + step * score, (2 * step).sqrt()).log_prob(there).sum(-1)
    torch.testing.assert_close(conditional, own)
    torch.testing.assert_close(log_weights, own - kernel)


def test_one_particle_has_no_spread() -> None:
    assert torch.equal(spread_of(torch.randn(1, 5, 2)), torch.zeros(5, 2))
    collapsed = spread_of(torch.ones(4, 5, 2), before=torch.full((5, 2), 8.0))
    assert torch.equal(collapsed, torch.full((5, 2), 4.0))


def test_the_preconditioner_is_finite_without_spread() -> None:
    """P = 1 / (Var + 1 / K)."""
    spread = torch.tensor([0.0, 0.25, 1.0])
    found = precondition(spread, 4)
    torch.testing.assert_close(found, torch.tensor([4.0, 2.0, 0.8]))
    torch.testing.assert_close(precondition(spread, 4, "normalized"), found * 3 / 6.8)
    assert torch.equal(precondition(spread, 4, "identity"), torch.ones(3))


# Scores and structure


def constrained_pair(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A rate above a rate: the child reaches its parent through the parent's support."""
    with pyro.plate("data", size or len(x), subsample=index):
        a = pyro.sample("a", dist.Gamma(3.0, 2.0))
        b = pyro.sample("b", dist.Gamma(2.0, a))
        pyro.sample("x", dist.Normal(b, 0.5), obs=x)


def test_the_score_has_jacobian_and_chain_rule() -> None:
    """Against derivatives by hand: with a = exp(u), b = exp(v)."""
    density = density_of(constrained_pair, torch.tensor([0.7, 1.5]))
    u, v = torch.randn(5, 2, 1), torch.randn(5, 2, 1)
    particles, x = {"a": u, "b": v}, torch.tensor([0.7, 1.5]).unsqueeze(-1)
    a, b = u.exp(), v.exp()
    # log p = 2u - 2a  + 2u + v - ab  - (x - b)^2 / (2 .25);  log|da/du| = u, log|db/dv| = v
    assert torch.allclose(density.scored(particles, "a")[2], 3 - 2 * a + 2 - a * b)
    expected = 2 - a * b + (x - b) / 0.25 * b
    assert torch.allclose(density.scored(particles, "b")[2], expected)
    # Tempered: the likelihood alone is scaled.
    tempered = 2 - a * b + 0.3 * (x - b) / 0.25 * b
    assert torch.allclose(density.scored(particles, "b", beta=0.3)[2], tempered)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("chain3", ("h3", "h2", "h1")),
        ("fork_merge", ("merge", "right", "left", "top")),
        ("clamped_internal", ("low", "top")),
        ("unclamped_readout", ("readout", "top")),
    ],
)
def test_structure_is_read_from_the_program(name: str, order: tuple[str, ...]) -> None:
    """Against Pyro's tracker of values, on programs where nothing is hidden from it."""
    oracle = ORACLES[name]()
    found = dependencies(density_of(oracle.model, oracle.x))
    assert found.order == order
    expected = get_dependencies(oracle.model, (oracle.x,))["prior_dependencies"]
    for site, parents in expected.items():
        latent = set(parents) & set(order) - {site}
        assert set(found.parents[site]) == latent, site


def test_markov_blanket_holds_other_parents() -> None:
    oracle = ORACLES["fork_merge"]()
    found = dependencies(density_of(oracle.model, oracle.x))
    assert found.blanket("left") == ("top", "right", "merge")
    assert found.children["merge"] == ("y",)


def test_dependence_that_a_tracker_loses_is_found() -> None:
    """Writes into a buffer and data computed from a latent."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x - a)

    found = dependencies(density_of(model, torch.zeros(3)))
    assert found.children["a"] == ("x",)
    assert "a" not in get_dependencies(model, (torch.zeros(3),))["prior_dependencies"]["x"]


@pytest.mark.parametrize("cut", [Tensor.detach, torch.round, lambda z: (z > 0).to(z)])
def test_a_dependence_without_gradient_is_refused(cut: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(cut(z), 1.0), obs=x)

    with pytest.raises(ValueError, match="'x' depends on latent 'z', but has no gradient"):
        loop_of(model).step(torch.zeros(3))


# Evidence


RUNS = 150


def ratios(name: str, num_sweeps: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    """Mean of p_hat / p over runs by datum, and its standard error.

    A row is a run of its own, with its own pilot: every datum is repeated, and one call runs all.
    """
    oracle = ORACLES[name]()
    x = oracle.x.repeat(RUNS, *(1,) * (oracle.x.dim() - 1))
    loop = loop_of(oracle.model, **options)
    score = loop.evidence(x, num_particles=12, num_sweeps=num_sweeps, num_repeats=1)
    ratio = (score.rows.reshape(RUNS, -1) - oracle.log_evidence).exp()
    return ratio.mean(0), ratio.std(0) / RUNS**0.5


@pytest.mark.parametrize("correction", ["reverse_kernel", "metropolis"])
@pytest.mark.parametrize("name", ["chain1", "chain2", "fork_merge", "clamped_internal"])
def test_evidence_is_unbiased(name: str, correction: str) -> None:
    """E[p_hat] / p = 1 with few particles and few sweeps, where log p_hat is far off."""
    ratio, error = ratios(name, step_size=0.3, correction=correction)
    assert (error < 0.2).all()
    assert ((ratio - 1).abs() < 4 * error).all(), (ratio, error)


@pytest.mark.parametrize("name", ["gamma_poisson", "beta_bernoulli"])
def test_evidence_is_unbiased_with_constrained_sites(name: str) -> None:
    ratio, error = ratios(name, num_sweeps=15, step_size=0.3)
    assert (error < 0.1).all()
    assert ((ratio - 1).abs() < 4 * error).all(), (ratio, error)


def test_runs_are_averaged_as_evidences(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    # The first run finds the steps, and its evidence is not used.
    weights = iter([torch.full((4, 2), math.log(v)) for v in (9.0, 1.0, 2.0, 6.0)])
    monkeypatch.setattr(Sampler, "anneal", lambda *args, **options: Cloud({}, next(weights)))
    score = loop_of(model).evidence(torch.zeros(2), num_repeats=3)
    torch.testing.assert_close(score.rows, torch.full((2,), math.log(3.0)))
    # Of a mean of three, in units of the mean: std (1, 2, 6) = 2.6458.
    expected = torch.full((2,), math.sqrt(7.0) / 3 / math.sqrt(3))
    torch.testing.assert_close(score.rows_error, expected)


@pytest.mark.parametrize("name", ["chain2", "fork_merge"])
def test_published_weights_give_no_evidence(name: str) -> None:
    """Negative control of the same test: the published weights are off by many errors."""
    ratio, error = ratios(name, step_size=0.1, variant="published")
    assert ((ratio - 1).abs() > 4 * error).any(), (ratio, error)


def test_a_joint_score_with_global_latents() -> None:
    """A global mean above local latents: one weight for all rows, against the exact evidence."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    covariance = 4 * torch.ones(3, 3) + 1.25 * torch.eye(3)
    exact = float(dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x))
    for correction in ("reverse_kernel", "metropolis"):
        loop = loop_of(model, step_size=0.3, correction=correction)
        score = loop.evidence(x, num_particles=300, num_sweeps=5, num_repeats=6)
        assert score.joint
        assert score.rows is None
        assert "joint evidence by particles (SMC sampler), K=300" in score.estimator
        assert score.standard_error < 0.3
        assert abs(score.total - exact) < 4 * score.standard_error


def test_minibatches_with_global_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 9, subsample=torch.arange(3)):
            pyro.sample("x", dist.Normal(mean, 0.5), obs=x)

    with pytest.raises(ValueError, match="joint particles with all rows"):
        loop_of(model).step(torch.zeros(3))

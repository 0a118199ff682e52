"""Scores against closed forms: ELBO, importance-weighted evidence, k-hat, and their errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import guides
from guides.diagnostics import elbo, log_evidence, log_weights, pareto_khat

pytestmark = pytest.mark.usefixtures("float64")


def conjugate(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def with_global(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


X = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
LOC, SCALE = 0.4, 0.7


def fixed(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A hand-written guide with known numbers."""
    with pyro.plate("data", size or len(x), subsample=index):
        pyro.sample("z", dist.Normal(LOC, SCALE))


def exact_elbo(x: Tensor) -> Tensor:
    """E_q log p(x, z) + H[q] of the guide above, by hand."""
    second = SCALE**2 + LOC**2
    log_prior = -0.5 * math.log(2 * math.pi) - 0.5 * second
    error = (x - LOC) ** 2 + SCALE**2
    log_likelihood = -0.5 * math.log(2 * math.pi) - math.log(0.5) - 0.5 * error / 0.25
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(SCALE)
    return log_prior + log_likelihood + entropy


def exact_evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.25**0.5).log_prob(x)


def test_the_elbo_is_the_closed_form_one_within_its_error() -> None:
    score = elbo(conjugate, fixed, X, num_samples=4000)
    z = (score.rows - exact_elbo(X)) / score.rows_error
    assert z.abs().max() < 4
    assert score.total == pytest.approx(float(score.rows.sum()))
    assert not score.joint
    assert score.estimator == "ELBO, 4000 draws"
    assert repr(score).endswith("nats, ELBO, 4000 draws, 4 rows)")


def test_the_evidence_is_the_closed_form_one_within_its_error() -> None:
    score = log_evidence(conjugate, fixed, X, num_samples=20_000, chunk_size=3000)
    assert ((score.rows - exact_evidence(X)) / score.rows_error).abs().max() < 4
    assert "K=20000" in score.estimator


def test_standard_errors_are_the_spread_over_repeats() -> None:
    for function in (elbo, log_evidence):
        scores = [function(conjugate, fixed, X, num_samples=100) for _ in range(60)]
        spread = torch.tensor([s.total for s in scores]).std()
        claimed = torch.tensor([s.standard_error for s in scores]).mean()
        assert 0.7 < float(claimed / spread) < 1.4


def test_chunks_and_batches_give_the_same_weights() -> None:
    torch.manual_seed(5)
    weights = log_weights(conjugate, fixed, X, num_samples=300).rows
    direct = torch.logsumexp(weights, 0) - math.log(300)
    torch.manual_seed(5)
    score = log_evidence(conjugate, fixed, X, num_samples=300, chunk_size=300)
    assert torch.allclose(score.rows, direct)
    torch.manual_seed(5)
    parts = [log_weights(conjugate, fixed, X, num_samples=n).rows for n in (100, 200)]
    torch.manual_seed(5)
    chunked = log_evidence(conjugate, fixed, X, num_samples=300, chunk_size=200)
    assert parts[0].shape == (100, 4)
    assert ((chunked.rows - direct) / chunked.rows_error).abs().max() < 5


def test_rows_of_a_minibatch_are_rows_of_the_data() -> None:
    index = torch.tensor([2, 0])
    kwargs = {"size": 4, "index": index}
    whole = elbo(conjugate, fixed, X, num_samples=3000)
    part = elbo(conjugate, fixed, X[index], model_kwargs=kwargs, num_samples=3000)
    error = (part.rows_error**2 + whole.rows_error[index] ** 2).sqrt()
    assert ((part.rows - whole.rows[index]) / error).abs().max() < 4
    assert part.total == pytest.approx(2 * float(part.rows.sum()))


def test_global_latents_make_weights_joint_and_scores_say_so() -> None:
    """IWAE with a global latent is one joint weight; the per-datum terms of the ELBO stay."""
    guide = guides.make("normal", with_global, X, init_scale=0.8)
    score = elbo(with_global, guide, X, num_samples=2000)
    weights = log_weights(with_global, guide, X, num_samples=2000)
    assert score.joint
    assert score.rows.shape == (4,)
    assert weights.global_term.shape == (2000,)
    assert torch.allclose(weights.total, weights.rows.sum(-1) + weights.global_term)
    bound = log_evidence(with_global, guide, X, num_samples=2000)
    assert bound.joint
    assert bound.rows is None
    assert bound.estimator.startswith("joint")
    covariance = torch.eye(4) * 1.25 + 4.0
    exact = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(X)
    assert abs(bound.total - float(exact)) < 5 * bound.standard_error + 0.05
    khat = pareto_khat(with_global, guide, X, num_samples=1000)
    assert khat.joint
    assert khat.rows is None
    assert math.isfinite(khat.total)


def test_a_global_latent_drawn_from_its_prior_makes_weights_joint() -> None:
    """Its own ratio is one in every draw, and yet the rows share the draw.

    Weights of rows alone would give the sum of log p(x_n), not log p(x_1, ..., x_N).
    """

    def guide(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((0.25 * mean + x) / 1.25, 0.2**0.5))  # p(z | mean, x)

    weights = log_weights(with_global, guide, X, num_samples=10)
    assert weights.joint
    assert torch.equal(weights.global_term, torch.zeros(10))
    bound = log_evidence(with_global, guide, X, num_samples=4000, chunk_size=4000)
    assert bound.joint
    assert bound.rows is None
    covariance = torch.eye(4) * 1.25 + 4.0
    exact = float(dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(X))
    apart = float(dist.Normal(0.0, 5.25**0.5).log_prob(X).sum())
    assert abs(bound.total - exact) < 5 * bound.standard_error
    assert abs(apart - exact) > 8 * bound.standard_error
    assert pareto_khat(with_global, guide, X, num_samples=500).rows is None


def test_khat_finds_the_tail_index_of_a_known_ratio() -> None:
    """A Gaussian proposal narrower than the target: w has a Pareto tail with k = 1 - s_q^2/s_p^2.

    For p = N(0, 1) and q = N(0, s^2), w(z) ~ exp(z^2 (1/s^2 - 1)/2), so P(w > t) falls like
    t^(-1/k) with k = 1 - s^2.
    """

    def model(n: int) -> None:
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.zeros(n), 1e3), obs=torch.zeros(n) * z.detach())

    def guide_of(scale: float):
        def guide(n: int) -> None:
            with pyro.plate("data", n):
                pyro.sample("z", dist.Normal(0.0, scale))

        return guide

    for scale in (0.95, 0.7, 0.5):
        khat = pareto_khat(model, guide_of(scale), 20, num_samples=4000)
        assert float(khat.rows.mean()) == pytest.approx(1 - scale**2, abs=0.15)
        assert khat.threshold == pytest.approx(0.7)


def test_a_masked_row_has_no_likelihood_in_its_score() -> None:
    mask = torch.tensor([True, False, True, True])

    def masked(x: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    score = log_evidence(masked, fixed, X, num_samples=5000)
    assert abs(float(score.rows[1])) < 5 * float(score.rows_error[1])
    assert ((score.rows - exact_evidence(X)) / score.rows_error)[mask].abs().max() < 5


def test_group_indexing_survives_vectorization() -> None:
    """``theta[group]`` under a left batch of draws would pick draws instead of groups."""
    group = torch.tensor([0, 2, 1, 1])

    def grouped(x: Tensor) -> None:
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(torch.arange(3.0), 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(theta[group], 0.5), obs=x)

    guide = guides.make("multivariate_normal", grouped, X, init_scale=0.5)
    draws = guides.draws.draw(grouped, guide, (X,), num_samples=6)
    theta = draws.values["theta"]
    expected = dist.Normal(theta[:, group], 0.5).log_prob(X)
    assert torch.allclose(draws.log_p_rows, expected)


def test_control_flow_on_values_falls_back_to_a_loop() -> None:
    def branching(x: Tensor) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z if bool((z > -100).all()) else -z
            pyro.sample("x", dist.Normal(loc, 0.5), obs=x)

    torch.manual_seed(1)
    a = log_weights(branching, fixed, X, num_samples=20).rows
    torch.manual_seed(1)
    b = log_weights(conjugate, fixed, X, num_samples=20).rows
    assert torch.allclose(a, b)

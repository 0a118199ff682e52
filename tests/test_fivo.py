"""FIVO: an unbiased evidence, a bound that holds on long sequences, and what makes it biased."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import guides
import zoo
from guides.families.family import inverse_positive
from guides.inference import CompiledSVI, TemporalPredictiveCoding, resampling
from guides.objectives import FIVO, IWELBO, STL, AnalyticELBO, DReG

pytestmark = pytest.mark.usefixtures("float64")

SMALL: dict[str, Any] = {"recurrent": 4, "hidden": 4}


def system(steps: int) -> zoo.StateSpace:
    model = zoo.StateSpace(z_dim=1, x_dim=1, num_steps=steps, covariance="unit")
    with torch.no_grad():
        model.transition.weight.fill_(0.9)
        model.emission.weight.fill_(1.0)
    return model.requires_grad_(False)


def prediction(model: Any, x: Tensor, name: str = "iterative_filtering_normal") -> Any:
    """The bootstrap proposal: the filter with its corrections at zero."""
    guide = guides.make(name, model, x, network=4)
    with torch.no_grad():
        guide.rate.weight.zero_()
        guide.rate.bias.fill_(-1e3)
        guide.move.weight.zero_()
    return guide


class Published(FIVO):
    """Negative control: the resampler that gives the last particle's mass to the first."""

    def ancestors(self, log_weights: Tensor) -> Tensor:
        num, rows = log_weights.shape
        return resampling.published(log_weights, torch.rand(rows, num))


class Flat(FIVO):
    """Negative control: every particle is as likely to be continued as any other."""

    def ancestors(self, log_weights: Tensor) -> Tensor:
        return torch.randint(len(log_weights), log_weights.shape)


def ratio(
    objective: FIVO, model: Any, guide: Any, x: Tensor, exact: Tensor
) -> tuple[float, float]:
    """Mean of p_hat / p over rows, and its standard error."""
    found = (objective.rows(model, guide, x) - exact).exp()
    return float(found.mean()), float(found.std() / math.sqrt(len(found)))


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_evidence_is_unbiased(threshold: float) -> None:
    torch.manual_seed(1)
    model = system(4)
    x = model(size=1).detach()
    exact = model.log_evidence(x)
    many = x.expand(4000, -1, -1)
    learned = guides.make("filtering_normal", model, x, **SMALL)
    # Weights of a proposal that is narrower than the posterior have no variance.
    learned.init[1] = inverse_positive(torch.tensor(1.3))
    for guide in (prediction(model, x), learned):
        mean, error = ratio(FIVO(6, threshold=threshold), model, guide, many, exact)
        assert error < 0.05
        assert mean == pytest.approx(1.0, abs=4 * error)


@pytest.mark.parametrize("control", [Published, Flat])
def test_wrong_resampling_is_biased(control: type[FIVO]) -> None:
    torch.manual_seed(1)
    model = system(4)
    x = model(size=1).detach()
    many = x.expand(12_000, -1, -1)
    objective = control(4, threshold=1.0)
    mean, error = ratio(objective, model, prediction(model, x), many, model.log_evidence(x))
    assert error < 0.05
    assert abs(mean - 1.0) > 5 * error


def test_long_sequences_are_bounded_tighter_than_by_importance_weights() -> None:
    """At equal numbers of particles; both lie below the evidence, and FIVO gains with T."""
    torch.manual_seed(0)
    gains = []
    for steps in (3, 16):
        model = system(steps)
        x = model(size=100).detach()
        guide = prediction(model, x)
        exact = model.log_evidence(x).detach()
        filtered = FIVO(8).rows(model, guide, x)
        within = IWELBO(8).ratios(model, guide, (x,), {})[0][0].detach()  # (K, B)
        weighted = within.logsumexp(0) - math.log(8)
        for rows in (filtered, weighted):
            gap = exact - rows
            assert float(gap.mean()) > -4 * float(gap.std() / 10)
        gain = filtered - weighted
        gains.append((float(gain.mean()), float(gain.std() / 10)))
    (_, _), (long, error) = gains
    assert long > 4 * error
    assert long > gains[0][0] + 4 * math.hypot(error, gains[0][1])


@pytest.mark.parametrize("name", ["filtering_normal", "smoothing_iaf", "mean_field_normal"])
def test_without_resampling_it_is_the_importance_weighted_bound(name: str) -> None:
    """Draw for draw, gradients too; minibatch and lengths."""
    model = zoo.StateSpace(z_dim=2, x_dim=2, num_steps=3)
    x = model(size=4).detach()
    options = {**SMALL, "family_hidden": (4, 4)} if "iaf" in name else SMALL
    guide = guides.make(name, model, x, **options)
    lengths = torch.tensor([3, 1, 2, 3])
    call = {"size": 10, "index": torch.tensor([1, 7, 3, 2])}
    found = []
    for objective in (FIVO(3, threshold=0.0), IWELBO(3)):
        torch.manual_seed(4)
        loss = objective.differentiable_loss(model, guide, x, lengths, **call)
        loss.backward()
        parameters = [*guide.parameters(), *model.parameters()]
        found.append((loss.item(), [p.grad.clone() for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    assert found[0][0] == pytest.approx(found[1][0])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-10


@pytest.mark.parametrize("objective", [IWELBO(1), STL(1), DReG(1), AnalyticELBO(1), FIVO(1)])
def test_objectives_count_no_step_that_a_row_lacks(objective: Any) -> None:
    """The loss of a ragged batch is that of its rows alone, and every network learns."""
    model = zoo.StateSpace(z_dim=1, x_dim=2, num_steps=3)
    x = model(size=3).detach()
    lengths = torch.tensor([3, 1, 2])
    guide = guides.make("filtering_normal", model, x, **SMALL)
    torch.manual_seed(2)
    found = objective.loss(model, guide, x, lengths)
    torch.manual_seed(2)
    noise = [torch.randn(1, 3, 1) for _ in range(3)]
    parts = 0.0
    for row, length in enumerate(lengths.tolist()):
        read = guide._layout((x[row : row + 1, :length],), {}, None)
        call = guide._call((x[row : row + 1, :length],), {}, read)
        values: dict[str, Tensor] = {}
        upstream: dict[str, Tensor] = {}
        for t in range(length):
            q = guide.group_distribution(read.groups[t], call, upstream)
            base = q.base_dist
            u = base.loc + base.scale * noise[t][:, row : row + 1]
            parts += q.log_prob(u).sum().item()
            upstream[f"step_{t + 1}"] = u
            values[f"z_{t + 1}"] = u[0]
        conditioned = poutine.condition(model, values)
        parts -= (
            poutine.trace(conditioned).get_trace(x[row : row + 1, :length]).log_prob_sum().item()
        )
    if not isinstance(objective, AnalyticELBO):  # whose noise is not that of a draw
        assert found == pytest.approx(parts)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    for _ in range(2):
        svi.step(x, lengths)
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def test_one_particle_is_the_elbo() -> None:
    model = system(3)
    x = model(size=5).detach()
    guide = guides.make("filtering_normal", model, x, **SMALL)
    torch.manual_seed(2)
    ours = FIVO(1, threshold=1.0).loss(model, guide, x)
    torch.manual_seed(2)
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    exact = trace.log_prob_sum().item() - replayed.log_prob_sum().item()
    assert ours == pytest.approx(exact)


def test_the_filter_follows_particles_and_not_places() -> None:
    """By a particle filter of its own over recorded draws: histories move with their weights."""
    model = system(4)
    x = model(size=3).detach()
    guide = guides.make("filtering_normal", model, x, **SMALL)
    chosen = []

    class Recorded(FIVO):
        def ancestors(self, log_weights: Tensor) -> Tensor:
            chosen.append(super().ancestors(log_weights))
            return chosen[-1]

    torch.manual_seed(5)
    found = Recorded(4, threshold=1.0).rows(model, guide, x)
    torch.manual_seed(5)
    read = guide._layout((x,), {}, None)
    call = guide._call((x,), {}, read)
    bound, before, upstream = torch.zeros(3), None, {}
    a, c = model.transition.weight.item(), model.emission.weight.item()
    for t in range(4):
        q = guide.group_distribution(read.groups[t], call, upstream)
        z = q.rsample() if t else q.rsample((4,))
        loc = torch.zeros(4, 3, 1) if before is None else a * before
        log_p = dist.Normal(loc, 1.0).log_prob(z) + dist.Normal(c * z, 1.0).log_prob(x[:, t])
        log_w = log_p.squeeze(-1) - q.log_prob(z)
        bound = bound + log_w.logsumexp(0) - math.log(4)
        if t < 3:
            torch.rand(3)
            index = chosen[t][..., None]
            z = z.gather(0, index)
        before = z
        upstream[f"step_{t + 1}"] = z
    assert (found - bound).abs().max() < 1e-10


def test_rows_are_filters_of_their_own_and_ragged_ones_end() -> None:
    """The mean of p_hat is that of the shorter sequence; masked steps weigh nothing."""
    torch.manual_seed(3)
    model = system(3)
    x = model(size=1).detach()
    many = x.expand(3000, -1, -1)
    lengths = torch.tensor([3, 1]).repeat(1500)
    guide = prediction(model, x)
    found = FIVO(6, threshold=1.0).rows(model, guide, many, lengths)
    for length in (3, 1):
        part = (found[lengths == length] - model.log_evidence(x[:, :length])).exp()
        error = float(part.std() / math.sqrt(len(part)))
        assert float(part.mean()) == pytest.approx(1.0, abs=4 * error)


def globals_too(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    speed = pyro.sample("speed", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, speed))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def test_global_latents_keep_their_elbo() -> None:
    x = torch.randn(4, 3)
    guide = guides.make("filtering_normal", globals_too, x, **SMALL)
    for call in ({}, {"size": 12, "index": torch.tensor([0, 5, 7, 2])}):
        found = []
        for objective in (FIVO(3, threshold=0.0), IWELBO(3)):
            torch.manual_seed(1)
            found.append(objective.loss(globals_too, guide, x, **call))
        assert found[0] == pytest.approx(found[1])
    svi = pyro.infer.SVI(globals_too, guide, pyro.optim.Adam({"lr": 0.01}), FIVO(3, threshold=1.0))
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    assert all(math.isfinite(svi.step(x)) for _ in range(2))
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def nested(x: Tensor) -> None:
    """Plates inside the plate of the sequences, which has a dimension of its own."""
    with pyro.plate("data", len(x), dim=-2):
        z = torch.zeros(1, 1)
        for t in range(x.shape[1]):
            with pyro.plate(f"units_{t}", 2, dim=-1):
                z = pyro.sample(f"z_{t}", dist.Normal(0.7 * z, 1.0))
            with pyro.plate(f"features_{t}", 3, dim=-1):
                loc = z.sum(-1, keepdim=True)
                pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[:, t])


def test_plates_inside_the_plate() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3)
    guide = guides.make("filtering_normal", nested, x, **SMALL)
    guide.init[2:] = inverse_positive(torch.tensor(1.2))
    # (z_1, z_2, x) of one sequence, as z = L e and x = C z + noise
    a = torch.eye(2)
    latent = torch.cat([torch.cat([a, 0 * a], 1), torch.cat([0.7 * a, a], 1)])  # (4, 4)
    sums = torch.block_diag(torch.ones(3, 2), torch.ones(3, 2)) @ latent
    exact = dist.MultivariateNormal(torch.zeros(6), sums @ sums.mT + torch.eye(6))
    many = x.expand(4000, -1, -1)
    mean, error = ratio(
        FIVO(8, threshold=1.0), nested, guide, many, exact.log_prob(x.reshape(1, 6))
    )
    assert error < 0.05
    assert mean == pytest.approx(1.0, abs=4 * error)


def counts(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = torch.zeros(len(y))
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 0.5))
            pyro.sample(f"y_{t}", dist.Poisson(z.exp()), obs=y[:, t])


def test_particles_agree_with_the_extended_filter() -> None:
    """Two ways to the evidence of a program that is not linear, near each other and not equal."""
    torch.manual_seed(0)
    y = torch.poisson(torch.full((4, 4), 2.0))
    loop = TemporalPredictiveCoding(counts, pyro.optim.SGD({"lr": 0.0}), precision="laplace")
    guide = prediction(counts, y)
    runs = torch.stack([FIVO(1000).rows(counts, guide, y) for _ in range(4)])
    error = runs.std(0) / 2
    assert (error < 0.1).all()
    # Laplace's method is off by a tenth of a nat on these counts.
    assert ((loop.log_evidence(y) - runs.mean(0)).abs() < 0.15 + 4 * error).all()


def test_a_compiled_loop_says_that_resampling_looks_at_values() -> None:
    model = system(3)
    x = model(size=4).detach()
    guide = guides.make("filtering_normal", model, x, **SMALL)
    loop = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), FIVO(3), mode="graph")
    assert all(math.isfinite(loop.step(x)) for _ in range(2))
    assert [kind.mode for kind in loop.compiled] == ["eager"]


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = zoo.DeepMarkov(x_dim=3, z_dim=2, num_steps=3)
    x = model(size=8).detach()
    guide = guides.make("filtering_normal", model, x, **SMALL)
    objective = FIVO(4, threshold=1.0)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), objective)
    first = sum(objective.loss(model, guide, x) for _ in range(3))
    for _ in range(15):
        svi.step(x)
    assert sum(objective.loss(model, guide, x) for _ in range(3)) < first
    assert "threshold=1.0" in repr(objective)


def test_what_it_cannot_do_is_said() -> None:
    model = system(3)
    x = model(size=4).detach()
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        FIVO(4, threshold=2.0)
    with pytest.raises(ValueError, match="needs a guide of sequences"):
        FIVO(4).loss(model, guides.make("normal", model, x), x)

    def coupled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z - z.mean(), 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    data = torch.randn(3, 2)
    with pytest.raises(ValueError, match="are coupled"):
        FIVO(4).loss(coupled, guides.make("filtering_normal", coupled, data, **SMALL), data)
    with pytest.raises(ValueError, match="needs a guide with a density"):
        FIVO(4).loss(model, guides.make("filtering_delta", model, x, **SMALL), x)


def test_data_that_need_later_latents_are_refused() -> None:
    """And so are data that count where the latents of their step do not, whenever they come."""

    def backwards(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            held = [pyro.sample(f"z_{t}", dist.Normal(torch.zeros(len(x)), 1.0)) for t in (0, 1)]
            for t in (1, 0):
                pyro.sample(f"x_{t}", dist.Normal(held[t], 1.0), obs=x[:, t])

    def half_masked(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(2):
                with poutine.mask(mask=seen[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(len(x)), 1.0))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, on = torch.randn(3, 2), torch.ones(3, 2, dtype=torch.bool)
    guide = guides.make("filtering_normal", backwards, x, **SMALL)
    with pytest.raises(NotImplementedError, match="'x_1' of the step of z_0 depends on later"):
        FIVO(4).loss(backwards, guide, x)
    guide = guides.make("filtering_normal", half_masked, x, on, **SMALL)
    objective = FIVO(4)
    assert math.isfinite(objective.loss(half_masked, guide, x, on))
    on[0, 1] = False
    with pytest.raises(NotImplementedError, match="or counts where those latents are masked"):
        objective.loss(half_masked, guide, x, on)

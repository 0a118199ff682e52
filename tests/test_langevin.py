"""Langevin kernels and the loop that learns at their draws, against closed forms.

On a Gaussian model the unadjusted update is linear, so its stationary moments are exact: they are
propagated here without any draw. Where there are draws, tolerances are multiples of a standard
error that is measured between independent chains.
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import guides
from guides.energy import LogJoint
from guides.inference import LangevinPredictiveCoding
from guides.inference.langevin import Metric, State, langevin, mala, stationary_covariance, ula
from guides.inference.langevin_kernel import evaluate_chains

pytestmark = pytest.mark.usefixtures("float64")

SGD = pyro.optim.SGD({"lr": 0.0})
# Two latents, one datum: precision I + 4 * ones, as stiff as 9 to 1.
PRECISION = torch.eye(2, dtype=torch.float64) + 4 * torch.ones(2, 2, dtype=torch.float64)


def pair(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(2 * z.sum(-1), 1.0), obs=x)


def propagate(
    precision: Tensor, step: float, momentum: float, metric: Tensor, noise: float
) -> Tensor:
    """Stationary covariance of the linear update, by its own recursion; no formula of the code."""
    size = len(precision)
    eye, zero = torch.eye(size), torch.zeros(size, size)
    drift = step * metric @ precision
    # (u, v) -> (u + v', v') with v' = m v - eta M Lambda u + noise
    move = torch.cat(
        [
            torch.cat([eye - drift, momentum * eye], 1),
            torch.cat([-drift, momentum * eye], 1),
        ]
    )
    shake = noise * torch.cat([torch.cat([metric, metric], 1), torch.cat([metric, metric], 1)])
    covariance = torch.cat([torch.cat([eye, zero], 1), torch.cat([zero, zero], 1)])
    for _ in range(60):  # doubling: the sum of A^k S A^kT over 2^60 updates
        shake, move = shake + move @ shake @ move.T, move @ move
    assert float((move @ covariance @ move.T).abs().max()) < 1e-12
    return shake[:size, :size]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_unadjusted_bias_is_exact(momentum: float, inverse: bool) -> None:
    """T13 and T14: the stationary covariance, by propagating the moments of the update."""
    step = 0.1
    metric = torch.linalg.inv(PRECISION) if inverse else torch.eye(2)
    noise = 2 * (1 - momentum) * step
    found = propagate(PRECISION, step, momentum, metric, noise)
    expected = stationary_covariance(
        PRECISION, step, momentum=momentum, preconditioner=metric if inverse else None
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    if inverse and not momentum:
        exact = torch.linalg.inv(PRECISION) / (1 - step / 2)
        torch.testing.assert_close(expected, exact, atol=1e-12, rtol=1e-12)
    if not inverse and not momentum:
        exact = torch.linalg.inv(PRECISION @ (torch.eye(2) - step * PRECISION / 2))
        torch.testing.assert_close(expected, exact, atol=1e-12, rtol=1e-12)


def linear_map(momentum: float, metric: dict[str, Metric] | None, step: float) -> tuple[Any, ...]:
    """Drift and noise of the code's own update as matrices, read off with draws switched off."""
    log_joint = LogJoint(pair, (torch.zeros(1),))
    evaluate = evaluate_chains(log_joint)

    def update(u: Tensor, v: Tensor, xi: Tensor) -> Tensor:
        state = State.at(evaluate, {"data": u.reshape(1, 1, 2)}, momentum=True)
        state = state._replace(velocity={"data": v.reshape(1, 1, 2)})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda value: xi.reshape(value.shape))
            new = ula(evaluate, state, {"data": torch.tensor(step)}, metric, momentum)
        assert new.velocity is not None
        return torch.cat([new.packed["data"].flatten(), new.velocity["data"].flatten()])

    zero, basis = torch.zeros(2), torch.eye(2)
    move = torch.stack(
        [update(e, zero, zero) for e in basis] + [update(zero, e, zero) for e in basis], 1
    )
    return move, torch.stack([update(zero, zero, e) for e in basis], 1)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_the_code_s_update_has_that_law(momentum: float, kind: str) -> None:
    """The matrices of the update itself give the covariance to rounding."""
    step, metric, matrix = 0.1, None, torch.eye(2)
    if kind == "diagonal":
        matrix = torch.diag(torch.tensor([0.5, 2.0]))
        metric = {"data": Metric(matrix.diagonal().sqrt(), full=False)}
    if kind == "full":
        matrix = torch.linalg.inv(PRECISION)
        metric = {"data": Metric(torch.linalg.cholesky(matrix), full=True)}
    move, root = linear_map(momentum, metric, step)
    covariance = root @ root.T
    for _ in range(60):
        covariance, move = covariance + move @ covariance @ move.T, move @ move
    expected = stationary_covariance(PRECISION, step, momentum=momentum, preconditioner=matrix)
    torch.testing.assert_close(covariance[:2, :2], expected, atol=1e-12, rtol=1e-12)


def test_noise_of_the_wrong_size_is_told_apart() -> None:
    """sqrt(eta) for sqrt(2 eta) halves the covariance; no (1 - m) widens it by 1 / (1 - m)."""
    step, eye = 0.1, torch.eye(2)
    right = stationary_covariance(PRECISION, step)
    torch.testing.assert_close(propagate(PRECISION, step, 0.0, eye, step), right / 2)
    heavy = stationary_covariance(PRECISION, step, momentum=0.9)
    torch.testing.assert_close(propagate(PRECISION, step, 0.9, eye, 2 * step), heavy / (1 - 0.9))


def test_heavy_ball_in_one_dimension() -> None:
    """T14: precision 2, target variance .5; the bias is that of the formula, far below ULA's."""
    exact = float(stationary_covariance(torch.tensor([[2.0]]), 0.01, momentum=0.9))
    assert exact == pytest.approx(0.5 / (1 - 0.02 / 3.8), rel=1e-12)
    assert exact == pytest.approx(0.5, rel=0.006)


def test_no_stationary_law_beyond_the_stable_step() -> None:
    for momentum in (0.0, 0.5):
        limit = 2 * (1 + momentum) / 9
        stationary_covariance(PRECISION, 0.99 * limit, momentum=momentum)
        with pytest.raises(ValueError, match="no stationary law"):
            stationary_covariance(PRECISION, 1.01 * limit, momentum=momentum)


def moments(draws: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance of scalar draws (chains, draws), each with its error between chains."""
    means, squares = draws.mean(1), draws.square().mean(1)
    mean = means.mean()
    variances = squares - 2 * mean * means + mean**2
    root = math.sqrt(len(draws))
    return mean, means.std() / root, variances.mean(), variances.std() / root


def oliviers(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.2, 1.0))
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)


@pytest.mark.parametrize("sampler", ["ula", "mala"])
def test_the_posterior_of_figure_2(sampler: str) -> None:
    """Prior N(.2, 1), w = 2, x = 1: N(.44, .2); ULA is wide by 1 / (1 - eta 5 / 2), MALA not."""
    step = 0.1
    # Identical rows are chains that know nothing of each other.
    pc = LangevinPredictiveCoding(oliviers, SGD, sampler=sampler, step_size=step)
    draws = pc.samples(torch.ones(2000), num_samples=60, num_chains=1, num_mixing=60).values["z"]
    mean, mean_error, variance, variance_error = moments(draws[0].T)
    expected = 0.2 / (1 - step * 5 / 2) if sampler == "ula" else 0.2
    assert abs(float(mean) - 0.44) < 4 * float(mean_error) < 0.02
    assert abs(float(variance) - expected) < 4 * float(variance_error) < 0.03
    # The bias itself is far outside the error, so either value would be caught for the other.
    assert abs(0.2 / (1 - step * 5 / 2) - 0.2) > 8 * float(variance_error)


def test_generation_samples_the_marginal() -> None:
    """Nothing clamped: prior N(.5, 1) and x ~ N(2 z, 1) give x ~ N(1, 5)."""

    def model(size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.5, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0))

    pc = LangevinPredictiveCoding(model, SGD, sampler="mala", preconditioner="hessian")
    draws = pc.samples(2000, num_samples=40, num_chains=1, num_mixing=40).values["x"]
    mean, mean_error, variance, variance_error = moments(draws[0].T)
    assert abs(float(mean) - 1) < 4 * float(mean_error) < 0.3
    assert abs(float(variance) - 5) < 4 * float(variance_error) < 0.7


def constrained(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def binary(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Binomial(5, p), obs=x)


@pytest.mark.parametrize(
    ("model", "site", "value", "exact"),
    [
        (constrained, "rate", 4.0, dist.Gamma(7.0, 3.0)),
        (binary, "p", 4.0, dist.Beta(6.0, 4.0)),
    ],
)
def test_constrained_sites(model: Any, site: str, value: float, exact: Any) -> None:
    """Conjugate posteriors, sampled in unconstrained space with the Jacobian."""
    pc = LangevinPredictiveCoding(model, SGD, sampler="mala")
    x = torch.full((1500,), value)
    draws = pc.samples(x, num_samples=40, num_chains=1, num_mixing=60).values[site]
    mean, mean_error, variance, variance_error = moments(draws[0].T)
    assert abs(float(mean - exact.mean)) < 4 * float(mean_error) < 0.1 * float(exact.mean)
    assert abs(float(variance - exact.variance)) < 4 * float(variance_error)
    assert float(variance_error) < 0.05 * float(exact.variance)


def test_mala_adapts_in_the_discarded_updates_only() -> None:
    pc = LangevinPredictiveCoding(pair, SGD, sampler="mala", step_size=5.0)
    log_joint = pc._log_joint((torch.zeros(300),), {})
    start = (pc._fresh(log_joint, 1), {})
    mixed = pc._sample(log_joint, start, 100, 100)
    assert float(mixed.acceptance.mean()) == pytest.approx(0.574, abs=0.05)
    unmixed = pc._sample(log_joint, start, 0, 100)
    assert torch.equal(unmixed.factor, torch.ones(1, 300))


def test_a_rejected_proposal_leaves_the_state() -> None:
    """A step so large that nothing is accepted, and a proposal outside of all numbers."""
    evaluate = evaluate_chains(LogJoint(pair, (torch.zeros(5),)))
    start = State.at(evaluate, {"data": torch.full((1, 5, 2), 0.1)})
    for step in (1e6, 1e200):
        state, chance = mala(evaluate, start, {"data": torch.tensor(step)})
        assert float(chance.max()) == 0.0
        assert torch.equal(state.packed["data"], start.packed["data"])
        assert torch.equal(state.gradient["data"], start.gradient["data"])
        assert torch.equal(state.rows, start.rows)


def test_rows_of_a_batch_are_runs_of_their_own() -> None:
    """With the same noise, a batch of rows gives what every row gives alone."""
    x = torch.tensor([1.0, -2.0, 0.5])
    noise = torch.randn(12, 3, 2)
    coins = torch.rand(12, 3)

    def run(rows: list[int], sampler: str) -> Tensor:
        evaluate = evaluate_chains(LogJoint(pair, (x[rows],)))
        start = State.at(evaluate, {"data": torch.zeros(1, len(rows), 2)})
        used = iter(noise), iter(coins)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda v: next(used[0])[rows].reshape(v.shape))
            patch.setattr(torch, "rand_like", lambda v: next(used[1])[rows].reshape(v.shape))
            step = {"data": torch.full((1,), 0.15)}
            chain = langevin(
                evaluate, start, step=step, num_mixing=4, num_samples=8, sampler=sampler
            )
        return chain.draws["data"][:, 0]

    for sampler in ("ula", "mala"):
        together = run([0, 1, 2], sampler)
        for row in range(3):
            torch.testing.assert_close(together[:, [row]], run([row], sampler))


def test_chains_are_runs_of_their_own() -> None:
    """Vectorized over chains, gradients and energies are those of a loop over chains."""
    log_joint = LogJoint(pair, (torch.randn(4),))
    packed = {"data": torch.randn(3, 4, 2)}
    grads, rows, other = evaluate_chains(log_joint)(packed)
    for c in range(3):
        one = evaluate_chains(log_joint)({"data": packed["data"][c : c + 1]})
        torch.testing.assert_close(grads["data"][c], one[0]["data"][0])
        torch.testing.assert_close(rows[c], one[1][0])
        torch.testing.assert_close(other[c], one[2][0])


@pytest.mark.parametrize("sampler", ["ula", "mala"])
def test_minibatches_do_not_move_the_rows_otherwise(sampler: str) -> None:
    """N/B reaches neither the drift nor the step nor the decision of local latents."""
    x = torch.randn(4)
    draws = []
    for kwargs in ({}, {"size": 400, "index": torch.arange(4)}):
        pyro.set_rng_seed(3)
        pc = LangevinPredictiveCoding(pair, SGD, sampler=sampler)
        draws.append(pc.samples(x, num_samples=5, num_chains=2, num_mixing=5, **kwargs).values)
    torch.testing.assert_close(draws[0]["z"], draws[1]["z"])


class Scale(nn.Module):
    """x ~ N(w z, 1), z ~ N(mu, 1), with w and mu learned."""

    def __init__(self, w: float, mu: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.mu = nn.Parameter(torch.tensor(mu))

    def model(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        pyro.module("scale", self)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)


def toy(num_rows: int) -> Tensor:
    """Data with mean 1 and variance 5, exactly."""
    x = torch.randn(num_rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 1 + math.sqrt(5) * (x - x.mean()) / x.std(correction=0)


LANDINGS = {0.01: 1.969276, 0.05: 1.855921, 0.1: math.sqrt(3), 0.2: 1.527525}


@pytest.mark.parametrize("step", LANDINGS)
def test_where_langevin_learning_lands_in_closed_form(step: float) -> None:
    """T15: at w^2 = 5 / (1 + 5 eta / 2) - 1 and mu = 1 / w the mean gradient at ULA's law is 0."""
    w = math.sqrt(5 / (1 + 5 * step / 2) - 1)
    assert w == pytest.approx(LANDINGS[step], abs=1e-6)
    mu = 1 / w
    x = toy(7)
    mean = (mu + w * x) / (1 + w**2)
    spread = float(stationary_covariance(torch.tensor([[1 + w**2]]), step))
    gradient_w = (-(x - w * mean) * mean + w * spread).mean()
    gradient_mu = (mu - mean).mean()
    assert abs(float(gradient_w)) < 1e-12
    assert abs(float(gradient_mu)) < 1e-12


def test_metropolis_adjusted_learning_is_maximum_likelihood() -> None:
    """T15: with persistent chains whose steps stop adapting, w lands at 2."""
    x = toy(1000)
    module = Scale(w=1.7, mu=0.6)
    pc = LangevinPredictiveCoding(
        module.model,
        pyro.optim.SGD({"lr": 0.3 / 1000}),
        sampler="mala",
        persistent=True,
        num_mixing=1,
        num_samples=1,
        mode="graph",
    )
    trace = []
    for _ in range(900):
        pc.step(x)
        trace.append([float(module.w.detach()), float(module.mu.detach())])
    blocks = torch.tensor(trace[300:], dtype=torch.float64).reshape(6, 100, 2).mean(1)
    mean, error = blocks.mean(0), blocks.std(0) / math.sqrt(6)
    assert float(error.max()) < 0.01
    assert abs(float(mean[0]) - 2) < 4 * float(error[0])
    assert abs(float(mean[1]) - 0.5) < 4 * float(error[1])


@pytest.mark.parametrize("step", LANDINGS)
def test_where_langevin_learning_lands(step: float) -> None:
    """T15 by the loop: persistent chains, the error measured between blocks of steps."""
    x = toy(1000)
    module = Scale(w=1.7, mu=0.6)
    pc = LangevinPredictiveCoding(
        module.model,
        pyro.optim.SGD({"lr": 0.3 / 1000}),
        step_size=step,
        persistent=True,
        num_mixing=4 if step == 0.01 else 0,  # small steps need more of them to forget
        num_samples=1,
        mode="graph",
    )
    trace = []
    for _ in range(1200):
        pc.step(x)
        trace.append([float(module.w.detach()), float(module.mu.detach())])
    blocks = torch.tensor(trace[400:], dtype=torch.float64).reshape(8, 100, 2).mean(1)
    mean, error = blocks.mean(0), blocks.std(0) / math.sqrt(8)
    w = LANDINGS[step]
    assert float(error.max()) < 0.02
    assert abs(float(mean[0]) - w) < 4 * float(error[0]) + 1e-3
    assert abs(float(mean[1]) - 1 / w) < 4 * float(error[1]) + 1e-3
    assert [kind.mode for kind in pc.compiled] == ["graph"]


def test_persistent_chains_are_each_row_s_own() -> None:
    """Minibatches in any order find their rows where they left them."""
    x = torch.randn(6)
    pc = LangevinPredictiveCoding(pair, SGD, persistent=True, num_mixing=1, num_samples=1)
    first, second = torch.tensor([0, 3, 5]), torch.tensor([4, 0, 1])
    pc.step(x[first], size=6, index=first)
    left = pc.memory.tensors["data"].clone()
    log_joint = pc._log_joint((x[second],), {"size": 6, "index": second})
    packed, _ = pc._begin(log_joint)
    assert torch.equal(packed["data"][:, 1], left[0])
    pc.step(x[second], size=6, index=second)
    after = pc.memory.tensors["data"]
    assert torch.equal(after[[3, 5]], left[[3, 5]])
    assert not torch.equal(after[0], left[0])
    assert pc.memory.known is not None
    assert pc.memory.known.tolist() == [True, True, False, True, True, True]
    before = pc.get_state()
    pc.evaluate_loss(x[second], size=6, index=second)
    pc.infer(x[second], size=6, index=second)
    state = pc.get_state()
    assert torch.equal(state["memory"]["tensors"]["data"], before["memory"]["tensors"]["data"])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"sampler": "mala", "persistent": True, "num_chains": 2},
    {"momentum": 0.5, "persistent": True},
    {"preconditioner": "second_moment"},
    {"guide": "amortized_normal", "guide_loss": "jeffreys"},
]


def train(mode: str, steps: list[int], options: dict[str, Any]) -> tuple[Any, ...]:
    """Train in pieces, each from the state of the one before, with everything built anew."""
    state = None
    x = toy(8)
    calls = [((x[r],), {"size": 8, "index": r}) for r in torch.arange(8).split(4)]
    for num_steps in steps:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            module = Scale(1.5, 0.5)
            own = dict(options)
            if "guide" in own:
                own["guide"] = guides.make(own["guide"], module.model, x, hidden=(4,), name="q")
            pc = LangevinPredictiveCoding(
                module.model,
                pyro.optim.Adam({"lr": 0.01}),
                num_steps=2,
                num_mixing=3,
                num_samples=2,
                mode=mode,
                **own,
            )
            pyro.set_rng_seed(1)
            run = pc.run(num_steps, calls, state=state)
            state = run.state
    found = [module.w.detach(), module.mu.detach()]
    if pc.guide is not None:
        found += [parameter.detach() for parameter in pc.guide.parameters()]
    return run.losses, found, pc


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_captured_step_is_that_of_the_loop(options: dict[str, Any]) -> None:
    losses, learned, eager = train("eager", [6], options)
    found, compiled, loop = train("graph", [6], options)
    assert [(kind.mode, kind.reason) for kind in loop.compiled] == [("graph", None)]
    assert found == pytest.approx(losses, rel=1e-10)
    for ours, theirs in zip(compiled, learned, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert loop.gradient_evaluations == eager.gradient_evaluations


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_run_resumes_where_it_was(options: dict[str, Any]) -> None:
    whole, learned, _ = train("eager", [6], options)
    parts, resumed, _ = train("eager", [3, 6], options)
    assert parts == pytest.approx(whole, rel=1e-12)
    for ours, theirs in zip(resumed, learned, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)

"""Predictive coding over time: Kalman filters, their extensions, and what is learned."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import zoo
from guides.inference import LOOPS, PredictiveCoding, TemporalPredictiveCoding
from guides.inference.temporal import PRECISIONS
from guides.inference.temporal_riccati import stationary
from guides.layout import layout
from tests.model_cases import MODEL_CASES

GOLDEN = (math.sqrt(5) - 1) / 2


def temporal(model: Any, precision: Any = "fixed", **options: Any) -> TemporalPredictiveCoding:
    optim = pyro.optim.Adam({"lr": 0.01})
    return TemporalPredictiveCoding(model, optim, precision=precision, **options)


def made(steps: int = 5, **options: Any) -> tuple[zoo.StateSpace, Tensor]:
    torch.manual_seed(0)
    model = zoo.StateSpace(z_dim=2, x_dim=3, num_steps=steps, bias=True, **options)
    return model, model(size=4).detach()


def walk(x: Tensor) -> None:
    """A scalar random walk with unit noise."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def walks(rows: int, steps: int) -> tuple[Tensor, Tensor]:
    """States and data of random walks, ``(B, T)``."""
    z = torch.randn(rows, steps).cumsum(1)
    return z, z + torch.randn(rows, steps)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("precision", "covariance"),
    [("riccati", "full"), ("laplace", "full"), ("riccati", "diagonal")],
)
def test_carried_precision_is_the_kalman_filter(precision: str, covariance: str) -> None:
    """T16, transient and all: means, covariances, predictions and the evidence; ragged too."""
    model, x = made(4, covariance=covariance)
    loop = temporal(model, precision)
    lengths = torch.tensor([4, 1, 3, 2])
    for args in ((x,), (x, lengths), (x[:1, :1],)):
        found = loop.filter(*args)
        exact, predicted, evidence = model._filter(args[0], *args[1:] or (None,))
        assert (found.mean - exact.mean).abs().max() < 1e-8
        assert (found.covariance - exact.covariance).abs().max() < 1e-8
        assert (found.predicted_mean - predicted.mean).abs().max() < 1e-8
        assert (found.predicted_covariance - predicted.covariance).abs().max() < 1e-8
        assert (loop.log_evidence(*args) - evidence).abs().max() < 1e-8


@pytest.mark.usefixtures("float64")
def test_steady_precision_is_the_steady_kalman_filter() -> None:
    model, x = made()
    predicted = model.riccati().detach()
    emission, noise = model.emission.weight, model.emission.scale_tril
    inner = emission @ predicted @ emission.mT + noise @ noise.mT
    gain = torch.linalg.solve(inner, emission @ predicted).mT
    for loop in (temporal(model, "steady"), temporal(model, torch.linalg.inv(predicted))):
        found = loop.filter(x)
        mean = model.filter(x).mean[:, 0]  # the first step has the program's own prior
        assert (found.mean[:, 0] - mean).abs().max() < 1e-8
        for t in range(1, 5):
            mean = model.transition.loc(mean)
            mean = mean + (x[:, t] - model.emission.loc(mean)) @ gain.mT
            assert (found.mean[:, t] - mean).abs().max() < 1e-8
            assert (found.predicted_covariance[:, t] - predicted).abs().max() < 1e-8
    # Begun in the steady state it is the Kalman filter.
    data = torch.randn(3, 4)
    found, exact = (temporal(started, kind).filter(data) for kind in ("steady", "riccati"))
    assert (found.mean - exact.mean).abs().max() < 1e-8
    assert (found.predicted_covariance - 1 - GOLDEN).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [2.0**-10, 1.0, 2.0**13])
def test_the_steady_state_does_not_know_the_units_of_the_states(
    apart: float, dtype: torch.dtype
) -> None:
    """Place and speed: the oracle is the recursion in one unit and in double precision."""
    units = torch.tensor([1.0, apart], dtype=dtype)
    slope = torch.tensor([[1.0, 0.5], [0.0, 0.75]], dtype=dtype)
    noise = torch.tensor([0.125, 0.5], dtype=dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2, dtype=dtype)
            for t in range(x.shape[1]):
                loc = ((z / units) @ slope.mT) * units
                z = pyro.sample(f"z_{t}", dist.Normal(loc, noise * units).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z, 2 * units).to_event(1), obs=x[:, t])

    plain, eye = slope.double(), torch.eye(2).double()
    predicted = spread = noise.double().square().diag()
    for _ in range(2000):
        belief = torch.linalg.inv(torch.linalg.inv(predicted) + 0.25 * eye)
        predicted = plain @ belief @ plain.mT + spread
    exact = torch.linalg.inv(torch.linalg.inv(predicted) + 0.25 * eye)
    found = temporal(model, "steady").filter(torch.zeros(1, 3, 2, dtype=dtype))
    error = (found.covariance[0, -1].double() / units / units[:, None] - exact).abs().max()
    assert error < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slow", [1e-2, 1e-5])
def test_the_steady_state_of_walks_of_far_different_noise(slow: float, dtype: torch.dtype) -> None:
    """Predicted p = (q + (q^2 + 4 q r)^.5) / 2, belief p r / (p + r); a gain near ``slow``."""
    noise = torch.tensor([1.0, 0.1 * slow], dtype=dtype)
    seen = torch.tensor([1.0, 0.1], dtype=dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2, dtype=dtype)
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, noise).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z, seen).to_event(1), obs=x[:, t])

    found = temporal(model, "steady").filter(torch.zeros(1, 3, 2, dtype=dtype)).covariance[0, -1]
    q, r = noise.double().square(), seen.double().square()
    p = (q + (q.square() + 4 * q * r).sqrt()) / 2
    exact = p * r / (p + r)
    # Rounding in double precision is summed over 1 / slow steps.
    slack = 100 * torch.finfo(dtype).eps + 10 * torch.finfo(torch.float64).eps / slow
    assert ((found.diagonal().double() - exact) / exact).abs().max() < slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["noise", "curvature of the data"])
def test_steady_refuses_small_numbers_that_change(what: str, dtype: torch.dtype) -> None:
    """Beside a wide state, a narrow one whose noise, or that of its data, grows threefold."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 2, dtype=dtype)
            for t in range(x.shape[1]):
                grown = {"noise": (3.0, 1.0), "curvature of the data": (1.0, 3.0)}[what]
                own, other = grown if t > 1 else (1.0, 1.0)
                scale = torch.tensor([1.0, 3e-3 * own], dtype=dtype)
                seen = torch.tensor([3e-3, other], dtype=dtype)
                z = pyro.sample(f"z_{t}", dist.Normal(z, scale).to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z, seen).to_event(1), obs=x[:, t])

    with pytest.raises(ValueError, match=f"its {what} changes between"):
        temporal(model, "steady").infer(torch.zeros(1, 4, 2, dtype=dtype))


@pytest.mark.usefixtures("float64")
def test_fixed_precision_is_a_kalman_update_with_the_process_noise() -> None:
    model, x = made()
    found = temporal(model).filter(x)
    emission, noise = model.emission.weight, model.emission.scale_tril
    mean = None
    for t in range(5):
        level = model.initial if mean is None else model.transition
        predicted = level.scale_tril @ level.scale_tril.mT
        inner = emission @ predicted @ emission.mT + noise @ noise.mT
        gain = torch.linalg.solve(inner, emission @ predicted).mT
        mean = level.loc(None).expand(4, -1) if mean is None else level.loc(mean)
        mean = mean + (x[:, t] - model.emission.loc(mean)) @ gain.mT
        assert (found.mean[:, t] - mean).abs().max() < 1e-8
    assert found.predicted_covariance is None


@pytest.mark.usefixtures("float64")
def test_the_scalar_random_walk() -> None:
    """T16: gain and error .618 against 1/2 and 2/3, in closed form and simulated."""
    z, x = walks(4_000, 6)
    errors = {}
    cases = {
        "steady": (temporal(walk, "steady"), GOLDEN, GOLDEN),
        "predicted covariance": (temporal(walk, torch.tensor([[GOLDEN]])), GOLDEN, GOLDEN),
        "fixed": (temporal(walk), 0.5, 2 / 3),
        "process noise": (temporal(walk, torch.tensor([[1.0]])), 0.5, 2 / 3),
    }
    for name, (loop, gain, variance) in cases.items():
        # 1 / 1.618 is the golden gain itself: 1.618 is the covariance of a prediction.
        other = x[:2].clone()
        other[0, 4] += 1.0
        moved = loop.infer(other)["z_4"][0] - loop.infer(x[:2])["z_4"][0]
        assert float(moved) == pytest.approx(gain, abs=1e-8)
        square = (loop.infer(x)["z_5"] - z[:, 5]).square()
        error = float(square.std() / math.sqrt(len(square)))
        assert float(square.mean()) == pytest.approx(variance, abs=4 * error)
        assert error < 0.025
        errors[name] = square
        # The same variance as the fixed point of error propagation with a constant gain.
        p = variance
        assert (1 - gain) ** 2 * (p + 1) + gain**2 == pytest.approx(p)
    worse = errors["fixed"] - errors["steady"]
    assert float(worse.mean()) > 4 * float(worse.std() / math.sqrt(len(worse)))


def bent(x: Tensor) -> None:
    """A program that is linear nowhere."""
    with pyro.plate("data", len(x)):
        z = x.new_tensor([0.5, -0.3]).expand(len(x), -1)
        for t in pyro.markov(range(x.shape[1])):
            loc = torch.stack([z[:, 0] + 0.3 * z[:, 1].sin(), 0.9 * torch.tanh(z.sum(-1))], -1)
            z = pyro.sample(f"z_{t}", dist.Normal(loc, x.new_tensor([0.4, 0.6])).to_event(1))
            seen = torch.stack([z[:, 0].exp(), z[:, 0] * z[:, 1]], -1)
            pyro.sample(f"x_{t}", dist.Normal(seen, 0.5).to_event(1), obs=x[:, t])


def iterated_kalman(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The iterated extended Kalman filter of :func:`bent` for one sequence, Jacobians by hand."""
    q, r = torch.tensor([0.16, 0.36]).diag(), 0.25 * torch.eye(2)
    mean, covariance = torch.tensor([0.5, -0.3]), torch.zeros(2, 2)
    means, covariances = [], []
    for seen in x:
        slope = 0.9 * (1 - torch.tanh(mean.sum()) ** 2)
        a = torch.stack(
            [
                torch.stack([torch.ones(()), 0.3 * mean[1].cos()]),
                torch.stack([slope, slope]),
            ]
        )
        predicted = torch.stack([mean[0] + 0.3 * mean[1].sin(), 0.9 * torch.tanh(mean.sum())])
        ahead = a @ covariance @ a.mT + q
        point = predicted
        for _ in range(500):
            c = torch.stack(
                [
                    torch.stack([point[0].exp(), torch.zeros(())]),
                    torch.stack([point[1], point[0]]),
                ]
            )
            g = torch.stack([point[0].exp(), point[0] * point[1]])
            gain = torch.linalg.solve(c @ ahead @ c.mT + r, c @ ahead).mT
            full = predicted + gain @ (seen - g - c @ (predicted - point))
            point = point + 0.3 * (full - point)  # damped: the plain iteration may oscillate
        mean, covariance = point, ahead - gain @ c @ ahead
        means.append(mean)
        covariances.append(covariance)
    return means, covariances


@pytest.mark.usefixtures("float64")
def test_the_extended_filter_is_the_iterated_kalman_filter() -> None:
    torch.manual_seed(3)
    x = 0.7 + 0.5 * torch.randn(3, 4, 2)
    found = temporal(bent, "laplace", hessian="gauss_newton", num_steps=50).filter(x)
    for row in range(3):
        means, covariances = iterated_kalman(x[row])
        for t in range(4):
            assert (found.mean[row, t] - means[t]).abs().max() < 1e-8
            assert (found.covariance[row, t] - covariances[t]).abs().max() < 1e-8
    exact = temporal(bent, "laplace", num_steps=50).filter(x)
    assert (exact.mean[:, 0] - found.mean[:, 0]).abs().max() < 1e-8
    assert (exact.covariance[:, 0] - found.covariance[:, 0]).abs().max() > 1e-3


def pairs(x: Tensor, together: bool = False) -> None:
    """Two latents a step, one of which follows the other; names of the program's own."""
    with pyro.plate("rows", len(x)):
        a = b = torch.zeros(len(x))
        held = []
        for t in range(x.shape[1]):
            a = pyro.sample(f"a{t}", dist.Normal(0.8 * a + 0.3 * b, 0.5))
            b = pyro.sample(f"b{t}", dist.Normal(0.4 * a + 0.6 * b + 0.1, 0.7))
            held.append((a, b))
            if not together:
                pyro.sample(f"y{t}", dist.Normal(a + 2 * b, 0.9), obs=x[:, t])
        for t, (a, b) in enumerate(held if together else ()):
            pyro.sample(f"y{t}", dist.Normal(a + 2 * b, 0.9), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("together", [False, True])
def test_a_step_of_two_latents_is_filtered_as_one(together: bool) -> None:
    """The belief at t is the marginal of the exact posterior of the first t steps."""
    torch.manual_seed(1)
    x = torch.randn(3, 3)
    found = temporal(pairs, "riccati").filter(x, together)
    for t in range(3):
        part = x[:, : t + 1]
        pc = PredictiveCoding(pairs, pyro.optim.SGD({"lr": 0.0}), solver="auto", num_steps=100)
        whole = pc.posterior(part)
        last = whole.covariance("data")[:, -2:, -2:]
        assert (found.mean[:, t] - whole.loc_data[:, -2:]).abs().max() < 1e-8
        assert (found.covariance[:, t] - last).abs().max() < 1e-8


def nested(x: Tensor) -> None:
    """Plates inside the plate of the sequences, which has a dimension of its own."""
    with pyro.plate("data", len(x), dim=-2):
        z = torch.zeros(1, 1)
        for t in range(x.shape[1]):
            with pyro.plate(f"units_{t}", 2, dim=-1):
                z = pyro.sample(f"z_{t}", dist.Normal(0.7 * z, 1.0))
            with pyro.plate(f"features_{t}", 3, dim=-1):
                loc = z.sum(-1, keepdim=True) * torch.tensor([1.0, 2.0, -1.0])
                pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[:, t])


@pytest.mark.usefixtures("float64")
def test_plates_inside_the_plate() -> None:
    x = torch.randn(4, 2, 3)
    found = temporal(nested, "riccati").filter(x)
    pc = PredictiveCoding(nested, pyro.optim.SGD({"lr": 0.0}), solver="auto", num_steps=50)
    whole = pc.posterior(x)
    assert (found.mean[:, 1] - whole.loc_data[:, -2:]).abs().max() < 1e-8
    assert (found.covariance[:, 1] - whole.covariance("data")[:, -2:, -2:]).abs().max() < 1e-8


@pytest.mark.usefixtures("float64")
def test_rows_that_the_program_draws() -> None:
    full = torch.randn(10, 2)

    def subsampled() -> None:
        with pyro.plate("data", 10, subsample_size=4) as index:
            walk_of(full[index])

    def walk_of(x: Tensor) -> None:
        z = torch.zeros(4)
        for t in range(2):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    loop = temporal(subsampled, "riccati")
    losses = torch.tensor([loop.evaluate_loss() for _ in range(15)])
    whole = temporal(walk, "riccati").evaluate_loss(full)
    assert losses.mean().item() == pytest.approx(whole, abs=4 * losses.std().item() / 15**0.5)
    assert losses.std() > 0


@pytest.mark.usefixtures("float64")
def test_one_step_is_predictive_coding() -> None:
    """A program without time is a sequence of one step."""
    model = MODEL_CASES["vae"].build()
    (x,) = MODEL_CASES["vae"].args(model)
    pc = PredictiveCoding(model, pyro.optim.SGD({"lr": 0.0}), solver="newton", num_steps=50)
    loop = temporal(model)
    assert (loop.infer(x)["z"] - pc.infer(x)["z"]).abs().max() < 1e-8
    assert loop.evaluate_loss(x) == pytest.approx(pc.evaluate_loss(x), abs=1e-8)


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.ones(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.LogNormal(z.log(), 0.5))
            pyro.sample(f"x_{t}", dist.Poisson(z), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("jacobian", [True, False])
def test_the_plain_filter_takes_any_continuous_state(jacobian: bool) -> None:
    """Positive states, in unconstrained space: each step minimizes its own energy."""
    x = torch.tensor([[3.0, 0.0], [1.0, 4.0]])
    loop = temporal(positive, jacobian=jacobian)
    found = loop.infer(x)
    before = torch.ones(2)
    energy = torch.zeros(())
    for t in range(2):
        u = found[f"z_{t}"].log().requires_grad_()
        z = u.exp()
        own = dist.LogNormal(before.log(), 0.5).log_prob(z) + dist.Poisson(z).log_prob(x[:, t])
        own = own + u if jacobian else own
        (slope,) = torch.autograd.grad(own.sum(), u)
        assert slope.abs().max() < 1e-7
        before = found[f"z_{t}"]
        energy = energy - own.detach().sum()
    assert loop.evaluate_loss(x) == pytest.approx(float(energy))
    with pytest.raises(NotImplementedError, match="needs Gaussian latents, but site 'z_0'"):
        temporal(positive, "riccati").infer(x)


@pytest.mark.usefixtures("float64")
def test_the_energy_is_that_of_pyros_trace() -> None:
    model, x = made()
    loop = temporal(model)
    lengths = torch.tensor([5, 1, 3, 2])
    for args in ((x,), (x, lengths)):
        values = loop.infer(*args)
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
        assert loop.evaluate_loss(*args) == pytest.approx(-trace.log_prob_sum().item())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_do_not_know_each_other(precision: str) -> None:
    """Ragged rows are those of shorter sequences; padding counts nowhere; longer ones run."""
    model, x = made(2)
    loop = temporal(model, precision)
    longer = torch.cat([x, x], 1)[:3, :3]
    lengths = torch.tensor([3, 1, 2])
    found = loop.infer(longer, lengths)
    padded = longer.clone()
    padded[1, 1:] = 1e3
    again = loop.infer(padded, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = loop.infer(longer[row : row + 1, :length])
        for t in range(length):
            name = f"z_{t + 1}"
            assert (found[name][row] - alone[name][0]).abs().max() < 1e-8
            assert (found[name][row] - again[name][row]).abs().max() < 1e-12
    loss = loop.evaluate_loss(longer, lengths)
    assert loss == pytest.approx(loop.evaluate_loss(padded, lengths))
    parts = [loop.evaluate_loss(longer[r : r + 1, :n]) for r, n in enumerate(lengths.tolist())]
    assert loss == pytest.approx(sum(parts))


@pytest.mark.usefixtures("float64")
def test_a_minibatch_scales_the_loss_and_moves_no_state() -> None:
    model, x = made(3)
    loop = temporal(model, "riccati")
    index = torch.tensor([2, 0])
    part = loop.filter(x[index], size=4, index=index)
    assert (part.mean - loop.filter(x).mean[index]).abs().max() < 1e-10
    scaled = loop.evaluate_loss(x[index], size=4, index=index)
    assert scaled == pytest.approx(2 * loop.evaluate_loss(x[index]))


def gaps(x: Tensor, seen: Tensor, whole: bool) -> None:
    """Steps that are missing: of the data alone, or of the row."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=seen[:, t]) if whole else poutine.mask(mask=True):
                z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
            with poutine.mask(mask=seen[:, t]):
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("whole", [False, True])
def test_a_missing_step_is_a_prediction(whole: bool) -> None:
    x = torch.tensor([[1.0, 7.0, 2.0], [1.0, 1.0, 1.0]])
    seen = torch.tensor([[True, False, True], [False, False, False]])
    found = temporal(gaps, "riccati").filter(x, seen, whole)
    mean, variance = torch.zeros(2), torch.zeros(2)
    for t in range(3):
        mean, variance = 0.9 * mean, 0.81 * variance + 1.0
        gain = torch.where(seen[:, t], variance / (variance + 1), torch.zeros(2))
        mean, variance = mean + gain * (x[:, t] - mean), (1 - gain) * variance
        assert (found.mean[:, t, 0] - mean).abs().max() < 1e-10
        assert (found.covariance[:, t, 0, 0] - variance).abs().max() < 1e-10


@pytest.mark.usefixtures("float64")
def test_steps_of_a_given_size() -> None:
    """One update of the published dynamics: u = m - eta dE/du at the prediction."""
    x = torch.tensor([[2.0, -1.0]])
    loop = temporal(walk, solver="gradient", step_size=0.1, num_steps=1)
    found = loop.infer(x)
    first = 0.1 * 2.0
    assert float(found["z_0"]) == pytest.approx(first)
    assert float(found["z_1"]) == pytest.approx(first + 0.1 * (-1.0 - first))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_learning_lowers_the_loss(precision: str) -> None:
    model, x = made(3)
    loop = temporal(model, precision)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = loop.evaluate_loss(x)
    evidence = float(model.log_evidence(x).sum().detach())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    own = {"transition.log_scale", "transition.lower"} if precision == "learned" else set()
    with pytest.warns(UserWarning, match="transition.log") if own else contextlib.nullcontext():
        losses = [loop.step(x)]
    losses += [loop.step(x) for _ in range(3)]
    assert losses[0] == pytest.approx(first)
    assert losses[-1] < losses[0]
    if precision == "riccati":
        assert first == pytest.approx(-evidence)
        assert float(model.log_evidence(x).sum().detach()) > evidence
    # A learned covariance takes the place of the program's own transition noise.
    assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} == own


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_taken_at_the_final_state() -> None:
    """Not at the one before its last update: with one step of descent they differ."""
    model, x = made(3)
    loop = temporal(model, solver="gradient", num_steps=1, step_size=0.05)
    values = loop.infer(x)
    loop._loss(loop._read((x,), {})).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
    (-trace.log_prob_sum()).backward()
    assert set(found) == {n for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad - found[name]).abs().max() < 1e-10


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("steps", [1, 2])
def test_the_evidence_of_a_step_has_its_whole_derivative(steps: int) -> None:
    """The curvature moves with the state and the state with the parameters: differences agree.

    Local in time: what came before a step is a constant in its derivative.
    """
    y = torch.tensor([[3.0, 1.0], [0.0, 2.0]])[:, :steps]

    def counts(y: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(0.7))
        with pyro.plate("data", len(y)):
            z = torch.zeros(len(y))
            for t in range(y.shape[1]):
                own = rate if t == y.shape[1] - 1 else rate.detach()
                z = pyro.sample(f"z_{t}", dist.Normal(own * z, 1.0 + own**2))
                pyro.sample(f"y_{t}", dist.Poisson((own * z).exp()), obs=y[:, t])

    loop = temporal(counts, "laplace")
    loop._loss(loop._read((y,), {})).backward()
    found = pyro.get_param_store().get_param("rate")
    ahead, behind = (loop_at(y, 0.7, 0.7 + h) for h in (1e-4, -1e-4))
    assert found.grad.item() == pytest.approx((ahead - behind) / 2e-4, rel=1e-5)


def loop_at(y: Tensor, before: float, last: float) -> float:
    """The loss with another rate at the last step alone."""

    def counts(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = torch.zeros(len(y))
            for t in range(y.shape[1]):
                own = last if t == y.shape[1] - 1 else before
                z = pyro.sample(f"z_{t}", dist.Normal(own * z, 1.0 + own**2))
                pyro.sample(f"y_{t}", dist.Poisson((own * z).exp()), obs=y[:, t])

    return temporal(counts, "laplace").evaluate_loss(y)


@pytest.mark.usefixtures("float64")
def test_a_learned_precision_settles_at_the_predicted_covariance() -> None:
    """1.618 for the random walk: where squared innovations are as large as they are predicted."""
    _, x = walks(4000, 4)
    x = x + GOLDEN**0.5 * torch.randn(len(x), 1)  # begun in the steady state
    loop = temporal(started, "learned", name="walk")
    loop._register(x[:2])
    tril = pyro.get_param_store().get_param("walk.prediction_scale_tril").detach()
    assert tril.item() ** 2 == pytest.approx(1.0), "learning begins at the process noise"
    slopes = {}
    for covariance in (1.0, 1 + GOLDEN, 2.5):
        with torch.no_grad():
            pyro.get_param_store()["walk.prediction_scale_tril"] = torch.full(
                (1, 1), covariance**0.5
            )
        tril = pyro.param("walk.prediction_scale_tril").unconstrained()
        loop._loss(loop._read((x,), {})).backward()
        predicted = loop.filter(x).predicted_mean[:, 1:, 0].detach()
        innovation = (x[:, 1:] - predicted).square()
        total = covariance + 1.0
        # d/dS of 1/2 log(S + 1) + 1/2 nu^2 / (S + 1), by rows
        rows = (0.5 / total - 0.5 * innovation / total**2).sum(1)
        # tril = exp(raw) and S = tril^2, so dS/draw = 2 S
        assert float(tril.grad) == pytest.approx(float(rows.sum()) * 2 * covariance)
        slopes[covariance] = float(rows.mean()) / float(rows.std() / math.sqrt(len(rows)))
    assert slopes[1.0] < -4
    assert abs(slopes[1 + GOLDEN]) < 4
    assert slopes[2.5] > 4


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_learning_a_precision_ends_at_the_predicted_covariance() -> None:
    """From the process noise, 1, to 1.618, within four standard errors of its information."""
    torch.manual_seed(0)
    _, x = walks(1000, 3)
    x = x + GOLDEN**0.5 * torch.randn(len(x), 1)
    optim = pyro.optim.ClippedAdam({"lr": 0.06, "lrd": 0.93})
    loop = TemporalPredictiveCoding(started, optim, precision="learned", name="walk")
    loop.run(40, ((x,), {}), progress=False)
    found = pyro.param("walk.prediction_scale_tril").detach().item() ** 2
    error = (2 + GOLDEN) * (2 / (2 * len(x))) ** 0.5  # of a variance, from 2 steps of each row
    assert found == pytest.approx(1 + GOLDEN, abs=4 * error)
    assert 1.0 + 4 * error < 1 + GOLDEN


def started(x: Tensor) -> None:
    """The random walk, begun in the steady state of its filter."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0 if t else (1 + GOLDEN) ** 0.5))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@pytest.mark.usefixtures("float64")
def test_a_resumed_run_goes_on_where_it_stopped() -> None:
    _, x = walks(3, 3)
    with pyro.get_param_store().scope():
        whole = temporal(walk, "learned", name="t").run(4, ((x,), {}), progress=False)
    with pyro.get_param_store().scope():
        half = temporal(walk, "learned", name="t").run(2, ((x,), {}), progress=False)
    with pyro.get_param_store().scope():
        loop = temporal(walk, "learned", name="t")
        rest = loop.run(4, ((x,), {}), progress=False, state=half.state)
    assert rest.losses == pytest.approx(whole.losses)


@pytest.mark.usefixtures("float64")
def test_the_posterior_is_a_guide_of_marginals() -> None:
    model, x = made(3)
    lengths = torch.tensor([3, 1, 2, 3])
    guide = temporal(model, "riccati").posterior(x, lengths)
    exact = model.filter(x, lengths)
    trace = poutine.trace(guide).get_trace(x, lengths)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, lengths)
    assert torch.isfinite(replayed.log_prob_sum())
    draws, log_q, _ = guide.rsample_packed(20_000, (x, lengths))
    for t in range(3):
        u = draws[f"step_{t + 1}"]
        q = torch.distributions.MultivariateNormal(exact.mean[:, t], exact.covariance[:, t])
        on = t < lengths
        assert (log_q[f"step_{t + 1}"] - q.log_prob(u))[:, on].abs().max() < 1e-8
        assert (log_q[f"step_{t + 1}"][:, ~on] == 0).all()
        error = exact.covariance[:, t].diagonal(dim1=-2, dim2=-1).sqrt() / math.sqrt(20_000)
        assert ((u.mean(0) - exact.mean[:, t]).abs() < 5 * error).all()
    located = guide.locations(x, lengths)
    assert (located["z_2"] - exact.mean[:, 1]).abs().max() < 1e-8
    assert "3 steps of 2 coordinates" in repr(guide)


def test_single_precision_follows_double() -> None:
    model, x = made(3)
    found = temporal(model, "riccati").filter(x)
    assert found.mean.dtype == torch.float32
    assert (found.mean - model.filter(x).mean).abs().max() < 1e-4


def late(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0 + t))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def unseen(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(2 * z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(0 * z, 1.0), obs=x[:, t])


def above(x: Tensor) -> None:
    pyro.sample("speed", dist.Normal(0.0, 1.0))
    walk(x)


def apart(x: Tensor) -> None:
    walk(x)
    pyro.factor("penalty", torch.tensor(1.0))


def scaled(x: Tensor) -> None:
    with poutine.scale(scale=2.0):
        walk(x)


def masked_inside(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            on = torch.tensor([True, False])
            z = pyro.sample(f"z_{t}", dist.Normal(torch.zeros(len(x)), 1.0).mask(on))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def backwards(x: Tensor) -> None:
    """Data after all latents, last step first."""
    with pyro.plate("data", len(x)):
        z, held = torch.zeros(len(x)), []
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            held.append(z)
        for t in reversed(range(x.shape[1])):
            pyro.sample(f"x_{t}", dist.Normal(held[t], 1.0), obs=x[:, t])


def half_masked(x: Tensor, seen: Tensor) -> None:
    """Latents that rows lack, with data that count."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=seen[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def peaked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
            pyro.sample(f"x_{t}", dist.Laplace(z, 0.1), obs=x[:, t])


def heavy(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 3.0))
            pyro.sample(f"x_{t}", dist.StudentT(1.0, z, 0.1), obs=x[:, t])


def lags(x: Tensor, latent: float, seen: float) -> None:
    """An autoregression of order two, or data that read the state before."""
    with pyro.plate("data", len(x)):
        before = last = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * last + latent * before, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z + seen * last, 1.0), obs=x[:, t])
            before, last = last, z


def both_lags(x: Tensor, latent: float, seen: float) -> None:
    """The same program, with both lags in the state."""
    move = torch.tensor([[0.9, latent], [1.0, 0.0]])
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), 2)
        for t in range(x.shape[1]):
            tril = torch.tensor([1.0, 1e-2]).diag()
            loc = z @ move.mT
            z = pyro.sample(f"z_{t}", dist.MultivariateNormal(loc, scale_tril=tril))
            read = z[:, 0] + seen * z[:, 1]
            pyro.sample(f"x_{t}", dist.Normal(read, 1.0), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("latent", "seen", "what"), [(0.5, 0.0, "latents"), (0.0, 1.0, "data")])
def test_more_than_one_lag_is_refused_and_fits_in_the_state(
    latent: float, seen: float, what: str
) -> None:
    x = torch.randn(2, 4)
    for precision in ("learned", "riccati", "steady", "laplace", torch.eye(1)):
        with pytest.raises(NotImplementedError, match=f"the {what} of the step of z_. depend"):
            temporal(lags, precision).infer(x, latent, seen)
    assert len(temporal(lags).infer(x, latent, seen)) == 4
    moves = torch.eye(4) - 0.9 * torch.eye(4).roll(1, 0).tril()
    moves = moves - latent * torch.eye(4).roll(2, 0).tril()
    emits = (torch.eye(4) + seen * torch.eye(4).roll(1, 0).tril()) @ torch.linalg.inv(moves)
    exact = dist.MultivariateNormal(torch.zeros(4), emits @ emits.mT + torch.eye(4)).log_prob(x)
    found = temporal(both_lags, "riccati").log_evidence(x, latent, seen)
    assert (found - exact).abs().max() < 1e-3  # the second lag has a noise of 1e-2


def test_a_step_that_a_row_lacks_is_believed_as_predicted() -> None:
    x, seen = torch.zeros(2, 3), torch.tensor([[True, False, True], [True, True, True]])
    found = temporal(narrow).filter(x, seen).covariance[..., 0, 0]
    known = 1 / (1 + 1 / 0.01)
    expected = torch.tensor([[known, 0.01, known], [known] * 3])
    assert (found - expected).abs().max() < 1e-6


def narrow(x: Tensor, seen: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=seen[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 0.1))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def once_late(x: Tensor) -> None:
    """Another noise at a step in the middle alone."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(z, 9.0 if t == 2 else 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


def test_steps_are_checked_for_every_structure_and_draw_nothing() -> None:
    loop, on = temporal(half_masked), torch.ones(2, 3, dtype=torch.bool)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    loop.infer(X, on)
    assert torch.equal(torch.get_rng_state(), before)
    on[1, 1:] = False
    with pytest.raises(NotImplementedError, match=r"'x_1' .* or counts where those latents"):
        loop.infer(X, on)


def test_where_there_is_no_evidence_the_energy_is_learned_from() -> None:
    x = torch.tensor([[0.5]])
    for hessian in ("exact", "gauss_newton"):
        with pytest.raises(ValueError, match=r"kink where .* Pass evidence=False"):
            temporal(peaked, "riccati", hessian=hessian).log_evidence(x)
    loop = temporal(peaked, "riccati", hessian="gauss_newton", evidence=False)
    exact = dist.Normal(0.0, 1.0).log_prob(x) + dist.Laplace(x, 0.1).log_prob(x)
    assert loop.evaluate_loss(x) == pytest.approx(-exact.item(), abs=0.05)
    x = torch.tensor([[0.0, 0.15, 9.0, 0.0]])
    with pytest.raises(ValueError, match=r"not convex .* or pass evidence=False"):
        temporal(heavy, "riccati", hessian="gauss_newton", num_steps=1).log_evidence(x)
    assert temporal(heavy, "riccati", evidence=False, num_steps=1).evaluate_loss(x) > 0


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: temporal(walk, "kalman"), "precision must be a matrix or one of fixed"),
        (lambda: temporal(walk, torch.ones(3)), "square matrix"),
        (lambda: temporal(walk, -torch.eye(1)), "symmetric and positive definite"),
        (lambda: temporal(walk, torch.eye(2)).infer(X), "matrix of the 1 latent coordinates"),
        (lambda: temporal(walk, "learned", evidence=False), "needs evidence=True"),
        (lambda: temporal(walk, evidence=True, jacobian=False), "needs jacobian=True"),
        (lambda: temporal(walk, hessian="diagonal"), "hessian must be"),
        (lambda: temporal(walk, step_size=0.1), "finds its steps itself"),
        (lambda: temporal(walk, num_steps=-1), "must not be negative"),
        (lambda: TemporalPredictiveCoding(pyro.optim.SGD({}), walk), "The order is"),
        (lambda: TemporalPredictiveCoding(walk, torch.optim.SGD), "must be a PyroOptim"),
        (lambda: temporal(above).infer(X), "site 'speed' is outside the data plate"),
        (lambda: temporal(apart).infer(X), "'penalty' counts .* belongs to no step"),
        (lambda: temporal(scaled, "riccati").infer(X), "'z_0' is scaled"),
        (lambda: temporal(masked_inside).infer(X), "'z_0' has a mask of its own"),
        (lambda: temporal(late, "steady").infer(X), "its noise changes between"),
        (lambda: temporal(once_late, "steady").infer(torch.zeros(2, 5)), "its noise changes"),
        (lambda: temporal(backwards).infer(X), "'x_2' of the step of z_0 depends on later"),
        (lambda: temporal(walk, jacobian=False).log_evidence(X), "log_evidence needs jacobian"),
        (lambda: temporal(bent, "steady").infer(torch.zeros(2, 3, 2)), "needs a program that"),
        (lambda: temporal(unseen, "steady").infer(X), "did not settle"),
    ],
)
def test_bad_calls_say_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        call()


def test_it_is_a_loop() -> None:
    assert LOOPS["temporal"].endswith(":TemporalPredictiveCoding")
    loop = temporal(walk, "riccati")
    assert "precision=riccati" in repr(loop)
    assert stationary(loop._read((X,), {})).shape == (1, 1)
    assert layout(walk, (X,)).num_rows == 2


def test_data_of_another_dtype_than_the_program() -> None:
    _, x = walks(3, 4)
    for precision in PRECISIONS:
        with pyro.get_param_store().scope():
            found = temporal(walk, precision).filter(x.double())
            wanted = temporal(walk, precision).filter(x.float())
        assert (found.mean - wanted.mean).abs().max() < 1e-5

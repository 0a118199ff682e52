"""The hierarchical Gaussian filter, against Kalman's, quadrature, and its own energy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import HierarchicalGaussianFilter, TemporalPredictiveCoding
from guides.inference.gaussian_filter import Belief, predict, value_update, volatility_update

pytestmark = pytest.mark.usefixtures("float64")


def hgf(inputs: str = "continuous", **options: Any) -> HierarchicalGaussianFilter:
    options.setdefault("tonic", torch.tensor([-4.0, -4.0]))
    return HierarchicalGaussianFilter(inputs, **options)


def one(mean: float, precision: float) -> Belief:
    return Belief(torch.tensor([mean]), torch.tensor([precision]))


def test_one_step_of_known_numbers() -> None:
    """T20: u = .2 with omega = -4; a Kalman step for the lowest level."""
    found = hgf()(torch.tensor([[0.2]]))
    expected = 1 / (1 + math.exp(-4))
    assert found.predicted_precision[0, 0, 0].item() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.98201379, abs=5e-9)
    assert found.precision[0, 0, 0].item() == pytest.approx(1.98201379, abs=5e-9)
    assert found.mean[0, 0, 0].item() == pytest.approx(0.10090747, abs=5e-9)


def test_one_level_is_the_kalman_filter() -> None:
    """Of a random walk, as predictive coding with Riccati precision runs it; evidence too."""
    step, noise = math.exp(-0.5 * 0.7), 0.8

    def walk(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.full((len(x),), 0.3)
            for t in range(x.shape[1]):
                scale = math.sqrt(0.5 + step**2) if t == 0 else step
                z = pyro.sample(f"z_{t}", dist.Normal(z, scale))
                pyro.sample(f"x_{t}", dist.Normal(z, noise), obs=x[:, t])

    x = torch.randn(3, 4)
    filter = hgf(
        tonic=torch.tensor([-0.7]),
        mean=torch.tensor([0.3]),
        precision=torch.tensor([2.0]),
        input_precision=noise**-2,
    )
    found = filter(x)
    loop = TemporalPredictiveCoding(walk, pyro.optim.SGD({"lr": 0.1}), precision="riccati")
    exact = loop.filter(x)
    assert (found.mean - exact.mean).abs().max() < 1e-8
    assert (1 / found.precision - exact.covariance[..., 0]).abs().max() < 1e-8
    assert (found.log_evidence.sum(1) - loop.log_evidence(x)).abs().max() < 1e-8


def test_a_coupled_child_is_kalmans_update() -> None:
    """p(x) = Normal(.3, 1/2), y = 1.5 x + noise of precision 4."""
    belief = value_update(one(0.3, 2.0), torch.tensor([1.0 - 1.5 * 0.3]), torch.tensor(4.0), 1.5)
    gain = 0.5 * 1.5 / (1.5**2 * 0.5 + 0.25)
    assert belief.mean.item() == pytest.approx(0.3 + gain * (1.0 - 0.45))
    assert 1 / belief.precision.item() == pytest.approx((1 - gain * 1.5) * 0.5)


class Case:
    """One volatility update with numbers of no special kind."""

    kappa, omega = 0.7, -0.4

    def __init__(self, u: float = 1.4) -> None:
        self.before, self.parent = one(0.2, 1.7), one(-0.3, 0.9)
        variance = math.exp(self.kappa * self.parent.mean.item() + self.omega)
        self.predicted = predict(self.before, torch.tensor(variance))
        self.child = value_update(self.predicted, u - self.predicted.mean, torch.tensor(2.5))
        self.above = predict(self.parent, torch.tensor(0.1))

    def update(self, kind: str = "quadratic") -> Belief:
        return volatility_update(
            self.above,
            self.before,
            self.predicted,
            self.child,
            torch.tensor(self.kappa),
            torch.tensor(self.omega),
            kind,
        )

    def energy(self, x: Tensor) -> Tensor:
        """Minus the variational energy of the level above, by the formula of the papers."""
        total = 1 / self.before.precision + torch.exp(self.kappa * x + self.omega)
        squared = 1 / self.child.precision + (self.child.mean - self.predicted.mean) ** 2
        own = self.above.precision * (x - self.above.mean) ** 2
        return (-0.5 * total.log() - 0.5 * squared / total - 0.5 * own).sum()


@pytest.mark.parametrize("u", [1.4, 0.2, -2.0])
def test_the_volatility_update_is_a_newton_step_on_the_energy(u: float) -> None:
    """Re-derived by automatic differentiation, and the enhanced update with it."""
    case = Case(u)
    at = case.above.mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(case.energy(at), at, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), at)
    found = case.update()
    assert (found.precision + curvature).abs().max() < 1e-12
    assert (found.mean - (case.above.mean - slope / curvature)).abs().max() < 1e-12
    enhanced = case.update("enhanced")
    moved = (case.above.mean + slope / case.above.precision).detach()
    assert (enhanced.mean - moved).abs().max() < 1e-12
    curvature = torch.autograd.functional.hessian(case.energy, moved)[0]
    expected = torch.maximum(-curvature, case.above.precision)
    assert (enhanced.precision - expected).abs().max() < 1e-12


def test_the_energy_is_the_expectation_under_the_belief_about_the_child() -> None:
    """Mean field: log of the optimal q(x_2) is E_q(x_1) log p(x_1 | x_2), by quadrature."""
    case = Case()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x1 = case.child.mean + torch.tensor(nodes) / case.child.precision.sqrt()
    weight = torch.tensor(weights / weights.sum())

    def expectation(x: Tensor) -> Tensor:
        scale = (1 / case.before.precision + torch.exp(case.kappa * x + case.omega)).sqrt()
        walked = dist.Normal(case.before.mean, scale).log_prob(x1)
        own = dist.Normal(case.above.mean, case.above.precision.rsqrt()).log_prob(x)
        return (weight * walked).sum() + own.sum()

    points = [torch.tensor([v]) for v in (-1.0, 0.0, 0.7, 2.0)]
    offsets = [float(expectation(x) - case.energy(x)) for x in points]
    assert offsets == pytest.approx([offsets[0]] * 4, abs=1e-10)


def test_weak_coupling_is_exact_to_first_order() -> None:
    """The mean of the volatility against the posterior on a grid: the error falls as kappa^2."""
    u, errors = 2.5, []
    grid = torch.linspace(-12.0, 12.0, 20_001)
    for kappa in (0.2, 0.1, 0.05):
        filter = hgf(
            tonic=torch.tensor([-0.5, -1.0]),
            coupling=torch.tensor([kappa]),
            precision=torch.tensor([1.5, 0.8]),
            input_precision=2.0,
        )
        found = filter(torch.tensor([[u]])).mean[0, 0, 1].item()
        variance = 1 / 1.5 + torch.exp(kappa * grid - 0.5) + 1 / 2.0
        prior = dist.Normal(0.0, math.sqrt(1 / 0.8 + math.exp(-1.0)))
        log = dist.Normal(0.0, variance.sqrt()).log_prob(torch.tensor(u)) + prior.log_prob(grid)
        exact = float((log.softmax(0) * grid).sum())
        assert found * exact > 0
        errors.append(abs(found - exact) / kappa)
    # The first order is right, so what is left of it vanishes with kappa.
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.7 * errors[1]
    assert errors[2] < 0.05


def test_a_binary_input_is_one_newton_step() -> None:
    predicted = one(0.4, 1.3)
    filter = hgf("binary", tonic=torch.tensor([-2.0]), mean=torch.tensor([0.4]))
    for u in (0.0, 1.0):
        found = filter(torch.tensor([[u]]))
        predicted = one(0.4, 1 / (1 + math.exp(-2.0)))

        def energy(x: Tensor, u: float = u, predicted: Belief = predicted) -> Tensor:
            own = -0.5 * predicted.precision * (x - predicted.mean) ** 2
            return (dist.Bernoulli(logits=x).log_prob(torch.tensor(u)) + own).sum()

        at = predicted.mean
        slope = torch.autograd.functional.jacobian(energy, at)
        curvature = torch.autograd.functional.hessian(energy, at)[0]
        assert (found.precision[0, 0] + curvature).abs().max() < 1e-12
        assert (found.mean[0, 0] - (at - slope / curvature)).abs().max() < 1e-12
        expected = dist.Bernoulli(logits=at).log_prob(torch.tensor(u))
        assert (found.log_evidence[0, 0] - expected).abs().max() < 1e-12


def three_levels(u: list[float], kappa: float, omega: float, theta: float) -> list[list[float]]:
    """The binary three-level filter in the symbols of the paper of 2011, a number at a time."""
    mu2, sigma2, mu3, sigma3 = 0.0, 1.0, 0.0, 1.0
    found = []
    for value in u:
        e = math.exp(kappa * mu3 + omega)
        hat_mu1 = 1 / (1 + math.exp(-mu2))
        hat_sigma1 = hat_mu1 * (1 - hat_mu1)
        hat_sigma2 = sigma2 + e
        delta1 = value - hat_mu1
        new_sigma2 = 1 / (1 / hat_sigma2 + hat_sigma1)
        new_mu2 = mu2 + new_sigma2 * delta1
        w2, r2 = e / (sigma2 + e), (e - sigma2) / (sigma2 + e)
        delta2 = (new_sigma2 + (new_mu2 - mu2) ** 2) / (sigma2 + e) - 1
        pi3 = 1 / (sigma3 + theta) + kappa**2 / 2 * w2 * (w2 + r2 * delta2)
        mu3, sigma3 = mu3 + kappa / 2 * w2 * delta2 / pi3, 1 / pi3
        mu2, sigma2 = new_mu2, new_sigma2
        found.append([mu2, mu3, sigma2, sigma3])
    return found


def test_three_levels_of_the_paper() -> None:
    u = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    filter = hgf("binary", tonic=torch.tensor([-0.8, math.log(0.3)]), coupling=torch.tensor([1.4]))
    found = filter(torch.tensor([u]))
    expected = torch.tensor(three_levels(u, 1.4, -0.8, 0.3))
    assert (found.mean[0] - expected[:, :2]).abs().max() < 1e-12
    assert (1 / found.precision[0] - expected[:, 2:]).abs().max() < 1e-12


def test_rows_missing_inputs_and_intervals() -> None:
    tonic = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.0, -2.0]])
    coupling = torch.tensor([0.5, 0.8])
    u = torch.randn(2, 5)
    found = hgf(tonic=tonic, coupling=coupling)(u)
    for row in range(2):
        alone = hgf(tonic=tonic[row], coupling=coupling)(u[row : row + 1])
        assert (found.mean[row] - alone.mean[0]).abs().max() < 1e-12
        assert (found.precision[row] - alone.precision[0]).abs().max() < 1e-12
    # Two steps without an input are one step of twice the time: predictions do not move.
    seen = torch.tensor([True, False, True]).expand(2, 3)
    gap = torch.where(seen, u[:, :3], torch.nan)
    missing = hgf(tonic=tonic, coupling=coupling)(gap, observed=seen)
    long = hgf(tonic=tonic, coupling=coupling)(u[:, [0, 2]], interval=torch.tensor([1.0, 2.0]))
    assert (missing.log_evidence[:, 1] == 0).all()
    assert (missing.mean[:, 1] - missing.mean[:, 0]).abs().max() < 1e-12
    lowest = missing.predicted_precision[:, 2, 0] - long.predicted_precision[:, 1, 0]
    assert lowest.abs().max() < 1e-12


@pytest.mark.parametrize("inputs", ["continuous", "binary"])
def test_a_row_without_inputs_keeps_its_means_and_grows_unsure(inputs: str) -> None:
    """No evidence; variances add up, those of a level at the mean of the level above."""
    tonic, coupling = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 0.8])
    mean, precision = torch.tensor([0.3, -0.4, 0.7]), torch.tensor([2.0, 0.5, 4.0])
    filter = hgf(inputs, tonic=tonic, coupling=coupling, mean=mean, precision=precision)
    u = torch.tensor([[torch.nan] * 4, [1.0, 0.0, 1.0, 1.0]])
    seen = torch.tensor([[False] * 4, [True] * 4])
    found = filter(u, observed=seen)
    alone = filter(u[1:])
    assert (found.log_evidence[0] == 0).all()
    assert (found.log_evidence[1] != 0).all()
    assert (found.mean[0] - mean).abs().max() < 1e-12
    assert (found.predicted_mean[0] - mean).abs().max() < 1e-12
    variance = torch.exp(tonic + torch.cat([coupling * mean[1:], torch.zeros(1)]))
    after = 1 / (1 / precision + torch.arange(1, 5)[:, None] * variance)  # (T, L)
    assert (found.precision[0] - after).abs().max() < 1e-12
    assert (found.predicted_precision[0] - after).abs().max() < 1e-12
    for name, value in vars(alone).items():
        assert torch.equal(getattr(found, name)[1:], value)


def test_everything_is_differentiable() -> None:
    u = torch.tensor([[0.4, -0.3, 0.9], [0.1, 0.2, -0.5]])
    seen = torch.tensor([[True, True, True], [True, False, True]])
    u = torch.where(seen, u, torch.nan)

    def total(tonic: Tensor, coupling: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
        filter = HierarchicalGaussianFilter(
            "continuous", tonic=tonic, coupling=coupling, mean=mean, precision=precision
        )
        found = filter(u, observed=seen)
        return found.log_evidence.sum() + found.mean.sum() + found.precision.log().sum()

    given = (
        torch.tensor([-1.0, -2.0]),
        torch.tensor([0.7]),
        torch.tensor([0.1, -0.2]),
        torch.tensor([1.2, 0.9]),
    )
    assert torch.autograd.gradcheck(total, [v.requires_grad_() for v in given])


def test_the_variance_of_steps_is_learned_by_the_evidence() -> None:
    """Omega of a simulated random walk, within four standard errors of its curvature."""
    torch.manual_seed(0)
    z = (math.exp(-0.5) * torch.randn(50, 20)).cumsum(1)  # omega = -1
    u = z + torch.randn(50, 20)
    tonic = torch.zeros(1, requires_grad=True)
    optim = torch.optim.LBFGS([tonic], max_iter=20, line_search_fn="strong_wolfe")

    def loss(tonic: Tensor) -> Tensor:
        return -hgf(tonic=tonic, precision=torch.tensor([1e8]))(u).log_evidence.sum()

    def closure() -> Tensor:
        optim.zero_grad()
        value = loss(tonic)
        value.backward()
        return value

    optim.step(closure)
    error = torch.autograd.functional.hessian(loss, tonic.detach()).item() ** -0.5
    assert tonic.item() == pytest.approx(-1.0, abs=4 * error)
    assert error < 0.15


def test_a_negative_precision_is_an_error_that_the_enhanced_update_does_not_make() -> None:
    u = torch.tensor([[0.0, 20.0]])
    options = {"tonic": torch.tensor([-2.0, -1.0]), "precision": torch.tensor([1.0, 1.0])}
    with pytest.raises(ValueError, match=r"precision of level 2 came out as -.* at step 2"):
        hgf(**options)(u)
    found = hgf(**options, update="enhanced")(u)
    assert (found.precision > 0).all()
    assert found.mean[0, 1, 1] > found.mean[0, 0, 1], "a surprise makes the world volatile"


def test_a_belief_that_overflows_is_an_error_with_another_way_on() -> None:
    u = torch.tensor([[0.0, 1e6, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"left the range of numbers.*Divide the inputs"):
        hgf(tonic=torch.tensor([-2.0, 0.0]), update="enhanced")(u)


def test_options_may_be_lists_of_numbers() -> None:
    u = torch.tensor([[0.3, -0.4]])
    lists = hgf(tonic=[-4, -3], coupling=[0.5], mean=[0, 1], precision=[2, 1])(u)
    options = {"coupling": (0.5,), "mean": (0.0, 1.0), "precision": (2.0, 1.0)}
    tensors = {name: torch.tensor(value) for name, value in options.items()}
    assert torch.equal(lists.mean, hgf(tonic=torch.tensor([-4.0, -3.0]), **tensors)(u).mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hgf("counts"), "inputs must be"),
        (lambda: hgf(update="other"), "update must be one of"),
        (lambda: hgf(tonic=torch.zeros(())), "one omega a level"),
        (lambda: hgf(coupling=torch.ones(2)), r"coupling must have shape \(1,\)"),
        (lambda: hgf(mean=torch.ones(3)), r"mean must have shape \(2,\)"),
        (lambda: hgf(precision=-torch.ones(2)), "precision must be positive"),
        (lambda: hgf(input_precision=0.0), "input_precision must be positive"),
        (lambda: hgf()(torch.zeros(3)), "shape \\(rows, steps\\)"),
        (lambda: hgf()(torch.tensor([[torch.nan]])), "must be finite"),
        (lambda: hgf("binary")(torch.tensor([[0.5]])), "are 0 or 1"),
        (lambda: hgf()(torch.zeros(1, 2), observed=torch.ones(1, 2)), "observed must be boolean"),
        (lambda: hgf()(torch.zeros(1, 2), interval=torch.ones(3)), "interval must have shape"),
        (lambda: hgf()(torch.zeros(1, 2), interval=torch.zeros(2)), "interval must be positive"),
        (lambda: hgf(tonic=torch.zeros(3, 2))(torch.zeros(2, 2)), "tonic has 3 rows"),
    ],
)
def test_bad_calls_say_what_is_wrong(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

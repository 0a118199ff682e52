"""Refined guides: closed-form contraction, special cases, two gradients, where they must run."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.diagnostics import elbo, log_weights
from guides.families.family import inverse_positive, positive
from guides.families.normal import Normal
from guides.guide import Guide
from guides.inference import SVI
from guides.objectives import RefinementELBO
from guides.schemes.bound import RowBound
from guides.schemes.encoder import Encoder
from guides.schemes.laplace import row_hessian
from guides.schemes.natural_step import natural_step
from guides.schemes.recording import recording
from guides.schemes.scheme import Call

pytestmark = pytest.mark.usefixtures("float64")


class Table(nn.Module):
    """An "encoder" that returns free rows, so that the start of a refinement is known."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, features: Tensor) -> Tensor:
        return self.rows


def chain(depth: int = 1, rows: int = 4) -> tuple[zoo.LinearGaussian, Tensor]:
    torch.manual_seed(depth)
    dims = {1: (3, 5), 2: (2, 3, 5)}[depth]
    model = zoo.LinearGaussian(dims=dims, covariance="full")
    with torch.no_grad():
        x = model(size=rows).detach()
    return model.requires_grad_(False), x


def posterior(model: zoo.LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    exact = model.posterior(x)
    return exact.mean.detach(), exact.precision_matrix.detach().expand(len(x), -1, -1)


def scheme_of(guide: Guide) -> Any:
    return guide.schemes["data"]


def call_of(guide: Guide, *args: Tensor) -> tuple[Any, Call]:
    read = guide.layout(*args)
    return read.group("data"), Call(guide.model, args, {}, read, guide)


def small(name: str, model: Any, x: Tensor, **options: Any) -> Guide:
    return guides.make(name, model, x, **options)


# Gaps of Gaussians, in closed form.


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("curvature", ["gauss_newton", "exact"])
def test_one_newton_step_is_the_exact_posterior(depth: int, curvature: str) -> None:
    """Log w is then constant, so two draws give log p(x)."""
    model, x = chain(depth)
    guide = small(
        "laplace_multivariate_normal",
        model,
        x,
        num_iterations=1,
        curvature=curvature,
        start="prior",
    )
    mean, precision = posterior(model, x)
    weights = log_weights(model, guide, x, num_samples=2).rows
    assert (weights - model.log_evidence(x)).abs().max() < 1e-9
    lam = guide.parameters_of(x)["data"]
    tril = guide.families["data"].scale_tril(lam)
    assert torch.allclose(guide.families["data"].location(lam), mean, atol=1e-10)
    assert torch.allclose(tril @ tril.mT, torch.linalg.inv(precision), atol=1e-10)


def test_mean_field_loses_its_closed_form_gap() -> None:
    model, x = chain(2)
    _, precision = posterior(model, x)
    guide = small("laplace_normal", model, x, num_iterations=1)
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    gap = 0.5 * (diagonal.log().sum(-1) - torch.logdet(precision))
    score = elbo(model, guide, x, num_samples=20_000)
    assert gap.min() > 0.05
    difference = model.log_evidence(x) - score.rows - gap
    assert (difference.abs() < 4 * score.rows_error).all()


@pytest.mark.parametrize("what", ["mean", "variance"])
def test_wrong_parameters_lose_their_closed_form_gap(what: str) -> None:
    """1/2 (m - mu)' P (m - mu) for the mean, 1/2 sum(v P_ii - 1 - log v P_ii) for variances."""
    model, x = chain(1)
    mean, precision = posterior(model, x)
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    base = 0.5 * (diagonal.log().sum(-1) - torch.logdet(precision))
    guide = small("normal", model, x)
    family = guide.families["data"]
    tril = torch.diag_embed(diagonal.rsqrt())
    if what == "mean":
        shift = torch.linspace(-0.5, 0.7, 3)
        lam = family.of_gaussian(mean + shift, tril)
        gap = base + 0.5 * torch.einsum("i,bij,j->b", shift, precision, shift)
    else:
        factor = torch.tensor([0.3, 1.0, 2.5])
        lam = family.of_gaussian(mean, tril * factor.sqrt().unsqueeze(-1))
        gap = base + 0.5 * (factor - 1 - factor.log()).sum()
    with torch.no_grad():
        scheme_of(guide).table.copy_(lam)
    score = elbo(model, guide, x, num_samples=40_000)
    assert ((model.log_evidence(x) - score.rows - gap).abs() < 4 * score.rows_error).all()


# Gradient steps: contraction and its derivative.


@pytest.mark.parametrize("backprop", ["full", 2, "first_order"])
def test_gradient_steps_contract_as_the_closed_form_and_so_does_their_derivative(
    backprop: str | int,
) -> None:
    """lam_K - mu = (I - aP)^K (lam_0 - mu); the encoder's gradient is (I - aP)^k dL/dlam_K."""
    model, x = chain(1)
    mean, precision = posterior(model, x)
    step, num_steps = 0.05, 6
    start = torch.randn(4, 3)
    guide = small(
        "semi_amortized_delta",
        model,
        x,
        encoder=Table(start),
        num_iterations=num_steps,
        step_size=step,
        optimizer="momentum",
        momentum=0.0,
        decay=False,
        backprop=backprop,
    )
    contraction = torch.eye(3) - step * precision
    expected = mean + (
        torch.linalg.matrix_power(contraction, num_steps) @ (start - mean).unsqueeze(-1)
    ).squeeze(-1)
    found = guide.parameters_of(x)["data"]
    assert torch.allclose(found, expected, atol=1e-12)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    (gradient,) = torch.autograd.grad(loss, [scheme_of(guide).encoder.network.rows])
    outer = (precision @ (expected - mean).unsqueeze(-1)).squeeze(-1)  # of -log p(x, z)
    kept = {"full": num_steps, 2: 2, "first_order": 0}[backprop]
    through = torch.linalg.matrix_power(contraction, kept).mT @ outer.unsqueeze(-1)
    assert torch.allclose(gradient, through.squeeze(-1), atol=1e-10)


def test_the_model_learns_through_full_backpropagation() -> None:
    """H_{theta lam}: the gradient of the model sees that the steps depend on it."""
    model, x = chain(1)
    model.requires_grad_(True)
    guide = small(
        "semi_amortized_delta",
        model,
        x,
        encoder=Table(torch.zeros(4, 3)),
        num_iterations=3,
        step_size=0.05,
        optimizer="momentum",
        backprop="full",
    )
    parameters = list(model.parameters())

    def loss() -> Tensor:
        return Trace_ELBO().differentiable_loss(model, guide, x)

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat, analytic = parameter.data.view(-1), gradient.reshape(-1)
        for i in range(0, len(flat), 3):
            old = float(flat[i])
            flat[i] = old + 1e-6
            high = float(loss().detach())
            flat[i] = old - 1e-6
            low = float(loss().detach())
            flat[i] = old
            assert float(analytic[i]) == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-6)


def test_importance_refinement_finds_the_posterior_mean() -> None:
    model, x = chain(1)
    mean, precision = posterior(model, x)
    guide = small(
        "semi_amortized_multivariate_normal",
        model,
        x,
        method="importance",
        num_particles=20_000,
        num_iterations=1,  # the fixed point would not tell wrong weights from right ones
        step_size=1.0,
        decay=False,
        init_scale=1.0,
    )
    with torch.no_grad():
        found = guide.families["data"].location(guide.parameters_of(x)["data"])
        start = guide.families["data"].location(scheme_of(guide).start(*call_of(guide, x)))
    error = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found - mean).abs() < 0.15 * error).all()
    assert ((start - mean).abs() > 0.5 * error).any()


def test_more_steps_in_evaluation_reach_the_mode() -> None:
    model, x = chain(2)
    mean, _ = posterior(model, x)
    guide = small(
        "semi_amortized_normal",
        model,
        x,
        num_iterations=2,
        eval_iterations=200,
        shared_noise=True,
        num_particles=8,
    )
    loc = guide.families["data"].location
    torch.manual_seed(0)
    trained = (loc(guide.parameters_of(x)["data"]) - mean).abs().max()
    guide.eval()
    refined = (loc(guide.parameters_of(x)["data"]) - mean).abs().max()
    assert refined < 0.05 * trained


# Special cases of the learned refinement.


def test_a_gate_of_one_leaves_the_parameters_unchanged() -> None:
    model, x = chain()
    guide = small("iterative_normal", model, x, update="highway", num_iterations=3)
    with torch.no_grad():
        scheme_of(guide).gate.bias.fill_(1e4)
    start = scheme_of(guide).start(*call_of(guide, x))
    assert torch.equal(guide.parameters_of(x)["data"], start)


@pytest.mark.parametrize("name", ["iterative_delta", "iterative_normal"])
def test_a_constant_rate_is_gradient_ascent(name: str) -> None:
    model, x = chain()
    guide = small(name, model, x, precondition=False, rate=0.01, num_iterations=4)
    scheme = scheme_of(guide)
    with torch.no_grad():
        for head in (scheme.gate, scheme.move):
            head.weight.zero_()
            head.bias.zero_()
    torch.manual_seed(5)
    found = guide.parameters_of(x)["data"]
    group, call = call_of(guide, x)
    bound = scheme.bound(group, call)
    torch.manual_seed(5)
    lam = scheme.start(group, call).detach()
    for _ in range(4):
        lam = lam + 0.01 * bound.gradient(lam, bound.noise(lam), path=True).lam
    assert torch.allclose(found, lam, atol=1e-12)


def test_one_iteration_without_the_gradient_is_direct_amortization() -> None:
    model, x = chain()
    guide = small(
        "iterative_normal", model, x, update="direct", encodings="data", num_iterations=1
    )
    scheme = scheme_of(guide)
    assert not scheme.needs_gradient
    network = nn.Sequential(scheme.network, scheme.move)
    group, call = call_of(guide, x)
    direct = Encoder(scheme.init, group, call, encoder=network)
    assert torch.allclose(guide.parameters_of(x)["data"], scheme.init + direct(group, call))
    with torch.no_grad():
        scheme.offset.add_(3.0)  # where it started does not matter
    assert torch.allclose(guide.parameters_of(x)["data"], scheme.init + direct(group, call))


@pytest.mark.parametrize("update", ["highway", "direct", "learned_step"])
@pytest.mark.parametrize(
    "encodings",
    [
        ("gradient",),
        ("log_gradient", "parameters"),
        ("layer_norm_gradient", "data"),
        ("errors", "parameters"),
        ("natural_gradient", "errors", "parameters", "data"),
    ],
    ids="+".join,
)
def test_encodings_and_updates_learn(encodings: tuple[str, ...], update: str) -> None:
    model, x = chain(2, rows=20)
    guide = small("iterative_normal", model, x, encodings=encodings, update=update, network=(32,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), RefinementELBO())
    assert not svi.frozen
    before = svi.evaluate_loss(x)
    losses = svi.run(60, ((x,), {})).losses
    assert sum(losses[-10:]) / 10 < before


# Gradients.


def test_the_rows_gradient_is_that_of_the_formula_and_of_the_errors() -> None:
    """The gradient in loc is J' eps_x - eps_z of the errors, and finite differences agree."""
    model, x = chain(1)
    guide = small("normal", model, x)
    group, call = call_of(guide, x)
    bound = RowBound(group, call, num_particles=3)
    lam = torch.randn(4, 6)
    noise = bound.noise(lam)
    found = bound.gradient(lam, noise)
    step = 1e-5
    for i in range(6):
        move = torch.zeros_like(lam)
        move[:, i] = step
        numeric = (bound.rows(lam + move, noise) - bound.rows(lam - move, noise)) / (2 * step)
        assert torch.allclose(found.lam[:, i], numeric, atol=1e-6)
    assert torch.allclose(found.rows, bound.rows(lam, noise))
    errors = bound.errors(lam, noise)
    assert errors.shape == (4, 3 + 5)
    weight = torch.func.jacrev(lambda z: model.levels[-1].loc(z))(torch.zeros(3))
    formula = errors[:, 3:] @ weight - errors[:, :3]
    assert torch.allclose(found.lam[:, :3], formula, atol=1e-10)


def test_the_path_gradient_has_the_same_mean_and_vanishes_at_the_posterior() -> None:
    model, x = chain(1)
    mean, precision = posterior(model, x)
    guide = small("multivariate_normal", model, x)
    group, call = call_of(guide, x)
    bound = RowBound(group, call, num_particles=1)
    tril = torch.linalg.cholesky(torch.linalg.inv(precision))
    exact = guide.families["data"].of_gaussian(mean, tril)
    assert bound.gradient(exact, bound.noise(exact), path=True).lam.abs().max() < 1e-9
    assert bound.gradient(exact, bound.noise(exact)).lam.abs().max() > 0.1
    many = RowBound(group, call, num_particles=20_000)
    lam = exact + 0.2 * torch.randn_like(exact)
    noise = many.noise(lam)
    difference = many.gradient(lam, noise).lam - many.gradient(lam, noise, path=True).lam
    assert difference.abs().max() < 0.1


def test_gauss_newton_curvature_is_that_of_the_bernoulli_decoder() -> None:
    torch.manual_seed(0)
    model = zoo.VAE(x_dim=6, z_dim=3, hidden=(5,)).double()
    x = model(size=4).detach()
    guide = small("laplace_multivariate_normal", model, x)
    group, call = call_of(guide, x)
    u = torch.randn(4, 3)
    found = scheme_of(guide).hessian(RowBound(group, call), u)
    for row, z in enumerate(u):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: model.decode(v).base_dist.logits, z
        )
        p = torch.sigmoid(model.decode(z).base_dist.logits).detach()
        expected = jacobian.mT @ torch.diag(p * (1 - p)) @ jacobian + torch.eye(3)
        assert torch.allclose(found[row], expected, atol=1e-9)
    exact = row_hessian(lambda v: v.pow(4).sum(-1), u)
    assert torch.allclose(exact, torch.diag_embed(12 * u.square()))


@pytest.mark.parametrize("update", ["highway", "learned_step"])
def test_the_two_gradients_are_the_mean_and_the_last(update: str) -> None:
    """A point mass has no noise, so every bound can be written out and differentiated."""
    torch.manual_seed(0)
    model = zoo.VAE(x_dim=6, z_dim=2, hidden=(4,)).double()
    x = model(size=5).detach()
    guide = small("iterative_delta", model, x, update=update, network=(7,), num_iterations=3)
    RefinementELBO().loss_and_grads(model, guide, x)
    found = {
        role: {name: p.grad.clone() for name, p in module.named_parameters()}
        for role, module in (("guide", guide), ("model", model))
    }
    for module in (guide, model):
        module.zero_grad()
    scheme = scheme_of(guide)
    group, call = call_of(guide, x)
    bound = RowBound(group, call)
    noise = bound.noise(torch.zeros(5, 2))
    lam = scheme.start(group, call)
    bounds = [bound.rows(lam, noise).sum()]
    for _ in range(3):
        fixed = lam.detach()
        gradient = bound.gradient(fixed, noise).lam.detach()
        lam = scheme.step(bound.family, fixed, gradient)
        bounds.append(bound.rows(lam, noise).sum())
    mean = -sum(bounds) / 4
    for name, p in guide.named_parameters():
        (expected,) = torch.autograd.grad(mean, [p], retain_graph=True)
        assert torch.allclose(found["guide"][name], expected, atol=1e-10), name
    for name, p in model.named_parameters():
        (expected,) = torch.autograd.grad(-bounds[-1], [p], retain_graph=True)
        assert torch.allclose(found["model"][name], expected, atol=1e-10), name


def test_shared_weights_of_a_flow_learn_from_the_mean_as_well() -> None:
    model, x = chain(1)
    guide = small("iterative_spline_coupling", model, x, num_iterations=2, transforms=1)
    torch.manual_seed(1)
    with recording() as record:
        loss = RefinementELBO().differentiable_loss(model, guide, x)
    assert not record, "an inner record keeps its own"
    loss.backward()
    fraction = 1 / 3
    weights = dict(guide.families["data"].named_parameters())
    torch.manual_seed(1)
    with recording() as record:
        last = Trace_ELBO().differentiable_loss(model, guide, x)
    (refined,) = record
    assert refined.fraction == pytest.approx(fraction)
    for name, weight in weights.items():
        # The last bound arrives with its fraction already; the earlier ones are added.
        (expected,) = torch.autograd.grad(last, [weight], retain_graph=True)
        for iterate in refined.iterates:
            expected = expected - fraction * iterate.weights[name]
        assert torch.allclose(weight.grad, expected, atol=1e-10)


def test_a_stopped_gradient_teaches_the_encoder_its_own_bound() -> None:
    model, x = chain(1)
    options = {"encoder": Table(torch.randn(4, 3)), "backprop": "none", "num_iterations": 3}
    guide = small("semi_amortized_delta", model, x, **options)
    rows = scheme_of(guide).encoder.network.rows
    RefinementELBO().loss_and_grads(model, guide, x)
    mean, precision = posterior(model, x)
    expected = (precision @ (rows.detach() - mean).unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(rows.grad, expected, atol=1e-10)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    assert not loss.requires_grad, "without the objective nothing reaches the encoder"


# Where they must run.

REFINED = {
    "iterative_normal": {"shared_noise": True},
    "semi_amortized_normal": {"shared_noise": True},
    "semi_amortized_spline_coupling": {"shared_noise": True, "transforms": 1, "num_iterations": 2},
    "laplace_multivariate_normal": {},
}


@pytest.mark.parametrize("name", REFINED)
def test_a_row_does_not_see_its_batch(name: str) -> None:
    """B = 1 equals B = 100, for full batches and minibatches of N rows alike."""
    model, x = chain(2, rows=100)
    guide = small(name, model, x, **REFINED[name])
    torch.manual_seed(3)
    together = guide.parameters_of(x)["data"]
    for row in (0, 57):
        torch.manual_seed(3)
        alone = guide.parameters_of(x[row : row + 1])["data"]
        assert torch.allclose(alone[0], together[row], atol=1e-9)
        torch.manual_seed(3)
        index = torch.tensor([row])
        part = guide.parameters_of(x[row : row + 1], size=100, index=index)["data"]
        assert torch.allclose(part[0], together[row], atol=1e-9)


@pytest.mark.parametrize("name", REFINED)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_refinement_runs_where_gradients_are_off(name: str, context: Any) -> None:
    model, x = chain(2)
    guide = small(name, model, x, **REFINED[name])
    torch.manual_seed(0)
    expected = guide.parameters_of(x)["data"]
    torch.manual_seed(0)
    with context():
        found = guide.parameters_of(x)["data"]
    assert torch.allclose(found, expected.detach(), atol=1e-12)
    svi = SVI(model, guide, pyro.optim.Adam({}), RefinementELBO())
    assert isinstance(svi.evaluate_loss(x), float)


@pytest.mark.parametrize(
    "name", [name for name in REFINED if name != "laplace_multivariate_normal"]
)
def test_an_outer_transform_sees_the_gradient_of_backward(name: str) -> None:
    model, x = chain(1)
    guide = small(name, model, x, **REFINED[name])
    parameters = dict(scheme_of(guide).named_parameters())

    def total(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(2)
        call = call_of(guide, x)
        return torch.func.functional_call(scheme_of(guide), parameters, call).square().sum()

    found = torch.func.grad(total)({k: v.detach() for k, v in parameters.items()})
    expected = torch.autograd.grad(total(parameters), list(parameters.values()), allow_unused=True)
    for (key, value), reference in zip(found.items(), expected, strict=True):
        reference = torch.zeros_like(value) if reference is None else reference
        assert torch.allclose(value, reference, atol=1e-9), key
    assert any(value.abs().max() > 0 for value in found.values())


def test_rows_stop_one_by_one_and_dropping_them_changes_nothing() -> None:
    """One row starts at its mode; the others go on without it."""
    model, x = chain(1, rows=6)
    mean, _ = posterior(model, x)
    start = mean + torch.tensor([0.0, 0.0, 0.0, 0.0, 1e-4, 2.0]).unsqueeze(-1)
    options: dict[str, Any] = {
        "encoder": Table(start),
        "num_iterations": 400,
        "step_size": 0.05,
        "optimizer": "momentum",
        "momentum": 0.0,
        "decay": False,
        "tolerance": 1e-7,
        "backprop": "none",
    }
    counted: list[int] = []

    def program(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        counted.append(len(x))
        model(x, size=size, index=index)

    found = {}
    for label, data_args in (("dropped", {"x": 0}), ("held", None)):
        guide = guides.make("semi_amortized_delta", program, x, data_args=data_args, **options)
        counted.clear()
        with torch.no_grad():
            found[label] = guide.parameters_of(x)["data"]
        found[f"rows {label}"] = sum(counted)
    assert (found["dropped"] - mean).abs().max() < 1e-5
    assert torch.allclose(found["dropped"], found["held"], atol=1e-12)
    assert found["rows dropped"] < 0.6 * found["rows held"]
    assert found["rows held"] < 400 * 6, "all rows have stopped before the last iteration"


def test_globals_constrained_sites_and_minibatches() -> None:
    def model(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Gamma(2.0, rate))
            pyro.sample("x", dist.Poisson(z), obs=x)

    x = torch.poisson(torch.full((12,), 3.0))
    for name in ("iterative_normal", "semi_amortized_normal", "laplace_normal"):
        guide = guides.make(name, model, x)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.003}), RefinementELBO())
        losses = [
            svi.step(x[rows], 12, rows) for rows in (torch.arange(5), torch.arange(5, 12)) * 30
        ]
        assert sum(losses[-10:]) < sum(losses[:10])
        draws = guide(x[:1], 12, torch.tensor([3]))
        assert draws["z"].shape == (1,)
        assert draws["z"] > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iterative_normal", {"encodings": ("gradients",)}, "encodings must be some of"),
        ("iterative_normal", {"update": "sgd"}, "update must be one of"),
        ("iterative_normal", {"num_iterations": 0}, "num_iterations and num_particles"),
        ("iterative_normal", {"start": "zero"}, 'start must be "encoder" or "prior"'),
        ("iterative_normal", {"network": ()}, "network needs a layer"),
        ("iterative_normal", {"eval_iterations": -1}, "eval_iterations must be at least 0"),
        ("semi_amortized_normal", {"optimizer": "sgd"}, "optimizer must be"),
        ("semi_amortized_normal", {"backprop": "half"}, "backprop must be"),
        ("semi_amortized_normal", {"clip": "big"}, "clip must be"),
        ("semi_amortized_normal", {"step_size": -1.0}, "step_size and clip must be positive"),
        ("semi_amortized_normal", {"method": "exact"}, "method must be"),
        ("semi_amortized_normal", {"method": "importance"}, "num_particles of at least 2"),
        (
            "semi_amortized_delta",
            {"method": "importance", "num_particles": 4},
            "a point mass has no density",
        ),
        ("semi_amortized_mixture", {"backprop": "full"}, "no second derivatives"),
        (
            "semi_amortized_normal",
            {"method": "importance", "num_particles": 4, "backprop": 1},
            "to first order only",
        ),
        ("laplace_normal", {"curvature": "fisher"}, "curvature must be"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    model, x = chain()
    with pytest.raises(ValueError, match=message):
        guides.make(name, model, x, **options)


def test_coupled_rows_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)

    with pytest.raises(ValueError, match="Rows of plate 'data' are coupled"):
        guides.make("iterative_normal", model, torch.zeros(4))


def test_an_objective_without_a_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="must have differentiable_loss"):
        RefinementELBO(objective=3)


def test_a_mask_inside_a_distribution_is_that_of_the_handler() -> None:
    """Neither curvature nor errors may see what it hides."""
    on = torch.tensor([True, False, True])

    def inside(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5).mask(on), obs=x)

    x = torch.tensor([1.0, 2.0, 3.0])
    guide = small("laplace_normal", inside, x)
    loc, raw = guide.parameters_of(x)["data"].unbind(-1)
    precision = 1.0 + 4.0 * on
    torch.testing.assert_close(loc, 4.0 * on * x / precision)
    torch.testing.assert_close(nn.functional.softplus(raw), precision.rsqrt())

    def features(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).mask(on).to_event(1), obs=x)

    x = torch.ones(2, 3)
    guide = small("iterative_normal", features, x, encodings=("errors",), network=(4,))
    bound = scheme_of(guide).bound(*call_of(guide, x))
    lam = scheme_of(guide).start(*call_of(guide, x)).detach()
    noise = bound.noise(lam)
    errors = bound.errors(lam, noise)
    assert (errors[:, 4] == 0).all()
    assert (errors[:, [3, 5]] != 0).all()


def test_errors_are_refused_where_there_are_none() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Categorical(logits=z), obs=x)

    with pytest.raises(NotImplementedError, match="Categorical has no mean and variance"):
        small("iterative_normal", model, torch.tensor([0, 2]), encodings=("errors",))


def test_importance_refinement_leaves_an_exact_posterior() -> None:
    """The location of a mixture is not its mean."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    one = float(torch.tensor(1.0).expm1().log())  # softplus(one) = 1
    exact = torch.tensor([-1.0, 0.0, 0.0, 1.0, 1.0, one, one])
    x = torch.zeros(2)
    guide = small(
        "semi_amortized_mixture",
        model,
        x,
        method="importance",
        num_particles=3,
        components=2,
        encoder=Table(exact.expand(2, -1)),
    )
    torch.testing.assert_close(guide.parameters_of(x)["data"].detach(), exact.expand(2, -1))


def test_a_copy_of_model_and_guide_is_one_of_its_own() -> None:
    model, x = chain(1)
    guide = small("laplace_normal", model, x)
    other, copied = copy.deepcopy((model, guide))
    assert copied.model is other
    before = copied.parameters_of(x)["data"].clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    torch.testing.assert_close(copied.parameters_of(x)["data"], before)
    assert copy.deepcopy(guide).model is model


def test_rows_that_stop_are_held_beside_a_table_of_free_rows() -> None:
    """A call of fewer rows does not say which rows of the table they are."""

    class Two(pyro.nn.PyroModule):
        data_args = {"x": 0}

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(a + b, 0.5), obs=x)

    x = torch.linspace(-3.0, 3.0, 7)
    cell = ("semi_amortized_normal", {"tolerance": 0.1, "num_iterations": 30})
    local = guides.make({"a": cell, "b": "normal"}, Two(), x)
    read = local.layout(x)
    call = Call(local.model, (x,), {}, read, local)
    assert not local.schemes["data_0"]._droppable(call)
    shared = guides.make({"a": cell, "b": "amortized_normal"}, Two(), x)
    assert shared.schemes["data_0"]._droppable(
        Call(shared.model, (x,), {}, shared.layout(x), shared)
    )
    assert local.parameters_of(x)["data_0"].isfinite().all()


# Defaults of the learned refinement, and iterations beyond the trained ones.


def test_one_natural_step_finds_the_best_diagonal_gaussian() -> None:
    """Of independent coordinates, whatever the units of q; the rate interpolates precisions."""
    precision, mode = torch.tensor([0.5, 40.0, 3.0]), torch.tensor([1.0, -0.5, 20.0])
    scale, loc = torch.tensor([2.0, 0.4, 15.0]), torch.tensor([0.0, 0.2, 0.0])
    family = Normal(3)
    lam = torch.cat([loc, inverse_positive(scale)])
    lam.requires_grad_(True)
    spread = positive(lam[3:])
    # E_q of the quadratic log joint, and the entropy.
    value = -0.5 * (precision * ((lam[:3] - mode).square() + spread.square())).sum()
    (gradient,) = torch.autograd.grad(value + spread.log().sum(), [lam])
    for rate in (0.03, 1.0):
        if rate == 1.0:
            # Within the limit on how much sharper q may become in one step.
            scale = torch.tensor([2.0, 0.4, 2.0])
            lam = torch.cat([mode + 0.5 * scale, inverse_positive(scale)])
            gradient = torch.cat(
                [
                    -precision * 0.5 * scale,
                    (1 / scale - precision * scale) * torch.sigmoid(lam[3:]),
                ]
            )
        start = lam.detach()
        found = natural_step(family, start, gradient, torch.full((6,), rate), torch.zeros(6))
        sharper = (precision * scale.square() - 1).clamp_max(20.0)
        expected = (1 + rate * sharper) / scale.square()
        assert torch.allclose(positive(found[3:]), expected.rsqrt(), rtol=1e-6)
        steps = (gradient[:3] / expected / scale).clamp(-2.0, 2.0)
        assert torch.allclose(found[:3], start[:3] + rate * scale * steps, rtol=1e-6)
    assert torch.allclose(found[:3], mode, rtol=1e-6)


def test_an_untrained_iterative_guide_is_close_to_the_best_gaussian_in_any_units() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.full((2,), 100.0), 30.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 3.0).to_event(1), obs=x)

    torch.manual_seed(0)
    x = 100 + 30 * torch.randn(50, 2)
    evidence = dist.Normal(100.0, (900 + 9) ** 0.5).log_prob(x).sum(-1).mean()
    gap = {
        label: evidence
        - elbo(program, guides.make("iterative_normal", program, x, **o), x).rows.mean()
        for label, o in {
            "prior": {},
            "family": {"start_scale": "family"},
            "asked": {"init_scale": 0.1},
        }.items()
    }
    assert 0 < gap["prior"] < 4
    assert gap["family"] > 50
    assert gap["asked"] > 50


def images() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = zoo.VAE(x_dim=36, z_dim=4, hidden=(16,)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.5)
    return model, model(size=100).detach()


def rows_of(guide: Guide, model: Any, x: Tensor, iterations: int) -> Tensor:
    scheme_of(guide).eval_iterations = iterations
    torch.manual_seed(1)
    rows = elbo(model, guide, x, num_samples=100).rows
    assert rows is not None
    return rows


@pytest.mark.parametrize(
    "options", [{}, {"update": "learned_step", "num_particles": 1}, {"update": "highway"}]
)
def test_iterating_longer_than_trained_is_no_worse(options: dict[str, Any]) -> None:
    model, x = images()
    guide = small("iterative_normal", model, x, network=(32,), **options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), RefinementELBO())
    svi.run(40, ((x,), {}), progress=False)
    guide.eval()
    gain = rows_of(guide, model, x, 64) - rows_of(guide, model, x, 5)
    assert gain.isfinite().all()
    assert gain.mean() > -2 * gain.std() / len(x) ** 0.5


@pytest.mark.parametrize("update", ["natural_step", "highway", "direct"])
def test_a_spoiled_network_does_not_lower_the_bound_beyond_the_trained_iterations(
    update: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = images()
    options = {"update": update, "network": (8,), "num_iterations": 1}
    guide = small("iterative_normal", model, x, **options).eval()
    scheme = scheme_of(guide)
    with torch.no_grad():
        for parameter in scheme.network.parameters():
            parameter.mul_(30.0)
        scheme.move.weight.normal_(0.0, 30.0)
    start, step = scheme.start(*call_of(guide, x)), scheme.step
    spoiled = []

    def spare_the_trained_one(family: Any, lam: Tensor, *rest: Any) -> Tensor:
        if torch.equal(lam, start):
            return lam
        spoiled.append(step(family, lam, *rest))
        return spoiled[-1]

    monkeypatch.setattr(scheme, "step", spare_the_trained_one)
    gain = rows_of(guide, model, x, 16) - rows_of(guide, model, x, 1)
    assert len(spoiled) == 14
    assert gain.isfinite().all()
    assert gain.mean() > 2 * gain.std() / len(x) ** 0.5
    assert gain.min() > -1.0
    scheme.eval_iterations = 16
    assert scheme.evaluations == 16 * 2 + 15 * 3 * 8
    assert scheme.train().evaluations == 2


def test_guarded_iterations_keep_rows_apart_and_run_under_transforms() -> None:
    model, x = images()
    guide = small("iterative_normal", model, x, shared_noise=True, eval_iterations=9).eval()
    torch.manual_seed(3)
    together = guide.parameters_of(x)["data"]
    torch.manual_seed(3)
    with torch.no_grad():
        alone = guide.parameters_of(x[7:8])["data"]
    assert torch.allclose(alone[0], together[7], atol=1e-9)
    parameters = dict(scheme_of(guide).named_parameters())

    def total(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(2)
        call = call_of(guide, x)
        return torch.func.functional_call(scheme_of(guide), parameters, call).square().sum()

    found = torch.func.grad(total)({k: v.detach() for k, v in parameters.items()})
    assert all(value.isfinite().all() for value in found.values())

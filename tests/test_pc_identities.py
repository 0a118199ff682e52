"""Identities of predictive coding, on programs whose relaxed state is known.

Named T1 to T23 as in the project's reference on predictive coding, whose numbers they carry. Two
of its figures belong to weights that are not published (an equilibrium energy of 1.8306... and a
table of remaining distances): the identities behind them are tested, on weights of our own.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from guides.energy import LogJoint
from guides.inference import PredictiveCoding
from guides.inference.curvature import hessian
from guides.inference.relaxation import Relaxed, relax
from guides.inference.solvers import SOLVERS
from guides.inference.units import energy_function
from tests.pc_oracles import ORACLES, LinearGraph, Node, Oracle, chain, hand_chain

pytestmark = pytest.mark.usefixtures("float64")

GAUSSIAN = [name for name in ORACLES if name not in ("gamma_poisson", "beta_bernoulli")]
PARAMETERIZATIONS = ("centered", "noncentered")
SECOND_ORDER = ("conjugate_gradient", "lbfgs", "newton", "gauss_newton", "auto")
FIRST_ORDER = ("adam", "gradient", "heavy_ball", "nesterov")
# Where first-order solvers need less than some hundreds of steps.
QUICK = ("chain1", "biases", "unclamped_readout", "beta_bernoulli")


def loop(model: Any, **options: Any) -> PredictiveCoding:
    options = {"num_steps": 5000, "tolerance": 1e-9, "solver": "auto", **options}
    return PredictiveCoding(model, pyro.optim.Adam({"lr": 1e-3}), **options)


def oracle(name: str) -> Oracle:
    pyro.clear_param_store()
    return ORACLES[name]()


def relaxed(log_joint: LogJoint, noncentered: bool, **options: Any) -> Relaxed:
    """A relaxation from the feed-forward state."""
    values = log_joint.predictions()
    packed = log_joint.layout.pack(values)
    names = tuple(log_joint.layout.sites) if noncentered else ()
    if noncentered:
        packed = {"data": torch.zeros_like(packed["data"])}
    return relax(log_joint, packed, noncentered=names, **options)


def curvatures(log_joint: LogJoint, noncentered: bool) -> Tensor:
    """Eigenvalues of the Hessian of the first row, ascending."""
    packed = log_joint.layout.pack(log_joint.predictions())
    names = tuple(log_joint.layout.sites) if noncentered else ()
    energy = energy_function(log_joint, jacobian=True, noncentered=names)
    if noncentered:
        packed = {"data": torch.zeros_like(packed["data"])}
    return torch.linalg.eigvalsh(hessian(log_joint, packed, energy=energy)["local"])[0]


def output_covariance(model: LinearGraph, weights: list[str]) -> Tensor:
    """S of the output of a clamped chain: the identity plus all products of weights below."""
    product = torch.eye(len(model.weights[weights[-1]]))
    total = product.clone()
    for name in reversed(weights[1:]):
        product = product @ model.weights[name].detach()
        total = total + product @ product.T
    return total


def steps_of(depth: int) -> list[str]:
    """Names of the weights of a chain, from the input on."""
    names = ["x", *(f"h{i}" for i in range(1, depth + 1)), "y"]
    return [f"{a}_{b}" for a, b in itertools.pairwise(names)]


# --- T1: the energy is Pyro's ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain2", "fork_merge", "gamma_poisson"])
def test_t1_the_energy_is_minus_the_log_joint_and_the_loss_of_autodelta(name: str) -> None:
    given = oracle(name)
    pc = loop(given.model, num_steps=0, jacobian=False)
    log_joint = LogJoint(given.model, (given.x,))
    values = log_joint.predictions()
    conditioned = poutine.condition(given.model, data=values)
    expected = -poutine.trace(conditioned).get_trace(given.x).log_prob_sum().detach()
    assert pc.evaluate_loss(given.x) == pytest.approx(float(expected), rel=1e-13)
    guide = AutoDelta(given.model, init_loc_fn=init_to_value(values=values))
    loss = Trace_ELBO().differentiable_loss(given.model, guide, given.x)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-13)
    parameters = list(given.model.parameters())
    if parameters:
        theirs = torch.autograd.grad(loss, parameters)
        ours = torch.autograd.grad(pc._loss(log_joint, values), parameters)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- T2: the fixed point is the posterior mean --------------------------------------------------


def cells() -> list[Any]:
    """Every oracle, parameterization and solver; slow ones are marked."""
    found = []
    for name in ORACLES:
        for parameterization in PARAMETERIZATIONS:
            if parameterization == "noncentered" and name not in GAUSSIAN:
                continue  # no location-scale site, hence the same relaxation
            for solver in (*SOLVERS, "auto"):
                slow = solver in FIRST_ORDER and name not in QUICK
                marks = [pytest.mark.slow] if slow else []
                found.append(pytest.param(name, parameterization, solver, marks=marks))
    return found


@pytest.mark.parametrize(("name", "parameterization", "solver"), cells())
def test_t2_the_relaxed_state_is_the_posterior_mean(
    name: str, parameterization: str, solver: str
) -> None:
    given = oracle(name)
    pc = loop(
        given.model,
        solver=solver,
        parameterization=parameterization,
        tolerance=1e-7,
        num_steps=20_000,
    )
    values = pc.infer(given.x)
    for site, mode in given.mode.items():
        assert (values[site] - mode).abs().max() < 1e-5


@pytest.mark.parametrize("solver", SECOND_ORDER)
def test_t2_it_is_reached_to_the_last_digits(solver: str) -> None:
    given = oracle("chain3")
    values = loop(given.model, solver=solver, parameterization="noncentered").infer(given.x)
    for site, mode in given.mode.items():
        assert (values[site] - mode).abs().max() < 1e-12


def test_t2_weights_of_the_error_terms_matter() -> None:
    """Negative control: with one scale off, the relaxed state is another one."""
    given = oracle("precisions")
    nodes = (given.model.nodes[0], Node("h", 3, ("top",), scale=1.0), given.model.nodes[2])
    pyro.clear_param_store()
    other = LinearGraph(nodes)
    values = loop(other).infer(given.x)
    assert max((values[k] - v).abs().max() for k, v in given.mode.items()) > 0.05


# --- T3, T5, T12: what holds at the equilibrium --------------------------------------------------


def test_t3_the_numbers_that_can_be_checked_by_hand() -> None:
    model, x = hand_chain(), torch.tensor([[1.0, 1.0]])
    pc = loop(model)
    sites = pc.inspect(x)
    assert float(pc.infer(x)["h1"]) == pytest.approx(0.5, abs=1e-12)
    assert float(sites["y"].error) == pytest.approx(-0.5, abs=1e-12)
    assert float(sites["h1"].error) == pytest.approx(-1.5, abs=1e-12)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    energy = sum(float(sites[name].energy - constant) for name in ("h1", "y"))
    assert energy == pytest.approx(1.25, abs=1e-12)
    assert float(output_covariance(model, steps_of(1))) == pytest.approx(10.0)
    assert float(1 - 2 * 3 * 1.0) ** 2 / 10 / 2 == pytest.approx(energy)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_t3_the_equilibrium_energy_is_the_mahalanobis_term(name: str) -> None:
    given = oracle(name)
    sites = loop(given.model).inspect(given.x)
    quadratic = torch.zeros(len(given.x))
    for node in given.model.nodes:
        e = sites[node.name].error * given.model.scale(node)
        quadratic = quadratic + 0.5 * e.square().sum(-1)
    exact = given.model.exact(given.x).mahalanobis.detach()
    torch.testing.assert_close(quadratic, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_t4_the_hessian_there_gives_the_exact_evidence(name: str) -> None:
    given = oracle(name)
    log_joint = LogJoint(given.model, (given.x,))
    found = relaxed(log_joint, True, num_steps=200, tolerance=1e-10, solver="truncated_newton")
    packed = log_joint.layout.pack(log_joint.predictions())
    precision = hessian(log_joint, packed)["local"][0]
    size = len(precision)
    evidence = (
        -(found.energy + found.energy_global)
        + 0.5 * size * torch.log(torch.tensor(2 * torch.pi))
        - 0.5 * torch.logdet(precision)
    )
    torch.testing.assert_close(evidence, given.log_evidence, rtol=1e-11, atol=1e-11)
    covariance = given.model.exact(given.x).covariance.detach()
    torch.testing.assert_close(torch.linalg.inv(precision), covariance, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_t5_errors_are_pulled_back_and_t12_the_output_error_is_multiplied_by_s(depth: int) -> None:
    given = oracle(f"chain{depth}")
    sites = loop(given.model).inspect(given.x)
    names = steps_of(depth)
    pulled = sites["y"].error
    for level in range(depth, 0, -1):
        pulled = pulled @ given.model.weights[names[level]].detach()
        torch.testing.assert_close(sites[f"h{level}"].error, pulled, atol=1e-10, rtol=0)
    x, y = given.x.split(2, -1)
    for name in names:
        x = x @ given.model.weights[name].detach().T
    solved = torch.linalg.solve(output_covariance(given.model, names), (y - x).T).T
    torch.testing.assert_close(sites["y"].error, solved, atol=1e-10, rtol=0)
    assert (solved.norm(dim=-1) < (y - x).norm(dim=-1)).all()


@pytest.mark.parametrize("name", ["chain3", "biases", "fork_merge", "clamped_internal"])
def test_t12_the_gradient_of_the_equilibrium_energy_is_the_partial_one(name: str) -> None:
    given = oracle(name)
    pc = loop(given.model)
    log_joint = LogJoint(given.model, (given.x,))
    parameters = list(given.model.parameters())
    partial = torch.autograd.grad(pc._loss(log_joint, pc.infer(given.x)), parameters)
    total = torch.autograd.grad(given.model.exact(given.x).mahalanobis.sum(), parameters)
    for a, b in zip(partial, total, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    # Negative control: at a state that is not relaxed the two differ.
    early = torch.autograd.grad(pc._loss(log_joint, log_joint.predictions()), parameters)
    assert max(float((a - b).abs().max()) for a, b in zip(early, total, strict=True)) > 0.1


# --- T6: stability and rate ---------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(
    ("name", "solver", "bound"),
    [
        ("chain2", "gradient", 2.0),
        ("clamped_internal", "gradient", 2.0),
        ("stiff", "gradient", 2.0),
        ("stiff", "heavy_ball", 3.8),
    ],
)
def test_t6_steps_are_stable_just_below_the_bound_and_not_above(
    name: str, parameterization: str, solver: str, bound: float
) -> None:
    """Sees a wrong scale of the gradient, which no fixed point does."""
    given = oracle(name)
    log_joint = LogJoint(given.model, (given.x,))
    noncentered = parameterization == "noncentered"
    largest = float(curvatures(log_joint, noncentered)[-1])
    below, above = (
        [
            relaxed(
                log_joint, noncentered, num_steps=n, step_size=s * bound / largest, solver=solver
            )
            for n in ((40, 50, 60) if solver == "gradient" else (80, 110, 140))
        ]
        for s in (0.95, 1.05)
    )
    sizes = [max(float(g.abs().max()) for g in found.gradient.values()) for found in below]
    assert sizes[0] > sizes[1] > sizes[2]
    energies = torch.stack([found.energy for found in above])
    assert torch.isfinite(energies).all()
    assert (energies.diff(dim=0) > 0).all()


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(("rate", "num_steps"), [(0.1, 1), (0.1, 5), (0.5, 3), (1.0, 5), (1.5, 4)])
def test_t6_every_mode_keeps_its_power(rate: float, num_steps: int, parameterization: str) -> None:
    given = oracle("chain3")
    log_joint = LogJoint(given.model, (given.x,))
    noncentered = parameterization == "noncentered"
    names = tuple(log_joint.layout.sites) if noncentered else ()
    goal = log_joint.layout.pack(given.mode)["data"]
    start = log_joint.layout.pack(log_joint.predictions())["data"]
    if noncentered:
        errors = log_joint.standardize(given.mode, names)
        goal, start = torch.cat([errors[k] for k in names], -1), torch.zeros_like(start)
    energy = energy_function(log_joint, jacobian=True, noncentered=names)
    matrix = hessian(log_joint, {"data": start}, energy=energy)["local"][0]
    values, vectors = torch.linalg.eigh(matrix)
    step = rate / float(values[-1])
    modes = (start - goal) @ vectors * (1 - step * values) ** num_steps
    predicted = modes.norm(dim=-1) / (start - goal).norm(dim=-1)
    found = relaxed(log_joint, noncentered, num_steps=num_steps, step_size=step)
    measured = (found.packed["data"] - goal).norm(dim=-1) / (start - goal).norm(dim=-1)
    torch.testing.assert_close(measured, predicted, rtol=1e-10, atol=1e-12)


# --- T7, T8: standardized coordinates -----------------------------------------------------------


def hierarchy(x: Tensor, spread: bool) -> None:
    """Two latent levels; the scale of the lower one depends on the upper one, or not."""
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(torch.zeros(len(x)), 1.0))
        scale = (0.5 * top).exp() if spread else 0.7
        low = pyro.sample("low", dist.Normal(torch.tanh(top), scale))
        pyro.sample("x", dist.Normal(low, 0.5), obs=x)


@pytest.mark.parametrize("spread", [False, True])
def test_t7_the_noncentered_path_ends_where_the_centered_one_does(spread: bool) -> None:
    """Not so the mode of a reparameterized program, where a scale depends on latents."""
    x = torch.tensor([1.5, -0.5, 2.5])
    ends = {
        p: loop(hierarchy, parameterization=p).infer(x, spread)["low"] for p in PARAMETERIZATIONS
    }
    torch.testing.assert_close(ends["centered"], ends["noncentered"], rtol=1e-8, atol=1e-8)
    other = poutine.reparam(hierarchy, config={"low": LocScaleReparam(0.0)})
    found = loop(other, parameterization="centered").infer(x, spread)
    scale = (0.5 * found["top"]).exp() if spread else 0.7
    moved = torch.tanh(found["top"]) + scale * found["low_decentered"]
    gap = float((moved - ends["centered"]).abs().max())
    assert gap > 0.05 if spread else gap < 1e-8


@pytest.mark.parametrize("depth", [1, 3])
def test_t7_what_the_errors_excite_has_the_curvature_of_s(depth: int) -> None:
    given = oracle(f"chain{depth}")
    values = curvatures(LogJoint(given.model, (given.x,)), noncentered=True)
    excited = torch.linalg.eigvalsh(output_covariance(given.model, steps_of(depth)))
    ones = torch.ones(len(values) - len(excited))
    torch.testing.assert_close(values, torch.cat([ones, excited]), rtol=1e-12, atol=1e-12)


def test_t8_one_step_from_the_feed_forward_state_is_backpropagation() -> None:
    given = oracle("chain3")
    names, eta = steps_of(3), 1e-3
    x, y = given.x.split(2, -1)
    weights = [given.model.weights[name].detach().clone().requires_grad_() for name in names]
    levels = [x]
    for weight in weights:
        levels.append(levels[-1] @ weight.T)
    loss = 0.5 * (y - levels[-1]).square().sum()
    *deltas, first, _, _, last = torch.autograd.grad(loss, [*levels[1:-1], *weights])
    log_joint = LogJoint(given.model, (given.x,))
    found = relaxed(log_joint, True, num_steps=1, step_size=eta)
    for part, delta in zip(found.packed["data"].split(3, -1), deltas, strict=True):
        torch.testing.assert_close(part, -eta * delta, rtol=1e-12, atol=1e-14)
    pc = loop(
        given.model, solver="gradient", parameterization="noncentered", num_steps=1, step_size=eta
    )
    local = torch.autograd.grad(
        pc._loss(log_joint, pc.infer(given.x)), [given.model.weights[name] for name in names]
    )
    torch.testing.assert_close(local[0], eta * first, rtol=1e-12, atol=1e-14)
    assert float((local[3] - last).norm() / last.norm()) < 20 * eta
    with pytest.warns(UserWarning, match="hardly leaves the feed-forward state"):
        assert pc.regime(given.x).verdict == "backpropagation"


# --- T21, T22 -----------------------------------------------------------------------------------


def test_t21_a_free_top_goes_to_the_targets_of_the_pseudoinverse() -> None:
    model = LinearGraph(
        (Node("top", 4, scale=1e4), Node("y", 3, ("top",), scale=1.0, observed=True))
    )
    y = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, 2.0]])
    weight = model.weights["top_y"].detach()
    expected = y @ torch.linalg.pinv(weight).T
    torch.testing.assert_close(loop(model).infer(y)["top"], expected, rtol=1e-6, atol=1e-6)


def with_a_level(x: Tensor) -> None:
    """A global level above rows of their own."""
    level = pyro.sample("level", dist.Normal(torch.zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(level.expand(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_t22_steps_on_everything_at_once_go_down_below_the_joint_bound() -> None:
    x = torch.tensor([0.3, 2.0, -1.0, 4.0])
    log_joint = LogJoint(with_a_level, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    # Precision of (level, z): the prior, four links, four observations.
    precision = torch.diag(torch.tensor([0.25 + 4.0, *[1.0 + 4.0] * 4]))
    precision[0, 1:] = precision[1:, 0] = -1.0
    largest = float(torch.linalg.eigvalsh(precision)[-1])
    mode = torch.linalg.solve(precision, torch.cat([torch.zeros(1), 4 * x]))

    def path(factor: float) -> Tensor:
        energies = []
        for n in range(0, 60, 3):
            found = relax(log_joint, packed, num_steps=n, step_size=factor * 2 / largest)
            energies.append(found.energy.sum() + found.energy_global)
        return torch.stack(energies)

    assert (path(0.95).diff() <= 1e-12).all()
    assert (path(1.05).diff()[-5:] > 0).all()
    for solver in (*SOLVERS, "auto"):
        values = loop(with_a_level, solver=solver, tolerance=1e-7).infer(x)
        assert abs(float(values["level"] - mode[0])) < 1e-5, solver
        assert (values["z"] - mode[1:]).abs().max() < 1e-5, solver


def test_t22_a_state_at_rest_is_at_rest_for_a_step_on_everything() -> None:
    """At maximum likelihood with relaxed latents neither latents nor weights move."""
    given = oracle("chain1")
    exact = given.model.exact(given.x)
    log_joint = LogJoint(given.model, (given.x,))
    found = relaxed(log_joint, True, num_steps=100, tolerance=1e-12, solver="truncated_newton")
    assert found.gradient["data"].abs().max() < 1e-11
    parameters = list(given.model.parameters())
    joint = torch.autograd.grad(exact.mahalanobis.sum(), parameters, retain_graph=True)
    mode = {name: value.detach() for name, value in exact.mean.items()}
    local = torch.autograd.grad(loop(given.model)._loss(log_joint, mode), parameters)
    # Same stationary points in the weights: the partial gradient at rest is the total one.
    for a, b in zip(local, joint, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# --- T23: what no batch and no plate may change --------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["biases", "gamma_poisson"])
def test_t23_rows_relax_as_if_alone_permuted_or_in_a_minibatch(name: str, solver: str) -> None:
    given = oracle(name)
    # When truncated Newton looks at the energy depends on the batch; where it ends does not.
    options = {"num_steps": 60 if solver == "truncated_newton" else 7}
    pc = loop(given.model, solver=solver, tolerance=0.0, **options)
    together = pc.infer(given.x)
    order = torch.tensor([2, 0, 1])
    permuted = pc.infer(given.x[order])
    rows = torch.tensor([2, 1])
    batch = pc.infer(given.x[rows], size=3, index=rows)
    huge = pc.infer(given.x[rows], size=3000, index=rows)
    alone = pc.infer(given.x[1:2])
    for site, values in together.items():
        close = {"rtol": 1e-8, "atol": 1e-9}
        torch.testing.assert_close(permuted[site], values[order], **close)
        torch.testing.assert_close(batch[site], values[rows], **close)
        torch.testing.assert_close(huge[site], values[rows], **close)
        torch.testing.assert_close(alone[site], values[1:2], **close)


@pytest.mark.parametrize("name", ["gamma_poisson", "beta_bernoulli"])
def test_t23_modes_with_and_without_the_jacobian_differ_by_what_is_known(name: str) -> None:
    given = oracle(name)
    for jacobian, mode in ((True, given.mode), (False, given.mode_without_jacobian)):
        found = loop(given.model, jacobian=jacobian).infer(given.x)
        torch.testing.assert_close(found["z"], mode["z"], rtol=1e-7, atol=1e-8)
    assert (given.mode["z"] - given.mode_without_jacobian["z"]).abs().min() > 0.01


@pytest.mark.parametrize("name", ["chain3", "fork_merge"])
def test_t23_clamping_a_latent_to_its_value_leaves_the_others(name: str) -> None:
    given = oracle(name)
    site = next(iter(given.mode))
    clamped = poutine.condition(given.model, data={site: given.mode[site]})
    found = loop(clamped).infer(given.x)
    assert site not in found
    for other, values in found.items():
        torch.testing.assert_close(values, given.mode[other], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["chain2", "stiff"])
def test_t23_bounds_are_ordered(name: str) -> None:
    """Energy and no entropy, the best independent Gaussian, the best Gaussian: log p(x)."""
    given = oracle(name)
    posterior = loop(given.model).posterior(given.x)
    exact = dist.MultivariateNormal(
        torch.cat(list(given.mode.values()), -1), posterior.covariance("data")
    )
    precision = exact.precision_matrix
    log_joint = sum(LogJoint(given.model, (given.x,)).rows(given.mode))
    size = precision.shape[-1]
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    # The mode with a unit of width in every coordinate is the narrow end of the family.
    mean_field = log_joint + 0.5 * (2 * torch.pi / diagonal).log().sum(-1)
    full = (
        log_joint
        + 0.5 * size * torch.log(torch.tensor(2 * torch.pi))
        + 0.5 * torch.logdet(posterior.covariance("data"))
    )
    narrow = (
        log_joint
        + 0.5 * size * torch.log(torch.tensor(2 * torch.pi))
        - 0.5 * size * (torch.logsumexp(diagonal.log(), -1, keepdim=True).squeeze(-1))
    )
    assert (narrow <= mean_field + 1e-12).all()
    assert (mean_field < full).all()
    torch.testing.assert_close(full, given.log_evidence, rtol=1e-10, atol=1e-10)


def test_the_oracles_are_those_of_another_formula() -> None:
    """Precision form against the covariance form of the oracles; chains have an identity as S."""
    model = chain(2, bias=True)
    x = torch.randn(3, 4)
    packed = LogJoint(model, (x,)).layout.pack(LogJoint(model, (x,)).predictions())
    matrix = hessian(LogJoint(model, (x,)), packed)["local"][0]
    torch.testing.assert_close(torch.linalg.inv(matrix), model.exact(x).covariance.detach())

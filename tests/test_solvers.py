"""Solvers of a relaxation: stopping row by row, warm starts, regimes, capture, and the choice."""

from __future__ import annotations

import statistics
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import zoo
from benchmarks.studies.pc_chains import DEPTHS, Chain, gradient_steps, products
from guides.energy import LogJoint
from guides.inference import PredictiveCoding
from guides.inference.compaction import Batch
from guides.inference.relaxation import curvature, energy_function, relax
from guides.inference.solvers import SOLVERS, make
from guides.inference.solvers.auto import choose
from guides.inference.solvers.heavy_ball import HeavyBall
from guides.layout import layout
from tests.model_cases import MODEL_CASES
from tests.pc_oracles import ORACLES, chain

pytestmark = pytest.mark.usefixtures("float64")


def loop(model: Any, **options: Any) -> PredictiveCoding:
    return PredictiveCoding(model, pyro.optim.Adam({"lr": 1e-3}), **options)


# --- the updates themselves ---------------------------------------------------------------------


def squares(x: Tensor) -> None:
    """Its exact Hessian differs from Gauss-Newton's by 2 (z^2 - x)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0, 1))
        pyro.sample("x", dist.Normal(z**2, 1), obs=x)


def energy_of_squares(z: Tensor, x: Tensor) -> Tensor:
    return (0.5 * z.square() + 0.5 * (z.square() - x).square()).sum()


Z, SQUARES = [[1.0], [-0.7], [0.4]], [2.0, 1.5, 0.3]


def updates(solver: Any, num_steps: int, step_size: Any) -> Tensor:
    log_joint = LogJoint(squares, (torch.tensor(SQUARES),))
    start = {"data": torch.tensor(Z)}
    found = relax(log_joint, start, num_steps=num_steps, step_size=step_size, solver=solver)
    return found.packed["data"][:, 0]


@pytest.mark.parametrize("solver", ["adam", "heavy_ball"])
def test_moving_solvers_are_those_of_torch(solver: str) -> None:
    z = torch.tensor(Z)[:, 0].requires_grad_()
    other: torch.optim.Optimizer = (
        torch.optim.Adam([z], lr=0.05)
        if solver == "adam"
        else torch.optim.SGD([z], lr=0.05, momentum=0.9)
    )
    for _ in range(6):
        other.zero_grad()
        energy_of_squares(z, torch.tensor(SQUARES)).backward()
        other.step()
    torch.testing.assert_close(updates(solver, 6, 0.05), z.detach(), rtol=0, atol=1e-10)


def test_nesterov_extrapolates() -> None:
    y = before = torch.tensor(Z)[:, 0]
    t = 1.0
    for _ in range(6):
        gradient = y + 2 * y * (y.square() - torch.tensor(SQUARES))
        x = y - 0.05 * gradient
        after = (1 + (1 + 4 * t**2) ** 0.5) / 2
        y = x + (t - 1) / after * (x - before)
        before, t = x, after
    torch.testing.assert_close(updates("nesterov", 6, 0.05), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["gauss_newton", "newton"])
def test_a_newton_step_divides_by_its_own_curvature(solver: str) -> None:
    z, x = torch.tensor(Z)[:, 0], torch.tensor(SQUARES)
    gradient = z + 2 * z * (z.square() - x)
    bend = 1 + 4 * z.square()
    if solver == "newton":
        bend = (bend + 2 * (z.square() - x)).abs()
    expected = z - gradient / bend
    # A step that raises the energy is refused, so rows that fall are compared.
    rows = torch.tensor(
        [float(energy_of_squares(a, c)) < float(energy_of_squares(b, c))
         for a, b, c in zip(expected, z, x, strict=True)]
    )  # fmt: skip
    assert rows.any()
    found = updates(solver, 1, "auto")
    torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-10)


def test_every_row_has_the_curvature_of_its_own_energy() -> None:
    z, x = torch.tensor(Z), torch.tensor(SQUARES)
    function = energy_function(LogJoint(squares, (x,)), jacobian=True)
    found = curvature(function, {"data": z}, 1.0)["data"]
    z = z[:, 0]
    expected = (1 + 4 * z.square() + 2 * (z.square() - x)).abs()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_joint_step_has_n_over_b_in_the_globals_alone() -> None:
    def model(x: Tensor, index: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0, 1))
        with pyro.plate("data", 12, subsample=index):
            z = pyro.sample("z", dist.Normal(m, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    x = torch.tensor([1.0, -2.0, 0.5])
    start = {"global": torch.tensor([0.3]), "data": torch.tensor([[0.2], [-1.0], [2.0]])}
    log_joint = LogJoint(model, (x, torch.tensor([4, 0, 7])))
    found = relax(log_joint, start, num_steps=1, step_size=0.01).packed
    m, z = start["global"], start["data"][:, 0]
    rows = z - 0.01 * ((z - m) + (z - x))
    torch.testing.assert_close(found["data"][:, 0], rows, rtol=0, atol=1e-12)
    whole = m - 0.01 * (m + 12 / 3 * (m - z).sum())
    torch.testing.assert_close(found["global"], whole, rtol=0, atol=1e-12)


# --- rows that are done -------------------------------------------------------------------------


def uneven() -> tuple[Any, Tensor]:
    """Rows that start far from their mode, and rows that start almost there."""
    given = ORACLES["biases"]()
    with torch.no_grad():
        seen = given.model(size=4)
    return given.model, torch.cat([given.x * 20, seen, seen * 1.001])


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_that_are_done_cost_nothing_and_end_where_they_would(solver: str) -> None:
    model, x = uneven()
    log_joint = LogJoint(model, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    # The first rows at their modes: done before the first step.
    mode = torch.cat(list(model.exact(x).mean.values()), -1).detach()
    packed["data"][:6] = mode[:6]
    options: dict[str, Any] = {"num_steps": 3000, "solver": solver, "tolerance": 1e-5}
    found = relax(log_joint, packed, **options)
    assert found.num_steps < 3000, "the tolerance must end the relaxation"
    assert found.gradient["data"].abs().max() <= 1e-5
    torch.testing.assert_close(found.packed["data"][:6], mode[:6], rtol=0, atol=0)
    assert found.row_gradients < found.num_gradients * len(x)
    for row in range(5, len(x), 2):
        alone = LogJoint(model, (x[row : row + 1],))
        single = relax(alone, {"data": packed["data"][row : row + 1]}, **options)
        torch.testing.assert_close(
            single.packed["data"][0], found.packed["data"][row], rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("solver", ["gradient", "lbfgs"])
def test_a_batch_that_shrinks_ends_as_one_that_does_not(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = uneven()
    log_joint = LogJoint(model, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    options: dict[str, Any] = {"num_steps": 3000, "solver": solver, "tolerance": 1e-6}
    shrinks = relax(log_joint, packed, **options)
    monkeypatch.setattr(Batch, "_slice", lambda self: None)
    stays = relax(log_joint, packed, **options)
    assert shrinks.num_steps == stays.num_steps
    assert shrinks.row_gradients < stays.row_gradients
    torch.testing.assert_close(shrinks.packed["data"], stays.packed["data"], rtol=0, atol=1e-12)
    torch.testing.assert_close(shrinks.energy, stays.energy, rtol=1e-12, atol=1e-12)


def test_a_row_that_is_done_rests_in_a_batch_that_goes_on() -> None:
    z, x = torch.tensor([[0.5 + 4e-4], [0.0], [0.0]]), torch.tensor([1.0, -3.0, 7.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x)

    # Two of three rows go on, too many to take them out; the first is within the tolerance.
    log_joint = LogJoint(model, (x,))
    found = relax(log_joint, {"data": z}, num_steps=20, step_size=0.01, tolerance=1e-3)
    assert found.num_steps == 20
    assert torch.equal(found.packed["data"][0], z[0])
    exact = x[1:] / 2 * (1 - (1 - 0.01 * 2) ** 20)
    torch.testing.assert_close(found.packed["data"][1:, 0], exact)


def test_a_batch_that_shrinks_again_and_again_keeps_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model(x: Tensor, scale: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, 1))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    sizes = []
    whole = Batch._slice

    def counted(self: Batch) -> None:
        whole(self)
        sizes.append(len(self.point.x))

    monkeypatch.setattr(Batch, "_slice", counted)
    # With one step for all, a row needs about 1 / (its curvature) updates.
    bends = torch.tensor([5.0, 0.1, 19.0, 1.0, 9.0, 0.2, 0.5, 15.0])
    x = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0])
    log_joint = LogJoint(model, (x, bends.rsqrt()))
    options: dict[str, Any] = {"num_steps": 3000, "step_size": 0.05, "tolerance": 1e-9}
    found = relax(log_joint, {"data": torch.zeros(8, 1)}, **options)
    assert len(sizes) > 1
    assert sizes[0] > sizes[1]
    exact = x * bends / (1 + bends)
    torch.testing.assert_close(found.packed["data"][:, 0], exact, rtol=0, atol=1e-8)


def test_rows_of_a_program_that_cannot_be_sliced_stay_where_they_are() -> None:
    """Its rows differ by a tensor that is no argument."""
    width = torch.linspace(0.5, 2.0, 8)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 8):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), width))
            pyro.sample("x", dist.Normal(z.tanh(), 0.3), obs=x)

    x = torch.cat([torch.zeros(6), torch.tensor([0.7, -0.5])])
    pc = loop(model, num_steps=500, tolerance=1e-8)
    values = pc.infer(x)["z"]
    assert (values[:6] == 0).all()
    slope = values / width**2 - (x - values.tanh()) / 0.09 * (1 - values.tanh().square())
    assert slope.abs().max() < 1e-7


def test_globals_that_are_held_stay_through_a_shrinking_batch() -> None:
    def model(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        level = pyro.sample("level", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(level.expand(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.cat([torch.zeros(7), torch.tensor([3.0])])
    rows = torch.arange(8)
    log_joint = LogJoint(model, (x,), {"size": 80, "index": rows})
    packed = {"global": torch.zeros(1), "data": torch.zeros(8, 1)}
    found = relax(log_joint, packed, num_steps=500, tolerance=1e-9, hold_globals=True)
    assert float(found.packed["global"]) == 0
    torch.testing.assert_close(found.packed["data"].squeeze(-1), 0.8 * x, rtol=1e-8, atol=1e-8)
    # The gradient of what is held is that of all rows, also of those that left.
    torch.testing.assert_close(found.gradient["global"], -10 * 0.8 * x.sum().reshape(1))


# --- warm starts ---------------------------------------------------------------------------------


def test_a_row_goes_on_where_its_last_step_left_it() -> None:
    """Minibatches in any order; rows that are new start at the default."""
    model = chain(2, bias=True)
    with torch.no_grad():
        x = model(size=6)
    mode = torch.cat(list(model.exact(x).mean.values()), -1).detach()
    still = pyro.optim.SGD({"lr": 0.0})
    pc = PredictiveCoding(model, still, num_steps=4, warm_start="last")

    def distance(rows: Tensor) -> Tensor:
        values = pc.infer(x[rows], size=6, index=rows)
        return (torch.cat(list(values.values()), -1) - mode[rows]).norm(dim=-1)

    rows = torch.tensor([4, 1, 0])
    fresh = distance(torch.arange(6))
    for order in ([4, 1, 0], [0, 4, 1], [1, 0, 4]):
        index = torch.tensor(order)
        pc.step(x[index], size=6, index=index)
    warm = distance(torch.arange(6))
    assert (warm[rows] < 0.2 * fresh[rows]).all()
    torch.testing.assert_close(warm[[2, 3, 5]], fresh[[2, 3, 5]], rtol=1e-12, atol=1e-12)
    # What infer does is not remembered, and a new loop goes on from the saved state.
    torch.testing.assert_close(distance(torch.arange(6)), warm, rtol=0, atol=0)
    state = pc.get_state()
    pc = loop(model, num_steps=4, warm_start="last")
    pc.set_state(state)
    torch.testing.assert_close(distance(torch.arange(6)), warm, rtol=0, atol=0)


def test_warm_starts_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"warm_start must be None, .*, got 'yes'"):
        loop(chain(1), warm_start="yes")
    with pytest.raises(ValueError, match=r"needs a guide to start from. Pass guide="):
        loop(chain(1), warm_start="guide")


# --- regimes -------------------------------------------------------------------------------------


def test_a_regime_says_how_far_a_relaxation_goes() -> None:
    given = ORACLES["chain3"]()
    pc = loop(given.model, num_steps=400)
    found = pc.regime(given.x)
    assert found.verdict == "equilibrium"
    assert (found.step_curvature < 2).all()
    assert (found.residual < 0.05).all()
    assert "equilibrium after 400 steps, step x lambda_max 0.909" in repr(pc)
    partial = loop(given.model, num_steps=3).regime(given.x)
    assert partial.verdict == "partial"
    # Every mode is at most as fast as lambda_max says.
    assert ((partial.excited > 0) & (partial.excited <= 1.05)).all()
    fraction = 1 - (1 - partial.step_curvature * partial.excited) ** 3
    torch.testing.assert_close(partial.relaxed, fraction)
    auto = loop(given.model, num_steps=20, solver="auto").regime(given.x)
    assert auto.verdict == "equilibrium"
    assert auto.step_curvature is None


def test_a_step_that_is_unstable_is_told() -> None:
    given = ORACLES["chain3"]()
    with pytest.warns(UserWarning, match=r"not below 2 / lambda_max.*Use step_size="):
        assert loop(given.model, step_size=3.0, num_steps=5).regime(given.x).verdict == "unstable"
    # And while training, where weights have grown since.
    pc = loop(given.model, step_size=0.05, num_steps=2)
    for _ in range(49):
        pc.step(given.x)
    with torch.no_grad():
        for parameter in given.model.parameters():
            parameter.mul_(20)
    with pytest.warns(UserWarning, match=r"lambda_max grows while weights are learned"):
        pc.step(given.x)


def test_backpropagation_in_disguise_is_told_at_the_first_step() -> None:
    given = ORACLES["chain2"]()
    pc = loop(given.model, step_size=0.01, num_steps=1, parameterization="noncentered")
    with pytest.warns(UserWarning, match=r"backpropagation's gradient times a small number"):
        pc.step(given.x)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [4, 16])
@pytest.mark.parametrize(
    "depth", [2, 5, *(pytest.param(d, marks=pytest.mark.slow) for d in (10, 20))]
)
def test_auto_needs_fifteen_products_whatever_the_depth(depth: int, outputs: int) -> None:
    counts = [products(Chain(depth, outputs, seed), solver="auto") for seed in range(3)]
    assert statistics.median(counts) <= 15
    if outputs == 4:
        steps = [gradient_steps(Chain(depth, outputs, seed)) for seed in range(3)]
        published = dict(zip(DEPTHS, (118, 1095, 4780, 14223), strict=True))
        assert statistics.median(steps) == published[depth]


def test_the_steps_of_gradient_descent_are_those_of_the_loop() -> None:
    cell = Chain(2, 4, 0)
    largest = float(torch.linalg.eigvalsh(cell.quadratic()[0])[-1])
    count = gradient_steps(cell)
    near = [
        cell.distance(loop(cell.model, num_steps=n, step_size=1 / largest).infer(cell.x, cell.y))
        for n in (count - 1, count)
    ]
    assert near[0] > 1e-3 >= near[1]


@pytest.mark.parametrize("name", [name for name, case in MODEL_CASES.items() if case.latents])
def test_auto_is_never_worse_than_gradient_descent_with_more_gradients(name: str) -> None:
    case = MODEL_CASES[name]
    model = case.build().double()
    args = case.args(model)

    def reached(**options: Any) -> tuple[float, int]:
        pc = loop(model, **options)
        log_joint = pc._log_joint(args, {})
        _, found = pc._relax(log_joint)
        total = found.energy.sum() * log_joint.layout.scale + found.energy_global
        return float(total), found.num_gradients

    for num_steps in (10, 40):
        energy, count = reached(num_steps=num_steps)
        # A product counts two gradients, and there are fewer products than steps.
        mine, spent = reached(num_steps=(count - 1) // 2, solver="auto")
        assert spent <= count
        assert mine <= energy + 1e-9 * (1 + abs(energy))


def test_what_was_chosen_is_told_with_the_reason() -> None:
    given = ORACLES["chain1"]()
    pc = loop(given.model, solver="auto")
    pc.infer(given.x)
    expected = "auto: truncated_newton, noncentered (all latents are location-scale sites)"
    assert expected in repr(pc)
    poisson = ORACLES["gamma_poisson"]()
    found = choose(layout(poisson.model, (poisson.x,), {}))
    assert (found.solver, found.parameterization) == ("truncated_newton", "centered")

    def kinked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = choose(layout(kinked, (torch.zeros(2),), {}))
    assert found.solver == "gradient"
    assert "'z' has a kink" in found.reason
    # Soft thresholding: the mode is where the kink is, or one unit nearer to it than x.
    x = torch.tensor([0.5, 3.0])
    values = loop(kinked, solver="auto", num_steps=200).infer(x)["z"]
    torch.testing.assert_close(values, torch.tensor([0.0, 2.0]), rtol=0, atol=1e-5)


# --- bad use, and programs that are no quadratics ------------------------------------------------


def test_solvers_are_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"solver must be one of auto, adam, .*; got 'sgd'"):
        loop(chain(1), solver="sgd")
    for solver in ("conjugate_gradient", "lbfgs", "newton", "truncated_newton"):
        with pytest.raises(ValueError, match=r"takes no number as step_size. Leave it at"):
            loop(chain(1), solver=solver, step_size=0.1)
    wide = zoo.make("linear_gaussian", dims=(300, 2)).double()
    with pytest.raises(ValueError, match=r"300 coordinates of at most 256. Use solver="):
        loop(wide, solver="newton", num_steps=1).infer(torch.zeros(2, 2))


def test_a_solver_with_settings_is_used_and_not_changed() -> None:
    given = ORACLES["chain1"]()
    solver = HeavyBall(momentum=0.5)
    a = loop(given.model, solver=solver, num_steps=5).infer(given.x)["h1"]
    b = loop(given.model, solver=solver, num_steps=5).infer(given.x)["h1"]
    c = loop(given.model, solver="heavy_ball", num_steps=5).infer(given.x)["h1"]
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (a - c).abs().max() > 1e-6
    assert make(solver) is not solver


def valleys(x: Tensor) -> None:
    """Two modes with a maximum between them."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 2.0))
        pyro.sample("x", dist.Normal(z.square(), 0.3), obs=x)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_energy_never_rises_where_the_hessian_is_indefinite(solver: str) -> None:
    x = torch.tensor([1.0, 4.0, 0.25])
    log_joint = LogJoint(valleys, (x,))
    packed = {"data": torch.tensor([[0.05], [-0.1], [3.0]])}
    steps = (0, 1, 2, 4, 8, 16, 64, 400)
    energies = torch.stack(
        [relax(log_joint, packed, num_steps=n, solver=solver).energy for n in steps]
    )
    start, end = energies[0], energies[-1]
    assert (energies <= start + 1e-12).all()
    # Where a truncated walk ends early its trial is another one.
    assert solver == "truncated_newton" or (energies.diff(dim=0) <= 1e-9).all()
    settled = relax(log_joint, {"data": x.sqrt().reshape(-1, 1)}, num_steps=400).energy
    torch.testing.assert_close(end, settled, rtol=1e-6, atol=1e-6)


def test_products_are_counted() -> None:
    given = ORACLES["chain2"]()
    log_joint = LogJoint(given.model, (given.x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    found = relax(log_joint, packed, num_steps=3, solver="conjugate_gradient")
    assert (found.num_products, found.num_gradients) == (1 + 3 * 2, 1 + 3 * 3)
    found = relax(log_joint, packed, num_steps=3, solver="gradient")
    assert (found.num_products, found.num_gradients) == (2 + 12 + 3, 2 + 24 + 3)
    found = relax(log_joint, packed, num_steps=6, solver="truncated_newton")
    assert (found.num_products, found.num_gradients) == (1 + 6, 1 + 4 * 2 + 1 + 1)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if make(name).uncapturable is None])
def test_a_captured_step_is_that_of_the_loop(solver: str) -> None:
    x = ORACLES["biases"]().x

    def train(mode: str) -> tuple[list[float], PredictiveCoding]:
        with pyro.get_param_store().scope():
            model = chain(2, bias=True)
            pc = loop(model, solver=solver, num_steps=5, mode=mode)
            return [pc.step(x) for _ in range(3)], pc

    eager, graph = train("eager")[0], train("graph")
    assert [kind.reason for kind in graph[1].compiled] == [None]
    torch.testing.assert_close(torch.tensor(graph[0]), torch.tensor(eager), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"solver": "newton"}, "decompose Hessians by their values"),
        ({"solver": "gauss_newton"}, "decompose matrices by their values"),
        ({"warm_start": "last"}, "looks rows up by their numbers"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_why(
    options: dict[str, Any], reason: str
) -> None:
    given = ORACLES["chain1"]()
    pc = loop(given.model, num_steps=2, mode="graph", **options)
    for _ in range(2):
        pc.step(given.x)
    assert reason in str(pc.compiled[0].reason)

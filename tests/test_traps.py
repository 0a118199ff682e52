"""Traps of Pyro 1.9.2 that have cost others weeks, each as a test of this package."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Predictive, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import guides
from guides.draws import draw
from guides.inference import SVI, PredictiveCoding
from guides.objectives import RefinementELBO
from tests.cases import CORE_GUIDES

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
GRID = list(CORE_GUIDES)


def model(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3)
        pyro.sample("x", dist.Normal(loc, scale + 0.1).to_event(1), obs=x)


def train(guide: guides.Guide, steps: int = 5, program: object = model) -> list[float]:
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.05}), RefinementELBO())
    return svi.run(steps, ((X,), {})).losses


def snapshot(guide: guides.Guide) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in guide.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", GRID)
def test_two_guides_of_one_class_never_share_weights(name: str) -> None:
    """Pyro's store would give the second guide the trained values of the first."""
    first = guides.make(name, model, X)
    train(first)
    trained = snapshot(first)
    second = guides.make(name, model, X)
    fresh = snapshot(second)
    assert not same(trained, fresh)
    second(X)
    assert same(snapshot(second), fresh)
    train(second)
    assert same(snapshot(first), trained)
    assert not same(snapshot(second), fresh), "the second guide must learn, too"


class Shadow(PyroModule):
    """A model whose attribute paths are those of a guide."""

    def __init__(self) -> None:
        super().__init__()
        self.schemes = nn.ModuleDict({"data": nn.Linear(2, 3)})
        self.families = nn.ModuleDict({"data": nn.Linear(2, 3)})

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.schemes["data"](z) + self.families["data"](z)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("name", GRID)
def test_a_model_and_a_guide_with_equal_paths_never_share_weights(name: str) -> None:
    shadow = Shadow()
    guide = guides.make(name, shadow, X)
    before = snapshot(guide), {k: v.clone() for k, v in shadow.state_dict().items()}
    train(guide, program=shadow)
    mine = {id(p) for p in guide.parameters()}
    stored = {id(p.unconstrained()) for p in pyro.get_param_store().values()}
    assert stored == mine | {id(p) for p in shadow.parameters()}
    assert all(not torch.equal(v, before[1][k]) for k, v in shadow.state_dict().items())
    assert not same(snapshot(guide), before[0])


def test_colliding_names_are_an_error_not_a_silent_standstill() -> None:
    first, second = Shadow(), Shadow()
    train(guides.make("normal", first, X), program=first)
    with pytest.raises(ValueError, match="another module's parameter in Pyro's global store"):
        train(guides.make("normal", second, X), program=second)
    with pytest.raises(ValueError, match="another module's parameter"):
        PredictiveCoding(second, pyro.optim.Adam({"lr": 0.1})).step(X)


@pytest.mark.parametrize("name", GRID)
def test_minibatches_get_full_size_or_amortized_parameters(name: str) -> None:
    """Five of Pyro's autoguides allocate parameters of the minibatch's size."""
    index = torch.tensor([7, 2, 4])
    guide = guides.make(name, model, X[index], model_kwargs={"size": 10, "index": index})
    shapes = {k: tuple(v.shape) for k, v in guide.state_dict().items()}
    if guide.amortized:
        assert not any(
            3 == shape[0] and "network" not in k
            for k, shape in shapes.items()
            if shape and "shift" not in k and "scale" not in k
        )
    else:
        assert shapes["schemes.data.table"][0] == 10
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), RefinementELBO())
    before = snapshot(guide)
    svi.step(X[index], size=10, index=index)
    if not guide.amortized:
        moved = (guide.schemes["data"].table != before["schemes.data.table"]).any(-1)
        assert moved.nonzero().flatten().tolist() == sorted(index.tolist())
    svi.step(X)  # the full batch and a ragged one go through the same guide
    svi.step(X[:1], size=10, index=torch.tensor([9]))


@pytest.mark.parametrize("name", GRID)
def test_an_explicit_subsample_is_not_replaced_by_the_guide(name: str) -> None:
    guide = guides.make(name, model, X)
    index = torch.tensor([8, 0, 5])
    trace = poutine.trace(guide).get_trace(X[index], size=10, index=index)
    assert torch.equal(trace.nodes["data"]["value"], index)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(
        X[index], size=10, index=index
    )
    assert torch.equal(replayed.nodes["data"]["value"], index)


def test_a_subsample_drawn_by_the_program_is_fresh_each_step_and_shared_with_the_guide() -> None:
    seen: list[Tensor] = []

    def drawing(x: Tensor) -> None:
        with pyro.plate("data", 10, subsample_size=3) as rows:
            seen.append(rows)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])

    for name in ("delta", "normal", "amortized_normal"):
        guide = guides.make(name, drawing, X)
        drawn = set()
        for _ in range(8):
            guide_trace = poutine.trace(guide).get_trace(X)
            model_trace = poutine.trace(poutine.replay(drawing, guide_trace)).get_trace(X)
            rows = model_trace.nodes["data"]["value"]
            assert torch.equal(rows, guide_trace.nodes["data"]["value"])
            drawn.add(tuple(rows.tolist()))
        assert len(drawn) > 1, f"{name}: every step would see the same minibatch"


@pytest.mark.parametrize("name", GRID)
def test_deepcopy_gives_a_guide_of_its_own_and_leaves_the_original_working(name: str) -> None:
    guide = guides.make(name, model, X)
    train(guide)
    trained = snapshot(guide)
    twin = copy.deepcopy(guide)
    assert same(snapshot(twin), trained)
    assert guide.model is model
    assert twin.model is model
    train(twin)
    assert same(snapshot(guide), trained)
    assert not same(snapshot(twin), trained)
    moved = snapshot(twin)
    train(guide)
    assert not same(snapshot(guide), trained)
    assert same(snapshot(twin), moved)


@pytest.mark.parametrize("name", GRID)
def test_state_dict_and_files_restore_a_fresh_guide(name: str, tmp_path: Path) -> None:
    guide = guides.make(name, model, X)
    train(guide)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    fresh = guides.make(name, model, X)
    fresh.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    torch.manual_seed(0)
    a = guide.locations(X)
    torch.manual_seed(0)
    b = fresh.locations(X)
    assert all(torch.equal(a[k], b[k]) for k in a)
    train(guide)
    train(fresh)


def test_the_parameter_store_round_trips(tmp_path: Path) -> None:
    guide = guides.make("normal", model, X, name="saved")
    train(guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    values = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    train(guide)
    pyro.get_param_store().load(tmp_path / "store.pt")
    assert all(torch.equal(v, values[k]) for k, v in pyro.get_param_store().items())


@pytest.mark.parametrize("name", GRID)
def test_all_parameters_exist_before_the_first_call(name: str) -> None:
    guide = guides.make(name, model, X)
    names = {k for k, _ in guide.named_parameters()}
    objective = RefinementELBO()(model, guide)
    assert {id(p) for p in guide.parameters()} <= {id(p) for p in objective.parameters()}
    objective(X).backward()
    assert {k for k, _ in guide.named_parameters()} == names
    assert all(p.grad is not None for p in guide.parameters())


@pytest.mark.parametrize("name", GRID)
def test_stock_pyro_takes_the_guide(name: str) -> None:
    guide = guides.make(name, model, X)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    samples = Predictive(model, guide=guide, num_samples=4)(X)
    assert samples["z"].shape == (4, 10, 2)
    assert samples["scale"].numel() == 4
    Importance(model, guide, num_samples=3).run(X)
    with torch.no_grad():
        assert set(guide(X)) == {"z", "scale"}


@pytest.mark.parametrize("name", [n for n in GRID if n.startswith("amortized_")])
@pytest.mark.parametrize("rows", [1, 4, 25])
def test_amortized_guides_take_any_number_of_unseen_rows(name: str, rows: int) -> None:
    guide = guides.make(name, model, X)
    x = torch.randn(rows, 3)
    assert guide(x)["z"].shape == (rows, 2)
    # One row alone gets what it gets in company.
    alone = guide.locations(x[:1])["z"][0]
    assert torch.allclose(alone, guide.locations(x)["z"][0], atol=1e-6)


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_guide_takes_the_dtype_of_the_latents(name: str, dtype: torch.dtype) -> None:
    def typed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0].to(dtype))

    guide = guides.make(name, typed, X)
    assert guide(X)["z"].dtype == dtype
    assert all(p.dtype == dtype for p in guide.parameters())
    train(guide, program=typed)


@pytest.mark.parametrize("loop", ["svi", "predictive_coding"])
def test_evaluate_loss_changes_nothing(loop: str) -> None:
    shadow = Shadow()
    guide = guides.make("amortized_normal", shadow, X)
    optim = pyro.optim.Adam({"lr": 0.05})
    if loop == "svi":
        method = SVI(shadow, guide, optim, Trace_ELBO())
    else:
        method = PredictiveCoding(shadow, optim)
    method.step(X)
    before = snapshot(guide), {k: v.clone() for k, v in shadow.state_dict().items()}
    method.evaluate_loss(X)
    assert same(snapshot(guide), before[0])
    assert same(dict(shadow.state_dict()), before[1])
    for parameter in (*guide.parameters(), *shadow.parameters()):
        assert parameter.grad is None or not parameter.grad.any()


def test_importing_a_flow_leaves_torchs_validation_alone() -> None:
    """Zuko switches validation of all distributions off when it is imported."""
    code = (
        "import torch; before = torch.distributions.Distribution._validate_args;"
        "import guides.families.spline_coupling;"
        "assert torch.distributions.Distribution._validate_args is before is True"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "make",
    [
        pyro.infer.autoguide.AutoNormal,
        pyro.infer.autoguide.AutoDiagonalNormal,
        pyro.infer.autoguide.AutoMultivariateNormal,
        pyro.infer.autoguide.AutoNormalMessenger,
    ],
    ids=lambda make: make.__name__,
)
def test_pyros_autoguides_pass_through_the_same_functions(make: type) -> None:
    """Log p - log q of our draws averages to Pyro's own ELBO; joint draws are labelled joint."""

    def local(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    auto = make(local)
    svi = pyro.infer.SVI(local, auto, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        svi.step(X)
    draws = draw(local, auto, (X,), num_samples=400)
    weights = draws.log_p_rows.sum(-1) + draws.log_p_global
    weights = weights - draws.log_q_rows.sum(-1) - draws.log_q_global
    with torch.no_grad():
        reference = torch.tensor([-Trace_ELBO().loss(local, auto, X) for _ in range(400)])
    error = (weights.var() / 400 + reference.var() / 400).sqrt()
    assert abs(weights.mean() - reference.mean()) < 4 * error
    joint = make.__name__ in ("AutoDiagonalNormal", "AutoMultivariateNormal")
    assert draws.joint is joint
    assert draws.rows_complete is not joint

"""Compiled steps: the same losses, parameters and random numbers as the eager program."""

from __future__ import annotations

import copy
import itertools
import random
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import guides
from guides.capture import optimizers
from guides.capture import steps as capture_steps
from guides.capture.optimizers import rule_of
from guides.families.multivariate_normal import MultivariateNormal
from guides.inference import SVI, CompiledSVI
from guides.objectives import IWELBO, STL, AnalyticELBO, DReG, RefinementELBO, Renyi
from tests.cases import CORE_GUIDES, GUIDE_CASES, TWO_LEVELS
from tests.model_cases import MODEL_CASES

NO_COMPILER = capture_steps.compiler_missing() is not None


def regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """A global scale, weights, and a latent offset a row."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        offset = pyro.sample("offset", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal((x * weights).sum(-1) + offset, scale), obs=y)


def data(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x.sum(-1) + torch.randn(rows, generator=generator)).to(dtype)


def train(
    cls: type,
    build: Callable[[], tuple[Any, Any]],
    call: tuple[Any, ...],
    *,
    steps: int = 20,
    objective: Any = None,
    optim: Callable[[], Any] = lambda: pyro.optim.Adam({"lr": 0.02}),
    **options: Any,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        model, guide = build()
        svi = cls(model, guide, optim(), objective or Trace_ELBO(), **options)
        pyro.set_rng_seed(1)
        losses = svi.run(steps, (call, {})).losses
        store = pyro.get_param_store()
        learned = {name: store[name].unconstrained().detach().clone() for name in store}
        names = sorted(learned)  # names count instances, so they are compared by order
        return losses, {str(i): learned[name] for i, name in enumerate(names)}, svi


def check_equal(
    build: Callable[[], tuple[Any, Any]],
    call: tuple[Any, ...],
    *,
    mode: str = "graph",
    tolerance: float = 1e-5,
    **options: Any,
) -> CompiledSVI:
    losses, learned, _ = train(SVI, build, call, **options)
    found, compiled, svi = train(CompiledSVI, build, call, mode=mode, **options)
    assert [kind.mode for kind in svi.compiled] == [mode], svi.compiled
    size = max(1.0, max(map(abs, losses)))
    assert found == pytest.approx(losses, abs=tolerance * size)
    assert compiled.keys() == learned.keys()
    for name, value in learned.items():
        torch.testing.assert_close(compiled[name], value, atol=tolerance, rtol=tolerance)
    return svi


def pair(model_name: str, guide_name: str, dtype: torch.dtype) -> Any:
    case = MODEL_CASES[model_name]

    def build() -> tuple[Any, Any]:
        torch.set_default_dtype(dtype)
        model = case.build()
        args = case.args(model)
        options = GUIDE_CASES[guide_name].options
        return model, guides.make(guide_name, model, *args, data_plate=case.plate, **options)

    torch.set_default_dtype(dtype)
    try:
        args = case.args(build()[0])
    finally:
        torch.set_default_dtype(torch.float32)
    return build, args


@pytest.fixture(autouse=True)
def _default_dtype() -> Any:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("guide_name", CORE_GUIDES)
def test_steps_of_a_pair_are_those_of_the_program(guide_name: str) -> None:
    """Losses and parameters for the same noise, float64."""
    build, args = pair(TWO_LEVELS, guide_name, torch.float64)
    check_equal(build, args, steps=6, tolerance=1e-10, objective=RefinementELBO())


@pytest.mark.slow
@pytest.mark.parametrize("guide_name", GUIDE_CASES)
def test_hundred_steps_of_every_guide_are_those_of_the_program(guide_name: str) -> None:
    """Losses and parameters after 100 steps of the same noise, float64 to 1e-10."""
    build, args = pair(TWO_LEVELS, guide_name, torch.float64)
    check_equal(build, args, steps=100, tolerance=1e-10, objective=RefinementELBO())


@pytest.mark.parametrize(
    "objective",
    [
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        AnalyticELBO(),
        STL(num_particles=2),
        IWELBO(num_particles=3),
        DReG(num_particles=3),
        Renyi(0.5, num_particles=3),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_objectives(objective: Any) -> None:
    x, y = data(dtype=torch.float64)

    def build() -> tuple[Any, Any]:
        torch.set_default_dtype(torch.float64)
        return regression, guides.make("normal", regression, x, y)

    check_equal(build, (x, y), objective=objective, tolerance=1e-10)


@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.99)}),
        lambda: pyro.optim.AdamW({"lr": 0.02, "weight_decay": 0.1}),
        lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.98, "clip_norm": 0.5}),
        lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9, "dampening": 0.3}),
        lambda: pyro.optim.SGD({"lr": 0.001}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if "global" in name else 0.01}),
        lambda: pyro.optim.RMSprop({"lr": 0.01}),
    ],
    ids=["Adam", "AdamW", "ClippedAdam", "momentum", "SGD", "rates by name", "RMSprop"],
)
def test_optimizers(optim: Callable[[], Any]) -> None:
    x, y = data(dtype=torch.float64)

    def build() -> tuple[Any, Any]:
        torch.set_default_dtype(torch.float64)
        return regression, guides.make("normal", regression, x, y)

    svi = check_equal(build, (x, y), optim=optim, tolerance=1e-12)
    eager = "RMSprop" in str(optim().pt_optim_constructor)
    assert ("RMSprop" in str(svi.compiled[0].reason)) == eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "ClippedAdam"])
def test_parameters_have_the_bits_of_the_optimizers(name: str, dtype: torch.dtype) -> None:
    """Not to rounding: a program may blow the last bit up, and then nothing less compares."""
    x, y = data(dtype=dtype)

    def build() -> tuple[Any, Any]:
        torch.set_default_dtype(dtype)
        return regression, guides.make("multivariate_normal", regression, x, y)

    def optim() -> Any:
        return getattr(pyro.optim, name)({"lr": 0.03, "weight_decay": 0.1, "betas": (0.8, 0.99)})

    learned = train(SVI, build, (x, y), optim=optim, steps=30)[1]
    compiled = train(CompiledSVI, build, (x, y), optim=optim, steps=30, mode="graph")[1]
    for key, value in learned.items():
        assert torch.equal(compiled[key], value), key


class Plain(nn.Module):
    """A model as the Pyro tutorials write them: a torch module registered by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 4)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decoder)
        rate = pyro.param("rate", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), rate).to_event(1), obs=x)


class Parametrized(PyroModule):
    """A model with a constrained parameter of its own."""

    def __init__(self) -> None:
        super().__init__("parametrized")
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


@pytest.mark.parametrize("kind", ["by hand", "PyroParam", "autoguide", "low-rank autoguide"])
def test_parameters_are_found_wherever_the_program_keeps_them(kind: str) -> None:
    x = data()[0]

    def build() -> tuple[Any, Any]:
        if kind == "by hand":
            plain = Plain()
            return plain.model, guides.make("amortized_normal", plain.model, images)
        if kind == "PyroParam":
            model = Parametrized()
            return model, guides.make("amortized_normal", model, images)
        cls = AutoNormal if kind == "autoguide" else AutoLowRankMultivariateNormal
        guide = cls(pyro.poutine.block(Plain().model, expose=["z"]))
        model = Plain().model
        guide = cls(model)
        return model, guide

    images = x[:, 0] if kind == "PyroParam" else torch.randn(6, 4)
    check_equal(build, (images,))


def test_other_shapes_get_graphs_of_their_own_and_agree() -> None:
    """A ragged last batch: two graphs, the losses of the eager run."""
    x = torch.randn(10, 4)

    def losses(cls: type, **options: Any) -> tuple[list[float], Any]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            plain = Plain()
            guide = guides.make("amortized_normal", plain.model, x)
            svi = cls(plain.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **options)
            pyro.set_rng_seed(1)
            return svi.run(9, list(x.split(4))).losses, svi

    expected, _ = losses(SVI)
    found, svi = losses(CompiledSVI, mode="graph")
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(svi.compiled) == 2


def test_ordinary_steps_go_on_from_compiled_ones_and_back() -> None:
    """Parameters and the optimizer's state are the live ones: switching loops changes nothing."""
    x, y = data(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)

    def run(switch: bool) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            guide = guides.make("normal", regression, x, y)
            optim = pyro.optim.Adam({"lr": 0.05})
            eager = SVI(regression, guide, optim, Trace_ELBO())
            compiled = CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")
            loops = itertools.cycle([eager, eager, compiled, compiled] if switch else [eager])
            pyro.set_rng_seed(1)
            return [next(loops).step(x, y) for _ in range(12)]

    assert run(True) == pytest.approx(run(False), abs=1e-11)


def test_a_run_resumes_from_its_state() -> None:
    x, y = data(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)

    def fresh() -> CompiledSVI:
        guide = guides.make("normal", regression, x, y, name="own")
        optim = pyro.optim.Adam({"lr": 0.05})
        return CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")

    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        whole = fresh().run(12, ((x, y), {})).losses
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        state = copy.deepcopy(fresh().run(5, ((x, y), {})).state)
    with pyro.get_param_store().scope():
        rest = fresh().run(12, ((x, y), {}), state=state).losses
    assert rest == pytest.approx(whole, abs=1e-11)


def test_a_restored_optimizer_is_used() -> None:
    """States that replace those of the optimizer, in the same loop, are those that move on."""
    x, y = data(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    guide = guides.make("normal", regression, x, y)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")
    early = copy.deepcopy(svi.run(5, ((x, y), {})).state)
    whole = svi.run(12, ((x, y), {}), state=early).losses
    again = svi.run(12, ((x, y), {}), state=early).losses
    assert again == pytest.approx(whole, abs=1e-11)


def test_a_changed_learning_rate_is_used() -> None:
    x, y = data()

    def run(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            guide = guides.make("normal", regression, x, y)
            optim = pyro.optim.Adam({"lr": 0.05})
            svi = cls(regression, guide, optim, Trace_ELBO(), **options)
            losses = [svi.step(x, y) for _ in range(4)]
            for optimizer in optim.optim_objs.values():
                optimizer.param_groups[0]["lr"] = 0.5
            return losses + [svi.step(x, y) for _ in range(4)]

    assert run(CompiledSVI, mode="graph") == pytest.approx(run(SVI), rel=1e-5)


# ------------------------------------------------------------------ what no graph stands for


def branching(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z > 0 else 2.0
    pyro.sample("x", dist.Normal(z, scale).expand([len(x)]).to_event(1), obs=x)


def counting() -> Callable[[torch.Tensor], None]:
    calls = itertools.count(1)

    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=min(1.0, next(calls) / 1000)):
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    return model


class Normalized(PyroModule):
    """Batch normalization, whose running statistics move."""

    def __init__(self) -> None:
        super().__init__("normalized")
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.norm(z), 1.0).to_event(1), obs=x)


def discrete_guide(x: torch.Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)
    pyro.sample("n", dist.Poisson(rate))


def discrete(x: torch.Tensor) -> None:
    n = pyro.sample("n", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(n, 1.0).expand([len(x)]).to_event(1), obs=x)


def normal_guide(x: torch.Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("z", dist.Normal(loc, 0.5))


REFUSED = {
    "a branch on a value": (lambda: (branching, normal_guide), Trace_ELBO(), "reads the value"),
    "a counter": (lambda: (counting(), normal_guide), Trace_ELBO(), "other operations each time"),
    "discrete draws": (
        lambda: (discrete, discrete_guide),
        Trace_ELBO(),
        "'n' of the guide is not reparam",
    ),
    "an objective": (
        lambda: (discrete, discrete_guide),
        TraceGraph_ELBO(),
        "objective TraceGraph_ELBO",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_graph_runs_eagerly_with_a_reason(name: str) -> None:
    build, objective, reason = REFUSED[name]
    x = torch.randn(5)
    expected, _, _ = train(SVI, build, (x,), objective=objective, steps=8)
    found, _, svi = train(CompiledSVI, build, (x,), objective=objective, steps=8, mode="graph")
    (kind,) = svi.compiled
    assert kind.mode == "eager"
    assert reason in kind.reason
    if name != "a counter":  # looking at it moved its counter
        assert found == expected


def test_running_statistics_are_refused() -> None:
    x = torch.randn(5, 2)
    model = Normalized()

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(5, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    svi = CompiledSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO(), mode="graph")
    svi.run(3, ((x,), {}))
    assert svi.compiled[0].mode == "eager"
    assert "running statistics" in str(svi.compiled[0].reason)


def test_a_program_that_draws_its_own_minibatch_agrees() -> None:
    """The draw of rows stays a draw: graph and program see the same rows."""
    x = torch.randn(20, dtype=torch.float64)

    def model(x: torch.Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    def guide(x: torch.Tensor) -> None:
        loc = pyro.param("at", torch.tensor(0.3, dtype=x.dtype))
        pyro.sample("loc", dist.Normal(loc, 0.5))

    check_equal(lambda: (model, guide), (x,), tolerance=1e-10)


def test_many_kinds_of_calls_warn_and_run_eagerly() -> None:
    def model(x: torch.Tensor, beta: float) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=beta):
            pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x: torch.Tensor, beta: float) -> None:
        normal_guide(x)

    x = torch.randn(5)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({}), Trace_ELBO(), mode="graph")
    for i in range(9):
        svi.step(x, 0.1 * (i + 1))
    with pytest.warns(UserWarning, match="Pass numbers that change as tensors"):
        svi.step(x, 1.0)
    assert len(svi.compiled) == 8


def test_without_a_compiler_graphs_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_steps, "compiler_missing", lambda: "there is no C++ compiler")
    x, y = data()
    guide = guides.make("normal", regression, x, y)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        svi = CompiledSVI(regression, guide, pyro.optim.Adam({}), Trace_ELBO(), mode="inductor")
    svi.run(3, ((x, y), {}))
    assert svi.compiled[0].mode == "graph"
    assert "no C++ compiler" in str(svi.compiled[0].reason)


def test_bad_options_are_refused() -> None:
    fields = (regression, normal_guide, pyro.optim.Adam({}), Trace_ELBO())
    with pytest.raises(ValueError, match="mode must be one of auto, inductor, graph, eager"):
        CompiledSVI(*fields, mode="jit")
    with pytest.raises(ValueError, match="steps_per_call must be at least 1, an integer; got 0"):
        CompiledSVI(*fields, steps_per_call=0)


# ------------------------------------------------------------------ what changes after a capture


class Switched(PyroModule):
    """A model with dropout, a number, a buffer and two networks, one of them used on demand."""

    def __init__(self) -> None:
        super().__init__("switched")
        self.first = nn.Linear(2, 2)
        self.second = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.dropout.eval()
        self.beta = 1.0
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x: Any, both: bool = True) -> None:
        x = torch.as_tensor(x)
        second = self.second
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.dropout(self.first(z)) + self.shift
            loc = loc + second(z) if both else loc
            with pyro.poutine.scale(scale=self.beta):
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def switched_guide(x: Any, both: bool = True) -> None:
    loc = pyro.param("loc", torch.full((5, 2), 0.3))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def _freeze(svi: Any) -> None:
    svi.model.first.weight.requires_grad_(False)


def _thaw(svi: Any) -> None:
    svi.model.first.weight.requires_grad_(True)


def _clear(svi: Any) -> None:
    pyro.clear_param_store()


def _train(svi: Any) -> None:
    svi.model.train()


def _beta(svi: Any) -> None:
    svi.model.beta = 0.1


def _fill(svi: Any) -> None:
    svi.model.shift.fill_(3.0)


def _assign(svi: Any) -> None:
    svi.model.shift = torch.ones(2)


def _optim(svi: Any) -> None:
    svi.optim = pyro.optim.SGD({"lr": 0.1})


def _guide(svi: Any) -> None:
    svi.guide = pyro.poutine.scale(switched_guide, 0.5)


@pytest.mark.filterwarnings("ignore:weight was not registered")
@pytest.mark.parametrize(
    "change", [_freeze, _thaw, _clear, _train, _beta, _fill, _assign, _optim, _guide]
)
def test_what_changes_after_the_capture_is_seen(change: Callable[[Any], None]) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def run(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            model = Switched()
            if change is _thaw:
                _freeze(Namespace(model=model))
            optim = pyro.optim.Adam({"lr": 0.1})
            svi = cls(model, switched_guide, optim, Trace_ELBO(), **options)
            losses = [svi.step(x) for _ in range(4)]
            change(svi)
            return losses + [svi.step(x) for _ in range(4)]

    assert run(CompiledSVI, mode="graph") == pytest.approx(run(SVI), rel=1e-5)


def test_what_keeps_changing_ends_in_eager_steps_with_a_reason() -> None:
    x = torch.randn(5, 2)
    svi = CompiledSVI(
        Switched(), switched_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), mode="graph"
    )
    for step in range(12):
        svi.model.beta = 1.0 / (1 + step)
        svi.step(x)
    (kind,) = svi.compiled
    assert kind.mode == "eager"
    assert "pass what moves as a tensor" in str(kind.reason)


@pytest.mark.filterwarnings("ignore:No gradient reaches second")
@pytest.mark.parametrize(
    "optim",
    [
        lambda: pyro.optim.Adam({"lr": 0.1, "weight_decay": 0.1}),
        lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "dampening": 0.3}),
    ],
    ids=["Adam", "momentum"],
)
def test_parameters_that_learn_in_some_calls_only(optim: Callable[[], Any]) -> None:
    """Their optimizers count steps of their own, and go on once they have learned."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def run(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            svi = cls(Switched(), switched_guide, optim(), Trace_ELBO(), **options)
            calls = [False] * 4 + [True] * 3 + [False] * 3 + [True] * 3
            return [svi.step(x, both) for both in calls]

    assert run(CompiledSVI, mode="graph") == pytest.approx(run(SVI), rel=1e-5)


def test_arrays_and_what_leaves_torch_run_eagerly() -> None:
    """An array is no input of a graph; nor is what the program makes of one."""

    def outside(x: torch.Tensor, both: bool = True) -> None:
        moved = torch.as_tensor(np.exp(np.asarray(x)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=moved)

    batches = torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(0))

    def run(cls: type, model: Any, arrays: bool, **options: Any) -> Any:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            optim = pyro.optim.Adam({"lr": 0.1})
            svi = cls(model(), switched_guide, optim, Trace_ELBO(), **options)
            return [svi.step(x.numpy().copy() if arrays else x) for x in batches], svi

    for model, arrays, reason in (
        (Switched, True, "is a ndarray"),
        (lambda: outside, False, "outside of torch"),
    ):
        expected, _ = run(SVI, model, arrays)
        found, svi = run(CompiledSVI, model, arrays, mode="graph")
        assert found == pytest.approx(expected, rel=1e-5)
        assert reason in str(svi.compiled[0].reason)


def test_gradients_for_others_are_left_to_eager_steps() -> None:
    """An argument, or a tensor in a closure, that another optimizer trains."""
    other = torch.zeros(2, requires_grad=True)

    def closure(x: torch.Tensor, both: bool = True) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + other, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    svi = CompiledSVI(closure, switched_guide, pyro.optim.Adam({}), Trace_ELBO(), mode="graph")
    for _ in range(3):
        other.grad = None
        svi.step(x)
        assert other.grad is not None
    x.requires_grad_()
    svi = CompiledSVI(Switched(), switched_guide, pyro.optim.Adam({}), Trace_ELBO(), mode="graph")
    for _ in range(3):
        x.grad = None
        svi.step(x)
        assert x.grad is not None


def test_handlers_around_a_step_act() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def run(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            optim = pyro.optim.Adam({"lr": 0.1})
            svi = cls(Switched(), switched_guide, optim, Trace_ELBO(), **options)
            losses = []
            for step in range(6):
                with pyro.poutine.scale(scale=1.0 / (1 + step)):
                    losses.append(svi.step(x))
            return losses

    assert run(CompiledSVI, mode="graph") == pytest.approx(run(SVI), rel=1e-5)


def test_a_restored_clipped_adam_decays_as_before() -> None:
    """Making its optimizer again is no step."""
    x, y = data(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    guide = guides.make("normal", regression, x, y)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.5})
    svi = CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")
    whole = svi.run(3, ((x, y), {}))
    svi.run(7, ((x, y), {}), state=copy.deepcopy(whole.state))
    rates = {o.param_groups[0]["lr"] for o in optim.optim_objs.values()}
    assert rates == {0.05 * 0.5**7}


@pytest.mark.parametrize("name", ["Adam", "ClippedAdam"])
def test_coefficients_are_worked_out_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for many steps, also where the rate falls at every one; anew where it was changed."""
    made: list[int] = []
    for rule in ("_Adam", "_ClippedAdam"):
        kind = getattr(optimizers, rule)
        before = kind.coefficients

        def counted(self: Any, num_steps: int, before: Any = before) -> torch.Tensor:
            made.append(num_steps)
            return before(self, num_steps)

        monkeypatch.setattr(kind, "coefficients", counted)
    x, y = data()
    guide = guides.make("normal", regression, x, y)
    args = {"lr": 0.01, **({"lrd": 0.9} if name == "ClippedAdam" else {})}
    optim = getattr(pyro.optim, name)(args)
    svi = CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")
    for _ in range(20):
        svi.step(x, y)
    once = len(made)
    assert once <= 4
    for own in optim.optim_objs.values():
        own.param_groups[0]["lr"] *= 0.5
    svi.step(x, y)
    assert len(made) > once


def test_parameters_of_low_precision_are_updated_by_torch() -> None:
    parameter = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    assert "another precision" in str(rule_of(pyro.optim.Adam({}), parameter))


def test_the_score_of_a_draw_without_gradient_is_that_of_a_fixed_point() -> None:
    family = MultivariateNormal(2)
    lam = torch.randn(family.num_params, generator=torch.Generator().manual_seed(0))
    lam.requires_grad_()
    fn = family.distribution(lam)
    with torch.no_grad():
        value = fn.rsample()
    (found,) = torch.autograd.grad(fn.log_prob(value).sum(), lam)
    (expected,) = torch.autograd.grad(family.log_prob(lam, value.clone()).sum(), lam)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        drawn = fn.rsample()
        drawn += 1.0
        torch.testing.assert_close(fn.log_prob(drawn), family.log_prob(lam, drawn.clone()))


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("guide_name", ["normal", "multivariate_normal", "iterative_normal"])
def test_compiled_steps_are_those_of_the_program(guide_name: str, dtype: torch.dtype) -> None:
    """100 steps, several a call, and the few that remain."""
    build, args = pair(TWO_LEVELS, guide_name, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    check_equal(
        build, args, steps=100, tolerance=tolerance, mode="inductor", objective=RefinementELBO()
    )


# ------------------------------------------------------------------------------ restarts


def bimodal(x: torch.Tensor) -> None:
    """The sign of z is not identified: two optima of mean field."""
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.square(), 1.0), obs=x)


def restarted(**options: Any) -> tuple[CompiledSVI, torch.Tensor, Any]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    x = 4.0 + 0.1 * torch.randn(10)
    guide = guides.make("normal", bimodal, x)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(bimodal, guide, optim, Trace_ELBO(), mode="graph", num_restarts=6, **options)
    return svi, x, guide


def test_restarts_without_jitter_are_runs_of_the_program() -> None:
    """Each run makes the steps that a run of its own makes with its noise."""
    svi, x, guide = restarted(jitter=0.0)
    start = copy.deepcopy(guide.state_dict())
    pyro.set_rng_seed(3)
    svi.run(5, ((x,), {}))
    for restart in (0, 4):
        svi.select(restart)
        found = copy.deepcopy(guide.state_dict())
        with pyro.get_param_store().scope():
            other = guides.make("normal", bimodal, x)
            other.load_state_dict(start)
            params = list(other.parameters())
            optim = torch.optim.Adam(params, lr=0.05)
            pyro.set_rng_seed(3)
            noise = [torch.randn(6, 1) for _ in range(5)]
            for draw in noise:
                optim.zero_grad()
                # The same noise, by hand: u = loc + scale * noise.
                q = other.families["global"].distribution(other.schemes["global"].table)
                u, log_q = other.families["global"].push(
                    other.schemes["global"].table, draw[restart]
                )
                log_p = dist.Normal(0.0, 3.0).log_prob(u).sum()
                log_p = log_p + dist.Normal(u.square(), 1.0).log_prob(x).sum()
                (log_q - log_p).backward()
                optim.step()
                assert q.event_shape == (1,)
            for name, value in other.state_dict().items():
                torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10)


def test_restarts_find_both_optima_and_r_hat_tells() -> None:
    """Chains of runs that ended on two sides disagree; the best run is in the parameters."""
    arviz = pytest.importorskip("arviz")
    svi, x, guide = restarted(jitter=1.0)
    svi.run(400, ((x,), {}))
    values, scores = svi.chains(200, x)
    assert values["z"].shape == (6, 200)
    assert scores["log_p"].shape == (6, 200)
    signs = values["z"].mean(-1).sign()
    assert {-1.0, 1.0} == set(signs.tolist())
    assert (values["z"].mean(-1).abs() - 2.0).abs().max() < 0.1
    table = arviz.rhat(arviz.from_dict({"z": values["z"].numpy()}))
    assert float(table["z"]) > 1.3
    same = values["z"].abs()
    assert float(arviz.rhat(arviz.from_dict({"z": same.numpy()}))["z"]) < 1.1
    # What was drawn from left the best run in place.
    svi.select(svi.best)
    best = guide.locations(x)["z"]
    assert best.sign() == signs[svi.best]
    assert len(svi.restart_losses) == 400
    assert len(svi.restart_losses[0]) == 6


def test_restarts_refuse_what_they_cannot_do() -> None:
    x = torch.randn(5)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(branching, normal_guide, optim, Trace_ELBO(), mode="graph", num_restarts=3)
    with pytest.raises(RuntimeError, match=r"Restarts need a graph.*reads the value"):
        svi.run(3, ((x,), {}))
    fields = (regression, normal_guide, optim, Trace_ELBO())
    with pytest.raises(ValueError, match="num_restarts must be at least 1, an integer; got 0"):
        CompiledSVI(*fields, num_restarts=0)
    with pytest.raises(ValueError, match="Restarts are made in one graph"):
        CompiledSVI(*fields, num_restarts=2, mode="eager")
    with pytest.raises(ValueError, match="pass num_restarts="):
        CompiledSVI(*fields, mode="graph").chains(10, x)
    svi, x, _ = restarted()
    assert svi.run(0, ((x,), {})).losses == []
    with pyro.poutine.scale(scale=0.5), pytest.raises(RuntimeError, match="inside a handler"):
        svi.step(x)
    for size in range(2, 10):
        svi.step(x[:size])
    with pytest.raises(RuntimeError, match="8 kinds of calls were captured"):
        svi.step(x)


def test_svi_goes_on_from_the_best_restart() -> None:
    """The state of a run with restarts holds the parameters of the best of them."""
    svi, x, _ = restarted(jitter=1.0)
    result = svi.run(20, ((x,), {}))
    store = pyro.get_param_store()
    assert result.state["params"].keys() == set(store)
    for name, value in result.state["params"].items():
        torch.testing.assert_close(value, store[name].unconstrained().detach())


# ---------------------------------------------------------------- what a new user ran into


def lengths(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[:, : max(y.tolist())]


def kept(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


def counted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[: len(torch.unique(y))]


def chosen(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x[(x[:, 0] > 0).nonzero().flatten()]


@pytest.mark.parametrize("select", [lengths, kept, counted, chosen], ids=lambda f: f.__name__)
def test_shapes_that_depend_on_values_run_eagerly(select: Any) -> None:
    """Another batch of the same shape keeps other rows: the steps are those of SVI."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.tensor([1, 2, 3])), (-2 * x, torch.tensor([4, 6, 6]))]

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        rows = select(x, y)
        fn = dist.Normal(z, 1.0).expand(rows.shape).to_event(rows.dim())
        pyro.sample("x", fn, obs=rows)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        normal_guide(x)

    def losses(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            svi = cls(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
            pyro.set_rng_seed(0)
            return [svi.step(*batches[i // 4]) for i in range(8)]

    assert losses(CompiledSVI, mode="graph") == pytest.approx(losses(SVI), rel=1e-6)


def test_draws_outside_of_torch_run_eagerly_and_are_kept() -> None:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if random.random() < 0.9 else 50.0
        pyro.sample("x", dist.Normal(z, scale).expand([len(x)]).to_event(1), obs=x)

    def losses(cls: type, **options: Any) -> list[float]:
        with pyro.get_param_store().scope():
            optim = pyro.optim.Adam({"lr": 0.1})
            svi = cls(model, normal_guide, optim, Trace_ELBO(), **options)
            pyro.set_rng_seed(0)
            return [svi.step(torch.ones(5)) for _ in range(20)]

    assert losses(CompiledSVI, mode="graph") == losses(SVI)


def test_restarts_made_step_by_step_are_in_the_parameters() -> None:
    svi, x, guide = restarted(jitter=1.0)
    for _ in range(150):
        svi.step(x)
    assert abs(float(guide.locations(x)["z"].detach())) == pytest.approx(2.0, abs=0.2)


def test_data_that_are_no_numbers_move_nothing() -> None:
    x, y = data()
    guide = guides.make("normal", regression, x, y)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(regression, guide, optim, Trace_ELBO(), mode="graph")
    for _ in range(4):
        svi.step(x, y)
    before = copy.deepcopy(guide.state_dict())
    bad = y.clone()
    bad[0] = float("nan")
    with pytest.raises(ValueError, match="'y'"):
        svi.step(x, bad)
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name])


def test_running_statistics_move_as_the_eager_program_moves_them() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def statistics(cls: type, **options: Any) -> torch.Tensor:
        with pyro.get_param_store().scope():
            model = Normalized()

            def guide(x: torch.Tensor) -> None:
                loc = pyro.param("loc", torch.zeros(5, 2))
                with pyro.plate("data", len(x)):
                    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

            svi = cls(model, guide, pyro.optim.Adam({}), Trace_ELBO(), **options)
            pyro.set_rng_seed(0)
            for _ in range(6):
                svi.step(x)
            return model.norm.running_mean.clone()

    assert torch.equal(statistics(CompiledSVI, mode="graph"), statistics(SVI))

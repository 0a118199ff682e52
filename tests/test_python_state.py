"""What a program reads beside its arguments: a change of it is a change of the program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

import guides
from guides.capture.python_state import PythonState
from guides.capture.steps import compiler_missing
from guides.inference import SVI, CompiledSVI, PredictiveCoding
from guides.inference.given import Given
from guides.inference.precision import LearnedPrecision

MODES = [
    "graph",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(compiler_missing() is not None, reason="no C++ compiler"),
        ],
    ),
]
FACTOR = 1.0
TABLE = {"scale": 1.0}


class Settings:
    """Options kept in a class."""

    width = 1.0


class Program:
    """A program that is an object, and counts what it is not asked for."""

    shift = 0.0

    def __init__(self) -> None:
        self.loc: Any = 1.0
        self.weights = [1.0, 2.0]
        self.options = {"scale": 1.0}
        self.offset = torch.zeros(())
        self.epoch = 0

    def __call__(self, x: Tensor) -> None:
        loc = self.loc + self.weights[0] + self.offset + self.moved()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, self.options["scale"]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def moved(self) -> Any:
        return self.shift * self.factor

    @property
    def factor(self) -> float:
        return self.weights[1] * Settings.width

    def train(self) -> None:
        self.epoch += 1


def state_of(*programs: Any, moving: tuple[Tensor, ...] = ()) -> PythonState:
    state = PythonState(programs, moving)
    state.settle()
    assert state.is_current()
    return state


def _set(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return functools.partial(setattr, owner, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p, "loc", 2.0),
        lambda p: setattr(p, "loc", 1),
        lambda p: setattr(p, "loc", torch.ones(())),
        lambda p: p.weights.__setitem__(0, 3.0),
        lambda p: p.weights.append(3.0),
        lambda p: p.options.__setitem__("scale", 2.0),
        lambda p: p.options.__setitem__("new", 2.0),
        lambda p: p.offset.add_(1.0),
        lambda p: setattr(p, "offset", torch.zeros(())),
        lambda p: setattr(p, "shift", 1.0),
        lambda p: setattr(p, "moved", lambda: 0.0),
        lambda p: delattr(p, "loc"),
    ],
    ids=range(12),
)
@pytest.mark.parametrize("form", ["object", "method", "partial", "handler", "given"])
def test_changes_of_an_object_are_seen(change: Callable[[Any], Any], form: str) -> None:
    program = Program()
    outer: Any = {
        "object": program,
        "method": program.__call__,
        "partial": functools.partial(program),
        "handler": pyro.poutine.scale(program, scale=2.0),
        "given": Given(LearnedPrecision(program, {"x": "full"}, floor=0.1), gain={"x": 2.0}),
    }[form]
    state = state_of(outer)
    program.train()  # what the program does not read
    program.loc = float("1.0")  # an equal number
    program.weights[1] = float("2.0")
    assert state.is_current()
    change(program)
    assert not state.is_current()


def test_changes_of_closures_globals_defaults_and_classes_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loc, noise = 0.0, torch.ones(2)

    def inner() -> float:
        return loc * FACTOR + TABLE["scale"] + Settings.width

    def model(x: Tensor, scale: Any = noise) -> None:
        pyro.sample("z", dist.Normal(inner(), scale))

    state = state_of(model)
    loc = 1.0
    assert not state.is_current()
    state = state_of(model)
    noise.add_(1.0)
    assert not state.is_current()
    state = state_of(model)
    model.__defaults__ = (1.0,)
    assert not state.is_current()
    for owner, name in ((globals(), "FACTOR"), (TABLE, "scale")):
        state = state_of(model)
        monkeypatch.setitem(owner, name, 2.0)
        assert not state.is_current()
    state = state_of(model)
    monkeypatch.setattr(Settings, "width", 2.0)
    assert not state.is_current()
    state = state_of(model)
    model.beta = 1.0  # type: ignore[attr-defined]
    assert state.is_current()  # nothing read it when it was captured


def test_wrappers_are_looked_into() -> None:
    program = Program()
    given = Given(program, gain={"x": 2.0})
    state = state_of(given)
    given.gain["x"] = 3.0
    assert not state.is_current()
    precise = LearnedPrecision(program, {"x": "full"}, floor=0.1)
    state = state_of(precise)
    precise.covariance["x"] = torch.eye(1)
    assert not state.is_current()
    handler = pyro.poutine.scale(program, scale=2.0)
    state = state_of(handler)
    handler.args[0].scale = 3.0
    assert not state.is_current()


def test_priors_of_a_module_are_seen() -> None:
    class Module(PyroModule):
        def __init__(self) -> None:
            super().__init__("module")
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x

    module = Module()
    state = state_of(module)
    module.weight = PyroSample(dist.Normal(0.0, 2.0))
    assert not state.is_current()


def test_what_moves_anyway_is_left_out() -> None:
    """Parameters and arguments change without another program, and so do a program's own notes."""
    data, calls = torch.zeros(2), [0]

    def model(x: Tensor) -> None:
        calls[0] += 1
        pyro.sample("x", dist.Normal(data, 1.0), obs=x)

    state = PythonState([model], [data])
    pyro.poutine.trace(model)(torch.zeros(2))
    state.settle()
    assert state.is_current()
    data.add_(1.0)
    calls[0] += 1
    assert state.is_current()
    calls.append(1)
    assert not state.is_current()


def _svi(cls: type, program: Any, x: Tensor, **options: Any) -> Any:
    guide = guides.make("normal", program, x)
    return cls(program, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO(), **options)


def _losses(loop: Any, x: Tensor, change: Callable[[int], None]) -> list[float]:
    losses = []
    for step in range(6):
        change(step)
        pyro.set_rng_seed(step)
        losses.append(loop.step(x))
    return losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_steps_follow_an_attribute(mode: str, wrapped: bool) -> None:
    """Numbers, and tensors that are replaced or written into, between the steps of a loop."""
    x = torch.linspace(-1.0, 2.0, 4)
    found = {}
    for cls in (SVI, CompiledSVI):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            program = Program()

            def change(step: int, program: Program = program) -> None:
                if step == 3:
                    program.loc = 3.0
                if step == 4:
                    program.offset = torch.tensor(2.0)
                if step == 5:
                    program.offset.add_(5.0)

            outer = Given(program, gain={"x": 2.0}) if wrapped else program
            loop = _svi(cls, outer, x, **({} if cls is SVI else {"mode": mode}))
            found[cls] = _losses(loop, x, change)
    assert [kind.mode for kind in loop.compiled] == [mode]
    assert found[CompiledSVI] == pytest.approx(found[SVI], rel=1e-5)
    assert found[SVI][3] != pytest.approx(found[SVI][2], rel=1e-2)


class Module(PyroModule):
    """Submodules that may be replaced: an activation, one in a sequence, a frozen map."""

    def __init__(self) -> None:
        super().__init__()
        self.act: Any = torch.nn.ReLU()
        self.net = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Softplus())
        self.gain: Any = torch.nn.Linear(1, 1).requires_grad_(False).eval()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = self.gain(self.net(self.act(z + x)).unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def test_steps_follow_submodules_that_are_replaced() -> None:
    x = torch.linspace(-1.0, 2.0, 4)
    found = {}
    for cls in (SVI, CompiledSVI):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            program, other = Module().eval(), torch.nn.Linear(1, 1).eval()

            def change(step: int, program: Module = program, other: Any = other) -> None:
                if step == 3:
                    program.act = torch.nn.Tanh()
                if step == 4:
                    program.net[0] = torch.nn.Tanh()
                if step == 5:
                    program.gain = other.requires_grad_(False).eval()

            loop = _svi(cls, program, x, **({} if cls is SVI else {"mode": "graph"}))
            found[cls] = _losses(loop, x, change)
    assert [kind.mode for kind in loop.compiled] == ["graph"]
    assert found[CompiledSVI] == pytest.approx(found[SVI], rel=1e-5)


class Learning(Program):
    """The same with a parameter to learn."""

    def __call__(self, x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.tensor(1.0))
        loc = self.loc + self.offset
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(weight * z, 1.0), obs=x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", [None, Given, LearnedPrecision])
def test_steps_of_predictive_coding_follow_an_attribute(mode: str, wrapper: Any) -> None:
    x = torch.linspace(-1.0, 2.0, 4)
    found, loops = {}, {}
    for kind in ("eager", mode):
        with pyro.get_param_store().scope():
            program = Learning()
            outer: Any = program
            if wrapper is Given:
                outer = Given(program, gain={"x": 2.0})
            if wrapper is LearnedPrecision:
                outer = LearnedPrecision(program, {"x": "diagonal"}, floor=0.1)
            pc = PredictiveCoding(
                outer, pyro.optim.SGD({"lr": 1e-2}), num_steps=5, step_size=0.1, mode=kind
            )

            def change(step: int, program: Program = program, outer: Any = outer) -> None:
                if step == 3:
                    program.loc = 3.0
                if step == 4:
                    program.offset = torch.tensor(2.0)
                if step == 5 and wrapper is Given:
                    outer.gain["x"] = 4.0
                if step == 5 and wrapper is LearnedPrecision:
                    outer.covariance["x"] = torch.tensor(2.0)

            found[kind] = _losses(pc, x, change)
            loops[kind] = pc
    assert [made.mode for made in loops[mode].compiled] == [mode]
    assert found[mode] == pytest.approx(found["eager"], rel=1e-4)
    assert found[mode][3] != pytest.approx(found[mode][2], rel=1e-2)


def test_what_changes_at_every_step_ends_in_the_eager_program() -> None:
    x = torch.linspace(-1.0, 2.0, 4)
    with pyro.get_param_store().scope():
        program = Program()
        loop = _svi(CompiledSVI, program, x, mode="graph")
        for step in range(12):
            program.loc = float(step)
            loop.step(x)
    (kind,) = loop.compiled
    assert kind.mode == "eager"
    assert "an attribute" in str(kind.reason)

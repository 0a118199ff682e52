"""Captured predictive coding: the energies and weights of the loop that traces the program."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import zoo
from guides.capture import steps as capture_steps
from guides.inference import PredictiveCoding
from tests.model_cases import MODEL_CASES


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def train(build: Any, calls: list[Any], mode: str, steps: int = 5, **options: Any) -> Any:
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        model = build()
        optim = pyro.optim.Adam({"lr": 0.01})
        loop = PredictiveCoding(model, optim, num_steps=4, mode=mode, **options)
        pyro.set_rng_seed(1)
        losses = loop.run(steps, calls).losses
        store = pyro.get_param_store()
        return losses, [store[n].detach().clone() for n in sorted(store)], loop


def check(build: Any, calls: list[Any], mode: str = "graph", **options: Any) -> PredictiveCoding:
    losses, learned, eager = train(build, calls, "eager", **options)
    found, compiled, loop = train(build, calls, mode, **options)
    assert {kind.mode for kind in loop.compiled} == {mode}, loop.compiled
    assert found == pytest.approx(losses, rel=1e-10)
    for ours, theirs in zip(compiled, learned, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert loop.gradient_evaluations == eager.gradient_evaluations
    return loop


@pytest.mark.parametrize("parameterization", ["centered", "noncentered"])
@pytest.mark.parametrize("name", [n for n, c in MODEL_CASES.items() if c.latents])
def test_a_captured_step_is_that_of_the_loop(name: str, parameterization: str) -> None:
    """Relaxation, weight gradient and optimizer in one graph, over a refresh of the curvature."""
    case = MODEL_CASES[name]
    args = case.args(case.build())
    options = {"data_plate": case.plate, "parameterization": parameterization}
    if not any(p.requires_grad for p in case.build().parameters()):
        _, _, loop = train(case.build, [(args, {})], "graph", steps=3, **options)
        assert [kind.mode for kind in loop.compiled] == ["eager"]
        assert "no parameters to learn" in str(loop.compiled[0].reason)
        return
    check(case.build, [(args, {})], **options)


def test_a_fixed_step_size() -> None:
    case = MODEL_CASES["hierarchical_vae"]
    args = case.args(case.build())
    check(case.build, [(args, {})], step_size=0.01)


def regression(scale: torch.nn.Parameter) -> Any:
    def model(x: torch.Tensor, size: int | None = None, index: Any = None) -> None:
        pyro.module("scale", holder)
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * holder.scale, 1.0).to_event(1), obs=x)

    holder = torch.nn.Module()
    holder.scale = scale
    return model


@pytest.mark.parametrize("minibatch", [False, True])
def test_persistent_globals_and_curvatures_pass_through_the_graph(minibatch: bool) -> None:
    """Global latents keep their values from step to step, and the curvature is refreshed."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    def build() -> Any:
        return regression(torch.nn.Parameter(torch.tensor([1.5, 0.5])))

    calls: list[Any] = [((x,), {})]
    if minibatch:
        rows = torch.arange(8).split(4)
        calls = [((x[r],), {"size": 8, "index": r}) for r in rows]
    loop = check(build, calls, steps=53)
    assert set(loop.get_state()["globals"]) == {"loc"}


def test_a_guide_that_draws_the_start_draws_once_a_step() -> None:
    """A refresh of the curvature sees the start of its step, and draws no other."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def build() -> Any:
        holder = torch.nn.Module()
        holder.scale = torch.nn.Parameter(torch.tensor([1.5, 0.5]))

        def model(x: torch.Tensor) -> None:
            pyro.module("scale", holder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.StudentT(3.0, z * holder.scale, 1.0).to_event(1), obs=x)

        return model

    check(build, [((x,), {})], steps=53, guide=guide)


def test_settings_that_change_are_used() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    def losses(mode: str) -> list[float]:
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(1)
            model = regression(torch.nn.Parameter(torch.tensor([1.5, 0.5])))
            optim = pyro.optim.Adam({"lr": 0.1})
            loop = PredictiveCoding(model, optim, num_steps=1, mode=mode)
            found = [loop.step(x) for _ in range(3)]
            loop.num_steps = 6
            found += [loop.step(x) for _ in range(3)]
            loop.optim = pyro.optim.SGD({"lr": 0.01})
            return found + [loop.step(x) for _ in range(3)]

    assert losses("graph") == pytest.approx(losses("eager"), rel=1e-9)


def test_a_run_resumes() -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))

    def build() -> Any:
        return regression(torch.nn.Parameter(torch.tensor([1.5, 0.5])))

    whole = train(build, [((x,), {})], "graph", steps=8)[0]

    def fresh() -> PredictiveCoding:
        return PredictiveCoding(build(), pyro.optim.Adam({"lr": 0.01}), num_steps=4, mode="graph")

    with pyro.get_param_store().scope():
        pyro.set_rng_seed(1)
        state = copy.deepcopy(fresh().run(3, [((x,), {})]).state)
    with pyro.get_param_store().scope():
        rest = fresh().run(8, [((x,), {})], state=state).losses
    assert rest == pytest.approx(whole, rel=1e-9)


def test_what_cannot_be_captured_says_why() -> None:
    case = MODEL_CASES["hierarchical_vae"]
    args = case.args(case.build())
    _, _, loop = train(case.build, [(args, {})], "graph", tolerance=1e-3)
    assert loop.compiled[0].mode == "eager"
    assert "tolerance ends a relaxation" in str(loop.compiled[0].reason)
    with pytest.raises(ValueError, match="mode must be one of"):
        PredictiveCoding(zoo.make("vae", x_dim=4, z_dim=2), pyro.optim.Adam({}), mode="fast")


@pytest.mark.slow
@pytest.mark.skipif(capture_steps.compiler_missing() is not None, reason="no C++ compiler")
def test_a_compiled_step_is_that_of_the_loop() -> None:
    case = MODEL_CASES["hierarchical_vae"]
    args = case.args(case.build())
    check(case.build, [(args, {})], mode="inductor")

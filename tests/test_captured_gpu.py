"""Captured steps on another device: what must hold there, and what can be shown without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
from guides.capture.cuda_graphs import Recording, records
from guides.inference import SVI, CompiledSVI, PredictiveCoding
from tests.cases import GUIDE_CASES
from tests.model_cases import MODEL_CASES
from tests.second_device import Elsewhere
from tests.test_saving import chain

# ------------------------------------------------------------------------- without a device


@pytest.mark.parametrize("name", ["normal", "amortized_multivariate_normal", "amortized_planar"])
def test_captured_steps_follow_their_data(name: str) -> None:
    """Tables of coefficients, noise and states are made where parameters and data are."""
    x = torch.randn(5, 2)
    with Elsewhere():
        guide = guides.make(name, chain, x)
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = CompiledSVI(chain, guide, optim, Trace_ELBO(), mode="graph")
        losses = svi.run(4, ((x,), {})).losses
    assert [(kind.mode, kind.reason) for kind in svi.compiled] == [("graph", None)]
    assert len(set(losses)) == 4


class Recorder:
    """Records as a GPU does, on the CPU: the very tensors of one call, and copies into them."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(
        self, run: Callable[[], Sequence[Tensor]]
    ) -> tuple[Sequence[Tensor], Callable[[], None]]:
        self.recorded += 1
        outputs = run()

        def replay() -> None:
            self.replayed += 1
            for kept, value in zip(outputs, run(), strict=True):
                kept.copy_(value)

        return outputs, replay


def update(parameter: Tensor, state: Tensor, row: Tensor, noise: Tensor) -> list[Tensor]:
    """Something like a step: it reads and writes its first two inputs."""
    loss = ((parameter - row) ** 2).sum() + noise.sum()
    state.copy_(0.9 * state + parameter - row)
    parameter.copy_(parameter - 0.1 * state)
    return [loss]


def test_a_recording_makes_the_steps_of_what_was_recorded() -> None:
    recorder = Recorder()
    parameter, state = torch.tensor([1.0, 2.0]), torch.zeros(2)
    live, expected = (parameter.clone(), state.clone()), (parameter.clone(), state.clone())
    recording = Recording(update, 2, recorder)
    losses = []
    for step in range(4):
        given = (torch.full((2,), float(step)), torch.randn(2))
        (loss,) = recording(*live, *given)
        losses.append(loss)
        (own,) = update(*expected, *given)
        assert loss == own
        for ours, theirs in zip(live, expected, strict=True):
            assert torch.equal(ours, theirs)
    assert len({float(loss) for loss in losses}) == 4, "a replay wrote over an earlier result"
    assert (recorder.recorded, recorder.replayed) == (1, 4)


def test_a_parameter_that_moved_is_recorded_anew() -> None:
    recorder = Recorder()
    recording = Recording(update, 2, recorder)
    given = (torch.zeros(2), torch.zeros(2))
    first, second = torch.ones(2), torch.full((2,), 3.0)
    recording(first, torch.zeros(2), *given)
    kept = first.clone()
    recording(second, torch.zeros(2), *given)
    assert recorder.recorded == 2
    assert torch.equal(first, kept)
    assert torch.equal(second, torch.full((2,), 3.0 - 0.1 * 3.0))


def test_a_recorded_loop_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of CompiledSVI with recorded calls, recorder and compiler played by the CPU."""
    x = torch.linspace(-1.0, 1.0, 10).reshape(5, 2)
    recorder = Recorder()
    losses = {}
    for cls, options in ((SVI, {}), (CompiledSVI, {"mode": "graph", "steps_per_call": 3})):
        if cls is CompiledSVI:
            monkeypatch.setattr("guides.capture.steps.records", lambda *given: True)
            monkeypatch.setattr(
                "guides.capture.steps.Recording", lambda run, live: Recording(run, live, recorder)
            )
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            guide = guides.make("normal", chain, x)
            svi = cls(chain, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(), **options)
            pyro.set_rng_seed(1)
            losses[cls] = svi.run(14, ((x,), {})).losses
    assert recorder.recorded >= 1
    assert losses[CompiledSVI] == pytest.approx(losses[SVI], rel=1e-5)


def test_only_compiled_calls_of_one_gpu_are_recorded() -> None:
    here = [torch.zeros(2)]
    assert not records(here, "inductor", None)
    there = [torch.zeros(2, device="meta")]
    assert not records([*here, *there], "inductor", None)


# --------------------------------------------------------------------------------- with one

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _on_gpu(cls: type, name: str, mode: dict[str, Any]) -> tuple[list[float], list[Tensor], Any]:
    case = MODEL_CASES["vae"]
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(0)
        model = case.build().cuda()
        args = tuple(value.cuda() for value in case.args(model))
        guide = guides.make(name, model, *args, **GUIDE_CASES[name].options).cuda()
        svi = cls(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), **mode)
        pyro.set_rng_seed(1)
        losses = svi.run(100, (args, {})).losses
        learned = [p.detach().cpu() for m in (model, guide) for p in m.parameters()]
        assert {p.device.type for p in guide.parameters()} == {"cuda"}
        states = [torch.get_rng_state(), torch.cuda.get_rng_state()]
        return losses, [*learned, *states], svi


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["graph", "inductor"])
@pytest.mark.parametrize("name", ["normal", "amortized_normal", "amortized_multivariate_normal"])
def test_a_hundred_steps_on_a_gpu_are_those_of_the_program(name: str, mode: str) -> None:
    """Losses, parameters and random states; compiled calls are recorded and replayed."""
    losses, learned, _ = _on_gpu(SVI, name, {})
    found, compiled, svi = _on_gpu(CompiledSVI, name, {"mode": mode})
    assert [(kind.mode, kind.reason) for kind in svi.compiled] == [(mode, None)]
    assert found == pytest.approx(losses, rel=1e-5)
    for ours, theirs in zip(compiled, learned, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if mode == "inductor":
        (kind,) = svi._kinds.values()
        runs = [made._run for made in kind.made.values() if made.mode == "inductor"]
        assert runs
        assert all(isinstance(run, Recording) for run in runs)


@gpu
@needs_gpu
def test_restarts_on_a_gpu() -> None:
    x = torch.randn(5, 2, device="cuda")
    guide = guides.make("normal", chain, x)
    optim = pyro.optim.Adam({"lr": 0.02})
    svi = CompiledSVI(chain, guide, optim, Trace_ELBO(), num_restarts=3, jitter=0.0)
    svi.run(20, ((x,), {}))
    assert all(len(set(losses)) == 3 for losses in svi.restart_losses)


@gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["graph", "inductor"])
def test_predictive_coding_on_a_gpu(mode: str) -> None:
    case = MODEL_CASES["vae"]
    losses = {}
    for asked in ("eager", mode):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            model = case.build().cuda()
            args = tuple(value.cuda() for value in case.args(model))
            optim = pyro.optim.Adam({"lr": 0.01})
            loop = PredictiveCoding(model, optim, num_steps=5, mode=asked)
            losses[asked] = [loop.step(*args) for _ in range(10)]
    assert losses[mode] == pytest.approx(losses["eager"], rel=1e-4)
    assert [kind.mode for kind in loop.compiled] == [mode]

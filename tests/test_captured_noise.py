"""Noise of all steps of a call in one draw: the same steps for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import guides
from guides.capture import steps as capture_steps
from guides.inference import SVI, CompiledSVI
from tests.test_compiled_svi import bimodal, data, regression, train

PER_CALL = {"mode": "graph", "noise": "per_call", "steps_per_call": 4}


def wide(x: torch.Tensor) -> None:
    """Sixteen latents: torch draws normal numbers by sixteens, so the stream is the program's."""
    z = pyro.sample("z", dist.Normal(torch.zeros(16), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)


def build_wide() -> tuple[Any, Any]:
    return wide, guides.make("normal", wide, torch.linspace(-1.0, 1.0, 5))


def build_regression() -> tuple[Any, Any]:
    return regression, guides.make("normal", regression, *data())


def test_where_the_stream_is_the_same_the_steps_are_those_of_the_program() -> None:
    """Eager SVI beside calls of four steps with one draw each, and three steps that are left."""
    svi = check_wide(20, **PER_CALL)
    (kind,) = svi._kinds.values()
    made = kind.made[4, "graph"]
    assert [tuple(draw().shape) for draw in made._draws] == [(4, 16)]


def check_wide(steps: int, **options: Any) -> CompiledSVI:
    call = (torch.linspace(-1.0, 1.0, 5),)
    losses, learned, _ = train(SVI, build_wide, call, steps=steps)
    found, compiled, svi = train(CompiledSVI, build_wide, call, steps=steps, **options)
    assert found == pytest.approx(losses, rel=1e-5)
    for name, value in learned.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
    return svi


def stream(seed: int) -> Callable[..., torch.Tensor]:
    """A generator whose numbers do not depend on how many are drawn at once."""
    numbers = torch.randn(20_000, generator=torch.Generator().manual_seed(seed))
    place = [0]

    def randn(*size: Any, **options: Any) -> torch.Tensor:
        shape = size[0] if size and not isinstance(size[0], int) else size
        count = math.prod(shape)
        found = numbers[place[0] : place[0] + count].reshape(tuple(shape)).clone()
        place[0] += count
        return found.to(options.get("dtype") or torch.float32)

    return randn


def test_for_the_same_numbers_the_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sites of several shapes: each gets the numbers that it gets a draw at a time."""
    found = {}
    for noise in ("per_step", "per_call"):
        made = train_with(noise, monkeypatch, stream(3))
        found[noise] = made
    losses, learned = found["per_step"]
    assert len(set(losses)) == len(losses)
    assert found["per_call"][0] == pytest.approx(losses, rel=1e-6)
    for name, value in learned.items():
        torch.testing.assert_close(found["per_call"][1][name], value)


def train_with(
    noise: str, monkeypatch: pytest.MonkeyPatch, randn: Callable[..., torch.Tensor]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    with monkeypatch.context() as patch:
        # Draws are bound when steps are made, after the capture, which uses none of these.
        patch.setattr(torch, "randn", randn)
        losses, learned, svi = train(
            CompiledSVI, build_regression, data(), steps=13, **{**PER_CALL, "noise": noise}
        )
    assert [kind.mode for kind in svi.compiled] == ["graph"]
    return losses, learned


def test_restarts_have_noise_of_their_own() -> None:
    x = torch.linspace(-1.0, 1.0, 4)
    guide = guides.make("normal", bimodal, x)
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(bimodal, guide, optim, Trace_ELBO(), num_restarts=3, jitter=0.0, **PER_CALL)
    svi.run(9, ((x,), {}))
    assert all(len(set(losses)) == 3 for losses in svi.restart_losses)


def test_other_noise_is_drawn_as_the_program_does() -> None:
    """Draws that are not standard normal stay apart, and so equal the program's."""

    def gamma(x: torch.Tensor) -> None:
        scale = pyro.sample("scale", dist.Exponential(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    def guide(x: torch.Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(1.0), constraint=dist.constraints.positive)
        pyro.sample("scale", dist.Exponential(rate))

    call = (torch.linspace(-1.0, 1.0, 5),)
    losses, _, _ = train(SVI, lambda: (gamma, guide), call, steps=10)
    found, _, _ = train(CompiledSVI, lambda: (gamma, guide), call, steps=10, **PER_CALL)
    assert found == pytest.approx(losses, rel=1e-5)


def test_an_unknown_noise_is_refused() -> None:
    model, guide = build_wide()
    with pytest.raises(ValueError, match='noise must be "per_step" or "per_call", got \'fast\''):
        CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), noise="fast")


@pytest.mark.slow
@pytest.mark.skipif(capture_steps.compiler_missing() is not None, reason="no C++ compiler")
def test_compiled_steps_with_one_draw_a_call_are_those_of_the_program() -> None:
    svi = check_wide(40, mode="inductor", noise="per_call")
    assert [kind.mode for kind in svi.compiled] == ["inductor"]

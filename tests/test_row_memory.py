"""Rows without numbers: state is reused for the same data alone, never for another batch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import DivideAndConquer, LangevinPredictiveCoding, PredictiveCoding
from guides.inference.row_memory import RowMemory
from guides.inference.same_data import CallData
from guides.sites import Plate

pytestmark = pytest.mark.usefixtures("float64")

A, B = torch.tensor([4.0, -2.0, 1.0]), torch.tensor([-5.0, 3.0, 8.0])
OTHERS = "this one brings others, and starts afresh"


def model(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    weight = pyro.param("weight", lambda: torch.tensor(1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(weight * z, 0.5), obs=x)


def still() -> Any:
    return pyro.optim.SGD({"lr": 0.0})


def warm(**options: Any) -> PredictiveCoding:
    options = {"num_steps": 1, "step_size": 0.05, "warm_start": "last", **options}
    return PredictiveCoding(model, still(), **options)


def langevin(**options: Any) -> LangevinPredictiveCoding:
    options = {"num_steps": 0, "step_size": 0.01, "num_mixing": 0, "num_samples": 1, **options}
    return LangevinPredictiveCoding(model, still(), persistent=True, **options)


def particles(**options: Any) -> DivideAndConquer:
    return DivideAndConquer(model, still(), num_particles=2, anneal=2, **options)


LOOPS = pytest.mark.parametrize("build", [warm, langevin, particles])


@pytest.fixture(autouse=True)
def _store() -> Any:
    with pyro.get_param_store().scope():
        yield


def step(loop: Any, *args: Any, **kwargs: Any) -> float:
    pyro.set_rng_seed(3)
    return float(loop.step(*args, **kwargs))


def kept(loop: Any) -> RowMemory:
    if isinstance(loop, DivideAndConquer):
        return loop._memory.rows
    return loop.memory if isinstance(loop, LangevinPredictiveCoding) else loop._memory


@LOOPS
def test_the_same_tensors_are_the_same_rows(build: Callable[..., Any]) -> None:
    """A loop goes on with them, as it does where they have numbers, and does not elsewhere."""
    found, numbered = build(), build()
    index = torch.arange(3)
    for _ in range(3):
        assert step(found, A) == step(numbered, A, size=3, index=index)
    fresh = build()
    assert step(found, A) != step(fresh, A)


@LOOPS
def test_another_batch_of_that_size_starts_afresh_and_says_so(build: Callable[..., Any]) -> None:
    loop = build()
    for _ in range(3):
        step(loop, A)
    with pytest.warns(UserWarning, match=OTHERS):
        energy = step(loop, B)
    assert energy == step(build(), B)
    # Once is enough, and what was remembered of the first batch is forgotten.
    assert step(loop, A) == step(build(), A)


@LOOPS
def test_a_batch_that_was_written_into_is_another_one(build: Callable[..., Any]) -> None:
    loop, x = build(), A.clone()
    step(loop, x)
    x.copy_(B)
    with pytest.warns(UserWarning, match=OTHERS):
        assert step(loop, x) == step(build(), B)


@LOOPS
def test_looking_at_other_rows_uses_and_changes_nothing(build: Callable[..., Any]) -> None:
    loop = build()
    step(loop, A)
    before = {name: value.clone() for name, value in kept(loop).tensors.items()}
    pyro.set_rng_seed(3)
    found = loop.evaluate_loss(B)
    pyro.set_rng_seed(3)
    assert found == build().evaluate_loss(B)
    for name, value in kept(loop).tensors.items():
        assert torch.equal(value, before[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(loop, A)


@LOOPS
def test_rows_by_position_is_asked_for(build: Callable[..., Any]) -> None:
    found, numbered = build(rows_by_position=True), build()
    for x in (A, B, A):
        energy = step(found, x)
        assert energy == step(numbered, x, size=3, index=torch.arange(3))
    assert energy != step(build(), A)


@LOOPS
@pytest.mark.parametrize("values", [A, B])
def test_a_saved_state_knows_its_rows_by_their_values(
    build: Callable[..., Any], values: Tensor
) -> None:
    """Elsewhere the same data are other tensors."""
    loop = build()
    for _ in range(3):
        step(loop, A)
    file = io.BytesIO()
    torch.save(loop.get_state(), file)
    file.seek(0)
    other, x = build(), values.clone()
    other.set_state(torch.load(file, weights_only=False))
    if values is A:
        for _ in range(2):
            assert step(other, x) == step(loop, A)
        return
    with pytest.warns(UserWarning, match=OTHERS):
        assert step(other, x) == step(build(), B)


def test_numbers_outlive_steps_on_other_tensors() -> None:
    """What has numbers is found by them, whatever came between."""
    x = torch.cat([A, B])
    loop, alone = warm(), warm()
    first, second = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    step(loop, x[first], size=6, index=first)
    step(loop, x[second], size=6, index=second)
    step(alone, x[first], size=6, index=first)
    assert step(loop, x[first], size=6, index=first) == step(alone, x[first], size=6, index=first)


def test_a_captured_step_keeps_to_the_rule() -> None:
    def losses(mode: str) -> list[float]:
        loop = langevin(mode=mode)
        found = [step(loop, A), step(loop, A), step(loop, A)]
        with pytest.warns(UserWarning, match=OTHERS):
            found.append(step(loop, B))
        assert [kind.mode for kind in loop.compiled] == ([] if mode == "eager" else ["graph"])
        return [*found, step(loop, B)]

    assert losses("graph") == pytest.approx(losses("eager"), rel=1e-9)


def test_what_two_calls_have_in_common() -> None:
    x, mark = torch.zeros(2), object()
    first = CallData((x, 1), {"name": "a", "mark": mark})
    assert first.same(CallData((x, 1), {"name": "a", "mark": mark}))
    for args, kwargs in [
        ((x.clone(), 1), {"name": "a", "mark": mark}),
        ((x, 2), {"name": "a", "mark": mark}),
        ((x, 1.0), {"name": "a", "mark": mark}),
        ((x, 1), {"name": "b", "mark": mark}),
        ((x, 1), {"name": "a", "mark": object()}),
        ((x,), {"name": "a", "mark": mark}),
        ((x, 1), {"name": "a"}),
    ]:
        assert not first.same(CallData(args, kwargs))
    assert CallData((x, 1), {}).digest() == CallData((x.clone(), 1), {}).digest()
    assert CallData((x, 1), {}).digest() != CallData((x + 1, 1), {}).digest()
    assert CallData((x,), {}).digest() != CallData((x.float(),), {}).digest()
    assert CallData((mark,), {}).digest() is None
    changed = CallData((x,), {})
    x.add_(1.0)
    assert changed.digest() is None
    with torch.inference_mode():
        unknown = CallData((torch.zeros(2),), {})
    assert not unknown.same(unknown)


def test_a_call_without_data_is_always_the_same_one() -> None:
    """The rows of a program that takes no arguments are its own."""
    memory, plate = RowMemory(), Plate("data", -1, num_rows=2, size=2)
    memory.write(plate, {"z": torch.ones(2, 1)}, CallData((), {}))
    assert memory.read(plate, CallData((), {}))[1].all()
    assert not memory.read(plate, CallData((1,), {}))[1].any()

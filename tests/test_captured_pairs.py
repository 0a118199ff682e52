"""Every pair of the registries, captured: the steps of the program, to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pytest
import torch

from guides.capture import steps as capture_steps
from guides.inference import SVI, CompiledSVI
from guides.objectives import OBJECTIVES, RefinementELBO
from tests.captured_cases import (
    INELIGIBLE,
    NO_SUCH_OBJECTIVE,
    OBJECTIVE_CASES,
    OBJECTIVE_FAMILIES,
    OBJECTIVE_PAIRS,
    PAIRS,
)
from tests.cases import CORE_GUIDES, GUIDE_CASES, MODEL_CASES, TWO_LEVELS
from tests.test_compiled_svi import pair, train

ELIGIBLE = [names for names in PAIRS if names not in INELIGIBLE]
OTHER_MODELS = [names for names in ELIGIBLE if names[0] != TWO_LEVELS]
SINGLE = [
    names for names in ELIGIBLE if names[0] in (TWO_LEVELS, "vae") and names[1] in CORE_GUIDES
]


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def test_every_objective_of_the_registry_is_crossed() -> None:
    ours = {path.partition(":")[2] for path in OBJECTIVES.values()}
    assert ours <= set(OBJECTIVE_CASES), "add to tests/captured_cases.py OBJECTIVE_CASES"
    assert set(INELIGIBLE) <= set(PAIRS)
    assert set(NO_SUCH_OBJECTIVE) <= set(OBJECTIVE_PAIRS)


def _objective_has_a_graph(objective: str, family: str) -> None:
    """A graph, or the refusal of the objective itself."""
    name = f"amortized_{family}"
    case = MODEL_CASES[TWO_LEVELS]
    model = case.build()
    args = case.args(model)
    if objective == "ForwardKL":
        model.requires_grad_(False)  # its draws come from the model, which does not learn
    guide = GUIDE_CASES[name].build(name, model, *args)
    optim = pyro.optim.Adam({"lr": 0.01})
    loop = CompiledSVI(model, guide, optim, OBJECTIVE_CASES[objective](), mode="graph")
    refused = NO_SUCH_OBJECTIVE.get((objective, family))
    if refused is not None:
        with pytest.raises((ValueError, NotImplementedError), match=refused):
            loop.step(*args)
        return
    for _ in range(2):
        loop.step(*args)
    assert [(kind.mode, kind.reason) for kind in loop.compiled] == [("graph", None)]


@pytest.mark.parametrize("objective", OBJECTIVE_CASES)
def test_an_objective_has_a_graph(objective: str) -> None:
    _objective_has_a_graph(objective, "normal")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "family"), [pair for pair in OBJECTIVE_PAIRS if pair[1] != "normal"]
)
def test_an_objective_has_a_graph_with_every_kind_of_family(objective: str, family: str) -> None:
    assert family in OBJECTIVE_FAMILIES
    _objective_has_a_graph(objective, family)


def _nudged(build: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """A pair whose parameters are off by about one unit in the last place."""
    programs = build()
    with torch.no_grad():
        for program in programs:
            for parameter in program.parameters():
                parameter.mul_(1 + 2 * torch.finfo(parameter.dtype).eps)
    return programs


def _hundred_steps(model: str, guide: str, dtype: torch.dtype, mode: str = "graph") -> None:
    """Losses of every step, and the parameters after the last, within the tolerance.

    Some pairs make 1e-7 of one unit in the last place of their start within a hundred steps. A
    graph agrees with those, too, because its operations are those of the program and of the
    optimizer, one by one. A compiler fuses as it likes, and is allowed ten times what the program
    itself makes of such a unit.
    """
    build, args = pair(model, guide, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    options: dict[str, Any] = {"steps": 100, "objective": RefinementELBO()}
    losses, learned, _ = train(SVI, build, args, **options)
    moved, nudged_to = losses, learned
    if mode != "graph":
        moved, nudged_to, _ = train(SVI, lambda: _nudged(build), args, **options)
    found, compiled, svi = train(CompiledSVI, build, args, mode=mode, **options)
    assert [kind.mode for kind in svi.compiled] == [mode], svi.compiled
    size = max(1.0, max(map(abs, losses)))
    allowed = tolerance
    for step, (ours, theirs, other) in enumerate(zip(found, losses, moved, strict=True)):
        allowed = max(allowed, 10 * abs(other - theirs) / size)
        assert abs(ours - theirs) <= allowed * size, f"step {step} of {mode}"
    assert compiled.keys() == learned.keys()
    for name, value in learned.items():
        limit = max(tolerance, 10 * float((nudged_to[name] - value).abs().max()))
        torch.testing.assert_close(compiled[name], value, atol=limit, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "guide"), [names for names in OTHER_MODELS if names[1] == "amortized_normal"]
)
def test_hundred_steps_of_every_model_are_those_of_the_program(model: str, guide: str) -> None:
    """Float64 to 1e-10; the guides on two levels are in ``test_compiled_svi.py``."""
    _hundred_steps(model, guide, torch.float64)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("model", "guide"), [names for names in OTHER_MODELS if names[1] != "amortized_normal"]
)
def test_hundred_steps_of_every_pair_are_those_of_the_program(model: str, guide: str) -> None:
    """Float64 to 1e-10, the other guides on every model: most of an hour on one core."""
    _hundred_steps(model, guide, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "guide"), SINGLE)
def test_hundred_steps_agree_in_single_precision(model: str, guide: str) -> None:
    """Float32 to 1e-5."""
    _hundred_steps(model, guide, torch.float32)


REPRESENTATIVE = [
    ("linear_gaussian", "multivariate_normal"),
    ("eight_schools", "normal"),
    ("vae", "amortized_normal"),
    ("hierarchical_vae", "amortized_multivariate_normal"),
    ("vae", "amortized_planar"),
]


@pytest.mark.slow
@pytest.mark.skipif(capture_steps.compiler_missing() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("model", "guide"), REPRESENTATIVE)
def test_hundred_compiled_steps_are_those_of_the_program(
    model: str, guide: str, dtype: torch.dtype
) -> None:
    _hundred_steps(model, guide, dtype, mode="inductor")

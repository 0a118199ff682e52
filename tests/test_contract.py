"""One contract over the registries: every model x every guide x every loop, at tiny sizes."""

from __future__ import annotations

import importlib
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

import guides
from guides.draws import draw
from guides.families import FAMILIES
from guides.grid import cell_name, refusal
from guides.inference import LOOPS, laplace
from guides.inference.curvature import KinkError
from guides.inference.laplace_guide import IndefiniteHessianError
from guides.schemes import SCHEMES
from tests.captured_cases import INELIGIBLE, PAIRS
from tests.cases import (
    FAMILY_OPTIONS,
    GUIDE_CASES,
    LOOP_CASES,
    MODEL_CASES,
    SCHEME_OPTIONS,
)


@pytest.mark.parametrize(
    ("registry", "cases", "line"),
    [
        (FAMILIES, FAMILY_OPTIONS, "FAMILY_OPTIONS: {name!r}: {{}},"),
        (SCHEMES, SCHEME_OPTIONS, "SCHEME_OPTIONS: {name!r}: {{}},"),
        (guides.GUIDES, GUIDE_CASES, "GUIDE_CASES: {name!r}: GuideCase(),"),
        (LOOPS, LOOP_CASES, "LOOP_CASES: {name!r}: LoopCase(lambda model, guide, optim: ...),"),
    ],
    ids=["families", "schemes", "guides", "loops"],
)
def test_every_entry_has_a_row(registry: Any, cases: Any, line: str) -> None:
    missing = [line.format(name=name) for name in registry if name not in cases]
    assert not missing, "add to tests/cases.py " + "; ".join(missing)
    assert set(cases) == set(registry)


def test_the_grid_is_full() -> None:
    """Every family under every scheme has a name, which says which, or a reason for none."""
    for scheme in SCHEMES:
        for family in FAMILIES:
            name, reason = cell_name(scheme, family), refusal(scheme, family)
            if reason is None:
                assert guides.GUIDES[name] == (SCHEMES[scheme], FAMILIES[family])
            else:
                with pytest.raises(ValueError, match=f"There is no guide {name!r}"):
                    guides.make(name, lambda x: None, torch.zeros(2))
    assert set(SCHEME_OPTIONS) == set(SCHEMES), "a scheme needs a row in tests/cases.py"
    assert set(FAMILY_OPTIONS) == set(FAMILIES), "a family needs a row in tests/cases.py"


def test_laplace_refinement_is_refused_exactly_where_a_family_holds_no_gaussian() -> None:
    for name, path in FAMILIES.items():
        module, _, attribute = path.partition(":")
        family = getattr(importlib.import_module(module), attribute)(3)
        if refusal("laplace", name) is None:
            lam = family.of_gaussian(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))
            assert lam.shape == (2, family.num_params)
        elif name != "householder":  # holds one from two steps on
            with pytest.raises(NotImplementedError, match="no parameters for a given Gaussian"):
                family.of_gaussian(torch.zeros(2, 3), torch.eye(3).expand(2, 3, 3))


every_pair = pytest.mark.parametrize(
    ("model_name", "guide_name"), PAIRS, ids=[f"{model}-{guide}" for model, guide in PAIRS]
)


def pair(model_name: str, guide_name: str) -> tuple[Any, guides.Guide, tuple[torch.Tensor, ...]]:
    case = MODEL_CASES[model_name]
    model = case.build()
    args = case.args(model)
    return model, GUIDE_CASES[guide_name].build(guide_name, model, *args), args


@every_pair
def test_a_guide_covers_the_model(model_name: str, guide_name: str) -> None:
    model, guide, args = pair(model_name, guide_name)
    trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(*args)
    latents = {
        name
        for name, site in replayed.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not poutine.util.site_is_subsample(site)
    }
    assert set(guide.latents) == latents
    for name in latents:
        assert trace.nodes[name]["value"].shape == replayed.nodes[name]["value"].shape
        assert torch.equal(trace.nodes[name]["value"], replayed.nodes[name]["value"])
    assert torch.isfinite(replayed.log_prob_sum())
    assert type(guide).__name__ in repr(guide)
    assert set(guide.locations(*args)) == latents


@pytest.mark.parametrize(
    ("model_name", "guide_name", "loop_name"),
    [
        (model, guide, loop)
        for loop, case in LOOP_CASES.items()
        for model, guide in PAIRS
        if case.guides is None or guide in case.guides
    ],
)
def test_a_loop_runs_the_pair(model_name: str, guide_name: str, loop_name: str) -> None:
    """Step returns a float and moves what should move; evaluate_loss changes nothing."""
    model, guide, args = pair(model_name, guide_name)
    loop = LOOP_CASES[loop_name].build(model, guide, pyro.optim.Adam({"lr": 0.01}))
    modules = {"model": model, "guide": guide}
    before = {
        k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in modules.items()
    }
    if model_name in LOOP_CASES[loop_name].refused:
        refused = LOOP_CASES[loop_name].refused[model_name]
        with pytest.raises((ValueError, NotImplementedError), match=refused):
            loop.step(*args)
        return
    # A weight that multiplies a latent at exactly zero moves from the second step on.
    losses = [loop.step(*args) for _ in range(3)]
    assert all(isinstance(loss, float) for loss in losses)
    if loop_name == "compiled_svi":
        # A pair that falls back is listed in tests/captured_cases.py, and so in the documentation.
        reason = INELIGIBLE.get((model_name, guide_name))
        expected = ("graph", None) if reason is None else ("eager", reason)
        assert [(kind.mode, kind.reason) for kind in loop.compiled] == [expected]
    learns = LOOP_CASES[loop_name].learns
    for role, module in modules.items():
        moved = [n for n, p in module.named_parameters() if not torch.equal(p, before[role][n])]
        if role in learns:
            assert moved == [n for n, _ in module.named_parameters()], f"{role} stands still"
        else:
            assert not moved
    after = {k: {n: v.clone() for n, v in m.state_dict().items()} for k, m in modules.items()}
    assert isinstance(loop.evaluate_loss(*args), float)
    for role, module in modules.items():
        assert all(torch.equal(v, after[role][n]) for n, v in module.state_dict().items())
        assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@every_pair
def test_draws_and_densities_agree_with_pyros_trace(model_name: str, guide_name: str) -> None:
    model, guide, args = pair(model_name, guide_name)
    if not guide.has_density:
        with pytest.raises(ValueError, match="point mass"):
            draw(model, guide, args, num_samples=2)
        values = relaxed(model, args)
        if not MODEL_CASES[model_name].mode:
            with pytest.raises(
                (IndefiniteHessianError, KinkError), match=r"not positive definite|has a kink"
            ):
                laplace(model, values, args)
            return
        guide = laplace(model, values, args)
    draws = draw(model, guide, args, num_samples=3)
    for s in range(3):
        values = {name: value[s] for name, value in draws.values.items()}
        with torch.no_grad():
            trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
            expected = float(trace.log_prob_sum())
        log_p = draws.log_p_rows[s].sum() + draws.log_p_global[s]
        assert float(log_p) == pytest.approx(expected, rel=1e-4, abs=1e-3)


def relaxed(model: Any, args: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    pc = guides.inference.PredictiveCoding(model, pyro.optim.Adam({}), num_steps=100)
    return pc.infer(*args)


@pytest.mark.parametrize(
    ("model_name", "guide_name"), [pair for pair in PAIRS if MODEL_CASES[pair[0]].plate == "data"]
)
def test_minibatches_and_ragged_batches(model_name: str, guide_name: str) -> None:
    model, guide, (x,) = pair(model_name, guide_name)
    loop = LOOP_CASES["svi"].build(model, guide, pyro.optim.Adam({"lr": 0.01}))
    for args, kwargs in guides.rows.minibatches(model, (x,), batch_size=4):
        assert kwargs["size"] == 6
        assert isinstance(loop.step(*args, **kwargs), float)

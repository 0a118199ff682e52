"""One contract over the registries: every model x every guide x every loop, at tiny sizes."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from pyro import poutine

import guides
from guides.draws import draw
from guides.families import FAMILIES
from guides.inference import LOOPS, laplace
from guides.schemes import SCHEMES
from tests.cases import GUIDE_CASES, LOOP_CASES, MODEL_CASES


@pytest.mark.parametrize(
    ("registry", "cases", "line"),
    [
        (guides.GUIDES, GUIDE_CASES, "GUIDE_CASES: {name!r}: GuideCase(),"),
        (LOOPS, LOOP_CASES, "LOOP_CASES: {name!r}: LoopCase(lambda model, guide, optim: ...),"),
    ],
    ids=["guides", "loops"],
)
def test_every_entry_has_a_row(registry: Any, cases: Any, line: str) -> None:
    missing = [line.format(name=name) for name in registry if name not in cases]
    assert not missing, "add to tests/cases.py " + "; ".join(missing)
    assert set(cases) == set(registry)


def test_the_grid_is_full() -> None:
    """Every family under every scheme has a name, and the name says which."""
    names = {
        family if scheme == "local" else f"{scheme}_{family}"
        for scheme in SCHEMES
        for family in FAMILIES
    }
    assert names == set(guides.GUIDES)
    for name, (scheme, family) in guides.GUIDES.items():
        key = next(k for k, path in FAMILIES.items() if path == family)
        assert name.endswith(key)
        assert name.startswith("amortized_") == (scheme == SCHEMES["amortized"])


def pair(model_name: str, guide_name: str) -> tuple[Any, guides.Guide, tuple[torch.Tensor, ...]]:
    case = MODEL_CASES[model_name]
    model = case.build()
    args = case.args(model)
    return model, GUIDE_CASES[guide_name].build(guide_name, model, *args), args


@pytest.mark.parametrize("guide_name", GUIDE_CASES)
@pytest.mark.parametrize("model_name", MODEL_CASES)
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


@pytest.mark.parametrize("loop_name", LOOP_CASES)
@pytest.mark.parametrize("guide_name", GUIDE_CASES)
@pytest.mark.parametrize("model_name", MODEL_CASES)
def test_a_loop_runs_the_pair(model_name: str, guide_name: str, loop_name: str) -> None:
    """Step returns a float and moves what should move; evaluate_loss changes nothing."""
    model, guide, args = pair(model_name, guide_name)
    loop = LOOP_CASES[loop_name].build(model, guide, pyro.optim.Adam({"lr": 0.01}))
    modules = {"model": model, "guide": guide}
    before = {
        k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in modules.items()
    }
    # A weight that multiplies a latent at exactly zero moves from the second step on.
    losses = [loop.step(*args) for _ in range(3)]
    assert all(isinstance(loss, float) for loss in losses)
    learns = {"svi": ("model", "guide"), "predictive_coding": ("model",)}[loop_name]
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


@pytest.mark.parametrize("guide_name", GUIDE_CASES)
@pytest.mark.parametrize("model_name", MODEL_CASES)
def test_draws_and_densities_agree_with_pyros_trace(model_name: str, guide_name: str) -> None:
    model, guide, args = pair(model_name, guide_name)
    if not guide.has_density:
        with pytest.raises(ValueError, match="point mass"):
            draw(model, guide, args, num_samples=2)
        guide = laplace(model, relaxed(model, args), args)
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


@pytest.mark.parametrize("guide_name", GUIDE_CASES)
@pytest.mark.parametrize("model_name", [n for n in MODEL_CASES if MODEL_CASES[n].plate == "data"])
def test_minibatches_and_ragged_batches(model_name: str, guide_name: str) -> None:
    model, guide, (x,) = pair(model_name, guide_name)
    loop = LOOP_CASES["svi"].build(model, guide, pyro.optim.Adam({"lr": 0.01}))
    for args, kwargs in guides.rows.minibatches(model, (x,), batch_size=4):
        assert kwargs["size"] == 6
        assert isinstance(loop.step(*args, **kwargs), float)

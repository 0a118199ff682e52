"""Everything stays on the device of the model and its data, and in their dtype."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
from guides.diagnostics import elbo
from guides.draws import draw
from guides.inference import SVI, PredictiveCoding, laplace
from tests.cases import GUIDE_CASES
from tests.model_cases import MODEL_CASES
from tests.second_device import Elsewhere, is_marked
from tests.test_saving import chain


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_tensor_made_without_a_device_is_found() -> None:
    x, index = torch.randn(3, 2), torch.tensor([2, 0])
    with Elsewhere():
        for wrong in (
            lambda: x + torch.ones(2),
            lambda: x @ torch.eye(2).double().float(),
            lambda: torch.where(torch.zeros(2) > 0, x, 0.0),
            lambda: torch.func.vmap(lambda row: row * torch.arange(2).cumsum(0))(x),
            lambda: torch.func.grad(lambda v: (v * torch.rand(3, 2)).sum())(x),
            lambda: torch.cat([x, torch.zeros(1, 2).reshape(1, 2)]),
        ):
            with pytest.raises(RuntimeError, match="made without a device"):
                wrong()
        for right in (
            lambda: x + torch.ones(2, device=x.device),
            lambda: x @ torch.eye(2).to(x),
            lambda: x * torch.tensor(2.0) + x.new_zeros(2),
            lambda: x[torch.arange(2)] + x[index] + torch.zeros_like(x[:2]),
            lambda: torch.cat([torch.zeros(2), torch.ones(3)]).to(x.device) + x.sum(),
        ):
            assert not is_marked(right())
        assert is_marked(torch.zeros(2).double() + 1)


@pytest.mark.parametrize("name", guides.GUIDES)
def test_every_guide_follows_its_data(name: str) -> None:
    x = torch.randn(5, 2)
    calls = [((x,), {}), *guides.rows.minibatches(chain, (x,), batch_size=3)]
    with Elsewhere():
        guide = guides.make(name, chain, x)
        assert not [n for n, t in guide.state_dict().items() if is_marked(t)]
        for args, kwargs in calls:
            loss = Trace_ELBO().loss_and_grads(chain, guide, *args, **kwargs)
            assert isinstance(loss, float)
        assert not any(is_marked(v) for v in guide.locations(x).values())
        if guide.has_density:
            draws = draw(chain, guide, (x,), num_samples=2)
            assert not any(is_marked(v) for v in draws.values.values())
        guide.to(x.device)


@pytest.mark.parametrize("name", ["normal", "amortized_normal"])
@pytest.mark.parametrize("model_name", [n for n, c in MODEL_CASES.items() if c.latents])
def test_models_follow_theirs(model_name: str, name: str) -> None:
    case = MODEL_CASES[model_name]
    model = case.build()
    args = case.args(model)
    rows = torch.tensor([2, 0])
    part = {"size": len(args[0]), "index": rows}
    with Elsewhere():
        guide = guides.make(name, model, *args, **GUIDE_CASES[name].options)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        assert isinstance(svi.step(*args), float)
        assert isinstance(svi.evaluate_loss(*(arg[rows] for arg in args), **part), float)
        elbo(model, guide, *args, num_samples=2)
        if guide.has_density:
            guides.diagnostics.pareto_khat(model, guide, *args, num_samples=30)


def test_laplace_posteriors_and_predictive_coding_follow_theirs() -> None:
    x = torch.randn(5, 2)
    rows = torch.tensor([3, 1])
    with Elsewhere():
        loop = PredictiveCoding(chain, pyro.optim.Adam({"lr": 0.01}), num_steps=50)
        loop.step(x)
        guide = laplace(chain, loop.infer(x), (x,))
        assert not any(is_marked(v) for v in guide(x[rows], size=5, index=rows).values())
        assert isinstance(loop.posterior(x)(x)["low"], Tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", guides.GUIDES)
def test_every_guide_keeps_the_dtype_of_the_program(name: str, dtype: torch.dtype) -> None:
    """Under the other default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if dtype is torch.float64 else torch.float64)
    try:
        options = GUIDE_CASES[name].options if name in GUIDE_CASES else {}
        x = torch.randn(5, 2, dtype=dtype)
        guide = guides.make(name, chain, x, **options)
        assert {t.dtype for t in tensors_of(guide) if t.is_floating_point()} <= {dtype}
        assert {v.dtype for v in guide(x).values()} == {dtype}
        assert {v.dtype for v in guide.parameters_of(x).values()} == {dtype}
        assert isinstance(Trace_ELBO().loss_and_grads(chain, guide, x), float)
    finally:
        torch.set_default_dtype(before)

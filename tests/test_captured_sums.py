"""Sums of products of a graph become one product, with the same numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.capture.graph import share_equal_terms, trace
from guides.capture.sums import join_products
from guides.inference import CompiledSVI

pytestmark = pytest.mark.usefixtures("float64")


def gradients(layers: nn.ModuleList, x: Tensor, steps: int) -> Any:
    weights = list(layers.parameters())

    def function(x: Tensor, *weights: Tensor) -> list[Tensor]:
        names = [name for name, _ in layers.named_parameters()]
        given = dict(zip(names, weights, strict=True))

        def apply(number: int, h: Tensor) -> Tensor:
            return nn.functional.linear(h, given[f"{number}.weight"], given[f"{number}.bias"])

        with torch.enable_grad():
            h, total = x, torch.zeros(())
            for _ in range(steps):
                h = torch.tanh(apply(0, h))
                total = total + apply(1, h).square().sum()
            return [total.detach(), *torch.autograd.grad(total, weights)]

    return function, [x, *(w.detach().requires_grad_() for w in weights)]


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_gradient_of_a_shared_weight_is_one_product(steps: int, rows: int) -> None:
    layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 3)])
    function, inputs = gradients(layers, torch.randn(rows, 5), steps)
    module = trace(function, inputs)
    share_equal_terms(module.graph)
    before = module(*inputs)
    assert join_products(module.graph) == 0  # so small that nothing is saved
    replaced = join_products(module.graph, numbers=0)
    module.graph.lint()
    module.recompile()
    for ours, theirs in zip(module(*inputs), before, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-12
    shapes = Counter(
        tuple(node.meta["val"].shape)
        for node in module.graph.nodes
        if node.target is torch.ops.aten.mm.default
    )
    kept = {1: 0, 2: 0}.get(steps, 4)  # two weights and two biases
    assert replaced == kept
    if replaced:
        assert shapes[(5, 5)] + shapes[(3, 5)] + shapes[(5, 3)] == 2


def test_what_is_read_elsewhere_and_what_has_another_shape_stays() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        terms = [a[i].t() @ b[i] for i in range(4)]
        partial = terms[0] + terms[1]
        return [partial + terms[2] + terms[3], partial, terms[0].sum(0) + terms[1]]

    inputs = [torch.randn(4, 3, 2), torch.randn(4, 3, 5)]
    module = trace(function, inputs)
    share_equal_terms(module.graph)
    before = module(*inputs)
    assert join_products(module.graph, numbers=0) == 0
    module.recompile()
    for ours, theirs in zip(module(*inputs), before, strict=True):
        assert torch.equal(ours, theirs)


def test_terms_that_are_no_products_are_added() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        total = c
        for i in range(4):
            total = total + a[i].t() @ b[i] + c.square()
        return [total]

    inputs = [torch.randn(4, 3, 2), torch.randn(4, 3, 5), torch.randn(2, 5)]
    module = trace(function, inputs)
    (before,) = module(*inputs)
    assert join_products(module.graph, numbers=0) == 1
    module.graph.lint()
    module.recompile()
    assert (module(*inputs)[0] - before).abs().max() < 1e-12
    products = [n for n in module.graph.nodes if n.target is torch.ops.aten.mm.default]
    assert len(products) == 1


@pytest.mark.parametrize("name", ["filtering_normal", "smoothing_normal"])
@pytest.mark.parametrize("numbers", [0, 100_000])
def test_a_ragged_batch_has_a_graph_that_learns_what_eager_steps_learn(
    monkeypatch: pytest.MonkeyPatch, name: str, numbers: int
) -> None:
    joined: list[int] = []

    def join(graph: Any) -> int:
        joined.append(join_products(graph, numbers=numbers))
        return joined[-1]

    monkeypatch.setattr("guides.capture.steps.join_products", join)
    x = (torch.rand(4, 6, 5) < 0.3).double()
    lengths = torch.tensor([6, 1, 3, 4])
    losses = {}
    for loop in (SVI, CompiledSVI):
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model = zoo.DeepMarkov(5, z_dim=3, emission=4, transition=4)
            guide = guides.make(name, model, x, lengths, recurrent=4, combiner="average")
            options = {} if loop is SVI else {"mode": "graph"}
            optim = pyro.optim.ClippedAdam({"lr": 0.01})
            svi = loop(model, guide, optim, Trace_ELBO(), **options)
            pyro.set_rng_seed(1)
            losses[loop] = [svi.step(x, lengths) for _ in range(5)]
    assert [kind.mode for kind in svi.compiled] == ["graph"]
    assert losses[SVI] == pytest.approx(losses[CompiledSVI], rel=1e-9)
    assert bool(joined[0]) == (numbers == 0)

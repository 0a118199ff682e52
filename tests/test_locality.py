"""What is local: gradients of a level, given samples (C6), and what an encoder is told (C7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.inference import PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")

Levels = list[tuple[str, nn.Module, Callable[[dict[str, Tensor]], Any]]]
"""Of every level: its site, the modules that are its own, and its density given values above."""


def hierarchy(skip: bool) -> tuple[Any, list[str], Callable[[dict[str, Tensor]], Levels]]:
    model = zoo.HierarchicalVAE(
        4,
        (3, 2, 2),
        hidden=(5,),
        skip=skip,
        likelihood="gaussian",
        likelihood_covariance="cholesky",
    )
    names = ["z3", "z2", "z1", "x"]

    def levels(values: dict[str, Tensor]) -> Levels:
        def above(number: int) -> Tensor:
            shown = names[:number] if skip else names[number - 1 : number]
            return torch.cat([values[name] for name in shown], -1)

        second, first = model.levels
        last = nn.ModuleList([model.network, model.likelihood])
        return [
            ("z2", second, lambda v: second(above(1))),
            ("z1", first, lambda v: first(above(2))),
            ("x", last, lambda v: model.likelihood(model.network(above(3)))),
        ]

    return model, names, levels


def chain() -> tuple[Any, list[str], Callable[[dict[str, Tensor]], Levels]]:
    model = zoo.LinearGaussian((2, 3, 4))

    def levels(values: dict[str, Tensor]) -> Levels:
        top, middle, last = model.levels
        return [
            ("z2", top, lambda v: top(None)),
            ("z1", middle, lambda v: middle(values["z2"])),
            ("x", last, lambda v: last(values["z1"])),
        ]

    return model, ["z2", "z1", "x"], levels


BUILDS = {
    "levels": lambda: hierarchy(skip=False),
    "levels, skip connections": lambda: hierarchy(skip=True),
    "linear chain": chain,
}


def local_gradients(levels: Levels, values: dict[str, Tensor]) -> dict[nn.Parameter, Tensor]:
    """Of every level's own term alone, no gradient passed between levels."""
    found: dict[nn.Parameter, Tensor] = {}
    for site, module, density in levels:
        own = list(module.parameters())
        term = density(values).log_prob(values[site]).sum()
        for parameter, gradient in zip(own, torch.autograd.grad(term, own), strict=True):
            assert parameter not in found  # no parameter serves two levels
            found[parameter] = gradient
    return found


@pytest.mark.parametrize("name", BUILDS)
def test_given_samples_the_gradients_of_a_level_are_local(name: str) -> None:
    """C6: of the bound, and of predictive coding at the relaxed state."""
    model, names, levels = BUILDS[name]()
    x = model(size=6).detach()
    guide = guides.make("amortized_normal", model, x, hidden=(4,))
    pyro.set_rng_seed(1)
    Trace_ELBO().loss_and_grads(model, guide, x)
    pyro.set_rng_seed(1)
    sampled = poutine.trace(guide).get_trace(x)
    values = {"x": x}
    replayed = poutine.trace(poutine.replay(model, sampled)).get_trace(x)
    values |= {site: replayed.nodes[site]["value"].detach() for site in names[:-1]}
    local = local_gradients(levels(values), values)
    assert set(local) == set(model.parameters())
    for parameter, gradient in local.items():
        assert parameter.grad is not None
        assert (parameter.grad + gradient).abs().max() < 1e-10
        parameter.grad = None
    # Predictive coding: one update of size 1 is minus the gradient.
    before = {parameter: parameter.detach().clone() for parameter in local}
    optim = pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 1.0})
    loop = PredictiveCoding(model, optim, num_steps=20, solver="newton")
    relaxed = loop.infer(x)
    values = {"x": x, **{site: relaxed[site].detach() for site in names[:-1]}}
    local = local_gradients(levels(values), values)
    loop.step(x)
    for parameter, gradient in local.items():
        assert (parameter.detach() - before[parameter] - gradient).abs().max() < 1e-8


@pytest.mark.parametrize("name", BUILDS)
def test_a_level_learns_from_its_own_values_and_those_above(name: str) -> None:
    """Other values below change nothing; where samples carry gradients, they are not local."""
    model, names, levels = BUILDS[name]()
    values = {site: fn.detach() for site, fn in draw(model, names).items()}
    others = {site: fn.detach() for site, fn in draw(model, names).items()}
    for number, (site, module, _) in enumerate(levels(values)):
        below = names[names.index(site) + 1 :]
        changed = {**values, **{other: others[other] for other in below}}
        one = local_gradients(levels(values)[number : number + 1], values)
        other = local_gradients(levels(changed)[number : number + 1], changed)
        assert all(torch.equal(one[parameter], other[parameter]) for parameter in one)
        assert any(gradient.abs().max() > 1e-6 for gradient in one.values())
        if site == "x":
            continue
        attached = {**values, site: levels(values)[number][2](values).rsample()}
        through = levels(attached)[number + 1]
        term = through[2](attached).log_prob(values[through[0]]).sum()
        carried = torch.autograd.grad(term, list(module.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().max() > 1e-6 for g in carried)


def draw(model: Any, names: list[str]) -> dict[str, Tensor]:
    trace = poutine.trace(model).get_trace(size=6)
    return {name: trace.nodes[name]["value"] for name in names}


def reading_errors(model: Any, x: Tensor) -> tuple[Any, list[Tensor]]:
    """An iterative guide that reads errors alone, and what its network is given, call by call."""
    guide = guides.make(
        "iterative_normal",
        model,
        x,
        encodings=("errors",),
        update="highway",
        num_iterations=1,
        network=(8,),
    )
    seen: list[Tensor] = []
    guide.schemes["data"].network.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    return guide, seen


def test_errors_from_below_and_of_the_own_level_enter_the_encoder_apart() -> None:
    """C7: they are inputs side by side, and each is precision-weighted (errata of section 1.4)."""
    model = zoo.LinearGaussian((3, 5), ("diagonal", "diagonal"))
    x = model(size=4).detach()
    guide, seen = reading_errors(model, x)

    def inputs(data: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        pyro.set_rng_seed(0)
        guide(data)
        (found,) = seen
        assert found.shape == (4, 3 + 5)
        return found[:, :3], found[:, 3:]

    own, below = inputs(x)
    moved = x.clone()
    moved[:, 2] += 0.5
    own_moved, below_moved = inputs(moved)
    assert torch.equal(own, own_moved)
    assert ((below != below_moved).any(0) == torch.arange(5).eq(2)).all()
    with torch.no_grad():
        # What the level above predicts: the start of the relaxation stays where it was.
        model.levels[0].log_scale[1] += 0.3
    own_scaled, below_scaled = inputs(x)
    assert (own != own_scaled).any(0).tolist() == [False, True, False]
    assert torch.equal(below, below_scaled)


def test_of_two_levels_the_upper_one_reads_the_errors_of_the_lower() -> None:
    """C7: for z2 the error from below is that of z1; z1 has its own and that of the data."""
    model = zoo.LinearGaussian((2, 3, 5), "diagonal")
    x = model(size=4).detach()
    guide, seen = reading_errors(model, x)
    scheme = guide.schemes["data"]
    with torch.no_grad():
        scheme.offset[:5] += torch.randn(5)  # away from the mean of the prior, where errors vanish
    before = None
    moves: list[tuple[Callable[[], Any], str]] = [
        (lambda: None, ""),
        (lambda: x[:, 3].add_(0.5), "x"),
        (lambda: scheme.offset[1].add_(0.5), "z2 z1"),
        (lambda: scheme.offset[2].add_(0.5), "z1 x"),
        (lambda: model.levels[0].log_scale[0].add_(0.3), "z2"),
        (lambda: model.levels[1].log_scale[2].add_(0.3), "z1"),
        (lambda: model.levels[2].log_scale[4].add_(0.3), "x"),
    ]
    for move, expected in moves:
        with torch.no_grad():
            move()
        seen.clear()
        pyro.set_rng_seed(0)
        guide(x)
        after = dict(zip(("z2", "z1", "x"), seen[0].split((2, 3, 5), -1), strict=True))
        if before is not None:
            moved = [site for site in after if not torch.equal(after[site], before[site])]
            assert moved == expected.split()
        before = after
    # Two draws are antithetic, and errors linear in them: their means are errors at the centers.
    top, middle, last = model.levels
    z2 = top.loc(None) + scheme.offset[:2]
    z1 = middle.loc(top.loc(None)) + scheme.offset[2:5]
    errors = {
        "z2": (z2 - top.loc(None)) / top.scale**2,
        "z1": (z1 - middle.loc(z2)) / middle.scale**2,
        "x": (x - last.loc(z1)) / last.scale**2,
    }
    assert before is not None
    for site, error in errors.items():
        assert torch.allclose(before[site], error.sign() * error.abs().log1p())

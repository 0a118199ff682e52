"""Nudged predictive coding against backpropagation (T11), and its refusals."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides.inference import NudgedPredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")


class Net(pyro.nn.PyroModule):
    """x -> h -> z -> y: a network whose output z is free, with data y beside it."""

    def __init__(self) -> None:
        super().__init__("net")
        self.first = pyro.nn.PyroModule[nn.Linear](3, 4)
        self.second = pyro.nn.PyroModule[nn.Linear](4, 2)

    def forward(self, x, y, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            h = pyro.sample("h", dist.Normal(self.first(x), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(self.second(torch.tanh(h)), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)


def gradients(sign: str, beta: float, scale: bool = False) -> tuple[list, list]:
    """Of one step, and of backpropagation of half the squared error."""
    torch.manual_seed(0)
    net, x, y = Net(), torch.randn(5, 3), torch.randn(5, 2)
    output = net.second(torch.tanh(net.first(x)))
    factor = 20 / 5 if scale else 1.0
    exact = torch.autograd.grad(factor * 0.5 * (y - output).square().sum(), list(net.parameters()))
    before = [p.detach().clone() for p in net.parameters()]
    loop = NudgedPredictiveCoding(
        net, pyro.optim.SGD({"lr": 1.0}), nudge="y", beta=beta, sign=sign, solver="newton",
        num_steps=12,
    )  # fmt: skip
    options = {"size": 20, "index": torch.arange(5)} if scale else {}
    with pyro.get_param_store().scope():
        loop.step(x, y, **options)
    moved = [b - p.detach() for b, p in zip(before, net.parameters(), strict=True)]
    return moved, list(exact)


def error(sign: str, beta: float) -> float:
    found, exact = (torch.cat([g.flatten() for g in part]) for part in gradients(sign, beta))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize(("sign", "order"), [("positive", 1), ("negative", 1), ("centered", 2)])
def test_the_error_against_backpropagation_falls_with_beta(sign: str, order: int) -> None:
    """T11: tenfold a decade of beta, a hundredfold for centered nudging."""
    errors = [error(sign, beta) for beta in (0.1, 0.01, 0.001)]
    assert errors[0] < 0.3
    for large, small in itertools.pairwise(errors):
        assert large / small == pytest.approx(10**order, rel=0.3)


def test_a_minibatch_scales_the_update() -> None:
    found, exact = gradients("centered", 1e-3, scale=True)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_free_phase_is_subtracted() -> None:
    """A learned prior is no output's business: its gradient is that of backpropagation, zero.

    Without the subtraction the update would hold the energy's own gradient over beta.
    """

    def model(y):
        loc = pyro.param("loc", torch.tensor(0.3))
        width = pyro.param("width", torch.tensor(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, width))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([1.0, -0.5, 2.0])
    optim = pyro.optim.SGD({"lr": 1.0})
    loop = NudgedPredictiveCoding(model, optim, nudge="y", beta=1e-4, num_steps=300)
    loop.step(y)
    # d/d loc of half the squared error at z = loc; nothing for the width, whose mode is z = loc.
    assert pyro.param("loc").item() == pytest.approx(0.3 + float((y - 0.3).sum()), rel=1e-5)
    assert pyro.param("width").item() == pytest.approx(0.7, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sign": "upward"}, "sign must be one of"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"nudge": "yy"}, r"does not observe\. Did you mean .y."),
        ({"warm_start": "last"}, "would start each phase"),
    ],
)
def test_bad_use_is_refused(options, match: str) -> None:
    options = {"nudge": "y", **options}

    def use() -> None:
        loop = NudgedPredictiveCoding(Net(), pyro.optim.SGD({"lr": 1.0}), **options)
        loop.step(torch.randn(2, 3), torch.randn(2, 2))

    with pytest.raises(ValueError, match=match):
        use()

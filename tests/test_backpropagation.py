"""Zero-divergence and fixed-prediction learning are backpropagation (T9, T10)."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from guides.inference import FixedPrediction, ZeroDivergence

pytestmark = pytest.mark.usefixtures("float64")

SIZES = (3, 5, 4, 4, 2)


class Net(pyro.nn.PyroModule):
    """A tanh network as a chain of Gaussians, hidden values latent."""

    def __init__(self, depth: int, scales: bool = False) -> None:
        super().__init__("net")
        sizes = (*SIZES[:depth], SIZES[-1])
        self.layers = pyro.nn.PyroModule[nn.ModuleList](
            [pyro.nn.PyroModule[nn.Linear](a, b) for a, b in itertools.pairwise(sizes)]
        )
        self.scales = [0.5 + 0.4 * i if scales else 1.0 for i in range(depth)]

    def forward(self, x, y, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            value = x
            for i, layer in enumerate(self.layers):
                loc = layer(value if i == 0 else torch.tanh(value))
                site = dist.Normal(loc, self.scales[i]).to_event(1)
                last = i == len(self.layers) - 1
                value = pyro.sample("y" if last else f"h{i}", site, obs=y if last else None)

    def output(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x if i == 0 else torch.tanh(x))
        return x


def gradients(loop_class, depth, *, scales=False, minibatch=False, **options):
    torch.manual_seed(depth)
    net, x, y = Net(depth, scales), torch.randn(6, 3), torch.randn(6, 2)
    parameters = list(net.parameters())
    loss = 0.5 * ((y - net.output(x)) / net.scales[-1]).square().sum()
    exact = torch.autograd.grad((3 if minibatch else 1) * loss, parameters)
    before = [p.detach().clone() for p in parameters]
    with pyro.get_param_store().scope():
        loop = loop_class(net, pyro.optim.SGD({"lr": 1.0}), **options)
        kwargs = {"size": 18, "index": torch.arange(6)} if minibatch else {}
        loop.step(x, y, **kwargs)
    found = [b - p.detach() for b, p in zip(before, parameters, strict=True)]
    return found, list(exact)


@pytest.mark.parametrize("loop_class", [ZeroDivergence, FixedPrediction])
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("scales", [False, True], ids=["unit", "scales"])
def test_gradients_are_those_of_backpropagation(loop_class, depth: int, scales: bool) -> None:
    found, exact = gradients(loop_class, depth, scales=scales)
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).abs().max() < 1e-14 * max(1.0, float(theirs.abs().max())) * 30


@pytest.mark.parametrize("loop_class", [ZeroDivergence, FixedPrediction])
def test_a_minibatch_is_scaled_by_n_over_b(loop_class) -> None:
    found, exact = gradients(loop_class, 3, minibatch=True)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_half_a_step_gives_powers_of_a_half() -> None:
    """The negative control of T9: 0.25, 0.5 and 1 times backpropagation, first layer first.

    Exact only while hidden layers stay where they were, which the first steps leave them.
    """
    found, exact = gradients(ZeroDivergence, 3, gamma=0.5)
    ratios = [
        float((ours * theirs).sum() / theirs.square().sum())
        for ours, theirs in zip(found[::2], exact[::2], strict=True)
    ]
    assert ratios[2] == pytest.approx(1.0, rel=1e-12)
    assert ratios[1] == pytest.approx(0.5, rel=1e-12)
    assert ratios[0] == pytest.approx(0.25, rel=1e-12)


def test_too_few_sweeps_leave_the_first_layers_without_a_gradient() -> None:
    found, exact = gradients(FixedPrediction, 3, num_sweeps=1)
    assert (found[0] == 0).all()
    assert (exact[0] != 0).any()
    torch.testing.assert_close(found[2], exact[2], rtol=1e-12, atol=1e-12)


def test_smaller_sweeps_settle_at_the_same_errors() -> None:
    found, exact = gradients(FixedPrediction, 3, num_sweeps=200, eta=0.3)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _other(kind: str):
    def model(x):
        width = pyro.param("width", torch.tensor(1.0))
        if kind == "global":
            pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Laplace(x, 1.0) if kind == "laplace" else dist.Normal(x, 1))
            b = pyro.sample("b", dist.Normal(x, 1.0)) if kind == "fork" else 0.0
            scale = {"learned": width, "moving": a.exp()}.get(kind, torch.tensor(1.0))
            pyro.sample("y", dist.Normal(a + b, scale), obs=x)
            if kind == "two outputs":
                pyro.sample("w", dist.Normal(a, 1.0), obs=x)

    return model


@pytest.mark.parametrize("loop_class", [ZeroDivergence, FixedPrediction])
@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("laplace", "site 'a' is Laplace"),
        ("global", "latent 'g' lies outside the data plate"),
        ("fork", "several parents"),
        ("learned", "'y' is learned or differs"),
        ("moving", "depends on a latent|differs between entries"),
        ("two outputs", "observes y, w"),
    ],
)
def test_other_programs_are_refused(loop_class, kind: str, match: str) -> None:
    loop = loop_class(_other(kind), pyro.optim.SGD({"lr": 1.0}))
    with pytest.raises(ValueError, match=match):
        loop.step(torch.tensor([0.5, -1.0]))


def test_bad_options_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="gamma must be positive"):
        ZeroDivergence(Net(2), pyro.optim.SGD({}), gamma=0.0)
    with pytest.raises(ValueError, match="eta must lie between 0 and 2"):
        FixedPrediction(Net(2), pyro.optim.SGD({}), eta=2.0)
    with pytest.raises(ValueError, match="num_sweeps must not be negative"):
        FixedPrediction(Net(2), pyro.optim.SGD({}), num_sweeps=-1)

"""Hybrid predictive coding: the guide starts the relaxation and learns where it ended."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import guides
from guides.inference import HybridPredictiveCoding, PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")


def tree(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Two levels, a constrained latent, one parameter."""
    shift = pyro.param("shift", torch.tensor(0.3))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        rate = pyro.sample("rate", dist.Gamma(3.0, z[..., 0].exp()))
        loc = torch.stack([z.sum(-1) + shift, rate], -1)
        pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def data() -> Tensor:
    return torch.randn(12, 2, generator=torch.Generator().manual_seed(3)) + 1.0


@pytest.mark.parametrize("name", ["amortized_normal", "amortized_delta", "bottom_up_normal"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("size", [12, 60])
def test_both_gradients_are_those_of_their_own_objectives(name: str, mode: str, size: int) -> None:
    """One SGD step, against the energy and the regression written down with other tools."""
    x, lr = data(), 1e-4
    kwargs = {"size": size, "index": torch.arange(12)}
    pyro.set_rng_seed(0)
    guide = guides.make(name, tree, x, hidden=(6,), model_kwargs=kwargs)
    loop = HybridPredictiveCoding(
        tree, pyro.optim.SGD({"lr": lr}), guide, num_steps=4, step_size=0.01, mode=mode
    )
    loop.step(x, **kwargs)
    store = pyro.get_param_store()
    before = {k: p.detach().clone() for k, p in guide.named_parameters()}
    shift = store["shift"].item()
    plain = PredictiveCoding(tree, pyro.optim.SGD({"lr": lr}), guide, num_steps=4, step_size=0.01)
    relaxed = plain.infer(x, **kwargs)
    scale = size / 12
    u = torch.cat([relaxed["z"], relaxed["rate"].log().unsqueeze(-1)], -1)
    if guide.has_density:
        terms = guides.objectives.ForwardKL().log_q(guide, relaxed, x, **kwargs)
        objective = -scale * terms.sum()
    else:
        at = guide.locations(x, **kwargs)
        found = torch.cat([at["z"], at["rate"].log().unsqueeze(-1)], -1)
        objective = 0.5 * scale * (found - u).square().sum()
    grads = torch.autograd.grad(objective, list(guide.parameters()))
    residual = (x[:, 0] - relaxed["z"].sum(-1) - shift) / 0.25
    loop.step(x, **kwargs)
    expected = shift + lr * scale * float(residual.sum())
    assert store["shift"].item() == pytest.approx(expected, rel=1e-9)
    for (key, parameter), grad in zip(guide.named_parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.detach(), before[key] - lr * grad)
    if mode == "graph":
        assert [(kind.mode, kind.reason) for kind in loop.compiled] == [("graph", None)]


def test_fewer_updates_are_needed_as_the_guide_learns() -> None:
    """The point of it, and the control: a guide that does not learn needs as many as before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, generator=generator)
    x = torch.randn(64, 2, generator=generator) @ weight
    x = x + 0.3 * torch.randn(x.shape, generator=generator)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.3).to_event(1), obs=x)

    def updates(lr: float, steps: int) -> tuple[int, int]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = guides.make("amortized_delta", model, x, hidden=(16,))
        loop = HybridPredictiveCoding(
            model,
            pyro.optim.Adam({"lr": lr}),
            guide,
            num_steps=200,
            energy_tolerance=1e-3,
            check_every=5,
        )
        loop.step(x)
        first = loop.num_updates
        for _ in range(steps):
            loop.step(x)
        exact = torch.linalg.solve(weight @ weight.T + 0.09 * torch.eye(2), weight @ x.T).T
        torch.testing.assert_close(loop.infer(x)["z"], exact, atol=5e-2, rtol=0)
        return first, loop.num_updates

    first, last = updates(0.03, 40)
    assert first < 200, "the adaptive stop never fired"
    assert last < first
    first, last = updates(0.0, 2)
    assert last == first


def test_a_relaxation_in_pieces_is_the_relaxation() -> None:
    """Without curvature to renew, looking at the energy changes nothing but the end."""
    x = data()
    guide = guides.make("amortized_normal", tree, x)
    optim = pyro.optim.SGD({"lr": 0.0})
    whole = PredictiveCoding(tree, optim, guide, num_steps=12, step_size=0.01).infer(x)
    pieces = HybridPredictiveCoding(
        tree, optim, guide, 12, step_size=0.01, energy_tolerance=1e-12, check_every=4
    )
    for name, value in pieces.infer(x).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)
    assert pieces.num_updates == 12
    assert pieces.num_steps == 12


def test_bad_use_is_refused() -> None:
    optim, x = pyro.optim.SGD({"lr": 0.1}), data()
    guide = guides.make("amortized_normal", tree, x)
    with pytest.raises(TypeError, match="got no guide"):
        HybridPredictiveCoding(tree, optim, None)
    with pytest.raises(TypeError, match="needs one of this package; got function"):
        HybridPredictiveCoding(tree, optim, lambda x: None)
    with pytest.raises(ValueError, match="energy_tolerance must not be negative"):
        HybridPredictiveCoding(tree, optim, guide, energy_tolerance=-1.0)
    with pytest.raises(ValueError, match="check_every must be at least 1"):
        HybridPredictiveCoding(tree, optim, guide, check_every=0)
    loop = HybridPredictiveCoding(tree, optim, guide, energy_tolerance=1.0, mode="graph")
    loop.step(x)
    loop.step(x)
    assert "energy_tolerance ends a relaxation" in str(loop.compiled[0].reason)

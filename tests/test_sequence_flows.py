"""Flow families in guides of sequences: what they win where steps are curved, and padding."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.diagnostics import elbo
from guides.families.autoregressive import AutoregressiveFlow
from guides.inference import CompiledSVI

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", ["filtering_iaf", "iterative_filtering_iaf"])
def test_flows_train_alike_on_padded_and_unpadded_batches(name: str) -> None:
    """Two updates from one start: losses and parameters, however far the rows are padded."""
    model = zoo.StateSpace(z_dim=2, x_dim=2, num_steps=3).requires_grad_(False)
    x, lengths = model(size=4), torch.tensor([3, 1, 2, 3])
    padded = torch.cat([x, torch.full((4, 2, 2), 7.0)], 1)
    padded[1, 1:], padded[2, 2:] = -50.0, 1e3
    sizes: dict[str, Any] = {"context": 2, "family_hidden": (4, 4), "name": "flow"}
    sizes |= {"network": 4} if name.startswith("iterative") else {"recurrent": 4, "hidden": 4}
    start = guides.make(name, model, x, lengths, **sizes)
    again = guides.make(name, model, padded, lengths, **sizes)
    assert torch.equal(start.init, again.init)
    found: list[tuple[list[float], list[Tensor]]] = []
    for data in (x, padded):
        guide = copy.deepcopy(start)
        with pyro.get_param_store().scope():
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
            losses = []
            for seed in range(2):  # noise is drawn step by step: the first three steps share it
                pyro.set_rng_seed(seed)
                losses.append(svi.step(data, lengths))
        found.append((losses, [p.detach() for p in guide.parameters()]))
    assert torch.isfinite(torch.tensor(found[0][0])).all()
    assert found[0][0][0] != found[0][0][1]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-10)
    for one, other, before in zip(found[0][1], found[1][1], start.parameters(), strict=True):
        assert not torch.equal(one, before)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def curved(x: Tensor) -> None:
    """Only the product of two coordinates is seen: q of a step lies along a hyperbola."""
    with pyro.plate("data", len(x)):
        z = torch.ones(len(x), 2)
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(1.0 + 0.5 * (z - 1.0), 1.0).to_event(1))
            pyro.sample(f"x_{t}", dist.Normal(z[:, 0] * z[:, 1], 0.5), obs=x[:, t])


@pytest.mark.slow
def test_a_flow_wins_where_the_posterior_of_a_step_is_curved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bounds on held-out sequences, in pairs: by far more than their errors, and than training.

    The control is the flow's own network, trained alike, whose coordinates do not see each other:
    what it reaches is a Gaussian's bound, so that the gain is that of the curve.
    """
    with torch.no_grad():
        seen = []
        for _ in range(2):
            trace = poutine.trace(poutine.uncondition(curved)).get_trace(torch.zeros(500, 2))
            seen.append(torch.stack([trace.nodes[f"x_{t}"]["value"] for t in range(2)], 1))
    train, held = seen
    conditions = AutoregressiveFlow.conditions

    def apart(self: Any, number: int, z: Tensor, context: Tensor) -> Tensor:
        return conditions(self, number, torch.zeros_like(z), context)

    rows = {}
    for name in ("normal", "iaf", "control"):
        monkeypatch.setattr(
            AutoregressiveFlow, "conditions", apart if name == "control" else conditions
        )
        pyro.set_rng_seed(0)
        flow = {} if name == "normal" else {"context": 4, "family_hidden": (16, 16)}
        family = "normal" if name == "normal" else "iaf"
        guide = guides.make(f"smoothing_{family}", curved, train, recurrent=16, hidden=64, **flow)
        optim = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.997})
        svi = CompiledSVI(curved, guide, optim, Trace_ELBO(), mode="graph")
        svi.run(800, ((train,), {}), progress=False)
        rows[name] = elbo(curved, guide, held, num_samples=100).rows
    for other in ("normal", "control"):
        gain = rows["iaf"] - rows[other]
        assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5
        assert gain.mean() > 0.5, f"little is gained over {other}"
    assert (rows["control"] - rows["normal"]).mean().abs() < 0.2, "depth or training tells them"

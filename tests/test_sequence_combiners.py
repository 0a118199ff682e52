"""The structured network of Krishnan et al. (2017) in guides of sequences, by hand row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import guides
import zoo

pytestmark = pytest.mark.usefixtures("float64")

B, T, D, K, H = 3, 4, 2, 2, 5


def states(network: nn.GRU, inputs: list[Tensor]) -> list[Tensor]:
    """States of a gated recurrent unit along the steps of one row, from zeros."""
    h, found = torch.zeros(H), []
    for x in inputs:
        own = (network.weight_ih_l0 @ x + network.bias_ih_l0).split(H)
        last = (network.weight_hh_l0 @ h + network.bias_hh_l0).split(H)
        reset, update = (torch.sigmoid(own[i] + last[i]) for i in (0, 1))
        h = (1 - update) * torch.tanh(own[2] + reset * last[2]) + update * h
        found.append(h)
    return found


def by_hand(guide: Any, x: Tensor, t: int, before: Tensor | None) -> Tensor:
    """Parameters of q of step ``t`` (from 0) of one row ``(steps of the row, D)``.

    h_t = (tanh(A z_{t-1} + a) + l_t + r_t) / number of terms, and lam_t = init + W h_t + b.
    """
    inputs = list((x - guide.shift) / guide.scale)
    terms = []
    if before is not None:
        terms.append(torch.tanh(guide.of_draw.weight @ before + guide.of_draw.bias))
    if guide.network.forwards is not None:
        terms.append(states(guide.network.forwards, inputs)[t])
    if guide.network.backwards is not None:
        terms.append(states(guide.network.backwards, inputs[::-1])[::-1][t])
    h = torch.stack(terms).mean(0)
    return guide.init + guide.head.weight @ h + guide.head.bias


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("filtering", 2),
        ("smoothing", 2),
        ("two_sided_smoothing", 3),
        ("mean_field_smoothing", 2),
    ],
)
def test_the_averaging_combiner_is_its_formula(name: str, number: int, ragged: bool) -> None:
    """DKS is the smoothing one, ST-LR the two-sided one; r_t starts at the row's last step."""
    model = zoo.StateSpace(z_dim=K, x_dim=D, num_steps=T)
    x = 3 + 2 * model(size=B).detach()
    lengths = torch.tensor([2, T, 1]) if ragged else torch.full((B,), T)
    args = (x, lengths) if ragged else (x,)
    guide: Any = guides.make(
        f"{name}_normal", model, *args, recurrent=H, combiner="average", name="average"
    )
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_()
    parts = [guide.markov, guide.network.forwards is not None, guide.network.backwards is not None]
    assert sum(parts) == number
    call = guide._call(args, {}, guide._layout(args, {}, None))
    draws = torch.randn(2, T, B, K)  # two draws of every state
    for t in range(T):
        upstream = {} if t == 0 else {f"step_{t}": draws[:, t - 1]}
        found = guide.step_parameters(t, replace(call, upstream=upstream))
        found = found.expand(2, B, -1)  # the first step is given no draw
        for row in range(B):
            length = int(lengths[row])
            if t >= length:
                continue
            for s in range(2):
                before = None
                if guide.markov:
                    before = guide.start if t == 0 else draws[s, t - 1, row]
                expected = by_hand(guide, x[row, :length], t, before)
                torch.testing.assert_close(found[s, row], expected, rtol=1e-10, atol=1e-10)

"""Densities of deep sequence models and of a flow prior, by hand from their parameters alone.

Every formula runs row by row over the steps that the row has, with torch's own cell in place of
the zoo's, so that neither the masks nor the broadcasting of the programs are used.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

import zoo
from tests.test_flow_models import jacobian_log_det, loud
from zoo.recurrent import Recurrent

pytestmark = pytest.mark.usefixtures("float64")

T, D, K, H = 4, 3, 2, 5


def normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum()


def bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return (x * torch.sigmoid(logits).log() + (1 - x) * torch.sigmoid(-logits).log()).sum()


def affine(layer: nn.Module, v: Tensor) -> Tensor:
    return layer.weight @ v + layer.bias


def silu(v: Tensor) -> Tensor:
    return v / (1 + torch.exp(-v))


def softplus(v: Tensor) -> Tensor:
    return torch.log1p(v.exp())


def gru(cell: Recurrent, inputs: Tensor, state: Tensor) -> Tensor:
    """The cell of torch with the weights of the zoo's."""
    own = nn.GRUCell(inputs.shape[-1], state.shape[-1])
    with torch.no_grad():
        own.weight_ih.copy_(cell.of_inputs.weight)
        own.bias_ih.copy_(cell.of_inputs.bias)
        own.weight_hh.copy_(cell.of_state.weight)
        own.bias_hh.copy_(cell.of_state.bias)
        return own(inputs, state)


def conditional(level: nn.Module, parents: Tensor, z: Tensor) -> Tensor:
    """Density of Normal(z; loc, 0.05 + softplus(raw)) of one hidden layer."""
    h = silu(affine(level.network[0], parents))
    return normal(z, affine(level.loc, h), 0.05 + softplus(affine(level.raw_scale, h)))


def emitted(model: nn.Module, features: Tensor, x: Tensor) -> Tensor:
    h = silu(affine(model.network[0], features))
    return bernoulli(x, affine(model.likelihood.output, h))


def vrnn(model: zoo.VRNN, x: Tensor, z: Tensor) -> Tensor:
    h, total = model.cell.start, torch.zeros(())
    for t in range(len(x)):
        if t:
            h = gru(model.cell, torch.cat([x[t - 1], z[t - 1]]), h)
        total = total + conditional(model.prior, h, z[t])
        total = total + emitted(model, torch.cat([z[t], h]), x[t])
    return total


def srnn(model: zoo.SRNN, x: Tensor, z: Tensor) -> Tensor:
    d, total = model.cell.start, torch.zeros(())
    for t in range(len(x)):
        d = gru(model.cell, x[t - 1] if t else torch.zeros(D), d)
        parents = torch.cat([z[t - 1] if t else torch.zeros(K), d])
        total = total + conditional(model.transition, parents, z[t])
        total = total + emitted(model, torch.cat([z[t], d]), x[t])
    return total


def gated(transition: nn.Module, before: Tensor, z: Tensor) -> Tensor:
    """Gated transition of Krishnan et al. (2017), SiLU for the rectifier, softplus a scale."""
    g1, _, g2 = transition.gate
    p1, _, p2 = transition.proposal
    gate = 1 / (1 + torch.exp(-affine(g2, silu(affine(g1, before)))))
    proposal = affine(p2, silu(affine(p1, before)))
    loc = (1 - gate) * affine(transition.linear, before) + gate * proposal
    return normal(z, loc, 0.01 + softplus(affine(transition.raw_scale, silu(proposal))))


def deep_markov(model: zoo.DeepMarkov, x: Tensor, z: Tensor) -> Tensor:
    total = normal(z[0], model.initial_loc, model.initial_log_scale.exp())
    e1, _, e2, _ = model.network
    for t in range(len(x)):
        if t:
            total = total + gated(model.transition, z[t - 1], z[t])
        h = silu(affine(e2, silu(affine(e1, z[t]))))
        total = total + bernoulli(x[t], affine(model.likelihood.output, h))
    return total


BY_HAND = {
    "vrnn": (vrnn, {"recurrent": H, "hidden": (4,)}),
    "srnn": (srnn, {"recurrent": H, "hidden": (4,)}),
    "deep_markov": (deep_markov, {"emission": 4, "transition": 5}),
}


def log_joint(model: nn.Module, z: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Rows of the program's log joint at given latents."""
    latents = {f"z_{t + 1}": z[:, t] for t in range(z.shape[1])}
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(x, lengths)
    trace.compute_log_prob()
    sites = [s for n, s in trace.nodes.items() if n[:2] in ("z_", "x_")]
    assert len(sites) == 2 * z.shape[1]
    rows = torch.stack([s["log_prob"] for s in sites]).sum(0)
    assert float((trace.log_prob_sum() - rows.sum()).detach().abs()) < 1e-9
    return rows


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_the_density_of_a_deep_sequence_model_by_hand(name: str, ragged: bool) -> None:
    by_hand, sizes = BY_HAND[name]
    model = zoo.make(name, x_dim=D, z_dim=K, **sizes)
    loud(model)
    x, z = (torch.rand(3, T, D) < 0.5).double(), torch.randn(3, T, K)
    lengths = torch.tensor([3, 1, T]) if ragged else torch.full((3,), T)
    found = log_joint(model, z, x, lengths if ragged else None)
    expected = torch.stack(
        [by_hand(model, x[r, :length], z[r, :length]) for r, length in enumerate(lengths)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_the_recurrent_cell_is_torchs(shape: tuple[int, ...]) -> None:
    """Also from its learned start, and with draws on the left, which torch's does not take."""
    cell = Recurrent(D, H)
    loud(cell)
    inputs, state = torch.randn(*shape, D), torch.randn(*shape, H)
    for given, start in ((state, state), (None, cell.start.expand(*shape, H))):
        flat = gru(cell, inputs.reshape(-1, D), start.reshape(-1, H))
        torch.testing.assert_close(cell(inputs, given), flat.reshape(*shape, H))


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_density_of_a_flow_prior_by_hand(levels: int) -> None:
    """The base of what was drawn, and autodiff's log-determinant."""
    model = zoo.make(
        "flow_prior_vae", x_dim=D, z_dim=3, hidden=(4,), flow_hidden=(6,), levels=levels
    )
    loud(model)
    networks = list(model.flow.networks)
    bound = math.log(10.0)

    def generate(u: Tensor) -> Tensor:
        """v_d = shift(v_<d) + exp(bound tanh(raw(v_<d) / bound)) u_d, one coordinate at a time."""
        for level, network in enumerate(networks):
            u = u.flip(-1) if level % 2 else u
            v: list[Tensor] = []
            for d in range(3):
                shift, raw = network(torch.stack([*v, *[torch.zeros(())] * (3 - d)]))
                v.append(shift[d] + (bound * torch.tanh(raw[d] / bound)).exp() * u[d])
            u = torch.stack(v)
            u = u.flip(-1) if level % 2 else u
        return u

    base = torch.randn(4, 3)
    z = torch.stack([generate(u) for u in base]).detach()
    x = (torch.rand(4, D) < 0.5).double()
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    trace.compute_log_prob()
    for row in range(4):
        prior = normal(base[row], torch.zeros(3), torch.ones(3))
        prior = prior - jacobian_log_det(generate, base[row])
        torch.testing.assert_close(trace.nodes["z"]["log_prob"][row], prior)
        likelihood = bernoulli(
            x[row], affine(model.likelihood.output, silu(affine(model.network[0], z[row])))
        )
        torch.testing.assert_close(trace.nodes["x"]["log_prob"][row], likelihood)
    assert F.mse_loss(z, base) > 0.1, "the flow is near the identity, where all Jacobians agree"

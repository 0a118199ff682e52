"""The linear Gaussian state space, against the dense joint Gaussian and known numbers."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine

import zoo
from guides.inference import PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")


def made(seed: int = 0, **options: object) -> tuple[zoo.StateSpace, torch.Tensor]:
    torch.manual_seed(seed)
    model = zoo.StateSpace(z_dim=2, x_dim=3, num_steps=6, bias=True, **options)
    model.requires_grad_(False)
    return model, model(size=4)


def dense(model: zoo.StateSpace, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of (z_1 .. z_T, x_1 .. x_T), by unrolling the equations."""
    k, d = model.z_dim, model.x_dim
    noise = []
    rows_z, offset = [], []
    width = steps * (k + d)
    for t in range(steps):
        level = model.initial if t == 0 else model.transition
        row = torch.zeros(k, width)
        row[:, t * k : (t + 1) * k] = level.scale_tril
        shift = level.loc(None)
        if t:
            row = row + model.transition.weight @ rows_z[-1]
            shift = shift + model.transition.weight @ offset[-1]
        rows_z.append(row)
        offset.append(shift)
    rows_x, offset_x = [], []
    for t in range(steps):
        row = model.emission.weight @ rows_z[t]
        start = steps * k + t * d
        row[:, start : start + d] += model.emission.scale_tril
        rows_x.append(row)
        offset_x.append(model.emission.weight @ offset[t] + model.emission.loc(None))
    noise = torch.cat(rows_z + rows_x)
    return torch.cat(offset + offset_x), noise @ noise.mT


@pytest.mark.parametrize("covariance", ["full", "diagonal", "unit"])
def test_filter_smoother_and_evidence_are_those_of_the_joint_gaussian(covariance: str) -> None:
    model, x = made(covariance=covariance)
    mean, joint = dense(model, 6)
    latent = 6 * model.z_dim
    flat = x.reshape(4, -1)
    observed = torch.distributions.MultivariateNormal(mean[latent:], joint[latent:, latent:])
    assert (model.log_evidence(x) - observed.log_prob(flat)).abs().max() < 1e-9
    gain = torch.linalg.solve(joint[latent:, latent:], joint[latent:, :latent]).mT
    smoothed = mean[:latent] + (flat - mean[latent:]) @ gain.mT
    covariances = joint[:latent, :latent] - gain @ joint[latent:, :latent]
    ours = model.smoother(x)
    assert (ours.mean.reshape(4, -1) - smoothed).abs().max() < 1e-9
    for t in range(6):
        block = slice(2 * t, 2 * t + 2)
        assert (ours.covariance[:, t] - covariances[block, block]).abs().max() < 1e-9
    posterior = model.posterior(x)
    assert (posterior.mean - smoothed).abs().max() < 1e-9
    assert (posterior.covariance_matrix - covariances).abs().max() < 1e-9
    # The filter at t is the smoother of what was seen by then.
    for t in (1, 3, 6):
        part = model.smoother(x[:, :t])
        filtered = model.filter(x)
        assert (filtered.mean[:, t - 1] - part.mean[:, -1]).abs().max() < 1e-9
        assert (filtered.covariance[:, t - 1] - part.covariance[:, -1]).abs().max() < 1e-9


def test_ragged_rows_are_those_of_shorter_sequences() -> None:
    model, x = made()
    lengths = torch.tensor([6, 1, 4, 2])
    evidence = model.log_evidence(x, lengths)
    smoothed = model.smoother(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = x[row : row + 1, :length]
        assert (evidence[row] - model.log_evidence(alone)[0]).abs() < 1e-10
        assert (smoothed.mean[row, :length] - model.smoother(alone).mean[0]).abs().max() < 1e-10


def test_padding_changes_no_density() -> None:
    model, x = made()
    lengths = torch.tensor([6, 1, 4, 2])
    latents = {
        name: site["value"]
        for name, site in poutine.trace(model).get_trace(size=4).nodes.items()
        if name.startswith("z_")
    }
    conditioned = poutine.condition(model, latents)
    total = poutine.trace(conditioned).get_trace(x, lengths).log_prob_sum()
    changed = x.clone()
    changed[1, 1:] = 1e3
    same = poutine.trace(conditioned).get_trace(changed, lengths).log_prob_sum()
    parts = sum(
        poutine.trace(poutine.condition(model, {n: v[r : r + 1] for n, v in latents.items()}))
        .get_trace(x[r : r + 1, : lengths[r]])
        .log_prob_sum()
        for r in range(4)
    )
    assert total == pytest.approx(float(same))
    assert float(total) == pytest.approx(float(parts))


def test_the_riccati_covariance_is_where_the_filter_settles() -> None:
    model, _ = made(3)
    x = model(torch.zeros(1, 300, 3))
    gone = model._filter(x, None)[1].covariance[0, -1]
    assert (model.riccati() - gone).abs().max() < 1e-9


def test_the_scalar_random_walk_has_the_golden_gain() -> None:
    model = zoo.StateSpace(z_dim=1, x_dim=1, covariance="unit")
    with torch.no_grad():
        model.transition.weight.fill_(1.0)
        model.emission.weight.fill_(1.0)
    predicted = float(model.riccati().detach())
    golden = (math.sqrt(5) - 1) / 2
    assert predicted / (predicted + 1) == pytest.approx(golden, abs=1e-9)  # the gain
    assert predicted * (1 - predicted / (predicted + 1)) == pytest.approx(golden, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(4, 3)), "needs sequences of shape"),
        (lambda m: m(torch.zeros(4, 0, 3)), "at least one time step"),
        (lambda m: m(torch.zeros(4, 5, 3), torch.zeros(4)), "tensor of integers"),
        (lambda m: m(torch.zeros(4, 5, 3), torch.tensor([1, 2])), "one number a row"),
        (lambda m: m(torch.zeros(2, 5, 3), torch.tensor([1, 6])), "between 1 and the 5 steps"),
        (lambda m: m(torch.zeros(2, 5, 3), torch.tensor([0, 5])), "Leave empty sequences out"),
        (lambda m: m(torch.zeros(2, 5, 2)), "needs data of shape"),
        (lambda m: zoo.StateSpace(covariance="round"), "covariance must be one of"),
        (lambda m: zoo.StateSpace(z_dim=0), "must be at least 1"),
    ],
)
def test_bad_calls_say_what_is_wrong(call, message: str) -> None:
    model, _ = made()
    with pytest.raises((ValueError, TypeError), match=message):
        call(model)


def test_unstable_unobserved_states_have_no_steady_state() -> None:
    model, _ = made(covariance="unit")
    with torch.no_grad():
        model.transition.weight.copy_(2 * torch.eye(2))
        model.emission.weight.zero_()
    with pytest.raises(ValueError, match="did not settle"):
        model.riccati(most=50)


def test_relaxing_the_whole_window_is_the_smoother() -> None:
    """T17: predictive coding on the program of the sequence, ragged lengths too."""
    model, x = made(5, covariance="full")
    lengths = torch.tensor([6, 1, 4, 2])
    pc = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.0}), num_steps=200, solver="auto")
    for args in ((x,), (x, lengths)):
        found = pc.infer(*args)
        exact = model.smoother(*args).mean
        for t in range(6):
            on = slice(None) if len(args) == 1 else t < lengths
            assert (found[f"z_{t + 1}"][on] - exact[on, t]).abs().max() < 1e-6

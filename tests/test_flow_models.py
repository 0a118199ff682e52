"""Flows in the models: whitening, autoregressive flows over time, flow priors and likelihoods."""

from __future__ import annotations

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import zoo
import zoo.data
from zoo.covariance import Covariance
from zoo.masked_flow import MaskedFlow
from zoo.whitening import KINDS, whitening_matrix

pytestmark = pytest.mark.usefixtures("float64")


def loud(module: torch.nn.Module, seed: int = 0, size: float = 0.5) -> None:
    """Large random weights: near the identity a wrong Jacobian looks right."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def correlated(number: int = 400) -> torch.Tensor:
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.9, 0.2]])
    return torch.randn(number, 3) @ mix.mT + torch.tensor([1.0, -2.0, 0.5])


# --- whitening ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_whitening_whitens_and_gives_the_gaussians_density(kind: str) -> None:
    x = correlated()
    mean, weight = whitening_matrix(x, kind, epsilon=0.0)
    y = (x - mean) @ weight.mT
    assert (y.mT @ y / len(x) - torch.eye(3)).abs().max() < 1e-10
    covariance = (x - mean).mT @ (x - mean) / len(x)
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    white = torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1)
    assert (white + torch.linalg.slogdet(weight)[1] - exact).abs().max() < 1e-9


def test_zca_moves_points_least_and_cholesky_regresses_on_units_before() -> None:
    x = correlated()
    moved = {}
    for kind in KINDS:
        mean, weight = whitening_matrix(x, kind)
        moved[kind] = float(((x - mean) @ weight.mT - (x - mean)).square().sum(-1).mean())
    assert moved["zca"] == min(moved.values())
    mean, weight = whitening_matrix(x, "cholesky", epsilon=0.0)
    centered = x - mean
    fit = torch.linalg.lstsq(centered[:, :2], centered[:, 2]).solution
    residual = centered[:, 2] - centered[:, :2] @ fit
    white = (centered @ weight.mT)[:, 2]
    assert (white - residual / residual.square().mean().sqrt()).abs().max() < 1e-9


@pytest.mark.parametrize("parameterization", Covariance.parameterizations)
def test_learned_lateral_weights_reach_the_closed_form(parameterization: str) -> None:
    x = correlated()
    exact = zoo.Whitening(3, parameterization).fit(x)
    model = zoo.Whitening(3, parameterization)
    kind = {"cholesky": "cholesky", "symmetric": "zca"}[parameterization]
    mean, weight = whitening_matrix(x, kind, epsilon=0.0)
    assert (exact.covariance.whitening - weight).abs().max() < 1e-8
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
    svi = SVI(model, lambda *args, **kwargs: None, optim, Trace_ELBO())
    for _ in range(600):
        svi.step(x)
    assert (model.covariance.whitening - weight).abs().max() < 0.01
    assert (model.loc - mean).abs().max() < 0.01
    assert (model.log_evidence(x).mean() - exact.log_evidence(x).mean()).abs() < 1e-4


@pytest.mark.parametrize("parameterization", Covariance.parameterizations)
def test_covariance_density_inverse_and_log_det(parameterization: str) -> None:
    noise = Covariance(4, parameterization)
    loud(noise)
    scale = noise.scale
    assert (scale @ noise.whitening - torch.eye(4)).abs().max() < 1e-9
    assert (torch.linalg.slogdet(scale)[1] - noise.log_det).abs() < 1e-10
    x = torch.randn(5, 4)
    exact = torch.distributions.MultivariateNormal(torch.ones(4), scale @ scale.mT)
    assert (noise(torch.ones(4)).log_prob(x) - exact.log_prob(x)).abs().max() < 1e-8


def test_zca_filters_of_natural_patches_have_a_center_and_a_surround() -> None:
    data = zoo.data.load("natural_patches", patch=9, num_train=4000, num_test=10, center=False)
    _, weight = whitening_matrix(data.train, "zca", epsilon=1e-4)
    center = weight[4 * 9 + 4].reshape(9, 9)
    assert center[4, 4] == center.max()
    assert center[4, 4] > 0
    around = torch.stack([center[3, 4], center[5, 4], center[4, 3], center[4, 5]])
    assert (around < 0).all()
    assert around.sum() / center[4, 4] < -0.5
    far = torch.ones(9, 9, dtype=torch.bool)
    far[2:7, 2:7] = False
    assert center[far].abs().max() < 0.1 * center[4, 4]


# --- autoregressive flows -------------------------------------------------------------------


def jacobian_log_det(function, x: torch.Tensor) -> torch.Tensor:
    size = x.numel()
    jacobian = torch.func.jacrev(lambda v: function(v.reshape(x.shape)).reshape(-1))(x.reshape(-1))
    return torch.linalg.slogdet(jacobian.reshape(size, size))[1]


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_flow_inverts_and_has_autodiffs_jacobian(levels: int) -> None:
    model = zoo.AutoregressiveFlow(x_dim=2, order=2, hidden=(5,), levels=levels)
    loud(model)
    x = torch.randn(3, 4, 2)
    y, log_det = model.flow.normalize(x)
    assert (model.generate(y) - x).abs().max() < 1e-9
    for row in range(3):
        exact = jacobian_log_det(lambda v: model.flow.normalize(v[None])[0][0], x[row])
        assert (log_det[row].sum() - exact).abs() < 1e-9
    trace = poutine.trace(model).get_trace(x)
    assert (trace.log_prob_sum() - model.log_evidence(x).sum()).abs() < 1e-9


@pytest.mark.parametrize("levels", [1, 2])
def test_the_evidence_of_a_flow_counts_no_padding(levels: int) -> None:
    """Rows are those of shorter sequences, whatever is behind them, gradients too."""
    model = zoo.AutoregressiveFlow(x_dim=2, order=2, hidden=(5,), levels=levels)
    loud(model)
    x, lengths = torch.randn(3, 4, 2), torch.tensor([4, 1, 3])
    alone = torch.stack(
        [model.log_evidence(x[r, None, :length])[0] for r, length in enumerate(lengths)]
    )
    for junk in (0.0, 7.0, 1e200):
        padded = torch.where((torch.arange(4) < lengths[:, None])[..., None], x, junk)
        found = model.log_evidence(padded, lengths)
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(found.sum(), list(model.parameters()))
        for one, other in zip(
            gradients,
            torch.autograd.grad(alone.sum(), list(model.parameters()), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    total = poutine.trace(model).get_trace(x, lengths).log_prob_sum()
    torch.testing.assert_close(total, alone.sum())
    whole = torch.full((3,), 4)
    torch.testing.assert_close(model.log_evidence(x, whole), model.log_evidence(x))
    with pytest.raises(ValueError, match="Leave empty sequences out"):
        model.log_evidence(x, torch.tensor([4, 0, 3]))
    with pytest.raises(ValueError, match="one number a row"):
        model.log_evidence(x, lengths[:2])
    with pytest.raises(ValueError, match="needs data of shape"):
        model.log_evidence(x[..., :1])


@pytest.mark.parametrize("order", [1, 3])
def test_an_autoregressive_gaussian_is_an_affine_flow(order: int) -> None:
    """AR(p): the same density, and the flow's remainder is the precision-weighted error."""
    gaussian = zoo.AutoregressiveGaussian(x_dim=2, order=order, constant_scale=True)
    flow = zoo.AutoregressiveFlow(x_dim=2, order=order, constant_scale=True)
    loud(gaussian)
    scale = torch.nn.functional.softplus(gaussian.raw_bias) + gaussian.min_scale
    level = flow.flow.chain[0]
    with torch.no_grad():
        level.shift.weight.copy_(gaussian.loc.weight)
        level.shift.bias.copy_(gaussian.loc.bias)
        level.raw_bias.copy_(torch.atanh(scale.log() / level.log_bound))
    x = torch.randn(3, 6, 2)
    trace = poutine.trace(gaussian).get_trace(x)
    trace.compute_log_prob()
    assert (trace.log_prob_sum() - flow.log_evidence(x).sum()).abs() < 1e-9
    for t in range(6):
        fn = trace.nodes[f"x_{t + 1}"]["fn"].base_dist
        assert ((x[:, t] - fn.loc) / fn.scale - flow.whiten(x)[:, t]).abs().max() < 1e-9


def test_linear_autoregression_over_coordinates_is_cholesky_whitening() -> None:
    """One coordinate a step, looking back on all before it: the triangular inverse map."""
    x = correlated(600)
    _, weight = whitening_matrix(x, "cholesky", epsilon=0.0)
    centered = x - x.mean(0)
    rows = [torch.zeros(3)]
    for d in range(1, 3):
        fit = torch.linalg.lstsq(centered[:, :d], centered[:, d]).solution
        rows.append(torch.cat([fit, torch.zeros(3 - d)]))
    shift = torch.stack(rows)
    residual = centered - centered @ shift.mT
    scale = residual.square().mean(0).sqrt()
    assert ((torch.eye(3) - shift) / scale[:, None] - weight).abs().max() < 1e-9


def test_temporal_differences_are_a_flow_of_volume_one() -> None:
    model = zoo.TemporalDifference(x_dim=2, order=2)
    x = torch.randn(3, 5, 2)
    padded = torch.cat([torch.zeros(3, 2, 2), x], 1)
    assert (model.differences(x) - padded.diff(dim=1).diff(dim=1)).abs().max() < 1e-12
    assert model.flow.normalize(x)[1].abs().max() == 0
    # x_t = x_{t-1} + u_t, u_t = u_{t-1} + w_t: double differences give the white w back.
    white = torch.randn(2, 50, 2)
    walk = white.cumsum(1).cumsum(1)
    assert (model.differences(walk) - white).abs().max() < 1e-9


def test_a_pattern_generator_runs_the_trained_flow_the_other_way() -> None:
    flow = zoo.AutoregressiveFlow(x_dim=2, order=3, hidden=(4,), levels=2, num_steps=6)
    loud(flow)
    model = zoo.PatternGenerator.of(flow, noise_scale=0.2)
    u = torch.randn(3, 6, 2)
    movement = model.move(u)
    assert (flow.whiten(movement) - u).abs().max() < 1e-9
    drive = {f"u_{t + 1}": u[:, t] for t in range(6)}
    trace = poutine.trace(poutine.condition(model, drive)).get_trace(size=3)
    for t in range(6):
        fn = trace.nodes[f"x_{t + 1}"]["fn"].base_dist
        assert (fn.loc - movement[:, t]).abs().max() < 1e-12


def test_a_trained_flow_generates_the_autocorrelation_it_was_trained_on() -> None:
    """An oscillation with noise, AR(2): correlations at several lags (C9)."""
    steps, number = 120, 300
    a, b = 1.6, -0.81
    noise = torch.randn(number, steps + 100, 1)
    x = [noise[:, 0], a * noise[:, 0] + noise[:, 1]]
    for t in range(2, steps + 100):
        x.append(a * x[-1] + b * x[-2] + noise[:, t])
    whole = torch.stack(x, 1)  # from rest, as the flow's own first steps are
    data = whole[:, 100:]
    model = zoo.AutoregressiveFlow(x_dim=1, order=2, num_steps=steps)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985})
    svi = SVI(model, lambda *args, **kwargs: None, optim, Trace_ELBO())
    for _ in range(250):
        svi.step(whole[:, :12])
    made = model.generate(torch.randn(number, steps + 100, 1)).detach()[:, 100:]

    def correlation(z: torch.Tensor, lag: int) -> float:
        z = z - z.mean()
        return float((z[:, lag:] * z[:, :-lag]).mean() / z.square().mean())

    first = a / (1 - b)
    exact = {1: first, 2: a * first + b}
    exact[3] = a * exact[2] + b * exact[1]
    for lag in (1, 2, 3, 6):
        assert abs(correlation(made, lag) - correlation(data, lag)) < 0.06
    for lag in (1, 2, 3):
        assert abs(correlation(made, lag) - exact[lag]) < 0.06
    white = model.whiten(data).detach()[:, 2:]
    assert abs(correlation(white, 1)) < 0.03
    assert correlation(data, 1) > 0.8


# --- flow priors and likelihoods ------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_masked_flow_has_autodiffs_jacobian_and_draws_from_its_density(levels: int) -> None:
    flow = MaskedFlow(3, (8,), levels)
    loud(flow)
    base = pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1)
    pushed = flow(base)
    x = torch.randn(4, 3)
    back = x
    for level in reversed(flow.transforms()):
        back = level.inv(back)
    forward = back
    for level in flow.transforms():
        forward = level(forward)
    assert (forward - x).abs().max() < 1e-9

    def inverse(v: torch.Tensor) -> torch.Tensor:
        for level in reversed(flow.transforms()):
            v = level.inv(v)
        return v

    for row in x:
        exact = base.log_prob(inverse(row)) + jacobian_log_det(inverse, row)
        assert (pushed.log_prob(row) - exact).abs() < 1e-9
    draws = pushed.sample((20_000,))
    # E[exp(log q(x) - log q(x))] = 1 says nothing; an integral over a box does.
    inside = (draws.abs() < 1).all(-1).double().mean()
    grid = torch.rand(100_000, 3) * 2 - 1
    mass = pushed.log_prob(grid).exp().detach()
    error = 3 * (float(mass.std()) * 8 / 100_000**0.5 + (0.25 / 20_000) ** 0.5)
    assert abs(float(inside - 8 * mass.mean())) < error


def test_a_flow_likelihood_is_the_vae_of_the_whitened_data() -> None:
    model = zoo.FlowLikelihoodVAE(x_dim=3, z_dim=2, hidden=(4,), flow_hidden=(5,), levels=2)
    loud(model.flow)
    x, z = torch.randn(4, 3), torch.randn(4, 2)
    white = model.whiten(x)
    for row in range(4):
        log_det = jacobian_log_det(lambda v: model.whiten(v[None])[0], x[row])
        inner = model.likelihood(model.network(z[row])).log_prob(white[row])
        assert (model.decode(z[row]).log_prob(x[row]) - inner - log_det).abs() < 1e-9


def test_a_flow_below_a_state_space_is_the_state_space_of_what_it_leaves() -> None:
    model = zoo.FlowStateSpace(
        x_dim=2, z_dim=2, hidden=(4,), transition=3, levels=2, flow_hidden=(3,)
    )
    loud(model.flow)
    plain = zoo.FlowStateSpace(x_dim=2, z_dim=2, hidden=(4,), transition=3, levels=0)
    plain.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(3, 4, 2)
    z = {f"z_{t + 1}": torch.randn(3, 2) for t in range(4)}
    total = poutine.trace(poutine.condition(model, z)).get_trace(x).log_prob_sum()
    y, log_det = model.flow.normalize(x)
    inner = poutine.trace(poutine.condition(plain, z)).get_trace(y).log_prob_sum()
    assert (total - inner - log_det.sum()).abs() < 1e-9


def test_the_visual_pathway_is_one_exact_density() -> None:
    model = zoo.VisualPathway(x_dim=4, z_dims=(3, 2), hidden=(4,), num_steps=3)
    loud(model.flow)
    frames = torch.randn(50, 3, 4) @ torch.randn(4, 4)
    model.fit_retina(frames, epsilon=0.0)
    x = frames[:2]
    stages = model.stages(x)
    flat = model.stages(frames)["retina"].reshape(-1, 4)
    assert (flat.mT @ flat / len(flat) - torch.eye(4)).abs().max() < 1e-9
    latents = {}
    for t in range(3):
        latents[f"z2_{t + 1}"], latents[f"z1_{t + 1}"] = torch.randn(2, 2), torch.randn(2, 3)
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(x)
    trace.compute_log_prob()
    observed = sum(trace.nodes[f"x_{t + 1}"]["log_prob"] for t in range(3))
    noise = model.log_noise.exp()
    for row in range(2):
        expected = jacobian_log_det(lambda v: model.stages(v[None])["thalamus"][0], x[row])
        for t in range(3):
            loc = model.output(model.network(latents[f"z1_{t + 1}"][row]))
            y = stages["thalamus"][row, t]
            expected = expected + torch.distributions.Normal(loc, noise).log_prob(y).sum()
        assert (observed[row] - expected).abs() < 1e-8


@pytest.mark.parametrize(
    "name",
    [
        *("deep_markov", "vrnn", "srnn", "flow_state_space", "visual_pathway"),
        *("pattern_generator", "autoregressive_flow", "autoregressive_gaussian"),
        "temporal_difference",
    ],
)
def test_padding_changes_no_density(name: str) -> None:
    from tests.model_cases import MODEL_CASES

    model = MODEL_CASES[name].build()
    x = model(size=3).detach()
    number = x.shape[1]
    lengths = torch.tensor([number, 1, max(number - 1, 1)])
    latents = {
        n: s["value"].detach()
        for n, s in poutine.trace(model).get_trace(x).nodes.items()
        if s["type"] == "sample" and not s["is_observed"] and n != "data"
    }

    def total(x: torch.Tensor, lengths: torch.Tensor, latents: dict[str, torch.Tensor]) -> float:
        trace = poutine.trace(poutine.condition(model, latents)).get_trace(x, lengths)
        return float(trace.log_prob_sum().detach())

    whole = total(x, lengths, latents)
    changed, moved = x.clone(), {n: v.clone() for n, v in latents.items()}
    changed[1, 1:] = 1.0 - changed[1, 1:]
    for n, v in moved.items():
        if int(n.rpartition("_")[2]) > 1:
            v[1] += 3.0
    assert total(changed, lengths, moved) == pytest.approx(whole, abs=1e-9)
    single = sum(
        total(
            x[r : r + 1, : lengths[r]],
            lengths[r : r + 1],
            {
                n: v[r : r + 1]
                for n, v in latents.items()
                if int(n.rpartition("_")[2]) <= lengths[r]
            },
        )
        for r in range(3)
    )
    assert single == pytest.approx(whole, abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Covariance(3, "round"), "parameterization must be one of"),
        (lambda: Covariance(3, scale=0.0), "scale positive"),
        (lambda: whitening_matrix(torch.zeros(3, 2), "zca", 0.0), "has no inverse"),
        (lambda: whitening_matrix(torch.zeros(3, 2), "cholesky", 0.0), "has no inverse"),
        (lambda: whitening_matrix(torch.zeros(1, 2), "zca"), "at least two rows"),
        (lambda: whitening_matrix(torch.zeros(3, 2), "white"), "kind must be one of"),
        (lambda: MaskedFlow(1), "dim at least 2"),
        (lambda: zoo.AutoregressiveFlow(levels=0), "must be at least 1"),
        (lambda: zoo.AutoregressiveFlow(order=0), "at least 1"),
        (lambda: zoo.AutoregressiveGaussian(order=0), "at least 1"),
        (lambda: zoo.TemporalDifference(order=0), "at least 1"),
        (lambda: zoo.PatternGenerator(noise_scale=0.0), "noise_scale positive"),
        (lambda: zoo.FlowStateSpace(2, levels=-1), "levels at least 0"),
        (lambda: zoo.VisualPathway(0), "at least 1"),
        (lambda: zoo.DeepMarkov(z_dim=0), "at least 1"),
        (lambda: zoo.VRNN(recurrent=0), "at least 1"),
        (lambda: zoo.SRNN(num_steps=0), "at least 1"),
    ],
)
def test_bad_options_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

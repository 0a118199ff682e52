"""The Langevin loop around its kernels: guides that learn, posteriors, exports, refusals."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import guides
import guides.layout
from guides.diagnostics import elbo, log_evidence, pareto_khat
from guides.energy import LogJoint
from guides.inference import ChainGaussian, LangevinPredictiveCoding
from guides.inference.guide_losses import guide_loss
from guides.inference.langevin_kernel import own_metric

pytestmark = pytest.mark.usefixtures("float64")

SGD = pyro.optim.SGD({"lr": 0.0})


def pair(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(2 * z.sum(-1), 1.0), obs=x)


def tree(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact_mean(x: Tensor) -> tuple[float, float]:
    """Mean and variance of the tree's global latent given all rows."""
    precision = 1 / 4 + len(x) / 1.25
    return float(x.sum() / 1.25 / precision), 1 / precision


@pytest.mark.parametrize("sampler", ["ula", "mala"])
def test_global_latents_are_sampled_with_the_rows(sampler: str) -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    mean, variance = exact_mean(x)
    pc = LangevinPredictiveCoding(tree, SGD, num_steps=0, sampler=sampler, step_size=0.03)
    draws = pc.samples(x, num_samples=200, num_chains=200, num_mixing=100).values["mean"]
    error = float(draws.mean(1).std()) / math.sqrt(200)
    assert abs(float(draws.mean()) - mean) < 4 * error < 0.25
    own = (draws - draws.mean()).square().mean(1)
    bias = 0.02 if sampler == "ula" else 0.0  # an upper bound of eta Lambda / 2 in this direction
    assert abs(float(own.mean()) - variance) < 4 * float(own.std()) / math.sqrt(200) + bias


def test_globals_of_minibatches_follow_stochastic_gradients() -> None:
    """Welling and Teh: the mean stays; the noise of the minibatch adds to the variance."""
    x = torch.randn(20) + 3
    mean, variance = exact_mean(x)
    pc = LangevinPredictiveCoding(
        tree,
        SGD,
        num_steps=0,
        step_size=0.05,
        num_chains=20,
        num_mixing=4,
        num_samples=1,
        persistent=True,
        global_rate=0.2,
    )
    kept = []
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        rows = torch.randperm(20, generator=generator)[:5]
        pc.step(x[rows], size=20, index=rows)
        if step >= 50:
            kept.append(pc.get_state()["chains"]["global"][:, 0])
    draws = torch.stack(kept, 1)
    assert float(draws.mean()) == pytest.approx(mean, abs=0.15)
    assert float(draws.var()) > variance


class Net(nn.Module):
    """A decoder with a level that the encoder has to invert."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.Linear(2, 3)

    def program(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        pyro.module("net", self)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            g = pyro.sample("g", dist.Gamma(3.0, 2.0))
            loc = self.decode(torch.tanh(z)) * g.unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in ("amortized_normal", "bottom_up_normal", "iterative_normal")
        for kind in ("reverse_kl", "forward_kl", "jeffreys")
        if (name, kind) != ("iterative_normal", "jeffreys")
    ],
)
def test_the_guide_s_gradient_is_that_of_its_divergence(name: str, kind: str) -> None:
    """Against Pyro's own traces, with the same draws; the model gets none."""
    x = torch.randn(4, 3)
    net = Net()
    options = {"network": (4,), "num_iterations": 1} if "iter" in name else {"hidden": (4,)}
    guide = guides.make(name, net.program, x, **options)
    kwargs = {"size": 8, "index": torch.arange(4)}
    pc = LangevinPredictiveCoding(net.program, SGD, guide=guide, num_chains=2, num_samples=3)
    log_joint = pc._log_joint((x,), kwargs)
    chain = pc._sample(log_joint, pc._begin(log_joint))
    pyro.set_rng_seed(5)
    loss = guide_loss(kind, guide, log_joint, chain.draws)
    own = list(guide.parameters())
    found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
    assert not any(
        g is not None and g.any()
        for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    )
    expected = torch.zeros(())
    if kind != "forward_kl":
        pyro.set_rng_seed(5)
        with poutine.trace() as q:
            guide(x, **kwargs)
        q.trace.compute_log_prob()
        log_q = q.trace.log_prob_sum()
        p = poutine.trace(poutine.replay(net.program, q.trace)).get_trace(x, **kwargs)
        expected = expected + log_q - p.log_prob_sum()
    if kind != "reverse_kl":
        flat = {k: v.flatten(0, 1) for k, v in chain.draws.items()}
        for i in range(6):
            values = log_joint.layout.constrain({k: v[i] for k, v in flat.items()})
            objective = guides.objectives.ForwardKL()
            if kind == "forward_kl":
                pyro.set_rng_seed(5)  # a refined guide draws while it refines
            scored = objective.log_q(guide, values, x, model=net.program, **kwargs)
            expected = expected - 2 * scored.sum() / 6
    wanted = torch.autograd.grad(expected, own, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        theirs = torch.zeros(()) if theirs is None else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jeffreys"])
def test_an_encoder_learns_the_posterior_of_a_linear_model(kind: str) -> None:
    x = torch.randn(64) * 3
    guide = guides.make("amortized_multivariate_normal", pair, x, hidden=(16,))
    pc = LangevinPredictiveCoding(
        pair,
        pyro.optim.Adam({"lr": 0.03}),
        guide=guide,
        guide_loss=kind,
        sampler="mala",
        num_mixing=3,
        num_samples=1,
    )
    before = float(torch.as_tensor(elbo(pair, guide, x, num_samples=100).rows).mean())
    pc.run(150, ((x,), {}))
    after = float(torch.as_tensor(elbo(pair, guide, x, num_samples=100).rows).mean())
    exact = float(dist.Normal(0.0, 3.0).log_prob(x).mean())
    assert before < exact - 1
    assert exact - 0.25 < after < exact + 0.05


def test_chains_start_at_draws_of_the_guide() -> None:
    x = torch.randn(5)
    guide = guides.make("amortized_normal", pair, x)
    pc = LangevinPredictiveCoding(pair, SGD, guide=guide, num_chains=3)
    assert pc.num_steps == 0
    packed, _ = pc._begin(pc._log_joint((x,), {}))
    assert packed["data"].shape == (3, 5, 2)
    assert not torch.equal(packed["data"][0], packed["data"][1])
    pyro.set_rng_seed(0)
    drawn = pc._begin(pc._log_joint((x,), {}))[0]["data"]
    pyro.set_rng_seed(0)
    torch.testing.assert_close(drawn, guide.rsample_packed(3, (x,))[0]["data"].detach())


def test_the_posterior_is_a_guide_with_the_chain_s_moments() -> None:
    """Close to exact on a linear model: evidence, ELBO and k-hat accept it."""
    x = torch.tensor([1.0, -2.0, 0.5])
    pc = LangevinPredictiveCoding(
        pair, SGD, sampler="mala", preconditioner="hessian", posterior_samples=400
    )
    guide = pc.posterior(x)
    assert isinstance(guide, ChainGaussian)
    assert "moments of 3200 draws" in repr(guide)
    precision = torch.eye(2) + 4 * torch.ones(2, 2)
    exact = torch.linalg.inv(precision)
    torch.testing.assert_close(guide.covariance("data"), exact.expand(3, 2, 2), atol=0.1, rtol=0)
    evidence = dist.Normal(0.0, 3.0).log_prob(x)
    found = log_evidence(pair, guide, x, num_samples=500)
    torch.testing.assert_close(torch.as_tensor(found.rows), evidence, atol=0.05, rtol=0)
    bound = torch.as_tensor(elbo(pair, guide, x, num_samples=500).rows)
    assert bool((bound > evidence - 0.1).all())
    assert bool((torch.as_tensor(pareto_khat(pair, guide, x, num_samples=500).rows) < 0.7).all())


def test_the_posterior_with_globals_keeps_their_covariance_with_the_rows() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    pc = LangevinPredictiveCoding(tree, SGD, sampler="mala", posterior_samples=500)
    guide = pc.posterior(x)
    mean, variance = exact_mean(x)
    assert float(guide.loc_global) == pytest.approx(mean, abs=0.2)
    assert float(guide.covariance("global")) == pytest.approx(variance, rel=0.3)
    # z | mean, x has slope 1 / (1 + 4) in the mean and variance 1 / 5.
    assert float(-guide.gain.mean()) == pytest.approx(0.2, abs=0.05)
    assert float(guide.covariance("data").mean()) == pytest.approx(0.2, rel=0.2)


def test_a_small_posterior_sample_still_gives_a_density() -> None:
    """Two draws of eight chains in many coordinates: shrinkage keeps the covariance definite."""

    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    pc = LangevinPredictiveCoding(wide, SGD, posterior_samples=2)
    guide = pc.posterior(torch.zeros(2))
    assert torch.isfinite(elbo(wide, guide, torch.zeros(2), num_samples=5).rows).all()


def test_chains_that_never_move_have_no_posterior() -> None:
    pc = LangevinPredictiveCoding(pair, SGD, sampler="mala", step_size=1e9, num_mixing=0)
    pc.posterior_samples = 2
    with pytest.raises(ValueError, match="never moved in 3 rows: every proposal was rejected"):
        pc.posterior(torch.zeros(3))


def two_modes(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)


def test_chains_export_to_arviz_and_r_hat_sees_modes() -> None:
    """One mode a chain is not convergence, and the starts are far enough apart to tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    x = torch.tensor([1.0])
    pc = LangevinPredictiveCoding(two_modes, SGD, sampler="mala")
    values = pc.samples(x, num_samples=200, num_chains=6).values
    data = arviz.from_dict(posterior={k: v.numpy() for k, v in values.items()})
    assert float(arviz.rhat(data)["z"].max()) > 1.2
    pc = LangevinPredictiveCoding(pair, SGD, sampler="mala", preconditioner="hessian")
    values = pc.samples(x, num_samples=1000, num_chains=4).values
    data = arviz.from_dict(posterior={k: v.numpy() for k, v in values.items()})
    assert float(arviz.rhat(data)["z"].max()) < 1.02


def test_log_p_of_samples_is_pyro_s() -> None:
    x = torch.tensor([1.0, 3.0])
    pc = LangevinPredictiveCoding(tree, SGD)
    draws = pc.samples(x, num_samples=3, num_chains=2)
    for c in range(2):
        for s in range(3):
            values = {name: value[c, s] for name, value in draws.values.items()}
            trace = poutine.trace(poutine.condition(tree, values)).get_trace(x)
            assert float(draws.log_p[c, s]) == pytest.approx(float(trace.log_prob_sum()))


@pytest.mark.parametrize(
    "options",
    [
        {"preconditioner": "running", "num_mixing": 50},
        {"preconditioner": "second_moment", "num_mixing": 50},
    ],
    ids=str,
)
def test_a_moving_preconditioner_is_biased_and_a_still_one_is_not(options: Any) -> None:
    """Without its missing term the moving one is far too wide."""
    pc = LangevinPredictiveCoding(pair, SGD, **options)
    draws = pc.samples(torch.zeros(400), num_samples=200, num_chains=1, num_mixing=100)
    variance = float(draws.values["z"].var())
    exact = 5 / 9
    if options["preconditioner"] == "running":
        assert variance > 1.4 * exact
    else:
        assert variance == pytest.approx(exact, rel=0.15)


def test_float32_and_a_batch_of_one() -> None:
    x = torch.ones(1, dtype=torch.float32)

    def single(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=torch.float32), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for sampler in ("ula", "mala"):
        pc = LangevinPredictiveCoding(single, SGD, sampler=sampler)
        draws = pc.samples(x, num_samples=3, num_chains=2)
        assert draws.values["z"].dtype == torch.float32
        assert pc.infer(x)["z"].dtype == torch.float32


def test_a_loop_with_other_sites_known_has_chains_of_its_own() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    pc = LangevinPredictiveCoding(tree, SGD, persistent=True)
    pc.step(x)
    before = pc.get_state()["memory"]["tensors"]["data"]
    clamped = pc.given(clamp={"mean": torch.tensor(10.0)})
    assert clamped.samples(x, num_samples=300).values["z"].mean() > 2.5
    clamped.step(x)
    assert torch.equal(pc.get_state()["memory"]["tensors"]["data"], before)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"sampler": pyro.optim.Adam({})}, TypeError, "An optimizer is no sampler"),
        ({"sampler": torch.optim.SGD}, TypeError, "got SGD.*sqrt\\(1 - m\\)"),
        ({"sampler": "adam"}, ValueError, 'sampler must be "ula" or "mala"'),
        ({"sampler": "mla"}, ValueError, "Did you mean 'mala'"),
        ({"step_size": -1.0}, ValueError, 'step_size must be "auto" or a positive number'),
        ({"momentum": 1.0}, ValueError, "momentum must be in \\[0, 1\\)"),
        ({"momentum": 0.9, "sampler": "mala"}, ValueError, '"mala" has no momentum'),
        ({"preconditioner": "adam"}, ValueError, "preconditioner must be one of"),
        ({"preconditioner": "running", "sampler": "mala"}, ValueError, "changes from state"),
        ({"preconditioner": "second_moment", "num_mixing": 0}, ValueError, "num_mixing=0"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1"),
        ({"guide_loss": "elbo"}, ValueError, "guide_loss must be one of"),
        ({"guide_loss": "reverse_kl"}, TypeError, "got no guide"),
    ],
    # Not of the values: an object's address differs from one process to the next.
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_settings_that_do_not_sample_are_refused(options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        LangevinPredictiveCoding(pair, SGD, **options)


def test_a_point_mass_cannot_learn_by_a_divergence() -> None:
    guide = guides.make("amortized_delta", pair, torch.zeros(3))
    with pytest.raises(ValueError, match="a delta guide is a point mass"):
        LangevinPredictiveCoding(pair, SGD, guide=guide, guide_loss="jeffreys")


def test_mala_refuses_the_globals_of_a_minibatch() -> None:
    pc = LangevinPredictiveCoding(tree, SGD, sampler="mala")
    with pytest.raises(ValueError, match="MALA cannot sample the global latents 'mean'"):
        pc.step(torch.zeros(2), size=4, index=torch.arange(2))


def test_masked_latents_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="Latent site 'z' is masked"):
        LangevinPredictiveCoding(model, SGD).infer(torch.tensor([1.0, -1.0]))


def test_divergence_names_sites_and_rows() -> None:
    pc = LangevinPredictiveCoding(pair, SGD, step_size=1e3, num_mixing=400)
    with pytest.raises(ValueError, match="not finite after the last update, at sites 'z', 'x'"):
        pc.infer(torch.zeros(2))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "a tensor for every group of latents: data; got none"),
        ({"data": torch.ones(3)}, r"must have one of the shapes \(2,\), \(4, 2\)"),
        ({"data": -torch.ones(2)}, "is not positive definite"),
        ({"data": -torch.eye(2).unsqueeze(0)}, "is not positive definite"),
    ],
)
def test_preconditioners_that_do_not_fit(given: Any, match: str) -> None:
    pc = LangevinPredictiveCoding(pair, SGD, preconditioner=given, step_size=0.1)
    with pytest.raises(ValueError, match=match):
        pc.infer(torch.zeros(4))
    read = pc._log_joint((torch.zeros(4),), {}).layout
    metric = own_metric({"data": 4 * torch.eye(2).expand(4, 2, 2)}, read)["data"]
    torch.testing.assert_close(metric.root, 2 * torch.eye(2).expand(4, 2, 2))


def test_parameters_move_by_the_mean_over_draws_and_chains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    chains = []
    whole = LangevinPredictiveCoding._sample

    def kept(self: Any, *args: Any, **options: Any) -> Any:
        chains.append(whole(self, *args, **options))
        return chains[-1]

    monkeypatch.setattr(LangevinPredictiveCoding, "_sample", kept)
    x = torch.tensor([1.0, -2.0, 4.0])
    optim = pyro.optim.SGD({"lr": 0.1})
    LangevinPredictiveCoding(model, optim, num_steps=0, num_samples=3, num_chains=2).step(x)
    z = chains[0].draws["data"]
    assert z.shape == (3, 2, 3, 1)
    gradient = (0.3 - z).sum((-1, -2)).mean()
    torch.testing.assert_close(pyro.param("w").detach(), 0.3 - 0.1 * gradient)


def test_the_spread_of_rows_is_what_globals_leave() -> None:
    x = torch.tensor([1.0, 2.0])
    read = guides.layout.layout(tree, (x,), {})
    shared, own = torch.randn(4000, 2, 1), torch.randn(4000, 2, 2, 1)
    # Row by row, Cov(data, global) = gain, and 0.25 is left.
    gain = torch.tensor([2.0, -1.0]).reshape(2, 1)
    draws = {"global": shared, "data": gain * shared.unsqueeze(-2) + 0.5 * own}
    guide = ChainGaussian(tree, (x,), {})
    guide.fit(draws, read)
    left = guide.tril_data.squeeze().square()
    # The standard error of a variance of 8000 draws.
    error = 0.25 * math.sqrt(2 / 8000)
    assert ((left - 0.25).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_guide_that_runs_the_model_teaches_it_nothing(kind: str) -> None:
    """A ladder merges the model's own prediction, whose parameters are not the guide's to move."""
    slope = nn.Parameter(torch.tensor(0.7))

    def model(x: Tensor) -> None:
        a = pyro.param("slope", slope)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(a * z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 0.5).to_event(1), obs=x)

    x = torch.randn(5, 2)
    guide = guides.make("top_down_normal", model, x)
    log_joint = LogJoint(model, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    draws = {name: torch.randn_like(value)[None, None] for name, value in packed.items()}
    merged = guide.rsample_packed(1, (x,))[0]
    reached = pyro.get_param_store()._params["slope"]
    total = sum(value.sum() for value in merged.values())
    (found,) = torch.autograd.grad(total, reached, allow_unused=True)
    assert found is not None, "the draws depend on the model's parameter"
    loss = guide_loss(kind, guide, log_joint, draws)
    own = list(guide.parameters())
    *moved, other = torch.autograd.grad(loss, [*own, reached], allow_unused=True)
    assert other is None
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in moved)

"""The loop of predictive coding: what a step does, what persists, and the Laplace posterior."""

from __future__ import annotations

import copy
import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

import guides
from guides.energy import LogJoint
from guides.inference import PredictiveCoding, laplace
from guides.inference.curvature import hessian
from guides.inference.newton import newton
from guides.inference.relaxation import relax

pytestmark = pytest.mark.usefixtures("float64")


class Decoder(PyroModule):
    """z2 -> z1 -> x with learned weights and a nonlinearity."""

    def __init__(self, name: str = "decoder") -> None:
        super().__init__(name)
        self.top = nn.Linear(2, 3)
        self.bottom = nn.Linear(3, 4)

    def forward(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=index):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(torch.tanh(self.top(z2)), 0.7).to_event(1))
            pyro.sample("x", dist.Normal(self.bottom(torch.tanh(z1)), 0.5).to_event(1), obs=x)


def globals_and_locals(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A Gaussian tree with a non-Gaussian global scale; conditionally simple, jointly coupled."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
        w = pyro.sample("w", dist.Gamma(4.0, rate))
        pyro.sample("x", dist.Normal(z.sum(-1) + w, 0.5), obs=x)


def explicit_gradient(model: Decoder, x: Tensor, values: dict[str, Tensor], scale: float) -> dict:
    """Gradient of the scaled energy at given latents, by Pyro's own trace."""
    trace = poutine.trace(poutine.condition(model, values)).get_trace(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(-scale * trace.log_prob_sum(), parameters)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("parameterization", ["centered", "noncentered"])
@pytest.mark.parametrize("size", [5, 40])
def test_steps_are_sgd_updates_at_the_final_state(parameterization: str, size: int) -> None:
    """Two steps are two updates: no gradient is carried over, and none is one state too early."""
    x = torch.randn(5, 4)
    kwargs = {} if size == 5 else {"size": size, "index": torch.arange(5)}
    model = Decoder()
    pc = PredictiveCoding(
        model, pyro.optim.SGD({"lr": 0.01}), num_steps=7, parameterization=parameterization
    )
    for _ in range(2):
        # The loop's own relaxation, from the state it will start from.
        values, relaxed = pc._relax(pc._log_joint((x,), kwargs), learning=True)
        expected = explicit_gradient(model, x, values, size / 5)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = pc.step(x, **kwargs)
        assert loss == pytest.approx(float(relaxed.energy.sum()) * size / 5)
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameter, before[name] - 0.01 * expected[name], atol=1e-12)
            assert parameter.grad is None or not parameter.grad.any()


def test_both_parameterizations_settle_at_the_same_point_on_any_program() -> None:
    """Also where a scale depends on a latent: the path changes, the fixed point does not."""

    def funnel(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.StudentT(5.0, v, torch.exp(v / 2)))
            m = pyro.sample(
                "m", dist.MultivariateNormal(z[..., None] * torch.ones(2), torch.eye(2) + 0.5)
            )
            g = pyro.sample("g", dist.Gamma(3.0, 1.0))  # no location-scale site: stays centered
            pyro.sample("x", dist.Normal(m.sum(-1) * g, 1.0), obs=x)

    x = torch.tensor([0.5, 2.0, 3.0])
    results = []
    for parameterization in ("centered", "noncentered"):
        pc = PredictiveCoding(
            funnel, pyro.optim.SGD({}), num_steps=800, parameterization=parameterization
        )
        results.append(pc.infer(x))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], atol=1e-3)
    assert pc._noncentered(pc._log_joint((x,), {}).layout) == ("v", "z", "m")


def test_a_noncentered_hierarchy_carries_errors_down_in_one_step() -> None:
    """After one centered step only the lowest latent has moved from the feed-forward start."""
    x = torch.randn(5, 4)
    model = Decoder()
    start = LogJoint(model, (x,)).predictions()
    moved = {}
    for parameterization in ("centered", "noncentered"):
        pc = PredictiveCoding(
            model, pyro.optim.SGD({}), num_steps=1, parameterization=parameterization
        )
        moved[parameterization] = (pc.infer(x)["z2"] - start["z2"]).abs().max()
    assert moved["centered"] < 1e-12
    assert moved["noncentered"] > 1e-3


def test_a_guide_starts_the_relaxation() -> None:
    x = torch.randn(5, 4)
    model = Decoder()
    guide = guides.make("amortized_normal", model, x)
    pc = PredictiveCoding(model, pyro.optim.SGD({}), guide=guide, num_steps=0)
    inferred, center = pc.infer(x), guide.locations(x)
    assert all(torch.equal(inferred[name], center[name]) for name in center)
    auto = pyro.infer.autoguide.AutoNormal(model)
    auto(x)
    assert PredictiveCoding(model, pyro.optim.SGD({}), guide=auto, num_steps=3).infer(x).keys()


def test_global_latents_persist_and_local_ones_do_not() -> None:
    x = torch.randn(12) + 2
    pc = PredictiveCoding(globals_and_locals, pyro.optim.SGD({}), num_steps=5)
    energies = [pc.step(x) for _ in range(6)]
    assert all(b < a for a, b in itertools.pairwise(energies))
    state = copy.deepcopy(pc.get_state())
    assert set(state["globals"]) == {"mean", "rate"}
    pc.evaluate_loss(x)
    pc.infer(x)
    pc.posterior(x)
    kept = pc.get_state()["globals"]
    assert all(torch.equal(kept[name], state["globals"][name]) for name in kept)


def counts_with_a_level(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Overdispersed counts around one global level."""
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(level, 0.7))
        pyro.sample("x", dist.Poisson(torch.exp(z)), obs=x)


def test_minibatches_bring_globals_to_the_mode_of_all_rows() -> None:
    """One gradient step a minibatch at relaxed rows, not the mode of the last minibatch."""
    torch.manual_seed(1)
    x = torch.poisson(torch.exp(1.0 + 0.7 * torch.randn(40)))
    full = PredictiveCoding(
        counts_with_a_level, pyro.optim.SGD({}), num_steps=2000, tolerance=1e-9
    )
    mode = full.infer(x)
    scale = laplace(counts_with_a_level, mode, (x,)).covariance("global").sqrt()
    deviation = {}
    for rate in (None, 1.0):
        pc = PredictiveCoding(
            counts_with_a_level, pyro.optim.SGD({}), num_steps=15, global_rate=rate
        )
        generator = torch.Generator().manual_seed(0)
        seen = []
        for epoch in range(24):
            for index in torch.randperm(40, generator=generator).split(10):
                pc.step(x[index], size=40, index=index)
                if epoch >= 12:
                    seen.append((pc.get_state()["globals"]["level"] - mode["level"]) / scale)
        deviation[rate] = torch.stack(seen)
    assert deviation[None].mean().abs() < 0.1
    assert deviation[None].square().mean() < 0.25 * deviation[1.0].square().mean()


def test_the_energy_never_rises_where_the_curvature_does() -> None:
    """The step from the start's curvature would overshoot where the energy is steeper."""

    def steep(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 10.0))
            pyro.sample("x", dist.Normal(torch.exp(z), 0.5), obs=x)

    log_joint = LogJoint(steep, (torch.tensor([20.0, 5.0, 90.0]),))
    start = log_joint.layout.pack(log_joint.predictions())
    energies = [relax(log_joint, start, num_steps=n).energy for n in (0, 1, 2, 5, 20, 100)]
    assert all((b <= a + 1e-9).all() for a, b in itertools.pairwise(energies))
    settled = relax(log_joint, start, num_steps=400)
    assert settled.gradient["data"].abs().max() < 1e-4


def dense_hessian(x: Tensor, values: dict[str, Tensor], kwargs: dict) -> Tensor:
    """The whole Hessian of the scaled energy in unconstrained space, by autodiff."""
    log_joint = LogJoint(globals_and_locals, (x,), kwargs)
    packed = log_joint.layout.pack(values)
    shape = packed["data"].shape
    num_global = packed["global"].shape[0]

    def energy(flat: Tensor) -> Tensor:
        split = {"global": flat[:num_global], "data": flat[num_global:].reshape(shape)}
        return -log_joint.total(*log_joint.packed(split))

    flat = torch.cat([packed["global"], packed["data"].flatten()])
    return torch.autograd.functional.hessian(energy, flat)


def test_the_arrow_form_is_the_dense_hessian() -> None:
    x = torch.randn(6) + 2
    values = PredictiveCoding(globals_and_locals, pyro.optim.SGD({}), num_steps=300).infer(x)
    posterior = laplace(globals_and_locals, values, (x,))
    covariance = torch.linalg.inv(dense_hessian(x, values, {}))
    assert torch.allclose(posterior.covariance("global"), covariance[:3, :3], atol=1e-8)
    # Marginal covariance of the locals, and their covariance with the globals, from the guide.
    given, gain = posterior.covariance("data"), posterior.gain
    cross = -gain @ posterior.covariance("global")
    marginal = given + gain @ posterior.covariance("global") @ gain.mT
    for n in range(6):
        part = slice(3 + 3 * n, 6 + 3 * n)
        assert torch.allclose(marginal[n], covariance[part, part], atol=1e-8)
        assert torch.allclose(cross[n], covariance[part, :3], atol=1e-8)
    # And the draws have that covariance.
    draws, _, _ = posterior.rsample_packed(40_000, (x,))
    flat = torch.cat([draws["global"], draws["data"].flatten(1)], -1)
    scale = covariance.diagonal().sqrt()
    correlation = (torch.cov(flat.mT) - covariance) / (scale[:, None] * scale)
    assert correlation.abs().max() < 0.04
    assert not posterior.minibatch_estimate


def test_a_minibatch_laplace_is_flagged_and_scales_by_n_over_b() -> None:
    x = torch.randn(6) + 2
    index = torch.tensor([4, 0, 2])
    values = PredictiveCoding(globals_and_locals, pyro.optim.SGD({}), num_steps=300).infer(x)
    part = {n: v[index] if n in ("z", "w") else v for n, v in values.items()}
    kwargs = {"size": 6, "index": index}
    posterior = laplace(globals_and_locals, part, (x[index],), kwargs)
    assert posterior.minibatch_estimate
    assert "minibatch estimate" in repr(posterior)
    scaled = torch.linalg.inv(dense_hessian(x[index], part, kwargs))
    assert torch.allclose(posterior.covariance("global"), scaled[:3, :3], atol=1e-8)
    # Locals are conditionals of single rows: no N/B in them.
    full = laplace(globals_and_locals, values, (x,))
    assert torch.allclose(posterior.covariance("data"), full.covariance("data")[index])


def test_hessian_blocks_need_no_batching_rules() -> None:
    """An operation that vmap cannot batch falls back to single products, same numbers."""

    class Stubborn(torch.autograd.Function):
        @staticmethod
        def forward(z: Tensor) -> Tensor:
            return z**3

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            (z,) = ctx.saved_tensors
            return 3 * z**2 * grad

    def program(x: Tensor, cube) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(cube(z).sum(-1), 1.0), obs=x)

    x = torch.randn(4)
    point = {"data": torch.randn(4, 2)}
    plain = hessian(LogJoint(program, (x, lambda z: z**3)), point)
    stubborn = hessian(LogJoint(program, (x, Stubborn.apply)), point)
    assert torch.allclose(plain["local"], stubborn["local"])


def test_parameters_without_gradient_are_listed() -> None:
    class Spare(Decoder):
        def __init__(self) -> None:
            super().__init__("spare")
            self.unused = nn.Linear(2, 2)

    model = Spare()
    pc = PredictiveCoding(model, pyro.optim.SGD({"lr": 0.1}))
    with pytest.warns(UserWarning, match=r"No gradient reaches unused.weight, unused.bias"):
        pc.step(torch.randn(3, 4))
    assert pc.frozen == ["unused.weight", "unused.bias"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pc.step(torch.randn(3, 4))


def test_frozen_parameters_stay() -> None:
    model = Decoder().eval()
    model.bottom.requires_grad_(False)
    before = model.bottom.weight.clone()
    pc = PredictiveCoding(model, pyro.optim.SGD({"lr": 0.1}))
    pc.step(torch.randn(3, 4))
    assert torch.equal(model.bottom.weight, before)


def test_a_run_stops_resumes_and_loses_nothing() -> None:
    x = torch.randn(6, 4)
    batches = [((x[:3],), {}), ((x[3:],), {})]

    def fresh() -> PredictiveCoding:
        torch.manual_seed(0)
        return PredictiveCoding(Decoder(), pyro.optim.Adam({"lr": 0.01}), num_steps=5)

    with pyro.get_param_store().scope():
        whole = fresh().run(9, batches)
        assert whole.stop_reason == "num_steps"
        assert len(whole.losses) == 9
    with pyro.get_param_store().scope():
        pc = fresh()
        half = pc.run(4, batches)
        rest = pc.run(9, batches, state=half.state)
        assert rest.losses == pytest.approx(whole.losses)
    with pyro.get_param_store().scope():
        # In a new process: a new model, a new loop, and the saved state.
        resumed = fresh().run(9, batches, state=half.state)
        assert resumed.losses == pytest.approx(whole.losses)
    with pyro.get_param_store().scope():
        stopped = fresh().run(9, batches, stop=lambda losses: len(losses) == 3 and "three")
        assert (stopped.stop_reason, len(stopped.losses)) == ("three", 3)


def test_an_interrupt_keeps_what_was_done() -> None:
    x = torch.randn(6, 4)
    pc = PredictiveCoding(Decoder(), pyro.optim.Adam({"lr": 0.01}), num_steps=2)

    def interrupt(losses: list[float]) -> bool:
        if len(losses) == 4:
            raise KeyboardInterrupt
        return False

    result = pc.run(10, ((x,), {}), stop=interrupt)
    assert (result.stop_reason, len(result.losses)) == ("interrupted", 4)


def test_a_data_loader_feeds_the_loop() -> None:
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(7, 4)), batch_size=3
    )
    pc = PredictiveCoding(Decoder(), pyro.optim.Adam({"lr": 0.01}), num_steps=2)
    assert len(pc.run(5, loader, progress=False).losses) == 5


def test_the_random_state_is_left_alone() -> None:
    x = torch.randn(5, 4)
    pc = PredictiveCoding(Decoder(), pyro.optim.SGD({"lr": 0.01}))
    before = torch.get_rng_state()
    pc.step(x)
    pc.infer(x)
    pc.posterior(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_are_counted() -> None:
    x = torch.randn(5, 4)
    pc = PredictiveCoding(Decoder(), pyro.optim.SGD({"lr": 0.01}), num_steps=4, step_size=0.01)
    pc.step(x)
    assert pc.gradient_evaluations == 5 * (4 + 1 + 1)  # four updates, the start, the parameters


def test_newton_steps_take_a_short_relaxation_to_the_mode() -> None:
    """Ill-conditioned, with globals and constrained sites: gradients alone need thousands."""
    x = torch.randn(20) + 3
    short = PredictiveCoding(globals_and_locals, pyro.optim.SGD({}), num_steps=5)
    posterior = short.posterior(x)
    log_joint = LogJoint(globals_and_locals, (x,))
    packed = {g.name: posterior.group_location(g, None) for g in log_joint.layout.groups}
    gradient = torch.func.grad(lambda p: -log_joint.total(*log_joint.packed(p)))(packed)
    assert max(float(g.abs().max()) for g in gradient.values()) < 1e-6
    off = PredictiveCoding(globals_and_locals, pyro.optim.SGD({}), num_steps=5, newton_steps=0)
    start = log_joint.layout.pack(off.infer(x))
    assert max(float((packed[g] - start[g]).abs().max()) for g in packed) > 0.01


def test_newton_steps_leave_a_saddle() -> None:
    """At z = 0 the gradient of a double well vanishes and its curvature is negative."""

    def well(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x = torch.tensor([4.0, 1.0])
    log_joint = LogJoint(well, (x,))
    settled, _ = newton(log_joint, {"data": torch.full((2, 1), 1e-3)}, num_steps=30)
    assert torch.allclose(settled["data"][:, 0] ** 2, x - 0.125, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-8, 1e-4, 1.0, 1e4])
def test_newton_steps_end_at_the_mode_in_any_units(unit: float, dtype: torch.dtype) -> None:
    """Counts of exp(z / unit) and of exp(unit z): e + exp(e) is the count at the mode."""
    count = torch.tensor([[50.0, 3.0], [0.0, 400.0]], dtype=dtype)
    units = torch.tensor([unit, 1 / unit], dtype=dtype)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(units), units).to_event(1))
            pyro.sample("x", dist.Poisson((z / units).exp()).to_event(1), obs=x)

    exact = torch.zeros(2, 2)
    for _ in range(500):
        exact = exact - (exact + exact.exp() - count) / (1 + exact.exp())
    log_joint = LogJoint(model, (count,))
    found, _ = newton(log_joint, {"data": torch.zeros_like(count)}, num_steps=500)
    error = (found["data"] / units - exact).abs().max()
    assert error < 30 * torch.finfo(dtype).eps

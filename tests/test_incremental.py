"""Incremental predictive coding: one joint descent of latents and parameters."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import IncrementalPredictiveCoding, PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")

IPC = IncrementalPredictiveCoding


def sgd(lr: float) -> pyro.optim.PyroOptim:
    return pyro.optim.SGD({"lr": lr})


def gamma_poisson(counts: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A constrained latent, and parameters in the store, one of them constrained."""
    shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
    factor = pyro.param("factor", torch.tensor(1.5))
    with pyro.plate("data", size or len(counts), subsample=index):
        rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
        pyro.sample("counts", dist.Poisson(rate * factor.abs()), obs=counts)


def by_hand(
    x: Tensor, size: int, *, num_steps: int, step: float, momentum: float, lr: float
) -> tuple[Tensor, list[Tensor], float]:
    """Joint descent of ``gamma_poisson`` in unconstrained space, by Pyro's own trace."""
    shape, factor = torch.tensor(2.0).log().requires_grad_(), torch.tensor(1.5).requires_grad_()
    u = torch.tensor(2.0).log().expand(len(x)).clone().requires_grad_()  # the prior's mean
    velocity = torch.zeros(len(x))
    scale = size / len(x)
    energy = torch.zeros(())
    for _ in range(num_steps):
        z = u.exp()
        rows = (
            dist.Gamma(shape.exp(), 1.0).log_prob(z)
            + dist.Poisson(z * factor.abs()).log_prob(x)
            + u
        )
        energy = -scale * rows.sum()
        du, ds, df = torch.autograd.grad(energy, [u, shape, factor])
        velocity = momentum * velocity - step * du / scale
        u = (u + velocity).detach().requires_grad_()
        shape = (shape - lr * ds).detach().requires_grad_()
        factor = (factor - lr * df).detach().requires_grad_()
    return u.detach(), [shape.detach(), factor.detach()], float(energy.detach())


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("size", [4, 40])
def test_a_step_is_the_joint_descent_written_by_hand(
    size: int, momentum: float, mode: str
) -> None:
    """Gradients of both at the state before the update, N/B on the parameters alone."""
    x = torch.tensor([0.0, 1.0, 3.0, 7.0])
    settings = {"num_steps": 6, "step_size": 0.05, "momentum": momentum}
    kwargs: dict[str, Any] = {"size": size, "index": torch.arange(4)}
    loop = IPC(gamma_poisson, sgd(1e-3), mode=mode, **settings)
    energy = loop.step(x, **kwargs)
    store = pyro.get_param_store()
    found = [store[name].unconstrained().detach() for name in ("shape", "factor")]
    _, expected, last = by_hand(x, size, num_steps=6, step=0.05, momentum=momentum, lr=1e-3)
    assert energy == pytest.approx(last, rel=1e-10)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if mode == "graph":
        assert [(kind.mode, kind.reason) for kind in loop.compiled] == [("graph", None)]
        again = loop.step(x, **kwargs)  # another call from the start, by the same graph
        assert len(loop.compiled) == 1
        assert again < energy


def shifted(x: Tensor) -> None:
    """Quadratic in the latents and the parameter together."""
    mean = pyro.param("mean", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


X = torch.tensor([0.5, -1.0, 3.0, 2.0], dtype=torch.float64)


def joint_curvature() -> float:
    """Largest eigenvalue of the Hessian of ``shifted`` in (z, mean)."""
    hessian = 5.0 * torch.eye(5)
    hessian[4] = hessian[:, 4] = -1.0
    hessian[4, 4] = 4.0
    return float(torch.linalg.eigvalsh(hessian)[-1])


@pytest.mark.parametrize("parameterization", ["centered", "noncentered"])
def test_the_stationary_points_are_those_of_predictive_coding(parameterization: str) -> None:
    """T22: at an optimum of predictive coding the incremental update is zero."""
    optimum = X.mean() / 2
    pyro.param("mean", optimum.clone())
    start = (optimum + 2 * X) / 5

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(start))

    pc = PredictiveCoding(shifted, sgd(0.1), guide, num_steps=5)
    energy = pc.step(X)
    loop = IPC(shifted, sgd(0.1), guide, 5, 0.1, parameterization)
    assert loop.step(X) == pytest.approx(energy, rel=1e-12)
    assert pyro.param("mean").item() == pytest.approx(float(optimum), abs=1e-14)
    pyro.get_param_store()["mean"] = optimum + 1.0
    IPC(shifted, sgd(0.1), guide, 5, 0.1, parameterization).step(X)
    assert abs(pyro.param("mean").item() - float(optimum)) < 0.9


@pytest.mark.parametrize(("relative", "stable"), [(0.95, True), (1.05, False)])
def test_energy_falls_below_the_joint_two_over_lambda_max_and_rises_above(
    relative: float, stable: bool
) -> None:
    """T22 with its negative control: the bracket is that of latents and parameters together."""
    step = relative * 2 / joint_curvature()
    energies = []
    for num_steps in range(1, 60):
        pyro.clear_param_store()
        energies.append(IPC(shifted, sgd(step), None, num_steps, step).step(X))
    change = torch.tensor(energies).diff()
    assert torch.isfinite(change).all()
    if stable:
        assert bool((change <= 1e-12).all())
    else:
        assert bool((change[-10:] > 0).all())


def test_many_steps_reach_the_optimum_of_predictive_coding() -> None:
    loop = IPC(shifted, pyro.optim.Adam({"lr": 0.05}), num_steps=10)
    for _ in range(60):
        loop.step(X)
    assert pyro.param("mean").item() == pytest.approx(float(X.mean() / 2), abs=2e-2)
    assert loop.evaluate_loss(X) == pytest.approx(float(_energy()), rel=1e-3)


def _energy() -> Tensor:
    mean = X.mean() / 2
    z = (mean + 2 * X) / 5
    return -(dist.Normal(mean, 1.0).log_prob(z) + dist.Normal(2 * z, 1.0).log_prob(X)).sum()


def test_global_latents_persist_and_a_run_resumes() -> None:
    def model(x: Tensor, size: int | None = None, index: Any = None) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z * scale, 1.0), obs=x)

    batches = [((X[r],), {"size": 4, "index": r}) for r in torch.arange(4).split(2)]

    def build() -> IncrementalPredictiveCoding:
        return IPC(model, sgd(0.01), num_steps=3, mode="graph")

    pyro.set_rng_seed(0)
    whole = build().run(6, batches, progress=False).losses
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    half = build().run(3, batches, progress=False)
    state = copy.deepcopy(half.state)
    pyro.clear_param_store()
    second = build()
    rest = second.run(6, batches, progress=False, state=state).losses
    assert rest == pytest.approx(whole, rel=1e-9)
    assert set(second.get_state()["globals"]) == {"loc"}
    assert "loc" in repr(second)


def test_one_gradient_an_update() -> None:
    loop = IPC(shifted, sgd(0.01), num_steps=7, step_size=0.1)
    loop.step(X)
    assert loop.gradient_evaluations == 7 * len(X)


def test_bad_use_is_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        IPC(shifted, sgd(0.1), num_steps=0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1.0"):
        IPC(shifted, sgd(0.1), momentum=1.0)
    with pytest.raises(ValueError, match='"auto" belongs to the solvers'):
        IPC(shifted, sgd(0.1), parameterization="auto")
    with pytest.raises(ValueError, match="the updates diverged"):
        IPC(shifted, sgd(0.1), num_steps=2000, step_size=9.0).step(X)

    def drawn(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, scale.exp()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    with pytest.raises(ValueError, match="draws other rows whenever the program runs"):
        IPC(drawn, sgd(0.1)).step(X)

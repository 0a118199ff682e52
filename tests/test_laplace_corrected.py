"""Learning from the Laplace evidence, beside point estimates that diverge (T15)."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.inference import LaplaceCorrected, PredictiveCoding
from guides.inference.arrow import Arrow
from guides.inference.curvature import KinkError
from guides.inference.laplace_guide import IndefiniteHessianError
from tests.pc_oracles import chain

pytestmark = pytest.mark.usefixtures("float64")

# Mean 1 and variance 5, exactly.
X = 1.0 + 5.0**0.5 * torch.tensor([1.0, -1.0], dtype=torch.float64)


def toy(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Maximum likelihood: w ** 2 + 1 = 5 and w mu = 1."""
    w = pyro.param("w", torch.tensor(1.0))
    mu = pyro.param("mu", torch.tensor(0.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)


def curved(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """Non-quadratic, with a constrained latent: the mode moves with theta, and so does Lambda."""
    theta = pyro.param("theta", torch.tensor(0.4))
    with pyro.plate("data", size or len(x), subsample=index):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(rate * (theta * z[..., 0]).exp() + z[..., 1] ** 2), obs=x)


def gradient(
    model: Any, x: Tensor, names: list[str], options: dict[str, Any] | None = None, **kwargs: Any
) -> list[float]:
    """What a step adds to the parameters, by plain gradient descent of a tiny rate."""
    lr, options = 1e-7, options or {}
    LaplaceCorrected(model, pyro.optim.SGD({"lr": 0.0}), **options).step(x, **kwargs)
    store = pyro.get_param_store()
    before = {name: store[name].item() for name in names}
    LaplaceCorrected(model, pyro.optim.SGD({"lr": lr}), **options).step(x, **kwargs)
    found = [(before[name] - store[name].item()) / lr for name in names]
    for name in names:
        store[name] = torch.tensor(before[name])
    return found


def difference(
    model: Any, x: Tensor, name: str, options: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """The slope of the loss in one parameter, by central differences, relaxed anew."""
    store, losses = pyro.get_param_store(), []
    value = store[name].item()
    options = {"num_steps": 100} | (options or {})
    for moved in (value + 1e-4, value - 1e-4):
        store[name] = torch.tensor(moved)
        loop = LaplaceCorrected(model, pyro.optim.SGD({"lr": 0.0}), **options)
        losses.append(loop.evaluate_loss(x, **kwargs))
    store[name] = torch.tensor(value)
    return (losses[0] - losses[1]) / 2e-4


def test_on_a_linear_gaussian_program_it_is_the_evidence_and_its_gradient() -> None:
    model = chain(2, seed=1)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loop = LaplaceCorrected(model, pyro.optim.SGD({"lr": 1.0}))
    evidence = model.exact(x).log_evidence.sum()
    parameters = list(model.parameters())
    grads = torch.autograd.grad(evidence, parameters)
    before = [p.detach().clone() for p in parameters]
    assert loop.evaluate_loss(x) == pytest.approx(-evidence.item(), rel=1e-10)
    assert loop.step(x) == pytest.approx(-evidence.item(), rel=1e-10)
    for parameter, old, grad in zip(parameters, before, grads, strict=True):
        torch.testing.assert_close(parameter.detach() - old, grad, rtol=1e-8, atol=1e-8)


def test_a_minibatch_stands_for_all_rows() -> None:
    """N/B times the evidence of its rows, the determinant included."""
    w, mu = 1.3, 0.4
    pyro.param("w", torch.tensor(w))
    pyro.param("mu", torch.tensor(mu))
    evidence = dist.Normal(w * mu, (w**2 + 1) ** 0.5).log_prob(X).sum()
    loop = LaplaceCorrected(toy, pyro.optim.SGD({"lr": 0.0}))
    found = loop.evaluate_loss(X, size=12, index=torch.tensor([7, 3]))
    assert found == pytest.approx(-6 * float(evidence), rel=1e-10)


@pytest.mark.parametrize("size", [3, 30])
def test_the_gradient_follows_the_mode(size: int) -> None:
    """Against central differences of the loss, relaxed anew; the partial derivative differs."""
    x = torch.tensor([1.0, 4.0, 9.0])
    kwargs = {"size": size, "index": torch.arange(3)}
    (found,) = gradient(curved, x, ["theta"], **kwargs)
    expected = difference(curved, x, "theta", **kwargs)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-3


def test_the_toy_lands_at_maximum_likelihood() -> None:
    """T15: w = 2 and mu = 1/2, where point estimates go on growing."""
    loop = LaplaceCorrected(toy, pyro.optim.Adam({"lr": 0.1}), num_steps=1)
    for _ in range(60):
        loop.step(X)
    loop.optim = pyro.optim.SGD({"lr": 0.3})
    for _ in range(50):
        loop.step(X)
    assert pyro.param("w").item() == pytest.approx(2.0, abs=1e-3)
    assert pyro.param("mu").item() == pytest.approx(0.5, abs=1e-3)


def test_point_estimates_leave_the_maximum_of_the_likelihood() -> None:
    """T15: started there, the energy still falls towards larger weights."""
    pyro.param("w", torch.tensor(2.0))
    pyro.param("mu", torch.tensor(0.5))
    loop = PredictiveCoding(toy, pyro.optim.SGD({"lr": 0.01}), solver="newton", num_steps=1)
    for _ in range(60):
        loop.step(X)
    assert pyro.param("w").item() > 2.1


def both(x: Tensor, size: int | None = None, index: Any = None) -> None:
    """A global above the rows: x ~ N(0, s^2 + w^2 11^T + I)."""
    w = pyro.param("w", torch.tensor(1.3))
    s = pyro.param("s", torch.tensor(0.8))
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(w * loc, s))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
def test_globals_beside_rows_have_the_evidence_of_all(hessian: str) -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.7])
    options = {"hessian": hessian}
    found = gradient(both, x, ["w", "s"], options)
    w, s = torch.tensor(1.3, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    covariance = (s**2 + 1) * torch.eye(4) + w**2
    loss = -dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)
    loop = LaplaceCorrected(both, pyro.optim.SGD({"lr": 0.0}), **options)
    assert loop.evaluate_loss(x) == pytest.approx(loss.item(), rel=1e-9)
    expected = [float(g) for g in torch.autograd.grad(loss, [w, s])]
    assert found == pytest.approx(expected, rel=1e-5)


def bent(x: Tensor) -> None:
    """A constrained global and a curved likelihood above constrained rows."""
    theta = pyro.param("theta", torch.tensor(0.4))
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, rate * theta.exp()))
        y = pyro.sample("y", dist.Normal(shift[0] * theta, 1.0))
        pyro.sample("x", dist.Poisson(z * (0.3 * y + shift[1]).exp()), obs=x)


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
def test_the_arrow_is_the_whole_matrix(hessian: str) -> None:
    """Rows and globals by blocks against all latents as one group, and central differences."""
    x = torch.tensor([1.0, 4.0, 2.0])
    options = {"hessian": hessian, "num_steps": 100}
    found = gradient(bent, x, ["theta"], options)
    assert found == pytest.approx(gradient(bent, x, ["theta"], options | {"data_plate": None}))
    assert found == pytest.approx([difference(bent, x, "theta", options)], rel=1e-5)
    loops = [
        LaplaceCorrected(bent, pyro.optim.SGD({}), **options, data_plate=plate)
        for plate in ("data", None)
    ]
    assert loops[0].evaluate_loss(x) == pytest.approx(loops[1].evaluate_loss(x), rel=1e-9)


def test_gauss_newton_is_the_evidence_of_its_own_matrix() -> None:
    """The determinant against that of a posterior, and its gradient against differences."""
    x, options = torch.tensor([1.0, 4.0, 9.0]), {"hessian": "gauss_newton", "num_steps": 100}
    (found,) = gradient(curved, x, ["theta"], options)
    loop = LaplaceCorrected(curved, pyro.optim.SGD({}), **options)
    posterior = loop.posterior(x)
    assert posterior.hessian == "gauss_newton"
    log_det = -2 * posterior.tril_data.diagonal(dim1=-2, dim2=-1).log().sum()
    energy = PredictiveCoding(curved, pyro.optim.SGD({}), num_steps=400).evaluate_loss(x)
    size = x.numel() * 3
    expected = energy + 0.5 * (log_det - size * torch.tensor(2 * torch.pi).log())
    assert loop.evaluate_loss(x) == pytest.approx(float(expected), rel=1e-8)
    exact = LaplaceCorrected(curved, pyro.optim.SGD({}), num_steps=100).evaluate_loss(x)
    assert abs(exact - float(expected)) > 1e-3  # another matrix
    slope = difference(curved, x, "theta", options)
    assert found == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 1e-3


def sparse(x: Tensor) -> None:
    """A Laplace prior: rows of small data sit on its kink."""
    w = pyro.param("w", torch.tensor(1.2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(0.0, 0.5))
        pyro.sample("x", dist.Normal(w * z, 0.6), obs=x)


def test_gauss_newton_is_the_way_on_from_a_kink() -> None:
    """The error names it, and latents on the kink stay there as the parameters move."""
    x = torch.tensor([3.0, 0.1, -0.2, -2.5, 2.0, 0.3])
    with pytest.raises(KinkError, match=r"site 'z' has a kink.*hessian=\"gauss_newton\""):
        LaplaceCorrected(sparse, pyro.optim.SGD({"lr": 0.1}), num_steps=100).step(x)
    options = {"hessian": "gauss_newton", "num_steps": 200}
    (found,) = gradient(sparse, x, ["w"], options)
    # In closed form: soft thresholds, and the Fisher information of a Laplace site.
    w = torch.tensor(1.2, requires_grad=True)
    variance = 0.6**2
    z = (w * x - 2.0 * variance * x.sign()) / w**2
    z = torch.where(w.detach() * x.abs() > 2.0 * variance, z, 0.0)
    energy = -dist.Laplace(0.0, 0.5).log_prob(z).sum() - dist.Normal(w * z, 0.6).log_prob(x).sum()
    log_det = 6 * (4.0 + w**2 / variance).log()
    loss = energy + 0.5 * (log_det - 6 * torch.tensor(2 * torch.pi).log())
    loop = LaplaceCorrected(sparse, pyro.optim.SGD({}), **options)
    assert int((z == 0).sum()) == 3
    assert loop.evaluate_loss(x) == pytest.approx(loss.item(), abs=1e-3)
    assert found == pytest.approx(float(torch.autograd.grad(loss, w)[0]), rel=1e-3)


def test_bad_use_is_refused() -> None:
    optim = pyro.optim.SGD({"lr": 0.1})
    with pytest.raises(ValueError, match="newton_steps must be at least 1, got 0"):
        LaplaceCorrected(toy, optim, newton_steps=0)
    with pytest.raises(ValueError, match="needs jacobian=True"):
        LaplaceCorrected(toy, optim, jacobian=False)

    with pytest.raises(ValueError, match=r'must be "exact" or "gauss_newton", got \'diagonal\''):
        LaplaceCorrected(toy, optim, hessian="diagonal")
    with pytest.raises(NotImplementedError, match=r"needs all rows.*loc lie outside.* 2 of 12"):
        LaplaceCorrected(both, optim).step(X, size=12, index=torch.tensor([7, 3]))

    def saddle(x: Tensor) -> None:
        pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.1), obs=x)

    # The mean of the prior is a saddle that no gradient leaves.
    with pytest.raises(IndefiniteHessianError, match="not positive definite at site 'z'"):
        LaplaceCorrected(saddle, optim).step(X.abs())
    with pytest.raises(IndefiniteHessianError, match='pass hessian="gauss_newton"'):
        LaplaceCorrected(saddle, optim).step(X.abs())
    # There the density of z alone curves: 1.
    way_on = LaplaceCorrected(saddle, optim, hessian="gauss_newton", newton_steps=1, num_steps=0)
    expected = -dist.Normal(torch.zeros(()), 0.1).log_prob(X).sum()
    assert way_on.evaluate_loss(X.abs()) == pytest.approx(float(expected))


@pytest.mark.usefixtures("float64")
def test_an_arrow_solves_as_the_dense_matrix_of_all_rows() -> None:
    """A minibatch of three rows that stands for six: every row twice in the dense matrix."""
    noise = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    local = torch.stack(
        [2.0 * torch.eye(2) + part @ part.mT for part in noise[:3, :4].view(3, 2, 2)]
    )
    cross = noise[2:5, :4].reshape(3, 2, 2)
    above = 40.0 * torch.eye(2) + noise[:2, :2] @ noise[:2, :2].mT
    right = {"data": noise[:3, 3:], "global": noise[4, :2]}
    dense = torch.zeros(14, 14)
    dense[12:, 12:] = above
    for place, row in enumerate((0, 0, 1, 1, 2, 2)):
        at = slice(2 * place, 2 * place + 2)
        dense[at, at], dense[at, 12:], dense[12:, at] = local[row], cross[row], cross[row].mT
    repeated = right["data"].repeat_interleave(2, 0).flatten()
    wanted = torch.linalg.solve(dense, torch.cat([repeated, right["global"]]))
    arrow = Arrow({"local": local, "cross": cross, "global": above}, 2.0)
    found = arrow.solve(right)
    torch.testing.assert_close(found["data"], wanted[:12].view(3, 2, 2)[:, 0])
    torch.testing.assert_close(found["global"], wanted[12:])
    torch.testing.assert_close(arrow.log_det(), torch.linalg.slogdet(dense).logabsdet)

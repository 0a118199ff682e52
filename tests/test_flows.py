"""Flows: log-determinants by autodiff, inverses, and other people's transforms as oracles."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions.transforms as oracles
import pytest
import torch
from pyro.distributions.transforms.householder import ConditionedHouseholder
from pyro.distributions.transforms.planar import ConditionedPlanar
from pyro.distributions.transforms.radial import ConditionedRadial
from torch.nn.functional import softplus

from guides.families import FAMILIES
from guides.families.affine_coupling import AffineCoupling
from guides.families.autoregressive import AutoregressiveFlow
from guides.families.base import StandardNormal
from guides.families.conditioned import ConditionedFlow
from guides.families.family import Family, inverse_softplus, positive
from guides.families.flow import Flow, SteppedFlow
from guides.families.householder import Householder
from guides.families.iaf import InverseAutoregressive
from guides.families.lateral_cholesky import LateralCholesky
from guides.families.lateral_symmetric import LateralSymmetric
from guides.families.monotone import Monotone
from guides.families.multivariate_normal import MultivariateNormal
from guides.families.normal import Normal
from guides.families.planar import Planar
from guides.families.radial import Radial
from guides.families.roots import above_minus_one, increasing_root
from guides.families.student_t import StudentT
from guides.families.sylvester import Sylvester
from tests.test_families import DENSITIES, make, randomized

pytestmark = pytest.mark.usefixtures("float64")

# One row a flow: options, and how far its parameters and weights are from the usual size.
FLOWS: dict[str, tuple[dict[str, Any], float]] = {
    "lateral_cholesky": ({}, 5.0),
    "lateral_symmetric": ({}, 2.0),
    "planar": ({"transforms": 3}, 5.0),
    "radial": ({"transforms": 3}, 5.0),
    "householder": ({"transforms": 3}, 5.0),
    "sylvester": ({"transforms": 2}, 5.0),
    "iaf": ({"transforms": 2, "context": 3, "hidden": (8, 8)}, 2.0),
    "affine_coupling": ({"transforms": 3, "context": 3, "hidden": (8,)}, 2.0),
    "spline_coupling": ({"transforms": 3, "context": 3, "hidden": (8,), "bins": 5}, 1.5),
    "monotone": ({"transforms": 1, "context": 3, "hidden": (8,), "points": 192}, 4.0),
}
CONDITIONED = [name for name in FLOWS if name in ("iaf", "monotone") or "coupling" in name]


def large(name: str, size: int, batch: int = 4, base: Any = None) -> tuple[Flow, torch.Tensor]:
    """A flow at large parameters and weights."""
    options, strength = FLOWS[name]
    torch.manual_seed(size)
    flow = make(name, size, **options, base=base)
    assert isinstance(flow, Flow)
    with torch.no_grad():
        for parameter in flow.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.copy_(strength * torch.randn_like(parameter) / math.sqrt(fan_in))
    lam = strength * torch.randn(batch, flow.num_params)
    lam[:, : 2 * size] /= strength
    return flow, lam


def pushed_log_prob(family: Family, lam: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Log density of one draw from standard Gaussian noise, by autodiff."""
    jacobian = torch.autograd.functional.jacobian(lambda e: family.push(lam, e)[0], noise)
    log_noise = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    return log_noise - torch.linalg.slogdet(jacobian)[1]


def test_every_flow_is_tested_here() -> None:
    flows = {
        name
        for name in FAMILIES
        if name not in ("delta", "auxiliary") and isinstance(make(name, 2), Flow)
    }
    missing = flows - set(FLOWS)
    assert not missing, f"add rows to FLOWS in tests/test_flows.py: {sorted(missing)}"
    assert flows == set(FLOWS)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_log_determinant_is_that_of_the_jacobian(name: str, size: int) -> None:
    flow, lam = large(name, size)
    noise = flow.noise((3, 4), lam)
    log_q = flow.push(lam, noise)[1]
    for draw in range(3):
        for row in range(4):
            expected = pushed_log_prob(flow, lam[row], noise[draw, row])
            assert torch.allclose(log_q[draw, row], expected, atol=1e-8)
    start = flow.push(flow.init(lam[:, :size]), noise)[0]
    assert not torch.allclose(flow.push(lam, noise)[0], start, atol=0.1)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_inverse_goes_there_and_back(name: str, size: int) -> None:
    # Points of its own, and points anywhere: far out, flows contract or expand a lot.
    flow, lam = randomized(name, size)
    assert isinstance(flow, Flow)
    _, raw, steps, _ = flow.split(lam)
    noise = flow.noise((3, 4), lam)
    centered, log_det = flow.outward(raw, steps, noise)
    again, same = flow.inward(raw, steps, centered)
    assert torch.allclose(again, noise, atol=1e-7)
    assert torch.allclose(same, log_det, atol=1e-7)
    points = 5 * torch.randn(3, 4, size)
    noise, log_det = flow.inward(raw, steps, points)
    reached, same = flow.outward(raw, steps, noise)
    assert torch.allclose(reached, points, atol=1e-7)
    assert torch.allclose(same, log_det, atol=1e-7)
    scored = flow.log_prob(lam, lam[:, :size] + points)
    assert torch.isfinite(scored).all()
    assert flow.scores_external_points


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester", "householder"])
def test_the_inverse_holds_at_large_parameters(name: str) -> None:
    flow, lam = large(name, 5, batch=200)
    _, raw, steps, _ = flow.split(lam)
    points = 5 * torch.randn(3, 200, 5)
    noise, log_det = flow.inward(raw, steps, points)
    reached, same = flow.outward(raw, steps, noise)
    assert torch.allclose(reached, points, atol=1e-8)
    assert torch.allclose(same, log_det, atol=1e-8)


@pytest.mark.parametrize("name", FLOWS)
def test_the_score_of_points_has_right_derivatives(name: str) -> None:
    flow, lam = randomized(name, 2, batch=1 if name == "sylvester" else 2)
    points = (lam[:, :2] + torch.randn(len(lam), 2)).requires_grad_()
    lam.requires_grad_()
    assert torch.autograd.gradcheck(flow.log_prob, (lam, points))
    assert torch.autograd.gradgradcheck(flow.log_prob, (lam, points), fast_mode=True)
    by_lam = torch.func.grad(lambda lam: flow.log_prob(lam, points).sum())(lam)
    assert torch.allclose(by_lam, torch.autograd.grad(flow.log_prob(lam, points).sum(), lam)[0])
    each = torch.func.vmap(flow.log_prob)(lam, points)
    assert torch.allclose(each, flow.log_prob(lam, points))


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_training_starts_at_the_mean_field_gaussian(name: str, size: int) -> None:
    flow = make(name, size, **FLOWS[name][0], init_scale=0.3)
    loc = torch.randn(3, size)
    value = loc + 0.3 * torch.randn(50, 3, size)
    normal = torch.distributions.Normal(loc, 0.3).log_prob(value).sum(-1)
    score = flow.log_prob(flow.init(loc), value)
    # Networks start small but not at zero, so that their first layers have a gradient.
    assert torch.allclose(score, normal, atol=0.2 * size if name in CONDITIONED else 1e-6)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("context", [0, 2])
def test_everything_that_is_learned_has_a_gradient(name: str, size: int, context: int) -> None:
    options = dict(FLOWS[name][0])
    if "context" in options:
        options["context"] = context
    elif context:
        return
    flow = make(name, size, **options)
    lam = flow.init(torch.zeros(6, size)).requires_grad_()
    optimizer = torch.optim.SGD([lam, *flow.parameters()], lr=1e-3)
    target = torch.randn(2, size) * torch.linspace(0.5, 2.0, size)

    def loss() -> torch.Tensor:
        u, log_q = flow.rsample_and_log_prob(lam, (4,))
        modes = (u.unsqueeze(-2) - target).square().sum(-1)
        return (log_q - (-modes).logsumexp(-1)).sum()

    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert lam.grad is not None
    # On a line, normals of mirrors have no length and no direction to learn.
    if size > 1 or name not in ("householder", "sylvester"):
        assert (lam.grad.abs().sum(0) > 0).all()
    for path, parameter in flow.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().sum() > 0, path
    assert (len(list(flow.parameters())) > 0) == isinstance(flow, ConditionedFlow)


def test_pyros_sylvester_is_wrong_and_ours_is_right() -> None:
    """Both with the matrices of a Pyro transform at ordinary parameter values."""
    size = 5
    torch.manual_seed(0)
    pyros = oracles.Sylvester(size, count_transforms=size)
    with torch.no_grad():
        for parameter in pyros.parameters():
            parameter.uniform_(-2, 2)
        pyros.S_diag.abs_()
    x = torch.randn(size)
    true = torch.linalg.slogdet(torch.autograd.functional.jacobian(pyros, x))[1]
    reported = pyros.log_abs_det_jacobian(x, pyros(x))
    assert (reported - true).abs() > 0.1

    r, s = pyros.R().detach(), pyros.S().detach()
    product, two = r.diagonal() * s.diagonal(), s.diagonal()
    flow = Sylvester(size, transforms=1, rank=size)
    rows, columns = torch.triu_indices(size, size, 1)
    normals = pyros.u_unnormed.detach().flatten()
    parameters = [
        normals,
        r[rows, columns],
        s[rows, columns],
        _raw_above_minus_one(product) / two,
        torch.log(torch.expm1(two)),
        pyros.b.detach(),
    ]
    q, r1, r2, _, _ = flow.factors(torch.cat(parameters))
    assert torch.allclose(q @ q.mT, torch.eye(size))
    assert torch.allclose(r1, r, atol=1e-6)
    assert torch.allclose(r2, s, atol=1e-6)
    z, log_det = flow.step(torch.cat(parameters), x)
    assert torch.allclose(z, x + q @ r @ torch.tanh(s @ q.mT @ x + pyros.b), atol=1e-6)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: x + q @ r @ torch.tanh(s @ q.mT @ x + pyros.b.detach()), x
    )
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian)[1], atol=1e-6)


def _raw_above_minus_one(value: torch.Tensor) -> torch.Tensor:
    return torch.log(torch.expm1(value / 0.999 + 1)) - math.log(math.e - 1)


def test_planar_steps_are_pyros() -> None:
    flow, lam = large("planar", 4)
    assert isinstance(flow, SteppedFlow)
    parameters = flow.split(lam)[2][:, :9]
    u, w, b = parameters.split([4, 4, 1], -1)
    inner, above = above_minus_one((w * u).sum(-1, keepdim=True))
    x = torch.randn(4, 4)
    y, log_det = flow.step(parameters, x)
    # Pyro constrains u by another function: the u that it takes to ours.
    norm = w.square().sum(-1, keepdim=True)
    ours = u + (inner - (w * u).sum(-1, keepdim=True)) * w / norm
    theirs = ours + (above + torch.log(-torch.expm1(-above)) - inner) * w / norm
    oracle = ConditionedPlanar((b, theirs, w))
    assert torch.allclose(oracle(x), y, atol=1e-6)
    assert torch.allclose(oracle.log_abs_det_jacobian(x, oracle(x)), log_det, atol=1e-6)


def test_radial_steps_are_pyros() -> None:
    flow, lam = large("radial", 4)
    assert isinstance(flow, SteppedFlow)
    parameters = flow.split(lam)[2][:, :6]
    center, a, b = parameters.split([4, 1, 1], -1)
    total = positive(a) * above_minus_one(b)[1]
    x = torch.randn(4, 4)
    y, log_det = flow.step(parameters, x)
    oracle = ConditionedRadial((center, a, total + torch.log(-torch.expm1(-total))))
    assert torch.allclose(oracle(x), y, atol=1e-6)
    assert torch.allclose(oracle.log_abs_det_jacobian(x, oracle(x)), log_det, atol=1e-6)


def test_reflections_are_pyros() -> None:
    flow, lam = large("householder", 4)
    oracle = ConditionedHouseholder(flow.split(lam)[2].unflatten(-1, (3, 4)))
    x = torch.randn(4, 4)
    assert torch.allclose(flow.transform(flow.split(lam)[2], x)[0], oracle(x))


class _Network:
    """A step's masked network at a fixed context, in the form that Pyro's transform reads."""

    def __init__(self, flow: AutoregressiveFlow, context: torch.Tensor, number: int) -> None:
        self.flow, self.context, self.number = flow, context, number
        self.permutation = flow.order(number)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logit = self.flow.conditions(self.number, x, self.context).unbind(-1)
        return mean, logit


@pytest.mark.parametrize("number", [0, 1])
def test_inverse_autoregressive_steps_are_pyros_and_triangular(number: int) -> None:
    flow, lam = large("iaf", 4)
    assert isinstance(flow, InverseAutoregressive)
    network = _Network(flow, flow.split(lam)[2], number)
    oracle = oracles.AffineAutoregressive(network, stable=True, sigmoid_bias=2.0)
    x = torch.randn(4, 4)
    phi = flow.conditions(number, x, network.context)
    y, slope = flow.univariate(number, phi, x)
    assert torch.allclose(oracle(x), y)
    assert torch.allclose(oracle.log_abs_det_jacobian(x, oracle(x)), slope.sum(-1))
    jacobian = torch.autograd.functional.jacobian(lambda x: torch.stack(network(x)), x)
    for row in range(4):
        sees = jacobian[:, row, :, row].abs().sum(0) > 0
        expected = torch.ones(4, 4).tril(-1).bool()
        assert torch.equal(sees, expected if number == 0 else expected.mT)


def test_affine_coupling_steps_are_pyros() -> None:
    flow, lam = randomized("affine_coupling", 2)
    assert isinstance(flow, AffineCoupling)
    context = flow.split(lam)[2]

    def network(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shift, raw = flow.phi(0, kept, context).unbind(-1)
        return shift, raw / (1 + (raw / math.log(1e-3)).abs())

    oracle = oracles.AffineCoupling(1, network)
    x = torch.randn(4, 2)
    flow.networks = flow.networks[:1]
    y, log_det = flow.transform(context, x)
    assert torch.allclose(oracle(x), y)
    assert torch.allclose(oracle.log_abs_det_jacobian(x, oracle(x)), log_det)


def test_the_monotone_map_is_the_integral_that_zuko_finds() -> None:
    # Not at the top: the first import of Zuko changes torch, and the package mends that.
    from zuko.transforms import UnconstrainedMonotonicTransform

    flow, lam = randomized("monotone", 3)
    assert isinstance(flow, Monotone)
    x = torch.randn(4, 3)
    phi = flow.conditions(0, x, flow.split(lam)[2])
    y, log_slope = flow.univariate(0, phi, x)

    def integrand(t: torch.Tensor) -> torch.Tensor:
        return flow.integrands[0](t.unsqueeze(-1), phi[..., 1:]).squeeze(-1).exp()

    oracle = UnconstrainedMonotonicTransform(integrand, n=200)
    expected, expected_slope = oracle.call_and_ladj(x)
    assert torch.allclose(y - phi[..., 0], expected, atol=1e-8)
    assert torch.allclose(log_slope, expected_slope)
    # Far out it is a shift.
    far = torch.full((4, 3), 50.0)
    moved, log_slope = flow.univariate(0, phi, far)
    assert torch.allclose(flow.univariate(0, phi, far + 1)[0], moved + 1)
    assert not log_slope.any()


def test_the_integrals_error_is_as_stated() -> None:
    errors = []
    for points in (16, 32, 64):
        torch.manual_seed(0)
        flow = Monotone(3, points=points)
        with torch.no_grad():
            for parameter in flow.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(fan_in))
        lam = torch.randn(8, flow.num_params)
        noise = flow.noise((8,), lam)
        log_q = flow.push(lam, noise)[1].detach()
        exact = [pushed_log_prob(flow, lam[row], noise[row]) for row in range(8)]
        errors.append(float((log_q - torch.stack(exact)).abs().max()))
    assert errors[1] < 1e-8
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("name", ["lateral_cholesky", "lateral_symmetric"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_lateral_weights_are_a_full_covariance(name: str, size: int) -> None:
    flow, lam = randomized(name, size)
    assert isinstance(flow, LateralCholesky | LateralSymmetric)
    loc, raw, steps, _ = flow.split(lam)
    if isinstance(flow, LateralCholesky):
        root = positive(raw).unsqueeze(-1) * flow.lateral(steps)
        # The parameters are those of the family with a Cholesky factor.
        same = MultivariateNormal(size)
        assert torch.allclose(same.scale_tril(lam), root, atol=1e-12)
    else:
        root = torch.linalg.matrix_exp(flow.lateral(raw, steps))
        assert torch.allclose(root, root.mT)
        assert (torch.linalg.eigvalsh(root) > 0).all()
    reference = torch.distributions.MultivariateNormal(loc, root @ root.mT)
    noise = torch.randn(50_000, 4, size)
    value, log_q = flow.push(lam, noise)
    assert torch.allclose(log_q, reference.log_prob(value), atol=1e-10, rtol=1e-10)
    assert torch.allclose(flow.log_prob(lam, value), log_q, atol=1e-10, rtol=1e-10)
    entropy = flow.entropy(lam)
    assert entropy is not None
    assert torch.allclose(entropy, reference.entropy(), atol=1e-10)
    # Draws are the root times the noise, so their covariance is that of the noise between roots.
    sample = torch.einsum("sbi,sbj->bij", noise, noise) / len(noise)
    centered = value - loc
    covariance = torch.einsum("sbi,sbj->bij", centered, centered) / len(noise)
    assert torch.allclose(covariance, root @ sample @ root.mT, atol=1e-10, rtol=1e-10)
    error = (sample - torch.eye(size)).abs().max()
    assert error < 5 * math.sqrt(2 / len(noise))


def test_every_gaussian_has_one_symmetric_root() -> None:
    flow, lam = randomized("lateral_symmetric", 4)
    assert isinstance(flow, LateralSymmetric)
    loc, raw, steps, _ = flow.split(lam)
    root = torch.linalg.matrix_exp(flow.lateral(raw, steps))
    tril = torch.linalg.cholesky(root @ root)
    assert torch.allclose(flow.of_gaussian(loc, tril), lam, atol=1e-5)


BASES = [name for name in FAMILIES if name not in ("delta", "auxiliary")]


@pytest.mark.parametrize("base", BASES)
def test_any_family_can_be_the_base(base: str) -> None:
    flow = make("planar", 2, transforms=2, base=base)
    assert isinstance(flow, Flow)
    plain = make("planar", 2, transforms=2).num_params
    assert flow.num_params == plain + flow.base.num_params
    lam = flow.init(torch.zeros(4, 2))
    start = flow.base.init(torch.zeros(4, 2))
    assert torch.equal(flow.split(lam)[3], start)
    lam = lam + 0.5 * torch.randn_like(lam)
    value, log_q = flow.rsample_and_log_prob(lam, (6,))
    assert torch.allclose(flow.log_prob(lam, value), log_q, atol=1e-6)
    # At the identity it is the base, shifted and scaled.
    loc, raw, _, own = flow.split(lam)
    identity = torch.cat([loc, raw, flow.start.expand(4, -1), own], -1)
    centered = (value - loc) / positive(raw)
    expected = flow.base.log_prob(own, centered) - positive(raw).log().sum(-1)
    assert torch.allclose(flow.log_prob(identity, value), expected, atol=1e-8)
    assert flow.twice_differentiable == flow.base.twice_differentiable


@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_takes_a_base(name: str) -> None:
    flow = make(name, 2, **DENSITIES[name], base="multivariate_normal")
    assert isinstance(flow, Flow)
    lam = flow.init(torch.zeros(3, 2)) + 0.3 * torch.randn(3, flow.num_params)
    noise = torch.randn(3, 2)
    log_q = flow.push(lam, noise)[1]
    for row in range(3):
        expected = pushed_log_prob(flow, lam[row], noise[row])
        assert torch.allclose(log_q[row], expected, atol=1e-8)
    heavy = make(
        name, 2, **DENSITIES[name], base=lambda size: StudentT(size, df=3.0, init_scale=1.0)
    )
    value, log_q = heavy.rsample_and_log_prob(heavy.init(torch.zeros(3, 2)), (5,))
    assert torch.allclose(heavy.log_prob(heavy.init(torch.zeros(3, 2)), value), log_q, atol=1e-7)
    if getattr(flow, "volume_preserving", False):
        with pytest.raises(NotImplementedError, match="over a MultivariateNormal base"):
            flow.of_gaussian(torch.zeros(2), torch.eye(2))


def test_a_flow_over_a_bound_cannot_score_points() -> None:
    flow = make("planar", 2, base="auxiliary")
    assert not flow.scores_external_points
    lam = flow.init(torch.zeros(3, 2))
    value, log_q = flow.rsample_and_log_prob(lam)
    assert torch.isfinite(log_q).all()
    with pytest.raises(NotImplementedError, match="Auxiliary has no log q"):
        flow.log_prob(lam, value)


def test_the_default_base_is_standard_noise() -> None:
    base = StandardNormal(3)
    lam = base.init(torch.ones(5, 3))
    assert lam.shape == (5, 0)
    assert not base.location(lam).any()
    value = torch.randn(5, 3)
    assert torch.allclose(
        base.log_prob(lam, value), torch.distributions.Normal(0.0, 1.0).log_prob(value).sum(-1)
    )
    with pytest.raises(NotImplementedError, match="no location to move"):
        base.moved(lam, value)


def test_roots_are_found_on_flat_and_steep_ground() -> None:
    # Slope one far out, 1e-6 near zero: plain Newton steps leave the bracket.
    slope = torch.tensor([1e-6, 0.1, 1.0, 1e3])
    target = torch.linspace(-20.0, 20.0, 101).unsqueeze(-1).expand(-1, 4)

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.tanh(5 * x)
        return x + (slope - 1) / 5 * t, 1 + (slope - 1) * (1 - t.square())

    reach = target.abs() + 300
    root = increasing_root(function, target, -reach, reach)
    assert torch.allclose(function(root)[0], target, atol=1e-9)


def test_numbers_above_minus_one() -> None:
    raw = torch.tensor([-1e3, -0.6, -0.4, -1e-9, 0.0, 1e-9, 0.4, 0.6, 1e3], requires_grad=True)
    value, above = above_minus_one(raw)
    assert torch.allclose(value, 0.999 * (softplus(raw + math.log(math.e - 1)) - 1), atol=1e-12)
    assert torch.allclose(above - 1, value, atol=1e-12)
    assert (value > -1).all()
    assert value[4] == 0
    assert float((value[5] / raw[5]).detach()) == pytest.approx(0.999 * (1 - 1 / math.e))
    assert torch.autograd.gradcheck(above_minus_one, (raw[1:-1],))


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="transforms must be at least 1, got 0"):
        Planar(2, transforms=0)
    with pytest.raises(ValueError, match="transforms must be at least 1 and context"):
        InverseAutoregressive(2, context=-1)
    with pytest.raises(ValueError, match="rank must be between 1 and the size 2, got 3"):
        Sylvester(2, rank=3)
    with pytest.raises(ValueError, match="bins must be at least 2, got 1"):
        make("spline_coupling", 2, bins=1)
    with pytest.raises(ValueError, match="hidden must name a layer"):
        Monotone(2, hidden=())
    with pytest.raises(ValueError, match="base must name a family, got 'gauss'"):
        Radial(2, base="gauss")
    with pytest.raises(ValueError, match="needs a density, and Delta has none"):
        Radial(2, base="delta")
    with pytest.raises(ValueError, match="size 2, got 3"):
        Radial(2, base=lambda size: Normal(size + 1))
    with pytest.raises(TypeError, match="returned int"):
        Radial(2, base=lambda size: size)  # type: ignore[arg-type, return-value]
    with pytest.raises(NotImplementedError, match="needs 3 reflections, this family has 2"):
        Householder(4, transforms=2).of_gaussian(torch.zeros(4), torch.eye(4))
    assert positive(torch.tensor(inverse_softplus(1.0))) == pytest.approx(1.0)

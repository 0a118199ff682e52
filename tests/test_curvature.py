"""Hessians of the energy: Gauss-Newton of any program, kinks, constrained sites."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.diagnostics import elbo, log_evidence
from guides.energy import LogJoint
from guides.gauss_newton import gauss_newton
from guides.inference import (
    IndefiniteHessianError,
    KinkError,
    PredictiveCoding,
    laplace,
)
from guides.inference.curvature import hessian
from guides.inference.newton import newton_direction
from tests.pc_oracles import ORACLES

pytestmark = pytest.mark.usefixtures("float64")

LINEAR = [name for name, build in ORACLES.items() if build().gaussian]


def blocks(program, x, packed=None, **options):
    log_joint = LogJoint(program, (x,))
    if packed is None:
        packed = log_joint.layout.pack(log_joint.predictions())
    return hessian(log_joint, packed, **options)


@pytest.mark.parametrize("name", LINEAR)
def test_gauss_newton_is_the_exact_hessian_of_linear_gaussian_programs(name: str) -> None:
    oracle = ORACLES[name]()
    log_joint = LogJoint(oracle.model, (oracle.x,))
    group = log_joint.layout.group("data")
    packed = {"data": torch.randn(group.shape)}
    found = hessian(log_joint, packed, kind="gauss_newton")["local"]
    exact = hessian(log_joint, packed)["local"]
    assert (found - exact).abs().max() < 1e-10 * exact.abs().max()
    covariance = oracle.model.exact(oracle.x).covariance
    assert (torch.linalg.inv(found) - covariance).abs().max() < 1e-10


def curved(x: Tensor) -> None:
    """Arrow form: a global and two local latents, a network between, a learned width."""
    g = pyro.sample("g", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    width = pyro.sample("width", dist.Normal(g.sum(), 0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tanh(g), 0.7).to_event(1))
        w = pyro.sample("w", dist.Normal(torch.sin(3 * z[..., 0]), width.exp()))
        pyro.sample("x", dist.Normal(z[..., 1] ** 2 + w * g[0], 0.3), obs=x)


def test_gauss_newton_is_the_sum_of_squared_jacobians_in_arrow_form() -> None:
    """Against errors and Jacobians written out by hand, over all latents at once."""
    x = torch.randn(3)
    log_joint = LogJoint(curved, (x,))
    packed = {
        k: torch.randn(g.shape) for k in ("global", "data") if (g := log_joint.layout.group(k))
    }
    found = hessian(log_joint, packed, kind="gauss_newton")

    def errors(flat: Tensor) -> Tensor:
        (g, width), rows = flat[:3].split([2, 1]), flat[3:].reshape(3, 3)
        z, w = rows[:, :2], rows[:, 2]
        parts = [g, (width - g.sum()) / 0.5, (z - torch.tanh(g)) / 0.7]
        parts += [(w - torch.sin(3 * z[:, 0])) / width.exp()]
        parts += [(x - z[:, 1] ** 2 - w * g[0]) / 0.3]
        return torch.cat([part.flatten() for part in parts])

    flat = torch.cat([packed["global"], packed["data"].flatten()])
    jacobian = torch.autograd.functional.jacobian(errors, flat)
    dense = jacobian.T @ jacobian
    assert torch.allclose(found["global"], dense[:3, :3], atol=1e-10)
    for n in range(3):
        part = slice(3 + 3 * n, 6 + 3 * n)
        assert torch.allclose(found["local"][n], dense[part, part], atol=1e-10)
        assert torch.allclose(found["cross"][n], dense[part, :3], atol=1e-10)
    assert torch.linalg.eigvalsh(dense)[0] > 0


def test_minibatches_scale_the_globals_alone() -> None:
    def program(x: Tensor, size=None) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(g, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    x = torch.tensor([1.0, 4.0])
    point = {"global": torch.tensor([0.2]), "data": torch.tensor([[0.3], [0.5]])}
    found = hessian(LogJoint(program, (x,), {"size": 10}), point, kind="gauss_newton")
    assert torch.allclose(found["local"].flatten(), 1 + point["data"].exp().flatten())
    assert torch.allclose(found["cross"].flatten(), -torch.ones(2))
    assert torch.allclose(found["global"].flatten(), torch.tensor(1.0 + 10))


# name: latent -> distribution of the data, and its Fisher information in the latent
LIKELIHOODS = {
    "bernoulli": (lambda z: dist.Bernoulli(logits=z), lambda z: z.sigmoid() * (-z).sigmoid()),
    "bernoulli_probs": (
        lambda z: dist.Bernoulli(probs=z.sigmoid()),
        lambda z: z.sigmoid() * (-z).sigmoid(),
    ),
    "binomial": (lambda z: dist.Binomial(7, logits=z), lambda z: 7 * z.sigmoid() * (-z).sigmoid()),
    "poisson": (lambda z: dist.Poisson(z.exp()), torch.exp),
    "exponential": (lambda z: dist.Exponential(z.exp()), torch.ones_like),
    "gamma": (lambda z: dist.Gamma(3.0, z.exp()), lambda z: 3 * torch.ones_like(z)),
    "normal_scale": (lambda z: dist.Normal(0.0, z.exp()), lambda z: 2 * torch.ones_like(z)),
    "laplace": (lambda z: dist.Laplace(z, 0.5), lambda z: 4 * torch.ones_like(z)),
    "laplace_scale": (lambda z: dist.Laplace(0.0, z.exp()), torch.ones_like),
    "cauchy": (lambda z: dist.Cauchy(z, 0.5), lambda z: 2 * torch.ones_like(z)),
    "student": (lambda z: dist.StudentT(5.0, z, 0.5), lambda z: 3 * torch.ones_like(z)),
    "student_scale": (lambda z: dist.StudentT(5.0, 0.0, z.exp()), lambda z: 1.25 + 0 * z),
    "lognormal": (lambda z: dist.LogNormal(z, 0.5), lambda z: 4 * torch.ones_like(z)),
    "masked": (lambda z: dist.Normal(z, 0.5).mask(False), torch.zeros_like),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_an_observed_site_contributes_its_fisher_information(name: str) -> None:
    build, information = LIKELIHOODS[name]

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", build(z), obs=x)

    z = torch.tensor([-0.7, 0.2, 1.1])
    found = blocks(program, torch.ones(3), {"data": z.unsqueeze(-1)}, kind="gauss_newton")
    assert torch.allclose(found["local"].flatten(), 1 + information(z), atol=1e-10)


# name: family, its mode in unconstrained space with the Jacobian, the curvature there by hand
FAMILIES = {
    "gamma": (lambda: dist.Gamma(3.0, 2.0), 1.5, 3.0),  # log space: a u - b e^u, curvature a
    "inverse_gamma": (lambda: dist.InverseGamma(3.0, 2.0), 2 / 3, 3.0),
    "beta": (lambda: dist.Beta(2.0, 3.0), 0.4, 1.2),  # logit space: a b / (a + b)
    "lognormal": (lambda: dist.LogNormal(0.3, 0.5), math.exp(0.3), 4.0),
    "half_normal": (lambda: dist.HalfNormal(2.0), 2.0, 2.0),
    "exponential": (lambda: dist.Exponential(2.0), 0.5, 1.0),
    "uniform": (lambda: dist.Uniform(1.0, 3.0), 2.0, 0.5),
    "student": (lambda: dist.StudentT(5.0, 1.0, 0.5), 1.0, 4.8),
    "von_mises": (lambda: dist.VonMises(torch.tensor(0.5), torch.tensor(3.0)), 0.5, 3.0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_constrained_sites_have_their_mode_and_curvature(name: str) -> None:
    """T23d, for every family: with the Jacobian, in unconstrained space."""
    build, value, curvature = FAMILIES[name]

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", build())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    pc = PredictiveCoding(program, pyro.optim.SGD({}), num_steps=30)
    x = torch.zeros(2)
    exact = pc.posterior(x)
    assert torch.allclose(exact.locations(x)["z"], torch.tensor(value), atol=1e-6)
    assert torch.allclose(exact.covariance("data").flatten(), torch.tensor(1 / curvature))
    if name != "student":  # its Fisher information is not the curvature at the mode
        other = pc.posterior(x, hessian="gauss_newton")
        assert torch.allclose(other.covariance("data").flatten(), torch.tensor(1 / curvature))


def test_without_the_jacobian_a_gamma_settles_at_its_own_mode() -> None:
    """T23d: (a - 1) / b in constrained space, a / b in log space."""

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(3.0, 2.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for jacobian, expected in ((False, 2 / 2.0), (True, 3 / 2.0)):
        pc = PredictiveCoding(program, pyro.optim.SGD({}), num_steps=300, jacobian=jacobian)
        assert torch.allclose(pc.infer(torch.zeros(1))["z"], torch.tensor(expected), atol=1e-6)


def test_a_dirichlet_settles_at_its_mode() -> None:
    """Stick-breaking coordinates: the mode with the Jacobian is the mean."""
    alpha = torch.tensor([1.0, 2.0, 0.5])

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(alpha))
            pyro.sample("x", dist.Multinomial(probs=z, validate_args=False), obs=x)

    x = torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    pc = PredictiveCoding(program, pyro.optim.SGD({}), num_steps=30)
    posterior = pc.posterior(x, hessian="gauss_newton")
    mean = (x + alpha) / (x + alpha).sum(-1, keepdim=True)
    assert torch.allclose(posterior.locations(x)["z"], mean, atol=1e-6)
    # prior: exact; counts: n (diag p - p p^T) of the logits, pulled back
    to = torch.distributions.biject_to(dist.Dirichlet(alpha).support)
    for row, n, p in zip(range(2), x.sum(-1), mean, strict=True):
        u = to.inv(p)

        def prior(u: Tensor) -> Tensor:
            return -dist.Dirichlet(alpha).log_prob(to(u)) - to.log_abs_det_jacobian(u, to(u))

        jacobian = torch.autograd.functional.jacobian(lambda u: to(u).log(), u)
        expected = torch.autograd.functional.hessian(prior, u)
        expected = expected + n * jacobian.T @ (p.diag() - torch.outer(p, p)) @ jacobian
        found = posterior.covariance("data")[row]
        assert torch.allclose(found, torch.linalg.inv(expected), atol=1e-6)


CHILDREN = {
    "gamma": lambda z: dist.Gamma(2.0 + z[..., 0] ** 2, z[..., 1].exp()),
    "beta": lambda z: dist.Beta(z[..., 0].exp(), z[..., 1].exp()),
    "student": lambda z: dist.StudentT(3.0, z[..., 0] ** 3, z[..., 1].exp()),
    "normal": lambda z: dist.Normal(z[..., 0] ** 3, z[..., 1].exp()),
    "laplace": lambda z: dist.Laplace(z[..., 0] ** 3, z[..., 1].exp()),
    "lognormal": lambda z: dist.LogNormal(z[..., 0], z[..., 1].exp()),
    "half_cauchy": lambda z: dist.HalfCauchy((z[..., 0] * z[..., 1]).exp()),
    "von_mises": lambda z: dist.VonMises(0.0, 1e-3 + z[..., 1].exp()),
}
DATA = {
    "poisson": lambda v, z: dist.Poisson((v + z.sum(-1)).exp()),
    "negative_binomial": lambda v, z: dist.NegativeBinomial(3.0, logits=v * z[..., 0]),
    "beta_binomial": lambda v, z: dist.BetaBinomial(v.exp(), z[..., 1].exp(), 5),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("child", CHILDREN)
def test_gauss_newton_is_positive_definite_wherever_it_is_taken(child: str, data: str) -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            v = pyro.sample("v", CHILDREN[child](z))
            pyro.sample("x", DATA[data](v.clamp(-3, 3), z), obs=x)

    generator = torch.Generator().manual_seed(3)
    point = {"data": torch.randn(20, 3, generator=generator)}
    if child == "von_mises":
        point["data"][:, 2] *= 0.3  # on the side of the circle where the density is log-concave
    x = torch.arange(20.0) % 5
    found = blocks(program, x, point, kind="gauss_newton")["local"]
    values = torch.linalg.eigvalsh(found)
    assert (values[:, 0] > 1e-12 * values[:, -1]).all()
    indefinite = torch.linalg.eigvalsh(blocks(program, x, point)["local"])[:, 0] < 0
    assert indefinite.any() or child == "von_mises"


def test_scales_and_masks_of_the_user_act_on_every_term() -> None:
    mask = torch.tensor([True, False])

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with pyro.poutine.scale(scale=3.0):
                z = pyro.sample("z", dist.Gamma(2.0, 1.5))
            with pyro.poutine.mask(mask=mask):
                pyro.sample("x", dist.Poisson(z), obs=x)

    u = torch.tensor([[0.3], [-0.4]])
    found = blocks(program, torch.ones(2), {"data": u}, kind="gauss_newton")["local"].flatten()
    rate = u.exp().flatten()  # prior: 3 b e^u; data: Fisher information of log rate
    assert torch.allclose(found, 3 * 1.5 * rate + mask * rate)


@pytest.mark.parametrize("kind", ["exact", "gauss_newton"])
def test_scales_of_the_user_leave_the_log_determinant_alone(kind: str) -> None:
    def model() -> None:
        with pyro.poutine.scale(scale=3.0):
            pyro.sample("p", dist.Beta(2.0, 4.0))

    u = torch.tensor([0.4])
    found = hessian(LogJoint(model, ()), {"global": u}, kind=kind)["global"]
    # -(3 (a - 1) + 1) log s - (3 (b - 1) + 1) log (1 - s), twice differentiated in u.
    s = u.sigmoid()
    expected = ((3 * 1 + 1) + (3 * 3 + 1)) * s * (1 - s)
    torch.testing.assert_close(found, expected.reshape(1, 1))


def test_factors_keep_their_exact_hessian() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", -3 * (z - x) ** 2)

    found = blocks(program, torch.zeros(2), {"data": torch.randn(2, 1)}, kind="gauss_newton")
    assert torch.allclose(found["local"].flatten(), torch.tensor(7.0))


def test_noncentered_coordinates_have_a_curvature_of_their_own() -> None:
    oracle = ORACLES["chain2"]()
    log_joint = LogJoint(oracle.model, (oracle.x,))
    names = tuple(log_joint.layout.sites)
    point = {"data": torch.randn(log_joint.layout.group("data").shape)}
    energy = gauss_newton(log_joint, point, noncentered=names)

    def exact(p: dict[str, Tensor]) -> Tensor:
        return -log_joint.total(*log_joint.packed(p, noncentered=names))

    take = torch.autograd.functional.hessian
    one = take(lambda v: energy({"data": v})[0], point["data"])
    two = take(lambda v: exact({"data": v}), point["data"])
    assert torch.allclose(one, two, atol=1e-10)


def sparse(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Laplace(torch.zeros(2), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_a_kink_at_the_mode_is_refused_by_name() -> None:
    """|x| below 1 / scale = 2 shrinks to zero exactly: soft thresholding."""
    x = torch.tensor([[5.0, 4.0], [5.0, 1.0]])
    at = {"z": torch.tensor([[3.0, 2.0], [3.0, 0.0]])}
    with pytest.raises(KinkError, match=r"site 'z' has a kink .* in 1 of 2 rows.*gauss_newton"):
        laplace(sparse, at, (x,))
    found = laplace(sparse, at, (x,), hessian="gauss_newton")
    assert torch.allclose(found.covariance("data"), torch.eye(2) / (1 + 4))
    assert "Gauss-Newton" in repr(found)
    # away from the kink nothing is wrong with the exact one
    smooth = laplace(sparse, {"z": at["z"][:1]}, (x[:1],))
    assert torch.allclose(smooth.covariance("data"), torch.eye(2))


def test_a_kink_between_sites_is_found_where_predictive_coding_stops() -> None:
    def hinge(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 1.0))
            pyro.sample("x", dist.Laplace(z, 0.2), obs=x)  # mode at z = x exactly

    pc = PredictiveCoding(hinge, pyro.optim.SGD({}), num_steps=60)
    x = torch.tensor([0.5, 1.0])
    with pytest.raises(KinkError, match=r"site 'x' has a kink at these latents along latent 'z'"):
        pc.posterior(x)
    found = pc.posterior(x, hessian="gauss_newton")
    assert torch.allclose(found.covariance("data").flatten(), torch.tensor(1 / 26))


def test_smooth_but_sharp_densities_are_no_kinks() -> None:
    def sharp(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0.0, 1e-3))
            w = pyro.sample("w", dist.Normal(z, 1e-4))
            pyro.sample("x", dist.StudentT(2.0, 100 * w, 1e-3), obs=x)

    PredictiveCoding(sharp, pyro.optim.SGD({}), num_steps=50).posterior(torch.zeros(2))


def test_an_indefinite_hessian_names_the_site_and_the_way_on() -> None:
    def saddle(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x = torch.tensor([4.0])
    with pytest.raises(
        IndefiniteHessianError, match=r"at site 'z'.*pass hessian=\"gauss_newton\""
    ):
        laplace(saddle, {"z": torch.zeros(1)}, (x,))
    found = laplace(saddle, {"z": torch.ones(1)}, (x,), hessian="gauss_newton")
    assert torch.allclose(found.covariance("data").flatten(), torch.tensor(1 / 17))

    def improper(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (len(x),), ()))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    with pytest.raises(IndefiniteHessianError, match=r"Every latent needs a proper prior"):
        laplace(improper, {"z": torch.zeros(1)}, (x,), hessian="gauss_newton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [2.0**-10, 2.0**-20])
def test_a_laplace_posterior_does_not_know_the_units_of_the_latents(
    apart: float, dtype: torch.dtype
) -> None:
    """Gaussians of correlation .6, a saddle and a flat direction, in units far apart."""
    units = torch.tensor([1.0, apart], dtype=dtype)
    prior = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=dtype)

    def linear(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            covariance = prior * units * units[:, None]
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros_like(units), covariance))
            pyro.sample("x", dist.Normal(z, units).to_event(1), obs=x)

    x = torch.ones(2, 2, dtype=dtype) * units
    found = laplace(linear, {"z": torch.zeros_like(x)}, (x,)).covariance("data")
    exact = torch.linalg.inv(torch.linalg.inv(prior.double()) + torch.eye(2))
    error = (found.double() / units / units[:, None] - exact).abs().max()
    assert error < 30 * torch.finfo(dtype).eps

    def saddle(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            wide = pyro.sample("wide", dist.Normal(torch.zeros_like(units[0]), 1.0))
            narrow = pyro.sample("narrow", dist.Normal(torch.zeros_like(units[0]), units[1]))
            pyro.sample("x", dist.Normal(wide**2, 0.5), obs=x)
            pyro.sample("y", dist.Normal(narrow, units[1]), obs=x)

    x = torch.tensor([0.1, 4.0], dtype=dtype)
    with pytest.raises(IndefiniteHessianError, match=r"at site 'wide' in 1 of 2 rows"):
        laplace(saddle, {"wide": torch.zeros_like(x), "narrow": torch.zeros_like(x)}, (x,))

    def flat(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            narrow = pyro.sample("narrow", dist.Normal(torch.zeros_like(units[0]), units[1]))
            real = dist.constraints.real
            wide = pyro.sample("wide", dist.ImproperUniform(real, (len(x),), ()))
            pyro.sample("x", dist.Normal(narrow + 0 * wide, units[1]), obs=x)

    with pytest.raises(IndefiniteHessianError, match=r"at site 'wide' in 2 of 2 rows"):
        laplace(flat, {"wide": torch.zeros_like(x), "narrow": torch.zeros_like(x)}, (x,))


def test_the_diagonal_posterior_is_the_best_mean_field_one() -> None:
    """T23g: E* <= ELBO(mean field) <= ELBO(full) = log p(x), mean field in closed form."""
    oracle = ORACLES["fork_merge"]()
    pc = PredictiveCoding(oracle.model, pyro.optim.SGD({}), num_steps=10)
    diagonal = pc.posterior(oracle.x, hessian="diagonal")
    full = pc.posterior(oracle.x)
    precision = torch.linalg.inv(oracle.model.exact(oracle.x).covariance)
    assert torch.allclose(
        diagonal.covariance("data"), torch.diag(1 / precision.diagonal()).expand(3, -1, -1)
    )
    # KL(q || p) of two Gaussians with the same mean
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    score = elbo(oracle.model, diagonal, oracle.x, num_samples=2000)
    expected = oracle.log_evidence - gap
    assert ((score.rows - expected).abs() < 5 * score.rows_error).all()
    exact = log_evidence(oracle.model, full, oracle.x, num_samples=2).rows
    assert torch.allclose(exact, oracle.log_evidence, atol=1e-8)
    assert (expected <= exact).all()


def test_an_unknown_hessian_is_refused() -> None:
    with pytest.raises(ValueError, match="hessian must be one of exact, gauss_newton, diagonal"):
        laplace(sparse, {"z": torch.zeros(1, 2)}, (torch.zeros(1, 2),), hessian="full")


@pytest.mark.usefixtures("float64")
def test_gauss_newton_of_a_pushed_gaussian_is_that_of_its_residuals() -> None:
    """A value exp(y), y ~ Normal(f(z), s(z)): J'J of the standardized residual, by autodiff."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc, scale = z.tanh(), 0.5 + z.square()
            base = dist.Normal(loc, scale).to_event(1)
            moves = [dist.transforms.AffineTransform(z, 2.0), dist.transforms.ExpTransform()]
            pyro.sample("x", dist.TransformedDistribution(base, moves), obs=x)

    x, z = torch.rand(3, 2) + 0.5, torch.randn(3, 2)
    joint = LogJoint(model, (x,))
    found = hessian(joint, {"data": z}, kind="gauss_newton")["local"]
    for row in range(3):

        def residual(z: torch.Tensor, x: torch.Tensor = x[row]) -> torch.Tensor:
            y = (x.log() - z) / 2.0
            return (y - z.tanh()) / (0.5 + z.square())

        jacobian = torch.func.jacrev(residual)(z[row])
        expected = torch.eye(2) + jacobian.mT @ jacobian
        assert (found[row] - expected).abs().max() < 1e-9


def test_a_hessian_that_is_not_finite_is_refused_by_name() -> None:
    blocks = {"local": torch.eye(2).expand(3, 2, 2).clone()}
    blocks["local"][1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"needs a finite Hessian.*Start from a guide"):
        newton_direction({"data": torch.ones(3, 2)}, blocks, 1.0)
    # Entries of far different sizes, which no rounding may turn into an error.
    for dtype in (torch.float32, torch.float64):
        root = torch.diag(torch.logspace(-12, 12, 7, dtype=dtype)) + torch.ones(7, 7, dtype=dtype)
        wide = {"local": (root @ root.T).expand(2, 7, 7)}
        step = newton_direction({"data": torch.ones(2, 7, dtype=dtype)}, wide, 1.0)["data"]
        assert torch.isfinite(step).all()
        assert (step.sum(-1) > 0).all()  # downhill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1e2, 1e8])
def test_newton_steps_do_not_know_the_units_of_the_latents(
    spread: float, dtype: torch.dtype
) -> None:
    """In units D the step is D^-1 that of one unit; the oracle is solved in double precision."""
    torch.manual_seed(0)
    root = torch.randn(4, 5, 5)
    full = root @ root.mT + torch.eye(5)  # four matrices of well-conditioned arrows
    down = torch.randn(4, 3), torch.randn(2).double()
    scale = 2.5
    couple = scale * full[:, :3, 3:]  # with N/B in it
    glob = scale * full[:, 3:, 3:].sum(0)
    matrix = torch.zeros(14, 14)
    for n in range(4):
        own = slice(3 * n, 3 * n + 3)
        matrix[own, own], matrix[own, 12:] = scale * full[n, :3, :3], couple[n]
    matrix[12:, :12], matrix[12:, 12:] = matrix[:12, 12:].mT, glob
    exact = torch.linalg.solve(matrix, torch.cat([scale * down[0].flatten(), down[1]]))
    # Powers of two, which round nothing.
    units = 2.0 ** torch.linspace(-1, 1, 5).mul(math.log2(spread) / 2).round()
    local, top = units[:3], units[3:]
    step = newton_direction(
        {"data": (scale * down[0] / local).to(dtype), "global": (down[1] / top).to(dtype)},
        {
            "local": (full[:, :3, :3] / local[:, None] / local).to(dtype),
            "cross": (full[:, :3, 3:] / local[:, None] / top).to(dtype),
            "global": (glob / top[:, None] / top).to(dtype),
        },
        scale,
    )
    slack = 100 * torch.finfo(dtype).eps * exact.abs().max()
    assert (step["data"].double() / local - exact[:12].reshape(4, 3)).abs().max() < slack
    assert (step["global"].double() / top - exact[12:]).abs().max() < slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1.0, 2.0**-13, 2.0**13])
def test_newton_steps_leave_saddles_in_any_units(unit: float, dtype: torch.dtype) -> None:
    """One row is a saddle: eigenvalues 3 and -1, whose absolute values make [[2, 1], [1, 2]]."""
    units = torch.tensor([1.0, unit], dtype=dtype)
    saddle = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=dtype)
    bowl = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype)
    blocks = {"local": torch.stack([saddle, bowl]) / units / units[:, None]}
    down = torch.tensor([[1.0, -4.0], [1.0, -4.0]], dtype=dtype)
    step = newton_direction({"data": down / units}, blocks, 1.0)["data"] / units
    exact = torch.tensor([2.0, -3.0], dtype=dtype).expand(2, 2)
    torch.testing.assert_close(step, exact, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_newton_steps_leave_a_saddle_without_a_diagonal() -> None:
    """Eigenvalues 1 and -1; and a matrix of zeros, where any step down is a good one."""
    for dtype in (torch.float32, torch.float64):
        saddle = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)
        blocks = {"local": torch.stack([saddle, torch.zeros_like(saddle)])}
        down = torch.tensor([[0.3, -2.0], [0.0, 0.0]], dtype=dtype)
        step = newton_direction({"data": down}, blocks, 1.0)["data"]
        torch.testing.assert_close(step, down, rtol=0, atol=4 * torch.finfo(dtype).eps)

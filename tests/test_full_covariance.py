"""Full covariances in the VAE and its hierarchy: lateral weights, triangular or symmetric."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

import guides
import zoo
from guides.diagnostics import elbo
from guides.energy import LogJoint
from guides.inference import PredictiveCoding
from zoo.covariance import Covariance, floored

pytestmark = pytest.mark.usefixtures("float64")

KINDS = Covariance.parameterizations


def linear(likelihood: str, prior: str, seed: int = 0) -> zoo.VAE:
    """A linear VAE, 4 features of 2 latents, away from where it starts."""
    model = zoo.VAE(
        4,
        2,
        hidden=(),
        likelihood="gaussian",
        likelihood_covariance=likelihood,
        prior_covariance=prior,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def pieces(model: zoo.VAE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, bias, S_x and S_z, read off what the model draws from."""
    output = model.likelihood.output
    noise = model.decode(torch.zeros(2))
    prior = model.prior()
    wide = [
        fn.covariance_matrix if hasattr(fn, "scale_tril") else fn.variance.diag()
        for fn in (noise, prior)
    ]
    return output.weight.detach(), output.bias.detach(), wide[0].detach(), wide[1].detach()


@pytest.mark.parametrize("prior", ["unit", *KINDS])
@pytest.mark.parametrize("likelihood", ["isotropic", "diagonal", *KINDS])
def test_the_linear_vae_has_its_closed_form_evidence(likelihood: str, prior: str) -> None:
    """Log joint minus log posterior is log evidence at whatever z."""
    model = linear(likelihood, prior)
    weight, bias, s_x, s_z = pieces(model)
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    evidence = MultivariateNormal(bias, weight @ s_z @ weight.mT + s_x).log_prob(x)
    precision = torch.linalg.inv(s_z) + weight.mT @ torch.linalg.inv(s_x) @ weight
    mean = (x - bias) @ (torch.linalg.inv(precision) @ weight.mT @ torch.linalg.inv(s_x)).mT
    posterior = MultivariateNormal(mean, precision_matrix=precision)
    rows, _ = LogJoint(model, (x,)).rows({"z": z})
    assert (rows - posterior.log_prob(z) - evidence).abs().max() < 1e-9
    # Precision-weighted errors: what relaxes is drawn by S_x^-1 (x - prediction).
    model.requires_grad_(False)
    loop = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.0}), num_steps=100, solver="newton")
    assert (loop.infer(x)["z"] - mean).abs().max() < 1e-8
    off = s_x - s_x.diagonal().diag()
    assert (off.abs().max() > 0.05) == (likelihood in KINDS)
    assert (s_z[0, 1].abs() > 0.01) == (prior != "unit")


def test_both_parameterizations_of_one_covariance_are_one_density() -> None:
    """The symmetric model, and the triangular one set to the same covariances."""
    symmetric, triangular = (linear(kind, kind) for kind in reversed(KINDS))
    for mine, its in (
        (triangular.likelihood.lateral, symmetric.likelihood.lateral),
        (triangular.prior_covariance, symmetric.prior_covariance),
    ):
        assert mine is not None
        assert its is not None
        with torch.no_grad():
            factor = torch.linalg.cholesky(its.scale @ its.scale.mT)
            rows, columns = torch.tril_indices(len(factor), len(factor), -1)
            mine.log_scale.copy_(factor.diagonal().log())
            mine.lateral.copy_(factor[rows, columns])
    triangular.likelihood.output.load_state_dict(symmetric.likelihood.output.state_dict())
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    one, _ = LogJoint(symmetric, (x,)).rows({"z": z})
    other, _ = LogJoint(triangular, (x,)).rows({"z": z})
    assert (one - other).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_learning_reaches_maximum_likelihood_which_independent_features_cannot(kind: str) -> None:
    """One latent, three features that are correlated otherwise: any covariance is in reach."""
    torch.manual_seed(0)
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.9, 0.3]])
    x = torch.randn(400, 3) @ mix.mT
    best = MultivariateNormal(x.mean(0), x.mT.cov(correction=0)).log_prob(x).mean()
    found = {}
    for covariance in ("isotropic", kind):
        model = zoo.VAE(3, 1, hidden=(), likelihood="gaussian", likelihood_covariance=covariance)
        guide = guides.make("amortized_multivariate_normal", model, x, hidden=())
        optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985})
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(250):
            svi.step(x)
        found[covariance] = float(elbo(model, guide, x, num_samples=20).rows.mean())
    assert found["isotropic"] < best - 0.2
    assert best - 0.02 < found[kind] < best + 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_covariance_has_a_floor_in_every_direction(kind: str) -> None:
    model = zoo.VAE(4, 2, hidden=(), likelihood="gaussian", likelihood_covariance=kind)
    start = model.decode(torch.zeros(2)).covariance_matrix
    assert (start - torch.eye(4)).abs().max() < 1e-12
    assert torch.allclose(model.likelihood.scale, torch.ones(4))
    with torch.no_grad():
        model.likelihood.lateral.log_scale.fill_(-50.0)
    smallest = torch.linalg.eigvalsh(model.decode(torch.zeros(2)).covariance_matrix.detach())[0]
    assert float(smallest) == pytest.approx(model.likelihood.min_scale**2, rel=1e-6)
    hierarchy = zoo.HierarchicalVAE(4, (3, 2), hidden=(3,), prior_covariance=kind)
    (level,) = hierarchy.levels
    with torch.no_grad():
        level.lateral.log_scale.fill_(-50.0)
    smallest = torch.linalg.eigvalsh(level(torch.randn(5, 2)).covariance_matrix)[:, 0]
    assert torch.allclose(smallest, torch.full((5,), level.min_scale**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_factor_with_a_floor_is_cholesky_without_the_square(dtype: torch.dtype) -> None:
    """Also for lateral weights whose square has no factor in single precision."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 300.0):
        factor = torch.eye(20).to(dtype)
        factor = factor + size * torch.randn(3, 20, 20, generator=generator).to(dtype).tril(-1)
        whole = factor.double() @ factor.double().mT + 0.01**2 * torch.eye(20)
        found = floored(factor, 0.01)
        assert found.dtype == dtype
        assert (found.diagonal(dim1=-2, dim2=-1) > 0).all()
        assert torch.equal(found, found.tril())
        again = (found @ found.mT).double()
        assert (again - whole).abs().max() < 100 * torch.finfo(dtype).eps * whole.abs().max()
    single = whole.float()
    assert torch.linalg.cholesky_ex(single).info.any(), "what the factor is there for"
    small = torch.randn(3, 3, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: floored(a, 0.1), (small,))


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_of_the_hierarchy_has_lateral_weights(kind: str) -> None:
    """The log joint written out, with the weights of a level turned by its own scales."""
    model = zoo.HierarchicalVAE(
        4,
        (3, 2),
        hidden=(3,),
        likelihood="gaussian",
        likelihood_covariance=kind,
        prior_covariance=kind,
    )
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.4 * torch.randn(value.shape))
    x, z1, z2 = torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 2)
    (level,) = model.levels
    features = level.network(z2)
    own = torch.nn.functional.softplus(level.raw_scale(features))
    inner = level.lateral.scale @ level.lateral.scale.mT
    covariance = own[:, :, None] * inner * own[:, None, :] + 0.05**2 * torch.eye(3)
    top = model.prior_covariance.scale
    noise = model.likelihood.lateral.scale
    expected = MultivariateNormal(torch.zeros(2), top @ top.mT).log_prob(z2)
    expected = expected + MultivariateNormal(level.loc(features), covariance).log_prob(z1)
    loc = model.likelihood.output(model.network(z1))
    wide = noise @ noise.mT + 0.01**2 * torch.eye(4)
    expected = expected + MultivariateNormal(loc, wide).log_prob(x)
    rows, _ = LogJoint(model, (x,)).rows({"z1": z1, "z2": z2})
    assert (rows - expected).abs().max() < 1e-9


def test_bad_covariances_say_what_is_wrong() -> None:
    def refused(message: str, **options: Any) -> None:
        for name, sizes in (("vae", {"z_dim": 2}), ("hierarchical_vae", {"z_dims": (3, 2)})):
            with pytest.raises(ValueError, match=message):
                zoo.make(name, x_dim=4, **sizes, **options)

    refused("has no covariance to learn, got 'cholesky'", likelihood_covariance="cholesky")
    refused(
        "must be one of isotropic, diagonal, cholesky, symmetric, got 'full'",
        likelihood="gaussian",
        likelihood_covariance="full",
    )
    refused(
        "prior_covariance must be one of .*, cholesky, symmetric, got 'f", prior_covariance="f"
    )
    likelihood = zoo.VAE(4, 2, likelihood="gaussian").likelihood
    with pytest.raises(ValueError, match="Independent features have no factor"):
        likelihood.scale_tril  # noqa: B018
    output = torch.nn.Conv2d(1, 1, 1)
    output.bias = torch.nn.Parameter(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"one of vectors, but rows have shape \(1, 2, 2\)"):
        type(likelihood)(output, covariance="cholesky")

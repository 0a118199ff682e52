"""Everything that infers, held against the exact posterior of linear Gaussian chains."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

import guides
import zoo
from guides.diagnostics import elbo, log_evidence, pareto_khat
from guides.inference import SVI, PredictiveCoding, relaxation
from guides.inference.curvature import hessian

DEPTHS = {1: (3, 5), 2: (2, 3, 5), 3: (2, 2, 3, 5)}


pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=DEPTHS, ids=lambda depth: f"depth{depth}")
def chain(request: pytest.FixtureRequest) -> tuple[zoo.LinearGaussian, torch.Tensor]:
    torch.manual_seed(request.param)
    model = zoo.LinearGaussian(dims=DEPTHS[request.param], covariance="full")
    with torch.no_grad():
        x = model(size=4).detach()
    return model, x


def exact_mean(model: zoo.LinearGaussian, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return model.split(model.posterior(x).mean.detach())


def relaxed(model: zoo.LinearGaussian, **options: object) -> PredictiveCoding:
    adam = pyro.optim.Adam({"lr": 1e-3})
    return PredictiveCoding(model, adam, num_steps=20_000, tolerance=1e-9, **options)


@pytest.mark.parametrize("parameterization", ["centered", "noncentered"])
def test_predictive_coding_settles_at_the_exact_posterior_mean(chain, parameterization) -> None:
    model, x = chain
    inferred = relaxed(model, parameterization=parameterization).infer(x)
    for name, mean in exact_mean(model, x).items():
        assert (inferred[name] - mean).abs().max() < 1e-6


def test_the_laplace_posterior_has_the_exact_evidence_and_covariance(chain) -> None:
    """Log w is then constant, so one draw gives log p(x) and k-hat has no tail to fit."""
    model, x = chain
    posterior = relaxed(model).posterior(x)
    score = log_evidence(model, posterior, x, num_samples=3)
    assert (score.rows - model.log_evidence(x)).abs().max() < 1e-8
    assert (
        elbo(model, posterior, x, num_samples=2).rows - model.log_evidence(x)
    ).abs().max() < 1e-8
    assert (pareto_khat(model, posterior, x, num_samples=50).rows == -torch.inf).all()
    # Packed latents are in the order of the program, which is top first, as posterior(x).
    exact = model.posterior(x).covariance_matrix
    assert torch.allclose(posterior.covariance("data"), exact, atol=1e-9)


def fit(model: object, name: str, x: torch.Tensor, num_steps: int) -> guides.Guide:
    """SVI with the model frozen and a learning rate that falls to a thousandth."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    guide = guides.make(name, model, x, init_scale=0.5)
    decay = 1e-3 ** (1 / num_steps)
    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": decay})
    objective = Trace_ELBO(num_particles=32, vectorize_particles=True)
    SVI(model, guide, optim, objective).run(num_steps, ((x,), {}))
    return guide


def gaussian_of(guide: guides.Guide, x: torch.Tensor) -> torch.distributions.MultivariateNormal:
    lam = guide.parameters_of(x)["data"].detach()
    q = guide.families["data"].distribution(lam)
    covariance = (
        q.covariance_matrix if hasattr(q, "covariance_matrix") else q.variance.diag_embed()
    )
    return torch.distributions.MultivariateNormal(q.mean, covariance)


def test_full_covariance_reaches_the_log_evidence(chain) -> None:
    model, x = chain
    guide = fit(model, "multivariate_normal", x, 1500)
    score = elbo(model, guide, x, num_samples=4000)
    gap = model.log_evidence(x) - score.rows
    assert (gap.abs() < 1e-3 + 3 * score.rows_error).all()
    # The same gap in closed form, free of Monte Carlo error.
    kl = torch.distributions.kl_divergence(gaussian_of(guide, x), model.posterior(x))
    assert kl.max() < 1e-3


def test_mean_field_reaches_its_closed_form_gap(chain) -> None:
    model, x = chain
    guide = fit(model, "normal", x, 1500)
    precision = model.posterior(x).precision_matrix
    diagonal = precision.diagonal(dim1=-2, dim2=-1)
    gap = 0.5 * (diagonal.log().sum(-1) - torch.logdet(precision))  # (B,)
    kl = torch.distributions.kl_divergence(gaussian_of(guide, x), model.posterior(x))
    assert (kl - gap).abs().max() < 1e-2
    score = elbo(model, guide, x, num_samples=20_000)
    measured = model.log_evidence(x) - score.rows
    assert ((measured - gap).abs() < 1e-2 + 3 * score.rows_error).all()
    assert gap.min() > 0.01, "the chain must have posterior correlations, or this tests nothing"


def test_importance_weighted_bounds_rise_with_the_number_of_draws(chain) -> None:
    model, x = chain
    guide = fit(model, "normal", x, 300)
    repeats = 200
    means, errors = [], []
    for num_samples in (1, 5, 25, 125):
        bounds = torch.stack(
            [log_evidence(model, guide, x, num_samples=num_samples).rows for _ in range(repeats)]
        ).sum(-1)
        means.append(bounds.mean())
        errors.append(bounds.std() / repeats**0.5)
    exact = model.log_evidence(x).sum()
    for i in range(3):
        assert means[i] <= means[i + 1] + 2 * (errors[i] ** 2 + errors[i + 1] ** 2).sqrt()
    assert means[-1] <= exact + 2 * errors[-1]
    assert means[1] - means[0] > 2 * errors[0], "five draws must tighten the bound visibly"


def test_gradient_relaxation_converges_below_and_diverges_above_the_stability_bound(chain) -> None:
    """Plain gradient descent on a quadratic: stable iff step < 2 / lambda_max.

    A fixed point test cannot see a wrong scale of the gradient; this one can.
    """
    model, x = chain
    log_joint = guides.energy.LogJoint(model, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    largest = torch.linalg.eigvalsh(hessian(log_joint, packed)["local"])[0, -1]
    found = relaxation.curvature(relaxation.energy_function(log_joint, jacobian=True), packed, 1.0)
    assert torch.allclose(found["data"], largest, rtol=0.05)
    mean = model.posterior(x).mean.detach()
    below = relaxation.relax(
        log_joint, packed, num_steps=20_000, step_size=float(0.95 * 2 / largest), tolerance=1e-9
    )
    assert (below.packed["data"] - mean).abs().max() < 1e-6
    above = [
        relaxation.relax(log_joint, packed, num_steps=n, step_size=float(1.05 * 2 / largest))
        for n in (100, 110, 120)
    ]
    energies = torch.stack([a.energy for a in above])
    assert torch.isfinite(energies).all()
    assert (energies.diff(dim=0) > 0).all()

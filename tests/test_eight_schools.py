"""EightSchools' quadrature, against posteriordb's exact answer and a dense calculation."""

import math

import pytest
import torch
from pyro import poutine

import zoo

pytestmark = pytest.mark.usefixtures("float64")

# posteriordb's eight_schools with normalized priors, by an independent one-dimensional quadrature
# with 20,001 points, good to about 1e-6. Order of theta: the schools'.
LOG_EVIDENCE = -31.3113475
THETA_MEAN = [
    6.2118845,
    4.9401785,
    3.9270043,
    4.7570983,
    3.6154768,
    4.0426125,
    6.2967244,
    4.8542534,
]
THETA_SD = [5.5931265, 4.6742687, 5.2626154, 4.7802976, 4.6574528, 4.8268658, 5.0778489, 5.2908014]
MU, TAU = (4.3968207, 3.3177045), (3.5977061, 3.2199583)


def log_density(model, values) -> torch.Tensor:
    program = poutine.condition(model, data=values)
    return poutine.trace(program).get_trace(model.y).log_prob_sum().detach()


def test_evidence_and_moments_equal_the_reference() -> None:
    model = zoo.EightSchools()
    assert model.log_evidence().item() == pytest.approx(LOG_EVIDENCE, abs=1e-6)
    moments = model.moments()
    for name, expected in {"mu": MU, "tau": TAU, "theta": (THETA_MEAN, THETA_SD)}.items():
        for found, value in zip(moments[name], expected, strict=True):
            torch.testing.assert_close(found, torch.tensor(value), rtol=0, atol=2e-6)


def test_quadrature_has_converged() -> None:
    model = zoo.EightSchools()
    few, many = model.log_evidence(num_nodes=100), model.log_evidence(num_nodes=400)
    assert few.item() == pytest.approx(many.item(), abs=1e-11)


def test_evidence_equals_a_dense_integral() -> None:
    """Over log tau by the trapezoidal rule, with y's covariance written out."""
    model = zoo.EightSchools()
    log_tau = torch.linspace(-25.0, 12.0, 4001)
    tau = log_tau.exp()
    covariance = (
        torch.diag(model.sigma**2)
        + 25.0 * torch.ones(8, 8)
        + tau[:, None, None] ** 2 * torch.eye(8)
    )
    likelihood = torch.distributions.MultivariateNormal(torch.zeros(8), covariance)
    prior = math.log(2 / (5 * math.pi)) - torch.log1p((tau / 5) ** 2) + log_tau
    terms = likelihood.log_prob(model.y) + prior
    dense = terms.logsumexp(0) + (log_tau[1] - log_tau[0]).log()
    assert model.log_evidence().item() == pytest.approx(dense.item(), abs=1e-9)


@pytest.mark.parametrize("centered", [False, True])
def test_density_is_the_stan_programs_density(centered) -> None:
    """Up to log 2: Stan leaves the normalization of the cut Cauchy out."""
    model = zoo.EightSchools(centered=centered)
    mu, tau, trans = torch.tensor(2.0), torch.tensor(3.0), torch.randn(8)
    theta = mu + tau * trans

    def normal(value, loc, scale):
        return (
            -0.5 * ((value - loc) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))
        ).sum()

    stan = normal(mu, 0.0, 5.0) - math.log(5 * math.pi * (1 + (3 / 5) ** 2))
    stan = stan + sum(
        normal(y, t, s.item()) for y, t, s in zip(model.y, theta, model.sigma, strict=True)
    )
    stan = stan + (normal(theta, mu, 3.0) if centered else normal(trans, 0.0, 1.0))
    effects = {"theta": theta} if centered else {"theta_trans": trans}
    found = log_density(model, {"mu": mu, "tau": tau, **effects})
    assert found.item() == pytest.approx((stan + math.log(2)).item(), abs=1e-10)


def test_theta_trans_moments_agree_with_theta_given_tau() -> None:
    """E[theta] = E[mu] + E[tau theta_trans]: the two forms by one weighted sum over nodes."""
    model = zoo.EightSchools()
    conditional, weights, _ = model._quadrature(None, None, 200)
    product = (weights * conditional["tau"][0]) @ conditional["theta_trans"][0]
    theta = model.moments()["theta"][0]
    torch.testing.assert_close(model.moments()["mu"][0] + product, theta)


def test_none_simulates_and_data_condition() -> None:
    model = zoo.EightSchools()
    assert not model().equal(model())
    assert model(model.y).equal(model.y)
    trace = poutine.trace(model).get_trace(model.y)
    assert trace.nodes["y"]["is_observed"]
    nodes = trace.nodes
    expected = nodes["mu"]["value"] + nodes["tau"]["value"] * nodes["theta_trans"]["value"]
    assert nodes["theta"]["value"].equal(expected)


def test_other_schools() -> None:
    model = zoo.EightSchools()
    y, sigma = torch.randn(3), torch.tensor([1.0, 2.0, 3.0])
    assert model(None, sigma).shape == (3,)
    assert model(y, sigma).shape == (3,)
    assert torch.isfinite(model.log_evidence(y, sigma))
    with pytest.raises(ValueError, match="one standard error for each of the 3 schools"):
        model(y)
    with pytest.raises(ValueError, match="one standard error for each of the 3 schools"):
        model.moments(y)
    with pytest.raises(ValueError, match="sigma must hold positive standard errors"):
        model(y, torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="Site 'y' needs finite data"):
        model(torch.tensor([torch.nan, 0.0]), torch.ones(2))

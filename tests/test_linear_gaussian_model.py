"""LinearGaussian's closed forms, against the joint covariance and scikit-learn."""

import pyro
import pytest
import torch
from pyro import poutine
from sklearn.decomposition import PCA, FactorAnalysis

import zoo
from zoo.linear_gaussian import COVARIANCES

pytestmark = pytest.mark.usefixtures("float64")

DIMS = [(1, 1), (3, 5), (4, 2), (2, 3, 5), (2, 3, 4, 6)]


def joint(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of all variables, from v = B v + b + noise, by inversion."""
    starts = [0]
    for dim in model.dims:
        starts.append(starts[-1] + dim)
    total = starts[-1]
    maps, noise = torch.zeros(total, total), torch.zeros(total, total)
    biases = torch.zeros(total)
    for i, level in enumerate(model.levels):
        own = slice(starts[i], starts[i + 1])
        if level.bias is not None:
            biases[own] = level.bias
        noise[own, own] = level.scale_tril @ level.scale_tril.mT
        if i:
            maps[own, starts[i - 1] : starts[i]] = level.weight
    inverse = torch.linalg.inv(torch.eye(total) - maps)
    return inverse @ biases, inverse @ noise @ inverse.mT


def condition(model, x) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Posterior mean, posterior covariance and log evidence from the joint covariance."""
    mean, covariance = joint(model)
    k = sum(model.dims[:-1])
    gain = torch.linalg.solve(covariance[k:, k:], covariance[k:, :k]).mT
    evidence = torch.distributions.MultivariateNormal(mean[k:], covariance[k:, k:]).log_prob(x)
    return (
        mean[:k] + (x - mean[k:]) @ gain.mT,
        covariance[:k, :k] - gain @ covariance[k:, :k],
        evidence,
    )


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_closed_forms_equal_conditioning_of_the_joint(dims, covariance) -> None:
    model = zoo.LinearGaussian(dims, covariance=covariance)
    x = model(size=4).detach()
    mean, posterior_covariance, evidence = condition(model, x)
    posterior = model.posterior(x)
    assert posterior.batch_shape == (4,)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-12, atol=1e-12)
    expected = posterior_covariance.expand(4, -1, -1)
    torch.testing.assert_close(posterior.covariance_matrix, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.log_evidence(x), evidence, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_closed_forms_belong_to_the_program(dims) -> None:
    """Bayes at any latents: log p(x, z) of the Pyro trace - log p(z | x) = log p(x)."""
    model = zoo.LinearGaussian(dims)
    x = model(size=4).detach()
    values = torch.randn(4, sum(dims[:-1]))
    program = poutine.condition(model, data=model.split(values))
    trace = poutine.trace(program).get_trace(x)
    trace.compute_log_prob()
    log_joint = sum(trace.nodes[name]["log_prob"] for name in (*model.latents, "x"))
    expected = log_joint - model.posterior(x).log_prob(values)
    torch.testing.assert_close(model.log_evidence(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients_of_the_closed_forms(covariance) -> None:
    model = zoo.LinearGaussian((2, 3, 4), covariance=covariance)
    x = model(size=3).detach()
    names = [name for name, _ in model.named_parameters()]
    closed = torch.autograd.grad(model.log_evidence(x).sum(), list(model.parameters()))
    joint_gradients = torch.autograd.grad(condition(model, x)[2].sum(), list(model.parameters()))
    for name, found, expected in zip(names, closed, joint_gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=name)
    mean = torch.autograd.grad(model.posterior(x).mean.pow(2).sum(), list(model.parameters()))
    expected_mean = torch.autograd.grad(
        condition(model, x)[0].pow(2).sum(), list(model.parameters()), allow_unused=True
    )
    for name, found, expected in zip(names, mean, expected_mean, strict=True):
        expected = torch.zeros_like(found) if expected is None else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=name)


def test_factor_analysis_equals_scikit_learn() -> None:
    x = zoo.LinearGaussian((2, 6))(size=200).detach()
    reference = FactorAnalysis(n_components=2, svd_method="lapack").fit(x.numpy())
    model = zoo.LinearGaussian((2, 6), covariance=("unit", "diagonal"), bias=(False, True))
    _, data_level = model.levels
    with torch.no_grad():
        data_level.weight.copy_(torch.as_tensor(reference.components_.T.copy()))
        data_level.bias.copy_(torch.as_tensor(reference.mean_))
        data_level.log_scale.copy_(torch.as_tensor(reference.noise_variance_).log() / 2)
    scores = torch.as_tensor(reference.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_evidence(x).detach(), scores, rtol=1e-10, atol=1e-10)
    factors = torch.as_tensor(reference.transform(x.numpy()))
    torch.testing.assert_close(model.posterior(x).mean.detach(), factors, rtol=1e-10, atol=1e-10)


def test_probabilistic_pca_equals_scikit_learn() -> None:
    x = zoo.LinearGaussian((2, 6))(size=200).detach()
    reference = PCA(n_components=2, svd_solver="full").fit(x.numpy())
    model = zoo.LinearGaussian((2, 6), covariance=("unit", "isotropic"), bias=(False, True))
    _, data_level = model.levels
    excess = torch.as_tensor(reference.explained_variance_ - reference.noise_variance_)
    with torch.no_grad():
        data_level.weight.copy_(torch.as_tensor(reference.components_.T.copy()) * excess.sqrt())
        data_level.bias.copy_(torch.as_tensor(reference.mean_))
        data_level.log_scale.fill_(torch.tensor(reference.noise_variance_).log() / 2)
    scores = torch.as_tensor(reference.score_samples(x.numpy()))
    torch.testing.assert_close(model.log_evidence(x).detach(), scores, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_starts_well_conditioned(seed) -> None:
    pyro.set_rng_seed(seed)
    for dims in ((2, 3, 5), (5, 10, 20), (10, 50)):
        model = zoo.LinearGaussian(dims)
        x = model(size=2)
        assert torch.linalg.cond(model.posterior(x).precision_matrix[0]) < 1e3
        assert torch.linalg.cond(joint(model)[1]) < 1e5


def test_latents_are_split_top_first() -> None:
    model = zoo.LinearGaussian((2, 3, 5))
    assert model.latents == ("z2", "z1")
    assert model.x_dim == 5
    parts = model.split(torch.arange(5.0))
    assert parts["z2"].tolist() == [0, 1]
    assert parts["z1"].tolist() == [2, 3, 4]
    assert zoo.LinearGaussian((2, 5)).latents == ("z",)


def test_closed_forms_under_other_dtypes_and_calls() -> None:
    """They take no part in the program: nothing is registered, and float32 stays float32."""
    model = zoo.LinearGaussian((2, 3, 5)).float()
    x = model(size=4).detach()
    pyro.clear_param_store()
    assert model.log_evidence(x).dtype is torch.float32
    assert model.posterior(x).mean.dtype is torch.float32
    assert not list(pyro.get_param_store())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dims": (3,)},
            r"dims must name at least one latent and the data, top first, got \(3,\)",
        ),
        ({"dims": (3, 0)}, r"dims must name at least one latent"),
        ({"covariance": "banded"}, "covariance must be one of full, diagonal.*got 'banded'"),
        (
            {"covariance": ("full", "unit")},
            "covariance must be one value, or one for each of the 3",
        ),
        ({"bias": (True,)}, "bias must be one value, or one for each of the 3"),
    ],
)
def test_options_that_fit_no_chain(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.make("linear_gaussian", **options)


def test_closed_forms_check_their_rows() -> None:
    model = zoo.LinearGaussian((2, 5))
    for closed_form in (model.posterior, model.log_evidence):
        with pytest.raises(ValueError, match=r"'x' needs data of shape \(rows, 5\)"):
            closed_form(torch.zeros(3, 4))
        with pytest.raises(ValueError, match="'x' needs finite data"):
            closed_form(torch.full((3, 5), torch.nan))

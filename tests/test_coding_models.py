"""Sparse coding and the network of Rao and Ballard, against closed forms and the papers' rules."""

from __future__ import annotations

import pyro
import pytest
import torch

import zoo
from guides.energy import LogJoint
from guides.inference import PredictiveCoding
from zoo.rao_ballard import modules_of

pytestmark = pytest.mark.usefixtures("float64")


def test_the_noiseless_square_case_is_ica_as_the_limit_of_little_noise() -> None:
    """p(x) by a fine grid over z at a small noise, against the change of variables."""
    model = zoo.SparseCoding(x_dim=2, z_dim=2, prior="cauchy", noise_scale=0.05)
    model.requires_grad_(False)
    model.directions.copy_(torch.tensor([[1.0, 0.3], [-0.2, 1.0]]))
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]])
    axis = torch.linspace(-8, 8, 1601)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = model.coefficients().log_prob(z)
    cell = 2 * torch.log(axis[1] - axis[0])
    for row in x:
        noise = torch.distributions.Normal(z @ model.basis.mT, model.noise_scale)
        evidence = torch.logsumexp(prior + noise.log_prob(row).sum(-1), 0) + cell
        assert (evidence - model.noiseless_log_prob(row[None])[0]).abs() < 0.02


def test_the_lasso_is_the_mode_under_a_laplace_prior() -> None:
    from sklearn.linear_model import Lasso

    torch.manual_seed(0)
    model = zoo.SparseCoding(x_dim=8, z_dim=12, prior_scale=0.5, noise_scale=0.4)
    x = model(size=3).detach()
    # Halving steps stops at a kink, where no small step goes down; a fixed small one hovers by
    # the size of its step.
    pc = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.0}), num_steps=4000, step_size=2e-3)
    found = pc.infer(x)["z"]
    basis = model.basis.detach().numpy()
    # 1/(2n) |x - Bz|^2 + alpha |z|_1 with n = 8 pixels
    alpha = 0.4**2 / 0.5 / 8
    for row, z in zip(x, found, strict=True):
        exact = Lasso(alpha=alpha, fit_intercept=False, tol=1e-10, max_iter=100_000)
        exact.fit(basis, row.numpy())
        assert (z - torch.from_numpy(exact.coef_)).abs().max() < 0.02


def test_the_normal_prior_is_probabilistic_pca() -> None:
    model = zoo.SparseCoding(x_dim=4, z_dim=3, prior="normal", prior_scale=1.5)
    x = model(size=5).detach()
    twin = zoo.LinearGaussian(dims=(3, 4), covariance=("diagonal", "isotropic"), bias=False)
    with torch.no_grad():
        twin.levels[0].log_scale.fill_(torch.tensor(1.5).log())
        twin.levels[1].log_scale.fill_(torch.tensor(0.3).log())
        twin.levels[1].weight.copy_(model.basis)
    assert torch.allclose(model.gaussian_log_evidence(x), twin.log_evidence(x))


@pytest.mark.parametrize("activation", ["identity", "tanh", "logistic"])
def test_rao_and_ballards_dynamics_and_learning_are_the_gradients(activation: str) -> None:
    """Equations 7 and 9 of the paper, for one module a square, with k = 1 and no decay.

    dr/dt ~ U' f'(Ur) (I - f(Ur)) / s^2 + (f(U_h r_h) - r) / s_td^2
    dU    ~ f'(Ur) (I - f(Ur)) r' / s^2
    """
    torch.manual_seed(1)
    model = zoo.RaoBallard(4, (3, 2), num_modules=2, activation=activation, scales=(0.7, 1.3, 0.9))
    x = model(size=5).detach()
    z1, z2 = torch.randn(5, 2, 3), torch.randn(5, 2)
    f, slope = {
        "identity": (lambda v: v, torch.ones_like),
        "tanh": (torch.tanh, lambda v: 1 - torch.tanh(v) ** 2),
        "logistic": (torch.sigmoid, lambda v: torch.sigmoid(v) * (1 - torch.sigmoid(v))),
    }[activation]
    below, above = model.below.detach()[0], model.above.detach()
    into, down = z1 @ below.mT, torch.einsum("mks,bs->bmk", above, z2)
    error = slope(into) * (x - f(into)) / 0.7**2  # (B, M, D)
    own = (z1 - f(down)) / 1.3**2
    expected1 = error @ below - own
    expected2 = torch.einsum("mks,bmk->bs", above, slope(down) * own) - z2 / 0.9**2
    joint = LogJoint(model, (x,))

    def total(z1, z2):
        rows, other = joint.rows({"z1": z1, "z2": z2})
        return rows.sum() + other

    grads = torch.func.grad(total, (0, 1))(z1, z2)
    assert (grads[0] - expected1).abs().max() < 1e-12
    assert (grads[1] - expected2).abs().max() < 1e-12
    total(z1, z2).backward()
    learned = torch.einsum("bmd,bmk->dk", error, z1)
    assert (model.below.grad[0] - learned).abs().max() < 1e-10


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prior", ["normal", "laplace", "cauchy"])
def test_activities_may_have_heavy_tails_around_their_predictions(
    prior: str, shared: bool
) -> None:
    """Sums of densities written out, module by module."""
    torch.manual_seed(1)
    scales = (0.7, 1.3, 0.9)
    model = zoo.RaoBallard(4, (3, 2), 2, scales=scales, shared=shared, prior=prior)
    x = model(size=5).detach()
    z1, z2 = torch.randn(5, 2, 3), torch.randn(5, 2)
    family = {
        "normal": torch.distributions.Normal,
        "laplace": torch.distributions.Laplace,
        "cauchy": torch.distributions.Cauchy,
    }[prior]
    expected = family(0.0, 0.9).log_prob(z2).sum(-1)
    for m in range(2):
        below = model.below[0 if shared else m]
        above = family(torch.tanh(z2 @ model.above[m].mT), 1.3)
        pixels = torch.distributions.Normal(torch.tanh(z1[:, m] @ below.mT), 0.7)
        expected = expected + above.log_prob(z1[:, m]).sum(-1) + pixels.log_prob(x[:, m]).sum(-1)
    rows, _ = LogJoint(model, (x,)).rows({"z1": z1, "z2": z2})
    assert (rows - expected).abs().max() < 1e-12


def test_modules_are_overlapping_squares() -> None:
    images = torch.arange(2 * 4 * 8).reshape(2, 32).double()
    squares, window = modules_of(images, (4, 8), 4, 2)
    assert squares.shape == (2, 3, 16)
    whole = images.reshape(2, 4, 8)
    for m in range(3):
        assert squares[:, m].reshape(2, 4, 4).equal(whole[:, :, 2 * m : 2 * m + 4])
    assert window.reshape(4, 4).argmax() in (5, 6, 9, 10)
    with pytest.raises(ValueError, match="do not cover an image of 4 x 8"):
        modules_of(images, (4, 8), 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.SparseCoding(4, 3, prior="flat"), "prior must be one of"),
        (lambda: zoo.SparseCoding(4, 3, noise_scale=0.0), "must be positive"),
        (lambda: zoo.SparseCoding(4, 0), "at least 1"),
        (lambda: zoo.SparseCoding(4, 3).noiseless_log_prob(torch.zeros(1, 4)), "as many basis"),
        (lambda: zoo.SparseCoding(4, 3).gaussian_log_evidence(torch.zeros(1, 4)), "closed form"),
        (lambda: zoo.RaoBallard(activation="relu"), "activation must be one of"),
        (lambda: zoo.RaoBallard(scales=(1.0, 0.0, 1.0)), "three positive"),
        (lambda: zoo.RaoBallard(x_dim=0), "at least 1"),
        (lambda: zoo.RaoBallard(prior="flat"), "prior must be one of"),
    ],
)
def test_bad_options_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

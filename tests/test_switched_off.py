"""Laplace posteriors where masks switch latents off: ragged sequences, empty rows, padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.diagnostics import elbo
from guides.energy import LogJoint
from guides.inference import (
    IndefiniteHessianError,
    LaplaceCorrected,
    PredictiveCoding,
    laplace,
)
from guides.inference.switched_off import CountedNormal, switched_off
from guides.layout import layout

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = torch.tensor([4, 1, 3, 2])


def chain() -> tuple[zoo.StateSpace, Tensor]:
    torch.manual_seed(0)
    model = zoo.StateSpace(z_dim=2, x_dim=3, num_steps=4, bias=True)
    model.requires_grad_(False)
    return model, model(size=4)


def coding(model: Any, **options: Any) -> PredictiveCoding:
    return PredictiveCoding(model, pyro.optim.SGD({"lr": 1.0}), **options)


def states(x: Tensor, on: Tensor) -> None:
    """A latent a row with one observation; rows may be off."""
    with pyro.plate("data", len(x)), poutine.mask(mask=on):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def evidence_of_states(x: Tensor, on: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.25**0.5).log_prob(x) * on


@pytest.mark.parametrize("kind", ["exact", "gauss_newton"])
@pytest.mark.parametrize("lengths", [LENGTHS, torch.tensor([1, 1, 1, 1]), torch.tensor([4] * 4)])
def test_the_posterior_of_ragged_sequences_is_the_smoother(kind: str, lengths: Tensor) -> None:
    model, x = chain()
    posterior = coding(model).posterior(x, lengths, hessian=kind)
    mean, covariance = posterior.locations(x, lengths), posterior.covariance("data")
    smoothed = model.smoother(x, lengths)
    for t in range(4):
        on = t < lengths
        own = slice(2 * t, 2 * t + 2)
        assert (mean[f"z_{t + 1}"] - smoothed.mean[:, t])[on].abs().sum() < 1e-6
        assert (covariance[:, own, own] - smoothed.covariance[:, t])[on].abs().sum() < 1e-6
        # What a row lacks has unit variance and no part in the rest.
        rest = covariance[~on].clone()
        rest[:, own, own] -= torch.eye(2)
        assert not rest[:, own].any()
        assert not rest[:, :, own].any()
    # Exact draw by draw: the log weight of a draw is the log evidence.
    found = elbo(model, posterior, x, lengths, num_samples=3)
    assert (found.rows - model.log_evidence(x, lengths)).abs().max() < 1e-8
    total = -Trace_ELBO(num_particles=2).loss(model, posterior, x, lengths)
    assert total == pytest.approx(float(model.log_evidence(x, lengths).sum()), abs=1e-7)


def test_a_row_alone_is_the_row_in_the_batch_and_padding_is_nothing() -> None:
    model, x = chain()
    together = coding(model).posterior(x, LENGTHS)
    wild = x.clone()
    wild[1, 1:], wild[3, 2:] = 1e3, -1e3
    padded = coding(model).posterior(wild, LENGTHS)
    assert torch.equal(padded.covariance("data"), together.covariance("data"))
    means = together.locations(x, LENGTHS)
    for row in (1, 2):
        one, length = slice(row, row + 1), int(LENGTHS[row])
        size = 2 * length
        for args in ((x[one], LENGTHS[one]), (x[one, :length],)):
            other = coding(model).posterior(*args)
            found = other.covariance("data")[0, :size, :size]
            whole = together.covariance("data")[row, :size, :size]
            torch.testing.assert_close(found, whole, atol=1e-10, rtol=0)
            for name, mean in list(other.locations(*args).items())[:length]:
                assert (mean[0] - means[name][row]).abs().max() < 1e-8


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    model, x = chain()
    posterior = coding(model).posterior(x, LENGTHS)
    assert posterior.covariance("data").dtype == torch.float32
    found = elbo(model, posterior, x, LENGTHS, num_samples=2).rows
    assert (found - model.log_evidence(x, LENGTHS)).abs().max() < 1e-3
    smoothed = model.smoother(x, LENGTHS).mean[0, -1]
    assert (posterior.locations(x, LENGTHS)["z_4"][0] - smoothed).abs().max() < 1e-4


@pytest.mark.parametrize("solver", ["gradient", "newton", "truncated_newton"])
def test_a_row_that_is_off_has_no_evidence_and_stays_where_it_was(solver: str) -> None:
    x = torch.tensor([1.0, -2.0, 0.5])
    for on in (torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)):
        posterior = coding(states, solver=solver).posterior(x, on)
        expected = torch.where(on, 0.2, 1.0)
        torch.testing.assert_close(posterior.covariance("data").flatten(), expected)
        expected = torch.where(on, 0.8 * x, 0.0)
        torch.testing.assert_close(posterior.locations(x, on)["z"], expected)
        rows = elbo(states, posterior, x, on, num_samples=4).rows
        torch.testing.assert_close(rows, evidence_of_states(x, on))
    one = coding(states).posterior(x[1:2], on[1:2])
    assert not elbo(states, one, x[1:2], on[1:2], num_samples=2).rows.any()


def test_draws_of_what_is_off_are_standard_and_independent() -> None:
    torch.manual_seed(1)
    on = torch.tensor([True, False])
    x = torch.tensor([1.0, -2.0])
    posterior = coding(states).posterior(x, on)
    drawn = posterior.rsample_packed(4000, (x, on))[0]["data"][:, 1, 0]
    error = 4000**-0.5
    assert drawn.mean().abs() < 4 * error
    assert (drawn.std() - 1).abs() < 4 * error


def padded(x: Tensor, on: Tensor, positive: bool = False) -> None:
    """Latents of a nested plate, some of which are padding; all of a row sum to the data."""
    prior = dist.LogNormal(0.0, 1.0) if positive else dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x), dim=-2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("parts", x.shape[1], dim=-1), poutine.mask(mask=on):
            z = pyro.sample("z", prior)
            z = z.log() if positive else z
            pyro.sample("x", dist.Normal(z + w, 0.7), obs=x)


@pytest.mark.parametrize("positive", [False, True])
def test_padding_of_a_nested_plate(positive: bool) -> None:
    x = torch.tensor([[1.0, -0.5, 2.0], [0.3, 9.0, 9.0], [9.0, 9.0, 9.0]])
    on = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    posterior = coding(padded).posterior(x, on, positive)
    marginal = torch.eye(3) * 1.49 + 1.0
    expected = torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(k), marginal[:k, :k]).log_prob(x[row, :k])
            if k
            else torch.zeros(())
            for row, k in enumerate(on.sum(-1).tolist())
        ]
    )
    found = elbo(padded, posterior, x, on, positive, num_samples=3)
    torch.testing.assert_close(found.rows, expected)
    total = -Trace_ELBO().loss(padded, posterior, x, on, positive)
    assert total == pytest.approx(float(expected.sum()))
    covariance = posterior.covariance("data")[2]
    torch.testing.assert_close(covariance, torch.eye(4))
    # A row of its own shape knows nothing of padding.
    alone = coding(padded).posterior(x[1:2, :1], on[1:2, :1], positive).covariance("data")[0]
    torch.testing.assert_close(posterior.covariance("data")[1, :2, :2], alone)


def leveled(x: Tensor, on: Tensor, positive: bool = True) -> None:
    """A global level beside ragged latents of rows; one global latent may be off, too."""
    used = on.any()
    with poutine.mask(mask=used):
        level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=on):
        z = pyro.sample("z", dist.Normal(level, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("data_plate", ["auto", None])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_globals_beside_ragged_rows(number: int, data_plate: str | None) -> None:
    x, on = torch.tensor([1.0, -2.0, 0.5]), torch.arange(3) < number
    posterior = coding(leveled, data_plate=data_plate).posterior(x, on)
    covariance = 1.25 * torch.eye(number) + 4.0
    expected = dist.MultivariateNormal(torch.zeros(number), covariance) if number else None
    total = 0.0 if expected is None else float(expected.log_prob(x[:number]))
    assert -Trace_ELBO().loss(leveled, posterior, x, on) == pytest.approx(total)
    loop = LaplaceCorrected(leveled, pyro.optim.SGD({}), data_plate=data_plate)
    assert -loop.evaluate_loss(x, on) == pytest.approx(total)


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
def test_the_laplace_corrected_loss_is_the_evidence_and_its_gradient(hessian: str) -> None:
    model, x = chain()
    model.requires_grad_(True)
    loop = LaplaceCorrected(model, pyro.optim.SGD({"lr": 1e-3}), hessian=hessian)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = model.log_evidence(x, LENGTHS).sum()
    slopes = torch.autograd.grad(total, list(model.parameters()))
    evidence = float(total.detach())
    assert loop.evaluate_loss(x, LENGTHS) == pytest.approx(-evidence, abs=1e-7)
    assert loop.step(x, LENGTHS) == pytest.approx(-evidence, abs=1e-7)
    for (name, moved), slope in zip(model.named_parameters(), slopes, strict=True):
        torch.testing.assert_close((moved - before[name]) / 1e-3, slope, atol=1e-6, rtol=1e-6)
    # Of twice as many rows, of which these are a sample.
    whole = loop.evaluate_loss(x, LENGTHS)
    twice = loop.evaluate_loss(x, LENGTHS, size=8, index=torch.arange(4))
    assert twice == pytest.approx(2 * whole)


def test_an_event_may_be_switched_off_in_part() -> None:
    on = torch.tensor([[True, True, False], [False, False, False]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(3), 1.0).mask(on).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 0.5).mask(on).to_event(1), obs=x)

    x = torch.tensor([[1.0, -2.0, 9.0], [9.0, 9.0, 9.0]])
    posterior = coding(model).posterior(x)
    expected = torch.diag_embed(torch.where(on, 0.2, 1.0))
    torch.testing.assert_close(posterior.covariance("data"), expected)
    rows = elbo(model, posterior, x, num_samples=2).rows
    torch.testing.assert_close(rows, (dist.Normal(0.0, 1.25**0.5).log_prob(x) * on).sum(-1))


@pytest.mark.parametrize(
    ("prior", "size"),
    [
        (lambda: dist.Gamma(2.0, 1.0), 1),
        (lambda: dist.Dirichlet(torch.ones(3)), 2),
        (lambda: dist.LKJCholesky(3, 1.0), 3),
        (lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1), 4),
    ],
)
def test_every_coordinate_of_a_constrained_latent_is_switched_off(prior: Any, size: int) -> None:
    on = torch.tensor([True, False])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=on):
            z = pyro.sample("z", prior())
            mean = z.reshape(len(x), -1)[:, 0]
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.tensor([0.5, 0.5])
    group = layout(model, (x,)).group("data")
    assert group is not None
    off = switched_off(group)
    assert off is not None
    assert off.tolist() == [[False] * size, [True] * size]
    posterior = coding(model, num_steps=50).posterior(x)
    torch.testing.assert_close(posterior.covariance("data")[1], torch.eye(size))
    assert elbo(model, posterior, x, num_samples=2).rows[1] == 0


def test_a_switched_off_latent_that_others_read_is_curved_by_them() -> None:
    def model(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=on):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x, on = torch.tensor([1.0, -2.0]), torch.tensor([True, False])
    posterior = coding(model).posterior(x, on)
    expected = torch.tensor([0.2, 0.25])
    torch.testing.assert_close(posterior.covariance("data").flatten(), expected)
    # A flat prior: the integral of the likelihood is one.
    rows = elbo(model, posterior, x, on, num_samples=2).rows
    torch.testing.assert_close(rows, evidence_of_states(x, on))


@pytest.mark.parametrize("hessian", ["exact", "gauss_newton"])
def test_curvature_that_only_a_mask_took_is_named(hessian: str) -> None:
    def model(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=on):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w + 0.0 * z.sin(), 0.5), obs=x)
            pyro.factor("slope", 0.1 * z)

    x, on = torch.tensor([1.0, -2.0]), torch.tensor([True, False])
    with pytest.raises(IndefiniteHessianError, match=r"'z' in 1 of 2.*no prior.*mask these as"):
        laplace(model, {"z": 0 * x, "w": x}, (x, on), hessian=hessian)


def test_a_latent_that_is_read_elsewhere_alone_is_not_taken_for_unread() -> None:
    def model(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=on):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**3, 0.5), obs=x)

    x, on = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(IndefiniteHessianError, match="'z' in 1 of 2 rows"):
        laplace(model, {"z": torch.zeros(2)}, (x, on))


def test_latents_that_are_on_have_to_be_at_a_mode_as_before() -> None:
    def model(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=on):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)

    x, on = torch.full((3,), 2.0), torch.tensor([True, False, True])
    with pytest.raises(IndefiniteHessianError, match=r"'z' in 2 of 3 rows.*Relax longer"):
        laplace(model, {"z": torch.zeros(3)}, (x, on))


def test_a_mask_inside_a_positive_latent_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0).mask(torch.arange(len(x)) > 0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"Latent site 'z' is masked.*pyro.poutine.mask around"):
        laplace(model, {"z": x}, (x,))


def test_other_masks_need_another_posterior() -> None:
    model, x = chain()
    ragged, whole = coding(model).posterior(x, LENGTHS), coding(model).posterior(x)
    message = "switch off other latents than in this call, of site 'z_{}'.*masks \\(lengths\\)"
    for guide, args, site in (
        (ragged, (x,), 2),
        (ragged, (x, torch.tensor([4, 1, 2, 2])), 3),
        (whole, (x, LENGTHS), 2),
    ):
        with pytest.raises(ValueError, match=message.format(site)):
            elbo(model, guide, *args, num_samples=2)
    assert torch.isfinite(elbo(model, whole, x, torch.tensor([4] * 4), num_samples=2).rows).all()


def test_rows_of_a_ragged_posterior_are_found_by_their_numbers() -> None:
    model, x = chain()
    rows = torch.arange(4)
    posterior = coding(model).posterior(x, LENGTHS, size=4, index=rows)
    some = torch.tensor([3, 0])
    call = {"size": 4, "index": some}
    found = elbo(model, posterior, x[some], LENGTHS[some], model_kwargs=call, num_samples=2)
    expected = model.log_evidence(x, LENGTHS)[some]
    assert (found.rows - expected).abs().max() < 1e-8


def test_a_ragged_posterior_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = chain()
    posterior = coding(model).posterior(x, LENGTHS)
    guides.save(posterior, tmp_path / "ragged.safetensors")
    loaded = guides.load(tmp_path / "ragged.safetensors", model, x, LENGTHS)
    rows = elbo(model, loaded, x, LENGTHS, num_samples=2).rows
    assert (rows - model.log_evidence(x, LENGTHS)).abs().max() < 1e-8


def test_the_counted_normal_is_the_normal_of_what_counts() -> None:
    torch.manual_seed(2)
    root = torch.randn(3, 2, 2)
    tril = torch.zeros(3, 1, 3, 3)
    tril[:, 0, ::2, ::2] = torch.linalg.cholesky(root @ root.mT + torch.eye(2))
    tril[:, 0, 1, 1] = 1.0
    loc = torch.randn(3, 1, 3)
    off = torch.tensor([False, True, False]).expand(3, 1, 3)
    q = CountedNormal(loc, tril, off).expand((5, 3, 1))
    kept = dist.MultivariateNormal(loc[..., ::2], scale_tril=tril[..., ::2, ::2])
    value = q.rsample().requires_grad_()
    found = q.log_prob(value)
    assert found.shape == (5, 3, 1)
    torch.testing.assert_close(found, kept.log_prob(value[..., ::2]))
    torch.testing.assert_close(q.entropy(), kept.entropy().expand(5, 3, 1))
    (slope,) = torch.autograd.grad(found.sum(), value)
    assert not slope[..., 1].any()


def test_the_log_joint_knows_nothing_of_what_is_off() -> None:
    model, x = chain()
    joint = LogJoint(model, (x, LENGTHS))
    group = joint.layout.group("data")
    assert group is not None
    off = switched_off(group)
    assert off is not None
    assert off.sum(-1).tolist() == [2 * (4 - length) for length in LENGTHS.tolist()]
    u = torch.randn(group.shape)
    moved = torch.where(off, torch.full_like(u, 1e3), u)
    torch.testing.assert_close(joint.packed({"data": u})[0], joint.packed({"data": moved})[0])

"""One program in any direction: clamped, released, completed, weighted."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from guides.diagnostics import log_evidence
from guides.inference import PredictiveCoding
from tests.pc_oracles import ORACLES

pytestmark = pytest.mark.usefixtures("float64")
NAN = float("nan")


def loop(model, **options) -> PredictiveCoding:
    options = {"num_steps": 30, "solver": "newton", "tolerance": 1e-10} | options
    return PredictiveCoding(model, pyro.optim.SGD({}), **options)


@pytest.mark.parametrize("name", ["chain2", "fork_merge", "precisions"])
def test_clamping_a_latent_to_its_value_leaves_all_others(name: str) -> None:
    """T23f."""
    oracle = ORACLES[name]()
    pc = loop(oracle.model)
    free = pc.infer(oracle.x)
    for site in free:
        found = pc.given(clamp={site: oracle.mode[site]}).infer(oracle.x)
        assert site not in found
        for other in found:
            assert torch.allclose(found[other], oracle.mode[other], atol=1e-7)


def conditional(mean: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
    """T19: mu_m + S_mk S_kk^-1 (x_k - mu_k), row by row."""
    result = x.clone()
    for row in range(len(x)):
        m = torch.isnan(x[row])
        gain = torch.linalg.solve(covariance[~m][:, ~m], covariance[~m][:, m]).T
        result[row, m] = mean[m] + gain @ (x[row, ~m] - mean[~m])
    return result


HOLES = torch.tensor(
    [[NAN, 0.3, -1.0, 2.0], [1.0, NAN, NAN, 0.5], [0.2, 0.1, 0.0, -1.0], [1.0, 2.0, NAN, NAN]]
).double()


def test_missing_entries_are_the_conditional_mean_of_a_full_covariance() -> None:
    """T19: recurrent predictive coding, with one likelihood of all entries."""
    root = torch.randn(4, 4)
    covariance, mean = root @ root.T + torch.eye(4), torch.randn(4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mean, covariance), obs=x)

    found = loop(model).given(missing=["x"]).infer(HOLES)["x"]
    expected = conditional(mean, covariance, HOLES)
    assert torch.allclose(found, expected, atol=1e-7)
    assert torch.equal(found[~HOLES.isnan()], HOLES[~HOLES.isnan()])


def test_missing_entries_of_a_hierarchy() -> None:
    """Through latents: the conditional mean under the marginal, and its evidence."""
    weight = torch.randn(4, 2)
    scale = torch.tensor([0.5, 1.0, 0.7, 0.9])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, scale).to_event(1), obs=x)

    covariance = weight @ weight.T + scale.square().diag()
    pc = loop(model).given(missing=["x"])
    found = pc.infer(HOLES)
    assert torch.allclose(found["x"], conditional(torch.zeros(4), covariance, HOLES), atol=1e-6)
    # What a row knows adds nothing: the Laplace evidence is that of the known entries alone.
    score = log_evidence(pc.model, pc.posterior(HOLES), HOLES, num_samples=2)
    for row, value in zip(HOLES, score.rows, strict=True):
        known = ~row.isnan()
        marginal = dist.MultivariateNormal(
            torch.zeros(int(known.sum())), covariance[known][:, known]
        )
        assert torch.allclose(value, marginal.log_prob(row[known]), atol=1e-8)
    # Nothing missing: nothing changes.
    whole = HOLES[2:3]
    assert torch.allclose(pc.infer(whole)["z"], loop(model).infer(whole)["z"], atol=1e-7)


def test_missing_entries_on_a_support() -> None:
    """Positive data, entries one plate each: log x_m settles at log of its Gamma's a / b."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("entries", 2):
                pyro.sample("x", dist.Gamma(3.0, z.exp()), obs=x)

    x = torch.tensor([[2.0, NAN], [NAN, 1.0]])
    found = loop(model).given(missing=["x"]).infer(x)
    assert torch.allclose(found["x"][0, 1], 3 / found["z"][0].exp().squeeze(), atol=1e-6)
    known = torch.tensor([2.0, 1.0])
    z = found["z"].squeeze(-1)
    # the missing entry, at its mode, no longer pulls: -z + 3 - x e^z = 0
    assert torch.allclose(-z + 3 - known * z.exp(), torch.zeros(2), atol=1e-6)


def test_missing_entries_of_independent_bits_are_left_out() -> None:
    weight = torch.randn(3, 2)

    def model(x: Tensor, mask: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            bits = dist.Bernoulli(logits=z @ weight.T)
            pyro.sample("x", (bits if mask is None else bits.mask(mask)).to_event(1), obs=x)

    x = torch.tensor([[1.0, NAN, 0.0], [NAN, 1.0, 1.0]])
    found = loop(model).given(missing=["x"]).infer(x)
    by_mask = loop(model).infer(x.nan_to_num(), mask=~x.isnan())
    assert torch.allclose(found["z"], by_mask["z"], atol=1e-8)
    with pytest.raises(ValueError, match=r"contains NaN.*pc.given\(missing=\['x'\]\)"):
        loop(model).infer(x)


def labelled(y: Tensor | None = None, x: Tensor | None = None, size: int | None = None) -> None:
    """A label, a latent, an image."""
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=y)
        z = pyro.sample("z", dist.Normal(y @ MIX.T, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.3).to_event(1), obs=x)


MIX = torch.tensor([[1.0, -1.0], [0.5, 1.0], [0.0, 2.0]]).double()


def test_one_program_classifies_and_generates() -> None:
    x = torch.randn(3, 3)
    y = torch.eye(2)[[0, 1, 1]]
    pc = loop(labelled)
    # classify: p(y | x), image clamped, label released
    found = pc.given(release=["y"]).infer(y, x)["y"]
    noise = (0.5**2 + 0.3**2) * torch.eye(3) + MIX @ MIX.T
    assert torch.allclose(found, x @ torch.linalg.inv(noise) @ MIX, atol=1e-7)
    # the same as leaving the label out of the call
    assert torch.allclose(found, pc.infer(None, x)["y"], atol=1e-7)
    # generate: label clamped, image released
    found = pc.given(release=["x"]).infer(y, x)
    assert torch.allclose(found["x"], y @ MIX.T, atol=1e-7)
    found = pc.given(clamp={"y": y}, release=["x"]).infer(None, x)
    assert torch.allclose(found["x"], y @ MIX.T, atol=1e-7)


def test_raising_the_precision_of_a_unit_raises_its_influence() -> None:
    """Posterior mean of a linear Gaussian program with precision g / s^2, entry by entry."""
    weight = torch.randn(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, 0.8).to_event(1), obs=x)

    x = torch.randn(4, 3)
    pulls = []
    for g in (1.0, 4.0, 100.0):
        gain = torch.tensor([g, 1.0, 1.0])
        found = pc_z(model, x, {"x": gain})
        precision = gain / 0.8**2
        posterior = torch.eye(2) + weight.T @ (precision.unsqueeze(-1) * weight)
        expected = torch.linalg.solve(posterior, weight.T @ (precision * x).T).T
        assert torch.allclose(found, expected, atol=1e-7)
        pulls.append((x[:, 0] - found @ weight[0]).abs())
    assert (pulls[1] < pulls[0]).all()
    assert (pulls[2] < pulls[1]).all()
    # of a prior, and of a full covariance
    found = pc_z(model, x, {"z": 3.0})
    posterior = 3 * torch.eye(2) + weight.T @ weight / 0.8**2
    assert torch.allclose(found, torch.linalg.solve(posterior, weight.T @ x.T / 0.8**2).T)
    root = torch.randn(3, 3)
    covariance = root @ root.T + torch.eye(3)

    def full(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.MultivariateNormal(z @ weight.T, covariance), obs=x)

    gain = torch.tensor([5.0, 1.0, 0.2])
    precision = gain.sqrt().diag() @ torch.linalg.inv(covariance) @ gain.sqrt().diag()
    posterior = torch.eye(2) + weight.T @ precision @ weight
    expected = torch.linalg.solve(posterior, weight.T @ precision @ x.T).T
    assert torch.allclose(pc_z(full, x, {"x": gain}), expected, atol=1e-7)


def pc_z(model, x: Tensor, gain: dict) -> Tensor:
    return loop(model).given(gain=gain).infer(x)["z"]


def test_gains_of_other_families_multiply_their_density() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    x, gain = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 4.0])
    found = loop(model).given(gain={"x": gain}).infer(x)["z"]
    assert torch.allclose(found, (2 + gain * x) / (1 + gain), atol=1e-7)


def test_misuse_is_refused_with_the_fix() -> None:
    pc, x = loop(labelled), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"no site named 'q'. Its sites: y, z, x"):
        pc.given(clamp={"q": x}).infer(None, x)
    with pytest.raises(ValueError, match="Site 'y' is no data in this call"):
        pc.given(release=["y"]).infer(None, x)
    with pytest.raises(ValueError, match="Site 'x' is given twice"):
        pc.given(clamp={"x": x}, release=["x"])
    with pytest.raises(ValueError, match="gain of site 'x' must be positive"):
        pc.given(gain={"x": 0.0})
    with pytest.raises(TypeError, match=r"release must be a collection of names.* pass \['x'\]"):
        pc.given(release="x")

    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.ones(3), 1.0).to_event(1))
            pyro.sample("x", dist.Poisson(z).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"one factor an event, of shape \(2,\), got \(2, 3\)"):
        loop(counts).given(gain={"x": torch.ones(2, 3)}).infer(x)


def test_a_clamp_is_for_latents_and_of_their_shape() -> None:
    pc, x, y = loop(labelled), torch.zeros(2, 3), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"'x' is data in this call.*in place of its data"):
        pc.given(clamp={"x": x}).infer(None, x)
    for value in (torch.ones(1), torch.ones(2, 1), torch.ones(1, 3), torch.tensor(1.0)):
        with pytest.raises(
            ValueError, match=r"'z' is clamped to .*\(2, 3\), got .*expand\(2, 3\)"
        ):
            pc.given(clamp={"z": value}).infer(y, x)
    with pytest.raises(TypeError, match=r"'z' is clamped to must be a tensor, got float"):
        pc.given(clamp={"z": 1.0}).infer(y, x)
    # Released data are latents, and so is what the call leaves out.
    found = pc.given(clamp={"z": torch.ones(2, 3)}, release=["x"]).infer(y, x)
    assert torch.allclose(found["x"], torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (4, 2, 2)])
def test_a_gain_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"must broadcast with its value, of shape \(2, 2\), got"):
        loop(model).given(gain={"x": torch.ones(shape)}).infer(torch.zeros(2, 2))


def test_a_mask_inside_a_distribution_is_not_lost() -> None:
    def model(x: Tensor) -> None:
        on = torch.tensor([True, False])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(on), obs=x)

    x = torch.tensor([2.0, 3.0])
    with pytest.raises(ValueError, match=r"mask that would be lost.*pyro\.poutine\.mask"):
        loop(model).given(gain={"x": 3.0}).infer(x)
    with pytest.raises(ValueError, match="missing entries and a mask"):
        loop(model).given(missing=["x"]).infer(torch.tensor([2.0, NAN]))


def test_a_given_loop_leaves_the_memory_of_its_origin() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([2.0, 4.0])
    start = {"num_steps": 1, "solver": "gradient", "tolerance": 0.0, "warm_start": "last"}
    pc, alone = loop(model, **start), loop(model, **start)
    pc.step(x), alone.step(x)
    other = pc.given(gain={"x": 100.0})
    assert other.num_products == other.gradient_evaluations == 0
    # A new loop knows no row: it starts where one that was never stepped does.
    fresh = loop(model, **start).given(gain={"x": 100.0})
    assert other.step(x) == fresh.step(x)
    assert pc.step(x) == alone.step(x)


def test_a_guide_that_lacks_a_site_is_refused_by_name() -> None:
    def guide(y, x) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"The guide has no site 'z'.*guide=None"):
        loop(labelled, guide=guide).infer(None, torch.zeros(2, 3))

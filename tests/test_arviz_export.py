"""`to_arviz` against closed forms: exact guides make lp - log_q the constant log evidence."""

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.infer.reparam import LocScaleReparam

import guides
from guides.diagnostics import resimulation, to_arviz
from guides.diagnostics.arviz_export import to_arrays
from guides.energy import LogJoint
from guides.inference import PredictiveCoding, laplace
from tests import arviz_programs as programs
from tests.cases import CORE_GUIDES

pytestmark = pytest.mark.usefixtures("float64")

ALL_GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "observed_data",
    "constant_data",
}


def tensors(data, group):
    """Variables of a group without the chain axis."""
    chained = group not in ("observed_data", "constant_data")
    return {
        name: torch.as_tensor(variable.values[0] if chained else variable.values)
        for name, variable in data[group].data_vars.items()
    }


def dims(data, group):
    return {name: variable.dims for name, variable in data[group].data_vars.items()}


def assert_mean(values, expected, num_errors=5.0):
    """The mean over draws is within a few standard errors of the expected one."""
    error = values.std(0) / values.shape[0] ** 0.5
    assert ((values.mean(0) - expected).abs() < num_errors * error).all()


# Exact programs


def test_an_exact_guide_gives_the_exact_posterior_and_the_constant_log_evidence():
    x = torch.randn(6) + 0.5
    data = to_arviz(programs.one_mean, programs.one_mean_exact, x, num_samples=4000)
    mu = tensors(data, "posterior")["mu"]
    assert_mean(mu, x.sum() / 7)
    assert_mean((mu - x.sum() / 7) ** 2, 1 / 7)
    log_likelihood = tensors(data, "log_likelihood")["x"]
    torch.testing.assert_close(
        log_likelihood, programs.normal_log_density(x, mu[:, None], 1.0), rtol=0, atol=1e-12
    )
    log_prior = tensors(data, "log_prior")["mu"]
    torch.testing.assert_close(
        log_prior, programs.normal_log_density(mu, 0.0, 1.0), rtol=0, atol=1e-12
    )
    stats = tensors(data, "sample_stats")
    torch.testing.assert_close(stats["lp"], log_likelihood.sum(-1) + log_prior)
    gap = stats["lp"] - stats["log_q"]
    torch.testing.assert_close(gap, programs.one_mean_evidence(x).expand(4000), atol=1e-9, rtol=0)


def test_predictive_draws_have_the_exact_moments_and_independent_noise():
    x = torch.randn(3) + 0.5
    data = to_arviz(programs.one_mean, programs.one_mean_exact, x, num_samples=4000)
    predictive = tensors(data, "posterior_predictive")["x"]
    mean = x.sum() / 4
    assert_mean(predictive, mean)
    assert_mean((predictive - mean) ** 2, torch.tensor(1 + 1 / 4))
    # Rows share mu only: their covariance is the posterior variance of mu.
    assert_mean((predictive[:, 0] - mean) * (predictive[:, 1] - mean), torch.tensor(1 / 4))
    prior, prior_predictive = tensors(data, "prior")["mu"], tensors(data, "prior_predictive")["x"]
    assert_mean(prior, 0.0)
    assert_mean(prior**2, 1.0)
    assert_mean(prior_predictive**2, torch.tensor(2.0))
    assert_mean(prior_predictive[:, 0] * prior, 1.0)
    torch.testing.assert_close(tensors(data, "observed_data")["x"], x)


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 7, 20])
def test_globals_are_drawn_once_and_replayed_in_every_minibatch(batch_size):
    x = torch.randn(7) * 2 + 1
    guide = programs.TwoLevelsExact(x)
    data = to_arviz(programs.two_levels, guide, x, num_samples=500, batch_size=batch_size)
    assert dims(data, "posterior") == {"mu": ("chain", "draw"), "z": ("chain", "draw", "data")}
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    assert posterior["z"].shape == (500, 7)
    # Exact only if every minibatch saw the same mu, and mu was counted once, without N/B.
    evidence = programs.two_levels_evidence(x).expand(500)
    torch.testing.assert_close(stats["lp"] - stats["log_q"], evidence, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        tensors(data, "log_prior")["z"],
        programs.normal_log_density(posterior["z"], posterior["mu"][:, None], 1.0),
    )
    torch.testing.assert_close(
        tensors(data, "log_likelihood")["x"],
        programs.normal_log_density(x, posterior["z"], programs.SIGMA),
    )
    torch.testing.assert_close(tensors(data, "observed_data")["x"], x)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_rows_of_simulations_share_their_globals_across_minibatches(batch_size):
    x = torch.randn(4)
    guide = programs.TwoLevelsExact(x)
    data = to_arviz(programs.two_levels, guide, x, num_samples=4000, batch_size=batch_size)
    prior = tensors(data, "prior")
    first, last = tensors(data, "prior_predictive")["x"][:, [0, 3]].T
    assert_mean(first * last, 4.0)
    assert_mean(first**2, 4.0 + 1.0 + programs.SIGMA**2)
    assert_mean(prior["z"] * prior["mu"][:, None], torch.tensor(4.0))
    mu, z = tensors(data, "posterior")["mu"], tensors(data, "posterior")["z"]
    noise = tensors(data, "posterior_predictive")["x"] - z
    assert_mean(noise**2, torch.tensor(programs.SIGMA**2))
    # Locals of different minibatches are independent given the globals.
    precision = 1 + programs.SIGMA**-2
    residual = z - (mu[:, None] + x / programs.SIGMA**2) / precision
    assert_mean(residual[:, 0] * residual[:, 3], 0.0)
    assert_mean(noise[:, 0] * noise[:, 3], 0.0)


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_a_program_that_draws_its_own_minibatch_is_exported_over_all_rows(batch):
    x = torch.randn(7) * 2 + 1
    guide = programs.OwnMinibatchExact(x)
    data = to_arviz(programs.own_minibatch, guide, x, batch, num_samples=200)
    stats, posterior = tensors(data, "sample_stats"), tensors(data, "posterior")
    evidence = programs.two_levels_evidence(x).expand(200)
    torch.testing.assert_close(stats["lp"] - stats["log_q"], evidence, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        tensors(data, "log_likelihood")["x"],
        programs.normal_log_density(x, posterior["z"], programs.SIGMA),
    )
    torch.testing.assert_close(tensors(data, "observed_data")["x"], x)
    assert "constant_data" not in data
    with pytest.raises(ValueError, match=f"draws its own minibatches of {batch} rows"):
        to_arviz(programs.own_minibatch, guide, x, batch, num_samples=2, batch_size=batch + 1)


def test_a_call_on_given_rows_exports_those_rows_under_their_numbers():
    x = torch.randn(7)
    rows = torch.tensor([5, 0, 2])
    guide = programs.TwoLevelsExact(x)
    kwargs = {"size": 7, "index": rows}
    for batch_size in (None, 2):
        data = to_arviz(
            programs.two_levels,
            guide,
            x[rows],
            model_kwargs=kwargs,
            num_samples=50,
            batch_size=batch_size,
        )
        assert data["posterior"]["z"].coords["data"].values.tolist() == [5, 0, 2]
        torch.testing.assert_close(tensors(data, "observed_data")["x"], x[rows])
        total = sum(
            tensors(data, group)[name].reshape(50, -1).sum(-1)
            for group, name in (("log_likelihood", "x"), ("log_prior", "z"), ("log_prior", "mu"))
        )
        torch.testing.assert_close(tensors(data, "sample_stats")["lp"], total)


# Axes


def test_axes_are_named_from_plates_and_event_dims_and_nothing_is_squeezed():
    x, w = torch.randn(2, 5), torch.randn(5)
    guide = guides.make("normal", programs.nested, x, w)
    data = to_arviz(programs.nested, guide, x, w, num_samples=10)
    lead = ("chain", "draw")
    assert dims(data, "posterior") == {
        "level": (*lead, "level_dim_0"),
        "share": (*lead, "share_dim_0"),
        "slope": (*lead, "region"),
        "z": (*lead, "region", "data", "feature"),
        "mean": (*lead, "region", "data"),
    }
    assert data["posterior"]["level"].shape == (1, 10, 1)
    assert dims(data, "prior") == dims(data, "posterior")
    assert dims(data, "log_prior") == {
        "level": (*lead, "level_dim_0"),
        "share": lead,
        "slope": (*lead, "region"),
        "z": (*lead, "region", "data"),
    }
    assert dims(data, "log_likelihood") == {"x": (*lead, "region", "data")}
    assert dims(data, "posterior_predictive") == {"x": (*lead, "region", "data")}
    assert dims(data, "observed_data") == {"x": ("region", "data")}
    assert dims(data, "constant_data") == {"w": ("data",)}
    posterior = tensors(data, "posterior")
    torch.testing.assert_close(posterior["share"].sum(-1), torch.ones(10))
    mean = (
        posterior["level"][:, None]
        + posterior["slope"][..., None]
        + (posterior["z"] * posterior["share"][:, None, None]).sum(-1) * w
    )
    torch.testing.assert_close(posterior["mean"], mean)


@pytest.mark.parametrize("name", ["normal", "multivariate_normal"])
def test_lp_is_the_log_joint_and_the_sum_of_its_parts(name):
    x, w = torch.randn(2, 5), torch.randn(5)
    guide = guides.make(name, programs.nested, x, w)
    data = to_arviz(programs.nested, guide, x, w, num_samples=20)
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    log_joint = LogJoint(programs.nested, (x, w))
    for s in range(20):
        values = {
            k: v[s].reshape(log_joint.layout.sites[k].shape)
            for k, v in posterior.items()
            if k in log_joint.layout.sites
        }
        rows, other = log_joint.rows(values)
        torch.testing.assert_close(stats["lp"][s], rows.sum() + other)
    parts = sum(
        term.reshape(20, -1).sum(-1)
        for group in ("log_prior", "log_likelihood")
        for term in tensors(data, group).values()
    )
    torch.testing.assert_close(stats["lp"], parts)


def test_a_dimension_that_shares_its_name_with_a_variable_is_renamed():
    def model(x):
        with pyro.plate("x", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.randn(3)
    data = to_arviz(model, guides.make("normal", model, x), x, num_samples=5)
    assert dims(data, "posterior") == {"z": ("chain", "draw", "x_dim")}


def test_slashes_in_site_names_become_dots():
    def model(x):
        mu = pyro.sample("enc/mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.randn(3)
    data = to_arviz(model, AutoNormal(model), x, num_samples=5)
    assert dims(data, "posterior") == {"enc.mu": ("chain", "draw")}


def test_event_dims_must_name_every_event_axis():
    def model(x):
        z = pyro.sample(
            "z", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ["a", "b"]}
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=x)

    x = torch.randn(3)
    with pytest.raises(ValueError, match="'z' has 1 event dimensions"):
        to_arviz(model, AutoNormal(model), x, num_samples=5)


@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_sizes_that_coincide_are_not_confused(num_samples):
    def model(x, group):
        with pyro.plate("groups", 3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.deterministic("pair", torch.stack([theta[group], x, x], -1), event_dim=1)
            pyro.deterministic("same", torch.stack([theta[group], x, x], -1))
            pyro.sample("x", dist.Normal(theta[group], 1.0), obs=x)

    x, group = torch.randn(3), torch.tensor([2, 0, 0])
    data = to_arviz(model, AutoNormal(model), x, group, num_samples=num_samples)
    theta = tensors(data, "posterior")["theta"]
    torch.testing.assert_close(
        tensors(data, "log_likelihood")["x"],
        programs.normal_log_density(x, theta[:, group], 1.0).double(),
    )
    assert dims(data, "posterior")["theta"] == ("chain", "draw", "groups")
    assert dims(data, "posterior")["pair"] == ("chain", "draw", "data", "pair_dim_0")
    # An (N, 3) value with N = 3 has its rows first.
    assert dims(data, "posterior")["same"] == ("chain", "draw", "data", "same_dim_0")
    assert dims(data, "constant_data") == {"group": ("data",)}
    assert tensors(data, "constant_data")["group"].tolist() == [2, 0, 0]


def test_float32_is_widened_and_whole_numbers_stay():
    def model(counts):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0, dtype=torch.float32), 1.0))
        with pyro.plate("data", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    counts = torch.tensor([1, 0, 4])
    data = to_arviz(model, guides.make("normal", model, counts), counts, num_samples=5)
    assert data["posterior"]["rate"].dtype == np.float64
    assert data["observed_data"]["counts"].dtype == np.int64


# Sites that are neither latents nor data


def test_deterministic_sites_go_to_the_posterior_row_by_row():
    def model(x, size=None, index=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * mu)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.deterministic("square", torch.stack([z, z**2], -1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    guide = guides.make("normal", model, x)
    for batch_size in (None, 2):
        data = to_arviz(model, guide, x, num_samples=20, batch_size=batch_size)
        posterior = tensors(data, "posterior")
        torch.testing.assert_close(posterior["twice"], 2 * posterior["mu"])
        torch.testing.assert_close(
            posterior["square"], torch.stack([posterior["z"], posterior["z"] ** 2], -1)
        )
        assert dims(data, "posterior")["square"] == ("chain", "draw", "data", "square_dim_0")
        for group in ("observed_data", "log_likelihood", "posterior_predictive"):
            assert set(dims(data, group)) == {"x"}
        assert set(dims(data, "prior")) == {"mu", "twice", "z", "square"}


def test_a_summary_of_the_rows_outside_the_plate_is_refused_in_minibatches():
    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.deterministic("average", z.mean())

    x = torch.randn(5)
    guide = guides.make("normal", model, x)
    data = to_arviz(model, guide, x, num_samples=4)
    assert dims(data, "posterior")["average"] == ("chain", "draw")
    with pytest.raises(ValueError, match="'average' is outside the data plate but changes"):
        to_arviz(model, guide, x, num_samples=4, batch_size=2)


def test_factors_count_in_lp_and_are_no_data():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(mu**4))
        with pyro.plate("data", len(x)):
            pyro.factor("tilt", 0.1 * mu * x)
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.randn(5)
    data = to_arviz(model, AutoNormal(model), x, num_samples=20)
    mu, stats = tensors(data, "posterior")["mu"], tensors(data, "sample_stats")
    torch.testing.assert_close(stats["factor.penalty"], -(mu**4))
    torch.testing.assert_close(stats["factor.tilt"], 0.1 * mu[:, None] * x)
    assert set(dims(data, "log_likelihood")) == {"x"}
    lp = (
        programs.normal_log_density(mu, 0.0, 1.0)
        + programs.normal_log_density(x, mu[:, None], 1.0).sum(-1)
        - mu**4
        + 0.1 * mu * x.sum()
    )
    torch.testing.assert_close(stats["lp"], lp)


def test_scales_and_masks_of_the_program_act():
    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x, seen = torch.randn(4), torch.tensor([True, True, False, True])
    data = to_arviz(model, AutoNormal(model), x, seen, num_samples=10)
    mu = tensors(data, "posterior")["mu"]
    expected = 0.5 * programs.normal_log_density(x, mu[:, None], 1.0) * seen
    torch.testing.assert_close(tensors(data, "log_likelihood")["x"], expected)


def test_partly_observed_sites_are_imputed():
    def model(x, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=seen)

    x, seen = torch.randn(4), torch.tensor([True, True, False, True])
    data = to_arviz(model, AutoNormal(model), x, seen, num_samples=10)
    posterior = tensors(data, "posterior")
    assert set(posterior) == {"mu", "x_unobserved", "x"}
    torch.testing.assert_close(posterior["x"][:, seen], x[seen].expand(10, 3))
    torch.testing.assert_close(posterior["x"][:, 2], posterior["x_unobserved"][:, 2])
    assert (tensors(data, "log_likelihood")["x_observed"][:, 2] == 0).all()


def test_reparameterized_sites_come_back_under_their_own_name():
    model = poutine.reparam(programs.eight_schools, config={"theta": LocScaleReparam(0.0)})
    args = tuple(value.double() for value in programs.EIGHT_SCHOOLS)
    data = to_arviz(model, AutoNormal(model), *args, num_samples=30)
    posterior = tensors(data, "posterior")
    expected = posterior["mu"][:, None] + posterior["tau"][:, None] * posterior["theta_decentered"]
    torch.testing.assert_close(posterior["theta"], expected)
    assert dims(data, "posterior")["theta"] == ("chain", "draw", "school")
    assert set(dims(data, "observed_data")) == {"y"}


# Guides of every origin


def test_eight_schools_in_arviz():
    import arviz as az

    y, sigma = (value.double() for value in programs.EIGHT_SCHOOLS)
    guide = guides.make("normal", programs.eight_schools, y, sigma)
    data = to_arviz(programs.eight_schools, guide, y, sigma, num_samples=500)
    groups = data.children if hasattr(data, "children") else data.groups()
    assert set(groups) == ALL_GROUPS
    assert dims(data, "constant_data") == {"sigma": ("school",)}
    assert len(az.summary(data)) == 10
    assert az.loo(data, pointwise=True).n_data_points == 8
    assert data["log_likelihood"].attrs["conditional_on"] == "theta"
    assert "not about a new row" in data["log_likelihood"].attrs["note"]
    attrs = data["posterior"].attrs
    assert "R-hat" in attrs["warning"]
    assert attrs["inference_library"] == "pyro-ppl"
    assert attrs["inference_library_version"] == pyro.__version__
    assert attrs["creation_library"] == "pyro-zoo"
    assert attrs["num_samples"] == 500
    assert "Normal x Local" in attrs["guide"]


def test_loo_of_global_latents_is_not_called_conditional_and_matches_its_closed_form():
    import arviz as az

    x = torch.randn(30)
    data = to_arviz(programs.one_mean, programs.one_mean_exact, x, num_samples=4000)
    assert data["log_likelihood"].attrs["conditional_on"] == "global latents only"
    assert "note" not in data["log_likelihood"].attrs
    means = (x.sum() - x) / 30
    exact = programs.normal_log_density(x, means, math.sqrt(1 + 1 / 30)).sum()
    loo = az.loo(data)
    assert abs(float(getattr(loo, "elpd_loo", None) or loo.elpd) - float(exact)) < 0.1


def test_lp_and_log_q_are_what_psis_needs():
    import arviz as az

    x = torch.randn(30)

    def shifted(x):
        pyro.sample("mu", dist.Normal(x.sum() / 31 + 0.1, 31**-0.5))

    data = to_arviz(programs.one_mean, shifted, x, num_samples=4000)
    stats, mu = tensors(data, "sample_stats"), tensors(data, "posterior")["mu"]
    log_weights, khat = az.psislw((stats["lp"] - stats["log_q"]).numpy())
    # Weights correct the shifted guide: the weighted mean is the exact posterior mean.
    assert abs(float((np.exp(log_weights) * mu.numpy()).sum()) - float(x.sum() / 31)) < 0.02
    assert khat < 0.7


@pytest.mark.filterwarnings("ignore:.*init_loc_fn:FutureWarning")  # Pyro's IAF guide, 2026-11
@pytest.mark.parametrize("name", programs.AUTOGUIDES)
def test_autoguides_of_pyro(name):
    y, sigma = (value.double() for value in programs.EIGHT_SCHOOLS)
    guide = programs.AUTOGUIDES[name](programs.eight_schools)
    data = to_arviz(programs.eight_schools, guide, y, sigma, num_samples=40)
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    assert set(posterior) == {"mu", "tau", "theta"}
    lp = (
        dist.Normal(0.0, 5.0).log_prob(posterior["mu"])
        + dist.HalfNormal(5.0).log_prob(posterior["tau"])
        + dist.Normal(posterior["mu"][:, None], posterior["tau"][:, None])
        .log_prob(posterior["theta"])
        .sum(-1)
        + dist.Normal(posterior["theta"], sigma).log_prob(y).sum(-1)
    )
    torch.testing.assert_close(stats["lp"], lp)
    assert (posterior["mu"].diff() != 0).all()
    log_q = _log_q(name, guide, posterior, (y, sigma))
    if log_q is not None:
        torch.testing.assert_close(stats["log_q"], log_q)


def _log_q(name, guide, posterior, args):
    """The density of an autoguide at given draws, from its own distribution objects."""
    unconstrained = torch.cat(
        [posterior["mu"][:, None], posterior["tau"].log()[:, None], posterior["theta"]], -1
    )
    if name in ("AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"):
        log_q = guide.get_posterior(*args).log_prob(unconstrained)
        log_q = log_q.sum(-1) if log_q.dim() > 1 else log_q
        return (log_q - posterior["tau"].log()).detach()
    if name in ("AutoNormal", "AutoNormalMessenger"):
        terms = [
            dist.Normal(getattr(guide.locs, site), getattr(guide.scales, site)).log_prob(value)
            for site, value in (
                ("mu", posterior["mu"]),
                ("tau", posterior["tau"].log()),
                ("theta", posterior["theta"]),
            )
        ]
        return (terms[0] + terms[1] - posterior["tau"].log() + terms[2].sum(-1)).detach()
    return None


@pytest.mark.parametrize("name", [name for name in CORE_GUIDES if "delta" not in name])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_every_guide_of_the_grid_over_minibatches(name, batch_size):
    x = torch.randn(7) * 2 + 1
    guide = guides.make(name, programs.two_levels, x)
    data = to_arviz(programs.two_levels, guide, x, num_samples=30, batch_size=batch_size)
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    rows, other = LogJoint(programs.two_levels, (x,)).rows(
        {"mu": posterior["mu"][0], "z": posterior["z"][0]}
    )
    torch.testing.assert_close(stats["lp"][0], rows.sum() + other)
    assert torch.isfinite(stats["log_q"]).all()
    assert (posterior["mu"].diff() != 0).all()


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7])
def test_rows_come_out_in_the_order_of_the_data(batch_size):
    x = torch.arange(7.0) * 100

    def guide(x, size=None, index=None):
        pyro.sample("mu", dist.Normal(300.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(x, 0.01))

    data = to_arviz(programs.two_levels, guide, x, num_samples=10, batch_size=batch_size)
    for values in (
        tensors(data, "posterior")["z"].mean(0),
        tensors(data, "posterior_predictive")["x"].mean(0),
        tensors(data, "observed_data")["x"],
    ):
        assert ((values - x).abs() < 5).all()


@pytest.mark.parametrize("batch_size", [None, 3])
def test_local_parameters_meet_their_own_rows(batch_size):
    x = torch.arange(7.0) * 100
    guide = guides.make("normal", programs.two_levels, x, init_scale=0.01)
    (parameter,) = guide.schemes["data"].parameters()
    with torch.no_grad():
        parameter[..., 0] = x
    data = to_arviz(programs.two_levels, guide, x, num_samples=10, batch_size=batch_size)
    assert ((tensors(data, "posterior")["z"].mean(0) - x).abs() < 5).all()


def test_an_autoguide_built_on_minibatches_meets_its_own_rows():
    x = torch.arange(6.0) * 100
    guide = AutoNormal(programs.two_levels, init_scale=0.01)
    guide(x[:2], size=6, index=torch.tensor([0, 1]))
    with torch.no_grad():
        guide.locs.z[:] = x
    data = to_arviz(programs.two_levels, guide, x, num_samples=10, batch_size=2)
    assert ((tensors(data, "posterior")["z"].mean(0) - x).abs() < 5).all()
    with pytest.raises(ValueError, match="leave batch_size out"):
        to_arviz(programs.two_levels, guide, x, num_samples=10, batch_size=4)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_laplace_posterior_of_predictive_coding(batch_size):
    def model(x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, programs.SIGMA), obs=x)

    x = torch.randn(7) + 1
    loop = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.01}), num_steps=200)
    guide = loop.posterior(x)
    data = to_arviz(model, guide, x, num_samples=100, batch_size=batch_size)
    stats = tensors(data, "sample_stats")
    evidence = programs.normal_log_density(x, 0.0, math.sqrt(1 + programs.SIGMA**2)).sum()
    # The posterior of a linear Gaussian model is Gaussian, and Laplace finds it exactly.
    gap = stats["lp"] - stats["log_q"]
    torch.testing.assert_close(gap, evidence.expand(100), atol=1e-7, rtol=0)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_laplace_posterior_with_global_latents(batch_size):
    x = torch.randn(7) + 1
    exact = programs.TwoLevelsExact(x)
    mean = (exact.mean + x / programs.SIGMA**2) / (1 + programs.SIGMA**-2)
    guide = laplace(programs.two_levels, {"mu": exact.mean, "z": mean}, (x,), {})
    data = to_arviz(programs.two_levels, guide, x, num_samples=100, batch_size=batch_size)
    stats = tensors(data, "sample_stats")
    gap = stats["lp"] - stats["log_q"]
    evidence = programs.two_levels_evidence(x)
    torch.testing.assert_close(gap, evidence.expand(100), atol=1e-9, rtol=0)


# Runs that vmap cannot take


class _NumpyNoise(dist.Normal):
    """A sampler outside of torch, which vmap runs only once."""

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        return self.loc.expand(shape) + torch.as_tensor(np.random.randn(*shape))

    def expand(self, batch_shape, _instance=None):
        return _NumpyNoise(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


def test_draws_from_a_sampler_outside_of_torch_differ():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", _NumpyNoise(mu, 1.0), obs=x)

    x = torch.randn(3)
    data = to_arviz(model, programs.one_mean_exact, x, num_samples=1000)
    noise = tensors(data, "posterior_predictive")["x"] - tensors(data, "posterior")["mu"][:, None]
    assert_mean(noise**2, torch.tensor(1.0))
    assert_mean(noise[:, 0] * noise[:, 1], 0.0)


def test_control_flow_on_values_is_looped():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        loc = mu if mu > 0 else 2 * mu
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = torch.randn(3)
    data = to_arviz(model, programs.one_mean_exact, x, num_samples=50)
    mu = tensors(data, "posterior")["mu"]
    loc = torch.where(mu > 0, mu, 2 * mu)
    torch.testing.assert_close(
        tensors(data, "log_likelihood")["x"],
        programs.normal_log_density(x, loc[:, None], 1.0),
    )


SAMPLERS = {
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.ones(1), 4 * torch.eye(1)),
    "Exponential": lambda: dist.Exponential(0.5),
    "Laplace": lambda: dist.Laplace(1.0, 2.0),
    "Gamma": lambda: dist.Gamma(2.0, 0.5),
    "Beta": lambda: dist.Beta(2.0, 3.0),
    "StudentT": lambda: dist.StudentT(9.0, 1.0, 2.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Poisson": lambda: dist.Poisson(3.0),
    "Binomial": lambda: dist.Binomial(5, torch.tensor(0.3)),
    "LogNormal": lambda: dist.LogNormal(0.0, 0.5),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_vectorized_draws_follow_their_distribution(name):
    fn = SAMPLERS[name]()

    def model(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", fn, obs=x)

    x = torch.ones(3, *fn.event_shape)
    data = to_arviz(model, lambda x: pyro.sample("mu", dist.Normal(0.0, 1.0)), x, num_samples=4000)
    for group in ("posterior_predictive", "prior_predictive"):
        draws = tensors(data, group)["x"].double()
        assert_mean(draws, fn.mean.double())
        assert_mean((draws - fn.mean) ** 2, fn.variance.double())
        pair = (draws[:, 0] - fn.mean) * (draws[:, 1] - fn.mean)
        assert_mean(pair, 0.0)


def test_draws_taken_in_chunks_are_those_taken_at_once(monkeypatch):
    monkeypatch.setattr(resimulation, "_CHUNK_ELEMENTS", 8 * 7)
    x = torch.randn(7) + 1
    guide = programs.TwoLevelsExact(x)
    data = to_arviz(programs.two_levels, guide, x, num_samples=27, batch_size=7)
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    torch.testing.assert_close(
        tensors(data, "log_likelihood")["x"],
        programs.normal_log_density(x, posterior["z"], programs.SIGMA),
    )
    evidence = programs.two_levels_evidence(x).expand(27)
    torch.testing.assert_close(stats["lp"] - stats["log_q"], evidence, atol=1e-9, rtol=0)
    assert (posterior["mu"].diff() != 0).all()


def test_programs_that_allow_it_are_vectorized():
    runs = []

    def model(x):
        runs.append(len(runs))
        programs.one_mean(x)

    to_arviz(model, programs.one_mean_exact, torch.randn(3), num_samples=500)
    # The layout, and for scores, predictions and prior one plain, one probing and one full run.
    assert len(runs) < 15


def test_no_tensor_of_vmap_stays_behind_in_a_messenger():
    x = torch.randn(7)
    guide = AutoNormalMessenger(programs.two_levels)
    to_arviz(programs.two_levels, guide, x, num_samples=20)
    assert math.isfinite(guide.trace.nodes["mu"]["value"].item())


# Options and errors


def test_only_the_wanted_groups():
    x = torch.randn(3)
    wanted = ("posterior", "observed_data")
    arrays, _, attrs = to_arrays(
        programs.one_mean, programs.one_mean_exact, x, num_samples=5, groups=wanted
    )
    assert set(arrays) == set(wanted)
    assert set(attrs) == {"/", *wanted}
    with pytest.raises(ValueError, match="Unknown group 'posteriors'"):
        to_arviz(programs.one_mean, programs.one_mean_exact, x, groups=["posteriors"])


def test_the_export_leaves_gradients_parameters_and_traces_alone():
    x = torch.randn(4)
    guide = guides.make("normal", programs.two_levels, x)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    to_arviz(programs.two_levels, guide, x, num_samples=5)
    assert all(parameter.grad is None for parameter in guide.parameters())
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_must_be_positive(batch_size):
    x = torch.randn(3)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        to_arviz(programs.one_mean, programs.one_mean_exact, x, batch_size=batch_size)


def test_num_samples_must_be_positive():
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        to_arviz(programs.one_mean, programs.one_mean_exact, torch.randn(3), num_samples=0)


def test_batches_need_a_data_plate():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mu, 1.0).expand([3]).to_event(1), obs=x)

    x = torch.randn(3)
    data = to_arviz(model, AutoNormal(model), x, num_samples=3)
    assert dims(data, "log_likelihood") == {"x": ("chain", "draw")}
    with pytest.raises(ValueError, match="there is none"):
        to_arviz(model, AutoNormal(model), x, num_samples=3, batch_size=2)


def test_a_joint_guide_is_refused_in_minibatches_and_exact_without():
    x = torch.randn(6)
    guide = AutoMultivariateNormal(programs.two_levels)
    data = to_arviz(programs.two_levels, guide, x, num_samples=5)
    assert tensors(data, "posterior")["z"].shape == (5, 6)
    with pytest.raises(ValueError, match="leave batch_size out"):
        to_arviz(programs.two_levels, guide, x, num_samples=5, batch_size=2)

    def joint(x, size=None, index=None):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        noise = pyro.sample(
            "noise", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Delta(noise, log_density=torch.tensor(1.0)))

    with pytest.raises(ValueError, match="Leave batch_size out"):
        to_arviz(programs.two_levels, joint, x, num_samples=5, batch_size=2)


def test_globals_alone_over_minibatches_of_a_program_without_row_numbers():
    x = torch.randn(7)
    mean = x.sum() / 8

    def guide(_):
        pyro.sample("mu", dist.Normal(mean, 8**-0.5))

    data = to_arviz(programs.one_mean, guide, x, num_samples=50, batch_size=3)
    stats = tensors(data, "sample_stats")
    evidence = programs.one_mean_evidence(x).expand(50)
    torch.testing.assert_close(stats["lp"] - stats["log_q"], evidence, atol=1e-9, rtol=0)
    # This guide reads the global posterior off the rows it is called with.
    with pytest.raises(ValueError, match="'mu' is outside the data plate but changes"):
        to_arviz(programs.one_mean, programs.one_mean_exact, x, num_samples=5, batch_size=3)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_simulated_data_outside_the_data_plate_is_shared_by_all_rows(batch_size):
    def model(y, x, size=None, index=None):
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + 10 * y, 0.1), obs=x)

    def guide(y, x, size=None, index=None):
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    args = torch.tensor(3.0), torch.randn(5)
    data = to_arviz(model, guide, *args, num_samples=100, batch_size=batch_size)
    for group, latents in (("posterior_predictive", "posterior"), ("prior_predictive", "prior")):
        drawn = tensors(data, group)
        residual = drawn["x"] - tensors(data, latents)["z"] - 10 * drawn["y"][:, None]
        assert residual.abs().max() < 1.0
        assert_mean(drawn["y"], 0.0)
    assert dims(data, "observed_data") == {"y": (), "x": ("data",)}


def test_points_that_follow_from_replayed_sites_may_round_differently():
    x = torch.randn(5)

    def guide(x, size=None, index=None):
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("mu", dist.Delta(noise * (1 + 1e-14 * len(x)), log_density=torch.tensor(1.0)))
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    data = to_arviz(programs.two_levels, guide, x, num_samples=20, batch_size=2)
    posterior, stats = tensors(data, "posterior"), tensors(data, "sample_stats")
    log_q = (
        programs.normal_log_density(posterior["mu"], 0.0, 1.0)
        + 1.0
        + programs.normal_log_density(posterior["z"], 0.0, 1.0).sum(-1)
    )
    torch.testing.assert_close(stats["log_q"], log_q)


def test_a_guide_without_a_data_plate_brings_that_to_the_export():
    x = torch.randn(4)
    guide = guides.make("multivariate_normal", programs.two_levels, x, data_plate=None)
    data = to_arviz(programs.two_levels, guide, x, num_samples=20)
    assert dims(data, "posterior")["z"] == ("chain", "draw", "data")
    assert data["log_likelihood"].attrs["conditional_on"] == "z"
    with pytest.raises(ValueError, match="there is none"):
        to_arviz(programs.two_levels, guide, x, num_samples=20, batch_size=2)


def test_positive_globals_replay_without_losing_their_density():
    def model(x, size=None, index=None):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Gamma(2.0, rate))
            pyro.sample("x", dist.Normal(z * share[0], 1.0), obs=x)

    x = torch.rand(7)
    for guide in (guides.make("normal", model, x), AutoNormal(model)):
        if isinstance(guide, AutoNormal):
            guide(x[:1], size=7, index=torch.tensor([0]))
        data = to_arviz(model, guide, x, num_samples=300, batch_size=1)
        assert torch.isfinite(tensors(data, "sample_stats")["log_q"]).all()


def test_an_improper_prior_is_exported_without_its_prior():
    def model(x):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x = torch.randn(5)
    guide = guides.make("normal", model, x)
    with pytest.raises(ValueError, match="'prior' needs a program that can be simulated"):
        to_arviz(model, guide, x, num_samples=5)
    wanted = ALL_GROUPS - {"prior", "prior_predictive", "constant_data"}
    data = to_arviz(model, guide, x, num_samples=5, groups=wanted)
    assert (tensors(data, "log_prior")["mu"] == 0).all()


def test_an_argument_named_as_a_plate_keeps_the_plate():
    def model(data, weights):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=data * weights["w"])

    args = torch.randn(5), {"w": torch.tensor(2.0), "names": ["a"]}
    data = to_arviz(model, guides.make("normal", model, *args), *args, num_samples=5)
    assert dims(data, "log_likelihood") == {"x": ("chain", "draw", "data")}
    assert dims(data, "constant_data") == {"data_arg": ("data",), "weights.w": ()}


def test_a_point_mass_is_refused_with_the_way_out():
    x = torch.randn(3)
    for guide in (AutoDelta(programs.two_levels), guides.make("delta", programs.two_levels, x)):
        with pytest.raises(ValueError, match=r"point mass.*laplace"):
            to_arviz(programs.two_levels, guide, x, num_samples=5)


def test_a_guide_for_another_model_names_the_site():
    x = torch.randn(3)
    with pytest.raises(ValueError, match="'z', which the model samples"):
        to_arviz(programs.two_levels, programs.one_mean_exact, x, num_samples=5)


def test_arguments_that_do_not_slice_the_plate_are_named():
    def model(x, n):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x.rows)

    x = SimpleNamespace(rows=torch.randn(4))
    with pytest.raises(ValueError, match="State the arguments that hold rows"):
        to_arviz(model, AutoNormal(model), x, 4, num_samples=5, batch_size=2)


def test_diverged_parameters_are_an_error():
    def guide(x):
        pyro.sample("mu", dist.Normal(torch.tensor(math.nan), 1.0, validate_args=False))

    x = torch.randn(3)
    with pytest.raises(ValueError, match="NaN or \\+inf"):
        to_arviz(programs.one_mean, guide, x, num_samples=5)

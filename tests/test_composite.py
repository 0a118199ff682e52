"""Composite guides: a cell for some of the latents, every latent covered once."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.diagnostics import elbo
from guides.draws import draw
from guides.families.normal import Normal
from guides.inference import SVI
from guides.objectives import AnalyticELBO, RefinementELBO


def program(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Global latents, one of them in a plate of its own, and two latents of each row."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("features", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        top = pyro.sample("z.top", dist.Normal(0.0, 1.0))
        low = pyro.sample("z.low", dist.Normal(top, 1.0))
        pyro.sample("x", dist.Normal(loc + low.unsqueeze(-1), scale + 0.1).to_event(1), obs=x)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

COMPOSITES: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "global and data": (
        {"global": "multivariate_normal", "data": ("amortized_normal", {"hidden": (8,)})},
        {"global": {"scale", "loc"}, "data": {"z.top", "z.low"}},
    ),
    "a plate and patterns": (
        {"features": "normal", "scale": "delta", "z.*": "iterative_normal"},
        {"global_0": {"scale"}, "global_1": {"loc"}, "data": {"z.top", "z.low"}},
    ),
    "two cells in the rows": (
        {
            "global": "low_rank_normal",
            "z.top": "semi_amortized_normal",
            "z.low": ("amortized_planar", {"transforms": 2}),
        },
        {"global": {"scale", "loc"}, "data_0": {"z.top"}, "data_1": {"z.low"}},
    ),
    "refined twice": (
        {"global": "normal", "z.top": "iterative_normal", "z.low": "laplace_normal"},
        {"global": {"scale", "loc"}, "data_0": {"z.top"}, "data_1": {"z.low"}},
    ),
    "levels beside globals": (
        {"global": "normal", "data": "bottom_up_normal"},
        {"global": {"scale", "loc"}, "data_z_low": {"z.low"}, "data_z_top": {"z.top"}},
    ),
    "pattern over globals and rows": (
        {"*": "amortized_normal"},
        {"global": {"scale", "loc"}, "data": {"z.top", "z.low"}},
    ),
}


@pytest.mark.parametrize("case", COMPOSITES)
def test_cells_cover_their_latents_and_learn(case: str) -> None:
    cells, groups = COMPOSITES[case]
    guide = guides.make(cells, program, X)
    found = {g.name: {site.name for site in g.sites} for g in guide.layout(X).groups}
    assert found == groups
    trace = poutine.trace(guide).get_trace(X)
    replayed = poutine.trace(poutine.replay(program, trace)).get_trace(X)
    assert torch.isfinite(replayed.log_prob_sum())
    for name in ("scale", "loc", "z.top", "z.low"):
        assert torch.equal(trace.nodes[name]["value"], replayed.nodes[name]["value"])
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), RefinementELBO(num_particles=2))
    losses = svi.run(60, ((X,), {})).losses
    assert sum(losses[-15:]) < sum(losses[:15])
    assert not svi.frozen
    assert set(guide.locations(X)) == {"scale", "loc", "z.top", "z.low"}
    svi.step(X[:3], 8, torch.tensor([1, 4, 6]))
    assert Predictive(program, guide=guide, num_samples=3)(X)["z.low"].shape == (3, 8)


@pytest.mark.parametrize("case", [c for c in COMPOSITES if c != "a plate and patterns"])
def test_draws_and_traces_agree_on_the_density(case: str) -> None:
    guide = guides.make(COMPOSITES[case][0], program, X)
    torch.manual_seed(1)
    draws = draw(program, guide, (X,), num_samples=1)
    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(X)
    total = draws.log_q_rows.sum() + draws.log_q_global.sum()
    for name, value in draws.values.items():
        assert torch.allclose(value[0], trace.nodes[name]["value"], atol=1e-5), name
    expected = float(trace.log_prob_sum().detach())
    assert float(total) == pytest.approx(expected, abs=1e-3)
    assert draws.joint


def test_a_product_of_cells_is_the_product_of_guides() -> None:
    """Mean field split in two is mean field: equal parameters, equal bounds."""
    torch.manual_seed(0)
    model = zoo.LinearGaussian(dims=(2, 3, 5), covariance="full").requires_grad_(False)
    with torch.no_grad():
        x = model(size=4)
    whole = guides.make("normal", model, x)
    split = guides.make({"z1": "normal", "z2": "normal"}, model, x)
    lam = torch.randn(4, 10)
    order = [site.name for site in whole.layout(x).groups[0].sites]
    sizes = [site.size for site in whole.layout(x).groups[0].sites]
    with torch.no_grad():
        whole.schemes["data"].table.copy_(lam)
        locs, raws = lam[:, :5].split(sizes, -1), lam[:, 5:].split(sizes, -1)
        for group in split.layout(x).groups:
            i = order.index(group.sites[0].name)
            split.schemes[group.name].table.copy_(torch.cat([locs[i], raws[i]], -1))
    scores = [elbo(model, guide, x, num_samples=4000) for guide in (whole, split)]
    error = sum(score.rows_error**2 for score in scores) ** 0.5
    assert ((scores[0].rows - scores[1].rows).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"global": "normal"}, "No cell covers latent site 'z.top'"),
        (
            {"global": "normal", "data": "normal", "z.low": "delta"},
            "'data' and 'z.low' both cover latent site 'z.low'.*in place of 'data' name .*'z.top'",
        ),
        (
            {"*": "normal", "theta*": "normal"},
            r"Cell 'theta\*' covers no latent.*Latents: scale, loc, z.top, z.low",
        ),
        ({"global": "amortized_normal", "data": "normal"}, "global latents have no rows to read"),
        (
            {"scale": "amortized_normal", "loc": "normal", "data": "normal"},
            "Cell 'scale' is amortized, but global latents have no rows to read",
        ),
        ({"global": "normal", "data": "amortised_normal"}, "Did you mean 'amortized_normal'"),
        (
            {"global": "normal", "z.top": "bottom_up_normal", "z.low": "normal"},
            "there is one only: z.top",
        ),
        ({"global": "normal", "data": "laplace_planar"}, "There is no guide 'laplace_planar'"),
        ({"global": "normal", "data": "top_down_planar"}, "independent coordinates"),
    ],
)
def test_what_does_not_fit_is_refused(cells: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guides.make(cells, program, X)


def test_options_belong_to_cells() -> None:
    cells = {"global": "normal", "data": "amortized_normal"}
    with pytest.raises(TypeError, match="A composite guide has no option 'hidden'"):
        guides.make(cells, program, X, hidden=(8,))
    with pytest.raises(ValueError, match="Pass either family="):
        guides.Guide(program, X)
    with pytest.raises(ValueError, match="Pass either family="):
        guides.Guide(program, X, family=Normal, cells={})


def positive(x: Tensor) -> None:
    """A positive global and a positive latent of each row."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, rate))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_point_beside_a_density_takes_no_jacobian_from_it() -> None:
    x = torch.tensor([0.5, 1.0, 2.0])
    guide = guides.make({"global": "delta", "data": "normal"}, positive, x)
    nodes = poutine.trace(guide).get_trace(x).nodes
    assert not nodes["rate"]["fn"].log_density.any()
    z = nodes["z"]["value"]
    torch.testing.assert_close(nodes["z"]["fn"].log_density, -z.log())  # z = exp(u)
    torch.manual_seed(1)
    found = AnalyticELBO(2000).loss(positive, guide, x)
    # By hand: q moved to the positive numbers is a log-normal.
    rate = nodes["rate"]["value"].detach()
    loc, raw = guide.parameters_of(x)["data"].detach().unbind(-1)
    q = dist.LogNormal(loc, torch.nn.functional.softplus(raw))
    z = q.sample((2000,))
    rows = dist.Gamma(2.0, rate).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q.log_prob(z)
    draws = -(rows.sum(-1) + dist.Gamma(2.0, 1.0).log_prob(rate))
    error = float(draws.std()) / 2000**0.5
    assert abs(found - float(draws.mean())) < 6 * error
    traced = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
    assert abs(traced.loss(positive, guide, x) - float(draws.mean())) < 6 * error
    whole = guides.make({"global": "delta", "data": "normal"}, positive, x, jacobian=True)
    nodes = poutine.trace(whole).get_trace(x).nodes
    torch.testing.assert_close(nodes["rate"]["fn"].log_density, -nodes["rate"]["value"].log())


def test_a_refined_cell_beside_a_point_keeps_its_jacobian() -> None:
    x = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def model(x: Tensor) -> None:
        one = torch.ones((), dtype=x.dtype)
        rate = pyro.sample("rate", dist.Gamma(2 * one, one))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2 * one, rate))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = guides.make(
        {"global": "delta", "data": ("laplace_normal", {"num_iterations": 20})}, model, x
    )
    lam = guide.parameters_of(x)
    u, rate = lam["data"][:, 0].detach().requires_grad_(), lam["global"].detach().exp()
    z = u.exp()
    log_p = dist.Gamma(2.0, rate).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) + u
    (slope,) = torch.autograd.grad(log_p.sum(), u)
    assert slope.abs().max() < 1e-6


def test_a_masked_latent_needs_a_point_of_its_own() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=x > 0):
                z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([1.0, -1.0])
    with pytest.raises(ValueError, match="Latent site 'z' is masked"):
        guides.make({"global": "delta", "data": "normal"}, model, x)
    guides.make({"global": "normal", "data": "delta"}, model, x)


def test_one_table_of_free_rows_makes_a_guide_local() -> None:
    cells = {"global": "normal", "z.top": "amortized_normal", "z.low": "normal"}
    guide = guides.make(cells, program, X)
    assert not guide.amortized
    assert "amortized: no" in repr(guide)
    assert guides.make({**cells, "z.low": "amortized_normal"}, program, X).amortized

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 8, subsample_size=4):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    with pytest.raises(ValueError, match="data of the call do not follow the draw"):
        guides.make({"top": "amortized_normal", "low": "normal"}, subsampled, X[:4, 0])

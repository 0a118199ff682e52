"""Bad input gets one clear error that names the site and the fix, and loses nothing."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
from guides.diagnostics import elbo, pareto_khat
from guides.inference import SVI, PredictiveCoding, laplace
from guides.layout import layout

X = torch.randn(6, 3)


def good(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), obs=x)


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(k[..., None].float(), torch.ones(3)).to_event(1), obs=x)


def moving_support(x: Tensor) -> None:
    top = pyro.sample("top", dist.Gamma(2.0, 1.0))
    pyro.sample("inside", dist.Uniform(0.0, top))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(top, torch.ones(3)).to_event(1), obs=x)


def moving_structure(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if z > 0.1:
        pyro.sample("extra", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=x)


def hidden_subsample(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, torch.ones(3)).to_event(1), obs=x)
    with pyro.plate("other", 10, subsample_size=2):
        pyro.sample("w", dist.Normal(0.0, 1.0))


def masked_latent(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.mask(mask=torch.arange(len(x)) > 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(3)).to_event(1), obs=x)


def only_global(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=x)


def two_plates(x: Tensor) -> None:
    with pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_latents(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, torch.ones(3)).to_event(1), obs=x)


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> None:
        pyro.module("lazy", self.net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def discrete_without_plate() -> None:
    pyro.sample("k", dist.Bernoulli(0.5))


BAD_PROGRAMS: dict[str, tuple[Any, str]] = {
    "discrete": (discrete, r"site 'k' is discrete \(Categorical\).*Sum it out exactly"),
    "moving_support": (
        moving_support,
        "support of latent site 'inside' depends on another latent",
    ),
    "moving_structure": (moving_structure, "structure of the program depends on its latents"),
    "hidden_subsample": (hidden_subsample, "Plate 'other' is subsampled .*data_plate='other'"),
    "no_latents": (no_latents, "no latent sites"),
    "lazy": (Lazy(), "Model parameter 'net.weight' is not initialized.*Call the model once"),
}


@pytest.mark.parametrize("name", BAD_PROGRAMS)
@pytest.mark.parametrize("route", ["guide", "predictive_coding"])
def test_programs_that_cannot_work(name: str, route: str) -> None:
    model, message = BAD_PROGRAMS[name]
    run = {
        "guide": lambda: guides.make("normal", model, X),
        "predictive_coding": lambda: PredictiveCoding(model, pyro.optim.Adam({})).step(X),
    }
    with pytest.raises((ValueError, NotImplementedError), match=f"(?s){message}"):
        run[route]()


def test_a_discrete_site_without_data_is_named_too() -> None:
    with pytest.raises(NotImplementedError, match="site 'k' is discrete"):
        layout(discrete_without_plate)


BAD_GUIDES: dict[str, tuple[Any, str, dict[str, Any], str]] = {
    "masked": (masked_latent, "normal", {}, "Latent site 'z' is masked.*delta family"),
    "nothing local": (
        only_global,
        "amortized_normal",
        {},
        "all latents of this program are global",
    ),
    "ambiguous": (two_plates, "amortized_normal", {}, "data_plate= one of rows, columns"),
    "unknown plate": (good, "normal", {"data_plate": "rows"}, "no vectorized plate named 'rows'"),
    "jacobian": (good, "normal", {"jacobian": False}, "only a family without a density"),
    "unknown inputs": (good, "amortized_normal", {"inputs": ("y",)}, "does not have: y"),
    "wrong inputs": (
        good,
        "amortized_normal",
        {"inputs": lambda x: x[:2]},
        r"one row per datum \(6\), got shape \(2, 3\)",
    ),
    "wrong encoder": (
        good,
        "amortized_normal",
        {"encoder": nn.Linear(3, 5)},
        r"encoder must map \(B, 3\) to \(B, 4\).*Got \(6, 5\)",
    ),
    "init_scale": (good, "normal", {"init_scale": 0.0}, "init_scale must be positive"),
}


@pytest.mark.parametrize("case", BAD_GUIDES)
def test_guides_that_cannot_be_built(case: str) -> None:
    model, name, options, message = BAD_GUIDES[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        guides.make(name, model, X, **options)


def test_unknown_names_and_options_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"Unknown guide 'nromal'.*amortized_normal"):
        guides.make("nromal", good, X)
    with pytest.raises(TypeError, match=r"no option 'hiden'.*hidden"):
        guides.make("amortized_normal", good, X, hiden=(3,))
    with pytest.raises(ValueError, match=r"no attribute default_guide.*amortized_normal"):
        guides.pair(good, X)


BAD_CALLS: dict[str, tuple[str, tuple[Tensor, ...], dict[str, Any], str]] = {
    "nan": ("normal", (X * torch.tensor([1.0, torch.nan, 1.0]),), {}, "site 'x' contains NaN"),
    "empty": ("amortized_normal", (X[:0],), {}, "plate of the program is empty"),
    "features": (
        "amortized_normal",
        (torch.randn(6, 4),),
        {},
        r"observed site 'x' has shape \(6, 4\), which does not fit its distribution's \(6, 3\)",
    ),
    "new rows": ("normal", (torch.randn(4, 3),), {}, "free parameters for 6 rows.*amortized"),
    "row number": (
        "normal",
        (X[:2],),
        {"size": 6, "index": torch.tensor([1, 6])},
        r"Row numbers must be in 0 \.\. 5, got 1 \.\. 6",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_calls_that_cannot_work_leave_the_guide_usable(case: str) -> None:
    name, args, kwargs, message = BAD_CALLS[case]
    guide = guides.make(name, good, X)
    svi = SVI(good, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = svi.evaluate_loss(X)
    state = {k: v.clone() for k, v in guide.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        svi.step(*args, **kwargs)
    assert all(torch.equal(v, state[k]) for k, v in guide.state_dict().items())
    assert abs(svi.evaluate_loss(X) - before) < 50


def test_an_error_inside_the_program_says_which_call_it_was() -> None:
    def product(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x @ torch.ones(3))

    guide = guides.make("normal", product, X)
    with pytest.raises(RuntimeError) as caught:
        guide(torch.randn(6, 4))
    assert any("tensor(6, 4)" in note for note in caught.value.__notes__)


def test_an_encoder_names_the_number_of_features_it_reads() -> None:
    def any_width(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(x.shape), 1.0).to_event(1), obs=x)

    guide = guides.make("amortized_normal", any_width, X)
    with pytest.raises(ValueError, match="reads 3 features a row, got 4"):
        guide(torch.randn(6, 4))


def test_a_guide_for_another_model_is_refused() -> None:
    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1, True), torch.ones(3)).to_event(1), obs=x)

    guide = guides.make("normal", good, X)
    with pytest.raises(ValueError, match="guide covers z, but the model samples w"):
        elbo(other, guide, X)
    auto = pyro.infer.autoguide.AutoNormal(other)
    with pytest.raises(ValueError, match=r"Guide has no site 'z'.*w"):
        elbo(good, auto, X)


def test_a_model_that_changed_its_sites_is_refused() -> None:
    def model(x: Tensor, more: bool = False) -> None:
        if more:
            pyro.sample("more", dist.Normal(0.0, 1.0))
        good(x)

    guide = guides.make("normal", model, X)
    with pytest.raises(ValueError, match="samples more, which this guide does not cover"):
        guide(X, more=True)
    wide = guides.make("normal", model, X, model_kwargs={"more": True})
    with pytest.raises(ValueError, match="does not sample more"):
        wide(X)


def test_an_encoder_without_data_asks_for_inputs() -> None:
    def model(n: int, x: Tensor | None = None) -> None:
        with pyro.plate("data", n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(3)).to_event(1), obs=x)

    guide = guides.make("amortized_normal", model, 6, X)
    with pytest.raises(ValueError, match="Call with data, or pass inputs="):
        guide(6)


PREDICTIVE_CODING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "optim": ({"optim": torch.optim.Adam}, TypeError, "optim must be a PyroOptim, got type"),
    "num_steps": ({"num_steps": -1}, ValueError, "num_steps must not be negative"),
    "step_size": ({"step_size": -0.1}, ValueError, "step_size must be"),
    "parameterization": ({"parameterization": "both"}, ValueError, "got 'both'"),
    "solver": ({"solver": "magic"}, ValueError, "got 'magic'"),
    "newton_steps": ({"newton_steps": -2}, ValueError, "newton_steps must not be negative"),
    "global_rate": ({"global_rate": 2.0}, ValueError, "global_rate must be in"),
}


@pytest.mark.parametrize("case", PREDICTIVE_CODING)
def test_predictive_coding_options(case: str) -> None:
    options, kind, message = PREDICTIVE_CODING[case]
    options = {"optim": pyro.optim.Adam({}), **options}
    with pytest.raises(kind, match=message):
        PredictiveCoding(good, **options)


def test_a_step_above_the_stability_bound_says_so() -> None:
    pc = PredictiveCoding(good, pyro.optim.Adam({}), num_steps=2000, step_size=10.0)
    with pytest.raises(ValueError, match=r"diverged.*2 / lambda_max"):
        pc.infer(X)


def test_data_outside_the_support_are_named() -> None:
    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("n", dist.Poisson(z), obs=x)

    with pytest.raises(ValueError, match="support"):
        PredictiveCoding(counts, pyro.optim.Adam({})).step(torch.tensor([1.0, -2.0]))


def test_an_indefinite_hessian_names_the_site_and_the_fix() -> None:
    def saddle(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b**2, 0.1), obs=x)

    zeros = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(
        guides.inference.IndefiniteHessianError,
        match=r"not positive definite at site 'b' in 1 of 2 rows.*Relax longer.*loc \+ scale",
    ):
        laplace(saddle, zeros, (torch.tensor([2.0, -2.0]),))


def test_a_point_mass_has_no_scores() -> None:
    guide = guides.make("delta", good, X)
    with pytest.raises(ValueError, match=r"point mass.*Laplace"):
        elbo(good, guide, X)
    auto = pyro.infer.autoguide.AutoDelta(good)
    with pytest.raises(ValueError, match=r"point mass.*Laplace"):
        elbo(good, auto, X)


def test_too_few_draws_for_a_tail() -> None:
    with pytest.raises(ValueError, match="at least 25"):
        pareto_khat(good, guides.make("normal", good, X), X, num_samples=10)


def test_the_laplace_posterior_knows_its_rows() -> None:
    pc = PredictiveCoding(good, pyro.optim.Adam({}), num_steps=100)
    posterior = pc.posterior(X)
    with pytest.raises(ValueError, match="is for 6 of 6 rows, but plate 'data' has size 4"):
        posterior(X[:4])
    index = torch.tensor([3, 1])
    chosen = posterior.locations(X[index], size=6, index=index)["z"]
    assert torch.equal(chosen, posterior.locations(X)["z"][index])


def test_batches_of_the_wrong_kind() -> None:
    pc = PredictiveCoding(good, pyro.optim.Adam({}))
    with pytest.raises(TypeError, match=r"full-batch steps pass \(\(x,\), \{\}\)"):
        pc.run(1, X)
    with pytest.raises(TypeError, match=r"tuple of tensors.*pass \(\(x, y, \.\.\.\), \{\}\)"):
        pc.run(1, (X, X))
    with pytest.raises(ValueError, match="batches is empty"):
        pc.run(1, [])
    with pytest.raises(TypeError, match="got int"):
        pc.run(1, 3)

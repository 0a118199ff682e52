"""autoguides: Pyro's autoguides beside the guides of this project, on targets that both can run.

Targets of at most 200 latents are run by all. A larger one shows that autoguides are refused, and
one with minibatches which of them would be silently wrong there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import autoguide
from torch import Tensor

import guides
from benchmarks.budget import Budget
from benchmarks.methods import Method
from benchmarks.task import Task

__all__ = [
    "AUTOGUIDES",
    "OURS",
    "TASKS",
    "eight_schools_centered",
    "eight_schools_noncentered",
    "linear_gaussian",
    "linear_gaussian_minibatches",
    "logistic_regression",
    "logistic_regression_model",
    "vae_300_rows",
]

AUTOGUIDES = (
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoGaussian,
    autoguide.AutoStructured,
    autoguide.AutoLaplaceApproximation,
    autoguide.AutoDelta,
)

OURS = ("delta", "normal", "multivariate_normal", "low_rank_normal", "iaf", "planar", "sylvester")

BUDGET = Budget(
    num_steps=600,
    lr=0.01,
    num_samples=300,
    num_khat_samples=500,
    num_evidence_samples=2000,
    num_curve_points=8,
)


def _one_group(model: Any, family: str, args: tuple[Any, ...]) -> Any:
    """All latents in one vector, so that q can represent any dependence between them."""
    return guides.make(family, model, *args, data_plate=None)


def _jointly(args: tuple[Any, ...]) -> list[Method]:
    """This project's families over all latents at once, as most autoguides are."""
    return [
        Method(
            f"{family}, one group",
            build=partial(_one_group, family=family, args=args),
            family=family,
            scheme="Local",
            note="data_plate=None: all latents in one vector",
        )
        for family in OURS
        if family not in ("delta", "normal")
    ]


def _eight_schools(centered: bool) -> Task:
    import zoo

    form = "centered" if centered else "non-centered"
    model = zoo.make("eight_schools", centered=centered)
    args = (model.y,)
    return Task(
        name=f"eight_schools_{form.replace('-', '')}",
        model_name=f"eight_schools_{form.replace('-', '')}",
        model=model,
        args=args,
        guides=(*AUTOGUIDES, "normal", "multivariate_normal", *_jointly(args)),
        baseline="AutoMultivariateNormal",
        budget=BUDGET,
        description=(
            f"Effects of coaching in eight schools, pooled partially, {form}: 10 latents, of "
            "which mean and spread are shared by all schools."
        ),
        about_data="Rubin (1981): estimates and standard errors of eight schools.",
    )


def eight_schools_noncentered() -> Task:
    """Ten latents, nearly Gaussian posterior, exact evidence by quadrature."""
    return _eight_schools(centered=False)


def eight_schools_centered() -> Task:
    """Ten latents, a funnel, exact evidence by quadrature."""
    return _eight_schools(centered=True)


def _linear_gaussian(num_rows: int) -> tuple[Any, Tensor]:
    import zoo

    with torch.random.fork_rng():
        # A seed at which latents are correlated a posteriori: mean field loses 0.3 nats a row.
        torch.manual_seed(16)
        model = zoo.make("linear_gaussian", dims=(2, 5)).requires_grad_(False)
        return model, model(size=num_rows).detach()


def linear_gaussian() -> Task:
    """Two latents for each of 12 rows, Gaussian posterior, exact evidence."""
    model, x = _linear_gaussian(12)
    return Task(
        name="linear_gaussian",
        model=model,
        args=(x,),
        guides=(*AUTOGUIDES, *OURS),
        baseline="AutoMultivariateNormal",
        budget=BUDGET,
        description=(
            "Two latents a row, five observed values: the posterior is a correlated Gaussian for "
            "every row, and rows are independent."
        ),
        about_data="12 rows drawn from the model itself: 24 latents.",
    )


def logistic_regression_model(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Independent normal weights and intercept, binary answers."""
    weights = pyro.sample("weights", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        answers: Tensor = pyro.sample("y", dist.Bernoulli(logits=x @ weights + intercept), obs=y)
    return answers


def logistic_regression() -> Task:
    """Nine latents shared by 80 rows, no exact evidence."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator)
    x = torch.randn(80, 8, generator=generator) @ mixing / 8**0.5
    logits = x @ torch.linspace(-2.0, 2.0, 8)
    y = torch.bernoulli(torch.sigmoid(logits), generator=generator)
    return Task(
        name="logistic_regression",
        model=logistic_regression_model,
        args=(x, y),
        guides=(*AUTOGUIDES, *OURS),
        baseline="AutoMultivariateNormal",
        budget=BUDGET,
        description="Eight weights of correlated covariates and an intercept, shared by all rows.",
        about_data="80 rows drawn from the model with fixed weights.",
    )


def vae_300_rows() -> Task:
    """1,200 latents: autoguides are refused, guides of this project run."""
    from zoo.data import digits
    from zoo.vae import VAE

    data = digits.load()
    x = data.train[:300]
    names = ("normal", "multivariate_normal", "low_rank_normal")
    networks = tuple(f"amortized_{name}" for name in names[:2])
    return Task(
        name="vae_300_rows",
        model_name="vae_300_rows",
        make_model=lambda: VAE(x_dim=64, z_dim=4, hidden=(64,), data_mean=x.mean(0)),
        args=(x,),
        guides=(*AUTOGUIDES, *names, *networks),
        regimes=("frozen",),
        decoder_guide="amortized_normal",
        guide_options={name: {"hidden": (64,)} for name in networks},
        baseline="normal",
        budget=replace(BUDGET, num_steps=1200, batch_size=100, weight_decay=1.0, num_samples=200),
        description=(
            "A variational autoencoder's generative half: 4 latents a row, a network with one "
            "hidden layer of 64 units, 64 Bernoulli pixels."
        ),
        about_data="300 handwritten digits of 8 x 8 pixels (scikit-learn).",
        binarization=f"{data.binarization} of the pixels' 17 grey levels scaled to 0 .. 1",
        expected_order=("amortized_normal", "normal", "multivariate_normal"),
    )


def linear_gaussian_minibatches() -> Task:
    """120 latents in minibatches of 20 rows: most autoguides give rows each other's parameters."""
    model, x = _linear_gaussian(60)
    return Task(
        name="linear_gaussian_minibatches",
        model_name="linear_gaussian_minibatches",
        model=model,
        args=(x,),
        guides=(*AUTOGUIDES, *OURS),
        baseline="AutoNormal",
        budget=replace(BUDGET, num_steps=1200, batch_size=20),
        description="Two latents a row, five observed values, trained on 20 of 60 rows at a time.",
        about_data="60 rows drawn from the model itself: 120 latents.",
    )


TASKS = {
    "eight_schools_noncentered": eight_schools_noncentered,
    "eight_schools_centered": eight_schools_centered,
    "linear_gaussian": linear_gaussian,
    "logistic_regression": logistic_regression,
    "vae_300_rows": vae_300_rows,
    "linear_gaussian_minibatches": linear_gaussian_minibatches,
}

"""Objectives: one contract for all, and the values of bounds against known answers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from torch import Tensor

import guides
import zoo
from guides.draws import draw
from guides.guide import Guide, ProgramGuide
from guides.objectives import (
    IWELBO,
    OBJECTIVES,
    STL,
    AnalyticELBO,
    DReG,
    ForwardKL,
    Objective,
    RefinementELBO,
    Renyi,
)
from guides.objectives.packed_draws import draw_packed
from guides.schemes.scheme import Call
from guides.sites import Group
from tests.programs import PROGRAMS

pytestmark = pytest.mark.usefixtures("float64")

CASES: dict[str, Callable[..., Objective]] = {
    "analytic_elbo": AnalyticELBO,
    "stl": STL,
    "iwelbo": IWELBO,
    "dreg": DReG,
    "renyi": lambda num_particles=2: Renyi(0.5, num_particles),
    "forward_kl": ForwardKL,
}
# Objectives whose value for one draw is the plain ELBO's.
PLAIN: dict[str, Callable[[], Objective]] = {
    "renyi": lambda: Renyi(1.0, 1),
    "iwelbo": lambda: IWELBO(1),
    "stl": lambda: STL(1),
    "dreg": lambda: DReG(1),
}


def scaled_and_masked(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Parameters, a constrained global, nested plates, a user's scale, and missing data."""
    rate = pyro.param("rate", torch.tensor(1.5), constraint=dist.constraints.positive)
    shift = pyro.param("shift", lambda: torch.randn(()))
    g = pyro.sample("g", dist.Gamma(2.0, rate))
    with pyro.plate("data", size or len(x), dim=-2, subsample=index):
        z = pyro.sample("z", dist.Normal(shift, 1.0).expand([1, 2]).to_event(1))
        with pyro.plate("features", x.shape[1], dim=-1), poutine.scale(scale=0.7):
            with poutine.mask(mask=x > -1.0):
                pyro.sample("x", dist.Normal(z.sum(-1), g), obs=x)


def shared_mean(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A conjugate model with a global latent: x ~ Normal(0, 2 I + 1 1^T)."""
    g = pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared_mean_log_evidence(x: Tensor) -> float:
    covariance = 2.0 * torch.eye(len(x)) + 1.0
    return float(dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(x))


def gradients(objective: Any, model: Any, guide: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What SVI hands to its optimizer: names and gradients."""
    with poutine.trace(param_only=True) as trace:
        objective.loss_and_grads(model, guide, *args, **kwargs)
    found = {}
    for name, site in trace.trace.nodes.items():
        leaf = site["value"].unconstrained()
        found[name] = None if leaf.grad is None else leaf.grad.clone()
        leaf.grad = None
    return found


def repeated(function: Callable[[], float], number: int) -> tuple[float, float]:
    """Mean and standard error."""
    values = torch.tensor([function() for _ in range(number)])
    return float(values.mean()), float(values.std() / math.sqrt(number))


def double(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(a.double() if a.is_floating_point() else a for a in args)


def scaled_call() -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    return (
        scaled_and_masked,
        (torch.randn(4, 3),),
        {"size": 10, "index": torch.tensor([1, 7, 3, 2])},
    )


def calls() -> dict[str, tuple[Any, tuple[Tensor, ...], dict[str, Any]]]:
    result = {"scaled_and_masked": scaled_call()}
    for name, make in PROGRAMS.items():
        program = make()
        result[name] = (program.model, double(program.args), {})
    program = PROGRAMS["random_effects"]()
    dose, y = double(program.args)
    rows = torch.tensor([3, 30, 11])
    result["minibatch"] = (program.model, (dose[rows], y[rows]), {"size": 40, "index": rows})
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,))
    result["zoo"] = (model, (model(size=6).detach(),), {})
    return result


def test_every_objective_is_tested_here() -> None:
    # Iterative guides have an objective of their own, and its tests; so do sequences.
    assert set(CASES) | {"refinement_elbo", "fivo"} == set(OBJECTIVES)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = guides.objectives.nothing


@pytest.mark.parametrize("call", ["scaled_and_masked", "minibatch", "zoo", *PROGRAMS])
def test_one_draw_is_pyros_elbo_with_pyros_gradient(call: str) -> None:
    model, args, kwargs = calls()[call]
    guide = guides.make("normal", model, *args, model_kwargs=kwargs)
    torch.manual_seed(3)
    expected = gradients(Trace_ELBO(), model, guide, *args, **kwargs)
    torch.manual_seed(3)
    value = Trace_ELBO().loss(model, guide, *args, **kwargs)
    for name, make in PLAIN.items():
        torch.manual_seed(3)
        assert make().loss(model, guide, *args, **kwargs) == pytest.approx(value, rel=1e-10), name
        torch.manual_seed(3)
        found = gradients(make(), model, guide, *args, **kwargs)
        assert set(found) == set(expected), name
        if name in ("renyi", "iwelbo"):
            for key, gradient in expected.items():
                assert torch.allclose(found[key], gradient, rtol=1e-8, atol=1e-10), key


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_pyro(name: str) -> None:
    model, (x,), _ = scaled_call()
    if name == "forward_kl":
        model = zoo.make("vae", x_dim=3, z_dim=2, hidden=(3,), likelihood="gaussian")
    guide = guides.make("amortized_normal", model, x)
    expected = gradients(Trace_ELBO(), model, guide, x)
    found = gradients(CASES[name](), model, guide, x)
    if name == "forward_kl":
        # Only the guide learns: the model's parameters are not even seen.
        expected = {key: value for key, value in expected.items() if key.startswith("guide")}
    assert set(found) == set(expected)
    assert all(gradient is not None for gradient in found.values())


@pytest.mark.parametrize("name", CASES)
def test_stock_svi_and_the_differentiable_route(name: str) -> None:
    model = zoo.make("vae", x_dim=5, z_dim=2, hidden=(4,))
    x = model(size=12).detach()
    guide = guides.make("amortized_normal", model, x)  # far too narrow at the start
    objective = CASES[name](num_particles=3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), objective)
    before, _ = repeated(lambda: svi.evaluate_loss(x), 20)
    assert all(p.grad is None for p in (*guide.parameters(), *model.parameters()))
    for _ in range(60):
        svi.step(x)
    for rows in (torch.tensor([0, 5]), torch.tensor([4])):
        svi.step(x[rows], size=12, index=rows)
    after, _ = repeated(lambda: svi.evaluate_loss(x), 20)
    assert after < before
    module = objective(model, guide)
    torch.manual_seed(0)
    module(x).backward()
    assert all(p.grad is not None for p in guide.parameters())
    torch.manual_seed(0)
    assert float(module(x).detach()) == pytest.approx(
        _loss_at(objective, model, guide, x), rel=1e-10
    )
    assert type(objective).__name__ in repr(objective)
    with pytest.raises(NotImplementedError, match="has no traces"):
        objective._get_trace(model, guide, (x,), {})


def _loss_at(objective: Objective, model: Any, guide: Any, x: Tensor) -> float:
    torch.manual_seed(0)
    return objective.loss(model, guide, x)


@pytest.mark.parametrize("call", ["hierarchical_regression", "zoo"])
def test_many_draws_at_once_are_single_draws(call: str) -> None:
    """Against Pyro's own log densities, draw by draw; one program indexes by group."""
    model, args, _ = calls()[call]
    guide = guides.make("normal", model, *args, init_scale=0.5)
    torch.manual_seed(5)
    drawn = draw(model, guide, args, num_samples=6)
    log_w = []
    for k in range(6):
        values = {name: value[k] for name, value in drawn.values.items()}
        log_p = poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()
        log_w.append(log_p - drawn.log_q_rows[k].sum() - drawn.log_q_global[k])
    log_w = torch.stack(log_w).detach()
    torch.manual_seed(5)
    assert Renyi(1.0, 6).loss(model, guide, *args) == pytest.approx(-float(log_w.mean()))
    torch.manual_seed(5)
    assert STL(6).loss(model, guide, *args) == pytest.approx(-float(log_w.mean()))
    if call == "hierarchical_regression":
        # All latents are global: joint weights.
        joint = log_w.logsumexp(0) - math.log(6)
        torch.manual_seed(5)
        assert IWELBO(6).loss(model, guide, *args) == pytest.approx(-float(joint))
        torch.manual_seed(5)
        assert DReG(6).loss(model, guide, *args) == pytest.approx(-float(joint))


@pytest.mark.parametrize("objective", [IWELBO, DReG, lambda k: Renyi(0.0, k)])
def test_weights_are_per_datum_as_in_pyros_renyi_elbo(objective: Any) -> None:
    model = zoo.make("vae", x_dim=5, z_dim=2, hidden=(4,))
    x = model(size=8).detach()  # 8 rows of 2: one block of 16 numbers a draw, so draws agree
    guide = guides.make("normal", model, x, init_scale=1.0)
    for kwargs in ({}, {"size": 8, "index": torch.arange(8).flip(0)}):
        torch.manual_seed(2)
        expected = RenyiELBO(alpha=0, num_particles=5).loss(model, guide, x, **kwargs)
        torch.manual_seed(2)
        found = objective(5).loss(model, guide, x, **kwargs)
        assert found == pytest.approx(expected, rel=1e-10)
    torch.manual_seed(2)
    expected = RenyiELBO(alpha=0.3, num_particles=5).loss(model, guide, x)
    torch.manual_seed(2)
    assert Renyi(0.3, 5).loss(model, guide, x) == pytest.approx(expected, rel=1e-10)


def test_gradients_of_the_weighted_bound_are_pyros() -> None:
    model = zoo.make("vae", x_dim=5, z_dim=2, hidden=(4,))
    x = model(size=8).detach()
    guide = guides.make("normal", model, x, init_scale=1.0)
    for alpha in (0.0, 0.4):
        torch.manual_seed(2)
        expected = gradients(RenyiELBO(alpha=alpha, num_particles=5), model, guide, x)
        torch.manual_seed(2)
        found = gradients(Renyi(alpha, 5), model, guide, x)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-8, atol=1e-10), name


def test_orders_between_the_special_cases() -> None:
    model = zoo.make("vae", x_dim=5, z_dim=2, hidden=(4,))
    x = model(size=6).detach()
    guide = guides.make("normal", model, x, init_scale=1.0)

    def at(objective: Objective) -> float:
        torch.manual_seed(9)
        return objective.loss(model, guide, x)

    losses = [at(Renyi(alpha, 7)) for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses)
    assert at(Renyi(0.0, 7)) == pytest.approx(at(IWELBO(7)), rel=1e-12)
    for near in (1 - 1e-7, 1 + 1e-7):
        assert at(Renyi(near, 7)) == pytest.approx(at(Renyi(1.0, 7)), rel=1e-6)


def conjugate(x: Tensor) -> Guide:
    """The exact q(g) times a mean-field q(z) that is too wide: room for K to help."""
    guide = guides.make("normal", shared_mean, x)
    with torch.no_grad():
        precision = 1 + len(x) / 2
        for name, loc, scale in (
            ("global", (x.sum() / 2 / precision).reshape(1), precision**-0.5),
            ("data", (x / 2).reshape(-1, 1), 1.3),
        ):
            family = guide.families[name]
            tril = (scale * torch.eye(1)).expand(*loc.shape[:-1], 1, 1)
            guide.schemes[name].table.copy_(family.of_gaussian(loc, tril))
    return guide


def test_a_global_latent_keeps_weights_per_datum_and_the_bound() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])
    guide = conjugate(x)
    log_evidence = shared_mean_log_evidence(x)
    bounds = {}
    for k in (1, 4, 32):
        mean, error = repeated(
            lambda k=k: -IWELBO(k, num_outer=400).loss(shared_mean, guide, x), 20
        )
        bounds[k] = mean
        assert mean < log_evidence - 3 * error
    assert bounds[1] + 0.3 < bounds[4] < bounds[32] - 0.1
    elbo, error = repeated(lambda: -Renyi(1.0, 8, num_outer=200).loss(shared_mean, guide, x), 20)
    assert bounds[1] == pytest.approx(elbo, abs=6 * error)
    # In the limit of K the rows are exact given g, and g has its ELBO: closed form.
    precision = 1 + len(x) / 2
    q = dist.Normal(x.sum() / 2 / precision, precision**-0.5)
    limit = dist.Normal(q.loc, 2**0.5).log_prob(x).sum() - len(x) * q.variance / 4
    limit = limit - torch.distributions.kl_divergence(q, dist.Normal(0.0, 1.0))
    assert bounds[32] < float(limit)
    mean, error = repeated(lambda: -IWELBO(1000, num_outer=50).loss(shared_mean, guide, x), 10)
    assert mean == pytest.approx(float(limit), abs=5 * error + 0.01)


def test_copies_of_a_datum_count_as_many() -> None:
    one = torch.tensor([0.7])
    copies = one.expand(50)
    guide = conjugate(copies)
    call = {"size": 50, "index": torch.tensor([0])}
    whole = repeated(lambda: IWELBO(8, num_outer=50).loss(shared_mean, guide, copies), 20)
    single = repeated(lambda: IWELBO(8, num_outer=50).loss(shared_mean, guide, one, **call), 20)
    assert whole[0] == pytest.approx(single[0], abs=4 * math.hypot(whole[1], single[1]))
    assert repeated(lambda: DReG(8, num_outer=50).loss(shared_mean, guide, copies), 20)[
        0
    ] == pytest.approx(whole[0], abs=6 * whole[1])
    # One joint weight for all rows is no better than a few single draws.
    joint = repeated(
        lambda: RenyiELBO(alpha=0, num_particles=8).loss(shared_mean, guide, copies), 20
    )
    assert whole[0] < joint[0] - 2.0


def test_analytic_terms_say_what_is_exact() -> None:
    model, args, kwargs = scaled_call()
    objective = AnalyticELBO()
    guide = guides.make("normal", model, *args, model_kwargs=kwargs)
    assert objective.analytic_terms(model, guide, *args, **kwargs) == {
        "entropy": ("global", "data"),
        "prior": ("z",),
        "sampled": ("g", "x"),
    }
    flow = guides.make("spline_coupling", model, *args, model_kwargs=kwargs)
    assert objective.analytic_terms(model, flow, *args, **kwargs) == {
        "entropy": (),
        "prior": (),
        "sampled": ("g", "z", "x", "log q(global)", "log q(data)"),
    }


def test_a_prior_that_follows_a_latent_is_never_taken_for_fixed() -> None:
    def model(x: Tensor) -> None:
        table = torch.tensor([0.0, 1.0])
        with pyro.plate("data", len(x)):
            fixed = pyro.sample("fixed", dist.Normal(0.0, 1.0))
            pyro.sample("smooth", dist.Normal(0.0, fixed.exp()))
            pyro.sample("flat", dist.Normal(torch.relu(fixed - 9.0), 1.0))
            # No graph reaches an index, only numbers show it.
            pyro.sample("indexed", dist.Normal(table[(fixed > 0.5).long()], 1.0))
            pyro.sample("positive", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(fixed, 1.0), obs=x)

    x = torch.zeros(3)
    prior = AnalyticELBO().analytic_terms(model, guides.make("multivariate_normal", model, x), x)[
        "prior"
    ]
    assert prior == ("fixed",)
    # Given their parents, which say nothing about them where q has independent coordinates.
    prior = AnalyticELBO().analytic_terms(model, guides.make("normal", model, x), x)["prior"]
    assert prior == ("fixed", "smooth", "flat", "indexed")


def _chain(x: Tensor, lengths: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x), 2)
        for t in range(x.shape[1]):
            on = torch.ones(len(x), dtype=torch.bool) if lengths is None else t < lengths
            with poutine.mask(mask=on):
                prior = dist.Normal(torch.tanh(1.5 * z), torch.nn.functional.softplus(z) + 0.5)
                z = pyro.sample(f"z_{t}", prior.to_event(1))
                pyro.sample(f"x_{t}", dist.Normal(z.sum(-1), 1.0), obs=x[:, t])


def test_the_prior_of_a_chain_is_exact_given_the_draw_before() -> None:
    """By the KL divergence of every step from its prior, at the very draws of the objective."""
    x, lengths = torch.randn(3, 4), torch.tensor([4, 2, 1])
    guide = guides.make("smoothing_normal", _chain, x, lengths, recurrent=4, init_scale=0.6)
    objective = AnalyticELBO()
    terms = objective.analytic_terms(_chain, guide, x, lengths)
    assert terms["prior"] == ("z_0", "z_1", "z_2", "z_3")
    for seed in range(3):
        torch.manual_seed(seed)
        loss = objective.loss(_chain, guide, x, lengths)
        torch.manual_seed(seed)
        draws = draw_packed(guide, (x, lengths), {}, outer=1)
        expected, z = torch.zeros(()), torch.zeros(3, 2)
        for t, group in enumerate(draws.groups):
            q = dist.Normal(group.q.mean.reshape(3, 2), group.q.variance.sqrt().reshape(3, 2))
            prior = dist.Normal(torch.tanh(1.5 * z), torch.nn.functional.softplus(z) + 0.5)
            z = group.packed[0]
            kl = torch.distributions.kl_divergence(q, prior).sum(-1)
            fit = dist.Normal(z.sum(-1), 1.0).log_prob(x[:, t])
            expected = expected + ((kl - fit) * (t < lengths)).sum().detach()
        assert loss == pytest.approx(float(expected), rel=1e-10)


def _levels(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = torch.nn.functional.softplus(2 * z2) + 0.2
        z1 = pyro.sample("z1", dist.Normal(3 * torch.tanh(z2), scale).to_event(1))
        pyro.sample("x", dist.Normal(z1, 0.5).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("amortized_normal", {"z2", "z1"}),
        ("top_down_normal", {"z2", "z1"}),
        ("autoregressive_multivariate_normal", {"z2", "z1"}),
        ("bottom_up_normal", {"z2"}),  # z1 is drawn first: the draw of z2 tells of it
        ("amortized_multivariate_normal", {"z2"}),  # drawn together, and tells of it
    ],
)
def test_a_prior_is_exact_only_where_its_parents_tell_nothing_more(
    name: str, exact: set[str]
) -> None:
    x = 2 * torch.randn(3, 2)
    guide = guides.make(name, _levels, x)
    assert set(AnalyticELBO().analytic_terms(_levels, guide, x)["prior"]) == exact


Q = Callable[[Mapping[str, Tensor]], dist.TorchDistribution]


class _ByHand(ProgramGuide):
    """Groups in the order given, each with a q of the draws before it."""

    def __init__(self, model: Any, x: Tensor, q: Mapping[str, Q]) -> None:
        super().__init__(model, (x,), {})
        self._split({"global" if name == "c" else name: [name] for name in q})
        self.q = {"global" if name == "c" else name: made for name, made in q.items()}

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        return self.q[group.name](upstream)


def _normal(loc: Any, scale: float) -> dist.TorchDistribution:
    return dist.Normal(torch.as_tensor(loc), torch.tensor([scale])).to_event(1)


def test_a_draw_that_tells_of_a_latent_leaves_its_prior_sampled() -> None:
    """A guide against the order of the program, by the closed form of its ELBO."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(2 * top, 0.3))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    zeros = torch.zeros(3, 1)
    guide = _ByHand(
        model,
        x,
        {"low": lambda _: _normal(zeros, 0.5), "top": lambda up: _normal(up["low"] / 2, 0.2)},
    )
    assert AnalyticELBO().analytic_terms(model, guide, x)["prior"] == ("top",)

    def expected(scale: float, square: Tensor | float) -> Tensor:
        """E log Normal(d; 0, scale) where E d^2 is given."""
        return (
            -math.log(scale)
            - 0.5 * math.log(2 * math.pi)
            - 0.5 * torch.as_tensor(square) / scale**2
        )

    entropy = math.log(0.5 * 0.2) + math.log(2 * math.pi) + 1
    # low - 2 top is -2 * 0.2 of one standard normal; top has the variance of low / 2, and its own.
    rows = expected(1.0, 0.25 / 4 + 0.04) + expected(0.3, 0.16) + expected(1.0, x**2 + 0.25)
    exact = -float((rows + entropy).sum())
    found, error = repeated(lambda: AnalyticELBO(200).loss(model, guide, x), 40)
    assert error < 0.05
    assert found == pytest.approx(exact, abs=4 * error)


@pytest.mark.parametrize("kind", ["laplace", "multivariate", "unmasked"])
def test_a_family_that_follows_a_latent_is_that_of_the_draw(kind: str) -> None:
    """Every branch by itself, at the very draws: what was seen at one point is not told of all."""

    def other(c: Tensor) -> dist.TorchDistribution:
        if kind == "laplace":
            return dist.Laplace(torch.zeros(1) + c, 0.1).to_event(1)
        if kind == "unmasked":
            return dist.Normal(torch.zeros(1) + c, 0.1).to_event(1).mask(False)
        return dist.MultivariateNormal(torch.zeros(1) + c, 0.01 * torch.eye(1))

    def model(x: Tensor) -> None:
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            near = dist.Normal(torch.zeros(1) + c, 0.3).to_event(1)
            z = pyro.sample("z", near if c.detach() < 0.5 else other(c))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    guide = _ByHand(
        model,
        x,
        {"c": lambda _: _normal([0.5], 0.3), "z": lambda _: _normal(torch.zeros(3, 1), 0.5)},
    )
    objective = AnalyticELBO()
    branches = set()
    for seed in range(12):
        torch.manual_seed(seed)
        loss = objective.loss(model, guide, x)
        torch.manual_seed(seed)
        above, rows = draw_packed(guide, (x,), {}, outer=1).groups
        c, z = above.packed[0], rows.packed[0]  # (1,), (3, 1)
        near = bool(c < 0.5)
        branches.add(near)
        prior = dist.Normal(c.expand(3, 1), 0.3)
        q = dist.Normal(torch.zeros(3, 1), 0.5)
        if near:
            level = (torch.distributions.kl_divergence(q, prior)).sum()
        elif kind == "unmasked":
            level = -q.entropy().sum()
        else:
            level = -(q.entropy().squeeze(-1) + other(c.expand(3, 1)).log_prob(z)).sum()
        kl = torch.distributions.kl_divergence(dist.Normal(0.5, 0.3), dist.Normal(0.0, 1.0))
        fit = dist.Normal(z[:, 0], 1.0).log_prob(x).sum()
        assert loss == pytest.approx(float(kl + level - fit), rel=1e-10)
    assert branches == {True, False}


def test_an_order_that_follows_a_latent_is_that_of_the_draw() -> None:
    def model(x: Tensor) -> None:
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            if c.detach() < 0.5:
                a = pyro.sample("a", dist.Normal(c, 1.0))
                b = pyro.sample("b", dist.Normal(2 * a, 0.3))
            else:
                b = pyro.sample("b", dist.Normal(c, 1.0))
                a = pyro.sample("a", dist.Normal(2 * b, 0.3))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    x = torch.tensor([0.5, -1.0, 2.0])
    guide = _ByHand(
        model,
        x,
        {
            "c": lambda _: _normal([0.5], 0.3),
            "a": lambda _: _normal(torch.zeros(3, 1), 0.5),
            "b": lambda up: _normal(2 * up["a"], 0.2),
        },
    )
    objective = AnalyticELBO()
    kl, branches = torch.distributions.kl_divergence, set()
    for seed in range(10):
        torch.manual_seed(seed)
        loss = objective.loss(model, guide, x)
        torch.manual_seed(seed)
        c, a, b = (d.packed.reshape(-1) for d in draw_packed(guide, (x,), {}, outer=1).groups)
        q_a, q_b = dist.Normal(torch.zeros(3), 0.5), dist.Normal(2 * a, 0.2)
        if bool(c < 0.5):
            level = kl(q_a, dist.Normal(c, 1.0)) + kl(q_b, dist.Normal(2 * a, 0.3))
        else:  # a is drawn before b, so that b tells of it
            sampled = dist.Normal(2 * b, 0.3).log_prob(a)
            level = kl(q_b, dist.Normal(c, 1.0)) - q_a.entropy() - sampled
        branches.add(bool(c < 0.5))
        fit = dist.Normal(a + b, 1.0).log_prob(x)
        top = kl(dist.Normal(0.5, 0.3), dist.Normal(0.0, 1.0))
        assert loss == pytest.approx(float(top + (level - fit).sum()), rel=1e-10)
    assert branches == {True, False}


@pytest.mark.parametrize("name", ["normal", "multivariate_normal", "amortized_normal"])
def test_an_analytic_kl_has_no_noise(name: str) -> None:
    loc, scale = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.7, 1.5, 2.0])

    def model(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=index), poutine.scale(scale=1.0):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)

    x = torch.randn(4, 2)
    guide = guides.make(name, model, x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    objective = AnalyticELBO()
    losses = [objective.loss(model, guide, x) for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    q = guide.families["data"].distribution(guide.parameters_of(x)["data"].detach())
    q = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance)) if name[0] != "m" else q
    prior = dist.MultivariateNormal(loc, torch.diag(scale.square()))
    kl = torch.distributions.kl_divergence(q, prior)
    rest = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    assert losses[0] == pytest.approx(float((kl - rest).sum()), rel=1e-10)
    if name.startswith("amortized"):
        part = objective.loss(model, guide, x[:1], size=4, index=torch.tensor([0]))
        assert part == pytest.approx(4 * float((kl - rest)[0]), rel=1e-10)


@pytest.mark.parametrize("call", ["zoo", "scaled_and_masked", "random_effects"])
def test_the_analytic_elbo_is_pyros(call: str) -> None:
    model, args, kwargs = calls()[call]
    guide = guides.make("normal", model, *args, model_kwargs=kwargs, init_scale=0.4)
    sampled = repeated(lambda: STL(100).loss(model, guide, *args, **kwargs), 40)
    analytic = repeated(lambda: AnalyticELBO(100).loss(model, guide, *args, **kwargs), 40)
    error = math.hypot(sampled[1], analytic[1])
    assert sampled[0] == pytest.approx(analytic[0], abs=4 * error)


def test_analytic_terms_take_noise_away() -> None:
    model, args, _ = calls()["zoo"]
    guide = guides.make("normal", model, *args, init_scale=0.3)
    noise = {
        objective: repeated(lambda o=objective: o.loss(model, guide, *args), 200)[1]
        for objective in (AnalyticELBO(), Trace_ELBO())
    }
    analytic, sampled = noise.values()
    assert analytic < 0.8 * sampled


def test_the_analytic_elbo_of_a_linear_gaussian_model() -> None:
    model = zoo.LinearGaussian(dims=(2, 3, 5), covariance="diagonal")
    x = model(size=4).detach()
    guide = guides.make("multivariate_normal", model, x)
    posterior = model.posterior(x)
    read = guide.layout(x)
    packed = read.pack(model.split(posterior.mean.detach()))["data"]
    # The packing goes by site in the order of the program: top first, as the posterior's.
    with torch.no_grad():
        lam = guide.families["data"].of_gaussian(packed, posterior.scale_tril.detach())
        guide.schemes["data"].table.copy_(lam)
    found, error = repeated(lambda: -AnalyticELBO(50).loss(model, guide, x), 40)
    exact = float(model.log_evidence(x).sum().detach())
    assert found == pytest.approx(exact, abs=4 * error)
    assert AnalyticELBO().analytic_terms(model, guide, x)["prior"] == ("z2",)


def test_delta_only_where_no_density_is_needed() -> None:
    model, args, kwargs = scaled_call()
    guide = guides.make("delta", model, *args, model_kwargs=kwargs)
    energy = AnalyticELBO().loss(model, guide, *args, **kwargs)
    assert energy == pytest.approx(Trace_ELBO().loss(model, guide, *args, **kwargs))
    for objective in (STL(), IWELBO(), DReG(), Renyi()):
        with pytest.raises(ValueError, match="needs a guide with a density"):
            objective.loss(model, guide, *args, **kwargs)


def handwritten(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    loc = pyro.param("loc", torch.tensor(0.2))
    own = pyro.param("own", torch.zeros(4))
    g = pyro.sample("g", dist.Normal(loc, 0.7))
    with pyro.plate("data", size or len(x), subsample=index) as rows:
        pyro.sample("z", dist.Normal(own[rows] + 0.5 * g, 0.8))


def test_handwritten_and_pyros_guides() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])
    auto = AutoNormal(shared_mean, create_plates=lambda x: pyro.plate("data", len(x), dim=-1))
    auto(x)
    for guide in (handwritten, auto):
        torch.manual_seed(4)
        expected = gradients(Trace_ELBO(), shared_mean, guide, x)
        torch.manual_seed(4)
        found = gradients(Renyi(1.0, 1), shared_mean, guide, x)
        assert set(found) == set(expected)
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, atol=1e-10), name
        weighted, error = repeated(lambda g=guide: IWELBO(5).loss(shared_mean, g, x), 40)
        plain, other = repeated(
            lambda g=guide: Trace_ELBO(num_particles=10).loss(shared_mean, g, x), 40
        )
        assert -shared_mean_log_evidence(x) < weighted + 3 * error
        assert weighted < plain - 2 * math.hypot(error, other)
        for objective in (STL(), DReG(), AnalyticELBO()):
            with pytest.raises(TypeError, match="only guides of this package state"):
                objective.loss(shared_mean, guide, x)


def test_the_globals_of_a_handwritten_guide_are_shared() -> None:
    """Its bound is that of the same q as a guide of this package."""
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])

    def same(x: Tensor) -> None:
        q = guide.parameters_of(x)
        top = guide.families["global"].distribution(q["global"])
        rows = guide.families["data"].distribution(q["data"])
        pyro.sample("g", dist.Normal(top.base_dist.loc[0], top.base_dist.scale[0]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(rows.base_dist.loc[:, 0], rows.base_dist.scale[:, 0]))

    guide = conjugate(x)
    ours = repeated(lambda: IWELBO(4, num_outer=10).loss(shared_mean, guide, x), 20)
    theirs = repeated(lambda: IWELBO(4, num_outer=10).loss(shared_mean, same, x), 20)
    assert ours[0] == pytest.approx(theirs[0], abs=4 * math.hypot(ours[1], theirs[1]))


def test_guides_that_cannot_be_weighed_row_by_row() -> None:
    x = torch.tensor([0.3, -1.0, 2.0, 0.5])
    model = zoo.LinearGaussian(dims=(2, 3))
    data = model(size=4).detach()
    joint = AutoMultivariateNormal(model)
    with pytest.raises(TypeError, match="must draw the latents of plate 'data' inside"):
        IWELBO(2).loss(model, joint, data)

    messenger = AutoNormalMessenger(shared_mean)
    messenger(x)
    assert math.isfinite(IWELBO(1).loss(shared_mean, messenger, x))
    with pytest.raises(TypeError, match="which AutoNormalMessenger does not allow"):
        IWELBO(2).loss(shared_mean, messenger, x)
    with pytest.raises(ValueError, match="point mass at 'g'"):
        IWELBO(2).loss(shared_mean, AutoDelta(shared_mean), x)

    def partial(x: Tensor) -> None:
        pyro.sample("g", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="Guide has no site 'z'"):
        IWELBO().loss(shared_mean, partial, x)

    def rough(x: Tensor) -> None:
        pyro.sample("g", Unreparameterized(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(TypeError, match=r"'g' .*no reparameterized draws"):
        IWELBO().loss(shared_mean, rough, x)


class Unreparameterized(dist.Normal):
    has_rsample = False


def test_rows_that_talk_cannot_be_weighed() -> None:
    def coupled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    x = torch.randn(4)
    guide = guides.make("normal", coupled, x)
    for objective in (IWELBO(2), DReG(2), Renyi(0.5, 2)):
        with pytest.raises(ValueError, match="are coupled"):
            objective.loss(coupled, guide, x)
    assert math.isfinite(STL(2).loss(coupled, guide, x))

    def only_global(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("x", dist.Normal(g, 1.0), obs=x)

    guide = guides.make("normal", only_global, x)
    call = {"size": 8, "index": torch.arange(4)}
    with pytest.raises(ValueError, match="joint weights over all rows"):
        IWELBO(2).loss(only_global, guide, x, **call)
    torch.manual_seed(1)
    expected = Trace_ELBO().loss(only_global, guide, x, **call)
    torch.manual_seed(1)
    assert IWELBO(1).loss(only_global, guide, x, **call) == pytest.approx(expected)


GRID = {
    "bottom_up_normal": {},
    "top_down_normal": {},
    "autoregressive_spline_coupling": {"transforms": 2, "bins": 3},
    "iterative_normal": {"network": (8,)},
    "semi_amortized_multivariate_normal": {},
    "amortized_mixture": {},
}


@pytest.mark.parametrize("name", [*GRID, "composite"])
def test_every_kind_of_guide_of_the_grid(name: str) -> None:
    model = zoo.make("hierarchical_vae", x_dim=4, z_dims=(3, 2), hidden=(3,))
    x = model(size=6).detach()
    cells = {"z1": "amortized_normal", "z2": "multivariate_normal"}
    kind: Any = cells if name == "composite" else name
    guide = guides.make(kind, model, x, **GRID.get(name, {}))
    torch.manual_seed(1)
    expected = Trace_ELBO().loss(model, guide, x)
    for key, make in PLAIN.items():
        torch.manual_seed(1)
        assert make().loss(model, guide, x) == pytest.approx(expected, rel=1e-8), key
    for objective in (AnalyticELBO(3), DReG(3), RefinementELBO(STL(3))):
        value = objective.loss_and_grads(model, guide, x)
        assert math.isfinite(value)
        assert any(p.grad is not None and bool(p.grad.any()) for p in guide.parameters())


def test_random_subsamples_are_drawn_anew() -> None:
    data = torch.arange(12.0)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = guides.make("normal", model, data)
    with torch.no_grad():
        guide.schemes["data"].table.copy_(
            guide.families["data"].of_gaussian(
                data.unsqueeze(-1) / 2, torch.eye(1).expand(12, 1, 1)
            )
        )
    # E: KL of q from its prior, and the likelihood, in closed form.
    loss = 0.5 * float((data / 2).square().sum()) + 12 * 0.5 * math.log(2 * math.pi)
    loss += 0.5 * float((data / 2).square().sum()) + 12 * 0.5
    for objective in (AnalyticELBO(20), STL(20), IWELBO(1, num_outer=20)):
        mean, error = repeated(lambda o=objective: o.loss(model, guide, data), 250)
        assert mean == pytest.approx(loss, abs=4 * error)


def test_bad_options() -> None:
    for make in (IWELBO, STL, AnalyticELBO, ForwardKL, DReG, lambda k: Renyi(0.5, k)):
        with pytest.raises(ValueError, match="num_particles must be an integer of at least 1"):
            make(0)
    with pytest.raises(ValueError, match="num_outer must be an integer of at least 1"):
        IWELBO(2, num_outer=0)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        Renyi(math.inf)
    assert "conditional on shared draws of the global latents" in repr(IWELBO(4))


def test_another_program_is_refused() -> None:
    x = torch.randn(4)
    guide = guides.make("normal", shared_mean, x)

    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    for objective in (STL(), IWELBO(), AnalyticELBO(), DReG()):
        with pytest.raises(ValueError, match="but the model samples y"):
            objective.loss(other, guide, x)


def test_what_was_found_of_one_model_is_not_told_of_another() -> None:
    """The identity of an object that is gone passes to the next one."""
    x = torch.zeros(3)
    objective = AnalyticELBO()

    def made(depends: bool) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                y = pyro.sample("y", dist.Normal(0.0, 1.0))
                z = pyro.sample("z", dist.Normal(y if depends else 0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model

    for i in range(40):
        model = made(i % 2 == 1)
        guide = guides.make("multivariate_normal", model, x)
        expected = ("y",) if i % 2 else ("y", "z")
        assert objective.analytic_terms(model, guide, x)["prior"] == expected
        del model, guide
    pickle.dumps(objective)


def test_what_was_found_of_one_call_is_not_told_of_another_kind() -> None:
    """A switch that ties two priors: the loss is that of an objective that saw nothing before."""

    def model(x: Tensor, linked: bool = False) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a if linked else torch.zeros(len(x)), 0.5))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    x = torch.randn(5)
    guide = guides.make("multivariate_normal", model, x)
    objective = AnalyticELBO(3)
    for linked, prior in ((False, ("a", "b")), (True, ("a",)), (False, ("a", "b"))):
        losses = []
        for each in (objective, AnalyticELBO(3)):
            torch.manual_seed(1)
            losses.append(each.loss(model, guide, x, linked=linked))
        assert losses[0] == losses[1]
        assert objective.analytic_terms(model, guide, x, linked=linked)["prior"] == prior


def test_analytic_terms_stay_so_while_refinement_is_recorded() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4)
    guide = guides.make("iterative_normal", model, x, network=(4,), shared_noise=True)
    analytic = AnalyticELBO()
    torch.manual_seed(0)
    value = analytic.loss(model, guide, x)
    torch.manual_seed(0)
    recorded = RefinementELBO(analytic).loss_and_grads(model, guide, x)
    assert recorded == pytest.approx(value, abs=1e-12)

"""Guides over levels: exact chains in both directions, the ladder's merge, draws of draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import zoo
from guides.diagnostics import elbo, log_weights
from guides.energy import LogJoint
from guides.families.family import inverse_positive, positive
from guides.families.multivariate_normal import MultivariateNormal
from guides.families.normal import Normal
from guides.families.student_t import StudentT
from guides.guide import Guide
from guides.inference import SVI
from guides.schemes.autoregressive import Autoregressive
from guides.schemes.bottom_up import BottomUp
from guides.schemes.encoder import Encoder
from guides.schemes.top_down import TopDown

pytestmark = pytest.mark.usefixtures("float64")

SCHEMES: dict[str, Any] = {
    "bottom_up": BottomUp,
    "top_down": TopDown,
    "autoregressive": Autoregressive,
}


def linear(scheme: Any) -> Any:
    """The scheme without hidden layers: parameters linear in data and draws."""
    return lambda init, group, call: scheme(init, group, call, hidden=())


linear_schemes: dict[str, Any] = {}
for _name, _scheme in SCHEMES.items():
    linear_schemes[_name] = linear(_scheme)
    linear_schemes[_name].order = _scheme.order
    linear_schemes[_name].amortized = True


def assign(scheme: Any, constant: Tensor, on_x: Tensor, on_draws: Tensor | None) -> None:
    """Make a linear scheme's parameters ``constant + on_x @ x + on_draws @ u``."""
    encoder = scheme.encoder
    with torch.no_grad():
        head = encoder.network[-1]
        head.weight.copy_(on_x * encoder.scale)
        head.bias.copy_(constant + on_x @ encoder.shift - encoder.init)
        if on_draws is not None:
            last = scheme.coupling[-1]
            last.weight.zero_()
            last.weight[:, -on_draws.shape[1] :] = on_draws * scheme.scale
            last.bias.copy_(on_draws @ scheme.shift)


# Exact posteriors


@pytest.mark.parametrize("dims", [(1, 1, 3), (2, 3, 4), (2, 1, 2, 3)])
@pytest.mark.parametrize("scheme", ["bottom_up", "autoregressive"])
def test_chains_hold_the_exact_posterior_in_both_directions(
    dims: tuple[int, ...], scheme: str
) -> None:
    torch.manual_seed(len(dims))
    model = zoo.make("linear_gaussian", dims=dims)
    x = model(size=5).detach()
    family = MultivariateNormal if max(dims[:-1]) > 1 else Normal
    guide = Guide(model, x, family=family, scheme=linear_schemes[scheme])
    sites = [group.sites[0].name for group in guide.layout(x).groups]
    assert sites == (
        list(model.latents) if scheme == "autoregressive" else list(model.latents)[::-1]
    )
    # The posterior's mean is linear in x, its covariance constant; top first.
    with torch.no_grad():
        base = model.posterior(torch.zeros(1, dims[-1]))
        mean = base.mean[0]
        slope = (model.posterior(torch.eye(dims[-1])).mean - mean).mT
        covariance = base.covariance_matrix[0]
    places = model.split(torch.arange(len(mean)))
    before = torch.zeros(0, dtype=torch.long)
    for group in guide.layout(x).groups:
        own = places[group.sites[0].name]
        gain = covariance[own][:, before] @ torch.linalg.inv(covariance[before][:, before])
        rest = covariance[own][:, own] - gain @ covariance[before][:, own]
        loc = mean[own] - gain @ mean[before]
        member = guide.families[group.name]
        constant = member.of_gaussian(loc, torch.linalg.cholesky(rest))
        rows = member.num_params - len(own)

        def padded(part: Tensor, rows: int = rows) -> Tensor:
            return torch.cat([part, part.new_zeros(rows, part.shape[1])])

        on_x = padded(slope[own] - gain @ slope[before])
        on_draws = padded(gain) if len(before) else None
        assign(guide.schemes[group.name], constant, on_x, on_draws)
        before = torch.cat([before, own])
    weights = log_weights(model, guide, x, num_samples=20).rows
    exact = model.log_evidence(x).detach()
    assert torch.allclose(weights, exact.expand_as(weights), atol=1e-6)


def diagonal_ladder() -> Any:
    """A chain whose levels do not mix coordinates, so that messages of the data are diagonal."""
    torch.manual_seed(0)
    model = zoo.make("linear_gaussian", dims=(2, 2, 2), covariance="diagonal")
    with torch.no_grad():
        for level in model.levels[1:]:
            level.weight.copy_(torch.diag(0.5 + torch.rand(2)))
    return model


def test_the_ladder_is_exact_where_messages_are_diagonal() -> None:
    model = diagonal_ladder()
    x = model(size=5).detach()
    guide = Guide(model, x, family=Normal, scheme=linear_schemes["top_down"])
    with torch.no_grad():
        _, middle, bottom = model.levels
        w1, w0 = middle.weight.diagonal(), bottom.weight.diagonal()
        messages = {
            "data_z1": (w0, bottom.bias, bottom.scale),
            "data_z2": (
                w0 * w1,
                bottom.bias + w0 * middle.bias,
                ((w0 * middle.scale) ** 2 + bottom.scale**2).sqrt(),
            ),
        }
        for name, (slope, offset, scale) in messages.items():
            # x ~ Normal(slope z + offset, scale) as a message about z.
            constant = torch.cat([-offset / slope, inverse_positive(scale / slope)])
            on_x = torch.cat([torch.diag(1 / slope), torch.zeros(2, 2)])
            assign(guide.schemes[name], constant, on_x, None)
    weights = log_weights(model, guide, x, num_samples=20).rows
    exact = model.log_evidence(x).detach()
    assert torch.allclose(weights, exact.expand_as(weights), atol=1e-6)


# Draws of draws


def deep() -> tuple[Any, Tensor]:
    torch.manual_seed(1)
    model = zoo.make("hierarchical_vae", x_dim=6, z_dims=(3, 2, 2), hidden=(8,))
    return model, model(size=4).detach()


def nested(x: Tensor) -> None:
    """A global latent that reaches the levels, a plate inside the rows, and a support."""
    spread = pyro.sample("spread", dist.LogNormal(0.0, 0.5))
    plate = pyro.plate("data", len(x), dim=-2)
    with plate:
        top = pyro.sample("top", dist.Normal(0.0, spread))
        with pyro.plate("items", x.shape[1], dim=-1):
            low = pyro.sample("low", dist.Normal(top, 0.5 + spread))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)


def constrained(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0 + shares[..., 0]))
        pyro.sample("x", dist.Normal(rate * shares[..., 1], 0.5), obs=x)


CASES: list[tuple[str, str]] = [
    *((scheme, "deep") for scheme in SCHEMES),
    *((scheme, "nested") for scheme in SCHEMES),
    ("bottom_up", "constrained"),
    ("autoregressive", "constrained"),
]


def build(scheme: str, program: str) -> tuple[Guide, Any, Tensor]:
    if program == "deep":
        model, x = deep()
    else:
        model = {"nested": nested, "constrained": constrained}[program]
        x = torch.randn(4, 3) if program == "nested" else torch.rand(4)
    guide = Guide(model, x, family=Normal, scheme=SCHEMES[scheme])
    with torch.no_grad():
        # Away from the start, where no level listens to another.
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide, model, x


@pytest.mark.parametrize(("scheme", "program"), CASES)
def test_many_draws_at_once_are_single_draws(scheme: str, program: str) -> None:
    guide, _, x = build(scheme, program)
    with torch.no_grad():
        draws, log_q, read = guide.rsample_packed(6, (x,))
        depends = False
        for s in range(6):
            upstream: dict[str, Tensor] = {}
            for group in read.groups:
                call = replace(guide._call((x,), {}, read), upstream=upstream)
                lam = guide.schemes[group.name](group, call)
                assert lam.shape == (*group.shape[:-1], guide.families[group.name].num_params)
                value = draws[group.name][s]
                expected = guide.families[group.name].log_prob(lam, value)
                assert torch.allclose(log_q[group.name][s], expected)
                if upstream and group.plate is not None:
                    moved = {name: value + 1.0 for name, value in upstream.items()}
                    other = guide.schemes[group.name](group, replace(call, upstream=moved))
                    depends = depends or bool((other - lam).abs().max() > 1e-3)
                upstream[group.name] = group.batch(value)
        assert depends


@pytest.mark.parametrize(("scheme", "program"), CASES)
def test_vectorized_particles_are_particles(scheme: str, program: str) -> None:
    guide, model, x = build(scheme, program)
    with torch.no_grad():
        # One more plate than the programs have: draws get two leading dimensions.
        objective = Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=3)
        found = -torch.tensor([objective.loss(model, guide, x) for _ in range(10)])
        score = elbo(model, guide, x, num_samples=1000)
    error = (score.standard_error**2 + float(found.var()) / len(found)) ** 0.5
    assert abs(float(found.mean()) - score.total) < 4.5 * error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_batch_of_one_gets_what_the_batch_gets(scheme: str) -> None:
    guide, _, x = build(scheme, "deep")
    together = guide.parameters_of(x)
    for row in range(len(x)):
        alone = guide.parameters_of(x[row : row + 1])
        for name, lam in together.items():
            assert torch.allclose(alone[name][0], lam[row])
    assert set(guide.locations(x)) == {"z1", "z2", "z3"}
    assert guide(x[:2])["z1"].shape == (2, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_of_guide_and_model_learns(scheme: str) -> None:
    guide, model, x = build(scheme, "deep")
    loop = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    loop.step(x)
    for name, parameter in (*guide.named_parameters(), *model.named_parameters()):
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    for _ in range(3):
        loop.step(x)
    assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())


def test_chains_close_the_gap_between_levels() -> None:
    # One coordinate a level: only the dependence between levels is lost by mean field.
    torch.manual_seed(3)
    model = zoo.make("linear_gaussian", dims=(1, 1, 2), covariance="diagonal")
    x = model(size=50).detach()
    model.requires_grad_(False)
    exact = model.log_evidence(x).mean().item()
    precision = model.posterior(x[:1]).precision_matrix[0]
    gap = 0.5 * float(precision.diagonal().log().sum() - precision.logdet())
    assert gap > 0.1
    found = {}
    kinds: dict[str, Any] = {"mean_field": linear(Encoder), **linear_schemes}
    kinds["mean_field"].amortized = True
    for name, scheme in kinds.items():
        pyro.set_rng_seed(4)
        guide = Guide(model, x, family=Normal, scheme=scheme)
        objective = Trace_ELBO(num_particles=4, vectorize_particles=True)
        optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99})
        SVI(model, guide, optim, objective).run(300, ((x,), {}), progress=False)
        weights = log_weights(model, guide, x, num_samples=200).rows
        found[name] = exact - weights.mean().item()
    assert found["mean_field"] == pytest.approx(gap, abs=0.02)
    for name in SCHEMES:
        assert -0.01 < found[name] < 0.15 * gap, name


# The ladder


def test_the_ladder_merges_the_models_own_prediction() -> None:
    guide, model, x = build("top_down", "deep")
    draws, _, read = guide.rsample_packed(3, (x,))
    upstream = {
        group.name: group.batch(draws[group.name]) for group in read.groups[:2]
    }  # z3 and z2
    group = read.groups[2]
    call = replace(guide._call((x,), {}, read), upstream=upstream)
    scheme = guide.schemes[group.name]
    lam = scheme(group, call)
    prior = model.levels[1](draws["data_z2"]).base_dist  # p(z1 | z2)
    loc_x, raw = scheme.encoder(group, call).chunk(2, -1)
    # Sums of precisions, as the paper writes them.
    precision_x, precision_p = positive(raw) ** -2, prior.scale**-2
    loc = (loc_x * precision_x + prior.loc * precision_p) / (precision_x + precision_p)
    assert torch.allclose(lam[..., :3], loc)
    assert torch.allclose(positive(lam[..., 3:]), (precision_x + precision_p) ** -0.5)
    weight = model.levels[1].loc.weight
    ours = torch.autograd.grad(lam[..., :3].square().sum(), weight, retain_graph=True)[0]
    theirs = torch.autograd.grad(loc.square().sum(), weight)[0]
    assert theirs.abs().max() > 1e-3
    assert torch.allclose(ours, theirs)


def test_a_ladder_without_messages_is_the_prior() -> None:
    guide, model, x = build("top_down", "deep")
    with torch.no_grad():
        for scheme in guide.schemes.values():
            scheme.encoder.network[-1].weight.zero_()
            scheme.encoder.network[-1].bias.copy_(
                torch.cat(
                    [
                        scheme.encoder.init.new_full((len(scheme.encoder.init) // 2,), v)
                        for v in (0.0, 1e6)
                    ]
                )
            )
        draws, log_q, read = guide.rsample_packed(1, (x,))
        values = read.constrain({name: value[0] for name, value in draws.items()})
        log_p = LogJoint(model, (x,)).sites(values)
    for site in ("z1", "z2", "z3"):
        assert torch.allclose(log_q[f"data_{site}"][0], log_p[site], atol=1e-6)


def test_the_ladder_runs_no_more_of_the_program_than_it_needs() -> None:
    model, x = deep()
    guide = Guide(model, x, family=Normal, scheme=TopDown)
    calls = []
    model.likelihood.register_forward_hook(lambda *_: calls.append(1))
    read = guide.layout(x)
    assert len(calls) == 1
    guide.parameters_of(x)
    assert len(calls) == 2, "once for the layout, never for a prior"
    assert len(read.groups) == 3


@pytest.mark.parametrize(
    ("prior", "named"),
    [
        (lambda: dist.StudentT(3.0, 0.0, 1.0), "StudentT"),
        (lambda: dist.LogNormal(0.0, 1.0), "LogNormal"),
        (lambda: dist.Gamma(1.0, 1.0), "Gamma"),
    ],
)
def test_the_ladder_refuses_priors_that_it_cannot_merge(prior: Any, named: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", prior())
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("x", dist.Normal(low, 1.0), obs=x)

    with pytest.raises(ValueError, match=f"latent site 'top' is {named}. Use bottom_up"):
        Guide(model, torch.randn(4), family=Normal, scheme=TopDown)
    Guide(model, torch.randn(4), family=Normal, scheme=BottomUp)(torch.randn(2))


@pytest.mark.parametrize("family", [MultivariateNormal, StudentT])
def test_the_ladder_refuses_other_families(family: Any) -> None:
    model, x = deep()
    with pytest.raises(ValueError, match=f"and {family.__name__} is none. Use the family normal"):
        Guide(model, x, family=family, scheme=TopDown)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_level_has_nothing_to_depend_on(scheme: str) -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match="and there is one only: z"):
        Guide(model, model(size=3).detach(), family=Normal, scheme=SCHEMES[scheme])


def test_draws_are_standardized_by_their_priors() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(5000.0, 300.0))
            low = pyro.sample(
                "low", dist.MultivariateNormal(top[:, None] + torch.zeros(2), 4 * torch.eye(2))
            )
            pyro.sample("x", dist.Normal(low, 1.0).to_event(1), obs=x)

    x = 5000.0 + torch.randn(6, 2)
    up = Guide(model, x, family=Normal, scheme=BottomUp).schemes["data_top"]
    assert torch.allclose(up.scale, torch.full((2,), 2.0))
    down = Guide(model, x, family=Normal, scheme=Autoregressive).schemes["data_low"]
    assert float(down.shift) == pytest.approx(5000.0)
    assert float(down.scale) == pytest.approx(300.0)

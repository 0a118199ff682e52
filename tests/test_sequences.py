"""Guides of sequences: structure read from programs, exact limits, ragged batches, any length."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

import guides
import zoo
from guides.diagnostics import elbo
from guides.draws import draw
from guides.energy import LogJoint
from guides.inference import CompiledSVI
from guides.layout import layout
from guides.objectives import FIVO, IWELBO, STL, AnalyticELBO, DReG, Renyi
from guides.sequences import SEQUENCE_GUIDES, SEQUENCE_SCHEMES
from guides.sequences.steps import read_steps
from tests.model_cases import MODEL_CASES

SMALL: dict[str, Any] = {"recurrent": 4, "hidden": 4}
SEQUENCE_MODELS = (
    *("state_space", "deep_markov", "vrnn", "srnn", "flow_state_space", "pattern_generator"),
    "visual_pathway",
)


def small(name: str) -> dict[str, Any]:
    return {"network": 4} if name.startswith("iterative") else SMALL


def test_every_scheme_and_family_has_a_name_and_nothing_else() -> None:
    assert not set(SEQUENCE_GUIDES) & set(guides.GUIDES)
    schemes = {scheme for scheme, _ in SEQUENCE_GUIDES.values()}
    assert schemes == set(SEQUENCE_SCHEMES)
    with pytest.raises(ValueError, match="Did you mean 'filtering_normal'"):
        guides.make("filterng_normal", zoo.StateSpace(), torch.zeros(2, 3, 3))


@pytest.mark.parametrize("name", [f"{scheme}_normal" for scheme in SEQUENCE_SCHEMES])
@pytest.mark.parametrize("model_name", SEQUENCE_MODELS)
def test_a_guide_covers_every_sequence_model(model_name: str, name: str) -> None:
    """Also for a batch of one, lengths that differ, and more steps than it was built with."""
    case = MODEL_CASES[model_name]
    model = case.build()
    (x,) = case.args(model)
    guide = guides.make(name, model, x, **small(name))
    longer = torch.cat([x, x, x], 1)
    lengths = torch.tensor([1, 5, 2, 6, 3, 4]).clamp(max=longer.shape[1])
    for args in ((x,), (longer,), (longer[:1],), (longer, lengths), (x[:, :1],)):
        trace = poutine.trace(guide).get_trace(*args)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(*args)
        assert torch.isfinite(replayed.log_prob_sum())
        latents = {
            n
            for n, s in replayed.nodes.items()
            if s["type"] == "sample" and not s["is_observed"] and n != "data"
        }
        assert set(guide.locations(*args)) == latents
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    for _ in range(2):
        svi.step(longer, lengths)
    still = [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("name", [n for n in SEQUENCE_GUIDES if n.startswith("smoothing_")])
def test_every_family_follows_time(name: str) -> None:
    model = zoo.StateSpace(z_dim=2, x_dim=2, num_steps=3)
    x = model(size=4).detach()
    guide = guides.make(name, model, x, **SMALL)
    lengths = torch.tensor([3, 1, 2, 3])
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(x, lengths))) for _ in range(2))
    if guide.has_density:
        assert torch.isfinite(elbo(model, guide, x, lengths, num_samples=3).rows).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name", ["filtering_normal", "smoothing_iaf", "iterative_filtering_normal"]
)
def test_the_bound_of_a_ragged_batch_is_that_of_its_rows(name: str) -> None:
    """Padding counts in no density: log p - log q of each row, by Pyro's traces of it alone."""
    model = zoo.StateSpace(z_dim=1, x_dim=2, num_steps=4)
    x = model(size=3).detach()
    lengths = torch.tensor([4, 1, 3])
    options = {**small(name), "family_hidden": (4, 4)} if "iaf" in name else small(name)
    guide = guides.make(name, model, x, **options)
    trace = poutine.trace(guide).get_trace(x, lengths)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, lengths)
    for part in (trace, replayed):
        part.compute_log_prob()
    for t in range(4):
        on = t < lengths
        for part in (replayed.nodes[f"z_{t + 1}"], replayed.nodes[f"x_{t + 1}"]):
            assert (part["log_prob"][~on] == 0).all()
            assert (part["log_prob"][on] != 0).all()
        auxiliary = next(s for n, s in trace.nodes.items() if n.endswith(f"_step_{t + 1}"))
        assert (auxiliary["log_prob"][~on] == 0).all()
        assert (auxiliary["log_prob"][on] != 0).all()
    _, log_q, _ = guide.rsample_packed(5, (x, lengths))
    for t in range(4):
        assert torch.equal(log_q[f"step_{t + 1}"] == 0, (t >= lengths).expand(5, -1))


@pytest.mark.usefixtures("float64")
def test_an_iterative_filter_learns_from_every_iteration_and_scales_as_the_plate_does() -> None:
    """The gradient of N = 2 B rows, of which B are seen, is twice that of these B alone."""
    model = zoo.StateSpace(z_dim=1, x_dim=2, num_steps=3).requires_grad_(False)
    x = model(size=4).detach()

    def gradient(count: int, num_particles: int = 1, **kwargs: Any) -> torch.Tensor:
        pyro.set_rng_seed(1)
        guide = guides.make(
            "iterative_filtering_normal", model, x, num_iterations=count, **options
        )
        pyro.set_rng_seed(2)
        vectorized = num_particles > 1
        objective = Trace_ELBO(num_particles, 1, vectorize_particles=vectorized)
        loss = objective.loss_and_grads(model, guide, x, **kwargs)
        assert loss == pytest.approx(objective_of(guide, objective, kwargs), rel=1e-12)
        return torch.cat([p.grad.flatten() for p in guide.parameters() if p.grad is not None])

    def objective_of(guide: Any, objective: Trace_ELBO, kwargs: dict[str, Any]) -> float:
        pyro.set_rng_seed(2)
        return float(objective.loss(model, guide, x, **kwargs))

    options: dict[str, Any] = {"network": 4, "name": "filter"}
    one, three = gradient(1), gradient(3)
    assert (one - three).abs().max() > 1e-3
    for count, alone in ((1, one), (3, three)):
        seen = gradient(count, size=8, index=torch.arange(4))
        assert torch.allclose(seen, 2 * alone, rtol=1e-10)
    assert torch.isfinite(gradient(3, num_particles=5)).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [f"{scheme}_normal" for scheme in SEQUENCE_SCHEMES])
def test_a_row_that_is_masked_throughout_counts_for_nothing(name: str) -> None:
    def model(x: torch.Tensor, on: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                with poutine.mask(mask=on[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])

    x = torch.randn(4, 3)
    on = torch.tensor([[True] * 3, [False] * 3, [True, True, False], [True, False, False]])
    guide = guides.make(name, model, x, on, **small(name))
    trace = poutine.trace(guide).get_trace(x, on)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, on)
    for part in (trace, replayed):
        part.compute_log_prob()
        sites = [s for n, s in part.nodes.items() if s["type"] == "sample" and n != "data"]
        rows = [s["log_prob"] for s in sites if s["log_prob"].dim()]
        assert len(rows) >= 6
        assert all((row[1] == 0).all() and torch.isfinite(row).all() for row in rows)
    others = [0, 2, 3]
    if not name.startswith("iterative"):  # which draws its own gradients
        whole, alone = guide.locations(x, on), guide.locations(x[others], on[others])
        for site, value in alone.items():
            seen = on[others][:, int(site.removeprefix("z_"))]
            assert (whole[site][others] - value)[seen].abs().max() < 1e-12
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(x, on))) for _ in range(2))
    assert all(torch.isfinite(p).all() for p in guide.parameters())
    nothing = torch.zeros_like(on)
    assert abs(svi.evaluate_loss(x, nothing)) < 1e-12


def positive_walk(x: torch.Tensor, on: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = torch.ones(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=on[:, t]):
                z = pyro.sample(f"z_{t}", dist.LogNormal(0.5 * z.log() + 1.0, 0.5))
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["filtering_normal", "iterative_filtering_normal"])
def test_a_masked_step_of_a_positive_latent_counts_in_no_objective(name: str) -> None:
    """Neither its density nor the Jacobian of its support; rows with a step less are shorter."""
    x = torch.randn(3, 3)
    on = torch.tensor([[True] * 3, [True, True, False], [False] * 3])
    guide = guides.make(name, positive_walk, x, torch.ones_like(on), **small(name))
    for objective in (
        *(Trace_ELBO(), AnalyticELBO(), STL(), IWELBO(4), DReG(4), Renyi(0.5, 4), FIVO(4)),
    ):
        guide.zero_grad()
        assert objective.loss_and_grads(positive_walk, guide, x, on & False) == 0.0
        assert all(p.grad is None or (p.grad == 0).all() for p in guide.parameters())
    found = draw(positive_walk, guide, (x, on), num_samples=4)
    assert (found.log_p_rows[:, 2] == 0).all()
    assert (found.log_q_rows[:, 2] == 0).all()
    values = {f"z_{t}": torch.rand(3) + 0.5 for t in range(3)}
    whole = LogJoint(positive_walk, (x, on))
    rows = whole.packed(whole.layout.pack(values))[0]
    for row, steps in ((0, 3), (1, 2)):
        alone = LogJoint(positive_walk, (x[row, None, :steps], on[row, None, :steps]))
        own = {f"z_{t}": values[f"z_{t}"][row, None] for t in range(steps)}
        torch.testing.assert_close(rows[row, None], alone.packed(alone.layout.pack(own))[0])
    assert rows[2] == 0


def held_by(guide: Any) -> list[Any]:
    """What its attributes hold, in lists as well."""
    found = []
    for value in vars(guide).values():
        found += value if isinstance(value, (list, tuple)) else [value]
    return found


def test_a_filter_keeps_no_graphs_of_the_objectives_that_call_it() -> None:
    model = zoo.StateSpace(num_steps=3)
    x = model(size=4).detach()
    guide = guides.make("iterative_filtering_normal", model, x, num_iterations=3, network=4)
    for objective in (AnalyticELBO(), STL(), IWELBO(2), FIVO(2), Trace_ELBO()):
        objective.loss_and_grads(model, guide, x)
        assert not any(type(p) is torch.Tensor and p.requires_grad for p in held_by(guide))
        copy.deepcopy(guide)


@pytest.mark.parametrize("inside", [True, False])
def test_a_latent_that_its_own_distribution_masks_is_refused(inside: bool) -> None:
    """Its row is masked in the program and not in q, whose entropy has no bound."""

    def model(x: torch.Tensor, on: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                prior = dist.Normal(torch.zeros(len(x)), 1.0)
                with poutine.mask(mask=inside):
                    z = pyro.sample(f"z_{t}", prior.mask(on[:, t]) if inside else prior)
                pyro.sample(f"x_{t}", dist.Normal(z, 1.0).mask(on[:, t]), obs=x[:, t])

    x = torch.randn(2, 3)
    for name in ("filtering_normal", "iterative_filtering_normal"):
        with pytest.raises(NotImplementedError, match=r"'z_0' has .*pyro.poutine.mask around it"):
            guides.make(name, model, x, torch.ones(2, 3, dtype=torch.bool), **small(name))


@pytest.mark.parametrize("model_name", SEQUENCE_MODELS)
def test_an_empty_sequence_is_refused(model_name: str) -> None:
    case = MODEL_CASES[model_name]
    model = case.build()
    (x,) = case.args(model)
    lengths = torch.ones(len(x), dtype=torch.int64)
    lengths[0] = 0
    with pytest.raises(ValueError, match="Leave empty sequences out"):
        guides.make("smoothing_normal", model, x, lengths, **SMALL)
    with pytest.raises(ValueError, match="at least one time step"):
        model(x[:, :0])


@pytest.mark.usefixtures("float64")
def test_the_backward_network_starts_where_a_row_ends() -> None:
    model = zoo.StateSpace(z_dim=1, x_dim=2, num_steps=5)
    x = model(size=2).detach()
    guide = guides.make("smoothing_normal", model, x, **SMALL)
    short = guide.locations(x[:1, :3])
    padded = torch.cat([x[:1, :3], 9.0 + torch.zeros(1, 2, 2)], 1)
    ragged = guide.locations(torch.cat([padded, x[1:]]), torch.tensor([3, 5]))
    for t in range(3):
        assert (ragged[f"z_{t + 1}"][0] - short[f"z_{t + 1}"][0]).abs().max() < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "sees"),
    [
        ("filtering_normal", {"past"}),
        ("smoothing_normal", {"future"}),
        ("two_sided_smoothing_normal", {"past", "future"}),
        ("mean_field_smoothing_normal", {"past", "future"}),
        ("mean_field_normal", set()),
    ],
)
def test_q_of_a_step_sees_what_its_name_says(name: str, sees: set[str]) -> None:
    model = zoo.StateSpace(z_dim=1, x_dim=1, num_steps=4)
    x = model(size=3).detach()
    guide = guides.make(name, model, x, **SMALL)

    def second(x: torch.Tensor, before: float = 0.0) -> float:
        read = guide._layout((x,), {}, None)
        call = guide._call((x,), {}, read)
        upstream = {"step_1": torch.full((3, 1), before)}
        q = guide.group_distribution(read.groups[1], call, upstream)
        return float(q.base_dist.loc.sum().detach())

    def reaches(step: int) -> bool:
        moved = x.clone()
        moved[:, step] += 1.0
        return second(moved) != second(x)

    assert reaches(1)
    assert reaches(0) == ("past" in sees)
    assert reaches(3) == ("future" in sees)
    assert (second(x, 1.0) != second(x)) == guide.markov


def test_steps_of_other_programs() -> None:
    """Two latents a step, names of the program's own, globals, all latents before all data."""

    def walk(x, together=False):
        speed = pyro.sample("speed", dist.Gamma(2.0, 2.0))
        with pyro.plate("sequences", len(x)):
            a, held = torch.zeros(len(x)), []
            for t in range(x.shape[1]):
                a = pyro.sample(f"a{t}", dist.Normal(a, speed))
                b = pyro.sample(f"b{t}", dist.LogNormal(a, 1.0))
                held.append((a, b))
                if not together:
                    pyro.sample(f"y{t}", dist.Normal(a + b, 1.0), obs=x[:, t])
            for t, (a, b) in enumerate(held if together else ()):
                pyro.sample(f"y{t}", dist.Normal(a + b, 1.0), obs=x[:, t])

    x = torch.randn(4, 3)
    for together in (False, True):
        read = read_steps(layout(walk, (x, together)))
        assert [step.sites for step in read] == [("a0", "b0"), ("a1", "b1"), ("a2", "b2")]
        assert torch.equal(read[1].inputs[:, 0], x[:, 1])
    guide = guides.make("filtering_normal", walk, x, **SMALL)
    assert set(guide(torch.randn(2, 5))) == {"speed"} | {f"{n}{t}" for n in "ab" for t in range(5)}
    svi = SVI(walk, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.isfinite(torch.tensor(svi.step(x)))


def odd(x, kind):
    with pyro.plate("data", len(x)):
        for t in range(x.shape[1]):
            width = 2 if kind == "latents" and t == 1 else 1
            z = pyro.sample(f"z{t}", dist.Normal(torch.zeros(width), 1.0).to_event(1))
            if kind == "no data at the end" and t == x.shape[1] - 1:
                return
            seen = x[:, t : t + 1].repeat(1, 2 if kind == "data" and t == 1 else 1)
            row = dist.Normal(z.sum(-1, keepdim=True).expand(seen.shape), 1.0).to_event(1)
            pyro.sample(f"x{t}", row, obs=seen)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("latents", "Steps must look alike.*latent coordinates"),
        ("data", "Steps must look alike.*observed features"),
        ("no data at the end", "have no observation after them"),
    ],
)
def test_steps_that_do_not_look_alike_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        guides.make("filtering_normal", odd, torch.randn(3, 3), kind, **SMALL)


def test_bad_options_say_what_is_wrong() -> None:
    model = zoo.StateSpace(num_steps=3)
    x = model(size=4).detach()
    with pytest.raises(TypeError, match=r"has no option 'recurent'\. Did you mean 'recurrent'"):
        guides.make("filtering_normal", model, x, recurent=3)
    for options, message in (
        ({"cell": "tree"}, "cell must be one of"),
        ({"combiner": "sum"}, "combiner must be"),
        ({"recurrent": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            guides.make("filtering_normal", model, x, **options)
    with pytest.raises(ValueError, match="num_iterations must be at least 1"):
        guides.make("iterative_filtering_normal", model, x, num_iterations=0)
    with pytest.raises(ValueError, match=r"combiner=.average. averages states"):
        guides.make("mean_field_normal", model, x, combiner="average")
    guide = guides.make("filtering_normal", model, x, **SMALL)
    other = zoo.StateSpace(z_dim=4, num_steps=3)
    guide._reference.model = other
    with pytest.raises(ValueError, match="built for steps of 2 latent coordinates"):
        guide(x)

    def static(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x.mean())

    with pytest.raises(ValueError, match="needs latents and observations of every step"):
        guides.make("filtering_normal", static, torch.randn(3), **SMALL)


def test_a_sequence_guide_is_saved_and_loaded(tmp_path) -> None:
    model = zoo.StateSpace(num_steps=3)
    x = model(size=4).detach()
    guide = guides.make("smoothing_normal", model, x, **SMALL)
    guides.save(guide, tmp_path / "guide.safetensors")
    fresh = guides.load(tmp_path / "guide.safetensors", model)
    longer = torch.cat([x, x], 1)
    for name, value in guide.locations(longer).items():
        assert torch.equal(fresh.locations(longer)[name], value)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mean_field_smoothing_normal", 2),
        ("filtering_normal", 2),
        ("two_sided_smoothing_normal", 3),
    ],
)
def test_a_product_of_experts_is_the_product_of_their_densities(name: str, experts: int) -> None:
    """Up to its normalizer, which for two Gaussians has a closed form too; ragged rows train."""
    torch.manual_seed(0)
    model = zoo.StateSpace(z_dim=2, x_dim=2, num_steps=3)
    x = model(size=4).detach()
    guide = guides.make(name, model, x, recurrent=4, combiner="product")
    start = guide.family.distribution(guide.init)
    with torch.no_grad():
        for head in guide.product.heads:
            head.weight.zero_()
        found = guide.family.distribution(guide.step_parameters(0, call_of(guide, x)))
        assert (found.mean - start.mean).abs().max() < 1e-12
        assert (found.stddev - start.stddev).abs().max() < 1e-6
        for head in guide.product.heads:
            head.weight.normal_()
    call = call_of(guide, x)
    summaries = list(call.context[0].split(4, -1))
    summaries += [guide._before(0, call)] if guide.markov else []
    parts = [dist.Normal(*part) for part in guide.product.experts(summaries)]
    assert len(parts) == experts
    q = guide.family.distribution(guide.step_parameters(0, call)).base_dist
    points = torch.linspace(-1.0, 1.0, 7)[:, None, None]
    excess = sum(part.log_prob(points) for part in parts) - q.log_prob(points)  # (7, B, K)
    assert (excess - excess[0]).abs().max() < 1e-6
    if experts == 2:
        one, other = parts
        apart = dist.Normal(one.loc, (one.scale**2 + other.scale**2).sqrt())
        assert (excess[0] - apart.log_prob(other.loc)).abs().max() < 1e-6
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    before = {n: p.detach().clone() for n, p in guide.named_parameters()}
    for _ in range(2):
        assert torch.isfinite(torch.tensor(svi.step(x, torch.tensor([3, 1, 2, 3]))))
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def call_of(guide: Any, x: torch.Tensor) -> Any:
    return guide._call((x,), {}, guide._layout((x,), {}, None))


def test_a_product_needs_two_experts_that_are_gaussian() -> None:
    model = zoo.StateSpace(num_steps=3)
    x = model(size=4).detach()
    for name, message in (
        ("mean_field_normal", "two or more experts"),
        ("filtering_multivariate_normal", "needs the family normal; got MultivariateNormal"),
    ):
        with pytest.raises(ValueError, match=message):
            guides.make(name, model, x, combiner="product")


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_smoothing_reaches_the_evidence_and_filtering_the_best_of_its_form() -> None:
    """A scalar state space, many sequences; the best filtering form is found numerically.

    q(z_t | z_{t-1}, x_<=t) linear Gaussian with free coefficients for every step, fitted by the
    exact expected bound. No q of this form, of any family, does better: by induction from the last
    step on, the log density of the best one is quadratic in draw and data. What a guide reaches on
    held-out sequences lies between that optimum and the gap of the untrained optimal proposal, on
    twice as many steps as it was trained on, too; smoothing is then within .05 nats.
    """
    torch.manual_seed(0)
    model = zoo.StateSpace(z_dim=1, x_dim=1, num_steps=5, covariance="unit").requires_grad_(False)
    with torch.no_grad():
        model.transition.weight.fill_(0.9)
        model.emission.weight.fill_(1.0)
    x, held = model(size=1000), model(size=8000)
    model.num_steps = 10
    longer = model(size=8000)
    gaps: dict[tuple[str, int], float] = {}
    errors: dict[tuple[str, int], float] = {}
    for name in ("smoothing_normal", "filtering_normal"):
        guide = guides.make(name, model, x, recurrent=16, hidden=16)
        optim = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.997})
        svi = CompiledSVI(model, guide, optim, Trace_ELBO(), mode="graph")
        svi.run(1000, ((x,), {}), progress=False)
        for data in (held, longer):
            key = (name, data.shape[1])
            rows = model.log_evidence(data) - elbo(model, guide, data, num_samples=25).rows
            gaps[key], errors[key] = float(rows.mean()), float(rows.std()) / len(rows) ** 0.5
    for steps in (5, 10):
        smoothing, filtering = ("smoothing_normal", steps), ("filtering_normal", steps)
        optimum, proposal = best_filtering_gap(model, steps), proposal_gap(model, steps)
        assert 0.0 < optimum < proposal, "the untrained optimal proposal is not the best of it"
        error = 4 * errors[filtering]
        assert error < 0.5 * (proposal - optimum), "too noisy to tell them apart"
        assert optimum - error < gaps[filtering] < proposal - error
        assert -4 * errors[smoothing] < gaps[smoothing] < (0.02 if steps == 5 else 0.05)


def expected_gap(model: zoo.StateSpace, steps: int, weights: list[torch.Tensor]) -> torch.Tensor:
    """E_x KL(q || p(z | x)) of linear Gaussian q, exactly.

    Every step is q(z_t | ..) = Normal(w . (z_{t-1}, x_1 .. x_t), exp(s)); all is linear in the
    white noise behind x and behind q's draws, so that expectations are traces.
    """
    a = model.transition.weight.squeeze()
    c = model.emission.weight.squeeze()
    eye = torch.eye(3 * steps)  # noise of z, of x, of q
    z_true, x = [], []
    for t in range(steps):
        z_true.append(eye[t] if t == 0 else a * z_true[-1] + eye[t])
        x.append(c * z_true[-1] + eye[steps + t])
    z, log_q = [], torch.zeros(())
    for t, w in enumerate(weights):
        loc = sum((w[1 + s] * x[s] for s in range(t + 1)), torch.zeros(3 * steps))
        if t:
            loc = loc + w[0] * z[-1]
        scale = w[-1].exp()
        z.append(loc + scale * eye[2 * steps + t])
        log_q = log_q - w[-1] - 0.5 - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    log_p = torch.zeros(())
    for t in range(steps):
        errors = (z[t] if t == 0 else z[t] - a * z[t - 1], x[t] - c * z[t])
        for error in errors:
            log_p = (
                log_p - 0.5 * error.square().sum() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
            )
    joint = torch.stack(x)[:, : 2 * steps]
    covariance = joint @ joint.mT
    entropy = 0.5 * torch.logdet(2 * torch.pi * torch.e * covariance)
    return -entropy - (log_p - log_q)


def best_filtering_gap(model: zoo.StateSpace, steps: int) -> float:
    weights = [torch.zeros(t + 3).requires_grad_() for t in range(steps)]
    optim = torch.optim.LBFGS(weights, max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optim.zero_grad()
        loss = expected_gap(model, steps, weights)
        loss.backward()
        return loss

    optim.step(closure)
    return float(expected_gap(model, steps, weights).detach())


def proposal_gap(model: zoo.StateSpace, steps: int) -> float:
    """q(z_t | z_{t-1}, x_t) = p(z_t | z_{t-1}, x_t), the optimal proposal of a particle filter."""
    a = float(model.transition.weight)
    c = float(model.emission.weight)
    weights = []
    for t in range(steps):
        precision = 1 + c * c
        w = torch.zeros(t + 3)
        w[0] = a / precision if t else 0.0
        w[1 + t] = c / precision
        w[-1] = -0.5 * torch.log(torch.tensor(precision))
        weights.append(w)
    return float(expected_gap(model, steps, weights))


@pytest.mark.usefixtures("float64")
def test_the_exact_gap_of_the_optimal_proposal_is_that_of_the_reference() -> None:
    """1.264 for the proposal on ten steps, 1.101 for the best filtering form of that system."""
    model = zoo.StateSpace(z_dim=1, x_dim=1, num_steps=10, covariance="unit").requires_grad_(False)
    model.transition.weight.fill_(0.9)
    model.emission.weight.fill_(1.0)
    proposal, best = proposal_gap(model, 10), best_filtering_gap(model, 10)
    assert proposal == pytest.approx(1.264, abs=5e-4)
    assert best == pytest.approx(1.101, abs=1e-3)
    # An independent check of the proposal's gap: by draws.
    x = model(size=4000)
    z, log_w = None, torch.zeros(4000)
    for t in range(10):
        loc = (x[:, t] if z is None else 0.9 * z + x[:, t]) / 2
        q = torch.distributions.Normal(loc, 0.5**0.5)
        new = q.sample()
        prior = torch.distributions.Normal(0.0 if z is None else 0.9 * z, 1.0)
        seen = torch.distributions.Normal(new, 1.0)
        log_w = log_w + (prior.log_prob(new) + seen.log_prob(x[:, t]) - q.log_prob(new)).squeeze(
            -1
        )
        z = new
    gap = model.log_evidence(x) - log_w
    error = float(gap.std()) / 4000**0.5
    assert float(gap.mean()) == pytest.approx(proposal, abs=4 * error)


def test_one_scale_for_a_site_so_that_rare_features_are_not_blown_up() -> None:
    """A key that sounds once in a thousand steps would be thirty where the others are one."""

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))
                three = dist.Normal(z[:, None] * torch.ones(3), 1.0).to_event(1)
                pyro.sample(f"x_{t}", three, obs=x[:, t])
                pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[:, t])

    x = torch.zeros(20, 50, 3)
    x[::2, :, 0] = 1.0  # half of the time
    x[3, 7, 1] = 1.0  # once; the last feature never
    y = torch.full((20, 50), 0.1)  # constant, and its mean is not to the bit
    guide = guides.make("smoothing_normal", model, x, y, **SMALL)
    spread = (x - x.mean((0, 1))).square().mean().sqrt()
    torch.testing.assert_close(guide.scale, torch.stack([spread, spread, spread, torch.ones(())]))
    torch.testing.assert_close(guide.shift[:3], x.mean((0, 1)))


def test_names_and_options_in_the_wrong_place_are_refused_with_the_right_one() -> None:
    model, x = zoo.StateSpace(z_dim=2, x_dim=3, num_steps=3), torch.zeros(4, 3, 3)
    with pytest.raises(ValueError, match="'filtering_normal' is a guide of sequences"):
        guides.make({"data": "filtering_normal"}, model, x)
    with pytest.raises(TypeError, match=r"'size' is an argument of the model: pass model_kwargs"):
        guides.make("filtering_normal", model, x, size=8)


def gaps(x: torch.Tensor, seen: torch.Tensor, on: torch.Tensor | None = None) -> None:
    """Two features, missing one by one at steps that the row has; rows may lack steps as well."""
    with pyro.plate("data", len(x)):
        z = torch.zeros(len(x))
        for t in range(x.shape[1]):
            with poutine.mask(mask=True if on is None else on[:, t]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                for j in range(x.shape[2]):
                    with poutine.mask(mask=seen[:, t, j]):
                        pyro.sample(f"x_{t}_{j}", dist.Normal(z, 1.0), obs=x[:, t, j])


def read_by(guide: Any, *args: torch.Tensor) -> torch.Tensor:
    """What the networks of a guide read in a call."""
    seen: list[torch.Tensor] = []
    handle = guide.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    guide._call(args, {}, guide._layout(args, {}, None))
    handle.remove()
    return seen[-1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", ["filtering_normal", "iterative_filtering_normal"])
def test_missing_data_are_told_from_zeros(name: str, ragged: bool) -> None:
    """Statistics are those of the data that are there; what is missing is zero, and flagged."""
    x = torch.tensor([100.0, -30.0]) + torch.tensor([1.0, 5.0]) * torch.randn(40, 6, 2)
    seen = torch.rand(40, 6, 2) < 0.5
    on = torch.arange(6) < torch.randint(1, 7, (40, 1))
    extra = (on,) if ragged else ()
    there = seen & on[..., None] if ragged else seen
    guide = guides.make(name, gaps, x, seen, *extra, **small(name))
    for j in range(2):
        torch.testing.assert_close(guide.shift[j], x[..., j][there[..., j]].mean())
        spread = x[..., j][there[..., j]].std(correction=0)
        torch.testing.assert_close(guide.scale[j], spread)
    expected = torch.where(there, (x - guide.shift) / guide.scale, 0.0)
    found = read_by(guide, x, seen, *extra)
    torch.testing.assert_close(found, torch.cat([expected, there.to(x)], -1))
    moved = torch.where(there, x, 7.0)
    assert torch.equal(read_by(guide, moved, seen, *extra), found)
    svi = SVI(gaps, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(torch.isfinite(torch.tensor(svi.step(x, seen, *extra))) for _ in range(2))


@pytest.mark.usefixtures("float64")
def test_a_mask_of_steps_is_no_mask_of_data() -> None:
    """Ragged rows are read as ever; a mask that hides data needs a guide that knows of it."""
    x, on = torch.randn(5, 4, 2), torch.arange(4) < torch.tensor([[1], [4], [3], [2], [4]])
    whole = torch.ones_like(x, dtype=torch.bool)
    ragged = on[..., None].expand_as(x)
    guide = guides.make("filtering_normal", gaps, x, ragged, on, **SMALL)
    assert not guide.missing
    torch.testing.assert_close(guide.shift, x[on].mean(0))
    zeros = torch.where(on[..., None], x, 0.0)
    expected = (zeros - guide.shift) / guide.scale
    assert torch.equal(read_by(guide, x, ragged, on), expected)
    holes = ragged.clone()
    holes[1, 2, 0] = False
    with pytest.raises(ValueError, match=r"built from a call in which no data were.*missing=True"):
        guide(x, holes, on)
    told = guides.make("filtering_normal", gaps, x, ragged, on, missing=True, **SMALL)
    assert read_by(told, x, holes, on).shape == (5, 4, 4)
    assert guides.make("filtering_normal", gaps, x, whole, **SMALL).missing  # of the data alone


def test_a_guide_of_missing_data_is_saved_and_captured(tmp_path) -> None:
    x = torch.randn(5, 4, 2)
    seen = torch.rand(5, 4, 2) < 0.5
    guide = guides.make("smoothing_normal", gaps, x, seen, **SMALL)
    guides.save(guide, tmp_path / "guide.safetensors")
    fresh = guides.load(tmp_path / "guide.safetensors", gaps)
    for site, value in guide.locations(x, seen).items():
        assert torch.equal(fresh.locations(x, seen)[site], value)
    svi = CompiledSVI(gaps, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), mode="graph")
    for _ in range(3):
        svi.step(x, seen)
    assert [kind.mode for kind in svi.compiled] == ["graph"], svi.compiled


def seen_twice(x: torch.Tensor, how: str) -> None:
    """A walk whose steps are seen twice, the second time as data or by a factor."""
    with pyro.plate("data", len(x)):
        z, held = torch.zeros(len(x)), []
        for t in range(x.shape[1]):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
            held.append(z)
            if how == "late":
                continue
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])
            if how == "data":
                pyro.sample(f"y_{t}", dist.Normal(z, 0.3), obs=torch.ones(len(x)))
            elif how == "factor":
                pyro.factor(f"y_{t}", dist.Normal(z, 0.3).log_prob(torch.ones(len(x))))
        for t, z in enumerate(held if how == "late" else ()):
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("one", "other"), [("data", "factor"), ("once", "late")])
def test_a_filter_follows_factors_and_data_after_all_latents(one: str, other: str) -> None:
    """Programs of one joint density have one filter, however they write it down."""
    x = torch.randn(4, 3)
    found = []
    for how in (one, other):
        guide = guides.make(
            "iterative_filtering_normal",
            *(seen_twice, x, how),
            **{"network": 4, "num_iterations": 2, "observations": False, "name": "filter"},
        )
        with torch.no_grad():
            for parameter in guide.parameters():  # as many for one observation a step as for two
                parameter.copy_(0.1 * torch.arange(parameter.numel()).cos().view_as(parameter))
            pyro.set_rng_seed(1)
            found.append(guide(x, how))
    for site, value in found[0].items():
        torch.testing.assert_close(value, found[1][site])
    if other == "factor":
        pyro.set_rng_seed(1)
        with torch.no_grad():
            without = guide(x, "once")["z_2"]
        assert (without - found[0]["z_2"]).abs().max() > 0.01

"""Programs on which a plausible implementation gives a wrong answer without a word."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import guides
from guides.diagnostics import elbo, log_evidence, pareto_khat
from guides.draws import draw
from guides.energy import LogJoint
from guides.inference import SVI, PredictiveCoding
from guides.rows import take_rows

X = torch.randn(6, generator=torch.Generator().manual_seed(3))


def plain(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("name", ["normal", "amortized_normal"])
def test_q_follows_a_support_that_the_model_learns_with_its_gradient(name: str) -> None:
    def model(x: Tensor) -> None:
        high = pyro.param("high", torch.tensor(8.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, high))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([1.0, 2.0, 4.0])
    guide = guides.make(name, model, x)
    torch.manual_seed(0)
    Trace_ELBO().differentiable_loss(model, guide, x).backward()
    raw = pyro.param("high").unconstrained()
    losses = []
    for shift in (1e-3, -1e-3):
        with torch.no_grad():
            raw += shift
            torch.manual_seed(0)
            losses.append(Trace_ELBO().loss(model, guide, x))
            raw -= shift
    assert float(raw.grad) == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.02)


@pytest.mark.parametrize("fit", ["delta", "normal", "predictive_coding"])
def test_symmetric_programs_are_not_stuck_at_their_center(fit: str) -> None:
    def mixture(x: Tensor) -> None:
        with pyro.plate("components", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            weights = dist.Categorical(torch.ones(2))
            pyro.sample("x", dist.MixtureSameFamily(weights, dist.Normal(mean, 1.0)), obs=x)

    x = torch.cat([torch.randn(20) - 4, torch.randn(20) + 4])
    if fit == "predictive_coding":
        mean = PredictiveCoding(mixture, pyro.optim.SGD({}), num_steps=200).infer(x)["mean"]
    else:
        guide = guides.make(fit, mixture, x)
        SVI(mixture, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).run(200, ((x,), {}))
        mean = guide.locations(x)["mean"].detach()
    assert sorted(mean.tolist()) == pytest.approx([-4.0, 4.0], abs=0.8)


def test_guides_start_at_far_priors() -> None:
    def far(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(1000.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = guides.make("normal", far, X + 1000)
    assert float(guide.locations(X)["mean"].detach()) == pytest.approx(1000.0, abs=1.0)


def random_rows(x: Tensor) -> None:
    with pyro.plate("data", 6, subsample_size=2) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def test_predictive_coding_sees_fresh_rows_and_labels_them_right() -> None:
    seen = set()

    def watched(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as rows:
            seen.add(tuple(rows.tolist()))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    pc = PredictiveCoding(watched, pyro.optim.SGD({}), num_steps=30)
    for _ in range(15):
        pc.step(X)
    assert len(seen) > 5
    posterior = pc.posterior(X)
    assert torch.allclose(posterior.loc_data[:, 0], X[posterior.plate.index] / 2, atol=1e-4)


def test_chunks_of_an_evidence_score_the_same_rows() -> None:
    def exact(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    score = log_evidence(random_rows, exact, X, num_samples=40, chunk_size=10)
    truth = dist.Normal(0.0, 2**0.5).log_prob(X)
    for value in score.rows:
        assert (truth - value).abs().min() < 1e-4


def test_terms_outside_the_plate_stay_in_the_evidence() -> None:
    def penalized(x: Tensor) -> None:
        plain(x)
        pyro.factor("penalty", torch.tensor(-7.0))

    guide = guides.make("normal", plain, X)
    torch.manual_seed(0)
    without = log_evidence(plain, guide, X, num_samples=50).total
    torch.manual_seed(0)
    assert log_evidence(penalized, guide, X, num_samples=50).total == pytest.approx(without - 7)


def test_rows_that_talk_to_each_other_are_refused_or_joined() -> None:
    def coupled(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("sum", dist.Normal(z.sum(), 0.1), obs=torch.tensor(0.0))

    x = torch.tensor([-1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"Rows of plate 'data' are coupled.*data_plate=None"):
        PredictiveCoding(coupled, pyro.optim.SGD({})).infer(x)
    pc = PredictiveCoding(coupled, pyro.optim.SGD({}), num_steps=3000, data_plate=None)
    precision = 2 * torch.eye(3) + 100.0
    exact = torch.linalg.solve(precision, x)
    assert torch.allclose(pc.infer(x)["z"], exact, atol=1e-3)
    assert torch.allclose(
        pc.posterior(x).covariance("global"), torch.linalg.inv(precision), atol=1e-4
    )
    # The varying term outside the plate makes every weight joint.
    assert elbo(coupled, guides.make("normal", coupled, x), x, num_samples=30).joint


def test_impossible_draws_are_no_sign_of_an_exact_guide() -> None:
    def half(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Uniform(0.0, z), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0, 1.0))

    khat = pareto_khat(half, guide, torch.full((3,), 1.0), num_samples=200)
    assert (khat.rows > -math.inf).all()


def test_data_outside_the_support_are_named_everywhere() -> None:
    def waiting(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Exponential(z), obs=x)

    guide = guides.make("normal", waiting, torch.ones(3))
    bad = torch.tensor([-1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="'x' has values outside the support"):
        elbo(waiting, guide, bad)
    with pytest.raises(ValueError, match="'x' has values outside the support"):
        guides.make("normal", waiting, bad)


def test_subsampled_loops_and_unused_subsamples_are_refused() -> None:
    def loop(x: Tensor) -> None:
        for i in pyro.plate("data", 10, subsample=torch.arange(5)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match=r"Sequential plate 'data' is subsampled.*Vectorize"):
        guides.make("normal", loop, torch.randn(10))

    def sliced(x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"do not follow the draw.*subsample=index"):
        guides.make("normal", sliced, X)
    guides.make("amortized_normal", sliced, X)  # reads the rows themselves


def test_parts_that_are_points_have_no_density() -> None:
    def two(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        plain(x)

    parts = pyro.infer.autoguide.AutoGuideList(two)
    parts.append(pyro.infer.autoguide.AutoDelta(poutine.block(two, expose=["w"])))
    parts.append(pyro.infer.autoguide.AutoNormal(poutine.block(two, expose=["z"])))
    with pytest.raises(ValueError, match="point mass at 'w'"):
        elbo(two, parts, X)
    laplace = pyro.infer.autoguide.AutoLaplaceApproximation(two)
    with pytest.raises(ValueError, match="point mass"):
        elbo(two, laplace, X)


def test_local_latents_from_a_global_draw_have_no_rows() -> None:
    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        joint = pyro.sample(
            "joint",
            dist.Normal(torch.zeros(len(x)), 1.0).to_event(1),
            infer={"is_auxiliary": True},
        )
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(joint))
            pyro.sample("w", dist.Normal(0.0, 1.0))

    draws = draw(two, guide, (X,), num_samples=3)
    assert draws.joint
    assert not draws.rows_complete


def test_rows_of_positional_packs_are_sliced() -> None:
    def packed(*data: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        x, y = data
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)

    read = guides.layout.layout(packed, (X, X + 1))
    rows = torch.tensor([4, 1])
    args, kwargs = take_rows(packed, (X, X + 1), {}, rows, read)
    assert torch.equal(args[0], X[rows])
    assert torch.equal(args[1], X[rows] + 1)
    assert kwargs["size"] == 6

    def table(batch: dict[str, Tensor]) -> None:
        plain(batch["x"])

    read = guides.layout.layout(table, ({"x": X},))
    with pytest.raises(ValueError, match="No argument of the call has an axis of 6 rows"):
        take_rows(table, ({"x": X},), {}, rows, read)


def test_a_run_over_a_generator_resumes_at_the_next_batch() -> None:
    seen: list[float] = []

    def watched(x: Tensor) -> None:
        seen.append(float(x[0]))
        plain(x)

    def batches():
        return (((torch.full((6,), float(i)),), {}) for i in range(6))

    guide = guides.make("normal", watched, X)
    svi = SVI(watched, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    half = svi.run(3, batches())
    seen.clear()
    svi.run(5, batches(), state=half.state)
    assert [value for value in seen if value >= 3] == sorted(v for v in seen if v >= 3)
    assert {3.0, 4.0} <= set(seen)
    assert 5.0 not in seen


def test_constrained_parameters_of_equal_names_are_told_apart() -> None:
    class Scaled(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.s = PyroParam(torch.tensor(0.3), dist.constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, self.s), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.s = PyroParam(torch.tensor(0.7), dist.constraints.positive)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, self.s))

    svi = SVI(Scaled(), Guide(), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.raises(ValueError, match=r"share the parameter 's'|another module's parameter"):
        svi.step(X)


class Decoder(PyroModule):
    def __init__(self) -> None:
        super().__init__("decoder_of_hard_programs")
        self.net = nn.Linear(1, 1)
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.net(z.unsqueeze(-1)).squeeze(-1), 1.0), obs=x)


def test_shared_and_idle_parameters_are_reported_by_svi() -> None:
    model = Decoder()
    shared = nn.Sequential(model.net, nn.Linear(1, 2))
    guide = guides.make("amortized_normal", model, X, encoder=shared)
    with pytest.raises(ValueError, match="share the parameter"):
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(X)
    own = guides.make("normal", model, X)
    svi = SVI(model, own, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"No gradient reaches spare\.weight"):
        svi.step(X)
    assert svi.frozen == ["spare.weight", "spare.bias"]


def test_latents_of_two_dtypes_share_a_group() -> None:
    net = nn.Linear(1, 1)

    def mixed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            loc = net(z.unsqueeze(-1)).squeeze(-1) + w
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x.double())

    net.requires_grad_(False)
    guide = guides.make("multivariate_normal", mixed, X)
    values = guide(X)
    assert values["z"].dtype == torch.float32
    assert values["w"].dtype == torch.float64
    PredictiveCoding(mixed, pyro.optim.SGD({})).infer(X)


@pytest.mark.parametrize("jacobian", [True, False])
def test_a_masked_positive_latent_relaxes_as_if_its_row_were_not_there(jacobian: bool) -> None:
    def masked(x: Tensor, on: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=on):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    on = torch.arange(len(X)) > 2
    pc = PredictiveCoding(masked, pyro.optim.SGD({}), jacobian=jacobian, num_steps=50)
    found, state = pc.infer(X, on), pc.inspect(X, on)
    alone = PredictiveCoding(masked, pyro.optim.SGD({}), jacobian=jacobian, num_steps=50)
    torch.testing.assert_close(found["z"][on], alone.infer(X[on], on[on])["z"])
    assert pc.evaluate_loss(X, on) == pytest.approx(alone.evaluate_loss(X[on], on[on]))
    assert not state["x"].error[:3].any()
    start = LogJoint(masked, (X, on)).predictions()["z"]
    assert torch.equal(found["z"][~on], start[~on])


def test_a_mask_inside_a_positive_latent_has_no_mode_in_unconstrained_space() -> None:
    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0).mask(torch.arange(len(x)) > 2))
            pyro.sample("x", dist.Normal(z, 1.0).mask(torch.arange(len(x)) > 2), obs=x)

    with pytest.raises(ValueError, match=r"Latent site 'z' is masked.*pyro.poutine.mask around"):
        PredictiveCoding(masked, pyro.optim.SGD({})).step(X)

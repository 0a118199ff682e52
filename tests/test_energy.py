"""The log joint as a pure function: Pyro's numbers, scales, masks, Jacobians, messages."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

import guides
from guides import location_scale
from guides.energy import LogJoint
from guides.inference import PredictiveCoding
from guides.inference.relaxation import relax

W1 = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=torch.float64)
W2 = torch.tensor([[0.9, 0.1, -0.4], [0.2, -1.1, 0.5]], dtype=torch.float64)
S0, S1, S2 = 0.7, 1.3, 0.9


pytestmark = pytest.mark.usefixtures("float64")


def chain(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """z2 (3) -> z1 (2) -> x (3), with a tanh between the latents."""
    with pyro.plate("data", size or len(x), subsample=index):
        z2 = pyro.sample("z2", dist.Normal(torch.zeros(3), S2).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(torch.tanh(z2) @ W2.T, S1).to_event(1))
        pyro.sample("x", dist.Normal(z1 @ W1.T, S0).to_event(1), obs=x)


def mixed(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Global and local latents, a simplex, a positive site and a nested plate."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", size or x.shape[-1], subsample=index):
        z = pyro.sample("z", dist.Gamma(2.0, rate))
        with pyro.plate("features", 3):
            pyro.sample("x", dist.Normal(z * weights[..., None], 0.5), obs=x)


def point(model, x: Tensor) -> dict[str, Tensor]:
    """Random values of all latents."""
    trace = poutine.trace(poutine.uncondition(model)).get_trace(x)
    names = LogJoint(model, (x,)).layout.sites
    return {name: trace.nodes[name]["value"].detach() for name in names}


CASES = {"chain": (chain, (6, 3)), "mixed": (mixed, (3, 6))}


@pytest.mark.parametrize("name", CASES)
def test_the_energy_is_minus_the_log_joint_of_the_trace(name) -> None:
    model, shape = CASES[name]
    x = torch.randn(shape)
    values = point(model, x)
    log_joint = LogJoint(model, (x,))
    rows, other = log_joint.rows(values)
    expected = poutine.trace(poutine.condition(model, values)).get_trace(x).log_prob_sum()
    assert rows.shape == (6,)
    assert torch.allclose(log_joint.total(rows, other), expected, rtol=1e-12)
    assert torch.allclose(sum(t.sum() for t in log_joint.sites(values).values()), expected)


@pytest.mark.parametrize("name", CASES)
def test_without_jacobian_the_energy_is_the_loss_of_autodelta(name) -> None:
    model, shape = CASES[name]
    x = torch.randn(shape)
    values = point(model, x)
    log_joint = LogJoint(model, (x,))
    packed = log_joint.layout.pack(values)
    rows, other = log_joint.packed(packed, jacobian=False)
    auto = AutoDelta(model, init_loc_fn=init_to_value(values=values))
    assert Trace_ELBO().loss(model, auto, x) == pytest.approx(
        float(-log_joint.total(rows, other)), rel=1e-12
    )
    pc = PredictiveCoding(model, pyro.optim.Adam({}), guide=auto, num_steps=0, jacobian=False)
    assert pc.evaluate_loss(x) == pytest.approx(Trace_ELBO().loss(model, auto, x), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_delta_guide_is_autodelta(name) -> None:
    model, shape = CASES[name]
    x = torch.randn(shape)
    guide = guides.make("delta", model, x)
    auto = AutoDelta(model, init_loc_fn=init_to_value(values=guide(x)))
    assert Trace_ELBO().loss(model, guide, x) == pytest.approx(
        Trace_ELBO().loss(model, auto, x), rel=1e-12
    )
    # jacobian=True adds the log-determinant of the map to the supports instead.
    unconstrained = guides.make("delta", model, x, jacobian=True)
    log_joint = LogJoint(model, (x,))
    packed = {g: lam.detach() for g, lam in unconstrained.parameters_of(x).items()}
    expected = -log_joint.total(*log_joint.packed(packed, jacobian=True))
    assert Trace_ELBO().loss(model, unconstrained, x) == pytest.approx(float(expected), rel=1e-12)


def test_the_jacobian_moves_the_mode_of_a_gamma_by_the_known_amount() -> None:
    """Gamma(a, b): the mode is (a - 1) / b in x and a / b in log x."""

    def model() -> None:
        pyro.sample("z", dist.Gamma(3.0, 2.0))

    for jacobian, mode in ((False, 1.0), (True, 1.5)):
        pc = PredictiveCoding(
            model, pyro.optim.Adam({}), num_steps=2000, jacobian=jacobian, tolerance=1e-10
        )
        assert pc.infer()["z"] == pytest.approx(mode, abs=1e-7)


def test_the_gradient_is_the_local_message_of_predictive_coding() -> None:
    """dE/dz_l = own error - (prediction's Jacobian)^T errors below, written out by hand."""
    x = torch.randn(5, 3)
    values = point(chain, x)
    z1, z2 = values["z1"], values["z2"]
    e0 = (x - z1 @ W1.T) / S0**2
    e1 = (z1 - torch.tanh(z2) @ W2.T) / S1**2
    e2 = z2 / S2**2
    expected = {"z1": e1 - e0 @ W1, "z2": e2 - (1 - torch.tanh(z2) ** 2) * (e1 @ W2)}

    log_joint = LogJoint(chain, (x,))
    gradient = torch.func.grad(lambda v: -sum(t.sum() for t in log_joint.rows(v)))(values)
    for name in expected:
        assert torch.allclose(gradient[name], expected[name], atol=1e-12)

    pc = PredictiveCoding(chain, pyro.optim.Adam({}))
    states = pc.inspect(x, values=values)
    for name, error in (("x", e0), ("z1", e1), ("z2", e2)):
        assert torch.allclose(states[name].error, error)
        assert states[name].formula == "d log p / d loc"
        assert states[name].energy.shape == (5,)


@pytest.mark.parametrize("name", CASES)
def test_a_minibatch_has_the_fixed_point_and_the_steps_of_the_full_batch(name) -> None:
    """N/B must not reach local latents, whose step would otherwise grow with the data set."""
    model, shape = CASES[name]
    x = torch.randn(shape)
    index = torch.tensor([4, 1, 5])
    part = x[index] if name == "chain" else x[:, index]
    full = LogJoint(model, (x,))
    batch = LogJoint(model, (part,), {"size": 60, "index": index})
    values = point(model, x)
    packed = full.layout.pack(values)
    chosen = {g: u[index] if u.dim() == 2 else u for g, u in packed.items()}
    rows, other = full.packed(packed)
    batch_rows, batch_other = batch.packed(chosen)
    assert torch.allclose(batch_rows, rows[index], rtol=1e-12)
    assert torch.allclose(batch_other, other, rtol=1e-12)
    expected = poutine.trace(poutine.condition(model, batch.layout.constrain(chosen))).get_trace(
        part, size=60, index=index
    )
    assert torch.allclose(
        batch.total(*batch.rows(batch.layout.constrain(chosen))), expected.log_prob_sum()
    )
    if name == "chain":
        a = relax(full, packed, num_steps=7, step_size=0.05)
        b = relax(batch, chosen, num_steps=7, step_size=0.05)
        assert torch.allclose(a.packed["data"][index], b.packed["data"], atol=1e-12)
        a = relax(full, packed, num_steps=7)
        b = relax(batch, chosen, num_steps=7)
        assert torch.allclose(a.packed["data"][index], b.packed["data"], atol=1e-10)


def test_rows_are_independent_of_their_batch() -> None:
    """A batch of B rows relaxes as B batches of one, and permuting rows permutes latents."""
    model = chain
    x = torch.randn(6, 3)
    log_joint = LogJoint(model, (x,))
    packed = log_joint.layout.pack(log_joint.predictions())
    together = relax(log_joint, packed, num_steps=30).packed["data"]
    for i in range(len(x)):
        alone = LogJoint(model, (x[i : i + 1],))
        single = relax(alone, alone.layout.pack(alone.predictions()), num_steps=30)
        assert torch.allclose(single.packed["data"][0], together[i], atol=1e-9)
    order = torch.randperm(len(x))
    shuffled = LogJoint(model, (x[order],))
    moved = relax(shuffled, shuffled.layout.pack(shuffled.predictions()), num_steps=30)
    assert torch.allclose(moved.packed["data"], together[order], atol=1e-9)


def test_the_users_scale_and_mask_are_respected() -> None:
    mask = torch.tensor([True, False, True, True])

    def model(x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", 4 if size is None else size, subsample_size=4):
            with poutine.scale(scale=0.25):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.randn(4)
    z = torch.randn(4)
    prior, likelihood = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(z, 0.5).log_prob(x)
    rows, _ = LogJoint(model, (x,)).rows({"z": z})
    assert torch.allclose(rows, 0.25 * prior + mask * likelihood)

    # The same under N/B: only the plate's factor is taken out. A full index keeps rows in order.
    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 40, subsample=torch.arange(4)):
            with poutine.scale(scale=0.25):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    log_joint = LogJoint(subsampled, (x,))
    rows, _ = log_joint.rows({"z": z})
    assert torch.allclose(rows, 0.25 * prior + mask * likelihood, rtol=1e-12)
    trace = poutine.trace(poutine.condition(subsampled, {"z": z})).get_trace(x)
    assert torch.allclose(log_joint.total(*log_joint.rows({"z": z})), trace.log_prob_sum())


def test_the_log_joint_is_differentiable_and_vectorizable() -> None:
    x = torch.randn(3, 6)
    log_joint = LogJoint(mixed, (x,))
    packed = log_joint.layout.pack(point(mixed, x))

    def total(p: dict[str, Tensor]) -> Tensor:
        return log_joint.total(*log_joint.packed(p))

    stacked = {g: torch.stack([u, u + 0.1, u - 0.3]) for g, u in packed.items()}
    batched = torch.func.vmap(total)(stacked)
    single = torch.stack([total({g: u[i] for g, u in stacked.items()}) for i in range(3)])
    assert torch.allclose(batched, single, rtol=1e-12)
    gradient = torch.func.grad(total)(packed)
    for group, u in packed.items():
        step = torch.zeros_like(u)
        step.view(-1)[0] = 1e-6
        above, below = ({**packed, group: u + s} for s in (step, -step))
        difference = (total(above) - total(below)) / 2e-6
        assert gradient[group].view(-1)[0] == pytest.approx(float(difference), rel=1e-5)


def test_missing_data_is_an_error_that_names_the_site() -> None:
    log_joint = LogJoint(chain, (torch.randn(5, 3),))
    with pytest.raises(ValueError, match="Site 'z2' has neither data nor a value"):
        log_joint.rows({"z1": torch.zeros(5, 2)})


@pytest.mark.parametrize("name", ["Normal", "StudentT", "MultivariateNormal"])
def test_errors_are_standardized_values(name: str) -> None:
    loc, scale, e = torch.tensor([0.5, -1.0]), torch.tensor([0.3, 2.0]), torch.tensor([1.2, -0.4])
    tril = torch.tensor([[0.3, 0.0], [0.7, 2.0]])
    fn, standard, log_det = {
        "Normal": (dist.Normal(loc, scale), dist.Normal(0, 1), scale.log()),
        "StudentT": (dist.StudentT(4, loc, scale), dist.StudentT(4, 0, 1), scale.log()),
        "MultivariateNormal": (
            dist.MultivariateNormal(loc, scale_tril=tril),
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            tril.diagonal().log().sum(),
        ),
    }[name]
    value = location_scale.shift(fn, e)
    # A change of variables: the density there is that of e over the determinant.
    torch.testing.assert_close(fn.log_prob(value), standard.log_prob(e) - log_det)
    torch.testing.assert_close(location_scale.inverse(fn, value), e)

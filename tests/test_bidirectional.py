"""One energy of predictions from above and from below, against energies written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import guides
from guides.energy import LogJoint
from guides.guide import upstream_of
from guides.inference import BidirectionalPredictiveCoding, Given, PredictiveCoding

pytestmark = pytest.mark.usefixtures("float64")

Energy = Callable[[dict[str, Tensor]], Tensor]
NAN = float("nan")


def fixed(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


DOWN = {"y": fixed(3, 2, seed=1), "z": fixed(4, 3, seed=2)}  # y -> z -> x
UP = {"z": fixed(3, 4, seed=3), "y": fixed(2, 3, seed=4)}  # x -> z -> y
FORWARD, BACKWARD = 0.3, 0.7
Y, X = fixed(3, 2, seed=5), fixed(3, 4, seed=6)


def model(y: Any, x: Any, size: int | None = None, index: Any = None) -> None:
    """A label, a latent, an image."""
    weights = {name: pyro.param(f"down_{name}", value.clone()) for name, value in DOWN.items()}
    with pyro.plate("data", size or len(X), subsample=index):
        y = pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=y)
        z = pyro.sample("z", dist.Normal(y @ weights["y"].T, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z @ weights["z"].T, 0.8).to_event(1), obs=x)


def recognition(y: Any, x: Any, size: int | None = None, index: Any = None) -> None:
    """An image, a latent, a label."""
    weights = {name: pyro.param(f"up_{name}", value.clone()) for name, value in UP.items()}
    with pyro.plate("data", size or len(X), subsample=index):
        z = pyro.sample("z", dist.Normal(x @ weights["z"].T, 0.6).to_event(1))
        pyro.sample("y", dist.Normal(z @ weights["y"].T, 0.9).to_event(1), obs=y)


def energy(v: dict[str, Tensor]) -> Tensor:
    """Of everything, written out; parameters by their names in the store."""
    w = {f"down_{k}": u for k, u in DOWN.items()} | {f"up_{k}": u for k, u in UP.items()} | v

    def term(value: Tensor, loc: Any, scale: float) -> Tensor:
        return -dist.Normal(loc, scale).log_prob(value).sum()

    y, z, x = w["y"], w["z"], w["x"]
    down = term(y, 0.0, 1.0) + term(z, y @ w["down_y"].T, 0.5) + term(x, z @ w["down_z"].T, 0.8)
    return FORWARD * down + BACKWARD * (
        term(z, x @ w["up_z"].T, 0.6) + term(y, z @ w["up_y"].T, 0.9)
    )


def minimum(function: Energy, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a quadratic: one exact Newton step on all coordinates at once."""
    sizes = {k: v.numel() for k, v in start.items()}

    def flat(u: Tensor) -> Tensor:
        return function(parts(u))

    def parts(u: Tensor) -> dict[str, Tensor]:
        pieces = zip(start, u.split(list(sizes.values())), strict=True)
        return {k: piece.reshape(start[k].shape) for k, piece in pieces}

    u = torch.cat([v.flatten() for v in start.values()]).requires_grad_()
    (slope,) = torch.autograd.grad(flat(u), u)
    matrix = torch.autograd.functional.hessian(flat, u)
    return parts((u - torch.linalg.solve(matrix, slope)).detach())


def loop(program: Any = recognition, **options: Any) -> BidirectionalPredictiveCoding:
    options = {"num_steps": 10, "solver": "newton", "tolerance": 1e-11} | options
    options = {"forward": FORWARD, "backward": BACKWARD} | options
    return BidirectionalPredictiveCoding(model, pyro.optim.SGD({"lr": 1.0}), program, **options)


def test_a_latent_settles_at_the_weighted_mean_of_both_predictions() -> None:
    """With nothing below that the model would explain: by hand."""

    def above(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0]), 0.5).to_event(1))

    def below(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(3.0 * x, 2.0).to_event(1))

    x, optim = fixed(4, 2, seed=7), pyro.optim.SGD({})
    bpc = BidirectionalPredictiveCoding(
        above, optim, below, num_steps=200, forward=FORWARD, backward=BACKWARD
    )
    top, bottom = FORWARD / 0.5**2, BACKWARD / 2.0**2
    expected = (top * torch.tensor([1.0, -2.0]) + bottom * 3.0 * x) / (top + bottom)
    torch.testing.assert_close(bpc.infer(x)["z"], expected)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({}, {"y": Y, "x": X}),  # learning: both ends are clamped
        ({"release": ["y"]}, {"x": X}),  # classify
        ({"release": ["x"]}, {"y": Y}),  # generate
        ({"release": ["x", "y"]}, {}),  # dream
        ({"clamp": {"z": fixed(3, 3, seed=8)}, "release": ["y"]}, {"x": X}),
    ],
    ids=["both", "classify", "generate", "dream", "clamp"],
)
def test_one_energy_in_every_direction(options: dict[str, Any], known: dict[str, Tensor]) -> None:
    """What is not known reaches both programs, the recognition's data included."""
    known = known | options.get("clamp", {})
    free = {k: v for k, v in {"y": Y, "z": fixed(3, 3, seed=9), "x": X}.items() if k not in known}
    expected = minimum(lambda u: energy({**known, **u}), free)
    pc = loop()
    found = (pc.given(**options) if options else pc).infer(Y, X)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-7)
    if not options:
        assert pc.evaluate_loss(Y, X) == pytest.approx(float(energy({**known, **expected})))


def test_completion_hands_what_it_inferred_to_the_recognition() -> None:
    holes = torch.zeros(3, 4, dtype=torch.bool)
    holes[:, 2:] = True
    free = {"y": Y, "z": fixed(3, 3, seed=9), "part": X[:, 2:]}

    def completed(v: dict[str, Tensor]) -> Tensor:
        return energy({"y": v["y"], "z": v["z"], "x": torch.cat([X[:, :2], v["part"]], -1)})

    expected = minimum(completed, free)
    found = loop().given(missing=["x"], release=["y"]).infer(Y, X.masked_fill(holes, NAN))
    torch.testing.assert_close(found["x"][:, 2:], expected["part"], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found["y"], expected["y"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("size", [3, 12])
def test_both_sides_learn_at_the_final_state(size: int) -> None:
    """Plain gradient steps of rate one are minus the gradients of the energy; N/B of it."""
    bpc = loop()
    index = None if size == 3 else torch.tensor([4, 0, 9])
    z = bpc.infer(Y, X, size=size, index=index)["z"]
    weights = {f"down_{k}": u for k, u in DOWN.items()} | {f"up_{k}": u for k, u in UP.items()}
    leaves = {k: u.clone().requires_grad_() for k, u in weights.items()}
    loss = energy({**leaves, "y": Y, "x": X, "z": z})
    grads = torch.autograd.grad(loss, list(leaves.values()))
    assert bpc.step(Y, X, size=size, index=index) == pytest.approx(size / 3 * loss.item())
    for (name, before), grad in zip(weights.items(), grads, strict=True):
        found = before - pyro.param(name).detach()
        torch.testing.assert_close(found, size / 3 * grad, rtol=1e-8, atol=1e-8)


def test_without_a_backward_weight_it_is_predictive_coding_to_the_bit() -> None:
    found = []
    for build in (
        lambda o: PredictiveCoding(model, o, num_steps=7),
        lambda o: BidirectionalPredictiveCoding(model, o, recognition, num_steps=7, backward=0.0),
    ):
        pyro.clear_param_store()
        pc = build(pyro.optim.Adam({"lr": 0.01}))
        losses = [pc.step(Y, X) for _ in range(4)]
        found.append((losses, pc.gradient_evaluations, pc.infer(None, X)["y"]))
    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])


def test_the_recognition_starts_the_relaxation_where_its_data_are_known() -> None:
    """From the data upwards, never from a label that is to be found; else from the model."""
    z = X @ UP["z"].T
    pc = loop(num_steps=0)
    torch.testing.assert_close(pc.infer(Y, X)["z"], z)
    found = pc.given(release=["y"]).infer(Y, X)
    torch.testing.assert_close(found["z"], z)
    torch.testing.assert_close(found["y"], z @ UP["y"].T)
    found = pc.given(release=["x"]).infer(Y, X)
    torch.testing.assert_close(found["z"], Y @ DOWN["y"].T)
    torch.testing.assert_close(found["x"], Y @ DOWN["y"].T @ DOWN["z"].T)


@pytest.mark.parametrize("name", ["amortized_delta", "bottom_up_delta"])
def test_a_guide_predicts_with_unit_precision_in_unconstrained_space(name: str) -> None:
    """Constrained and global latents; the energy is minus log joint plus squared distances."""

    def positive(x: Tensor, size: int | None = None, index: Any = None) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Normal(rate.log() + shift, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    guide = guides.make(name, positive, X, hidden=(5,))
    for parameter in guide.parameters():
        parameter.data += 0.3 * fixed(*parameter.shape, seed=10)
    bpc = BidirectionalPredictiveCoding(
        positive, pyro.optim.SGD({}), guide, num_steps=20, backward=BACKWARD, solver="newton"
    )
    found = bpc.infer(X)
    leaves = {k: v.clone().requires_grad_() for k, v in found.items()}
    trace = pyro.poutine.trace(pyro.poutine.condition(positive, leaves)).get_trace(X)
    total = -trace.log_prob_sum() - leaves["rate"].log().sum()  # the Jacobian
    read = guide.layout(X)
    u, before = read.pack(leaves), {}
    for group in read.groups:
        call = guide._call((X,), {}, read)
        location = guide.group_location(group, upstream_of(call, before))
        total = total + 0.5 * BACKWARD * (u[group.name] - location).square().sum()
        before[group.name] = u[group.name]
    assert bpc.evaluate_loss(X) == pytest.approx(total.item(), rel=1e-6)
    for slope in torch.autograd.grad(total, list(leaves.values())):
        assert slope.abs().max() < 1e-4
    assert len(before) == (3 if name == "bottom_up_delta" else 2)


def test_a_guide_that_predicts_the_label_is_made_for_the_released_program() -> None:
    guide = guides.make("bottom_up_delta", Given(model, release=["y"]), Y, X, hidden=(6,))
    pc = loop(guide, solver="gradient", num_steps=4, tolerance=0.0)
    pc.optim = pyro.optim.Adam({"lr": 0.05})
    losses = [pc.step(Y, X) for _ in range(40)]
    assert losses[-1] < losses[0]
    assert not pc.frozen
    assert (guide.locations(Y, X)["y"] - Y).abs().mean() < 0.5 * Y.abs().mean()
    found = pc.given(release=["x"]).infer(Y, X)["x"]
    other = pc.given(release=["x"]).infer(Y, torch.zeros_like(X))["x"]
    assert torch.equal(found, other)  # nothing of the released data gets through


def unlabelled(x: Tensor) -> None:
    """A latent, an image."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ DOWN["z"].T, 0.8).to_event(1), obs=x)


def test_a_guide_hears_the_data_of_the_call_and_rows_that_are_done_leave() -> None:
    guide = guides.make("amortized_delta", unlabelled, X)
    for parameter in guide.parameters():
        parameter.data += 0.3 * fixed(*parameter.shape, seed=11)
    options: dict[str, Any] = {"solver": "gradient", "num_steps": 400, "tolerance": 1e-4}
    pc = BidirectionalPredictiveCoding(unlabelled, pyro.optim.SGD({}), guide, **options)
    other, zero = 3 * X.flip(0), {"z": torch.zeros(3, 3)}

    def log_joint(x: Tensor) -> float:
        joint = LogJoint(pc.program, (x,), {})
        return joint.total(*joint.run(zero).total()).item()

    pc.infer(other)
    expected = log_joint(other)
    pc.infer(X)
    assert log_joint(other) == pytest.approx(expected)
    before = pc.gradient_evaluations
    pc.infer(torch.cat([X, 100 * X[:1]]))
    assert pc.gradient_evaluations - before < 4 * 400


def test_model_and_recognition_are_one_program_for_any_recognition() -> None:
    """Stock ELBOs trace it with a guide as they do with a program."""
    guide = guides.make("amortized_delta", unlabelled, X)
    pc = BidirectionalPredictiveCoding(unlabelled, pyro.optim.SGD({}), guide, num_steps=3)
    loss = pyro.infer.Trace_ELBO().loss(pc.program, guide, X)
    z = guide.locations(X)["z"]
    trace = pyro.poutine.trace(pyro.poutine.condition(unlabelled, {"z": z})).get_trace(X)
    assert loss == pytest.approx(-trace.log_prob_sum().item())  # the guide's distances are zero


def test_precision_and_a_row_alone() -> None:
    """Float32, a batch of one, and rows that know nothing of each other."""
    whole = loop().infer(Y, X)["z"]
    for row in range(3):

        def alone(program: Any) -> Any:
            return lambda y, x: program(y, x, size=1)

        one = BidirectionalPredictiveCoding(
            alone(model),
            pyro.optim.SGD({}),
            alone(recognition),
            solver="newton",
            forward=FORWARD,
            backward=BACKWARD,
        )
        found = one.infer(Y[row : row + 1], X[row : row + 1])["z"]
        torch.testing.assert_close(found, whole[row : row + 1])


def test_one_network_classifies_generates_and_completes_digits() -> None:
    """On images that it never saw; a mean over the labels stands beside it."""
    torch.set_default_dtype(torch.float32)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16).float(), torch.tensor(labels)
    onehot = torch.eye(10)[labels]
    train, test = images[:1400], images[1400:]
    down, image = nn.Linear(10, 32), nn.Linear(32, 64)
    up, label = nn.Linear(64, 32), nn.Linear(32, 10)

    def digit(y: Any, x: Any, size: int | None = None, index: Any = None) -> None:
        pyro.module("down", down), pyro.module("image", image)
        with pyro.plate("data", size or len(x), subsample=index):
            y = pyro.sample("y", dist.Normal(0.1 * torch.ones(10), 0.3).to_event(1), obs=y)
            z = pyro.sample("z", dist.Normal(down(y).tanh(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(image(z), 1.0).to_event(1), obs=x)

    def reading(y: Any, x: Any, size: int | None = None, index: Any = None) -> None:
        pyro.module("up", up), pyro.module("label", label)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(up(x).tanh(), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(label(z), 1.0).to_event(1), obs=y)

    bpc = BidirectionalPredictiveCoding(digit, pyro.optim.Adam({"lr": 0.02}), reading, num_steps=4)
    for _ in range(150):
        index = torch.randint(1400, (100,))
        bpc.step(onehot[index], train[index], size=1400, index=index)
    bpc.num_steps = 30
    # classify: 0.84 to 0.86 over three seeds, where chance is 0.1
    found = bpc.given(release=["y"]).infer(onehot[1400:], test)["y"]
    assert (found.argmax(-1) == labels[1400:]).float().mean() > 0.75
    # generate: each image is nearest to one of its own class
    drawn = bpc.given(release=["x"]).infer(torch.eye(10), images[:10])["x"]
    nearest = labels[1400:][torch.cdist(drawn, test).argmin(-1)]
    assert (nearest == torch.arange(10)).sum() >= 9
    # complete the lower half, the label unknown: better than the mean image
    holes = test.clone()
    holes[:, 32:] = NAN
    whole = bpc.given(missing=["x"], release=["y"]).infer(onehot[1400:], holes)["x"]
    error = (whole - test)[:, 32:].square().mean()
    assert error < 0.97 * (train.mean(0) - test)[:, 32:].square().mean()


def test_bad_use_is_refused_with_the_fix() -> None:
    optim = pyro.optim.SGD({"lr": 0.1})
    build = BidirectionalPredictiveCoding
    with pytest.raises(TypeError, match=r"order is BidirectionalPredictiveCoding\(model, optim"):
        build(model, recognition, optim)
    with pytest.raises(TypeError, match=r"takes no guide=.*HybridPredictiveCoding"):
        build(model, optim, recognition, guide=recognition)
    with pytest.raises(ValueError, match="forward must be positive"):
        build(model, optim, recognition, forward=0.0)
    with pytest.raises(ValueError, match="backward must be"):
        build(model, optim, recognition, backward=-1.0)
    with pytest.raises(ValueError, match=r"learns a density.*bottom_up_delta"):
        build(model, optim, guides.make("amortized_normal", model, Y, X))
    with pytest.raises(ValueError, match=r"free parameters for its rows.*bottom_up_delta"):
        build(model, optim, guides.make("delta", model, Y, X))
    with pytest.raises(ValueError, match="recognition samples no site"):
        build(model, optim, lambda y, x: None).step(Y, X)

    def unknown(y: Any, x: Any) -> None:
        with pyro.plate("data", 3):
            pyro.sample("q", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"samples 'q', which is no site.*: y, z, x"):
        build(model, optim, unknown).step(Y, X)

    def narrow(y: Any, x: Any) -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    with pytest.raises(ValueError, match=r"'z' must have the shape.*\(3, 3\), got \(3,\)"):
        build(model, optim, narrow).step(Y, X)

    def changed(y: Any, x: Any) -> None:
        model(y, 2.0 * x)

    with pytest.raises(ValueError, match=r"'x' is latent in this call.*Observe the argument"):
        build(changed, optim, recognition).given(release=["x"]).infer(Y, X)


def test_a_guide_hears_data_that_were_changed_in_place() -> None:
    """The program observes twice its argument: what was read of the last call is not the data."""

    def twice(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ DOWN["z"].T, 0.8).to_event(1), obs=2 * x)

    guide = guides.make("amortized_delta", twice, X)
    for parameter in guide.parameters():
        parameter.data += 0.3 * fixed(*parameter.shape, seed=12)
    pc = BidirectionalPredictiveCoding(twice, pyro.optim.SGD({}), guide, num_steps=30)
    x = X.clone()
    pc.infer(x)
    x.mul_(3.0)
    torch.testing.assert_close(pc.infer(x)["z"], pc.infer(3.0 * X)["z"])


def test_steps_that_a_row_lacks_have_no_residuals() -> None:
    """A guide of sequences as recognition: padding counts neither in the model nor in it."""

    def walk(x: Tensor, lengths: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x))
            for t in range(x.shape[1]):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])

    x, lengths = fixed(4, 5, seed=13), torch.tensor([3, 3, 3, 3])
    guide = guides.make("mean_field_delta", walk, x, lengths, hidden=4, recurrent=4)
    for parameter in guide.parameters():
        parameter.data += 0.3 * fixed(*parameter.shape, seed=14)
    pc = BidirectionalPredictiveCoding(walk, pyro.optim.SGD({}), guide, num_steps=200)

    def at_zero(x: Tensor, lengths: Tensor) -> float:
        # At a minimum a latent of no step would lie where its residual is nothing.
        joint = LogJoint(pc.program, (x, lengths), {})
        values = {f"z_{t}": torch.zeros(len(x)) for t in range(x.shape[1])}
        return joint.total(*joint.run(values).total()).item()

    for score in (at_zero, pc.evaluate_loss):
        whole = score(x, lengths)
        assert whole == pytest.approx(score(x[:, :3], lengths), rel=1e-5)
        assert abs(whole) > abs(score(x[:, :2], lengths.clamp(max=2)))

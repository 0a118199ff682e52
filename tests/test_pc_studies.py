"""Studies of predictive coding on MNIST: what they run, at tiny size, against code by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studies import pc_classifier, pc_decoder
from guides.inference import PredictiveCoding
from zoo.data.dataset import Dataset


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Forty rows of twelve pixels, in place of the images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 12, generator=generator)
    labels = torch.randint(0, 3, (40,), generator=generator)
    data = Dataset(
        "tiny", x[:30], x[30:], "none", (3, 4), train_labels=labels[:30], test_labels=labels[30:]
    )
    monkeypatch.setattr(
        pc_decoder.binarized_mnist,
        "load",
        lambda: Dataset("tiny", x[:30].round(), x[30:].round(), "threshold", (3, 4)),
    )
    for study in (pc_decoder, pc_classifier):
        monkeypatch.setattr(study.mnist, "load", lambda **_: data)
        monkeypatch.setattr(study, "BATCH_SIZE", 8)
    return data


def results(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "result"]


@pytest.mark.usefixtures("float64")
def test_the_linear_normal_is_the_normal_of_a_linear_map() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 9)
    z, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 4), (9, 4), (9,)))
    ours = pc_decoder.LinearNormal(z, weight, bias).log_prob(x)
    theirs = dist.Normal(F.linear(z, weight, bias), 1.0).to_event(1).log_prob(x)
    torch.testing.assert_close(ours, theirs)
    found, expected = (
        torch.autograd.grad(term.square().sum(), (z, weight, bias)) for term in (ours, theirs)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("float64")
def test_linear_normal_draws_have_its_mean_and_unit_variance() -> None:
    torch.manual_seed(0)
    law = pc_decoder.LinearNormal(torch.randn(2, 4), torch.randn(9, 4), torch.randn(9))
    draws = law.sample((20_000,))
    loc = F.linear(law.z, law.weight, law.bias)
    assert (draws.mean(0) - loc).abs().max() < 5 / 20_000**0.5
    assert (draws.var(0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5
    assert law.expand((3, 2)).log_prob(loc.expand(3, 2, 9)).shape == (3, 2)


def by_hand(model: pc_decoder.Decoder, x: Tensor, step: float, momentum: float) -> list[Tensor]:
    """The relaxation of the task, written out with its gradients."""
    first, second, third = ((layer.weight, layer.bias) for layer in model.layers)
    z0, z1, z2 = (x.new_zeros(len(x), size) for size in model.sizes[:-1])
    velocity: list[Any] = [0.0, 0.0, 0.0]
    for _ in range(pc_decoder.NUM_STEPS):
        a0, a1 = F.linear(z0, *first), F.linear(z1, *second)
        e1, e2 = z1 - a0.clamp(-1, 1), z2 - a1.clamp(-1, 1)
        error = x - F.linear(z2, *third)
        gradients = [
            -(e1 * (a0.abs() < 1)) @ first[0],
            e1 - (e2 * (a1.abs() < 1)) @ second[0],
            e2 - error @ third[0],
        ]
        velocity = [
            momentum * v + gradient for v, gradient in zip(velocity, gradients, strict=True)
        ]
        z0, z1, z2 = (z - step * v for z, v in zip((z0, z1, z2), velocity, strict=True))
    return [z0, z1, z2]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("method", "step", "momentum"),
    [("predictive coding", pc_decoder.STEP_SIZE, 0.15), ("incremental", 0.171, 0.05)],
)
def test_the_decoder_relaxes_as_the_task_says(method: str, step: float, momentum: float) -> None:
    """Twenty updates from zero, and the error of what the top latent alone predicts."""
    torch.manual_seed(0)
    x = torch.rand(7, 12)
    model = pc_decoder.Decoder((3, 5, 5, 12), x.mean(0))
    with torch.no_grad():
        for layer in model.layers[:-1]:
            layer.weight.mul_(3.0)  # some units saturate
    build, _ = pc_decoder.METHODS[method]
    loop = build(model, pyro.optim.Adam({"lr": 0.0}), "eager")
    found = loop.infer(x)
    with torch.no_grad():
        expected = by_hand(model, x, step, momentum)
    for number, value in enumerate(expected):
        torch.testing.assert_close(found[f"z{number}"], value)
    with torch.no_grad():
        hidden = F.hardtanh(model.layers[1](F.hardtanh(model.layers[0](expected[0]))))
        image = hidden @ model.layers[2].weight.T + model.layers[2].bias
        error = float((x - image).square().mean())
    assert pc_decoder.reconstruction_error(loop, x, batch_size=3) == pytest.approx(error)


@pytest.mark.usefixtures("tiny")
def test_the_decoder_study_runs_and_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "mode": "eager", "sizes": (3, 5, 5, 12)}
    options |= {"prior_epochs": 1, "num_samples": 20, "num_temperatures": 10}
    path = tmp_path / "study.jsonl"
    pc_decoder.run(path, seeds=(0,), **options)
    made = results(path)
    assert [line["key"]["method"] for line in made] == [
        *pc_decoder.METHODS,
        pc_decoder.PRIOR,
    ]
    assert all(0 < line["values"]["mse"] < 1 for line in made[:-1])
    evidence = torch.tensor(made[-1]["values"]["log_evidence"])
    annealed = torch.tensor(made[-1]["values"]["annealed"])
    assert evidence.shape == annealed.shape == (10,)
    assert (evidence < 0).all(), "masses of binary rows"
    assert (annealed < 0).all()
    pc_decoder.run(path, seeds=(0,), **options)
    assert results(path) == made
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")  # one is missing
    pc_decoder.run(path, seeds=(0,), **options)
    again = results(path)
    assert [line["key"] for line in again] == [line["key"] for line in made]
    assert again[-1]["values"] == made[-1]["values"]


def test_the_decoder_learns(tiny: Dataset) -> None:
    """Training predicts better, and a seed makes a run again exactly."""
    errors = []
    for epochs in (0, 6, 6):
        with pyro.get_param_store().scope():
            _, loop = pc_decoder.train(
                "predictive coding",
                0,
                tiny.train,
                epochs=epochs,
                mode="eager",
                sizes=(3, 5, 5, 12),
            )
            errors.append(pc_decoder.reconstruction_error(loop, tiny.train))
    assert errors[1] < errors[0]
    assert errors[1] == errors[2]


@pytest.mark.usefixtures("tiny")
def test_the_classifier_study_runs_and_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 1, "mode": "eager", "sizes": (12, 6, 6, 3)}
    path = tmp_path / "study.jsonl"
    pc_classifier.run(path, seeds=(0,), **options)
    made = results(path)
    assert [line["key"]["method"] for line in made] == list(pc_classifier.METHODS)
    for line in made:
        assert 0 <= line["values"]["accuracy"] <= 100
        assert ("fraction_relaxed" in line["values"]) == (
            line["key"]["method"] != "backpropagation"
        )
    pc_classifier.run(path, seeds=(0,), **options)
    assert results(path) == made


@pytest.mark.usefixtures("float64")
def test_with_the_label_free_the_feed_forward_net_is_the_relaxed_state() -> None:
    torch.manual_seed(0)
    model, x = pc_classifier.Classifier((12, 6, 6, 3)), torch.randn(5, 12)

    def elsewhere(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, size in (("h1", 6), ("h2", 6), ("y", 3)):
                pyro.sample(name, dist.Delta(torch.ones(len(x), size), event_dim=1))

    loop = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.0}), elsewhere, num_steps=1000)
    torch.testing.assert_close(loop.infer(x)["y"], model.predict(x), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_the_regime_is_that_of_the_energy() -> None:
    """Largest eigenvalue of the exact Hessian, and a fraction that grows with the step."""
    torch.manual_seed(0)
    model, x = pc_classifier.Classifier((12, 6, 6, 3)), torch.randn(4, 12)
    y = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).to(x)
    found = {}
    for step in (0.001, 0.3):
        loop = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.0}), num_steps=8, step_size=step)
        found[step] = pc_classifier.regime(loop, x, y)

    def energy(h: Tensor, row: int) -> Tensor:
        first, second, last = model.layers
        h1, h2 = h[:6], h[6:]
        errors = h1 - F.gelu(first(x[row])), h2 - F.gelu(second(h1)), y[row] - last(h2)
        return 0.5 * sum(error.square().sum() for error in errors)  # type: ignore[return-value]

    largest = []
    for row in range(4):
        first, second, _ = model.layers
        h1 = F.gelu(first(x[row]))
        start = torch.cat([h1, F.gelu(second(h1))]).detach()
        hessian = torch.autograd.functional.hessian(lambda h, row=row: energy(h, row), start)
        largest.append(torch.linalg.eigvalsh(hessian).abs().max())
    exact = float(torch.stack(largest).median())
    assert found[0.3]["step_times_curvature"] == pytest.approx(0.3 * exact, rel=0.02)
    assert found[0.001]["fraction_relaxed"] < 0.05
    assert 0.5 < found[0.3]["fraction_relaxed"] <= 1.001


def test_the_committed_classifiers_are_within_a_tenth_of_backpropagation() -> None:
    """The last epoch, the whole test set, the mean over the seeds that both have."""
    found = {
        (line["key"]["method"], line["key"]["seed"]): line["values"]
        for line in results(pc_classifier.RECORDS)
    }
    gaps = [
        values["accuracy"] - found["backpropagation", seed]["accuracy"]
        for (method, seed), values in found.items()
        if method == "predictive coding, small steps"
    ]
    assert len(gaps) >= 2
    assert sum(gaps) / len(gaps) > -0.1
    for (method, _), values in found.items():
        assert method == "backpropagation" or values["step_times_curvature"] < 2

"""The study on sbibm: its score, its two objectives in small, and its committed records."""

import dataclasses
import json
import math
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor

import zoo
from benchmarks.c2st import c2st
from benchmarks.studies import sbibm as study
from benchmarks.studies import sbibm_training as training
from zoo.data.sbibm import ReferencePosterior

RECORDS = Path(__file__).resolve().parents[1] / study.RECORDS
SMALL = {"hidden": (32,), "init_scale": 1.0, "context": 4, "family_hidden": (16,)}


@pytest.fixture
def draws() -> Tensor:
    return torch.randn(1500, 2)


def test_the_classifier_cannot_tell_draws_of_one_density_apart(draws) -> None:
    """An accuracy over 3000 points has a standard error of 0.009."""
    assert c2st(draws, torch.randn(1500, 2)) == pytest.approx(0.5, abs=4 * 0.009)


def test_the_classifier_is_nearly_the_best_there_is(draws) -> None:
    """Two unit Gaussians d apart: the best accuracy is Phi(d / 2)."""
    shifted = torch.randn(1500, 2) + torch.tensor([1.0, 0.0])
    best = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    found = c2st(draws, shifted)
    assert found == pytest.approx(best, abs=0.03)
    # standardized by the reference draws: units do not matter
    scale = torch.tensor([1e-3, 1e3])
    assert c2st(draws * scale, shifted * scale) == pytest.approx(found, abs=0.01)


def small(task: str) -> training.Settings:
    """The study's own settings with tiny networks."""
    options = {**training.SETTINGS[task].options, "transforms": 2, "bins": 4, **SMALL}
    return dataclasses.replace(
        training.SETTINGS[task], options=options, batch_size=64, num_steps=60, reverse_steps=60
    )


# SLCP's ELBO is left out: at the start it is decided by single rows where a scale is near zero.
@pytest.mark.parametrize(
    ("task", "objective"),
    [
        ("two_moons", "forward"),
        ("slcp", "forward"),
        ("gaussian_mixture", "forward"),
        ("two_moons", "reverse"),
        ("gaussian_mixture", "reverse"),
    ],
)
def test_training_lowers_the_loss(task, objective) -> None:
    reverse = objective == "reverse"
    model = zoo.make(task, **(training.SETTINGS[task].reverse_model if reverse else {}))
    losses = []
    for num_steps in (0, 60):
        pyro.set_rng_seed(0)
        guide = training.train(model, small(task), objective, num_steps)
        with torch.no_grad():
            losses.append(training.OBJECTIVES[objective](model, guide, 2000).item())
    assert math.isfinite(losses[1])
    assert losses[1] < losses[0]


def test_a_run_is_recorded_once_and_shown(tmp_path, monkeypatch) -> None:
    model = zoo.make("gaussian_mixture")
    theta = torch.zeros(200, 2)
    references = tuple(
        ReferencePosterior("gaussian_mixture", number, theta[0], theta[0], torch.randn(200, 2))
        for number in (1, 2)
    )
    monkeypatch.setattr(study.sbibm, "load", lambda task: references)
    monkeypatch.setattr(study, "SETTINGS", {"gaussian_mixture": small("gaussian_mixture")})
    path = tmp_path / "study.jsonl"
    for _ in range(2):
        with study.open_log(path) as log:
            study.run("gaussian_mixture", "forward", log, num_draws=200, scale=0.5)
    results = [r for r in map(json.loads, path.read_text().splitlines()) if r["kind"] == "result"]
    assert len(results) == 1
    values = results[0]["values"]
    assert len(values["c2st"]) == 2
    assert values["simulations"] == 30 * 64
    assert values["settings"].startswith("amortized_spline_coupling: hidden=(32,)")
    assert "gaussian_mixture  forward" in study.table(log)
    assert model.bound.tolist() == [10.0, 10.0]


def test_draws_lie_in_the_box() -> None:
    model = zoo.make("gaussian_mixture")
    guide = training.train(model, small("gaussian_mixture"), "forward", 0)
    draws = study.draws_at(guide, torch.tensor([9.9, 0.0]), 500)
    assert draws.shape == (500, 2)
    assert not draws.requires_grad
    assert draws.abs().max() <= 10


def test_statistics_of_slcp_are_sufficient() -> None:
    """The likelihood of four points is a function of theta and the statistics alone."""
    x = torch.randn(3, 8)
    points = x.unflatten(-1, (4, 2))
    # A rotation among the points that keeps their sum keeps mean and covariance as well.
    basis = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.randn(4, 3)], -1)).Q
    turn = torch.block_diag(torch.eye(1), torch.linalg.qr(torch.randn(3, 3)).Q)
    turned = ((basis @ turn @ basis.mT) @ points).flatten(-2)
    assert (turned - x).abs().max() > 0.1
    torch.testing.assert_close(
        training.sufficient_statistics(turned),
        training.sufficient_statistics(x),
        rtol=1e-4,
        atol=1e-4,
    )
    model, theta = zoo.make("slcp"), 6 * torch.rand(3, 5) - 3
    log_p = model.likelihood(theta).log_prob(x)
    torch.testing.assert_close(
        model.likelihood(theta).log_prob(turned), log_p, rtol=1e-3, atol=1e-3
    )


def test_the_committed_records_reach_npe() -> None:
    """The better of the two objectives is at or below NPE with 100,000 simulations."""
    lines = map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    best: dict[str, float] = {}
    seen = set()
    for record in lines:
        if record["kind"] != "result":
            continue
        task, scores = record["key"]["task"], record["values"]["c2st"]
        assert len(scores) == 10
        assert record["values"]["simulations"] > 0
        seen.add((task, record["key"]["objective"]))
        best[task] = min(best.get(task, 1.0), sum(scores) / 10)
    assert seen == {(task, objective) for task in study.NPE for objective in training.OBJECTIVES}
    for task, score in best.items():
        assert score <= study.NPE[task], f"{task}: {score:.3f} above NPE's {study.NPE[task]}"

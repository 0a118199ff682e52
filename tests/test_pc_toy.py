"""The toy study: what its committed record is said to show, and the recursion it rests on."""

from __future__ import annotations

import json
import math
from typing import Any

import pyro
import pytest
import torch

from benchmarks.studies.pc_toy import FIGURE, RECORDS, STEPS, Toy, data, landing, point_curve
from guides.inference import PredictiveCoding


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    lines = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    return {line["key"]["method"]: line["values"] for line in lines if line["kind"] == "result"}


def test_data_have_exactly_the_moments_that_the_landing_points_need() -> None:
    x = data()
    assert float(x.mean()) == pytest.approx(1, abs=1e-12)
    assert float(x.var(correction=0)) == pytest.approx(5, abs=1e-12)


def test_the_point_estimate_diverges_at_the_known_pace() -> None:
    """The loop and its recursion agree, and the recursion gives the published weights."""
    x, toy = data(50), Toy()
    optim = pyro.optim.SGD({"lr": 0.01 / 50})
    loop = PredictiveCoding(toy.program, optim, num_steps=1, solver="newton")
    for _ in range(20):
        loop.step(x)
    assert toy.numbers() == pytest.approx(point_curve(20, 0.01)[-1][1:], rel=1e-12)
    reached = [point_curve(steps, 0.01)[-1][1] for steps in (1000, 10_000, 100_000)]
    assert [round(w, 1) for w in reached] == [3.5, 6.5, 11.8]


def test_the_record_shows_divergence_and_the_landing_points(found: dict[str, Any]) -> None:
    point = found["point estimate"]
    assert round(point["w"], 1) == 25.1
    assert point["loop_minus_recursion"] < 1e-12
    for step in STEPS:
        values = found[f"langevin, eta {step:g}"]
        assert values["predicted_w"] == pytest.approx(landing(step))
        assert abs(values["w"] - landing(step)) < 4 * values["w_error"] < 0.04
        assert abs(values["mu"] - 1 / landing(step)) < 4 * values["mu_error"] < 0.04
    mala = found["mala"]
    assert abs(mala["w"] - 2) < 4 * mala["w_error"] < 0.02
    assert math.isclose(landing(0.0), 2.0)
    corrected = found["laplace corrected"]
    assert corrected["w"] == pytest.approx(2, abs=1e-3)
    assert corrected["mu"] == pytest.approx(0.5, abs=1e-3)


def test_the_figure_is_that_of_the_record(found: dict[str, Any]) -> None:
    from benchmarks.studies.pc_toy_figure import draw

    assert FIGURE.read_text(encoding="utf-8") == draw(found)
    assert torch.get_default_dtype() == torch.float32

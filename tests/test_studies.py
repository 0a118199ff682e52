"""The committed studies, held to what they are said to show; none is run here."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.mnist_decoder import DECODER, load_decoder
from benchmarks.studies.mnist_gaps import RECORDS as GAPS
from benchmarks.studies.mnist_little_data import RECORDS as LITTLE
from benchmarks.studies.pc_chains import RECORDS as CHAINS

Rows = list[float]


def results(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The latest values of a study by key."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        tuple(line["key"].values()): line["values"] for line in lines if line["kind"] == "result"
    }


def paired(high: Rows, low: Rows) -> tuple[float, float]:
    """Mean difference and its standard error."""
    differences = [a - b for a, b in zip(high, low, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(high))


@pytest.fixture(scope="module")
def gaps() -> dict[str, Rows]:
    found = results(GAPS)
    keys = {
        "encoder": ("encoder", ""),
        "refined": ("refined, 1x iterations", "encoder"),
        "refined 2x": ("refined, 2x iterations", "encoder"),
        "refined 4x": ("refined, 4x iterations", "encoder"),
        "diagonal": ("normal", "better of both"),
        "full": ("multivariate_normal", "better of both"),
        "flow": ("sylvester", "better of both"),
    }
    rows = {name: found[key]["elbo"] for name, key in keys.items()}
    rows["evidence"] = found["log_evidence", "multivariate_normal"]["log_evidence"]
    assert {len(values) for values in rows.values()} == {1000}
    return rows


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ("encoder", "refined"),
        ("refined", "diagonal"),
        ("diagonal", "full"),
        ("diagonal", "flow"),
        ("full", "evidence"),
        ("flow", "evidence"),
    ],
)
def test_the_frozen_decoder_orders_its_bounds(gaps: dict[str, Rows], low: str, high: str) -> None:
    difference, error = paired(gaps[high], gaps[low])
    assert difference > 2 * error, f"{high} - {low}: {difference:.3f} +- {error:.3f}"


def test_refinement_closes_most_of_the_amortization_gap(gaps: dict[str, Rows]) -> None:
    cost = results(GAPS)["refined, 1x iterations", "encoder"]["draw_gradients"]
    assert cost <= 20
    closed = paired(gaps["refined"], gaps["encoder"])[0]
    assert closed >= 0.8 * paired(gaps["diagonal"], gaps["encoder"])[0]
    difference, error = paired(gaps["refined 4x"], gaps["refined"])
    assert difference >= -2 * error, "more iterations than trained must not lower the bound"


def test_the_best_of_every_image_is_at_a_plateau() -> None:
    for (method, start), values in results(GAPS).items():
        if "curve" in values:
            assert len(values["curve"]) == 20
            rise = values["curve"][-1] - values["curve"][-3]
            assert abs(rise) < 0.1, f"{method} from {start} still rises: {rise}"
            assert values["draw_gradients"] <= 2000 * 10


def test_refinement_learns_better_models_from_little_data() -> None:
    found = results(LITTLE)
    for method in ("semi_amortized", "iterative"):
        differences = []
        for seed in range(3):
            high, low = (found[name, seed]["log_evidence"] for name in (method, "direct"))
            assert len(high) == 1000
            difference, error = paired(high, low)
            assert difference > 1 + 2 * error, (
                f"{method}, seed {seed}: {difference:.2f} +- {error:.2f}"
            )
            differences.append(difference)
        assert statistics.mean(differences) > 1


def test_the_committed_decoder_is_that_of_the_study() -> None:
    """One row of the evidence under the committed weights, as the record has it."""
    summary = json.loads(DECODER.with_suffix(".json").read_text())
    assert summary["validation_elbo"] > -101
    model = load_decoder()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        pixels = model.decode(torch.zeros(1, 50)).mean
    assert pixels.shape == (1, 784)
    assert 0.05 < float(pixels.mean()) < 0.3, "an image of ink on paper"


@pytest.mark.parametrize("outputs", [4, 16])
def test_a_relaxation_of_a_chain_costs_fifteen_products_at_any_depth(outputs: int) -> None:
    found = results(CHAINS)

    def medians(solver: str) -> list[float]:
        return [
            statistics.median(found[solver, outputs, depth, seed]["products"] for seed in range(3))
            for depth in (2, 5, 10, 20)
        ]

    assert max(medians("auto")) <= 15
    steps = medians("gradient, centered")
    assert all(mine < theirs for mine, theirs in zip(medians("auto"), steps, strict=True))
    if outputs == 4:
        assert steps == [118, 1095, 4780, 14223]

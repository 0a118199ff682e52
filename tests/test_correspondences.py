"""The correspondences: small versions of every study, the record, the figures, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.studies.correspondences import inference, spatial, temporal, wiring
from benchmarks.studies.correspondences.__main__ import FIGURES_FOLDER, STUDIES, run
from benchmarks.studies.correspondences.figures import FIGURES, spread
from benchmarks.studies.correspondences.filters import gabor
from docs.correspondences import ROWS, runs_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "correspondences.md"


# --- small versions: the same claims, smaller -----------------------------------------------


def whitens(found: dict[str, Any], correlation: float, nats: float) -> None:
    assert found["correlation_with_zca"] > correlation
    assert found["surround_over_center"] < -0.5
    assert found["surround_over_center_zca"] < -0.5
    assert found["test_log_likelihood"] > found["test_log_likelihood_zca"] - nats


def is_local(found: dict[str, Any], priors: tuple[str, ...], least: float) -> None:
    """Sparse filters are Gabor-like, small and oriented; those of the controls are not."""
    controls = ("normal", "pca", "noise")
    for prior in priors:
        assert found[f"gabor_{prior}"] > least + max(found[f"gabor_{c}"] for c in controls)
        assert found[f"extent_{prior}"] < 0.8 * min(found[f"extent_{c}"] for c in controls)
        assert found[f"orientation_{prior}"] > max(found[f"orientation_{c}"] for c in controls)
        assert found[f"kurtosis_{prior}"] > found["kurtosis_normal"] + 1


def test_a_learned_symmetric_flow_has_the_filters_of_zca() -> None:
    found, pictures = spatial.whitening(num_steps=300, side=5, num_rows=4000)
    whitens(found, 0.98, nats=1.0)
    assert FIGURES["whitening"]([found], pictures).startswith("<svg")


def test_sparse_codes_are_local_and_oriented() -> None:
    found, pictures = spatial.sparse_coding(num_steps=150, side=7, z_dim=25, num_rows=2500)
    for prior in ("cauchy", "laplace"):
        assert found[f"gabor_{prior}"] > found["gabor_normal"] + 0.1
        assert found[f"gabor_{prior}"] > found["gabor_pca"] + 0.15
        assert found[f"orientation_{prior}"] > 1.5 * found["orientation_normal"]
        assert found[f"kurtosis_{prior}"] > found["kurtosis_normal"] + 2
    assert "Cauchy prior" in FIGURES["sparse_coding"]([found], pictures)


@pytest.mark.slow
def test_rao_and_ballards_first_level_is_local_and_oriented() -> None:
    found, pictures = spatial.rao_ballard(
        num_steps=200, side=7, stride=3, z_dims=(16, 6), num_rows=2500
    )
    assert found["gabor_cauchy"] > found["gabor_normal"] + 0.03
    assert found["extent_cauchy"] < found["extent_normal"]
    assert found["orientation_cauchy"] > 1.3 * found["orientation_normal"]
    assert found["kurtosis_cauchy"] > found["kurtosis_normal"] + 2
    assert "principal components" in FIGURES["rao_ballard"]([found], pictures)


def test_flows_take_what_a_frame_tells_of_the_next() -> None:
    found, pictures = temporal.temporal_whitening(num_steps=40, num_rows=100, hidden=())
    for levels in (1, 2):
        assert abs(found[f"lag_one_flow_{levels}"]) < 0.6 * found["lag_one_digits"]
    assert FIGURES["temporal_whitening"]([found, found], pictures).count("<image") == 5


def test_the_generating_direction_has_the_correlations_of_the_strokes() -> None:
    found, pictures = temporal.pattern_generator(num_steps=120, num_rows=120, order=6, most=8)
    assert found["largest_of_training"] > 0.8
    assert found["largest_difference"] < 0.15
    assert abs(found["lag_one_whitened"]) < 0.1
    pictures = {**pictures, "training": pictures["training"][:40]}
    assert "handwritten zero" in FIGURES["pattern_generator"]([found], pictures)


def test_precision_is_gain() -> None:
    found, pictures = inference.precision(gains=(0.3, 3.0))
    assert found["largest_difference_from_closed_form"] < 1e-8
    gain, std, error = (torch.tensor(found[name]) for name in ("gain", "std", "error"))
    assert (gain.diff() > 0.1).all()
    assert (std.diff() < 0).all()
    assert (error.diff() < 0).all()
    assert "closed form" in FIGURES["precision"]([found], pictures)


def test_more_iterations_a_time_step_raise_the_bound() -> None:
    found, pictures = inference.iterations(num_steps=15, num_rows=100, length=2, counts=(1, 4))
    assert found["gained_4"] > 4 * found["gained_4_error"]
    assert found["bound_4"] < found["log_evidence"]
    assert "log evidence" in FIGURES["iterations"]([found], pictures)


def rests_at_predictive_coding(found: dict[str, Any]) -> None:
    """The wired network, the package's loop and the closed form are one state."""
    assert found["estimates_from_predictive_coding"] < 1e-8
    assert found["errors_from_predictive_coding"] < 1e-8
    assert found["predictive_coding_from_posterior_mean"] < 1e-8
    assert found["update_from_projections_up"] < 1e-12
    assert found["inhibition_from_precision"] < 1e-8
    assert found["neighbors_over_own"] < -0.3
    assert found["estimates_without_inhibition"] > 0.1
    assert found["energy_above_least"] > 0.05


def test_error_units_that_inhibit_each_other_come_to_rest_at_predictive_coding() -> None:
    found, pictures = wiring.error_units(side=5, z_dim=4, num_rows=2000)
    rests_at_predictive_coding(found)
    assert torch.allclose(pictures["errors"][-1], pictures["errors at rest"])
    assert "precision matrix" in FIGURES["error_units"]([found], pictures)


def is_local_in_levels(found: dict[str, Any]) -> None:
    for name in ("z2", "z1", "x"):
        assert found[f"difference_{name}"] < 1e-12
    for name in ("z2", "z1"):
        assert abs(found[f"correlation_through_samples_{name}"]) < 0.8
    # Below the pixels there is nothing: through samples or not is the same.
    assert found["correlation_through_samples_x"] == pytest.approx(1.0)


def test_a_level_needs_no_gradient_of_another() -> None:
    found, pictures = wiring.level_gradients(num_steps=3, z_dims=(4, 3, 2), num_rows=10)
    is_local_in_levels(found)
    assert "largest difference" in FIGURES["level_gradients"]([found], pictures)


def test_two_inputs_of_an_encoder_are_apart() -> None:
    found, pictures = wiring.separate_inputs(num_steps=3, num_rows=10)
    assert found["most_elsewhere"] == 0 < 1e-3 < found["least_where_it_should"]
    assert FIGURES["separate_inputs"]([found], pictures).count("bit for bit") == 10


def test_gabor_functions_are_told_from_noise_and_from_gratings() -> None:
    """A grating fills its patch; a checkerboard, a single wave vector, too: extent tells them."""
    down, right = torch.meshgrid(torch.arange(10.0), torch.arange(10.0), indexing="ij")
    turned = 0.8 * (down - 4) + 0.6 * (right - 5)
    across = 0.6 * (down - 4) - 0.8 * (right - 5)
    wave = torch.exp(-(turned**2) / 4 - across**2 / 9) * torch.sin(1.8 * turned)
    noise = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    fits = gabor(torch.cat([wave.reshape(1, -1), 3 * wave.reshape(1, -1), noise]), (10, 10))
    assert fits[0] > 0.99
    assert fits[0] == pytest.approx(float(fits[1]), abs=1e-6)
    assert (fits[2:] < 0.4).all()


def test_the_command_writes_record_and_figure(tmp_path: Path, monkeypatch) -> None:
    curve = torch.linspace(0.1, 0.5, 5)
    names = ("gain", "std", "error", "exact gain", "exact std", "exact error", "precision", "grid")
    made = ({"gain": [0.1, 0.5]}, dict.fromkeys(names, curve))
    monkeypatch.setitem(STUDIES, "precision", (lambda: made, 2))
    run(["precision"], tmp_path / "study.jsonl", tmp_path / "figures")
    svg = (tmp_path / "figures" / "precision.svg").read_text(encoding="utf-8")
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    lines = (tmp_path / "study.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["study", "result", "result"]
    with pytest.raises(ValueError, match=r"Studies are whitening, .*; got 'sleep'"):
        run(["sleep"], tmp_path / "study.jsonl", tmp_path)


# --- the record, and the figures made from it -----------------------------------------------


def test_the_record_shows_what_the_page_says() -> None:
    (found,) = runs_of("whitening")
    whitens(found, 0.99, nats=0.1)
    (found,) = runs_of("sparse_coding")
    is_local(found, ("cauchy", "laplace"), 0.3)
    (found,) = runs_of("rao_ballard")
    is_local(found, ("cauchy",), 0.15)
    runs = runs_of("temporal_whitening")
    assert len(runs) == 3
    for one in runs:
        assert max(abs(one["lag_one_flow_1"]), abs(one["lag_one_flow_2"])) < 0.25
        assert one["lag_one_digits"] > 0.5
    (found,) = runs_of("pattern_generator")
    assert found["largest_difference"] < 0.1 < 0.8 < found["largest_of_training"]
    assert 0.9 < found["std_generated_over_training"] < 1.1
    assert found["largest_of_whitened"] < 0.05
    (found,) = runs_of("precision")
    assert found["largest_difference_from_closed_form"] < 1e-8
    assert found["gain"] == sorted(found["gain"])
    runs = runs_of("iterations")
    assert len(runs) == 3
    for one in runs:
        bounds = [one[f"bound_{count}"] for count in inference.ITERATIONS]
        assert bounds == sorted(bounds)
        assert bounds[-1] < one["log_evidence"]
        errors = torch.tensor([one[f"gained_{count}_error"] for count in (2, 4, 8)])
        assert bounds[-1] - bounds[0] > 4 * errors.sum()
    (found,) = runs_of("error_units")
    rests_at_predictive_coding(found)
    (found,) = runs_of("level_gradients")
    is_local_in_levels(found)
    (found,) = runs_of("separate_inputs")
    assert found["most_elsewhere"] == 0 < 0.01 < found["least_where_it_should"]


SHOWN = {
    "whitening": ("{surround_over_center_zca:.2f}", "{correlation_with_zca:.3f}"),
    "sparse_coding": ("{gabor_cauchy:.2f}", "{extent_laplace:.2f}", "{gabor_normal:.2f}"),
    "rao_ballard": ("{gabor_cauchy:.2f}", "{gabor_normal:.2f}", "{extent_pca:.2f}"),
    "temporal_whitening": ("{lag_one_digits:.3f}", "{lag_one_flow_1:.3f}"),
    "pattern_generator": (),
    "precision": (),
    "iterations": ("{below_1:.2f}", "{below_8:.2f}"),
    "error_units": ("{energy_above_least:.2f} nats",),
    "level_gradients": (
        "r = {correlation_through_samples_z2:.2f}",
        "r = {correlation_through_samples_z1:.2f}",
    ),
    "separate_inputs": (),
}


@pytest.mark.parametrize("name", STUDIES)
def test_a_figure_shows_the_numbers_of_the_record(name: str) -> None:
    svg = (FIGURES_FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert len(svg) < 150_000
    runs = runs_of(name)
    means = {key: spread(runs, key)[0] for key in runs[0] if not isinstance(runs[0][key], list)}
    for text in SHOWN[name]:
        assert text.format_map(means) in svg
    assert f"figures/{name}.svg" in PAGE.read_text(encoding="utf-8")
    assert any(row[0] == name for row in ROWS)


# --- the page -------------------------------------------------------------------------------


def test_every_row_of_the_seed_is_on_the_page_with_files_that_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        match[1]: match[0]
        for match in re.finditer(r"^\| ([MIC]\d+) \|.*$", text, flags=re.MULTILINE)
    }
    sections = {
        re.sub(r"[^a-z0-9 -]", "", part.split("\n")[0].lower()).replace(" ", "-"): part
        for part in text.split("\n## ")[1:]
    }
    expected = [f"M{n}" for n in range(1, 13)] + [f"I{n}" for n in range(1, 9)]
    expected += [f"C{n}" for n in range(1, 10)]
    assert list(rows) == expected
    for name, row in rows.items():
        files = re.findall(r"`([a-z_/0-9]+\.py)`", row)
        tests = re.findall(r"`(test_\w+\.py)::(\w+)`", row)
        figure = row.rsplit("|", 2)[1].strip()
        places = re.findall(r"\(#([a-z-]+)\)", figure)
        assert places or (figure.startswith("none") and name[0] != "C"), f"{name} has no figure"
        for place in places:
            section = sections.get(place, "")
            assert "](figures/" in section, f"{name} names #{place}, where no figure is"
        assert files, f"{name} names no file"
        assert tests, f"{name} names no test"
        for file in files:
            assert (ROOT / file).is_file(), f"{name} names {file}, which is not there"
        for file, test in tests:
            code = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"\ndef {test}(" in code, f"{name} names {file}::{test}, which is not there"

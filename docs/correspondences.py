"""The table of numbers in docs/correspondences.md, from the committed record."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "ROWS", "numbers", "runs_of"]

RECORD = Path(__file__).parents[1] / "benchmarks/records/correspondences/study.jsonl"

Row = tuple[str, str, str, str]
ROWS: tuple[Row, ...] = (
    (
        "whitening",
        "correlation of the learned filters with ZCA",
        "{correlation_with_zca:.3f}",
        "",
    ),
    (
        "whitening",
        "weights of the four neighbors over that of the center",
        "{surround_over_center:.2f}",
        "{surround_over_center_zca:.2f} ZCA",
    ),
    (
        "sparse_coding",
        "R² of the best Gabor function, median over filters",
        "{gabor_cauchy:.2f} Cauchy, {gabor_laplace:.2f} Laplace",
        "{gabor_normal:.2f} normal prior, {gabor_pca:.2f} principal components, "
        "{gabor_noise:.2f} noise",
    ),
    (
        "sparse_coding",
        "extent: share of the patch that a filter fills, median",
        "{extent_cauchy:.2f} Cauchy, {extent_laplace:.2f} Laplace",
        "{extent_normal:.2f} normal prior, {extent_pca:.2f} principal components, "
        "{extent_noise:.2f} noise",
    ),
    (
        "sparse_coding",
        "orientation: how far power lies at one angle, median",
        "{orientation_cauchy:.2f} Cauchy, {orientation_laplace:.2f} Laplace",
        "{orientation_normal:.2f} normal prior, {orientation_pca:.2f} principal components, "
        "{orientation_noise:.2f} noise",
    ),
    (
        "rao_ballard",
        "R² of the best Gabor function, median over filters",
        "{gabor_cauchy:.2f} Cauchy",
        "{gabor_normal:.2f} normal prior, {gabor_pca:.2f} principal components, "
        "{gabor_noise:.2f} noise",
    ),
    (
        "rao_ballard",
        "extent and orientation, medians",
        "{extent_cauchy:.2f} and {orientation_cauchy:.2f} Cauchy",
        "{extent_normal:.2f} and {orientation_normal:.2f} normal prior, {extent_pca:.2f} and "
        "{orientation_pca:.2f} principal components",
    ),
    (
        "temporal_whitening",
        "correlation of a frame with the one before",
        "{lag_one_flow_1:.3f} one flow, {lag_one_flow_2:.3f} two",
        "{lag_one_digits:.3f} moving digits, {lag_one_differences_1:.3f} differences, "
        "{lag_one_differences_2:.3f} twice",
    ),
    (
        "temporal_whitening",
        "log density of held-out sequences, nats a pixel",
        "{log_density_flow_1:.3f} one flow, {log_density_flow_2:.3f} two",
        "",
    ),
    (
        "pattern_generator",
        "largest difference of a correlation, generated and trained, lags 0 to 32",
        "{largest_difference:.2f}",
        "{largest_difference_of_held_out:.2f} other zeros; the largest correlation is "
        "{largest_of_training:.2f}",
    ),
    (
        "precision",
        "gain of a unit as its precision rises from .1 to 100 times that of others",
        "{gain_first:.2f} to {gain_last:.2f}",
        "the closed form, to {largest_difference_from_closed_form:.0e}",
    ),
    (
        "iterations",
        "bound after 1, 2, 4, 8 iterations a time step, nats a step",
        "{bound_1:.2f}, {bound_2:.2f}, {bound_4:.2f}, {bound_8:.2f}",
        "log evidence, an estimate by 500 draws, {log_evidence:.2f}",
    ),
    (
        "error_units",
        "units at rest and predictive coding, largest difference over largest value",
        "{estimates_from_predictive_coding:.0e} estimates, "
        "{errors_from_predictive_coding:.0e} errors",
        "{predictive_coding_from_posterior_mean:.0e} predictive coding and the closed form",
    ),
    (
        "error_units",
        "response of error units to one pixel, difference from a row of the precision matrix",
        "{inhibition_from_precision:.0e}",
        "the four neighbors over the unit itself: {neighbors_over_own:.2f}",
    ),
    (
        "error_units",
        "energy, nats a patch, that cutting lateral inhibition adds",
        "{energy_above_least:.2f}",
        "estimates move by {estimates_without_inhibition:.2f} of their size",
    ),
    (
        "level_gradients",
        "gradient of a level by itself and of the whole bound, largest difference over largest "
        "value, z2, z1, pixels",
        "{difference_z2:.1g}, {difference_z1:.1g}, {difference_x:.1g}",
        "correlation of gradients passed through samples: {correlation_through_samples_z2:.2f}, "
        "{correlation_through_samples_z1:.2f}, {correlation_through_samples_x:.2f}",
    ),
    (
        "separate_inputs",
        "least change of an input that should move, relative to its size",
        "{least_where_it_should:.3f}",
        "{most_elsewhere:.1g}, the largest change of any other input",
    ),
)
"""Study, what is measured, what came out, and what it is beside."""


class _Runs(float):
    """A mean over runs that prints its standard deviation, where there is one to print."""

    deviation: float

    def __new__(cls, values: list[float]) -> _Runs:
        made = super().__new__(cls, statistics.mean(values))
        made.deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return made

    def __format__(self, spec: str) -> str:
        mean, deviation = float(self).__format__(spec), self.deviation.__format__(spec)
        return mean if float(deviation) == 0 else f"{mean} ± {deviation}"


def runs_of(study: str) -> list[dict[str, Any]]:
    """The numbers of a study, the latest of every seed."""
    found: dict[int, dict[str, Any]] = {}
    for text in RECORD.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["kind"] == "result" and line["key"]["study"] == study:
            found[line["key"]["seed"]] = line["values"]
    return [found[seed] for seed in sorted(found)]


def numbers() -> str:
    """A Markdown table."""
    lines = ["| Study | What | Found | Beside it |", "| --- | --- | --- | --- |"]
    for study, what, found, beside in ROWS:
        runs = runs_of(study)
        values: dict[str, _Runs] = {}
        for name in runs[0]:
            if isinstance(runs[0][name], list):
                for end, place in (("first", 0), ("last", -1)):
                    values[f"{name}_{end}"] = _Runs([run[name][place] for run in runs])
            else:
                values[name] = _Runs([run[name] for run in runs])
        cells = [f"`{study}`", what, found.format_map(values), beside.format_map(values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

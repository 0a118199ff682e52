"""Figures: the cards of a report that hold drawings and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.charts import cost_chart, differences_chart, glyph, signed
from benchmarks.images import decoded
from benchmarks.png import data_uri, strip
from benchmarks.standings import Place, Standings
from benchmarks.svg import MINUS

__all__ = ["costs", "gap_figure", "legend", "paired_figure", "shots", "theory"]


def paired_figure(table: Standings) -> str:
    """Return the figure of paired differences."""
    items = [(place, place.difference) for place in table.places if place.difference is not None]
    what = "evidence" if table.score == "log_evidence" else "ELBO"
    label = f"Paired differences in {what} to {table.baseline}"
    unit = f"{what} minus that of {table.baseline}, {table.unit}"
    chart = differences_chart(items, label, unit, table.baseline)
    if not chart:
        return ""
    return (
        f'<div class="card"><h4>Paired differences to <code>{escape(table.baseline)}</code></h4>'
        '<p class="note">Right is better. Bars are ± 2 standard errors, small rings the single '
        f"seeds; an arrow points to a value beyond the axis.</p>{chart}</div>"
    )


def gap_figure(table: Standings) -> str:
    """Return the figure of each method's gap between evidence and ELBO on its own model."""
    items = [(place, place.gap) for place in table.places if place.gap is not None]
    unit = f"evidence minus ELBO, {table.unit}"
    chart = differences_chart(items, f"Gap of each method, {table.task}", unit, None)
    if not chart or table.regime != "joint":
        return ""
    return (
        '<div class="card"><h4>How far each guide is from its own model</h4><p class="note">'
        "Left is better. The gap estimates the Kullback-Leibler divergence from guide to "
        "posterior; a model can also make it small by being easy to approximate.</p>"
        f"{chart}</div>"
    )


def theory(table: Standings) -> str:
    """Return what theory says of a shared model: the order that it demands."""
    checks = _checks(table)
    return f'<div class="card">{checks}</div>' if checks else ""


def _checks(table: Standings) -> str:
    if not table.checks:
        return ""
    items = []
    for check in table.checks:
        sign, cls = ("✓", "ok") if check.holds else ("✗", "no")
        items.append(
            f'<li><span class="{cls}" aria-hidden="true">{sign}</span><span>'
            f"{escape(check.higher)} {MINUS} {escape(check.lower)} = "
            f'<span class="num nowrap">{signed(check.difference.value)} ± '
            f"{2 * check.difference.standard_error:.3f}</span>"
            f"{'' if check.holds else ' (violates the order)'}</span></li>"
        )
    return (
        '<h4>What theory demands</h4><p class="note">Free parameters for every row, or a richer '
        "family, can only bring the best ELBO closer to the evidence: no difference may be "
        f'negative beyond two standard errors.</p><ul class="checks">{"".join(items)}</ul>'
    )


def costs(table: Standings) -> list[str]:
    """Return the two figures of score against cost."""
    rows = next(
        (p.runs[0]["curve_rows"] for p in table.places if p.runs and p.runs[0]["curve"]), ""
    )
    note = f"ELBO on {rows}, from few draws; one curve a method, averaged over seeds."
    figures = []
    for cost, heading in (
        ("gradient_evaluations", "Score against gradient evaluations"),
        ("seconds", "Score against seconds"),
    ):
        chart = cost_chart(table, cost, f"{heading}, {table.task}, {table.regime}")
        if chart:
            figures.append(
                f'<div class="card"><h4>{heading}</h4><p class="note">{note}</p>{chart}</div>'
            )
    return figures


def legend(table: Standings) -> str:
    """Return the marks of the methods, for the figures below it."""
    items = "".join(
        f"<li>{glyph(place.example)}{escape(place.method)}</li>"
        for place in table.places
        if place.runs
    )
    return f'<ul class="legend">{items}</ul>'


def shots(table: Standings) -> str:
    """Return reconstructions and samples as images."""
    pictured = [
        (place, run["images"])
        for place in table.places
        for run in place.runs[:1]
        if "images" in run
    ]
    if not pictured:
        return ""

    def picture(content: Mapping[str, Any], alt: str) -> str:
        return f'<img alt="{escape(alt)}" src="{data_uri(strip(decoded(content)))}">'

    def rows(key: str, chosen: Sequence[tuple[Place, Any]]) -> str:
        return "".join(
            f'<span class="name">{glyph(place.example)}{escape(place.method)}</span>'
            + picture(images[key], f"{key} by {place.method}")
            for place, images in chosen
        )

    shared = table.regime == "frozen"
    samples = (
        '<span class="name">shared model</span>'
        + picture(pictured[0][1]["samples"], "samples of the shared model")
        if shared
        else rows("samples", pictured)
    )
    return (
        '<div class="card"><h4>Reconstructions and samples</h4><p class="note">Means of the '
        "likelihood, first seed. A reconstruction averages over draws of the guide; a sample "
        'comes from the prior.</p><div class="shots">'
        '<span class="pairhead">Reconstructions of rows that the model has '
        f"{'not ' if pictured[0][0].runs[0]['scored'].startswith('held') else ''}seen</span>"
        '<span class="name">data</span>'
        + picture(pictured[0][1]["originals"], "the data")
        + rows("reconstructions", pictured)
        + f'<span class="pairhead">Samples</span>{samples}</div></div>'
    )

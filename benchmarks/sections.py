"""Sections: the parts of a report, each from standings or records to HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.charts import cost_chart, differences_chart, glyph, interval, signed, span
from benchmarks.differences import Estimate
from benchmarks.images import decoded
from benchmarks.page import Column, sortable
from benchmarks.png import data_uri, strip
from benchmarks.progress import duration
from benchmarks.standings import Place, Standings
from benchmarks.svg import compact
from benchmarks.words import GLOSSARY, REGIMES, describe, look

__all__ = [
    "checks",
    "costs",
    "failures",
    "estimator_note",
    "finding",
    "gap_figure",
    "glossary",
    "leaderboard",
    "legend",
    "methods",
    "paired_figure",
    "regime_heading",
    "shots",
    "standing",
    "task_facts",
    "value",
]

Record = Mapping[str, Any]


def value(item: Estimate | None, digits: int = 3) -> str:
    """Return an estimate as `−17.321 ± 0.250`: the value and two standard errors."""
    if item is None:
        return "–"
    if not item.finite:
        return "not finite"
    sign = "−" if item.value < 0 else ""
    return f"{sign}{abs(item.value):.{digits}f} ± {2 * item.standard_error:.{digits}f}"


def glossary() -> str:
    """Return how to read the figures."""
    items = "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in GLOSSARY)
    return f'<div class="card"><dl class="glossary">{items}</dl></div>'


def finding(table: Standings, name: str) -> str:
    """Return what a table says, in a sentence or two."""
    places = [p for p in table.places if p.difference is not None and p.difference.finite]
    where = f"<b>{escape(name)}, {'shared model' if table.regime == 'frozen' else 'trained jointly'}.</b>"
    if not places:
        return f"<li>{where} No method finished; see <a href='#failures'>failures</a>.</li>"
    best = places[0]
    word = "evidence of held-out rows" if table.score == "log_evidence" else "ELBO"
    if table.joint_score:
        word = "evidence" if table.score == "log_evidence" else "ELBO"
    text = f"{where} <code>{escape(best.method)}</code> has the highest {word}"
    if best.method == table.baseline:
        text += ", and is the baseline"
    elif best.difference is not None:
        gain = f"{signed(best.difference.value)} ± {2 * best.difference.standard_error:.3f}"
        text += f": {gain} {table.unit} over the baseline <code>{escape(table.baseline)}</code>"
    own = best.score(table.score)
    near = [
        p.method
        for p in places[1:]
        if own is not None
        and p.difference is not None
        and best.difference is not None
        and p.difference.high >= best.difference.low
    ]
    if near:
        names = ", ".join(f"<code>{escape(item)}</code>" for item in near)
        text += f". Not told apart from it (intervals overlap): {names}"
    failed = sum(len(place.failures) for place in table.places)
    if failed:
        text += f". <a href='#failures'>{failed} {'run' if failed == 1 else 'runs'} failed</a>"
    return f"<li>{text}.</li>"


def task_facts(about: Record, runs: Sequence[Record]) -> str:
    """Return what a task is: model, data, binarization, budget."""
    budget = about.get("budget", {})
    seeds = sorted({run["seed"] for run in runs})
    facts = {
        "Model": about.get("description") or about.get("model", ""),
        "Data": about.get("about_data", ""),
        "Binarization": about.get("binarization", ""),
        "Training shape": _shapes(about.get("training_shapes", [])),
        "Held-out shape": _shapes(about.get("held_out_shapes", [])),
        "Scores are of": about.get("scored", ""),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Updates": f"{budget.get('num_steps', '?')} for every method, "
        f"{budget.get('num_particles', '?')} draw(s) each"
        + (f", {budget['batch_size']} rows a batch" if budget.get("batch_size") else ", all rows"),
        "Draws of scores": f"ELBO {budget.get('num_samples')}, evidence K = "
        f"{budget.get('num_evidence_samples')}, k̂ {budget.get('num_khat_samples')} per row",
        "Truth": _tiers(runs),
    }
    items = "".join(
        f"<dt>{key}</dt><dd>{escape(str(text))}</dd>" for key, text in facts.items() if text
    )
    return f'<dl class="about">{items}</dl>'


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(" × ".join(map(str, shape)) or "scalar" for shape in shapes)


def _tiers(runs: Sequence[Record]) -> str:
    words = {
        "exact": "exact: the model knows its own log p(x)",
        "bounds": "none: the evidence is estimated from below, never known exactly",
    }
    tiers = dict.fromkeys(run["tier"] for run in runs if "tier" in run)
    return "; ".join(words.get(tier, tier) for tier in tiers)


def _ranks(values: Sequence[float], *, rising: bool) -> list[int]:
    keys = [
        (math.isnan(item), item if rising else -item) if not math.isnan(item) else (True, 0.0)
        for item in values
    ]
    order = sorted(range(len(values)), key=lambda i: keys[i])
    return [order.index(i) for i in range(len(values))]


def _number(item: Estimate | None) -> float:
    return math.nan if item is None or not item.finite else item.value


def leaderboard(table: Standings, name: str, stale: set[str]) -> str:
    """Return the table of methods: score with interval, difference, tails, cost.

    Args:
        table: The standings.
        name: Unique in the page.
        stale: Digests of code that has changed since.
    """
    places = table.places
    scores = [place.score(table.score) for place in places]
    low, high = span([item for item in scores if item is not None])
    word = "Evidence" if table.score == "log_evidence" else "ELBO"
    other = "elbo" if table.score == "log_evidence" else "log_evidence"
    columns = [
        Column(
            "Method",
            [_name(place, stale) for place in places],
            _ranks(
                [sorted(p.method for p in places).index(q.method) for q in places], rising=True
            ),
            left=True,
        ),
        Column(
            f"{word}, ± 2 s.e.",
            [
                _with_interval(item, place, low, high)
                for item, place in zip(scores, places, strict=True)
            ],
            _ranks([_number(item) for item in scores], rising=False),
        ),
        Column(
            "Paired difference",
            ["baseline" if p.method == table.baseline else _difference(p) for p in places],
            _ranks([_number(place.difference) for place in places], rising=False),
        ),
        Column(
            "ELBO" if other == "elbo" else "Evidence",
            [_short(place.score(other)) for place in places],
            _ranks([_number(place.score(other)) for place in places], rising=False),
        ),
        Column(
            "k̂ > 0.7",
            [_share(place.khat_above) for place in places],
            _ranks([place.khat_above for place in places], rising=True),
        ),
        Column(
            "Gradient evals",
            [compact(place.gradient_evaluations) for place in places],
            _ranks([place.gradient_evaluations for place in places], rising=True),
        ),
        Column(
            "Seconds",
            [compact(place.seconds) for place in places],
            _ranks([place.seconds for place in places], rising=True),
        ),
        Column("Seeds", [_seeds(place) for place in places]),
    ]
    classes = ["base" if place.method == table.baseline else "" for place in places]
    caption = f"Leaderboard, {table.task}, {table.regime}"
    return sortable(name, caption, columns, classes, chosen=2)


def _name(place: Place, stale: set[str]) -> str:
    run = place.example
    badge = ' <span class="badge">code changed since</span>' if run["digest"] in stale else ""
    return f'<span class="name">{glyph(run)}{escape(place.method)}{badge}</span>'


def _with_interval(item: Estimate | None, place: Place, low: float, high: float) -> str:
    if item is None or not item.finite:
        return value(item)
    drawn = interval(item, low, high, *look(place.example))
    return f'<span class="stack">{value(item)}{drawn}</span>'


def _difference(place: Place) -> str:
    item = place.difference
    if item is None or not item.finite:
        return "–"
    return f"{signed(item.value)} ± {2 * item.standard_error:.3f}"


def _short(item: Estimate | None) -> str:
    return "–" if item is None or not item.finite else value(item).partition(" ±")[0]


def _share(share: float) -> str:
    if math.isnan(share):
        return "–"
    return f'{100 * share:.0f}%<span class="bar"><i style="width:{100 * share:.0f}%"></i></span>'


def _seeds(place: Place) -> str:
    if not place.failures:
        return str(len(place.runs))
    return f'<span class="no">{len(place.runs)} of {len(place.runs) + len(place.failures)}</span>'


def estimator_note(table: Standings) -> str:
    """Return the estimator beside a figure: which, with how many draws, of which rows."""
    done = next((place.runs[0] for place in table.places if place.runs), None)
    if done is None:
        return ""
    evidence, elbo = done["scores"]["log_evidence"], done["scores"]["elbo"]
    rows = (
        f"{elbo['num_rows']} {done['scored']}"
        if elbo["num_rows"]
        else f"all {done['scored']}, jointly"
    )
    return (
        f"ELBO: {escape(elbo['estimator'])}, {elbo['num_samples']} draws. Evidence: "
        f"{escape(evidence['estimator'])}. Over {rows}. Intervals are ± 2 standard errors over "
        "rows and seeds; on absolute scores they are mostly the spread between rows, which paired "
        "differences cancel."
    )


def standing(table: Standings, name: str, stale: set[str]) -> str:
    """Return the leaderboard as a card with its notes."""
    unit = table.unit
    return (
        f'<div class="card"><h4>Leaderboard</h4><p class="note">In {unit}, higher is better. '
        "Choose a heading to sort.</p>"
        f"{leaderboard(table, name, stale)}"
        f'<p class="note" style="margin:12px 0 0">{estimator_note(table)}</p></div>'
    )


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
        "Left is better. The gap estimates the Kullback–Leibler divergence from guide to "
        "posterior; a model can also make it small by being easy to approximate.</p>"
        f"{chart}</div>"
    )


def checks(table: Standings) -> str:
    """Return the order that theory demands, as measured."""
    if not table.checks:
        return ""
    items = []
    for check in table.checks:
        sign, cls = ("✓", "ok") if check.holds else ("✗", "no")
        items.append(
            f'<li><span class="{cls}" aria-hidden="true">{sign}</span><span>'
            f"{escape(check.higher)} − {escape(check.lower)} = "
            f'<span class="num">{signed(check.difference.value)} ± '
            f"{2 * check.difference.standard_error:.3f}</span>"
            f"{'' if check.holds else ' (violates the order)'}</span></li>"
        )
    return (
        '<div class="card"><h4>What theory demands</h4><p class="note">A richer family, or free '
        "parameters for every row instead of a network, can only bring the best ELBO closer to "
        "the evidence. Each difference must not be negative beyond two standard errors.</p>"
        f'<ul class="checks">{"".join(items)}</ul></div>'
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


def methods(runs: Sequence[Record]) -> str:
    """Return every method in plain words."""
    seen = {run["method"]: run for run in runs}
    items = "".join(
        f"<div>{glyph(run)}<dt>{escape(name)}</dt><dd>{escape(describe(run))}"
        + (f" ({escape(run['note'])})" if run.get("note") else "")
        + "</dd></div>"
        for name, run in seen.items()
    )
    return f'<div class="card"><dl class="methods">{items}</dl></div>'


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


def failures(runs: Sequence[Record]) -> str:
    """Return every failed run with its message, equal ones together."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for run in runs:
        if run["status"] == "failed":
            error = run["error"]
            key = (run["task"], run["regime"], run["method"], error["type"], error["message"])
            groups.setdefault(key, []).append(run)
    if not groups:
        return '<p class="muted">None: every run finished.</p>'
    items = []
    for (task, regime, method, kind, message), members in groups.items():
        seeds = ", ".join(str(run["seed"]) for run in members)
        where = members[0]["error"].get("where", "")
        items.append(
            f'<div class="fail"><b>{escape(method)}</b> on {escape(task)}, {escape(regime)}, '
            f"seed{'s' if len(members) > 1 else ''} {seeds}"
            f"<pre>{escape(kind)}: {escape(message)}</pre>"
            + (f'<span class="note">{escape(where)}</span>' if where else "")
            + "</div>"
        )
    return (
        "<p>A method that fails is a result. It keeps its row in the leaderboard, without a "
        f"score.</p>{''.join(items)}"
    )


def regime_heading(table: Standings) -> tuple[str, str]:
    """Return the heading of a regime, and what it means."""
    heading, text = REGIMES[table.regime]
    run = next((place.runs[0] for place in table.places if place.runs), None)
    shared = run.get("shared_model") if run else None
    if table.regime == "frozen" and shared and shared.get("guide"):
        text += (
            f" The model was trained with <code>{escape(shared['guide'])}</code> "
            f"({compact(shared['gradient_evaluations'])} gradient evaluations, "
            f"{duration(shared['seconds'])}), which no method is charged for."
        )
    if table.regime == "frozen" and run is not None and run["model_digest"] == "no parameters":
        heading = "One model without parameters, only the guide differs"
        text = (
            "The model has nothing to learn, so every method approximates the same posterior. "
            "They are ordered by their ELBO."
        )
    return heading, text

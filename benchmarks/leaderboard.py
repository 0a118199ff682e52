"""Leaderboard: one table of a report, methods in order, sortable by every column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.charts import glyph, interval, signed, span
from benchmarks.convergence import LAST
from benchmarks.differences import Estimate
from benchmarks.page import Column, sortable
from benchmarks.standings import Place, Standings
from benchmarks.svg import DASH, MINUS, compact
from benchmarks.words import first_sentence, look

__all__ = ["estimator_note", "leaderboard", "standing", "value"]


def value(item: Estimate | None, digits: int = 3, missing: str = "failed") -> str:
    """Return an estimate with its interval, two standard errors, or what there is instead."""
    if item is None:
        return f'<span class="no">{escape(missing)}</span>'
    if not item.finite:
        return "not finite"
    sign = MINUS if item.value < 0 else ""
    return f"{sign}{abs(item.value):.{digits}f} ± {2 * item.standard_error:.{digits}f}"


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
        _tails(table),
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


def _tails(table: Standings) -> Column:
    """The share of rows with a large k-hat, or the k-hat of joint weights."""
    if table.joint_score:
        khats = [place.khat for place in table.places]
        cells = [DASH if math.isnan(khat) else f"{khat:.2f}" for khat in khats]
        return Column("k̂", cells, _ranks(khats, rising=True))
    shares = [place.khat_above for place in table.places]
    return Column("k̂ > 0.7", [_share(item) for item in shares], _ranks(shares, rising=True))


def _name(place: Place, stale: set[str]) -> str:
    run = place.example
    old = any(item["digest"] in stale for item in (*place.runs, *place.failures))
    words = {"code changed since": old, "not converged": not place.converged}
    badges = "".join(
        f'<span class="badge{" warn" if text == "not converged" else ""}">{text}</span>'
        for text, holds in words.items()
        if holds
    )
    below = f'<span class="badges">{badges}</span>' if badges else ""
    return f'<span class="name">{glyph(run)}{escape(place.method)}</span>{below}'


def _with_interval(item: Estimate | None, place: Place, low: float, high: float) -> str:
    if item is None or not item.finite:
        return value(item, missing=place.trouble or "none")
    drawn = interval(item, low, high, *look(place.example))
    return f'<span class="stack">{value(item)}{drawn}</span>'


def _difference(place: Place) -> str:
    item = place.difference
    if item is None or not item.finite:
        return DASH
    return f"{signed(item.value)} ± {2 * item.standard_error:.3f}"


def _short(item: Estimate | None) -> str:
    return DASH if item is None or not item.finite else value(item).partition(" ±")[0]


def _share(share: float) -> str:
    if math.isnan(share):
        return DASH
    return f'{100 * share:.0f}%<span class="bar"><i style="width:{100 * share:.0f}%"></i></span>'


def _seeds(place: Place) -> str:
    if not place.runs and place.refusals:
        return DASH
    if not place.failures:
        return str(len(place.runs))
    return f'<span class="no">{len(place.runs)} of {len(place.runs) + len(place.failures)}</span>'


def estimator_note(table: Standings) -> str:
    """Return the estimator beside a figure: which, with how many draws, of which rows."""
    finished = [run for place in table.places for run in place.runs]
    done = next((run for run in finished if "elbo" in run["scores"]), None)
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
        f'<p class="note" style="margin:12px 0 0">{estimator_note(table)}</p>{_remarks(table)}'
        "</div>"
    )


def _remarks(table: Standings) -> str:
    """What a reader must know beside the numbers: what did not converge or was not ranked."""
    parts = []
    rising = [
        f"<code>{escape(place.method)}</code> {signed(place.rise.value)}"
        for place in table.places
        if place.rise is not None and not place.converged
    ]
    if rising:
        parts.append(
            f"<b>Not converged.</b> Learning curves that still rose over the last "
            f"{100 * LAST:.0f} % of the updates: {', '.join(rising)} {table.unit}. Their place is "
            "that of this budget, and may change with more updates."
        )
    refused: dict[str, list[str]] = {}
    for place in table.places:
        if place.refusals and not place.runs:
            refused.setdefault(place.trouble, []).append(place.method)
    for trouble, names in refused.items():
        listed = ", ".join(f"<code>{escape(name)}</code>" for name in names)
        parts.append(
            f'<b>Not ranked, {escape(trouble)}:</b> {listed}; <a href="#refusals">why</a>.'
        )
    if table.left_out:
        listed = "; ".join(
            f"<code>{escape(name)}</code> ({escape(first_sentence(text))})"
            for name, text in table.left_out.items()
        )
        parts.append(f"<b>Left out, as they do not apply:</b> {listed}")
    return "".join(f'<p class="note remark">{part}</p>' for part in parts)

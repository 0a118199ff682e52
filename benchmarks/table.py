"""Table: standings as plain text, for a terminal or a notebook's output."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.charts import signed
from benchmarks.differences import Estimate
from benchmarks.records import Records
from benchmarks.standings import Place, Standings, standings
from benchmarks.svg import compact

__all__ = ["text_table"]

_HEADS = ("method", "score", "difference", "k-hat > 0.7", "gradients", "seconds", "seeds")


def _value(item: Estimate | None) -> str:
    if item is None or not item.finite:
        return "-"
    return f"{item.value:.3f} ± {2 * item.standard_error:.3f}"


def _cells(place: Place, table: Standings) -> list[str]:
    seeds = str(len(place.runs))
    if place.failures:
        seeds = f"{len(place.runs)} of {len(place.runs) + len(place.failures)}"
    if not place.runs:
        error = place.failures[0]["error"]
        text = f"failed: {error['type']}: {error['message'].splitlines()[0]}"
        return [place.method, text if len(text) <= 72 else f"{text[:71]}…"]
    difference = place.difference
    gap = (
        "-"
        if difference is None or not difference.finite
        else (f"{signed(difference.value)} ± {2 * difference.standard_error:.3f}")
    )
    return [
        place.method,
        _value(place.score(table.score)),
        "baseline" if place.method == table.baseline else gap,
        "-" if math.isnan(place.khat_above) else f"{100 * place.khat_above:.0f}%",
        compact(place.gradient_evaluations),
        compact(place.seconds),
        seeds,
    ]


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    full = [row for row in rows if len(row) == len(_HEADS)]
    widths = [max(len(row[i]) for row in full) for i in range(len(_HEADS))]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([first, *(rest if len(row) == len(_HEADS) else row[1:])]).rstrip())
    return lines


def text_table(records: Records) -> str:
    """Return the leaderboards of records as text.

    Args:
        records: What `read_records` returned.
    """
    parts = []
    for table in standings(records.latest(), records.tasks):
        word = "evidence" if table.score == "log_evidence" else "ELBO"
        how = "shared model" if table.regime == "frozen" else "trained jointly"
        heads = [*_HEADS[:1], f"{word}, {table.unit}", *_HEADS[2:]]
        rows = [heads, *(_cells(place, table) for place in table.places)]
        lines = _align(rows)
        rule = "-" * max(len(line) for line in lines)
        parts.append("\n".join([f"\n{table.task}, {how} (± 2 s.e.)", lines[0], rule, *lines[1:]]))
    return "\n".join(parts)

"""Table: standings as plain text, for a terminal or a notebook's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.charts import signed
from benchmarks.differences import Estimate
from benchmarks.records import Records
from benchmarks.standings import Place, Standings, standings
from benchmarks.svg import compact

__all__ = ["html_table", "text_table"]


def _value(item: Estimate | None) -> str:
    if item is None or not item.finite:
        return "-"
    return f"{item.value:.3f} ± {2 * item.standard_error:.3f}"


def _difference(place: Place, table: Standings) -> str:
    item = place.difference
    if place.method == table.baseline:
        return "baseline"
    if item is None or not item.finite:
        return "-"
    return f"{signed(item.value)} ± {2 * item.standard_error:.3f}"


def _khat(place: Place, table: Standings) -> str:
    value = place.khat if table.joint_score else place.khat_above
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if table.joint_score else f"{100 * value:.0f}%"


def _cells(place: Place, table: Standings) -> list[str]:
    """The cells of a method, or its name and why it failed."""
    if not place.runs:
        error = place.failures[0]["error"]
        text = f"failed: {error['type']}: {error['message'].splitlines()[0]}"
        return [place.method, text if len(text) <= 72 else f"{text[:71]}…"]
    seeds = str(len(place.runs))
    if place.failures:
        seeds = f"{len(place.runs)} of {len(place.runs) + len(place.failures)}"
    return [
        place.method,
        _value(place.score(table.score)),
        _difference(place, table),
        _khat(place, table),
        compact(place.gradient_evaluations),
        compact(place.seconds),
        seeds,
    ]


def _rows(table: Standings) -> list[list[str]]:
    word = "evidence" if table.score == "log_evidence" else "ELBO"
    heads = [
        "method",
        f"{word}, {table.unit}",
        "difference",
        "k-hat" if table.joint_score else "k-hat > 0.7",
        "gradients",
        "seconds",
        "seeds",
    ]
    return [heads, *(_cells(place, table) for place in table.places)]


def _caption(table: Standings) -> str:
    how = "shared model" if table.regime == "frozen" else "trained jointly"
    return f"{table.task}, {how} (± 2 s.e.)"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    num = len(rows[0])
    full = [row for row in rows if len(row) == num]
    widths = [max(len(row[i]) for row in full) for i in range(num)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([first, *(rest if len(row) == num else row[1:])]).rstrip())
    return lines


def text_table(records: Records) -> str:
    """Return the leaderboards of records as text.

    Args:
        records: What `read_records` returned.
    """
    parts = []
    for table in standings(records.latest(), records.tasks):
        head, *lines = _align(_rows(table))
        rule = "-" * max(len(line) for line in (head, *lines))
        parts.append("\n".join([f"\n{_caption(table)}", head, rule, *lines]))
    return "\n".join(parts)


def html_table(records: Records) -> str:
    """Return the leaderboards of records as plain HTML tables, for notebooks.

    Args:
        records: What `read_records` returned.
    """
    parts = []
    for table in standings(records.latest(), records.tasks):
        head, *rows = _rows(table)
        num = len(head)
        body = "".join(
            "<tr>"
            + f"<th>{escape(row[0])}</th>"
            + (
                "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
                if len(row) == num
                else f'<td colspan="{num - 1}">{escape(row[1])}</td>'
            )
            + "</tr>"
            for row in rows
        )
        heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        parts.append(
            f"<table><caption>{escape(_caption(table))}</caption>"
            f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        )
    return "".join(parts)

"""Table: standings as plain text, for a terminal or a notebook's output."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from html import escape

from benchmarks.charts import signed
from benchmarks.convergence import LAST
from benchmarks.differences import Estimate
from benchmarks.records import Records
from benchmarks.standings import Place, Standings, standings
from benchmarks.study_table import study_text
from benchmarks.svg import compact
from benchmarks.words import first_sentence

__all__ = ["html_table", "reason", "text_table"]


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
    """The cells of a method, or its name and why it failed or was refused."""
    if not place.runs:
        return [place.method, reason(place)]
    seeds = str(len(place.runs))
    if place.failures:
        seeds = f"{len(place.runs)} of {len(place.runs) + len(place.failures)}"
    if not place.converged:
        seeds += "  not converged"
    return [
        place.method,
        _value(place.score(table.score)),
        _difference(place, table),
        _khat(place, table),
        compact(place.gradient_evaluations),
        compact(place.seconds),
        seeds,
    ]


def reason(place: Place) -> str:
    """Why nothing of a method can be ranked: the first sentence of its message, whole."""
    if place.failures:
        error = place.failures[0]["error"]
        return f"failed: {error['type']}: {first_sentence(error['message'])}"
    return f"not ranked: {place.trouble}"


def _notes(table: Standings) -> list[str]:
    """What a reader must know beside the numbers."""
    notes = []
    rising = [(place.method, place.rise) for place in table.places if not place.converged]
    if rising:
        listed = ", ".join(f"{name} {rise.value:+.3f}" for name, rise in rising if rise)
        notes.append(
            f"Not converged (ELBO still rose over the last {100 * LAST:.0f} % of the updates): "
            f"{listed}. Their order may change with a larger Budget(num_steps=...)."
        )
    refused: dict[tuple[str, str], list[str]] = {}
    for place in table.places:
        if not place.runs and not place.failures:
            text = first_sentence(place.refusals[0]["refusal"]["message"])
            refused.setdefault((place.trouble, text), []).append(place.method)
    notes += [
        f"Not ranked, {trouble}: {', '.join(names)}. {text}"
        for (trouble, text), names in refused.items()
    ]
    notes += [
        f"Left out, as it does not apply: {name}: {first_sentence(text)}"
        for name, text in table.left_out.items()
    ]
    return notes


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
    widths = [max(len(row[i]) for row in full) for i in range(num - 1)]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        if len(row) == num:
            rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
            lines.append("  ".join([first, *rest, row[-1]]).rstrip())
        else:
            wrapped = textwrap.wrap(row[1], 78, break_long_words=False)
            lines.append(f"{first}  {wrapped[0]}")
            lines += [f"{'':{widths[0]}}  {line}" for line in wrapped[1:]]
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
        notes = [line for note in _notes(table) for line in textwrap.wrap(note, 100)]
        parts.append("\n".join([f"\n{_caption(table)}", head, rule, *lines, *notes]))
    parts += [study_text(study) for study in records.studies.values()]
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
            + "".join(f"<p>{escape(note)}</p>" for note in _notes(table))
        )
    return "".join(parts)

"""Study table: what `benchmarks.study.StudyLog` wrote, read again and shown as a section."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from benchmarks.differences import pool
from benchmarks.progress import duration
from benchmarks.records import Record, Study
from benchmarks.svg import DASH, MINUS, compact

__all__ = ["cells", "study_section", "study_text"]

_OWN = ("kind", "key", "values", "seconds", "finished", "digest")


def _values(record: Record) -> dict[str, Any]:
    if "values" in record:
        return dict(record["values"])
    return {name: value for name, value in record.items() if name not in _OWN}


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """Numbers of a column, None for a column of anything else; what is missing is left out."""
    known = [value for value in values if value is not None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in known):
        return None
    return [float(value) for value in known]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 1e15:
        text = f"{abs(value):,.0f}"
    else:
        text = f"{abs(value):.3f}" if abs(value) >= 0.01 else f"{abs(value):.2g}"
    return f"{MINUS if value < 0 else ''}{text}"


def _mean(values: Sequence[float]) -> str:
    array = np.array(values)
    if len(array) == 0:
        return DASH
    mean = float(array.mean())
    if len(array) == 1 or np.ptp(array) == 0:
        return _number(mean)
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    return _interval(mean, error)


def _cell(values: Sequence[Any]) -> str:
    """One cell: a value, or the mean of several with two standard errors."""
    lists = [value for value in values if isinstance(value, list)]
    lengths = {len(value) for value in lists}
    if len(lists) == len(values) > 1 and len(lengths) == 1 and lengths != {0}:
        tables = [_numbers(value) for value in lists]
        rows = [np.array(table) for table in tables if table is not None]
        if len(rows) == len(lists) and {len(row) for row in rows} == lengths:
            # The same rows again and again: they vary together, and so do the repetitions.
            found = pool(rows)
            return _interval(found.value, found.standard_error)
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    numbers = _numbers(flat)
    if numbers is not None:
        return _mean(numbers)
    texts = dict.fromkeys(_text(value) for value in values if value is not None)
    return ", ".join(texts) if texts else DASH


def _interval(mean: float, error: float) -> str:
    return f"{MINUS if mean < 0 else ''}{abs(mean):.3f} ± {2 * error:.3f}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(float(value))
    return value if isinstance(value, str) else json.dumps(value)


def _curve(values: Sequence[Any]) -> str:
    """A curve, or several: where it begins and ends, and its number of points."""
    ends = []
    for value in values:
        points = [point[-1] if isinstance(point, list) else point for point in value or []]
        if points:
            ends.append((points[0], points[-1], len(points)))
    if not ends:
        return DASH
    first, last, count = (sum(column) / len(ends) for column in zip(*ends, strict=True))
    return f"from {_number(first)} to {_number(last)} in {round(count)} points"


def cells(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a study's table.

    Results that differ only in the parts of the key that the study averages over make one row:
    numbers become mean ± 2 standard errors over them.
    """
    over = set(study.about.get("over", ()))
    groups: dict[str, list[Record]] = {}
    for record in study.results.values():
        key = {name: v for name, v in record.get("key", {}).items() if name not in over}
        mark = json.dumps(key if "key" in record else {"line": len(groups)}, sort_keys=True)
        groups.setdefault(mark, []).append(record)
    keys = list(
        dict.fromkeys(n for r in study.results.values() for n in r.get("key", {}) if n not in over)
    )
    names = list(dict.fromkeys(name for r in study.results.values() for name in _values(r)))
    rows = []
    for members in groups.values():
        row = [_text(members[0].get("key", {}).get(name, DASH)) for name in keys]
        for name in names:
            column = [_values(record).get(name) for record in members]
            row.append(_curve(column) if name == "curve" else _cell(column))
        if over:
            row.append(str(len(members)))
        spent = [record.get("seconds") or 0.0 for record in members]
        rows.append([*row, compact(sum(spent) / len(spent))])
    averaged = [f"results ({', '.join(sorted(over))})"] if over else []
    return [*keys, *names, *averaged, "seconds"], rows


def study_text(study: Study) -> str:
    """Return a study's table as plain text."""
    heads, rows = cells(study)
    table = [heads, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in table]
    return "\n".join([f"\n{study.about.get('title', study.name)}", *lines, *study.notes])


def study_section(study: Study, changed: set[str], *, titled: bool = True) -> str:
    """Return a study as a section of the report.

    Args:
        study: The study.
        changed: Digests of code that has changed since.
        titled: Whether it begins with its title.
    """
    heads, rows = cells(study)
    about = study.about
    num_keys = len(heads) - len({n for r in study.results.values() for n in _values(r)}) - 1
    num_keys -= bool(about.get("over"))
    left = [i < num_keys for i in range(len(heads))]

    def cell(i: int, tag: str, content: str) -> str:
        side = ' class="l"' if left[i] else ""
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{side}>{escape(content)}</{tag}>"

    head = "".join(cell(i, "th", name) for i, name in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell(i, 'td', text) for i, text in enumerate(row))}</tr>" for row in rows
    )
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in study.notes)
    explained = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
        for name, text in dict(about.get("columns", {})).items()
    )
    old = sum(record.get("digest") in changed for record in study.results.values())
    facts = {
        "Protocol": about.get("protocol", ""),
        "Command": about.get("command", ""),
        "Time": duration(study.seconds),
        "Versions": ", ".join(f"{k} {v}" for k, v in dict(about.get("versions", {})).items()),
        "Code changed since": f"{old} of {len(study.results)} results" if changed and old else "",
    }
    items = "".join(
        f"<dt>{key}</dt><dd>{escape(str(text))}</dd>" for key, text in facts.items() if text
    )
    spread = any(isinstance(v, list) for r in study.results.values() for v in _values(r).values())
    means = (
        '<p class="note">Numbers with ± are means ± 2 standard errors.</p>'
        if spread or about.get("over")
        else ""
    )
    heading = f'<h2 id="study-{escape(study.name)}">{escape(about.get("title", study.name))}</h2>'
    return (
        f'{heading if titled else ""}<p class="lead">{escape(about.get("question", ""))}</p>'
        f'<dl class="about">{items}</dl>'
        f'<div class="card"><div class="scroll" tabindex="0" role="region" aria-label="Results">'
        f'<table class="plain study"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{means}{notes}"
        + (f'<dl class="about">{explained}</dl>' if explained else "")
        + "</div>"
    )

"""Charts: what a report draws, from standings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.convergence import elbo_at
from benchmarks.differences import Estimate, estimate, has_score
from benchmarks.standings import Place, Standings
from benchmarks.svg import MINUS, Axis, compact, drawing, line, mark, polyline, text
from benchmarks.words import look

__all__ = ["cost_chart", "differences_chart", "glyph", "interval", "signed", "span"]


def signed(value: float, digits: int = 3) -> str:
    """Return a number with its sign, the real minus.

    Example:
        >>> from benchmarks.charts import signed
        >>> signed(0.5), signed(1.25, 1)
        ('+0.500', '+1.2')
    """
    if not math.isfinite(value):
        return "not finite"
    return f"{MINUS if value < 0 else '+'}{abs(value):.{digits}f}"


def glyph(run: Mapping[str, Any]) -> str:
    """Return the mark of a method, to stand beside its name."""
    color, shape = look(run)
    return (
        '<svg viewBox="0 0 14 14" class="glyph" aria-hidden="true">'
        f"{mark(7, 7, shape, f'{color} fill', size=4.6)}</svg>"
    )


def span(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """Return a range that shows estimates well: what lies far from most stays outside it."""
    values = [item for item in estimates if item.finite]
    if not values:
        return -1.0, 1.0
    middle = float(np.median([item.value for item in values]))
    reaches = [max(middle - item.low, item.high - middle) for item in values]
    limit = 6 * float(np.median(reaches))
    near = [item for item, reach in zip(values, reaches, strict=True) if reach <= limit]
    low, high = min(item.low for item in near), max(item.high for item in near)
    margin = 0.06 * (high - low) or 1e-3 * abs(middle) or 1.0
    return low - margin, high + margin


def _outside(item: Estimate, axis: Axis, y: float, color: str) -> str:
    """An arrow at the border for a value beyond the axis; nothing for one inside."""
    if axis.low <= item.value <= axis.high:
        return ""
    way, x = (-1, axis.start) if item.value < axis.low else (1, axis.end)
    tip = [(x - 7 * way, y - 5), (x, y), (x - 7 * way, y + 5)]
    return polyline(tip, f"{color} stroke")


def interval(item: Estimate, low: float, high: float, color: str, shape: str) -> str:
    """Return a mark with its interval, small enough for a table cell."""
    axis = Axis(low, high, 6, 144)
    arrow = _outside(item, axis, 8, color)
    if arrow:
        parts = [arrow]
    else:
        parts = [
            line(axis(item.low), 8, axis(item.high), 8, f"{color} stroke"),
            mark(axis(item.value), 8, shape, f"{color} fill", size=4.2),
        ]
    return drawing(150, 16, [line(6, 8, 144, 8, "grid"), *parts], signed(item.value), "cell")


def differences_chart(
    items: Sequence[tuple[Place, Estimate]], label: str, unit: str, base: str | None
) -> str:
    """Draw differences: the mean, two standard errors, and every seed.

    Args:
        items: Methods and their differences, in the order they are drawn.
        label: What the chart shows.
        unit: What stands below the axis.
        base: The method that is zero by definition, if there is one.
    """
    items = [(place, item) for place, item in items if item.finite]
    if not items:
        return ""
    low, high = span([item for _, item in items])
    low, high = min(low, -0.05 * (high - low)), max(high, 0.05 * (high - low))
    width, row, top = 480.0, 37.0, 6.0
    bottom = top + row * len(items)
    axis = Axis(low, high, 14, width - 14)
    ticks = axis.ticks(5)
    parts = [line(axis(tick), top, axis(tick), bottom, "grid") for tick in ticks]
    for i, (place, item) in enumerate(items):
        middle = top + row * i + 25
        parts.append(line(axis(0.0), middle - 7, axis(0.0), middle + 7, "zero"))
        parts += _difference_row(place, item, axis, top + row * i, unit, place.method == base)
    parts += [
        text(axis(tick), bottom + 15, compact(tick), anchor="middle", cls="muted", size=11)
        for tick in ticks
    ]
    parts.append(text(width / 2, bottom + 33, unit, anchor="middle", cls="muted"))
    return drawing(width, bottom + 40, parts, label, "chart")


def _difference_row(
    place: Place, item: Estimate, axis: Axis, y: float, unit: str, base: bool
) -> list[str]:
    color, shape = look(place.example)
    value = "baseline" if base else f"{signed(item.value)} ± {2 * item.standard_error:.3f}"
    parts = [
        text(axis.start, y + 13, place.method, cls="halo strong", size=12),
        text(axis.end, y + 13, value, anchor="end", cls="halo muted num", size=12),
    ]
    height = y + 25
    arrow = _outside(item, axis, height, color)
    if arrow:
        return [*parts, arrow]
    parts.append(line(axis(item.low), height, axis(item.high), height, f"{color} stroke wide"))
    if len(item.per_seed) > 1 and not base:
        parts += [
            mark(axis(seed), height, "circle", f"{color} hollow", size=2.6)
            for seed in item.per_seed
        ]
    tip = f"{place.method}: {value} {unit}"
    return [*parts, mark(axis(item.value), height, shape, f"{color} fill", title=tip)]


def _reference(table: Standings) -> dict[int, float]:
    """The best evidence estimate of every seed: what an ELBO could reach on a shared model."""
    best: dict[int, float] = {}
    for place in table.places:
        for run in place.runs:
            exact = has_score(run, "exact_log_evidence")
            name = "exact_log_evidence" if exact else "log_evidence"
            found = estimate([run], name, joint=table.joint_score)
            if found is not None and found.finite:
                best[run["seed"]] = max(best.get(run["seed"], -math.inf), found.value)
    return best


def _curve(
    place: Place, cost: str, reference: Mapping[int, float] | None, joint: bool
) -> list[tuple[float, float]]:
    """A method's curve, averaged over seeds checkpoint by checkpoint."""
    curves = [run["curve"] for run in place.runs if run["curve"]]
    if not curves:
        return []
    steps = set.intersection(*({point["step"] for point in curve} for curve in curves))
    points = []
    for step in sorted(steps):
        here = [
            (run, next(point for point in run["curve"] if point["step"] == step))
            for run in place.runs
            if run["curve"]
        ]
        x = float(np.mean([point[cost] for _, point in here]))
        scores = [(run["seed"], elbo_at(point, joint)) for run, point in here]
        ys = [y if reference is None else reference[seed] - y for seed, y in scores]
        points.append((x, float(np.mean(ys))))
    return [point for point in points if point[0] > 0]


def cost_chart(table: Standings, cost: str, label: str) -> str:
    """Draw the score against its cost.

    On a shared model the vertical axis is the distance to the evidence, logarithmic: equal
    heights are equal factors. Jointly trained models have no common target, and the axis is the
    ELBO itself.

    Args:
        table: The standings.
        cost: `gradient_evaluations` or `seconds`.
        label: What the chart shows.
    """
    gap = table.regime == "frozen"
    reference = _reference(table) if gap else None
    joint = table.joint_score
    curves = [
        (place, _curve(place, cost, reference, joint)) for place in table.places if place.runs
    ]
    if gap:
        curves = [(place, [p for p in points if p[1] > 0]) for place, points in curves]
    curves = [(place, points) for place, points in curves if points]
    if not curves:
        return ""
    width, height = 480.0, 330.0
    ys = [y for _, points in curves for _, y in points]
    ends = [points[-1][1] for _, points in curves]
    if gap:
        vertical = Axis(max(min(ys) * 0.8, 1e-3), max(ys) * 1.1, height - 46, 24, log=True)
    else:
        top, bottom = max(ys), float(np.median(ends))
        low = max(min(ys), top - 6 * max(top - bottom, 0.05 * abs(top)))
        vertical = Axis(low, top + 0.04 * (top - low), height - 46, 24)
    shown = [x for _, points in curves for x, y in points if gap or y >= vertical.low]
    xs = shown or [x for _, points in curves for x, _ in points]
    horizontal = Axis(min(xs) / 1.15, max(xs) * 1.15, 46, width - 12, log=True)
    parts = []
    for tick in vertical.ticks(6):
        y = vertical(tick)
        parts += [
            line(46, y, width - 12, y, "grid"),
            text(41, y + 4, compact(tick), anchor="end", cls="muted", size=11),
        ]
    for tick in horizontal.ticks():
        x = horizontal(tick)
        parts += [
            line(x, height - 46, x, height - 42, "rule"),
            text(x, height - 29, compact(tick), anchor="middle", cls="muted", size=11),
        ]
    parts.append(line(46, height - 46, width - 12, height - 46, "rule"))
    names = {"gradient_evaluations": "gradient evaluations", "seconds": "wall seconds"}
    parts.append(text((34 + width) / 2, height - 10, names[cost], anchor="middle", cls="muted"))
    better = (
        f"gap to the evidence, {table.unit} (down is better)"
        if gap
        else (f"ELBO, {table.unit} (up is better)")
    )
    parts.append(text(6, 13, better, cls="muted"))
    for place, points in curves:
        color, shape = look(place.example)
        where = [(horizontal(x), vertical(y)) for x, y in points if gap or y >= vertical.low]
        if len(where) > 1:
            dash = " dash" if shape == "diamond" else ""
            parts.append(polyline(where, f"{color} stroke curve{dash}"))
        if where:
            last = points[-1]
            tip = f"{place.method}: {last[1]:.3f} after {compact(last[0])} {names[cost]}"
            parts.append(mark(*where[-1], shape, f"{color} fill", size=5, title=tip))
    return drawing(width, height, parts, label, "chart")

"""Gaps: where the nats of a guide go, as stacked bars from log p(x) down to its ELBO.

    log p(x) - ELBO(method)  =  log p(x) - ELBO(Local of the family)        approximation gap
                             +  ELBO(Local of the family) - ELBO(method)    amortization gap

References:
    | Inference suboptimality in variational autoencoders (Cremer, Li & Duvenaud, 2018)
    | https://arxiv.org/abs/1801.03558
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from benchmarks.charts import signed
from benchmarks.differences import Estimate
from benchmarks.losses import Losses
from benchmarks.standings import Standings
from benchmarks.svg import Axis, compact, drawing, line, polyline, text
from benchmarks.words import look

__all__ = ["gap_bars", "gaps_figure"]


def gaps_figure(table: Standings) -> str:
    """Return the card of a shared model's gaps; empty where no family has a Local guide."""
    chart = gap_bars(table)
    if not chart:
        return ""
    shared = any(item.shared_flow for item in table.losses)
    flow = (
        " <b>Shared flow</b>: the weights of the flow are shared by all rows even in the Local "
        "guide, so its bar ends above the best flow of every single row."
        if shared
        else ""
    )
    return (
        '<div class="card"><h4>Where the nats go</h4><p class="note">Shorter is better; 0 is '
        f"log p(x) ({escape(table.truth)}). <b>Approximation gap</b>, solid: what the best q of "
        "the family misses, the family's Local guide with parameters of its own for every row. "
        "<b>Amortization gap</b>, pale: what the network's answer loses to that; outlined where "
        "the network came out ahead. Differences are paired, whiskers are ± 2 standard errors."
        f"{flow}</p>{chart}</div>"
    )


def _reach(items: Sequence[Losses]) -> tuple[float, float]:
    """The range of the axis: what lies far beyond most bars is cut."""
    ends = [max(item.total.high, item.approximation.high) for item in items]
    limit = 6 * max(float(np.median(ends)), 1e-3)
    high = max([end for end in ends if end <= limit] or ends)
    starts = [min(item.total.value, item.approximation.value) for item in items]
    low = min(0.0, *starts)
    return low, high if high > low else low + 1.0


def gap_bars(table: Standings) -> str:
    """Draw the gaps of every family with a Local guide.

    Args:
        table: Standings of a frozen model.
    """
    items = [item for item in table.losses if item.approximation.finite and item.total.finite]
    if not items:
        return ""
    items.sort(key=lambda item: item.total.value)
    low, high = _reach(items)
    width, row, top = 480.0, 42.0, 6.0
    bottom = top + row * len(items)
    axis = Axis(low, high + 0.04 * (high - low), 14, width - 14)
    ticks = axis.ticks(5)
    parts = [line(axis(tick), top, axis(tick), bottom, "grid") for tick in ticks]
    for i, item in enumerate(items):
        parts += _row(table, item, axis, top + row * i)
    parts.append(line(axis(0.0), top, axis(0.0), bottom, "zero"))
    parts += [
        text(axis(tick), bottom + 15, compact(tick), anchor="middle", cls="muted", size=11)
        for tick in ticks
    ]
    unit = f"log p(x) minus ELBO, {table.unit}"
    parts.append(text(width / 2, bottom + 33, unit, anchor="middle", cls="muted"))
    return drawing(width, bottom + 40, parts, f"Gaps on {table.task}, shared model", "chart")


def _row(table: Standings, item: Losses, axis: Axis, y: float) -> list[str]:
    place = next(place for place in table.places if place.method == item.method)
    color, _ = look(place.example)
    first, second = item.approximation, item.amortization
    words = _words(first) + ("" if second is None else f" {signed(second.value)[0]} ")
    words += "" if second is None else _words(second).lstrip("\u2212")
    label = item.method + (" (shared flow)" if item.shared_flow else "")
    parts = [
        text(axis.start, y + 14, label, cls="halo strong", size=12),
        text(axis.end, y + 14, words, anchor="end", cls="halo muted num", size=12),
        _bar(axis, 0.0, first.value, y, f"{color} seg", f"{label}: approximation gap {words}"),
    ]
    if second is not None:
        ahead = second.value < 0
        tip = f"{label}: amortization gap {_words(second)}"
        cls = f"{color} {'seg outline' if ahead else 'seg pale'}"
        parts.append(_bar(axis, first.value, item.total.value, y, cls, tip))
        parts += _whisker(axis, first, y + 22.5)
    parts += _whisker(axis, item.total, y + 29.5 if second is not None else y + 26)
    if item.total.value > axis.high:
        x = axis.end
        parts.append(polyline([(x - 6, y + 21), (x + 2, y + 26), (x - 6, y + 31)], "zero"))
    return parts


def _words(item: Estimate) -> str:
    sign = "\u2212" if item.value < 0 else ""
    return f"{sign}{abs(item.value):.3f} ± {2 * item.standard_error:.3f}"


def _bar(axis: Axis, start: float, end: float, y: float, cls: str, tip: str) -> str:
    left, right = sorted((axis(start), axis(end)))
    return (
        f'<rect x="{left:.1f}" y="{y + 19:.1f}" width="{max(right - left, 0.5):.1f}" height="14"'
        f' class="{cls}"><title>{escape(tip)}</title></rect>'
    )


def _whisker(axis: Axis, item: Estimate, y: float) -> list[str]:
    if item.value > axis.high:
        return []
    left, right = axis(item.low), axis(item.high)
    return [
        line(left, y, right, y, "whisker"),
        line(left, y - 2.5, left, y + 2.5, "whisker"),
        line(right, y - 2.5, right, y + 2.5, "whisker"),
    ]

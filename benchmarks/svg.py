"""SVG: axes, marks and text, as strings that stand inline in a page.

Colors are CSS classes, so that one drawing serves light, dark and print; shape repeats what color
says, so that nothing depends on color alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "DASH",
    "MINUS",
    "TIMES",
    "Axis",
    "compact",
    "drawing",
    "line",
    "mark",
    "polyline",
    "text",
]

# Written as escapes: in source they are easily taken for their plain neighbors.
DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to positions.

    Args:
        low: Value at `start`.
        high: Value at `end`.
        start: Position of `low`.
        end: Position of `high`.
        log: Whether the scale is logarithmic; values must then be positive.

    Example:
        >>> from benchmarks.svg import Axis
        >>> Axis(0, 10, 0, 100)(5.0), Axis(1, 100, 0, 100, log=True)(10.0)
        (50.0, 50.0)
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value; values outside land on the border."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        if self.log and value <= 0:
            return self.start
        share = (self._scaled(value) - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1,) if self.high / self.low > 500 else (1, 2, 5)
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            return [value for value in values if self.low <= value <= self.high * 1.0001]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        rough = span / max(1, count)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if rough <= power * factor)
        first = math.ceil(self.low / step)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def compact(value: float) -> str:
    """Return a number in few characters: 1500000 as 1.5M, 0.25 as 0.25.

    Example:
        >>> from benchmarks.svg import compact
        >>> compact(1_500_000), compact(20_000), compact(0.25), compact(3.0)
        ('1.5M', '20k', '0.25', '3')
    """
    if not math.isfinite(value):
        return DASH
    sign, size = (MINUS if value < 0 else ""), abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{sign}{size / unit:.3g}{name}"
    return f"{sign}{size:.3g}"


def text(
    x: float, y: float, content: str, *, anchor: str = "start", cls: str = "", size: float = 12
) -> str:
    """Return text at a baseline position."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
        f' class="{cls}">{escape(content)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, cls: str = "rule") -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>'


def polyline(points: Sequence[tuple[float, float]], cls: str) -> str:
    """Return a line through points."""
    where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{where}" class="{cls}" fill="none"/>'


def mark(x: float, y: float, shape: str, cls: str, *, size: float = 5, title: str = "") -> str:
    """Return a mark: `circle`, `diamond`, `square` or `triangle`, with a tooltip."""
    tip = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" class="{cls}">{tip}</circle>'
    outlines = {
        "diamond": ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
        "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    }
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in outlines[shape])
    return f'<polygon points="{points}" class="{cls}">{tip}</polygon>'


def drawing(width: float, height: float, parts: Sequence[str], label: str, cls: str = "") -> str:
    """Return the drawing, which scales to the width it is given.

    Args:
        width: Width in its own units.
        height: Height in its own units.
        parts: What is drawn, in order.
        label: What it shows, for those who do not see it.
        cls: CSS class.
    """
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"'
        f' class="{cls}">{"".join(parts)}</svg>'
    )

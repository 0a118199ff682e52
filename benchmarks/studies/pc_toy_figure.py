"""The figure of the toy study: the weight of every method against learning steps, as one SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.svg import Axis, compact, drawing, line, mark, polyline, text

__all__ = ["draw"]

# A file of its own: it cannot rely on the style sheet of a page.
_STYLE = (
    "<style>text{font-family:ui-sans-serif,system-ui,sans-serif;fill:#1c2126}"
    "text.muted{fill:#5b6570}.grid{stroke:#e6e7e2}.rule{stroke:#5b6570}"
    ".theory{stroke:#5b6570;stroke-dasharray:4 4}.curve{stroke-width:2;fill:none}"
    ".c0{stroke:#c23b22}.c1{stroke:#1d66ad}.c2{stroke:#147a55}.c3{stroke:#8439a0}"
    ".c4{stroke:#a86400}.c5{stroke:#1c2126}"
    ".c0.f{fill:#c23b22}.c1.f{fill:#1d66ad}.c2.f{fill:#147a55}.c3.f{fill:#8439a0}"
    ".c4.f{fill:#a86400}.c5.f{fill:#1c2126}.c6{stroke:#0e7c86}.c6.f{fill:#0e7c86}</style>"
)
_SHAPES = ("circle", "diamond", "square", "triangle", "diamond", "circle", "square")


def draw(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the curves.

    Args:
        found: Values of the study by method.

    Returns:
        An SVG file: left the point estimate against all, on a logarithmic axis of steps; right
        where the samplers land, beside what is predicted.
    """
    width, height = 900.0, 380.0
    parts = ['<rect width="100%" height="100%" fill="#ffffff"/>']
    parts += _left(found, Axis(1, 2.2e6, 56, 400, log=True), Axis(0.8, 30, height - 52, 46, True))
    parts += _right(found, Axis(0, 4000, 480, 740), Axis(1.3, 2.2, height - 52, 46))
    svg = drawing(width, height, [_STYLE, *parts], "Weight learned by every method of the toy")
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _frame(title: str, horizontal: Axis, vertical: Axis, ticks: list[float]) -> list[str]:
    left, right, bottom = horizontal.start, horizontal.end, vertical.start
    parts = [text(left - 36, 22, title, size=14)]
    for tick in ticks:
        y = vertical(tick)
        parts += [
            line(left, y, right, y, "grid"),
            text(left - 6, y + 4, f"{tick:g}", anchor="end", cls="muted", size=11),
        ]
    for tick in horizontal.ticks(4):
        x = horizontal(tick)
        parts += [
            line(x, bottom, x, bottom + 4),
            text(x, bottom + 17, compact(tick), anchor="middle", cls="muted", size=11),
        ]
    parts.append(line(left, bottom, right, bottom))
    parts.append(text((left + right) / 2, bottom + 36, "learning steps", anchor="middle",
                      cls="muted"))  # fmt: skip
    return parts


def _left(found: Mapping[str, Mapping[str, Any]], horizontal: Axis, vertical: Axis) -> list[str]:
    parts = _frame("w, on logarithmic axes", horizontal, vertical, [1, 2, 5, 10, 20])
    parts.append(line(horizontal.start, vertical(2), horizontal.end, vertical(2), "theory"))
    end_of_line = (horizontal.end - 4, vertical(2) + 16)
    parts.append(text(*end_of_line, "maximum likelihood: 2", anchor="end", cls="muted", size=11))
    for i, values in enumerate(found.values()):
        points = [(horizontal(s), vertical(w)) for s, w, _ in values["curve"] if s >= 1]
        parts.append(polyline(points, f"c{i} curve"))
    name = next(iter(found))
    end = found[name]["curve"][-1]
    x, y = horizontal(end[0]), vertical(end[1])
    parts.append(mark(x, y, "circle", "c0 f"))
    parts.append(text(x - 12, y, f"{name}: {end[1]:.1f}, growing", anchor="end", size=12))
    return parts


def _right(found: Mapping[str, Mapping[str, Any]], horizontal: Axis, vertical: Axis) -> list[str]:
    parts = _frame("w, closer; dashed: closed form", horizontal, vertical, [1.4, 1.6, 1.8, 2, 2.2])
    for i, (name, values) in enumerate(found.items()):
        if "predicted_w" not in values:
            continue
        y = vertical(values["predicted_w"])
        parts.append(line(horizontal.start, y, horizontal.end, y, "theory"))
        kept = [(s, w) for s, w, _ in values["curve"] if w >= vertical.low]
        points = [(horizontal(s), vertical(w)) for s, w in kept]
        parts.append(polyline(points, f"c{i} curve"))
        parts.append(mark(horizontal.end, vertical(values["w"]), _SHAPES[i], f"c{i} f"))
        # Landing points lie close together: names keep a line's height between them.
        label = f"{name}: {values['w']:.3f}"
        shift = {"laplace corrected": -19.0, "mala": -4.0, "langevin, eta 0.01": 11.0}.get(
            name, 4.0
        )
        parts.append(text(horizontal.end + 10, y + shift, label, size=12))
    return parts

"""What the figures are drawn with: framed axes, mosaics of filters, strips of frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.png import data_uri
from benchmarks.svg import Axis, compact, drawing, line, mark, polyline, text

__all__ = ["COLORS", "Panel", "caption", "figure", "gray", "mosaic", "picture"]

COLORS = ("#1d66ad", "#c23b22", "#147a55", "#8439a0", "#a86400", "#5b6570")
_SHAPES = ("circle", "square", "diamond", "triangle", "circle", "square")
# A file of its own: it cannot rely on the style sheet of a page.
_STYLE = (
    "<style>text{font-family:ui-sans-serif,system-ui,sans-serif;fill:#1c2126}"
    "text.muted{fill:#5b6570}.grid{stroke:#e6e7e2}.rule{stroke:#5b6570}"
    ".theory{stroke:#5b6570;stroke-dasharray:4 4}"
    + "".join(
        f".c{i}{{stroke:{color};stroke-width:2}}.f{i}{{fill:{color}}}"
        f".h{i}{{fill:#ffffff;stroke:{color};stroke-width:1.5}}"
        for i, color in enumerate(COLORS)
    )
    + "</style>"
)


def figure(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """An SVG file on white.

    Args:
        width: Width in its own units.
        height: Height in its own units.
        parts: What is drawn, in order.
        label: What it shows, for those who do not see it.
    """
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    svg = drawing(width, height, [_STYLE, ground, *parts], label)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def caption(top: float, *lines: str) -> list[str]:
    """Lines of small words below the panels, at the left edge of the figure.

    Args:
        top: Place of the first line.
        lines: The words of each.
    """
    return [text(20, top + 16 * i, words, cls="muted", size=11) for i, words in enumerate(lines)]


def gray(values: Tensor, low: float, high: float) -> np.ndarray:
    """Values as gray levels: ``low`` is black, ``high`` white.

    Example:
        >>> gray(torch.tensor([-1.0, 0.0, 2.0]), low=-1.0, high=1.0).tolist()
        [0, 127, 255]
    """
    share = ((values.detach() - low) / (high - low)).clamp(0, 1)
    result: np.ndarray = (share * 255).to(torch.uint8).numpy()
    return result


def mosaic(
    filters: Tensor, shape: tuple[int, int], columns: int, limit: float = 1.0
) -> np.ndarray:
    """Filters as tiles of one picture, each from minus to plus its own largest weight.

    Args:
        filters: One a row, ``(K, D)``.
        shape: Height and width of a filter.
        columns: Tiles in a row.
        limit: Where black and white are, as a fraction of a filter's largest weight.

    Example:
        >>> mosaic(torch.randn(6, 4), (2, 2), columns=3).shape
        (5, 8)
    """
    height, width = shape
    rows = -(-len(filters) // columns)
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), 255, dtype=np.uint8)
    for k, tile in enumerate(filters.reshape(-1, height, width)):
        largest = limit * float(tile.abs().max())
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        # Thirty-two levels: nobody sees the others, and they are half of the file.
        levels = gray(tile, -largest, largest) // 8 * 8 + 4
        picture[top : top + height, left : left + width] = levels
    return picture


def picture(x: float, y: float, width: float, height: float, pixels: np.ndarray) -> str:
    """Pixels in a frame, each a square of its own so that no viewer blurs them."""
    times = max(1, round(2 * width / pixels.shape[1]))
    larger = pixels.repeat(times, 0).repeat(times, 1)
    where = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<image {where} preserveAspectRatio="none" href="{data_uri(larger)}"/>'


class Panel:
    """Axes with labels, and lines and marks in them.

    Args:
        left: Left end of the horizontal axis.
        top: Upper end of the vertical axis.
        width: Length of the horizontal axis.
        height: Length of the vertical axis.
        x: Range of the horizontal axis.
        y: Range of the vertical axis.
        title: Above the panel.
        x_label: Below it, with the unit.
        y_label: What the vertical axis shows, below the title, with the unit.
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the vertical axis.
        log: Whether the horizontal axis is logarithmic.

    Attributes:
        parts: What is drawn so far.

    Example:
        >>> panel = Panel(40, 40, 100, 80, (0, 1), (0, 1), "title", "lag, steps", "correlation")
        >>> panel.line([0, 1], [0, 1], 0)
        >>> figure(200, 160, panel.parts, "a line").count("<polyline")
        1
    """

    def __init__(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float],
        title: str,
        x_label: str,
        y_label: str,
        *,
        x_ticks: Sequence[float] = (),
        y_ticks: Sequence[float] = (),
        log: bool = False,
    ) -> None:
        self.x = Axis(*x, left, left + width, log)
        self.y = Axis(*y, top + height, top)
        self.parts = [
            text(left, top - 24, title, size=14),
            text(left, top - 8, y_label, cls="muted", size=11),
            text(left + width / 2, top + height + 34, x_label, anchor="middle", cls="muted",
                 size=11),
        ]  # fmt: skip
        for tick in y_ticks or self.y.ticks(4):
            where = self.y(tick)
            self.parts.append(line(left, where, left + width, where, "grid"))
            self.parts.append(
                text(left - 6, where + 4, compact(tick), anchor="end", cls="muted", size=11)
            )
        for tick in x_ticks or self.x.ticks(4):
            where, bottom = self.x(tick), top + height
            self.parts.append(line(where, bottom, where, bottom + 4))
            self.parts.append(
                text(where, bottom + 17, compact(tick), anchor="middle", cls="muted", size=11)
            )
        self.parts.append(line(left, top + height, left + width, top + height))

    def line(self, x: Sequence[float], y: Sequence[float], color: int) -> None:
        """A line through points."""
        points = [(self.x(a), self.y(b)) for a, b in zip(x, y, strict=True)]
        self.parts.append(polyline(points, f"c{color}"))

    def level(self, y: float, label: str, above: bool = True) -> None:
        """A dashed line across, with its name at the right end."""
        where = self.y(y)
        self.parts.append(line(self.x.start, where, self.x.end, where, "theory"))
        place = where - 6 if above else where + 14
        self.parts.append(text(self.x.end, place, label, anchor="end", cls="muted", size=11))

    def marks(self, x: Sequence[float], y: Sequence[float], color: int, size: float = 4) -> None:
        """Marks at points, hollow so that a line shows through."""
        for a, b in zip(x, y, strict=True):
            where = (self.x(a), self.y(b))
            self.parts.append(mark(*where, _SHAPES[color], f"h{color}", size=size))

    def error(self, x: float, low: float, high: float, color: int) -> None:
        """An upright bar from ``low`` to ``high``."""
        self.parts.append(line(self.x(x), self.y(low), self.x(x), self.y(high), f"c{color}"))

    def legend(self, x: float, y: float, names: Sequence[str], *, marked: bool = False) -> None:
        """Names of lines, one below the other, in the order of their colors, at a position."""
        for i, name in enumerate(names):
            where = y + 16 * i
            self.parts.append(line(x, where - 4, x + 18, where - 4, f"c{i}"))
            if marked:
                self.parts.append(mark(x + 9, where - 4, _SHAPES[i], f"h{i}", size=4))
            self.parts.append(text(x + 24, where, name, size=11))

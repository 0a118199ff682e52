"""One figure a study: from its numbers, of one run or more, and the pictures of its first run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.correspondences import wiring_figures
from benchmarks.studies.correspondences.drawing import (
    Panel,
    caption,
    figure,
    gray,
    mosaic,
    picture,
)
from benchmarks.svg import line, text

__all__ = [
    "FIGURES",
    "PRIORS",
    "STAGES",
    "iterations",
    "pattern_generator",
    "precision",
    "rao_ballard",
    "sparse_coding",
    "spread",
    "temporal_whitening",
    "whitening",
]

Numbers = Sequence[Mapping[str, Any]]
Pictures = Mapping[str, Tensor]

PRIORS = {
    "cauchy": "Cauchy prior",
    "laplace": "Laplace prior",
    "normal": "normal prior",
    "pca": "principal components",
}
STAGES = {
    "digits": "moving digits",
    "differences_1": "differences",
    "differences_2": "differences of differences",
    "flow_1": "one flow",
    "flow_2": "two stacked flows",
}


def spread(runs: Numbers, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a number over runs; 0 for one run.

    Example:
        >>> spread([{"a": 1.0}, {"a": 3.0}], "a")
        (2.0, 1.4142135623730951)
    """
    values = [float(run[name]) for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def whitening(runs: Numbers, pictures: Pictures) -> str:
    """Filters of ZCA, of the learned symmetric flow, of Cholesky; and cuts through the middle."""
    side = round(len(pictures["zca"]) ** 0.5)
    places = [side // 2 - side // 3, side // 2, side // 2 + side // 3]
    chosen = [side * row + column for row in places for column in places]
    middle = (side // 2) * side + side // 2
    (found,) = runs
    titles = {
        "zca": ("ZCA, closed form", f"surround / center {found['surround_over_center_zca']:.2f}"),
        "learned": (
            "symmetric flow, learned",
            f"correlation with ZCA {found['correlation_with_zca']:.3f}",
        ),
        "cholesky": ("triangular (Cholesky)", "each unit on those before it"),
    }
    parts = []
    for i, (name, (title, below)) in enumerate(titles.items()):
        left = 20.0 + 205 * i
        tiles = mosaic(pictures[name][chosen], (side, side), len(places), limit=0.4)
        parts.append(text(left, 26, title, size=14))
        parts.append(text(left, 42, below, cls="muted", size=11))
        parts.append(picture(left, 50, 190, 190, tiles))
    panel = Panel(
        680, 50, 200, 190, (-(side // 2), side // 2), (-0.6, 1.05),
        "a cut through the middle unit", "pixels to the right of the unit",
        "weight over that of the unit itself", y_ticks=(-0.5, 0, 0.5, 1),
        x_ticks=(-4, -2, 0, 2, 4),
    )  # fmt: skip
    right = list(range(-(side // 2), side // 2 + 1))
    for color, name in enumerate(("zca", "cholesky", "learned")):
        row = pictures[name][middle].reshape(side, side)[side // 2]
        cut = (row / row[side // 2]).tolist()
        if name == "learned":
            panel.marks(right, cut, 0)
        else:
            panel.line(right, cut, color)
    panel.legend(796, 74, ["ZCA", "Cholesky"])
    panel.parts.append(text(796, 106, "marks: learned", size=11))
    words = (
        "Filters of nine pixels of the patch, each at its place. Middle gray is zero; black and "
        "white are reached at .4 of a filter's largest weight."
    )
    parts += [*panel.parts, *caption(298, words)]
    return figure(900, 312, parts, "Whitening filters of natural patches")


def sparse_coding(runs: Numbers, pictures: Pictures) -> str:
    """Bases under three priors, and how well Gabor functions fit them."""
    return _bases(runs, pictures, ("cauchy", "laplace", "normal"), "Bases of sparse coding")


def rao_ballard(runs: Numbers, pictures: Pictures) -> str:
    """First-level bases of the two-level network, beside principal components."""
    return _bases(runs, pictures, ("cauchy", "normal", "pca"), "Bases of Rao and Ballard")


def _bases(runs: Numbers, pictures: Pictures, shown: Sequence[str], label: str) -> str:
    (found,) = runs
    parts = []
    number, size = pictures[shown[0]].shape
    side, columns = round(size**0.5), round(number**0.5)
    for i, name in enumerate(shown):
        left = 20.0 + 205 * i
        words = f"Gabor R\u00b2 {found[f'gabor_{name}']:.2f}, extent {found[f'extent_{name}']:.2f}"
        parts.append(text(left, 26, PRIORS[name], size=14))
        parts.append(text(left, 42, words, cls="muted", size=11))
        parts.append(picture(left, 50, 190, 190, mosaic(pictures[name], (side, side), columns)))
    panel = Panel(
        680, 50, 200, 190, (0, 100), (0, 1), "how Gabor-like they are",
        "filters with a better fit, %", "R\u00b2 of the best Gabor function",
        x_ticks=(0, 25, 50, 75, 100), y_ticks=(0, 0.25, 0.5, 0.75, 1),
    )  # fmt: skip
    names = [name for name in PRIORS if f"gabor, {name}" in pictures]
    for color, name in enumerate(names):
        fits = pictures[f"gabor, {name}"].sort(descending=True).values
        panel.line(torch.linspace(0, 100, len(fits)).tolist(), fits.tolist(), color)
    parts += panel.parts
    for color, name in enumerate(names):
        parts.append(text(44.0 + 165 * color, 262, PRIORS[name], size=11))
        parts.append(line(20.0 + 165 * color, 258, 38.0 + 165 * color, 258, f"c{color}"))
    words = f"Basis vectors of {side} x {side} pixels, middle gray is zero; medians over vectors."
    parts += caption(282, words)
    return figure(900, 296, parts, label)


def temporal_whitening(runs: Numbers, pictures: Pictures) -> str:
    """What each stage leaves of one sequence, and the lag-one correlation of all."""
    side = round(pictures["digits"].shape[1] ** 0.5)
    frames = range(4, 14)
    parts = []
    for i, (name, title) in enumerate(STAGES.items()):
        top = 26.0 + 68 * i
        values = pictures[name][list(frames)].reshape(-1, side, side)
        largest = float(values.abs().quantile(0.998))
        tiles = [gray(frame, -largest, largest) for frame in values]
        strip = np.full((side, len(tiles) * (side + 1) - 1), 255, dtype=np.uint8)
        for k, tile in enumerate(tiles):
            strip[:, k * (side + 1) : k * (side + 1) + side] = tile
        parts.append(text(20, top, title, size=12))
        parts.append(picture(20, top + 5, 508, 48, strip))
    panel = Panel(
        700, 50, 180, 270, (-0.6, 0.8), (0, 5), "what a frame tells the next",
        "correlation with the frame before", "", x_ticks=(-0.5, 0, 0.5), y_ticks=(),
    )  # fmt: skip
    panel.parts = [part for part in panel.parts if 'class="grid"' not in part]
    panel.parts = [part for part in panel.parts if 'text-anchor="end"' not in part]
    for i, (name, title) in enumerate(STAGES.items()):
        mean, deviation = spread(runs, f"lag_one_{name}")
        y = 4.5 - i
        panel.parts.append(text(690, panel.y(y) + 4, title, anchor="end", size=11))
        panel.line([0, mean], [y, y], i)
        panel.marks([mean], [y], i)
        words = f"{mean:.3f}" + (f" \u00b1 {deviation:.3f}" if deviation > 0 else "")
        beside = panel.x(max(mean, 0)) + 10
        panel.parts.append(text(beside, panel.y(y) + 4, words, size=11))
    zero = panel.x(0)
    panel.parts.append(f'<line x1="{zero:.1f}" y1="50" x2="{zero:.1f}" y2="320" class="rule"/>')
    words = (
        "Frames 5 to 14 of a test sequence; middle gray is zero, black and white are reached by "
        "one pixel in 500 of a strip."
    )
    parts += [*panel.parts, *caption(372, words)]
    return figure(900, 388, parts, "Temporal whitening of moving digits")


def pattern_generator(runs: Numbers, pictures: Pictures) -> str:
    """A movement that was learned, one that was made of noise, and correlations of all."""
    parts = []
    for i, name in enumerate(("training", "generated")):
        panel = Panel(
            56 + 230 * i, 50, 190, 190, (0, 64), (-1.8, 1.8),
            {"training": "round a handwritten zero", "generated": "made from white noise"}[name],
            "step", "place of the pen, across and down", x_ticks=(0, 16, 32, 48, 64),
            y_ticks=(-1, 0, 1),
        )  # fmt: skip
        for joint in range(2):
            movement = pictures[name][:, joint].tolist()
            panel.line(list(range(len(movement))), movement, joint)
        parts += panel.parts
    curves = {name: pictures[f"correlation, {name}"] for name in ("training", "generated")}
    lags = list(range(len(curves["training"])))
    panel = Panel(
        530, 50, 350, 190, (0, lags[-1]), (-1, 1), "correlations", "lag, steps",
        "correlation",
        x_ticks=(0, 8, 16, 24, 32), y_ticks=(-1, -0.5, 0, 0.5, 1),
    )  # fmt: skip
    panel.line(lags, pictures["correlation, whitened"][:, 0, 0].tolist(), 5)
    for color, (i, j) in enumerate(((0, 0), (1, 0))):
        panel.line(lags, curves["training"][:, i, j].tolist(), color)
        panel.marks(lags, curves["generated"][:, i, j].tolist(), color, size=3)
    parts += panel.parts
    for color, name in enumerate(("across with itself", "down with across before")):
        parts.append(line(700, 60 + 16 * color, 718, 60 + 16 * color, f"c{color}"))
        parts.append(text(724, 64 + 16 * color, name, size=11))
    words = (
        "Correlations: lines, of the training set; marks, of what is made from noise; gray, of "
        "what the flow leaves of other zeros, across with itself."
    )
    parts += caption(302, words)
    return figure(900, 316, parts, "A flow run in the generating direction")


def precision(runs: Numbers, pictures: Pictures) -> str:
    """Gain, uncertainty and error of a unit against its precision."""
    titles = {
        "gain": ("gain of the unit", "how far its prediction follows it", (0.0, 1.0)),
        "std": ("uncertainty", "posterior std of its prediction", (0.0, 0.6)),
        "error": ("error left", "mean |x - prediction|", (0.0, 0.6)),
    }
    parts = []
    grid, gains = pictures["grid"].tolist(), pictures["precision"].tolist()
    for i, (name, (title, label, limits)) in enumerate(titles.items()):
        panel = Panel(
            56 + 290 * i, 50, 230, 170, (gains[0], gains[-1]), limits, title,
            "precision, times that of other units", label,
            x_ticks=(0.1, 1, 10, 100), y_ticks=[limits[1] * k / 4 for k in range(5)], log=True,
        )  # fmt: skip
        panel.line(grid, pictures[f"exact {name}"].tolist(), 5)
        panel.marks(gains, pictures[name].tolist(), 0)
        parts += panel.parts
    words = "Line: closed form. Marks: predictive coding, its fixed point and Laplace posterior."
    parts += caption(282, words)
    return figure(900, 296, parts, "What the precision of a unit does")


def iterations(runs: Numbers, pictures: Pictures) -> str:
    """How far a filter's bound is below the evidence, against iterations a time step."""
    counts = pictures["iterations"].tolist()
    gaps = [[float(found[f"below_{count}"]) for count in counts] for found in runs]
    panel = Panel(
        70, 50, 420, 200, (0.9, 9), (0.0, 0.25 + max(map(max, gaps))),
        "amortized variational filtering", "inference iterations at every time step",
        "log evidence less bound, held out, nats a time step", x_ticks=counts, log=True,
        y_ticks=(0, 0.5, 1.0, 1.5),
    )  # fmt: skip
    for number, gap in enumerate(gaps):
        panel.line(counts, gap, number)
        panel.marks(counts, gap, number)
    for i, count in enumerate(counts):
        mean = sum(gap[i] for gap in gaps) / len(gaps)
        highest = max(gap[i] for gap in gaps)
        anchor, aside = ("end", 0.0) if i == len(counts) - 1 else ("start", 4.0)
        place = panel.x(count) + aside, panel.y(highest) - 10
        panel.parts.append(text(*place, f"{mean:.2f}", anchor=anchor))
    words = f"A line a seed: model, data and filters. Numbers: means of {len(runs)}."
    panel.parts += caption(312, words)
    return figure(520, 326, panel.parts, "The bound by inference iterations a time step")


FIGURES: dict[str, Callable[[Numbers, Pictures], str]] = {
    "whitening": whitening,
    "sparse_coding": sparse_coding,
    "rao_ballard": rao_ballard,
    "temporal_whitening": temporal_whitening,
    "pattern_generator": pattern_generator,
    "precision": precision,
    "iterations": iterations,
    "error_units": wiring_figures.error_units,
    "level_gradients": wiring_figures.level_gradients,
    "separate_inputs": wiring_figures.separate_inputs,
}

"""Figures of the wiring: error units, gradients of one level, and two inputs apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.correspondences.drawing import Panel, caption, figure, gray, picture
from benchmarks.studies.correspondences.wiring import INPUTS, MOVED
from benchmarks.svg import line, text

__all__ = ["error_units", "level_gradients", "separate_inputs"]

Numbers = Sequence[Mapping[str, Any]]
Pictures = Mapping[str, Tensor]


def error_units(runs: Numbers, pictures: Pictures) -> str:
    """Patches and their errors, units that come to rest, inhibition, and what cutting it does."""
    (found,) = runs
    side = round(len(pictures["poked"]) ** 0.5)
    parts = []
    titles = {"patch": "patch", "prediction": "predicted", "error": "error"}
    titles |= {"weighted error": "its units"}
    # Four patches that are not flat, and of a row one scale for all but its error units.
    shown = pictures["patch"].std(-1).argsort(descending=True)[:16:4]
    scales = pictures["patch"][shown].abs().amax(-1)
    for i, (name, title) in enumerate(titles.items()):
        left = 20.0 + 56 * i
        values = pictures[name][shown].reshape(-1, side, side)
        own_scale = values.flatten(1).abs().amax(-1)
        tiles = np.full((4 * (side + 1) - 1, side), 255, dtype=np.uint8)
        for k, tile in enumerate(values):
            largest = float((own_scale if name == "weighted error" else scales)[k])
            tiles[k * (side + 1) : k * (side + 1) + side] = gray(tile, -largest, largest)
        parts.append(text(left, 42, title, cls="muted", size=10))
        parts.append(picture(left, 50, 48, 48 * tiles.shape[0] / side, tiles))
    parts.append(text(20, 26, "relaxed on natural patches", size=14))
    times = pictures["time"].tolist()
    rest = {name: float(pictures[f"{name} at rest"]) for name in ("errors", "estimates")}
    most = 1.2 * max(float(pictures[name].max()) for name in rest)
    panel = Panel(
        288, 50, 160, 190, (times[0], times[-1]), (0, most), "units come to rest",
        "time, constants of a unit", "rms activity", x_ticks=(0.01, 1, 100), log=True,
    )  # fmt: skip
    for color, name in enumerate(rest):
        panel.line(times, pictures[name].tolist(), color)
        panel.marks([times[-1]], [rest[name]], color)
    panel.legend(296, 64, list(rest))
    parts += panel.parts
    middle = side // 2
    places = list(range(-middle, side - middle))
    row = slice(middle * side, (middle + 1) * side)
    own = float(pictures["precision"][middle * side + middle])
    panel = Panel(
        502, 50, 160, 190, (places[0], places[-1]), (-0.4, 1.05), "a pixel too bright",
        "pixels to the right of it", "response over that of its own unit",
        x_ticks=(-4, -2, 0, 2), y_ticks=(-0.25, 0, 0.25, 0.5, 0.75, 1),
    )  # fmt: skip
    panel.line(places, (pictures["precision"][row] / own).tolist(), 5)
    panel.marks(places, (pictures["poked"][row] / own).tolist(), 0)
    parts += panel.parts
    some = slice(0, 40)
    widest, ticks = 2.2, (-2, 0, 2)
    panel = Panel(
        716, 50, 164, 190, (-widest, widest), (-widest, widest), "estimates",
        "by predictive coding", "by the network",
        x_ticks=ticks, y_ticks=ticks,
    )  # fmt: skip
    relaxed = pictures["relaxed"][some].flatten().tolist()
    panel.marks(relaxed, pictures["cut"][some].flatten().tolist(), 1, size=2)
    panel.marks(relaxed, pictures["found"][some].flatten().tolist(), 0, size=2)
    parts += panel.parts
    off = 100 * found["estimates_without_inhibition"]
    captions = (
        "Left: middle gray is zero; one scale in a row, but for its error units. Second: marks at "
        "the end are predictive coding.",
        "Third: circles, error units that inhibit each other, estimates held; line, a row of the "
        "precision matrix.",
        "Last: circles, the network; squares, a network whose error units inhibit themselves "
        f"alone: estimates {off:.0f}% off, {found['energy_above_least']:.2f} nats of energy more.",
    )
    parts += caption(296, *captions)
    return figure(900, 342, parts, "Error units that inhibit each other weigh by precision")


def level_gradients(runs: Numbers, pictures: Pictures) -> str:
    """Gradients of every level: alone, and through samples, against those of the whole bound."""
    (found,) = runs
    titles = {"z2": "z2 given z3", "z1": "z1 given z2", "x": "pixels given z1"}
    parts = []
    for i, (name, title) in enumerate(titles.items()):
        whole = pictures[f"whole, {name}"]
        chosen = torch.arange(0, len(whole), -(-len(whole) // 200))
        size = whole.square().mean().sqrt()
        shown = {kind: pictures[f"{kind}, {name}"][chosen] / size for kind in ("alone", "through")}
        across = (whole[chosen] / size).tolist()
        difference = found[f"difference_{name}"]
        through = found[f"correlation_through_samples_{name}"]
        words = f"{difference:.0e}" if difference else "none"
        words = f"largest difference: {words}; gray: r = {through:.2f}"
        panel = Panel(
            56 + 290 * i, 50, 230, 190, (-3, 3), (-3, 3), title,
            "gradient of the whole bound", words,
            x_ticks=(-3, 0, 3), y_ticks=(-3, 0, 3),
        )  # fmt: skip
        panel.marks(across, shown["through"].tolist(), 5, size=2)
        panel.marks(across, shown["alone"].tolist(), 0, size=2.5)
        parts += panel.parts
    captions = (
        "A mark a weight, in units of the root mean square of the level; what lies outside is at "
        "the border. Upright, circles: of the level's own term, samples fixed;",
        "gray squares: of the pixels' term, which reaches the level through samples that it makes "
        "of noise. Below z1 there is nothing to pass through.",
    )
    parts += caption(298, *captions)
    return figure(900, 328, parts, "Gradients of a level from the level alone")


def separate_inputs(runs: Numbers, pictures: Pictures) -> str:
    """How far each input of the encoder moves, for everything that was moved."""
    changes = pictures["changes"]
    heads = {
        "z2": ("errors of z2", "own level of z2"),
        "z1": ("errors of z1", "own level of z1, below z2"),
        "x": ("errors of the pixels", "below z1"),
    }
    parts = [
        text(20, 30, "what is moved", size=14),
        text(200, 30, "inputs of the encoder", size=14),
    ]
    for j, name in enumerate(INPUTS):
        title, below = heads[name]
        parts.append(text(200.0 + 170 * j, 50, title, size=12))
        parts.append(text(200.0 + 170 * j, 65, below, cls="muted", size=11))
    most = float(changes.max())
    for i, moved in enumerate(MOVED):
        top = 76.0 + 34 * i
        parts.append(text(20, top + 19, moved, size=12))
        for j in range(len(INPUTS)):
            value, left = float(changes[i, j]), 200.0 + 170 * j
            parts.append(line(left, top + 28, left + 150, top + 28, "grid"))
            words = f"{100 * value:.0f}%" if value > 0 else "0, bit for bit"
            if value > 0:
                wide = 90 * value / most
                parts.append(
                    f'<rect x="{left:g}" y="{top + 6:g}" width="{wide:.1f}" height="18" '
                    'class="f0"/>'
                )
                parts.append(text(left + wide + 6, top + 19, words, size=11))
            else:
                parts.append(text(left, top + 19, words, cls="muted", size=11))
    words = "Bars: how far the input moves, relative to its size (norms over held-out digits)."
    parts += caption(302, words)
    return figure(720, 316, parts, "Errors from below and of the own level are separate inputs")

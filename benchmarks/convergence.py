"""Convergence: whether learning curves were still rising when the updates ended.

A method that was stopped on its way up has a score of its budget, not of its guide, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LAST", "Rise", "elbo_at", "rise_of"]

Record = Mapping[str, Any]

LAST = 0.4
"""The part of the updates, at the end, over which a curve is looked at."""


@dataclass(frozen=True)
class Rise:
    """How far a curve rose over the last part of its updates, a mean over seeds.

    Args:
        value: The rise, in the units of the curve.
        climb: The rise from the first point of the curve to its last.
        error: Standard error of `value`.
        joint: Whether the curve is one of the whole data set and not one per row.

    Example:
        >>> from benchmarks.convergence import Rise
        >>> Rise(0.2, 20.0, 0.01).going_on, Rise(0.2, 2.0, 0.01).going_on
        (False, True)
    """

    value: float
    climb: float
    error: float
    joint: bool = False

    @property
    def going_on(self) -> bool:
        """Whether it had not converged.

        Step sizes fall over a run, which quiets the noise and lifts the end of any curve a
        little: up to 5 % of the climb is let pass, but no more than half a nat per row, or one
        nat of the whole data set.
        """
        most = 1.0 if self.joint else 0.5
        return self.value > max(2 * self.error, min(0.05 * self.climb, most), 0.02)


def elbo_at(point: Mapping[str, Any], joint: bool) -> float:
    """Return the ELBO of a point of a curve, that of all rows together if `joint`."""
    value = float(point["elbo"])
    return value * point.get("rows", 1) if joint else value


def rise_of(runs: Sequence[Record], *, joint: bool = False) -> Rise | None:
    """Return the rise of a method's curves; None where they end at a mode or have few points.

    Args:
        runs: Finished runs of one method, one a seed.
        joint: Whether the standings are of the whole data set.
    """
    rises, climbs, errors = [], [], []
    for run in runs:
        curve = run["curve"]
        relaxed = run["loop"] == "predictive_coding" and run["regime"] == "frozen"
        if len(curve) < 3 or relaxed:
            continue
        last = curve[-1]
        # Free points end at their mode, which Newton steps find after the last update.
        if last["step"] > run.get("config", {}).get("num_steps", math.inf):
            continue
        before = [point for point in curve if point["step"] <= (1 - LAST) * last["step"]]
        if not before:
            continue
        rises.append(elbo_at(last, joint) - elbo_at(before[-1], joint))
        climbs.append(elbo_at(last, joint) - min(elbo_at(point, joint) for point in curve))
        error = math.hypot(last.get("error", 0.0), before[-1].get("error", 0.0))
        errors.append(error * last.get("rows", 1) if joint else error)
    if not rises:
        return None
    num = len(rises)
    return Rise(
        sum(rises) / num, sum(climbs) / num, math.sqrt(sum(e * e for e in errors)) / num, joint
    )

"""Differences: means, paired differences and their standard errors, from recorded rows alone.

With S seeds and B rows, let d[s, i] be a score of row i in run s, or the difference of two methods
there. The estimate is the mean over both; its variance is

    var_i( mean_s d ) / B    +    var_s( mean_i d ) / S    (the second term from two seeds on)

the first because other rows could have been held out, the second because other seeds could have
been drawn. The two overlap a little, so the error is rather too large than too small. Joint scores
have no rows: there the first term is the Monte Carlo variance of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Estimate", "estimate", "has_score", "is_joint", "paired", "pool", "rows_of"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Args:
        value: The mean; NaN where a run gave no finite number.
        standard_error: Its standard error.
        per_seed: The mean of every seed.
        num_rows: Rows behind it; None for a joint score.
    """

    value: float
    standard_error: float
    per_seed: tuple[float, ...]
    num_rows: int | None

    @property
    def low(self) -> float:
        """Two standard errors below."""
        return self.value - 2 * self.standard_error

    @property
    def high(self) -> float:
        """Two standard errors above."""
        return self.value + 2 * self.standard_error

    @property
    def finite(self) -> bool:
        """Whether there is a number at all."""
        return math.isfinite(self.value)


def rows_of(run: Record, score: str) -> np.ndarray | None:
    """Return a run's score row by row `(B,)`, or None where the score is joint."""
    values = run.get("rows", {}).get(score)
    if values is None:
        return None
    return np.array([math.nan if value is None else value for value in values])


def has_score(run: Record, score: str) -> bool:
    """Whether a run has a score at all: a point that is no mode has no ELBO."""
    return score in run.get("rows", {}) or score in run["scores"]


def pool(rows: Sequence[np.ndarray]) -> Estimate:
    """Return the mean of rows `(B,)`, one array a seed, with its standard error."""
    table = np.stack(rows)  # (S, B)
    num_seeds, num_rows = table.shape
    variance = table.mean(0).var(ddof=1) / num_rows if num_rows > 1 else 0.0
    if num_seeds > 1:
        variance += table.mean(1).var(ddof=1) / num_seeds
    return Estimate(
        float(table.mean()), math.sqrt(variance), tuple(map(float, table.mean(1))), num_rows
    )


def _pool_joint(values: Sequence[float], errors: Sequence[float]) -> Estimate:
    array = np.array(values)
    variance = float(np.mean(np.square(errors))) / len(array)
    if len(array) > 1:
        variance += float(array.var(ddof=1)) / len(array)
    return Estimate(float(array.mean()), math.sqrt(variance), tuple(map(float, array)), None)


def _total(run: Record, score: str) -> tuple[float, float]:
    """A score of the whole data set, with its Monte Carlo error."""
    summary = run["scores"][score]
    value, error = summary["total"], summary["total_error"]
    return (math.nan if value is None else value, math.nan if error is None else error)


def is_joint(runs: Iterable[Record]) -> bool:
    """Whether any run has joint scores, so that all must be compared by totals."""
    return any(run["scores"]["log_evidence"]["joint"] for run in runs)


def estimate(runs: Sequence[Record], score: str, *, joint: bool = False) -> Estimate | None:
    """Return the mean of a score over the seeds of one method.

    Args:
        runs: Finished runs of one method, one a seed.
        score: `elbo`, `log_evidence` or another recorded score.
        joint: Whether to take totals even where there are rows.

    Returns:
        The estimate, per row or of the total; None where no run has this score.
    """
    runs = [run for run in runs if has_score(run, score)]
    if not runs:
        return None
    rows = [rows_of(run, score) for run in runs]
    known = [item for item in rows if item is not None]
    if not joint and len(known) == len(runs) and len({len(item) for item in known}) == 1:
        return pool(known)
    if any(score not in run["scores"] for run in runs):
        return None
    values, errors = zip(*(_total(run, score) for run in runs), strict=True)
    return _pool_joint(values, errors)


def paired(
    runs: Sequence[Record],
    others: Sequence[Record],
    score: str,
    other_score: str | None = None,
    *,
    joint: bool = False,
) -> Estimate | None:
    """Return the mean difference of two methods, paired by seed and row.

    Args:
        runs: Runs of the one method.
        others: Runs of the other.
        score: The score of the one.
        other_score: The score of the other; the same by default.
        joint: Whether to take totals even where both have rows.

    Returns:
        The estimate of `score(runs) - score(others)`; None where no seed is in both. In the
        frozen regime only runs on the very same model are paired.
    """
    other_score = score if other_score is None else other_score
    there = {(run["seed"], _ground(run)): run for run in others}
    pairs = [
        (run, there[run["seed"], _ground(run)])
        for run in sorted(runs, key=lambda item: item["seed"])
        if (run["seed"], _ground(run)) in there
        and has_score(run, score)
        and has_score(there[run["seed"], _ground(run)], other_score)
    ]
    if not pairs:
        return None
    differences = []
    for run, other in [] if joint else pairs:
        left, right = rows_of(run, score), rows_of(other, other_score)
        if left is None or right is None or len(left) != len(right):
            break
        differences.append(left - right)
    if len(differences) == len(pairs):
        return pool(differences)
    lefts = [_total(run, score) for run, _ in pairs]
    rights = [_total(other, other_score) for _, other in pairs]
    values = [left[0] - right[0] for left, right in zip(lefts, rights, strict=True)]
    errors = [math.hypot(left[1], right[1]) for left, right in zip(lefts, rights, strict=True)]
    return _pool_joint(values, errors)


def _ground(run: Record) -> str:
    """What must be the same for two runs to be paired."""
    return str(run["model_digest"]) if run["regime"] == "frozen" else ""

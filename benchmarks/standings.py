"""Standings: the runs of one task and one regime, put in order by what the regime can judge.

Jointly trained models differ, so they are ordered by their evidence. On a frozen, shared model the
evidence is the same for all, and guides are ordered by their ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.differences import Estimate, estimate, is_joint, paired

__all__ = ["Check", "Losses", "Place", "Standings", "standings"]

Record = dict[str, Any]
SCORE = {"joint": "log_evidence", "frozen": "elbo"}


@dataclass(frozen=True)
class Place:
    """One method's place.

    Args:
        method: Its name.
        runs: Its finished runs.
        failures: Its failed runs.
        elbo: Mean ELBO.
        evidence: Mean importance-weighted evidence.
        difference: Paired difference to the baseline in the score of the regime.
        gap: Evidence minus ELBO on the method's own model.
        khat: Median Pareto k-hat over rows and seeds.
        khat_above: Share of rows, over seeds, where k-hat is above its threshold.
        gradient_evaluations: Mean over seeds, training and held-out rows together.
        seconds: Mean over seeds, training and held-out rows together.
    """

    method: str
    runs: tuple[Record, ...]
    failures: tuple[Record, ...]
    elbo: Estimate | None
    evidence: Estimate | None
    difference: Estimate | None
    gap: Estimate | None
    khat: float
    khat_above: float
    gradient_evaluations: float
    seconds: float

    @property
    def example(self) -> Record:
        """Any of its runs, for what all of them share."""
        return (self.runs or self.failures)[0]

    def score(self, name: str) -> Estimate | None:
        """The estimate that a regime orders by."""
        return self.elbo if name == "elbo" else self.evidence


@dataclass(frozen=True)
class Check:
    """One inequality that theory demands: `higher - lower >= 0`, within two standard errors."""

    lower: str
    higher: str
    difference: Estimate

    @property
    def holds(self) -> bool:
        """Whether it is met within two standard errors."""
        return self.difference.high >= 0


@dataclass(frozen=True)
class Losses:
    """Where a family of guides loses nats on a shared model.

    Args:
        family: The family.
        approximation: Evidence minus ELBO of the Local guide: what the best of the family misses.
        amortization: ELBO of the Local guide minus that of the encoder; None without an encoder.
    """

    family: str
    approximation: Estimate
    amortization: Estimate | None


@dataclass(frozen=True)
class Standings:
    """All methods of a task in a regime, best first.

    Args:
        task: Name of the task.
        regime: `joint` or `frozen`.
        score: What they are ordered by.
        baseline: The method that differences are taken to.
        places: Methods in order; those without a finished run come last.
        checks: The expected order, measured.
        joint_score: Whether scores are totals of the whole data set rather than means over rows,
            which is so as soon as one method has only totals.
        losses: What families lose by their shape and by their encoder, on a frozen model.
    """

    task: str
    regime: str
    score: str
    baseline: str
    places: tuple[Place, ...]
    checks: tuple[Check, ...]
    joint_score: bool = False
    losses: tuple[Losses, ...] = ()

    @property
    def unit(self) -> str:
        """Unit of the scores."""
        return "nats in all" if self.joint_score else "nats per row"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _place(
    method: str, runs: Sequence[Record], base: Sequence[Record], score: str, joint: bool
) -> Place:
    runs = sorted(runs, key=lambda run: run["seed"])
    done = [run for run in runs if run["status"] == "ok"]
    khats = [
        value
        for run in done
        for value in run["rows"].get("khat", [run["scores"]["khat"]["median"]])
    ]
    known = [value for value in khats if value is not None]
    return Place(
        method=method,
        runs=tuple(done),
        failures=tuple(run for run in runs if run["status"] != "ok"),
        elbo=estimate(done, "elbo", joint=joint),
        evidence=estimate(done, "log_evidence", joint=joint),
        difference=paired(done, base, score, joint=joint) if done and base else None,
        gap=paired(done, done, "log_evidence", "elbo", joint=joint),
        khat=float(np.median(known)) if known else math.nan,
        khat_above=_mean([run["scores"]["khat"]["above"] for run in done]),
        gradient_evaluations=_mean([sum(run["gradient_evaluations"].values()) for run in done]),
        seconds=_mean([sum(run["wall_seconds"].values()) for run in done]),
    )


def _checks(order: Sequence[str], runs: Mapping[str, Sequence[Record]]) -> list[Check]:
    done = {name: [run for run in runs.get(name, ()) if run["status"] == "ok"] for name in order}
    found = []
    for lower, higher in pairwise(order):
        difference = paired(done[higher], done[lower], "elbo")
        if difference is not None:
            found.append(Check(f"ELBO of {lower}", f"ELBO of {higher}", difference))
    if order:
        last = order[-1]
        difference = paired(done[last], done[last], "log_evidence", "elbo")
        if difference is not None:
            num = done[last][0]["scores"]["log_evidence"]["num_samples"]
            found.append(Check(f"ELBO of {last}", f"evidence (K = {num})", difference))
    return found


def _losses(places: Sequence[Place], joint: bool) -> list[Losses]:
    cells = {
        (place.example["family"], place.example["scheme"]): place
        for place in places
        if place.runs and place.example["loop"] == "svi"
    }
    found = []
    for (family, scheme), place in cells.items():
        if scheme != "Local" or place.gap is None or family == "delta":
            continue
        encoder = cells.get((family, "Encoder"))
        loss = None if encoder is None else paired(place.runs, encoder.runs, "elbo", joint=joint)
        found.append(Losses(family, place.gap, loss))
    return found


def standings(runs: Sequence[Record], tasks: Mapping[str, Record]) -> list[Standings]:
    """Return one table for every task and regime that has runs.

    Args:
        runs: The latest runs of a folder.
        tasks: Task records by name.
    """
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for run in runs:
        methods = groups.setdefault((run["task"], run["regime"]), {})
        methods.setdefault(run["method"], []).append(run)
    tables = []
    for (task, regime), methods in groups.items():
        about = tasks.get(task, {})
        score = SCORE[regime]
        done = {
            name: [run for run in items if run["status"] == "ok"]
            for name, items in methods.items()
        }
        finished = [name for name in done if done[name]]
        baseline = about.get("baseline")
        if baseline not in finished:
            baseline = finished[0] if finished else next(iter(methods))
        joint = is_joint(run for items in done.values() for run in items)
        places = [
            _place(name, items, done[baseline], score, joint) for name, items in methods.items()
        ]
        places.sort(key=lambda place: _rank(place, score))
        losses = tuple(_losses(places, joint)) if regime == "frozen" else ()
        checks = _checks(about.get("expected_order", ()), methods) if regime == "frozen" else []
        tables.append(
            Standings(task, regime, score, baseline, tuple(places), tuple(checks), joint, losses)
        )
    return tables


def _rank(place: Place, score: str) -> tuple[bool, float]:
    """Best paired difference first; what did not finish last."""
    value = place.difference or place.score(score)
    if value is None or not value.finite:
        return True, 0.0
    return False, -value.value

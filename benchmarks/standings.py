"""Standings: the runs of one task and one regime, put in order by what the regime can judge.

Jointly trained models differ, so they are ordered by their evidence. On a frozen, shared model the
evidence is the same for all, and guides are ordered by their ELBO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.convergence import Rise, rise_of
from benchmarks.differences import Estimate, estimate, is_joint, paired
from benchmarks.losses import Losses, losses_of

__all__ = ["Check", "Place", "Standings", "standings"]

Record = dict[str, Any]
SCORE = {"joint": "log_evidence", "frozen": "elbo"}


@dataclass(frozen=True)
class Place:
    """One method's place.

    Args:
        method: Its name.
        runs: Its finished runs.
        failures: Its failed runs.
        refusals: Its refused runs: a target or minibatches that it is not made for.
        elbo: Mean ELBO.
        evidence: Mean importance-weighted evidence.
        difference: Paired difference to the baseline in the score of the regime.
        gap: Evidence minus ELBO on the method's own model.
        khat: Median Pareto k-hat over rows and seeds.
        khat_above: Share of rows, over seeds, where k-hat is above its threshold.
        gradient_evaluations: Mean over seeds, training and held-out rows together.
        seconds: Mean over seeds, training and held-out rows together.
        rise: How far its learning curve rose at the end; None where it ends at a mode.
    """

    method: str
    runs: tuple[Record, ...]
    failures: tuple[Record, ...]
    refusals: tuple[Record, ...]
    elbo: Estimate | None
    evidence: Estimate | None
    difference: Estimate | None
    gap: Estimate | None
    khat: float
    khat_above: float
    gradient_evaluations: float
    seconds: float
    rise: Rise | None = None

    @property
    def example(self) -> Record:
        """Any of its runs, for what all of them share."""
        return (self.runs or self.failures or self.refusals)[0]

    @property
    def converged(self) -> bool:
        """Whether its learning curve had flattened when its updates ended."""
        return self.rise is None or not self.rise.going_on

    @property
    def trouble(self) -> str:
        """Why nothing of it can be ranked, in two words; empty if something can."""
        if self.runs:
            return ""
        if self.failures:
            return "failed"
        why = self.refusals[0]["refusal"]["why"]
        return {"minibatches": "wrong on minibatches", "latents": "too many latents"}.get(
            why, "refused"
        )

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
        truth: What stands for log p(x) there, in words.
        left_out: Cells of the default grid that do not apply to the task, and why.
    """

    task: str
    regime: str
    score: str
    baseline: str
    places: tuple[Place, ...]
    checks: tuple[Check, ...]
    joint_score: bool = False
    losses: tuple[Losses, ...] = ()
    truth: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)

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
        if "khat" in run["scores"]
        for value in run["rows"].get("khat", [run["scores"]["khat"]["median"]])
    ]
    known = [value for value in khats if value is not None]
    return Place(
        method=method,
        runs=tuple(done),
        failures=tuple(run for run in runs if run["status"] == "failed"),
        refusals=tuple(run for run in runs if run["status"] == "refused"),
        elbo=estimate(done, "elbo", joint=joint),
        evidence=estimate(done, "log_evidence", joint=joint),
        difference=paired(done, base, score, joint=joint) if done and base else None,
        gap=paired(done, done, "log_evidence", "elbo", joint=joint),
        khat=float(np.median(known)) if known else math.nan,
        khat_above=_mean(
            [run["scores"]["khat"]["above"] for run in done if "khat" in run["scores"]]
        ),
        gradient_evaluations=_mean([sum(run["gradient_evaluations"].values()) for run in done]),
        seconds=_mean([sum(run["wall_seconds"].values()) for run in done]),
        rise=rise_of(done, joint=joint),
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
        losses, truth = losses_of(places, joint) if regime == "frozen" else ([], "")
        checks = _checks(about.get("expected_order", ()), methods) if regime == "frozen" else []
        tables.append(
            Standings(
                task=task,
                regime=regime,
                score=score,
                baseline=baseline,
                places=tuple(places),
                checks=tuple(checks),
                joint_score=joint,
                losses=tuple(losses),
                truth=truth,
                left_out=dict(about.get("left_out", {})),
            )
        )
    return tables


def _rank(place: Place, score: str) -> tuple[bool, float]:
    """Best paired difference first; what did not finish last."""
    value = place.difference or place.score(score)
    if value is None or not value.finite:
        return True, 0.0
    return False, -value.value

"""Losses: the two gaps of a guide on a shared model, from the runs of all methods.

References:
    | Inference suboptimality in variational autoencoders (Cremer, Li & Duvenaud, 2018)
    | https://arxiv.org/abs/1801.03558
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.differences import Estimate, has_score, paired
from benchmarks.words import FLOWS

if TYPE_CHECKING:
    from benchmarks.standings import Place

__all__ = ["Losses", "losses_of"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Losses:
    """Where a guide loses nats on a shared model: two gaps that add up to a third.

    Args:
        family: Its family.
        method: Its name; that of the Local guide where no amortized one is compared.
        approximation: log p(x) minus ELBO of the family's Local guide: what the best of the
            family misses.
        amortization: ELBO of the Local guide minus that of this method; None for the Local guide
            itself.
        total: log p(x) minus ELBO of this method.
        shared_flow: Whether the Local guide is a flow whose weights all rows share, and so not
            quite the best of the family for every row.
    """

    family: str
    method: str
    approximation: Estimate
    amortization: Estimate | None
    total: Estimate
    shared_flow: bool = False


def _reference(places: Sequence[Place]) -> tuple[Sequence[Record], str, str]:
    """What stands for log p(x): runs, the name of their score, and what it is in words.

    Without an exact value it is the highest of all importance-weighted bounds, that of one method
    for all seeds and rows.
    """
    runs = [run for place in places for run in place.runs]
    exact = [run for run in runs if has_score(run, "exact_log_evidence")]
    if exact:
        first = {run["seed"]: run for run in exact}
        return list(first.values()), "exact_log_evidence", "exact"
    ranked = [place for place in places if place.evidence is not None and place.evidence.finite]
    if not ranked:
        return [], "log_evidence", ""
    seeds = max(len(place.runs) for place in ranked)
    full = [place for place in ranked if len(place.runs) == seeds]
    # By its lower end: the highest of many noisy bounds would be the noisiest.
    best = max(full, key=lambda place: place.evidence.low if place.evidence else -math.inf)
    num = best.runs[0]["scores"]["log_evidence"]["num_samples"]
    words = f"importance-weighted bound, K = {num}, with draws of {best.method}"
    return best.runs, "log_evidence", words


def losses_of(places: Sequence[Place], joint: bool) -> tuple[list[Losses], str]:
    """Gaps of every family that has a Local guide, and what stands for log p(x)."""
    truth, score, words = _reference(places)
    if not truth:
        return [], ""
    fitted = [
        place
        for place in places
        if place.runs
        and place.example["loop"] == "svi"
        and place.example["family"].lower() != "delta"
    ]
    found = []
    for local in fitted:
        family = local.example["family"]
        gap = paired(truth, local.runs, score, "elbo", joint=joint)
        if local.example["scheme"] != "Local" or family == "own" or gap is None:
            continue
        weights = [run.get("family_weights", int(family in FLOWS)) for run in local.runs]
        partners = [
            place
            for place in fitted
            if place.example["family"] == family and place.example["scheme"] != "Local"
        ]
        rows = []
        for place in partners:
            loss = paired(local.runs, place.runs, "elbo", joint=joint)
            total = paired(truth, place.runs, score, "elbo", joint=joint)
            if loss is not None and total is not None:
                rows.append(Losses(family, place.method, gap, loss, total, any(weights)))
        found += rows or [Losses(family, local.method, gap, None, gap, any(weights))]
    return found, words

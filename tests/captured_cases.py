"""What the capture suite crosses, and what it expects to run eagerly, with the reason.

``tests/test_contract.py`` runs every pair of ``PAIRS`` captured, and
``tests/test_captured_pairs.py`` every one of ``OBJECTIVE_PAIRS``; what does not come out as stated
here fails them. ``docs/captured.py`` writes the lists in ``docs/compiled.md`` from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from guides.objectives import (
    FIVO,
    IWELBO,
    STL,
    AnalyticELBO,
    DReG,
    ForwardKL,
    RefinementELBO,
    Renyi,
)
from tests.cases import CORE_GUIDES, GUIDE_CASES, MODEL_CASES, TWO_LEVELS

__all__ = [
    "INELIGIBLE",
    "NO_SUCH_OBJECTIVE",
    "OBJECTIVE_CASES",
    "OBJECTIVE_FAMILIES",
    "OBJECTIVE_PAIRS",
    "PAIRS",
]

PAIRS = [
    (model, guide)
    for guide in GUIDE_CASES
    for model, case in MODEL_CASES.items()
    if case.latents and (guide in CORE_GUIDES or model == TWO_LEVELS)
]

INELIGIBLE: dict[tuple[str, str], str] = {
    # Which parameters of the crescents move is read from values, which a graph cannot do.
    ("two_moons", "laplace_normal"): (
        "the captured graph does not agree with the program on fresh draws"
    ),
}
"""Pairs of the registries that run eagerly, with what ``CompiledSVI.compiled`` says."""

OBJECTIVE_CASES: dict[str, Callable[[], Any]] = {
    "Trace_ELBO": Trace_ELBO,
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "AnalyticELBO": AnalyticELBO,
    "STL": STL,
    "IWELBO": lambda: IWELBO(num_particles=2),
    "DReG": lambda: DReG(num_particles=2),
    "Renyi": lambda: Renyi(0.5, num_particles=2),
    "FIVO": FIVO,
    "ForwardKL": ForwardKL,
    "RefinementELBO": RefinementELBO,
}

# A point, two Gaussians, a density of another kind, one that scores its own draws alone, a flow.
OBJECTIVE_FAMILIES = ("delta", "normal", "multivariate_normal", "mixture", "auxiliary", "planar")

NO_SUCH_OBJECTIVE = {
    **{(name, "delta"): "a density" for name in ("STL", "IWELBO", "DReG", "Renyi", "ForwardKL")},
    **{("FIVO", family): "a guide of sequences" for family in OBJECTIVE_FAMILIES},
    **{(name, "auxiliary"): "points" for name in ("STL", "DReG", "ForwardKL")},
}
"""What an objective refuses itself, captured or not, and a word of its message."""

OBJECTIVE_PAIRS = [
    (objective, family) for objective in OBJECTIVE_CASES for family in OBJECTIVE_FAMILIES
]

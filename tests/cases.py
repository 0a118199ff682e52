"""One row a guide and a loop; the models' rows are in ``model_cases``.

``set(CASES) == set(REGISTRY)`` is itself a test: a guide or a loop without a row fails it, and the
message prints the missing line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro

import guides
from guides.grid import cell_name, refusal
from guides.inference import (
    SVI,
    BidirectionalPredictiveCoding,
    CompiledSVI,
    DivideAndConquer,
    GeneralizedEM,
    HybridPredictiveCoding,
    IncrementalPredictiveCoding,
    LangevinPredictiveCoding,
    LaplaceCorrected,
    PredictiveCoding,
    TemporalPredictiveCoding,
)
from guides.objectives import RefinementELBO
from tests.model_cases import MODEL_CASES

__all__ = [
    "CORE_GUIDES",
    "FAMILY_OPTIONS",
    "GUIDE_CASES",
    "LOOP_CASES",
    "MODEL_CASES",
    "SCHEME_OPTIONS",
    "TWO_LEVELS",
    "GuideCase",
    "LoopCase",
]


@dataclass(frozen=True)
class GuideCase:
    """How a guide is built in tests: its smallest options."""

    options: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str, model: Any, *args: Any, **model_kwargs: Any) -> guides.Guide:
        return guides.make(name, model, *args, model_kwargs=model_kwargs, **self.options)


_NETWORK = {"context": 2, "transforms": 2, "family_hidden": (8,)}

FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "delta": {},
    "normal": {},
    "multivariate_normal": {},
    "low_rank_normal": {"rank": 1},
    "student_t": {},
    "mixture": {"components": 2},
    "auxiliary": _NETWORK,
    "lateral_cholesky": {},
    "lateral_symmetric": {},
    "planar": {"transforms": 2},
    "radial": {"transforms": 2},
    "householder": {"transforms": 2},
    "sylvester": {"transforms": 1, "rank": 1},
    "iaf": {**_NETWORK, "family_hidden": (8, 8)},
    "affine_coupling": _NETWORK,
    "spline_coupling": {**_NETWORK, "bins": 4},
    "monotone": {**_NETWORK, "transforms": 1, "signal": 2, "points": 8},
}

SCHEME_OPTIONS: dict[str, dict[str, Any]] = {
    "local": {},
    "amortized": {"hidden": (8,)},
    "iterative": {"network": (8,), "num_iterations": 2},
    "semi_amortized": {"hidden": (8,), "num_iterations": 2},
    "laplace": {"hidden": (8,), "num_iterations": 1},
    "bottom_up": {"hidden": (8,)},
    "top_down": {"hidden": (8,)},
    "autoregressive": {"hidden": (8,)},
}


def _case(scheme: str, family: str) -> GuideCase:
    options = {**SCHEME_OPTIONS[scheme], **FAMILY_OPTIONS[family]}
    if "hidden" not in SCHEME_OPTIONS[scheme] and "family_hidden" in options:
        # Only the family has an option of that name, unless the scheme starts with an encoder.
        key = "family_hidden" if scheme == "iterative" else "hidden"
        options[key] = options.pop("family_hidden")
    return GuideCase(options)


GUIDE_CASES = {
    cell_name(scheme, family): _case(scheme, family)
    for scheme in SCHEME_OPTIONS
    for family in FAMILY_OPTIONS
    if refusal(scheme, family) is None
}

# Crossed with every model, program and trap; the other cells meet a model with two levels.
CORE_GUIDES = (
    *("delta", "normal", "multivariate_normal", "spline_coupling"),
    *("amortized_delta", "amortized_normal", "amortized_multivariate_normal"),
    "amortized_spline_coupling",
    *("iterative_normal", "semi_amortized_normal", "laplace_normal"),
)
TWO_LEVELS = "hierarchical_vae"


@dataclass(frozen=True)
class LoopCase:
    """How a loop is built in tests, which guides it meets, and whose parameters it moves.

    ``guides`` None is every core guide; a loop to which a guide is only a start, or nothing,
    meets every model once. ``refused`` are models that the loop refuses, and a word of its error.
    """

    build: Callable[[Any, Any, pyro.optim.PyroOptim], Any]
    guides: tuple[str, ...] | None = None
    learns: tuple[str, ...] = ("model",)
    refused: dict[str, str] = field(default_factory=dict)


_BOTH = ("model", "guide")

LOOP_CASES = {
    "svi": LoopCase(
        lambda model, guide, optim: SVI(model, guide, optim, RefinementELBO()), learns=_BOTH
    ),
    "compiled_svi": LoopCase(
        lambda model, guide, optim: CompiledSVI(
            model, guide, optim, RefinementELBO(), mode="graph"
        ),
        learns=_BOTH,
    ),
    "bidirectional": LoopCase(
        lambda model, guide, optim: BidirectionalPredictiveCoding(
            model, optim, guide, num_steps=3
        ),
        guides=("amortized_delta", "bottom_up_delta"),
        learns=_BOTH,
    ),
    "generalized_em": LoopCase(
        lambda model, guide, optim: GeneralizedEM(model, optim, num_steps=3, weight_steps=2),
        guides=("normal",),
    ),
    "hybrid": LoopCase(
        lambda model, guide, optim: HybridPredictiveCoding(model, optim, guide, num_steps=3),
        guides=("delta", "amortized_normal"),
        learns=_BOTH,
    ),
    "incremental": LoopCase(
        lambda model, guide, optim: IncrementalPredictiveCoding(model, optim, num_steps=3),
        guides=("normal",),
    ),
    "divide_and_conquer": LoopCase(
        lambda model, guide, optim: DivideAndConquer(
            model, optim, num_particles=2, anneal=2, step_size=0.02, correction="metropolis"
        ),
        guides=("normal",),
    ),
    "langevin_predictive_coding": LoopCase(
        lambda model, guide, optim: LangevinPredictiveCoding(
            model, optim, num_steps=3, num_mixing=2, num_samples=2
        ),
        guides=("normal",),
    ),
    "laplace_corrected": LoopCase(
        lambda model, guide, optim: LaplaceCorrected(
            model, optim, num_steps=3, newton_steps=2, hessian="gauss_newton"
        ),
        guides=("normal",),
        # A density without a Fisher information, at a state that is no mode.
        refused={"gaussian_mixture": "not positive definite at site 'theta'"},
    ),
    "predictive_coding": LoopCase(
        lambda model, guide, optim: PredictiveCoding(model, optim, guide=guide, num_steps=3)
    ),
    "temporal": LoopCase(
        lambda model, guide, optim: TemporalPredictiveCoding(model, optim),
        guides=("normal",),
        # Programs without time are sequences of one step.
        refused={"eight_schools": "outside the data plate"},
    ),
}

"""One row a guide and a loop; the models' rows are in ``model_cases``.

``set(CASES) == set(REGISTRY)`` is itself a test: a guide or a loop without a row fails it, and the
message prints the missing line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
from pyro.infer import Trace_ELBO

import guides
from guides.inference import SVI, PredictiveCoding
from tests.model_cases import MODEL_CASES

__all__ = ["GUIDE_CASES", "LOOP_CASES", "MODEL_CASES", "GuideCase", "LoopCase"]


@dataclass(frozen=True)
class GuideCase:
    """How a guide is built in tests: its smallest options."""

    options: dict[str, Any] = field(default_factory=dict)

    def build(self, name: str, model: Any, *args: Any, **model_kwargs: Any) -> guides.Guide:
        return guides.make(name, model, *args, model_kwargs=model_kwargs, **self.options)


_ENCODER = {"hidden": (8,)}
_FLOW = {"transforms": 2, "bins": 4, "context": 2, "family_hidden": (8,)}

GUIDE_CASES = {
    "delta": GuideCase(),
    "normal": GuideCase(),
    "multivariate_normal": GuideCase(),
    "spline_coupling": GuideCase(_FLOW),
    "amortized_delta": GuideCase(_ENCODER),
    "amortized_normal": GuideCase(_ENCODER),
    "amortized_multivariate_normal": GuideCase(_ENCODER),
    "amortized_spline_coupling": GuideCase({**_ENCODER, **_FLOW}),
}


@dataclass(frozen=True)
class LoopCase:
    """How a loop is built in tests."""

    build: Callable[[Any, Any, pyro.optim.PyroOptim], Any]


LOOP_CASES = {
    "svi": LoopCase(lambda model, guide, optim: SVI(model, guide, optim, Trace_ELBO())),
    "predictive_coding": LoopCase(
        lambda model, guide, optim: PredictiveCoding(model, optim, guide=guide, num_steps=3)
    ),
}

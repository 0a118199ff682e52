"""Objectives: what a guide, and its model, are fitted by. One a file; lazy: loads no torch.

All are subclasses of ``pyro.infer.ELBO``: ``SVI(model, guide, optim, loss=objective)``, or
``objective(model, guide)`` for a module whose forward pass is a differentiable loss.
"""

from __future__ import annotations

import importlib
from typing import Any

OBJECTIVES = {
    "analytic_elbo": "guides.objectives.analytic_elbo:AnalyticELBO",
    "stl": "guides.objectives.stl:STL",
    "iwelbo": "guides.objectives.iwelbo:IWELBO",
    "dreg": "guides.objectives.dreg:DReG",
    "renyi": "guides.objectives.renyi:Renyi",
    "fivo": "guides.objectives.fivo:FIVO",
    "forward_kl": "guides.objectives.forward_kl:ForwardKL",
    "refinement_elbo": "guides.objectives.refinement:RefinementELBO",
}

_EXPORTS = {path.partition(":")[2]: path.partition(":")[0] for path in OBJECTIVES.values()}
_EXPORTS["Objective"] = "guides.objectives.objective"

__all__ = ["OBJECTIVES", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'guides.objectives' has no attribute {name!r}")

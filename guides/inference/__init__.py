"""Loops with SVI's interface: ``step``, ``evaluate_loss``, ``run``. One algorithm a file."""

from __future__ import annotations

import importlib
from typing import Any

LOOPS = {
    "svi": "guides.inference.svi:SVI",
    "predictive_coding": "guides.inference.predictive_coding:PredictiveCoding",
}

_EXPORTS = {
    "IndefiniteHessianError": "guides.inference.laplace",
    "Laplace": "guides.inference.laplace",
    "PredictiveCoding": "guides.inference.predictive_coding",
    "Run": "guides.inference.run",
    "SVI": "guides.inference.svi",
    "laplace": "guides.inference.laplace",
    "plateau": "guides.inference.run",
    "run": "guides.inference.run",
}

__all__ = ["LOOPS", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'guides.inference' has no attribute {name!r}")

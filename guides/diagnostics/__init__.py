"""Diagnostics: what a posterior is worth, and its way into ArviZ. Lazy: loads no torch."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "ActiveUnits": "guides.diagnostics.activity",
    "AnnealedScore": "guides.diagnostics.annealed",
    "Khat": "guides.diagnostics.scores",
    "LogWeights": "guides.diagnostics.scores",
    "Score": "guides.diagnostics.scores",
    "active_units": "guides.diagnostics.activity",
    "annealed_importance_sampling": "guides.diagnostics.annealed",
    "elbo": "guides.diagnostics.scores",
    "log_evidence": "guides.diagnostics.scores",
    "log_weights": "guides.diagnostics.scores",
    "pareto_khat": "guides.diagnostics.scores",
    "to_arviz": "guides.diagnostics.arviz_export",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'guides.diagnostics' has no attribute {name!r}")

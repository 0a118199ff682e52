"""Loops with SVI's interface: ``step``, ``evaluate_loss``, ``run``. One algorithm a file."""

from __future__ import annotations

import importlib
from typing import Any

LOOPS = {
    "bidirectional": "guides.inference.bidirectional:BidirectionalPredictiveCoding",
    "compiled_svi": "guides.inference.compiled_svi:CompiledSVI",
    "divide_and_conquer": "guides.inference.divide_and_conquer:DivideAndConquer",
    "langevin_predictive_coding": (
        "guides.inference.langevin_predictive_coding:LangevinPredictiveCoding"
    ),
    "generalized_em": "guides.inference.generalized_em:GeneralizedEM",
    "hybrid": "guides.inference.hybrid:HybridPredictiveCoding",
    "incremental": "guides.inference.incremental:IncrementalPredictiveCoding",
    "laplace_corrected": "guides.inference.laplace_corrected:LaplaceCorrected",
    "svi": "guides.inference.svi:SVI",
    "predictive_coding": "guides.inference.predictive_coding:PredictiveCoding",
    "temporal": "guides.inference.temporal:TemporalPredictiveCoding",
}

_EXPORTS = {
    "BidirectionalPredictiveCoding": "guides.inference.bidirectional",
    "Compiled": "guides.capture.kind",
    "CompiledSVI": "guides.inference.compiled_svi",
    "ChainGaussian": "guides.inference.chain_gaussian",
    "Dependencies": "guides.inference.dependencies",
    "DivideAndConquer": "guides.inference.divide_and_conquer",
    "FixedPrediction": "guides.inference.fixed_prediction",
    "GeneralizedEM": "guides.inference.generalized_em",
    "Given": "guides.inference.given",
    "HierarchicalGaussianFilter": "guides.inference.gaussian_filter",
    "HybridPredictiveCoding": "guides.inference.hybrid",
    "IncrementalPredictiveCoding": "guides.inference.incremental",
    "IndefiniteHessianError": "guides.inference.laplace_guide",
    "KinkError": "guides.inference.curvature",
    "LangevinPredictiveCoding": "guides.inference.langevin_predictive_coding",
    "Laplace": "guides.inference.laplace_guide",
    "LaplaceCorrected": "guides.inference.laplace_corrected",
    "LearnedPrecision": "guides.inference.precision",
    "NudgedPredictiveCoding": "guides.inference.nudged",
    "PredictiveCoding": "guides.inference.predictive_coding",
    "Run": "guides.inference.running",
    "SVI": "guides.inference.svi",
    "TemporalPredictiveCoding": "guides.inference.temporal",
    "ZeroDivergence": "guides.inference.zero_divergence",
    "laplace": "guides.inference.laplace_guide",
    "plateau": "guides.inference.running",
    "run": "guides.inference.running",
}

__all__ = ["LOOPS", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'guides.inference' has no attribute {name!r}")

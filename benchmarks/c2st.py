"""C2ST: can a classifier tell draws from reference draws?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["c2st"]


def c2st(reference: Tensor, draws: Tensor, seed: int = 1) -> float:
    """Accuracy of a classifier that tells draws from reference draws; 0.5 where it cannot.

    The definition of the benchmark sbibm, whose published figures it can be compared with: both
    standardized by the reference draws, a perceptron with two hidden layers of ten units a
    coordinate, five-fold cross-validation. It is blind to how wrong draws are, and limited by
    what the classifier learns.

    References:
        | Revisiting Classifier Two-Sample Tests (Lopez-Paz & Oquab, 2017)
        | https://arxiv.org/abs/1610.06545
        | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021)
        | https://arxiv.org/abs/2101.04653

    Args:
        reference: Reference draws ``(N, K)``.
        draws: Draws ``(N, K)``.
        seed: Seed of the classifier and of the folds.

    Raises:
        ModuleNotFoundError: Where scikit-learn is not installed.

    Example:
        >>> c2st(torch.randn(50, 1), 9 + torch.randn(50, 1)) > 0.9
        True
    """
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'The C2ST needs scikit-learn: pip install "pyro-zoo[data]".'
        ) from None

    mean, std = reference.mean(0), reference.std(0)
    points = torch.cat([(reference - mean) / std, (draws - mean) / std]).numpy()
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * points.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, points, labels, cv=folds).mean())

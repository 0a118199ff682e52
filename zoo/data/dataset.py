"""Dataset: rows split into training, validation and test, and how they became what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BINARIZATIONS", "Dataset", "binarize"]

BINARIZATIONS = ("none", "threshold", "stochastic")


@dataclass(frozen=True)
class Dataset:
    """A data set in memory; all rows are flat and floating point.

    Args:
        name: Key in ``zoo.data.DATASETS``.
        train: Training rows ``(N, D)``.
        test: Test rows ``(M, D)``.
        binarization: How real values became binary, in words; scores of different binarizations
            are not comparable.
        image_shape: Shape of one row as an image.
        validation: Validation rows, or None.
        train_labels: Classes ``(N,)``, or None.
        validation_labels: Classes, or None.
        test_labels: Classes ``(M,)``, or None.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        >>> data = Dataset("two", rows, rows, "none", (1, 2))
        >>> data.x_dim, data.data_mean
        (2, tensor([0.5000, 1.0000]))
    """

    name: str
    train: Tensor
    test: Tensor
    binarization: str
    image_shape: tuple[int, int]
    validation: Tensor | None = None
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None

    @property
    def x_dim(self) -> int:
        """Dimension D of a row."""
        return self.train.shape[1]

    @property
    def data_mean(self) -> Tensor:
        """Mean of the training rows ``(D,)``, from which a model's output bias starts."""
        return self.train.mean(0)


def binarize(x: Tensor, how: str, seed: int) -> tuple[Tensor, str]:
    """Make values from 0 to 1 binary.

    Args:
        x: Rows.
        how: ``"none"``; ``"threshold"``: 1 above one half; ``"stochastic"``: one Bernoulli draw a
            value, the value being its probability, made once and the same for the same seed.
        seed: Seed of the draw; the global generator is left alone.

    Returns:
        The rows, and the binarization in words.

    Raises:
        ValueError: For another ``how``.

    Example:
        >>> binarize(torch.tensor([[0.2, 0.7]]), "threshold", 0)
        (tensor([[0., 1.]]), 'threshold at 0.5')
    """
    if how == "none":
        return x, "none, values from 0 to 1"
    if how == "threshold":
        return (x > 0.5).to(x), "threshold at 0.5"
    if how == "stochastic":
        generator = torch.Generator().manual_seed(seed)
        # in float32 whatever the dtype of x, so that the draw depends on the seed alone
        draw = torch.rand(x.shape, generator=generator, dtype=torch.float32)
        return (draw < x.float()).to(x), f"stochastic, drawn once with seed {seed}"
    raise ValueError(f"binarize must be one of {', '.join(BINARIZATIONS)}, got {how!r}.")

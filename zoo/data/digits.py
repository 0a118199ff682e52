"""Digits: 1,797 handwritten digits of 8 x 8 pixels, inside scikit-learn: no network needed."""

from __future__ import annotations

import torch

from zoo.data.dataset import Dataset
from zoo.data.dataset import binarize as binarize_rows

__all__ = ["load"]


def load(
    *, binarize: str = "threshold", seed: int = 0, num_test: int = 360, split_seed: int = 0
) -> Dataset:
    """Digits, pixels of 0 to 16 counts divided by 16, in rows of 64.

    References:
        | Optical recognition of handwritten digits (Alpaydin & Kaynak, 1998)
        | https://doi.org/10.24432/C50P49

    Args:
        binarize: ``"none"``, ``"threshold"`` or ``"stochastic"``.
        seed: Seed of a stochastic binarization.
        num_test: How many of the rows, drawn at random, are held out for testing.
        split_seed: Seed of that draw.

    Raises:
        ValueError: For an unknown binarization, or a split without training or test rows.
        ModuleNotFoundError: Where scikit-learn is not installed.

    Example:
        >>> data = load()
        >>> data.train.shape, data.test.shape, data.binarization
        (torch.Size([1437, 64]), torch.Size([360, 64]), 'threshold at 0.5')
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'The digits data set is in scikit-learn: pip install "pyro-zoo[data]".'
        ) from None
    pixels, classes = load_digits(return_X_y=True)
    if not 0 < num_test < len(pixels):
        raise ValueError(f"num_test must lie between 1 and {len(pixels) - 1}, got {num_test}.")
    x = torch.from_numpy(pixels).to(torch.get_default_dtype()) / 16
    x, binarization = binarize_rows(x, binarize, seed)
    labels = torch.from_numpy(classes).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(split_seed))
    train, test = order[num_test:], order[:num_test]
    return Dataset(
        name="digits",
        train=x[train],
        test=x[test],
        binarization=binarization,
        image_shape=(8, 8),
        train_labels=labels[train],
        test_labels=labels[test],
    )

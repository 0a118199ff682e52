"""Data sets, one a file, each read by ``zoo.data.load(name)``.

``digits``, ``natural_patches``, ``moving_digits`` and ``bouncing_balls`` are made from what
scikit-learn ships, or from nothing, and need no network. The others are looked for in the
folder that the environment variable ``PYRO_ZOO_DATA`` names, then in the cache (the folder that
``PYRO_ZOO_CACHE`` names, else pooch's), then downloaded; see :mod:`zoo.data.files`. Whatever the
source, the content is checked against its checksum.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.data.dataset import Dataset
    from zoo.data.sequences import Sequences

__all__ = ["DATASETS", "load"]

DATASETS = {
    "digits": "zoo.data.digits:load",
    "mnist": "zoo.data.mnist:load",
    "binarized_mnist": "zoo.data.binarized_mnist:load",
    "fashion_mnist": "zoo.data.fashion_mnist:load",
    "natural_patches": "zoo.data.natural_patches:load",
    "jsb_chorales": "zoo.data.jsb_chorales:load",
    "moving_digits": "zoo.data.moving_digits:load",
    "bouncing_balls": "zoo.data.bouncing_balls:load",
}


def load(name: str, **options: Any) -> Dataset | Sequences:
    """Load a data set by name.

    Args:
        name: A key of ``DATASETS``.
        **options: Options of the loader, for example ``binarize="stochastic"``.

    Returns:
        The data set.

    Raises:
        ValueError: For an unknown name or option value, or a file with a wrong checksum.
        FileNotFoundError: Where the file is nowhere and cannot be downloaded.
        ModuleNotFoundError: Where the extra ``pyro-zoo[data]`` is needed and not installed.

    Example:
        >>> load("digits").train.shape
        torch.Size([1437, 64])
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(str(name), DATASETS, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"Unknown data set {name!r}. {hint}Available data sets: {', '.join(DATASETS)}."
        )
    module, _, attribute = DATASETS[name].partition(":")
    dataset: Dataset | Sequences = getattr(importlib.import_module(module), attribute)(**options)
    return dataset

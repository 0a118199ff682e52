"""Statically binarized MNIST: the split and the draw that published evidence figures are for."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import Dataset
from zoo.data.files import RemoteFile, fetch

__all__ = ["FILES", "load", "read_amat", "read_npz"]

_ARCHIVE = "binarized_mnist/mnist_binarized.npz"
_BASE = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"


def read_amat(content: bytes) -> bytes:
    r"""The pixels of an .amat file, one byte each: its text without the white space.

    Raises:
        ValueError: If the text holds anything but zeros and ones.

    Example:
        >>> read_amat(b"0 1 1\n1 0 0\n")
        b'\x00\x01\x01\x01\x00\x00'
    """
    text = np.frombuffer(content, np.uint8)
    digits = text[(text != ord(" ")) & (text != ord("\n")) & (text != ord("\r"))]
    if not np.isin(digits, (ord("0"), ord("1"))).all():
        raise ValueError("An .amat file holds zeros and ones; this one holds something else.")
    return bytes((digits - ord("0")).tobytes())


def read_npz(array: str) -> Callable[[bytes], bytes]:
    """A reader of one array of the three that an .npz archive of the data set holds.

    Args:
        array: ``"X_train"``, ``"X_valid"`` or ``"X_test"``.
    """

    def read(content: bytes) -> bytes:
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                return bytes(archive[array].astype(np.uint8).tobytes())
        except zipfile.BadZipFile:
            raise ValueError("The file is no .npz archive.") from None

    return read


# part -> (name in the archive, SHA-256 of the pixels, one byte each, row by row)
_PARTS = {
    "train": ("X_train", "43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a"),
    "valid": ("X_valid", "069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e"),
    "test": ("X_test", "ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86"),
}

FILES = {
    part: RemoteFile(
        path=f"binarized_mnist/binarized_mnist_{part}.amat",
        sha256=sha256,
        urls=(f"{_BASE}/binarized_mnist_{part}.amat",),
        decode=read_amat,
        alternatives={_ARCHIVE: read_npz(array)},
    )
    for part, (array, sha256) in _PARTS.items()
}


def load(*, mirror: str | None = None) -> Dataset:
    """Statically binarized MNIST: 50,000, 10,000 and 10,000 rows of 784 zeros and ones.

    Read from the published .amat files, or from an archive ``mnist_binarized.npz`` of the same
    content (arrays ``X_train``, ``X_valid``, ``X_test``). It has no labels.

    References:
        | On the quantitative analysis of deep belief networks (Salakhutdinov & Murray, 2008)
        | https://doi.org/10.1145/1390156.1390266
        | The neural autoregressive distribution estimator (Larochelle & Murray, 2011)
        | https://proceedings.mlr.press/v15/larochelle11a.html

    Args:
        mirror: Base address of a mirror of one's own.

    Raises:
        ValueError: For a file with a wrong checksum.
        FileNotFoundError: Where the files are nowhere and cannot be downloaded.
    """

    def rows(part: str) -> Tensor:
        pixels = np.frombuffer(fetch(FILES[part], mirror=mirror), np.uint8).reshape(-1, 784)
        return torch.from_numpy(pixels.copy()).to(torch.get_default_dtype())

    return Dataset(
        name="binarized_mnist",
        train=rows("train"),
        validation=rows("valid"),
        test=rows("test"),
        binarization="static, as published by Larochelle",
        image_shape=(28, 28),
    )

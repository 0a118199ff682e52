"""The idx format of MNIST and its relatives: a typed array with a short binary header."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import Dataset, binarize
from zoo.data.files import RemoteFile, fetch

__all__ = ["load_images", "read_idx", "remote_files"]


def read_idx(content: bytes) -> np.ndarray:
    """Parse an idx file of unsigned bytes.

    Args:
        content: The uncompressed file: ``00 00 08``, the number of dimensions, each dimension as
            a big-endian 32-bit integer, then the bytes.

    Raises:
        ValueError: If the content is no such file.

    Example:
        >>> read_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]))
        array([7, 9], dtype=uint8)
    """
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"An idx file of unsigned bytes starts with 00 00 08, got {content[:3].hex(' ')}."
        )
    header = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:header], ">u4").tolist())
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"An idx file of shape {shape} has {header + math.prod(shape)} bytes, got "
            f"{len(content)}: it is incomplete."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def remote_files(
    folder: str, checksums: Mapping[str, str], mirrors: Sequence[str], system: Sequence[str] = ()
) -> dict[str, RemoteFile]:
    """The four files of a data set in the layout of MNIST.

    Args:
        folder: Folder below a data folder or the cache.
        checksums: File name without ``.gz`` -> SHA-256 of the uncompressed content.
        mirrors: Base addresses.
        system: Folders of a distribution's package.

    Example:
        >>> remote_files("d", {"a": "0"}, ["https://h"])["a"].urls
        ('https://h/a.gz',)
    """
    return {
        name: RemoteFile(
            path=f"{folder}/{name}.gz",
            sha256=sha256,
            urls=tuple(f"{mirror}/{name}.gz" for mirror in mirrors),
            system=tuple(f"{place}/{name}.gz" for place in system),
        )
        for name, sha256 in checksums.items()
    }


def load_images(
    name: str,
    files: Mapping[str, RemoteFile],
    *,
    how: str,
    seed: int,
    num_validation: int,
    mirror: str | None,
) -> Dataset:
    """Load a data set in the layout of MNIST.

    Args:
        name: Key of the data set.
        files: Its four files, see :func:`remote_files`.
        how: Binarization, see :func:`zoo.data.dataset.binarize`.
        seed: Seed of a stochastic binarization: training rows are drawn with it, test rows with
            the next.
        num_validation: How many of the last training rows are set aside.
        mirror: See :func:`zoo.data.files.fetch`.

    Raises:
        ValueError: If ``num_validation`` leaves no row to train on.
    """

    def rows(part: str) -> Tensor:
        images = read_idx(fetch(files[f"{part}-images-idx3-ubyte"], mirror=mirror))
        pixels = torch.from_numpy(images.reshape(len(images), -1).copy())
        return pixels.to(torch.get_default_dtype()) / 255

    def labels(part: str) -> Tensor:
        classes = read_idx(fetch(files[f"{part}-labels-idx1-ubyte"], mirror=mirror))
        return torch.from_numpy(classes.astype(np.int64))

    train, binarization = binarize(rows("train"), how, seed)
    test, _ = binarize(rows("t10k"), how, seed + 1)
    train_labels = labels("train")
    if not 0 <= num_validation < len(train):
        raise ValueError(
            f"num_validation must lie between 0 and {len(train) - 1}, got {num_validation}."
        )
    num_train = len(train) - num_validation
    return Dataset(
        name=name,
        train=train[:num_train],
        test=test,
        binarization=binarization,
        image_shape=(28, 28),
        validation=train[num_train:] if num_validation else None,
        train_labels=train_labels[:num_train],
        validation_labels=train_labels[num_train:] if num_validation else None,
        test_labels=labels("t10k"),
    )

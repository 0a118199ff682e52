"""Sequences: a data set of sequences, split, padded, with their lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sequences", "pad"]


@dataclass(frozen=True)
class Sequences:
    """A data set of sequences in memory, padded with zeros to its longest sequence.

    Args:
        name: Key in ``zoo.data.DATASETS``.
        train: Training sequences ``(N, T, D)``.
        train_lengths: Steps of each ``(N,)``.
        test: Test sequences ``(M, T', D)``.
        test_lengths: Steps of each ``(M,)``.
        description: What a step is, in words.
        validation: Validation sequences, or None.
        validation_lengths: Steps of each, or None.
        image_shape: Shape of one step as an image, or None.

    Example:
        >>> rows, lengths = pad([torch.ones(2, 1), torch.ones(3, 1)])
        >>> Sequences("two", rows, lengths, rows, lengths, "ones").num_steps
        5
    """

    name: str
    train: Tensor
    train_lengths: Tensor
    test: Tensor
    test_lengths: Tensor
    description: str
    validation: Tensor | None = None
    validation_lengths: Tensor | None = None
    image_shape: tuple[int, int] | None = None

    @property
    def x_dim(self) -> int:
        """Dimension D of a step."""
        return self.train.shape[2]

    @property
    def num_steps(self) -> int:
        """Steps of all training sequences together."""
        return int(self.train_lengths.sum())

    @property
    def data_mean(self) -> Tensor:
        """Mean of the training steps ``(D,)``, padding left out."""
        number = self.train.shape[1]
        seen = torch.arange(number) < self.train_lengths[:, None]
        return (self.train * seen[..., None]).sum((0, 1)) / seen.sum()


def pad(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad sequences ``(T_n, D)`` with zeros: ``(N, T, D)`` and lengths ``(N,)``."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True), lengths

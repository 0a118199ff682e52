"""Perceptrons, for one vector a row and on top of every other network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["perceptron"]


def perceptron(features: int, hidden: Sequence[int], like: Tensor) -> tuple[list[nn.Module], int]:
    """Hidden layers with a smooth activation.

    Args:
        features: Length of the input.
        hidden: Widths of the layers; none leaves the input as it is.
        like: A tensor of the dtype and device of the parameters.

    Returns:
        The layers, and the length of their output.

    Raises:
        ValueError: For a width below 1.

    Example:
        >>> import torch
        >>> perceptron(3, (8,), torch.zeros(()))
        ([Linear(in_features=3, out_features=8, bias=True), SiLU()], 8)
    """
    layers: list[nn.Module] = []
    for width in hidden:
        if width < 1:
            raise ValueError(f"Widths in hidden= must be at least 1, got {tuple(hidden)}.")
        layers += [nn.Linear(features, width, dtype=like.dtype, device=like.device), nn.SiLU()]
        features = width
    return layers, features

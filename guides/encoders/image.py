"""Convolutions, for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ImageNetwork"]

_CHANNELS = (32, 64, 128)
_SMALLEST = 7


class ImageNetwork(nn.Module):
    """Strided convolutions with a smooth activation; no pooling, and nothing couples the rows.

    Each layer halves height and width, down to about 4 x 4. A mask enters as further channels.

    Args:
        shape: Shape ``(C, H, W)`` of an image.
        mask_shape: Shape of its mask, ones where it tells nothing apart; None without a mask.
        like: A tensor of the dtype and device of the parameters.

    Example:
        >>> network = ImageNetwork((1, 28, 28), None, torch.zeros(()))
        >>> network(torch.zeros(5, 784)).shape[1] == network.width
        True
    """

    def __init__(
        self, shape: tuple[int, ...], mask_shape: tuple[int, ...] | None, like: Tensor
    ) -> None:
        super().__init__()
        self.shape, self.mask_shape = shape, mask_shape
        channels = shape[0] + (0 if mask_shape is None else mask_shape[0])
        height, width = shape[1:]
        layers: list[nn.Module] = []
        for size in _CHANNELS:
            layers += [
                nn.Conv2d(
                    channels, size, 3, stride=2, padding=1, dtype=like.dtype, device=like.device
                ),
                nn.SiLU(),
            ]
            channels, height, width = size, (height + 1) // 2, (width + 1) // 2
            if max(height, width) < _SMALLEST:
                break
        self.layers = nn.Sequential(*layers)
        self.width = channels * height * width

    def forward(self, flat: Tensor) -> Tensor:
        """Features ``(B, width)`` of flat images with their masks ``(B, F)``."""
        size = self.shape[0] * self.shape[1] * self.shape[2]
        image = flat[:, :size].reshape(-1, *self.shape)
        if self.mask_shape is not None:
            mask = flat[:, size:].reshape(-1, *self.mask_shape)
            mask = mask.expand(-1, -1, *self.shape[1:])
            image = torch.cat([image, mask], 1)
        return self.layers(image).flatten(1)

"""Deep sets, for rows that hold exchangeable elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.encoders.vector import perceptron

__all__ = ["SetNetwork"]


class SetNetwork(nn.Module):
    """One network for every element, pooled to what does not depend on their order.

        h_m = network(element_m)
        out = [mean_m h_m, max_m h_m, log(1 + number of elements)]

    The number counts because a posterior narrows with it. Elements whose mask is off altogether
    do not take part, so rows of unequal length are padded and masked. Rows without any element
    get zeros.

    References:
        | Deep Sets (Zaheer et al., 2017)
        | https://arxiv.org/abs/1703.06114

    Args:
        features: Length D of an element's value.
        mask_features: Length of its mask, zero without one; the mask stands behind the value.
        hidden: Widths of the network's layers.
        like: A tensor of the dtype and device of the parameters.

    Example:
        >>> network = SetNetwork(2, 0, (8,), torch.zeros(()))
        >>> elements = torch.randn(5, 7, 2)
        >>> torch.allclose(network(elements.flatten(1)), network(elements.flip(1).flatten(1)))
        True
    """

    def __init__(
        self, features: int, mask_features: int, hidden: Sequence[int], like: Tensor
    ) -> None:
        super().__init__()
        self.features, self.mask_features = features, mask_features
        layers, width = perceptron(features + mask_features, hidden, like)
        self.layers = nn.Sequential(*layers)
        self.width = 2 * width + 1

    def forward(self, flat: Tensor) -> Tensor:
        """Features ``(B, width)`` of flat sets ``(B, M * features)``, for any M."""
        elements = flat.reshape(flat.shape[0], -1, self.features + self.mask_features)
        hidden = self.layers(elements)  # (B, M, H)
        if self.mask_features:
            present = (elements[..., self.features :] > 0).any(-1, keepdim=True)  # (B, M, 1)
        else:
            present = torch.ones_like(elements[..., :1], dtype=torch.bool)
        count = present.sum(1).to(hidden.dtype)  # (B, 1)
        zero = hidden.new_zeros(())
        mean = torch.where(present, hidden, zero).sum(1) / count.clamp(min=1)
        lowest = hidden.new_full((), torch.finfo(hidden.dtype).min)
        highest = torch.where(present, hidden, lowest).amax(1)
        highest = torch.where(count > 0, highest, zero)
        return torch.cat([mean, highest, count.log1p()], -1)

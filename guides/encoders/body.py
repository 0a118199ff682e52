"""The network of an encoder without its head: sources side by side, then a perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.encoders.image import ImageNetwork
from guides.encoders.sets import SetNetwork
from guides.encoders.source import Source
from guides.encoders.vector import perceptron

__all__ = ["SideBySide", "body"]


class SideBySide(nn.Module):
    """Each source through its own network, the results concatenated; vectors pass as they are.

    Args:
        sources: The sources, in the order of the flat input.
        hidden: Widths of the network of a set's elements.
        like: A tensor of the dtype and device of the parameters.
    """

    def __init__(self, sources: Sequence[Source], hidden: Sequence[int], like: Tensor) -> None:
        super().__init__()
        self.sources = tuple(sources)
        networks: list[nn.Module] = []
        self.width = 0
        for source in sources:
            if source.kind == "image":
                images = ImageNetwork(source.shape, source.mask_shape, like)
                networks.append(images)
                self.width += images.width
            elif source.kind == "set":
                mask_features = source.num_features - source.width
                sets = SetNetwork(source.width, mask_features, hidden, like)
                networks.append(sets)
                self.width += sets.width
            else:
                networks.append(nn.Identity())
                self.width += source.num_features
        self.networks = nn.ModuleList(networks)

    def forward(self, flat: Tensor) -> Tensor:
        """Features ``(B, width)`` of flat inputs ``(B, F)``."""
        parts = flat.split(self._sizes(flat.shape[1]), 1)
        return torch.cat(
            [network(part) for network, part in zip(self.networks, parts, strict=True)], 1
        )

    def _sizes(self, total: int) -> list[int]:
        """Lengths of the sources: those of sets follow from the length of the whole."""
        built = [s.num_features * (s.shape[0] if s.kind == "set" else 1) for s in self.sources]
        if total == sum(built):
            return built
        sets = [s for s in self.sources if s.kind == "set"]
        rest = total - sum(s.num_features for s in self.sources if s.kind != "set")
        element = sum(s.num_features for s in sets)
        if not sets or len({s.shape[0] for s in sets}) > 1 or rest % element:
            raise ValueError(
                f"This encoder reads {sum(built)} features a row, got {total}. Several sets in a "
                "row may change their numbers of elements only together: pad and mask them."
            )
        return [s.num_features * (rest // element if s.kind == "set" else 1) for s in self.sources]

    def extra_repr(self) -> str:
        """The sources."""
        return ", ".join(f"{s.name}: {s.kind} {s.shape}" for s in self.sources)


def body(
    sources: Sequence[Source], hidden: Sequence[int], like: Tensor
) -> tuple[list[nn.Module], int]:
    """The layers from flat, standardized inputs ``(B, F)`` to features ``(B, H)``.

    Args:
        sources: What the inputs are, in the order of the flat vector.
        hidden: Widths of the layers; of the network of a set's elements as well.
        like: A tensor of the dtype and device of the parameters.

    Returns:
        The layers, and the length H of their output.

    Example:
        >>> layers, width = body([Source("x", "image", (1, 8, 8))], (16,), torch.zeros(()))
        >>> nn.Sequential(*layers)(torch.zeros(5, 64)).shape
        torch.Size([5, 16])
    """
    if all(source.kind == "vector" for source in sources):
        return perceptron(sum(s.num_features for s in sources), hidden, like)
    first = SideBySide(sources, hidden, like)
    layers, width = perceptron(first.width, hidden, like)
    return [first, *layers], width

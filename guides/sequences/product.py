"""Product: Gaussian experts, one for each thing that q of a step is given, and their product.

loc_i, scale_i = expert_i(summary_i)          past data, data to come, the draw before
precision      = sum_i scale_i^-2
loc            = sum_i loc_i scale_i^-2 / precision
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.families.family import Family, inverse_positive, positive
from guides.families.normal import Normal

__all__ = ["Product"]


class Product(nn.Module):
    """The combiner of mean-field left-right networks.

    Args:
        family: The family of a step, a ``Normal``.
        init: Its parameters at the start, ``(2 K,)``: those of the product.
        widths: Features of every summary.

    Raises:
        ValueError: For another family, or fewer than two experts.

    Example:
        >>> family = Normal(1, init_scale=1.0)
        >>> product = Product(family, family.init(torch.zeros(1)), [1, 1])
        >>> one, other = torch.tensor([[0.0, 3.0], [1.0, 0.5]]).T.unsqueeze(-1)
        >>> lam = product.multiply([tuple(one), tuple(other)])
        >>> family.distribution(lam).mean
        tensor([2.4000])
    """

    def __init__(self, family: Family, init: Tensor, widths: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(family, Normal):
            raise ValueError(
                'combiner="product" multiplies Gaussians with independent coordinates, and needs '
                f"the family normal; got {type(family).__name__}."
            )
        if len(widths) < 2:
            raise ValueError(
                'combiner="product" multiplies what two or more experts say: networks of the past '
                "and of the future, the draw of the step before. Take mean_field_smoothing_normal "
                "or two_sided_smoothing_normal."
            )
        self.size = family.size
        loc, raw = init.split(self.size)
        # Wider than the product, which begins where init says.
        wide = inverse_positive(positive(raw) * len(widths) ** 0.5)
        self.register_buffer("start", torch.cat([loc, wide]))
        self.heads = nn.ModuleList(nn.Linear(width, 2 * self.size).to(init) for width in widths)
        with torch.no_grad():
            for head in self.heads:
                assert isinstance(head, nn.Linear)
                head.weight.mul_(0.1)
                head.bias.zero_()

    start: Tensor

    def experts(self, summaries: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Location and scale of every expert, ``(*S, B, K)``.

        Args:
            summaries: What each of them sees, ``(*S, B, width)``.
        """
        found = []
        for head, summary in zip(self.heads, summaries, strict=True):
            loc, raw = (self.start + head(summary)).split(self.size, -1)
            found.append((loc, positive(raw)))
        return found

    def multiply(self, experts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Parameters of the product of Gaussians, ``(*S, B, 2 K)``."""
        precisions = [scale**-2 for _, scale in experts]
        precision = sum(precisions[1:], precisions[0])
        weighted = [loc * p for (loc, _), p in zip(experts, precisions, strict=True)]
        loc = sum(weighted[1:], weighted[0]) / precision
        return torch.cat([loc, inverse_positive(precision.rsqrt())], -1)

    def forward(self, summaries: Sequence[Tensor]) -> Tensor:
        """Parameters of q of a step, ``(*S, B, 2 K)``."""
        return self.multiply(self.experts(summaries))

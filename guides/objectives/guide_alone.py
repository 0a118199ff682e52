"""The gradient of a loss in a guide's parameters, and in no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["of_guide_alone"]


def of_guide_alone(loss: Tensor, guide: Any) -> Tensor:
    """A loss with its gradient in the guide's parameters, and in no others.

        loss + sum_p g_p (p - stop(p))          g_p = d loss / d p, stop(loss) in place of loss

    Refined guides run the model, whose parameters must not learn from the guide's loss: be they
    those of a module or in Pyro's parameter store.

    Args:
        loss: A scalar.
        guide: The guide, a module.

    Returns:
        A scalar of the same value.
    """
    own = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    if not own or not loss.requires_grad:
        return loss.detach()
    gradients = torch.autograd.grad(loss, own, allow_unused=True)
    terms = [
        (gradient.detach() * parameter).sum()
        for gradient, parameter in zip(gradients, own, strict=True)
        if gradient is not None
    ]
    if not terms:
        return loss.detach()
    path = torch.stack(terms).sum()
    return loss.detach() + (path - path.detach())

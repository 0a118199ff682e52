"""Coupling flows: half of the coordinates changed at a time, given the other half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.conditioned import ConditionedFlow, network

__all__ = ["CouplingFlow"]


class CouplingFlow(ConditionedFlow):
    """Steps that change every other coordinate, given the rest and the context.

        y_a = z_a;  y_b = f(z_b; network(z_a, context))           a and b swap from step to step

    With K = 1 there is no rest: steps are conditioned on the context alone.

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number T of steps.
        hidden: Widths of the hidden layers of the networks.
        total: Number of parameters of the function of one variable.
        init_scale: Standard deviation at the start.
        base: See :func:`guides.families.base.base_family`.
    """

    def __init__(
        self,
        size: int,
        *,
        context: int,
        transforms: int,
        hidden: Sequence[int],
        total: int,
        init_scale: float,
        base: Base,
    ) -> None:
        super().__init__(
            size,
            context=context,
            transforms=transforms,
            total=total,
            init_scale=init_scale,
            base=base,
        )
        for number in range(transforms):
            kept, changed = self._halves(number)
            inputs, outputs = len(kept) + context, len(changed) * total
            self.networks.append(network(inputs, outputs, hidden))

    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in turn."""
        log_det = torch.zeros_like(e[..., 0])
        for number in range(len(self.networks)):
            kept, changed = self._halves(number)
            phi = self.phi(number, e[..., kept], flow)
            y, slope = self.univariate(number, phi, e[..., changed])
            e = _merged(e[..., kept], y, kept, changed)
            log_det = log_det + slope.sum(-1)
        return e, log_det

    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The steps' inverses in reverse, one pass each."""
        log_det = torch.zeros_like(y[..., 0])
        for number in reversed(range(len(self.networks))):
            kept, changed = self._halves(number)
            phi = self.phi(number, y[..., kept], flow)
            x = self.univariate_inverse(number, phi, y[..., changed])
            log_det = log_det + self.univariate(number, phi, x)[1].sum(-1)
            y = _merged(y[..., kept], x, kept, changed)
        return y, log_det

    def _halves(self, number: int) -> tuple[list[int], list[int]]:
        everything = range(self.size)
        if self.size == 1:
            return [], [0]
        kept = [i for i in everything if i % 2 == number % 2]
        return kept, [i for i in everything if i % 2 != number % 2]


def _merged(kept: Tensor, changed: Tensor, at: list[int], others: list[int]) -> Tensor:
    """One vector of two halves; out of place, so that torch.func transforms can trace it."""
    shape = torch.broadcast_shapes(kept.shape[:-1], changed.shape[:-1])
    parts = torch.cat([kept.expand(*shape, -1), changed.expand(*shape, -1)], -1)
    order = at + others
    return parts[..., [order.index(i) for i in range(len(order))]]

"""Autoregressive flows: every coordinate changed, given those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.families.base import Base
from guides.families.conditioned import ConditionedFlow, network, small_last_layer
from guides.families.zuko_parts import MaskedMLP

__all__ = ["AutoregressiveFlow"]


class AutoregressiveFlow(ConditionedFlow):
    """Steps that change every coordinate, given those before it and the context.

        y_i = f(z_i; network(z_<i, context)_i)           the order is reversed from step to step

    The networks are masked (MADE): one pass computes all coordinates, from noise to latents. The
    inverse needs K passes a step. With K = 1 steps are conditioned on the context alone.

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
            if size == 1:
                self.networks.append(network(context, total, hidden))
                continue
            place = torch.tensor(self.order(number)).argsort()
            before = place.unsqueeze(-1) > place
            # The context joins after the first masked layer: every hidden unit may read it.
            sees = torch.cat([before, torch.ones(size, context, dtype=torch.bool)], -1)
            # Bounded units: what the inverse finds far out does not grow from one to the next.
            masked = MaskedMLP(sees.repeat_interleave(total, 0), hidden, activation=nn.Tanh)
            self.networks.append(small_last_layer(masked))

    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in turn."""
        log_det = torch.zeros_like(e[..., 0])
        for number in range(len(self.networks)):
            e, slope = self.univariate(number, self.conditions(number, e, flow), e)
            log_det = log_det + slope.sum(-1)
        return e, log_det

    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The steps' inverses in reverse, coordinate by coordinate."""
        log_det = torch.zeros_like(y[..., 0])
        for number in reversed(range(len(self.networks))):
            shape = torch.broadcast_shapes(y.shape[:-1], flow.shape[:-1])
            found = [y.new_zeros(shape)] * self.size
            for i in self.order(number):
                phi = self.conditions(number, torch.stack(found, -1), flow)[..., i : i + 1, :]
                found[i] = self.univariate_inverse(number, phi, y[..., i : i + 1]).squeeze(-1)
            y = torch.stack(found, -1)
            slope = self.univariate(number, self.conditions(number, y, flow), y)[1]
            log_det = log_det + slope.sum(-1)
        return y, log_det

    def conditions(self, number: int, z: Tensor, context: Tensor) -> Tensor:
        """The parameters ``(..., K, total)`` of each coordinate's function, by those before it."""
        return self.phi(number, z if self.size > 1 else z[..., :0], context)

    def order(self, number: int) -> list[int]:
        """The coordinates from the first to the last that the step conditions."""
        order = range(self.size)
        return list(order if number % 2 == 0 else reversed(order))

"""Recurrent cells that take any leading dimensions, as draws of a program have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Recurrent"]


class Recurrent(nn.Module):
    """A gated recurrent unit, starting from a learned state.

        r, u  = sigmoid(W [inputs, h] + b)
        new   = tanh(V inputs + r * (U h + c) + d)
        h_t   = (1 - u) * new + u * h_{t-1}

    Of linear layers: torch's own cell takes two dimensions only and has no batching rule, which
    draws on the left and exact Hessians need.

    References:
        | Learning phrase representations using RNN encoder-decoder (Cho et al., 2014)
        | https://arxiv.org/abs/1406.1078

    Args:
        inputs: Size of the inputs.
        hidden: Size H of the state.

    Example:
        >>> cell = Recurrent(3, 5)
        >>> cell(torch.zeros(2, 4, 3), None).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.of_inputs = nn.Linear(inputs, 3 * hidden)
        self.of_state = nn.Linear(hidden, 3 * hidden)
        self.start = nn.Parameter(0.1 * torch.randn(hidden))

    def forward(self, inputs: Tensor, state: Tensor | None) -> Tensor:
        """The next state ``(..., H)``.

        Args:
            inputs: Inputs ``(..., I)``.
            state: The last state ``(..., H)``; None for the first step.
        """
        state = self.start if state is None else state
        reset, update, new = self.of_inputs(inputs).chunk(3, -1)
        own_reset, own_update, own_new = self.of_state(state).chunk(3, -1)
        gate = torch.sigmoid(update + own_update)
        candidate = torch.tanh(new + torch.sigmoid(reset + own_reset) * own_new)
        moved: Tensor = (1 - gate) * candidate + gate * state
        return moved

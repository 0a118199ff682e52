"""Context: what recurrent networks say about the data up to a step, and from it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["CELLS", "Context"]

CELLS: dict[str, type[nn.RNNBase]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class Context(nn.Module):
    """Recurrent summaries of the observations, one vector a step and row.

        l_t = cell(x_t, l_{t-1})        with ``past``: what was seen up to and with step t
        r_t = cell(x_t, r_{t+1})        with ``future``: what is seen from step t on

    The backward network starts at the last step that a row has, wherever that is in the batch:
    padding does not reach it.

    Args:
        features: Observed features F of a step.
        recurrent: Size H of each network's state; 0 for no network, x_t itself.
        past: Whether there is a forward network.
        future: Whether there is a backward network.
        cell: ``"gru"``, ``"lstm"`` or ``"rnn"``.
        like: A tensor of the dtype and device of the parameters.

    Raises:
        ValueError: For an unknown cell or a negative size.
    """

    def __init__(
        self, features: int, recurrent: int, past: bool, future: bool, cell: str, like: Tensor
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}.")
        if recurrent < 1:
            raise ValueError(f"recurrent must be at least 1, got {recurrent}.")
        self.recurrent = recurrent

        def network() -> nn.RNNBase:
            return CELLS[cell](features, recurrent, batch_first=True).to(like)

        self.forwards = network() if past else None
        self.backwards = network() if future else None
        self.size = recurrent * (int(past) + int(future)) + (0 if past or future else features)

    def forward(self, inputs: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Summaries ``(B, T, size)``.

        Args:
            inputs: Observations ``(B, T, F)``.
            masks: Rows that have each step, ``(B,)`` or None.
        """
        parts = []
        if self.forwards is not None:
            parts.append(self.forwards(inputs)[0])
        if self.backwards is not None:
            order = _reversed(inputs, masks)
            flipped = inputs.gather(1, order[..., None].expand_as(inputs))
            states = self.backwards(flipped)[0]
            parts.append(states.gather(1, order[..., None].expand_as(states)))
        return torch.cat(parts, -1) if parts else inputs


def _reversed(inputs: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """Positions ``(B, T)`` that turn the steps of every row around and leave padding behind."""
    number = inputs.shape[1]
    steps = torch.arange(number, device=inputs.device)
    if all(mask is None for mask in masks):
        return (number - 1 - steps).expand(inputs.shape[0], -1)
    ones = torch.ones(inputs.shape[0], dtype=torch.bool, device=inputs.device)
    on = torch.stack([ones if mask is None else mask for mask in masks], 1)  # (B, T)
    last = torch.where(on, steps, -1).amax(1, keepdim=True)  # holes before it stay in place
    return torch.where(steps <= last, last - steps, steps)

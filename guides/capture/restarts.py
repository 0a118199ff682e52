"""Several runs of one program as one more batch dimension."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Stack"]


class Stack:
    """Parameters and optimizer states of R runs, along a new dimension on the left.

    Run 0 starts where the parameters are; the others start at normal perturbations of them.

    Args:
        num_restarts: Number of runs R.
        jitter: Standard deviation of the perturbations, of unconstrained parameters.
    """

    def __init__(self, num_restarts: int, jitter: float) -> None:
        self.num_restarts = num_restarts
        self.jitter = jitter
        self._parameters: dict[Tensor, Tensor] = {}
        self._states: dict[Tensor, Tensor] = {}

    def parameter(self, live: Tensor) -> Tensor:
        """Values of a parameter in all runs, ``(R, ...)``."""
        if live not in self._parameters:
            value = live.detach()
            stacked = value.expand(self.num_restarts, *value.shape).clone()
            if self.jitter:
                stacked[1:] += self.jitter * torch.randn_like(stacked[1:])
            self._parameters[live] = stacked
        return self._parameters[live]

    def state(self, live: Tensor) -> Tensor:
        """Values of a tensor of the optimizer's state in all runs, ``(R, ...)``."""
        if live not in self._states:
            self._states[live] = live.expand(self.num_restarts, *live.shape).clone()
        return self._states[live]

    def select(self, run: int) -> None:
        """Bring the parameters and the optimizer to those of one run."""
        with torch.no_grad():
            for live, stacked in (*self._parameters.items(), *self._states.items()):
                live.copy_(stacked[run])

    def live(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that :meth:`select` writes into, with copies of their values."""
        tensors = (*self._parameters, *self._states)
        return [(tensor, tensor.detach().clone()) for tensor in tensors]

    @staticmethod
    def restore(kept: list[tuple[Tensor, Tensor]]) -> None:
        """Undo selections since :meth:`live`."""
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

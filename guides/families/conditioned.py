"""Flows with shared networks and a context of the datum's own.

Coupling and autoregressive flows apply an increasing function of one variable to every coordinate
that they change; networks compute its parameters from the other coordinates and the context. They
differ in who may see whom: a coupling step keeps half of the coordinates and inverts in one pass,
an autoregressive step lets each coordinate see all before it and inverts in K passes.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.families.base import Base
from guides.families.flow import Flow

__all__ = ["ConditionedFlow", "network", "small_last_layer"]


class ConditionedFlow(Flow):
    """T steps of networks that all rows share, bent by one context vector a row.

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number T of steps.
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
        total: int,
        init_scale: float,
        base: Base,
    ) -> None:
        if transforms < 1 or context < 0:
            raise ValueError(
                "transforms must be at least 1 and context at least 0, got "
                f"transforms={transforms}, context={context}."
            )
        super().__init__(size, torch.zeros(context), init_scale=init_scale, base=base)
        self.context = context
        self.total = total
        self.networks = nn.ModuleList()

    @abc.abstractmethod
    def univariate(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """An increasing function of one variable, with the logarithm of its slope.

        Args:
            number: Which of the T steps.
            phi: Its parameters ``(..., n, total)``.
            x: Coordinates ``(..., n)``.
        """

    @abc.abstractmethod
    def univariate_inverse(self, number: int, phi: Tensor, y: Tensor) -> Tensor:
        """The point that ``univariate`` takes to ``y``."""

    def phi(self, number: int, seen: Tensor, context: Tensor) -> Tensor:
        """The parameters ``(..., n, total)`` of a step's functions.

        Args:
            number: Which of the T steps.
            seen: Coordinates ``(..., m)`` that the network reads.
            context: Context ``(..., C)`` of the rows.
        """
        shape = torch.broadcast_shapes(seen.shape[:-1], context.shape[:-1])
        inputs = torch.cat([seen.expand(*shape, -1), context.expand(*shape, -1)], -1)
        return self.networks[number](inputs).unflatten(-1, (-1, self.total))


class _Free(nn.Module):
    """The network without inputs: free parameters, the same for every row."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.value = nn.Parameter(0.01 * torch.randn(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.value.expand(*inputs.shape[:-1], -1)


def network(inputs: int, outputs: int, hidden: Sequence[int]) -> nn.Module:
    """A multilayer perceptron with a small last layer; free parameters where nothing comes in."""
    if inputs == 0:
        return _Free(outputs)
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.SiLU()]
        inputs = width
    return small_last_layer(nn.Sequential(*layers, nn.Linear(inputs, outputs)))


def small_last_layer(layers: nn.Sequential) -> nn.Sequential:
    """Near the identity, but not at it: from zero the layers before would get no gradient."""
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.mul_(0.01)
    return layers

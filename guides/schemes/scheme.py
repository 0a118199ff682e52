"""The contract of a scheme: one call of the model to the parameters of q for its rows."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from guides.layout import Layout
from guides.probe import Program
from guides.sites import Group

__all__ = ["Call", "Scheme"]


@dataclass(frozen=True)
class Call:
    """One call of the guide, as a scheme sees it.

    Args:
        model: The program that the guide is for.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        layout: The layout of this call.
    """

    model: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout


class Scheme(nn.Module, abc.ABC):
    """Finds the parameters of q for the rows of a call."""

    amortized: bool = False
    """Whether rows that were not seen before get parameters without being refitted."""

    @abc.abstractmethod
    def forward(self, group: Group, call: Call) -> Tensor:
        """Parameters ``(B, P)`` of the rows of the data group, ``(P,)`` of the global group."""

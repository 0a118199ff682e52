"""The contract of a scheme: one call of the model to the parameters of q for its rows."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from guides.arguments import did_you_mean
from guides.layout import Layout
from guides.probe import Program
from guides.sites import Group

if TYPE_CHECKING:
    from guides.guide import Guide

__all__ = ["Call", "Scheme"]


@dataclass(frozen=True)
class Call:
    """One call of the guide, as a scheme sees it.

    Args:
        model: The program that the guide is for.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        layout: The layout of this call.
        guide: The guide; None only while it is being built.
        upstream: Packed draws of the groups before this one, as :meth:`draws` returns them but
            at the plates' dimensions.
    """

    model: Program
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout
    guide: Guide | None = field(default=None, repr=False)
    upstream: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def draws(self, name: str) -> Tensor:
        """Packed draws of an earlier group, ``(*S, B, K)``, or ``(*S, K)`` of a global one."""
        group = self.layout.group(name)
        if group is None or name not in self.upstream:
            raise ValueError(
                f"No draws of group {name!r} here. Groups drawn before: "
                f"{', '.join(self.upstream) or 'none'}."
            )
        value = self.upstream[name]
        if group.plate is None:
            plate = self.layout.data_plate
            if plate is None or value.dim() == 1:
                return value
            # They stand at the plates' dimensions: ones between the draws and the vector.
            return value.reshape(*value.shape[: plate.dim - 1], group.size)
        left = value.shape[: value.dim() + group.plate.dim - 1]
        return value.reshape(*left, group.plate.num_rows, group.size)


class Scheme(nn.Module, abc.ABC):
    """Finds the parameters of q for the rows of a call."""

    amortized: bool = False
    """Whether rows that were not seen before get parameters without being refitted."""

    order: str | None = None
    """How the latents of the data plate are split into groups, one a site, for schemes that
    represent the dependence between them: ``"program"``, ``"reversed"``; None for one group."""

    reads_model: bool = False
    """Whether q follows from the program itself, and not from its data alone."""

    _built: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What may be changed after construction, as it is now; :func:`guides.save` keeps it."""
        return {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse new numbers, switches and strings once the guide is built: they are typos."""
        plain = isinstance(value, (bool, int, float, str)) and not name.startswith("_")
        if plain and self._built and not hasattr(self, name):
            known = [key for key in vars(self) if not key.startswith("_")]
            raise AttributeError(
                f"{type(self).__name__} has no attribute {name!r}, so setting it would change "
                f"nothing. {did_you_mean(name, known)}Its settings: "
                f"{', '.join(self.settings) or 'none'}."
            )
        super().__setattr__(name, value)

    @abc.abstractmethod
    def forward(self, group: Group, call: Call) -> Tensor:
        """Parameters ``(B, P)`` of the rows of the data group, ``(P,)`` of the global group.

        A scheme that reads ``call.upstream`` returns ``(*S, B, P)`` where those draws have
        leading dimensions.
        """

    def start(self, group: Group, call: Call) -> Tensor:
        """Parameters before any refinement; for most schemes the parameters."""
        return self(group, call)

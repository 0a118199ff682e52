"""Records of refinement, from which an objective takes the gradients of earlier iterations.

A refined guide hands the last parameters to the program, so an ordinary objective sees the last
iteration alone. While a record is kept, schemes write down the parameters of every iteration and
the gradients of the bound there, which they have taken anyway; see
:class:`guides.objectives.RefinementELBO`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guides.families.family import Family

__all__ = ["Iterate", "Refined", "Scaled", "active", "recording", "scale_gradient"]


@dataclass(frozen=True)
class Iterate:
    """The bound at one iteration.

    Args:
        lam: Parameters ``(B, P)``, attached to what made them.
        gradient: Gradient of the rows' bound in them ``(B, P)``, detached.
        weights: Its gradients in the family's own weights, by name, detached.
    """

    lam: Tensor
    gradient: Tensor
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Refined:
    """One refinement.

    Args:
        group: Name of the group.
        family: Its family.
        scale: The data plate's N/B.
        iterates: Iterations before the last.
        fraction: Weight of every iteration, the last included, in what the guide learns from.
    """

    group: str
    family: Family
    scale: float
    iterates: tuple[Iterate, ...]
    fraction: float


_STACK: list[list[Refined]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Refined]]:
    """Keep a record of every refinement inside."""
    record: list[Refined] = []
    _STACK.append(record)
    try:
        yield record
    finally:
        _STACK.pop()


def active() -> list[Refined] | None:
    """The record that is being kept, None where none is."""
    return _STACK[-1] if _STACK else None


class Scaled(Family):
    """A family whose own weights get a fraction of their gradient.

    Args:
        family: The family.
        fraction: The fraction.
    """

    def __init__(self, family: Family, fraction: float) -> None:
        super().__init__(family.size)
        # In a tuple, so that it does not become a submodule.
        self._family = (family,)
        self._fraction = fraction

    @property
    def num_params(self) -> int:
        """Of the family."""
        return self._family[0].num_params

    @property
    def noise_size(self) -> int:
        """Of the family."""
        return self._family[0].noise_size

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Of the family."""
        return self._family[0].noise(shape, like)

    def init(self, loc: Tensor) -> Tensor:
        """Of the family."""
        return self._family[0].init(loc)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Of the family, at weights with scaled gradients."""
        u, log_q = self._call("push", lam, noise)
        return u, log_q

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Of the family, at weights with scaled gradients."""
        result: Tensor = self._call("log_prob", lam, value)
        return result

    def entropy(self, lam: Tensor) -> Tensor | None:
        """Of the family, at weights with scaled gradients."""
        result: Tensor | None = self._call("entropy", lam)
        return result

    def _call(self, method: str, *args: Tensor) -> Any:
        family = self._family[0]
        weights = {n: scale_gradient(p, self._fraction) for n, p in family.named_parameters()}
        return torch.func.functional_call(family, weights, (method, *args))


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """The same value, whose gradient is multiplied by ``factor``."""
    return value.detach() + factor * (value - value.detach())

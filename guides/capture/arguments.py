"""The arguments of a call, split into tensors and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Arguments", "flatten"]


@dataclass(frozen=True)
class Arguments:
    """One call, taken apart.

    Args:
        tensors: Its tensors, which become inputs of a graph.
        rest: Everything else by position, which is part of the program.
        structure: How to put them together.
        key: Equal for calls that one graph serves.
    """

    tensors: list[Tensor]
    rest: tuple[Any, ...]
    structure: Any
    key: Any

    def build(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these tensors in place of its own."""
        given = iter(tensors)
        leaves = [next(given) if value is Tensor else value for value in self.rest]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return tuple(args), dict(kwargs)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Take a call apart.

    Numbers and other values that are no tensors are part of the key: a graph has them built in.
    What cannot be hashed is told by its identity.
    """
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors: list[Tensor] = []
    rest: list[Any] = []
    key: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, torch.nn.Parameter):
            tensors.append(leaf)
            rest.append(Tensor)
            key.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        else:
            rest.append(leaf)
            key.append((type(leaf), leaf if _hashable(leaf) else id(leaf)))
    return Arguments(tensors, tuple(rest), structure, (str(structure), tuple(key)))


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

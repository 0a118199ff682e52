"""The arguments of a call, split into tensors and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Arguments", "flatten", "refuse"]


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
    What cannot be hashed, such as an array, is told by its type: see :func:`refuse`.
    """
    leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors: list[Tensor] = []
    rest: list[Any] = []
    key: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, torch.nn.Parameter):
            tensors.append(leaf)
            rest.append(Tensor)
            strides = leaf.stride() if leaf.layout is torch.strided else leaf.layout
            key.append((leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad))
        else:
            rest.append(leaf)
            key.append((type(leaf), leaf) if _hashable(leaf) else (type(leaf),))
    return Arguments(tensors, tuple(rest), structure, (str(structure), tuple(key)))


def refuse(arguments: Arguments) -> str | None:
    """Why no graph stands for calls with such arguments, None where one may."""
    for leaf in arguments.rest:
        if leaf is not Tensor and not _hashable(leaf):
            # Its values would be built in, and other ones may come in the same object.
            return f"an argument is a {type(leaf).__name__}, whose values change: pass a tensor"
    for tensor in arguments.tensors:
        if tensor.requires_grad:
            return "an argument requires a gradient, which a graph does not give it"
        if tensor.layout is not torch.strided:
            return f"an argument is a tensor of layout {tensor.layout}"
    return None


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

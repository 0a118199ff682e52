"""Whether two calls bring the same data: the same tensors, unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["CallData"]

_PLAIN = (bool, int, float, str, type(None))


class CallData:
    """The arguments of a call, to be told from those of another one.

    Two calls have the same data if every tensor is the same object and was not written into since,
    every number and string is equal, and everything else is the same object.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.

    Example:
        >>> x = torch.zeros(3)
        >>> first = CallData((x,), {})
        >>> first.same(CallData((x,), {})), first.same(CallData((x.clone(),), {}))
        (True, False)
        >>> _ = x.add_(1.0)
        >>> first.same(CallData((x,), {}))
        False
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        leaves, structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._leaves = leaves
        self._structure = structure
        self._versions = [_version(leaf) for leaf in leaves]

    def same(self, other: CallData) -> bool:
        """Whether both calls have the same data."""
        if self._structure != other._structure or None in self._versions:
            return False
        pairs = zip(self._leaves, other._leaves, strict=True)
        return self._versions == other._versions and all(_equal(*pair) for pair in pairs)

    def digest(self) -> str | None:
        """What stands for the values in a saved state; None where they have changed since."""
        if self._versions != [_version(leaf) for leaf in self._leaves]:
            return None
        found = hashlib.sha256(str(self._structure).encode())
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                value = leaf.detach().cpu().contiguous()
                found.update(f"{tuple(value.shape)} {value.dtype}".encode())
                found.update(value.flatten().view(torch.uint8).numpy().tobytes())
            elif isinstance(leaf, _PLAIN):
                found.update(repr(leaf).encode())
            else:
                return None
        return found.hexdigest()


def _version(leaf: Any) -> int | None:
    """None where nothing would tell that a tensor was written into."""
    if not isinstance(leaf, Tensor):
        return 0
    return None if leaf.is_inference() else leaf._version


def _equal(first: Any, second: Any) -> bool:
    if first is second:
        return True
    plain = isinstance(first, _PLAIN) and type(first) is type(second)
    return plain and bool(first == second)

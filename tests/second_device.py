"""What would break on a second device, found without one.

A tensor that is made without saying where (``torch.zeros(3)``) is made on the CPU. Inside
:class:`Elsewhere` such tensors carry a mark, and so does all that is computed from them alone; an
operation that mixes a marked tensor with an unmarked one raises, as an accelerator would for data
that are there. What follows the data carries no mark: ``x.new_zeros``, ``device=x.device``,
``.to(x)``. Numbers (no dimensions) and indices may come from the CPU, there as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Elsewhere", "is_marked"]

_FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
        *("randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
    )
)
# These read a tensor's shape, copy between devices, or take indices from the CPU.
_MAY_MIX = frozenset(
    (
        *(Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, Tensor.expand_as, Tensor.view_as),
        *(Tensor.type_as, Tensor.reshape_as, torch.is_same_size),
    )
)


def is_marked(value: Any) -> bool:
    """Whether a tensor was made without saying where."""
    return isinstance(value, Tensor) and getattr(value, "_made_here", False)


class Elsewhere(TorchFunctionMode):
    """As if all tensors from outside were on a second device."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            made = func(*args, **kwargs)
            return made if kwargs.get("device") is not None else _mark(made)
        if func is Tensor.to:
            moved = func(*args, **kwargs)
            where = [*args[1:], kwargs.get("device"), kwargs.get("other")]
            if not any(isinstance(item, Tensor | torch.device | str | int) for item in where):
                return _mark(moved) if is_marked(args[0]) else moved
            # Where nothing changes torch returns the tensor itself, with its mark.
            return torch.ops.aten.alias(moved) if is_marked(moved) else moved
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()]
        marked = [x for x in tensors if is_marked(x)]
        first = args[0] if args else None
        if func in _MAY_MIX:
            found = func(*args, **kwargs)
            return _mark(found) if is_marked(first) else found
        name = getattr(func, "__name__", str(func))
        if marked and len(marked) < len(tensors) and name != "__get__":
            raise RuntimeError(
                f"{name} mixes tensors of shapes {[tuple(x.shape) for x in marked]}, which were "
                "made without a device, with data that may be on another one. Make them with "
                "device=x.device, or by x.new_zeros and the like."
            )
        found = func(*args, **kwargs)
        return _mark(found) if marked else found


def _mark(value: Any) -> Any:
    for item in _tensors(value):
        item._made_here = True  # type: ignore[attr-defined]
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    for item in tree_leaves(value):
        if isinstance(item, Tensor) and item.dim():
            yield item

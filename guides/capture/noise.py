"""Random draws of a graph: how they are repeated outside of it, in the order of the program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from guides.capture.operations import is_random

__all__ = ["Draw", "noise_as_inputs"]

_NORMAL = torch.ops.aten.normal_.default


@dataclass(frozen=True)
class Draw:
    """One random draw that depends on nothing: how to repeat it.

    Args:
        target: The operation.
        args: Its arguments; for an operation in place, those after the tensor it fills.
        kwargs: Its keyword arguments.
        shape: Shape of the tensor that is filled in place, None for other operations.
        dtype: Its dtype.
        device: Its device.
    """

    target: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device

    def __call__(self, *left: int) -> Tensor:
        """Draw; with sizes given, as many independent draws along new dimensions on the left."""
        if self.shape is None:
            if not left:
                return self.target(*self.args, **self.kwargs)
            return torch.stack([self(*left[1:]) for _ in range(left[0])])
        shape = (*left, *self.shape)
        empty = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self.target(empty, *self.args, **self.kwargs)

    @property
    def is_standard_normal(self) -> bool:
        """Whether it fills a tensor with standard normal numbers."""
        plain = not self.args and not self.kwargs
        return self.shape is not None and self.target is _NORMAL and plain

    def repeated(self, *left: int) -> Callable[[], Tensor]:
        """What draws as a call with these sizes does, with as little around it as can be."""
        if not self.is_standard_normal:
            return functools.partial(self, *left)
        shape = (*left, *(self.shape or ()))
        return functools.partial(torch.randn, shape, dtype=self.dtype, device=self.device)


def noise_as_inputs(module: fx.GraphModule) -> tuple[list[tuple[fx.Node, Draw]], list[str]]:
    """Replace random operations that depend on nothing by inputs."""
    graph = module.graph
    random = [node for node in graph.nodes if is_random(node)]
    free = {}
    live = []
    for node in random:
        tensors = node.all_input_nodes
        filled = bool(tensors) and node.args[0] is tensors[0] and _is_empty(tensors[0])
        in_place = str(getattr(node.target, "_schema", "")).split("(")[0].endswith("_") or (
            "!" in str(node.target._schema)
        )
        if not tensors or (filled and in_place and len(tensors) == 1):
            free[node] = tensors[0] if tensors else None
        else:
            live.append(str(node.target))
    if live:
        # One stream serves all draws, so either all of them are made ahead or none.
        return [], live
    found: list[tuple[fx.Node, Draw]] = []
    first = next(iter(graph.nodes))
    for node, empty in free.items():
        value = node.meta["val"] if "val" in node.meta else node.meta["tensor_meta"]
        shape = None if empty is None else tuple(value.shape)
        args = node.args if empty is None else node.args[1:]
        draw = Draw(node.target, args, dict(node.kwargs), shape, value.dtype, value.device)
        with graph.inserting_before(first):
            new = graph.placeholder(f"noise_{len(found)}")
        new.meta["val"] = value
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if empty is not None:
            empty.replace_all_uses_with(new)
            graph.erase_node(empty)
        found.append((new, draw))
    return found, live


def _is_empty(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_strided.default,
    )

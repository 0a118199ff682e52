"""Gradients of weights that serve many steps, as one product in place of a sum of products.

    A_1 B_1 + .. + A_T B_T  =  [A_1 .. A_T] [B_1; ..; B_T]
    1' G_1 + .. + 1' G_T    =  1' [G_1; ..; G_T]

Backpropagation through T steps adds up T products of a few rows each, every one as large as the
weight. Reading and writing a weight of a recurrent network T times takes longer than all
multiplications of the step; one product of all rows writes it once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from guides.capture.graph import Metadata

__all__ = ["join_products"]

_ATEN = torch.ops.aten
_LEAST = 3
_NUMBERS = 100_000
"""Numbers of all terms below which nothing is saved that is worth another order of rounding."""


@dataclass(frozen=True)
class _Product:
    """``left.T @ right``, or its transpose; the column sum of ``right`` without a ``left``.

    Args:
        left: ``(rows, M)``, or None.
        right: ``(rows, N)``.
        flipped: Whether the term is the transpose.
        shape: Shape of a column sum.
    """

    left: fx.Node | None
    right: fx.Node
    flipped: bool = False
    shape: tuple[int, ...] = ()


def join_products(graph: fx.Graph, *, numbers: int = _NUMBERS) -> int:
    """Replace sums of at least three products, or of column sums, by one of all their rows.

    Args:
        graph: A graph whose nodes carry shapes, from :func:`guides.capture.graph.trace`.
        numbers: Least size of a sum's terms together; smaller sums stay as they are, in the
            order of the program.

    Returns:
        How many sums were replaced.
    """
    replaced = 0
    for root in reversed(list(graph.nodes)):
        if not root.users or not _is_sum(root):
            continue  # sums without users were parts of one that is replaced
        if any(_continues(root, user) for user in root.users):
            continue
        groups: dict[Any, list[_Product]] = {}
        rest: list[fx.Node] = []
        leaves = _leaves(root)
        if len(leaves) * math.prod(_shape(root) or ()) < numbers:
            continue
        for leaf in leaves:
            found = _product(leaf)
            if found is None:
                rest.append(leaf)
            else:
                kind = (found.left is None, found.flipped, found.shape, _types(found))
                groups.setdefault(kind, []).append(found)
        if not any(len(members) >= _LEAST for members in groups.values()):
            continue
        if any(len(members) < _LEAST for members in groups.values()):
            continue  # a mixture, which no program seen so far has
        with graph.inserting_before(root):
            terms = [_joined(graph, members) for members in groups.values()]
            total = terms[0]
            for term in (*terms[1:], *rest):
                total = graph.call_function(_ATEN.add.Tensor, (total, term))
                total.meta = dict(root.meta)
        root.replace_all_uses_with(total)
        graph.erase_node(root)
        replaced += 1
    if replaced:
        graph.eliminate_dead_code()
    return replaced


def _shape(node: Any) -> tuple[int, ...] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    shape = getattr(value, "shape", None)
    return None if shape is None else tuple(shape)


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors of its own shape."""
    if node.target is not _ATEN.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    shape = _shape(node)
    return shape is not None and all(_shape(part) == shape for part in node.args)


def _continues(node: fx.Node, user: fx.Node) -> bool:
    return len(node.users) == 1 and _is_sum(user) and _shape(user) == _shape(node)


def _leaves(root: fx.Node) -> list[fx.Node]:
    """The terms of a sum, first to last."""
    found: list[fx.Node] = []
    waiting: list[fx.Node] = [root]
    while waiting:
        node = waiting.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            waiting += [part for part in reversed(node.args) if isinstance(part, fx.Node)]
        else:
            found.append(node)
    return found


def _product(leaf: fx.Node) -> _Product | None:
    """What a term is, where nothing but the sum reads it."""
    node, flipped = leaf, False
    while node.target is _ATEN.t.default and len(node.users) == 1:
        (node,), flipped = node.all_input_nodes, not flipped
    if len(node.users) != 1:
        return None
    if node.target is _ATEN.mm.default:
        left, right = node.args
        if isinstance(left, fx.Node) and left.target is _ATEN.t.default:
            (source,) = left.all_input_nodes
            if isinstance(right, fx.Node) and _shape(source) and _shape(right):
                return _Product(source, right, flipped)
        return None
    shape = _shape(leaf)
    if node is leaf and node.target is _ATEN.view.default:
        (node,) = node.all_input_nodes
    if flipped or shape is None or not _sums_columns(node):
        return None
    (source,) = node.all_input_nodes
    return _Product(None, source, shape=shape)


def _sums_columns(node: fx.Node) -> bool:
    """Whether the node is the sum of a matrix over its rows, read once."""
    if node.target is not _ATEN.sum.dim_IntList or node.kwargs or len(node.users) != 1:
        return False
    (source,) = node.all_input_nodes
    return len(_shape(source) or ()) == 2 and node.args[1] == [0]


def _types(product: _Product) -> Any:
    parts = (product.right,) if product.left is None else (product.left, product.right)
    return tuple((node.meta["val"].dtype, node.meta["val"].shape[1:]) for node in parts)


def _joined(graph: fx.Graph, members: list[_Product]) -> fx.Node:
    first = members[0]
    right = _stacked(graph, [member.right for member in members])
    value = right.meta["val"]
    if first.left is None:
        total = graph.call_function(_ATEN.sum.dim_IntList, (right, [0], True))
        total.meta["val"] = Metadata.contiguous((1, value.shape[1]), value)
        result = graph.call_function(_ATEN.view.default, (total, list(first.shape)))
        result.meta["val"] = Metadata.contiguous(first.shape, value)
        return result
    left = _stacked(graph, [member.left for member in members if member.left is not None])
    result = graph.call_function(_ATEN.mm.default, (_turned(graph, left), right))
    shape = (left.meta["val"].shape[1], value.shape[1])
    result.meta["val"] = Metadata.contiguous(shape, value)
    return _turned(graph, result) if first.flipped else result


def _stacked(graph: fx.Graph, parts: list[fx.Node]) -> fx.Node:
    rows = sum(part.meta["val"].shape[0] for part in parts)
    value = parts[0].meta["val"]
    node = graph.call_function(_ATEN.cat.default, (parts, 0))
    node.meta["val"] = Metadata.contiguous((rows, value.shape[1]), value)
    return node


def _turned(graph: fx.Graph, node: fx.Node) -> fx.Node:
    turned = graph.call_function(_ATEN.t.default, (node,))
    turned.meta["val"] = node.meta["val"].transposed()
    return turned

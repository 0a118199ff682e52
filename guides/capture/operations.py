"""What operations of a graph do: write, share memory, draw; and terms that are computed twice."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["is_random", "is_view", "share_equal_terms", "targets"]


def share_equal_terms(graph: fx.Graph) -> int:
    """Compute once what is computed more than once, and nothing that is not used.

    Terms of the data alone, and terms whose parents do not move, are equal in all iterations and
    steps of one graph, so this takes them out of the loop.

    Returns:
        How many operations were left out.
    """
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    touched = _written(graph)
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or is_random(node) or node in touched:
            continue
        if any(source in touched for source in node.all_input_nodes):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        if key in known:
            node.replace_all_uses_with(known[key])
            graph.erase_node(node)
        else:
            known[key] = node
    return before - len(graph.nodes)


def _frozen(value: Any) -> Any:
    """A hashable form that tells 1 from 1.0 and True."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return (type(value), repr(value)) if isinstance(value, (int, float)) else value


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that an operation writes into, and all that share their memory."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        for source in targets(node):
            while is_view(source) and source.all_input_nodes:
                source = source.all_input_nodes[0]
            written.add(source)
    grown = True
    while grown:
        grown = False
        for node in graph.nodes:
            shares = is_view(node) or targets(node)
            if node not in written and shares and any(s in written for s in node.all_input_nodes):
                written.add(node)
                grown = True
    return written


def is_view(node: fx.Node) -> bool:
    """Whether a result shares memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function":
        return False
    if schema is None:
        return node.target is operator.getitem
    return any(r.alias_info is not None for r in schema.returns)


def targets(node: fx.Node) -> list[fx.Node]:
    """Arguments that an operation writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    found: list[fx.Node] = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in values if isinstance(item, fx.Node)]
    return found


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws from a random stream."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags

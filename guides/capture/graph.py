"""A pure graph of a loss and its gradients, captured from one run of a program.

    loss, grads = graph(parameters, data, noise)

The run is an ordinary one: Pyro's handlers, modules, the parameter store and autograd do what they
always do, while every tensor operation is written down below autograd. Parameters are recognized
by identity wherever the program got them from, and become inputs; so do the tensors of the call.
Random draws that depend on nothing become inputs, too, and are drawn before each run by the same
operations in the same order, so a graph consumes the random stream as the program does.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import pyro
import torch
from torch import Tensor, fx

from guides.capture.noise import Draw, noise_as_inputs
from guides.capture.operations import is_view, share_equal_terms, targets
from guides.capture.tracing import (
    CaptureError,
    Metadata,
    WithinTorch,
    reason_of,
    trace,
    unvalidated,
)
from guides.capturing import capturing

__all__ = [
    "CaptureError",
    "Draw",
    "Graph",
    "Metadata",
    "capture_graph",
    "share_equal_terms",
    "trace",
]

_SHAPED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique", "bincount", "histc")


@dataclass
class Graph:
    """A captured function of parameters, data and noise.

    Args:
        module: The graph; its inputs are the parameters, the data and the noise, its outputs
            the loss, the gradients, one for each entry of ``learning``, and the extras.
        num_parameters: Number of parameters.
        num_data: Number of data tensors.
        draws: The noise, in the order of the program.
        learning: Positions of the parameters that get a gradient.
        num_extras: Further results, after the gradients.
        live: Random operations that depend on values and stay in the graph.
    """

    module: fx.GraphModule
    num_parameters: int
    num_data: int
    draws: tuple[Draw, ...]
    learning: tuple[int, ...]
    num_extras: int = 0
    live: tuple[str, ...] = field(default=())

    def noise(self) -> list[Tensor]:
        """Fresh noise, drawn as the program draws it."""
        return [draw() for draw in self.draws]

    @functools.cached_property
    def constants(self) -> list[Tensor]:
        """Tensors that are part of the graph."""
        nodes = self.module.graph.nodes
        return [_constant(self.module, node) for node in nodes if node.op == "get_attr"]

    @functools.cached_property
    def num_nodes(self) -> int:
        """Operations in the graph."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)


def capture_graph(
    function: Callable[..., tuple[Tensor, list[Tensor | None], list[Tensor]]],
    data: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Graph:
    """Capture a function of data tensors that returns a loss and gradients of parameters.

    Args:
        function: Takes the data; returns the loss, detached; one gradient a parameter, None
            where there is none; and further tensors.
        data: Tensors of the call, which become inputs.
        parameters: Leaf tensors that the function reads, which become inputs.

    Returns:
        The graph.

    Raises:
        CaptureError: Where the function reads a value into Python, changes a tensor that outlives
            the call, or gives another graph when it is captured again.
    """
    before = (random.getstate(), repr(numpy.random.get_state()))
    first = _capture(function, data, parameters)
    if before != (random.getstate(), repr(numpy.random.get_state())):
        raise CaptureError("the program draws random numbers outside of torch")
    second = _capture(function, data, parameters)
    if not _agree(first, second):
        raise CaptureError(
            "the program runs other operations each time it is called (a counter, a random "
            "choice or a cache in Python)"
        )
    return second


def _capture(
    function: Callable[..., tuple[Tensor, list[Tensor | None], list[Tensor]]],
    data: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Graph:
    learning: list[int] = []
    num_extras: list[int] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        loss, grads, extras = function(*inputs)
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        learning[:] = [i for i, _ in found]
        num_extras[:] = [len(extras)]
        return [loss, *(grad for _, grad in found), *extras]

    # Inputs are wrapped, and a tensor that is both a parameter and an argument would be two.
    try:
        with pyro.validation_enabled(False), unvalidated(), capturing(), WithinTorch():
            module = trace(flat, [value.detach() for value in data])
    except CaptureError:
        raise
    except Exception as error:
        # The program itself ran just before: what fails is the capture.
        raise CaptureError(reason_of(error)) from error
    graph = module.graph
    _refuse_shapes_of_values(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    _refuse_changes(module, placeholders)
    inputs = _parameters_as_inputs(module, parameters)
    draws, live = noise_as_inputs(module)
    share_equal_terms(graph)
    ordered = [*inputs, *placeholders, *(node for node, _ in draws)]
    _reorder(graph, ordered)
    graph.lint()
    module.recompile()
    return Graph(
        module=module,
        num_parameters=len(parameters),
        num_data=len(data),
        draws=tuple(draw for _, draw in draws),
        learning=tuple(learning),
        num_extras=num_extras[0],
        live=tuple(live),
    )


def _agree(first: Graph, second: Graph) -> bool:
    """Whether two captures are one graph, with equal constants."""
    if first.module.code != second.module.code or first.learning != second.learning:
        return False
    pairs = zip(first.constants, second.constants, strict=True)
    return all(ours is theirs or _equal(ours, theirs) for ours, theirs in pairs)


def _equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    same = (first == second) | ((first != first) & (second != second))
    return bool(same.all())


def _constant(module: fx.GraphModule, node: fx.Node) -> Any:
    return operator.attrgetter(str(node.target))(module)


def _refuse_shapes_of_values(graph: fx.Graph) -> None:
    """Raise where the shape of a result depends on values: a graph has one shape built in."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = str(node.target).removeprefix("aten.").split(".")[0]
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and _dtype(index) in (torch.bool, torch.uint8)
            for index in node.args[1]
        )
        if (masked and name == "index") or name.startswith(_SHAPED_BY_VALUES):
            raise CaptureError(
                f"the shape of a result depends on values ({name}): select rows before the call, "
                "or switch entries off with poutine.mask"
            )


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _parameters_as_inputs(module: fx.GraphModule, parameters: Sequence[Tensor]) -> list[fx.Node]:
    """Replace the constants that are parameters by inputs, one for each, used or not."""
    graph = module.graph
    inputs = []
    first = next(iter(graph.nodes))
    for i in range(len(parameters)):
        with graph.inserting_before(first):
            inputs.append(graph.placeholder(f"parameter_{i}"))
    places = {id(parameter): i for i, parameter in enumerate(parameters)}
    storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value = _constant(module, node)
        if not isinstance(value, Tensor):
            raise CaptureError(f"it holds a {type(value).__name__}, which is no tensor")
        if id(value) in places:
            node.replace_all_uses_with(inputs[places[id(value)]])
            graph.erase_node(node)
        elif value.numel() and value.untyped_storage().data_ptr() in storages:
            raise CaptureError("it reads a parameter through another tensor (.data or a view)")
    return inputs


def _refuse_changes(module: fx.GraphModule, placeholders: Sequence[fx.Node]) -> None:
    """Raise where an operation writes into a tensor that was there before the call."""
    outside = set(placeholders)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            outside.add(node)
        elif any(target in outside for target in targets(node)):
            raise CaptureError(
                "it changes a tensor in place that outlives the call (running statistics of a "
                "batch normalization, or the data)"
            )
        elif is_view(node) and any(source in outside for source in node.all_input_nodes):
            # A view of what was there before is what was there before.
            outside.add(node)


def _reorder(graph: fx.Graph, ordered: Sequence[fx.Node]) -> None:
    """Bring the inputs into this order, before everything else."""
    for node in reversed(ordered):
        graph._root.append(node)

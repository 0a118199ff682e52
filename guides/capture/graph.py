"""A pure graph of a loss and its gradients, captured from one run of a program.

    loss, grads = graph(parameters, data, noise)

The run is an ordinary one: Pyro's handlers, modules, the parameter store and autograd do what they
always do, while every tensor operation is written down below autograd. Parameters are recognized
by identity wherever the program got them from, and become inputs; so do the tensors of the call.
Random draws that depend on nothing become inputs, too, and are drawn before each run by the same
operations in the same order, so a graph consumes the random stream as the program does.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy
import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

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


_NORMAL = torch.ops.aten.normal_.default
_TRACING = threading.RLock()
_LEAVES_TORCH = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)
_SHAPED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique", "bincount", "histc")


class CaptureError(RuntimeError):
    """A program that no graph stands for; the message is the reason."""


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
        with pyro.validation_enabled(False), _unvalidated(), capturing(), _WithinTorch():
            module = trace(flat, [value.detach() for value in data])
    except CaptureError:
        raise
    except Exception as error:
        # The program itself ran just before: what fails is the capture.
        raise CaptureError(_reason(error)) from error
    graph = module.graph
    _refuse_shapes_of_values(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    _refuse_changes(module, placeholders)
    inputs = _parameters_as_inputs(module, parameters)
    draws, live = _noise_as_inputs(module)
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


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Let no distribution check values, not even one that was told to when it was made.

    ``expand`` writes the setting of its day into the instance, so that the priors of a
    ``PyroSample``, made with the module, would check values whatever the setting is now.
    """

    def keep(owner: Any, value: bool) -> None:
        owner.__dict__["_validate_args"] = value

    # A property of the class comes before what is written in an instance.
    switched_off = property(lambda owner: False, keep)
    with mock.patch.object(torch.distributions.Distribution, "_validate_args", switched_off):
        yield


class _WithinTorch(TorchFunctionMode):
    """Refuse what leaves torch: results would be written down as constants, silently."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            raise CaptureError(
                f"the program reads the values of a tensor outside of torch ({func.__name__})"
            )
        return func(*args, **(kwargs or {}))


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of a function of tensors, as they run on these inputs."""
    with _cheap_metadata():
        module: fx.GraphModule = proxy_tensor.make_fx(function, _allow_non_fake_inputs=True)(
            *inputs
        )
    return module


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
        if node.op not in ("call_function", "get_attr") or _is_random(node) or node in touched:
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
        for source in _targets(node):
            while _is_view(source) and source.all_input_nodes:
                source = source.all_input_nodes[0]
            written.add(source)
    grown = True
    while grown:
        grown = False
        for node in graph.nodes:
            shares = _is_view(node) or _targets(node)
            if node not in written and shares and any(s in written for s in node.all_input_nodes):
                written.add(node)
                grown = True
    return written


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function":
        return False
    if schema is None:
        return node.target is operator.getitem
    return any(r.alias_info is not None for r in schema.returns)


def _targets(node: fx.Node) -> list[fx.Node]:
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


@dataclass(frozen=True)
class Metadata:
    """What is known of a tensor of a graph, beside its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def contiguous(cls, shape: Sequence[int], like: Metadata) -> Metadata:
        """Of a tensor of this shape whose numbers lie in order."""
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return cls(tuple(shape), tuple(stride), like.dtype, like.device)

    def transposed(self) -> Metadata:
        """Of the transpose of a matrix."""
        return Metadata(self.shape[::-1], self.stride[::-1], self.dtype, self.device)


@contextlib.contextmanager
def _cheap_metadata() -> Iterator[None]:
    """Write shapes down as they are.

    torch makes a mode of fake tensors for every operation, which takes two thirds of the time of
    a capture and serves symbolic shapes alone.
    """
    owner = threading.get_ident()

    def metadata(value: Any, include_real: bool = False) -> Any:
        if threading.get_ident() != owner:
            return original(value, include_real)
        if isinstance(value, Tensor):
            return Metadata(tuple(value.shape), value.stride(), value.dtype, value.device)
        if isinstance(value, (list, tuple)):
            return type(value)([metadata(item) for item in value])
        return value if isinstance(value, (int, float, bool)) else None

    if not hasattr(proxy_tensor, "extract_val"):
        yield
        return
    # One at a time: patches of two threads would not be undone in their order.
    with _TRACING:
        original = proxy_tensor.extract_val
        with mock.patch.object(proxy_tensor, "extract_val", metadata):
            yield


def _reason(error: Exception) -> str:
    text = str(error)
    if "get value out of a tracing tensor" in text or "data-dependent" in text:
        return "the program reads the value of a tensor (an if, .item(), float() or bool())"
    if "has no attribute" in text or not text:
        return f"capturing it raised {type(error).__name__}"
    return f"capturing it raised {type(error).__name__}: {text.splitlines()[0][:160]}"


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


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def _is_empty(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_strided.default,
    )


def _noise_as_inputs(module: fx.GraphModule) -> tuple[list[tuple[fx.Node, Draw]], list[str]]:
    """Replace random operations that depend on nothing by inputs."""
    graph = module.graph
    random = [node for node in graph.nodes if _is_random(node)]
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


def _refuse_changes(module: fx.GraphModule, placeholders: Sequence[fx.Node]) -> None:
    """Raise where an operation writes into a tensor that was there before the call."""
    outside = set(placeholders)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            outside.add(node)
        elif any(target in outside for target in _targets(node)):
            raise CaptureError(
                "it changes a tensor in place that outlives the call (running statistics of a "
                "batch normalization, or the data)"
            )
        elif _is_view(node) and any(source in outside for source in node.all_input_nodes):
            # A view of what was there before is what was there before.
            outside.add(node)


def _reorder(graph: fx.Graph, ordered: Sequence[fx.Node]) -> None:
    """Bring the inputs into this order, before everything else."""
    for node in reversed(ordered):
        graph._root.append(node)

"""Matrix products by the faster of the two libraries that torch carries, or by neither.

On a CPU torch multiplies through its BLAS (MKL), and carries oneDNN beside it; which of them is
faster depends on the processor and on the shapes, by a factor of two in either direction. Both are
timed on the shapes of a graph before it is compiled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

__all__ = ["as_calls", "choose_products"]

_LEAST = 2e6  # multiplications below which no choice is worth its timing
_ADVANTAGE = 0.9
_TINY = 20_000
_MEASURED: dict[Any, bool] = {}
_LINEAR: Any = (
    torch.ops.mkldnn._linear_pointwise.default
    if hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


@contextlib.contextmanager
def as_calls() -> Iterator[None]:
    """Let the compiler call oneDNN's product as it is; its own rule wants a packed weight."""
    from torch._inductor import lowering

    with contextlib.ExitStack() as stack:
        if _LINEAR is not None:
            call = lowering.fallback_handler(_LINEAR, add_to_fallback_set=False)
            stack.enter_context(mock.patch.dict(lowering.lowerings, {_LINEAR: call}))
        yield


def choose_products(
    module: fx.GraphModule, *, libraries: bool = True, compiled: bool = True
) -> bool:
    """Replace products that are faster by oneDNN on this machine.

    Args:
        module: A graph whose nodes carry shapes and strides, from
            :func:`guides.capture.tracing.trace`.
        libraries: Whether to choose between libraries at all.
        compiled: Whether a compiler follows, which fuses tiny products written as sums. Without
            one a call is faster, and its bits are those of the program.

    Returns:
        Whether a product goes to oneDNN.
    """
    graph = module.graph
    replaced = False
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.mm.default:
            bias, (left, right) = None, node.args
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            bias, left, right = node.args
        else:
            continue
        if compiled and bias is None and _is_tiny(left, right):
            # A call of a library costs more than the product; the compiler fuses this one.
            with graph.inserting_before(node):
                terms = _tiny(graph, left, right)
            terms.meta = dict(node.meta)
            node.replace_all_uses_with(terms)
            graph.erase_node(node)
            continue
        if not libraries or not _is_faster(left, right, bias):
            continue
        with graph.inserting_before(node):
            weight = _transposed(graph, right)
            new = graph.call_function(_LINEAR, (left, weight, bias, "none", [], ""))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        replaced = True
    return replaced


def _is_tiny(left: fx.Node, right: fx.Node) -> bool:
    values = _shapes(left, right)
    if values is None:
        return False
    (rows, inner), (_, columns) = values[0].shape, values[1].shape
    return 1 in (rows, inner, columns) and rows * inner * columns <= _TINY


def _tiny(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node:
    """The product as a sum of products, ``(rows, inner, 1) * (1, inner, columns)``."""
    aten = torch.ops.aten
    (_, inner) = left.meta["val"].shape
    if inner == 1:
        return graph.call_function(aten.mul.Tensor, (left, right))
    a = graph.call_function(aten.unsqueeze.default, (left, 2))
    b = graph.call_function(aten.unsqueeze.default, (right, 0))
    terms = graph.call_function(aten.mul.Tensor, (a, b))
    return graph.call_function(aten.sum.dim_IntList, (terms, [1]))


def _shapes(*nodes: fx.Node) -> list[Any] | None:
    """Shapes and types of values, None unless all are known."""
    values = [node.meta.get("val") for node in nodes]
    return None if any(value is None for value in values) else values


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.target is torch.ops.aten.t.default:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        return source
    new = graph.call_function(torch.ops.aten.t.default, (node,))
    value = node.meta.get("val")
    if value is not None:
        new.meta["val"] = value.transposed()
    return new


def _is_faster(left: fx.Node, right: fx.Node, bias: fx.Node | None) -> bool:
    values = _shapes(left, right)
    given = None if bias is None else bias.meta.get("val")
    if _LINEAR is None or not torch.backends.mkldnn.is_available():
        return False
    if values is None or any(value.device.type != "cpu" for value in values):
        return False
    if any(value.dtype != torch.float32 for value in values):
        return False
    if bias is not None and (given is None or len(given.shape) != 1):
        return False
    (rows, inner), (_, columns) = values[0].shape, values[1].shape
    if rows * inner * columns < _LEAST:
        return False
    key = (
        *((value.shape, value.stride) for value in values),
        bias is None,
        torch.get_num_threads(),
    )
    if key not in _MEASURED:
        a, b = (_like(value) for value in values)
        c = None if given is None else torch.ones(given.shape)

        def usual() -> Tensor:
            return a @ b if c is None else torch.addmm(c, a, b)

        def other() -> Tensor:
            found: Tensor = _LINEAR(a, b.t(), c, "none", [], "")
            return found

        with torch.no_grad():
            same = torch.allclose(usual(), other(), rtol=1e-3, atol=1e-3 * inner**0.5)
            # Alternating, so that a busy moment of the machine falls on both.
            times = [(_seconds(usual), _seconds(other)) for _ in range(4)]
        best = [min(pair[i] for pair in times) for i in range(2)]
        _MEASURED[key] = same and best[1] < _ADVANTAGE * best[0]
    return _MEASURED[key]


def _like(value: Any) -> Tensor:
    size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
    return torch.linspace(-1.0, 1.0, size).as_strided(value.shape, value.stride)


def _seconds(function: Callable[[], Tensor], repeats: int = 4) -> float:
    function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start

"""The machine's floor: the matrix products of a step, alone, in torch.

No program computes a step faster than its matrix products, whatever compiles it. A layer of sizes
``(inputs, outputs)`` costs, with batch B,

    forward    (B, inputs) @ (inputs, outputs)
    inputs     (B, outputs) @ (outputs, inputs)         gradients that flow on
    weights    (outputs, B) @ (B, inputs)               gradients of the weights

and a task says how often each is done in one step. Products whose result is never used (the
gradient of the data) are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FLOORS", "Layer", "Products", "floor", "flops"]

Product = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """A linear layer and how often a step passes it.

    Args:
        num_inputs: Size of its input.
        num_outputs: Size of its output.
        forward: Forward products in a step.
        inputs: Products for gradients of its input.
        weights: Products for gradients of its weights.
    """

    num_inputs: int
    num_outputs: int
    forward: int = 1
    inputs: int = 1
    weights: int = 1


def _relaxed(*sizes: tuple[int, int], first: int = 20) -> tuple[Layer, ...]:
    """Layers of predictive coding: 20 passes to relax, one to learn."""
    return tuple(Layer(*size, forward=first + 1, inputs=first, weights=1) for size in sizes)


_LEVEL = ((16, 256), (256, 32), (256, 32))
_OUTPUT = ((32, 256), (256, 784))

FLOORS: dict[str, tuple[int, tuple[Layer, ...]]] = {
    "vae": (
        128,
        (
            Layer(784, 256, inputs=0),
            Layer(256, 96),
            *(Layer(*size) for size in (*_LEVEL, *_OUTPUT)),
        ),
    ),
    # To learn, the latents' own gradients are not needed, those of hidden layers are.
    "pc": (
        128,
        (
            *_relaxed((16, 256), (32, 256)),
            *(Layer(*size, forward=21, inputs=21) for size in ((256, 32), (256, 32), (256, 784))),
        ),
    ),
    "pcx_decoder": (200, _relaxed((64, 128), (128, 128), (128, 784))),
    # The first layer reads clamped pixels: its prediction is computed once.
    "fabricpc_mnist": (
        200,
        (Layer(784, 256, inputs=0), *_relaxed((256, 64), (64, 10))),
    ),
}
"""Batch and layers of one step, by task."""


class Products:
    """The matrix products of a step, each by the faster of torch's two libraries.

    ``torch.mm`` calls the BLAS that torch was built with, which need not be the fastest there is:
    Intel's, on other processors, is half as fast as oneDNN, which torch has as well.

    Args:
        batch: Rows.
        layers: The layers.
    """

    def __init__(self, batch: int, layers: Sequence[Layer]) -> None:
        self.products: list[tuple[Product, int]] = []
        for layer in layers:
            x = torch.randn(batch, layer.num_inputs)
            grad = torch.randn(batch, layer.num_outputs)
            weight = torch.randn(layer.num_outputs, layer.num_inputs)
            pairs = [(x, weight.t()), (grad, weight), (grad.t(), x)]
            counts = [layer.forward, layer.inputs, layer.weights]
            for (left, right), count in zip(pairs, counts, strict=True):
                if count:
                    self.products.append((_fastest(left, right), count))

    def __call__(self, num_steps: int) -> None:
        """Do the products of some steps."""
        with torch.no_grad():
            for _ in range(num_steps):
                for product, count in self.products:
                    for _ in range(count):
                        product()


def _fastest(left: Tensor, right: Tensor) -> Product:
    """The product of two matrices, as a function that does it and returns it."""
    result = left.new_empty(left.shape[0], right.shape[1])
    candidates: list[Product] = [lambda: torch.mm(left, right, out=result)]
    if torch.backends.mkldnn.is_available():
        # What compiled programs call; it multiplies by a transposed matrix.
        linear = torch.ops.mkldnn._linear_pointwise
        a, b = left.contiguous(), right.t().contiguous()
        candidates.append(lambda: linear(a, b, None, "none", [], ""))
    return min(candidates, key=_seconds)


def _seconds(product: Product, repeats: int = 10) -> float:
    """The fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return min(times)


def flops(batch: int, layers: Sequence[Layer]) -> int:
    """Multiplications and additions of a step's matrix products.

    Args:
        batch: Rows.
        layers: The layers.

    Example:
        >>> flops(2, [Layer(3, 5)])
        180
    """
    return sum(
        2
        * batch
        * layer.num_inputs
        * layer.num_outputs
        * (layer.forward + layer.inputs + layer.weights)
        for layer in layers
    )


def floor(
    batch: int,
    layers: Sequence[Layer],
    *,
    num_steps: int = 20,
    repeats: int = 5,
    threads: int | None = None,
) -> float:
    """Seconds a step that its matrix products take alone: the fastest of several blocks.

    Whatever else the machine does can only slow a block down, and a floor must hold. To alternate
    with peers, ask the torch peer for its task ``"floor"`` instead.

    Args:
        batch: Rows.
        layers: The layers.
        num_steps: Steps in a block.
        repeats: Blocks.
        threads: Threads of torch, restored afterwards; those in use by default.

    Raises:
        ValueError: Without steps or blocks.

    Example:
        >>> floor(4, [Layer(8, 8)], num_steps=1, repeats=1) > 0
        True
    """
    if num_steps < 1 or repeats < 1:
        raise ValueError(f"num_steps and repeats must be at least 1, got {num_steps}, {repeats}.")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        run = Products(batch, layers)
        run(num_steps)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(num_steps)
            times.append((time.perf_counter() - start) / num_steps)
    finally:
        torch.set_num_threads(before)
    return min(times)

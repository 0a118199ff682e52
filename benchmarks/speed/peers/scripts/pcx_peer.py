"""PCX 0.6.3: one training step of its MNIST decoder, by its public interface.

The task `pcx_decoder` is the decoder of the library's paper: layers 64-128-128-784, hard tanh
between them, none at the end, squared errors, batch 200, no prior on the top latent. One step, for
latents z0 (64), z1 (128), z2 (128) a row, all updated at once, and x clamped:

    E(z, W) = 1/2 sum over rows of
              |z1 - hard_tanh(W0 z0 + b0)|^2 + |z2 - hard_tanh(W1 z1 + b1)|^2
              + |x - (W2 z2 + b2)|^2
    z <- 0, v <- 0
    20 times:  v <- 0.15 v + dE/dz;  z <- z - 0.01985 v             optax.sgd with momentum
    loss = E / B at the last z, dloss/dW there
    W <- AdamW(lr 3.401e-4, weight decay 1.251e-5)

The 20 iterations are unrolled by Python and compiled as one function with `pxf.jit`, as in the
library's example; option loop="scan" makes them a `pxf.scan`. Reference: Benchmarking predictive
coding networks made simple (Pinchetti et al., 2024), https://arxiv.org/abs/2407.01163.
"""

from __future__ import annotations

from benchmarks.speed.peers.protocol import Program, limit_threads, options_of, serve

_THREADS = limit_threads()

from collections.abc import Mapping  # noqa: E402
from itertools import pairwise  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import pcx  # noqa: E402
import pcx.functional as pxf  # noqa: E402
import pcx.nn as pxnn  # noqa: E402
import pcx.predictive_coding as pxc  # noqa: E402
import pcx.utils as pxu  # noqa: E402

from benchmarks.speed.peers.problems import load  # noqa: E402

__all__ = ["build", "main"]

_SIZES = (64, 128, 128, 784)
_NUM_ITERATIONS = 20
_STEP_SIZE, _MOMENTUM = 0.019849750737164974, 0.15
_LR, _WEIGHT_DECAY = 3.401383559476183e-4, 1.2514685116492747e-05

_START_AT_ZERO = {pxc.STATUS.INIT: ("h, u <- u:to_zero",)}


def _to_zero(vode: Any, key: str, value: Any, rkg: Any) -> Any:
    return jnp.zeros_like(value)


class _Decoder(pxc.EnergyModule):  # type: ignore[misc]
    """Layers with a value node behind each, and a free one on top."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        pairs = pairwise(_SIZES)
        self.layers = [pxnn.Linear(inputs, outputs) for inputs, outputs in pairs]
        for number, layer in enumerate(self.layers):
            layer.nn.weight.set(jnp.array(weights[f"layers.{number}.weight"]))
            layer.nn.bias.set(jnp.array(weights[f"layers.{number}.bias"]))
        tforms = {"to_zero": _to_zero}
        nodes = [pxc.Vode(pxc.zero_energy, _START_AT_ZERO, tforms)]
        nodes += [pxc.Vode(ruleset=_START_AT_ZERO, tforms=tforms) for _ in self.layers]
        nodes[-1].h.frozen = True
        self.vodes = nodes

    def __call__(self, x: Any) -> None:
        value = self.vodes[0](jnp.zeros(_SIZES[0]))
        for number, layer in enumerate(self.layers):
            value = layer(value)
            if number < len(self.layers) - 1:
                value = jax.nn.hard_tanh(value)
            value = self.vodes[number + 1](value)
        self.vodes[-1].set("h", x)


_PER_ROW = pxu.M(pxc.VodeParam | pxc.VodeParam.Cache).to((None, 0))


@pxf.vmap(_PER_ROW, in_axes=0, out_axes=0)  # type: ignore[untyped-decorator, unused-ignore]
def _forward(x: Any, *, model: Any) -> Any:
    model(x)


@pxf.vmap(_PER_ROW, in_axes=0, out_axes=None, axis_name="batch")  # type: ignore[untyped-decorator, unused-ignore]
def _energy(x: Any, *, model: Any) -> Any:
    model(x)
    return jax.lax.pmean(model.energy().sum(), "batch")


_by_latents = pxf.value_and_grad(
    pxu.M_hasnot(pxc.VodeParam, frozen=True).to((False, True)), has_aux=False
)(_energy)
_by_weights = pxf.value_and_grad(pxu.M(pxnn.LayerParam).to((False, True)), has_aux=False)(_energy)


def _relax(x: Any, *, model: Any, optim_h: Any, scan: bool) -> None:
    with pxu.step(model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
        _forward(x, model=model)
    optim_h.init(pxu.M_hasnot(pxc.VodeParam, frozen=True)(model))

    def iteration(*, model: Any, optim_h: Any) -> None:
        _, grads = _by_latents(x, model=model)
        model.clear_params(pxc.VodeParam.Cache)
        # The energy is a mean over rows; each row's step is that of its own energy.
        optim_h.step(model, grads["model"], scale_by=float(x.shape[0]))

    def body(_: Any, *, model: Any, optim_h: Any) -> tuple[tuple[()], None]:
        iteration(model=model, optim_h=optim_h)
        return (), None

    with pxu.step(model, clear_params=pxc.VodeParam.Cache):
        if scan:
            pxf.scan(body, length=_NUM_ITERATIONS)(model=model, optim_h=optim_h)
        else:
            for _ in range(_NUM_ITERATIONS):
                iteration(model=model, optim_h=optim_h)
    optim_h.clear()


def _train_step(x: Any, *, model: Any, optim_w: Any, optim_h: Any, scan: bool) -> Any:
    _relax(x, model=model, optim_h=optim_h, scan=scan)
    with pxu.step(model, clear_params=pxc.VodeParam.Cache):
        loss, grads = _by_weights(x, model=model)
    optim_w.step(model, grads["model"])
    return loss


class _Training:
    """The decoder and its optimizers, stepped by one compiled function."""

    def __init__(self, given: Mapping[str, Any], seed: int, loop: str, momentum: float) -> None:
        self.momentum = momentum
        pcx.RKG.seed(seed)
        self.x = jnp.asarray(given["x"])
        self.given = given
        self.scan = loop == "scan"
        self.reset()

    def reset(self) -> None:
        self.model = _Decoder(self.given)
        with pxu.step(self.model, pxc.STATUS.INIT, clear_params=pxc.VodeParam.Cache):
            _forward(self.x, model=self.model)
        adamw = optax.adamw(_LR, weight_decay=_WEIGHT_DECAY)
        self.optim_w = pxu.Optim(lambda: adamw, pxu.M(pxnn.LayerParam)(self.model))
        sgd = optax.sgd(_STEP_SIZE, momentum=self.momentum or None)
        self.optim_h = pxu.Optim(lambda: sgd)
        scan = self.scan

        def step(x: Any, *, model: Any, optim_w: Any, optim_h: Any) -> Any:
            return _train_step(x, model=model, optim_w=optim_w, optim_h=optim_h, scan=scan)

        self.step = pxf.jit()(step)

    def check(self) -> float:
        loss = float(self._step())
        self.reset()
        return loss

    def _step(self) -> Any:
        return self.step(self.x, model=self.model, optim_w=self.optim_w, optim_h=self.optim_h)

    def prepare(self, num_steps: int) -> None:
        self._step()
        # State that the first call made is an input of the second, which compiles once more.
        jax.block_until_ready(self._step())

    def advance(self, num_steps: int) -> float:
        for _ in range(num_steps):
            loss = self._step()
        weights = [layer.nn.weight.get() for layer in self.model.layers]
        jax.block_until_ready((loss, weights))
        return float(loss)


def build(task: str, seed: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: ``"pcx_decoder"``.
        seed: Seed of arrays that are not given.
        options: ``arrays``, ``batch``, ``data``, ``loop`` and ``momentum``.

    Raises:
        ValueError: For another task or loop.
    """
    if task != "pcx_decoder":
        raise ValueError(f"PCX has no task {task!r}: pcx_decoder.")
    options = options_of(
        options, arrays=None, batch=None, data=None, loop="unrolled", momentum=_MOMENTUM
    )
    if options["loop"] not in ("unrolled", "scan"):
        raise ValueError(f'loop must be "unrolled" or "scan", got {options["loop"]!r}.')
    return _Training(load(task, seed, options), seed, options["loop"], float(options["momentum"]))


def main() -> None:
    """Serve standard input and output."""
    serve(build, ("pcx", "jax", "jaxlib", "optax", "numpy"), _THREADS)

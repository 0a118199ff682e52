"""Hand-written JAX: predictive coding on the two-level decoder, compiled as one scan.

One step of the task `pc`, the same as :mod:`~benchmarks.speed.peers.torch_peer`'s:

    z2 <- 0, z1 <- loc(z2)
    relax_steps times:  z <- z - step_size dE/dz                  both levels at once
    E at the last z (which is reported), dE/dweights there, Adam

with E = -sum over rows of log p(x, z1, z2). The relaxation is a `lax.scan` (option unroll: steps
a loop body holds), the steps of a request are another one (option loop="scan"), or a Python loop
of one compiled step whose state is donated (loop="update").
"""

from __future__ import annotations

from benchmarks.speed.peers.protocol import Program, limit_threads, options_of, serve

_THREADS = limit_threads()

import math  # noqa: E402
from collections.abc import Mapping  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from benchmarks.speed.peers.problems import load  # noqa: E402

__all__ = ["build", "main"]

Arrays = dict[str, Any]


def _linear(x: Any, weights: Arrays, name: str) -> Any:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _level(z2: Any, weights: Arrays) -> tuple[Any, Any]:
    features = jax.nn.silu(_linear(z2, weights, "model.levels.0.network.0"))
    raw = _linear(features, weights, "model.levels.0.raw_scale")
    return _linear(features, weights, "model.levels.0.loc"), 0.05 + jax.nn.softplus(raw)


def _energy(z: tuple[Any, Any], weights: Arrays, x: Any) -> Any:
    z2, z1 = z
    loc, scale = _level(z2, weights)
    features = jax.nn.silu(_linear(z1, weights, "model.network.0"))
    logits = _linear(features, weights, "model.likelihood.output")
    minus_log_x = (jax.nn.softplus(logits) - x * logits).sum()
    minus_log_z1 = 0.5 * jnp.square((z1 - loc) / scale).sum() + jnp.log(scale).sum()
    constant = 0.5 * math.log(2 * math.pi) * (z1.size + z2.size)
    return minus_log_x + minus_log_z1 + 0.5 * jnp.square(z2).sum() + constant


def _adam(weights: Arrays, grads: Arrays, state: Any, lr: float) -> tuple[Arrays, Any]:
    count, first, second = state
    count = count + 1
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
    second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, grads)
    one, two = 1 - 0.9**count, 1 - 0.999**count
    weights = jax.tree.map(
        lambda w, m, v: w - lr * (m / one) / (jnp.sqrt(v / two) + 1e-8), weights, first, second
    )
    return weights, (count, first, second)


class _PredictiveCoding:
    """Relaxation of both levels, then one step of the weights."""

    def __init__(self, given: Arrays, options: Mapping[str, Any]) -> None:
        self.options = options
        self.x = given["x"]
        # Donated buffers are gone: the weights are copies of those of the check.
        weights = {k: jnp.array(v) for k, v in given.items() if k.startswith("model.")}
        zeros = {k: jnp.zeros_like(v) for k, v in weights.items()}
        also = {k: jnp.zeros_like(v) for k, v in weights.items()}
        self.state: Any = (weights, (jnp.zeros((), self.x.dtype), zeros, also))
        self.compiled: dict[int, Any] = {}

    def relaxed(self, weights: Arrays, x: Any) -> tuple[Any, Any]:
        z2 = jnp.zeros((x.shape[0], 16), x.dtype)
        z1, _ = _level(z2, weights)
        step_size = self.options["step_size"]

        def body(z: Any, _: None) -> tuple[Any, None]:
            grads = jax.grad(_energy)(z, weights, x)
            return jax.tree.map(lambda a, g: a - step_size * g, z, grads), None

        steps, unroll = self.options["relax_steps"], self.options["unroll"]
        (z2, z1), _ = lax.scan(body, (z2, z1), None, length=steps, unroll=unroll)
        return z2, z1

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        weights, adam = state
        z = self.relaxed(weights, x)
        energy, grads = jax.value_and_grad(_energy, argnums=1)(z, weights, x)
        return _adam(weights, grads, adam, self.options["lr"]), energy

    def check(self) -> float:
        weights = self.state[0]
        return float(jax.jit(lambda w, x: _energy(self.relaxed(w, x), w, x))(weights, self.x))

    def prepare(self, num_steps: int) -> None:
        if self.options["loop"] == "update":
            if not self.compiled:
                jitted = jax.jit(self.step, donate_argnums=0)
                self.compiled[0] = jitted.lower(self.state, self.x).compile()
            return

        def steps(state: Any, x: Any) -> tuple[Any, Any]:
            def body(state: Any, _: None) -> tuple[Any, Any]:
                return self.step(state, x)

            state, energies = lax.scan(body, state, None, length=num_steps)
            return state, energies[-1]

        jitted = jax.jit(steps, donate_argnums=0)
        self.compiled[num_steps] = jitted.lower(self.state, self.x).compile()

    def advance(self, num_steps: int) -> float:
        if self.options["loop"] == "update":
            state = self.state
            for _ in range(num_steps):
                state, energy = self.compiled[0](state, self.x)
            self.state = state
        else:
            self.state, energy = self.compiled[num_steps](self.state, self.x)
        jax.block_until_ready((self.state, energy))
        return float(energy)


def build(task: str, seed: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: ``"pc"``.
        seed: Seed of arrays that are not given.
        options: ``arrays``, ``batch``, ``data``, ``dtype``, ``lr``, ``relax_steps``,
            ``step_size``, ``unroll`` and ``loop``.

    Raises:
        ValueError: For another task or loop, or for float64 where JAX was started without it.
    """
    if task != "pc":
        raise ValueError(f"This peer has no task {task!r}: pc.")
    options = options_of(
        options,
        arrays=None,
        batch=None,
        data=None,
        dtype=None,
        lr=0.001,
        relax_steps=20,
        step_size=0.02,
        unroll=1,
        loop="update",
    )
    if options["loop"] not in ("update", "scan"):
        raise ValueError(f'loop must be "update" or "scan", got {options["loop"]!r}.')
    given = load(task, seed, options)
    if not jax.config.jax_enable_x64 and any(v.dtype == np.float64 for v in given.values()):
        raise ValueError(
            "JAX computes in float32 here, but the arrays are float64. Start the peer with "
            "JAX_ENABLE_X64=1 in its environment."
        )
    return _PredictiveCoding({k: jnp.asarray(v) for k, v in given.items()}, options)


def main() -> None:
    """Serve standard input and output."""
    serve(build, ("jax", "jaxlib", "numpy"), _THREADS)

"""FabricPC 0.6: one training step of its MNIST demonstration, by its public interface.

The task `fabricpc_mnist` is the library's `mnist_demo`: pixels 784 - hidden 256 - hidden 64 -
class 10, sigmoids, softmax with cross-entropy at the end, batch 200, pixels and labels clamped.
One step, for latents z1 (256) and z2 (64) a row, both updated at once:

    E(z, W) = sum over rows of
              1/2 |z1 - sigmoid(W0 x + b0)|^2 + 1/2 |z2 - sigmoid(W1 z1 + b1)|^2
              - sum_c y_c log clip(softmax(W2 z2 + b2)_c, 1e-7, 1)
    z1 <- sigmoid(W0 x + b0), z2 <- sigmoid(W1 z1 + b1)             the feedforward pass
    20 times:  z <- z - 0.05 dE/dz
    loss = E / B, of the state before the last update (see below)
    dE/dW / B at the last z
    W <- AdamW(lr 0.001, weight decay 0.1)

The library evaluates energies before it moves the latents, so that the energy it reports belongs
to the iteration before; `check` evaluates it at the last z, as the other peers do. The step is
`make_train_step`, one compiled function, called in a loop as a user's own loop would.
"""

from __future__ import annotations

from benchmarks.speed.peers.protocol import Program, limit_threads, options_of, serve

_THREADS = limit_threads()

from collections.abc import Mapping  # noqa: E402
from itertools import pairwise  # noqa: E402
from typing import Any  # noqa: E402

import fabricpc  # noqa: E402

fabricpc.setup_jax("cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from fabricpc.core.activations import SigmoidActivation, SoftmaxActivation  # noqa: E402
from fabricpc.core.energy import CrossEntropyEnergy, graph_energy  # noqa: E402
from fabricpc.core.inference import InferenceSGD, gather_inputs, run_inference  # noqa: E402
from fabricpc.core.topology import Edge  # noqa: E402
from fabricpc.core.types import NodeParams  # noqa: E402
from fabricpc.graph_assembly import TaskMap, graph  # noqa: E402
from fabricpc.graph_initialization import (  # noqa: E402
    initialize_graph_state,
    initialize_params,
)
from fabricpc.nodes import IdentityNode, Linear  # noqa: E402
from fabricpc.training import make_train_step  # noqa: E402

from benchmarks.speed.peers.problems import load  # noqa: E402

__all__ = ["build", "main"]


def _structure() -> Any:
    pixels = IdentityNode(shape=(784,), name="pixels")
    hidden1 = Linear(shape=(256,), activation=SigmoidActivation(), name="hidden1")
    hidden2 = Linear(shape=(64,), activation=SigmoidActivation(), name="hidden2")
    output = Linear(
        shape=(10,), activation=SoftmaxActivation(), energy=CrossEntropyEnergy(), name="class"
    )
    chain = [pixels, hidden1, hidden2, output]
    return graph(
        nodes=chain,
        edges=[
            Edge(source=source, target=target.slot("in")) for source, target in pairwise(chain)
        ],
        task_map=TaskMap(x=pixels, y=output),
        inference=InferenceSGD(eta_infer=0.05, infer_steps=20),
    )


class _Training:
    """The graph's parameters and AdamW, stepped by one compiled function."""

    def __init__(self, given: Mapping[str, Any], seed: int) -> None:
        self.key = jax.random.PRNGKey(seed)
        self.structure = _structure()
        params = initialize_params(self.structure, self.key)
        nodes = dict(params.nodes)
        for number, name in enumerate(("hidden1", "hidden2", "class")):
            (edge,) = nodes[name].weights
            weight = jnp.asarray(given[f"layers.{number}.weight"]).T
            bias = jnp.asarray(given[f"layers.{number}.bias"]).reshape(1, -1)
            nodes[name] = NodeParams(weights={edge: weight}, biases={"b": bias})
        self.params = params._replace(nodes=nodes)
        self.batch = {
            "x": jnp.asarray(given["x"]),
            "y": jax.nn.one_hot(jnp.asarray(given["labels"]), 10),
        }
        optim = optax.adamw(0.001, weight_decay=0.1)
        self.optim_state = optim.init(self.params)
        self.step = make_train_step(self.structure, optim)

    def check(self) -> float:
        rows = self.batch["x"].shape[0]
        clamps = {"pixels": self.batch["x"], "class": self.batch["y"]}
        state = initialize_graph_state(
            self.structure, rows, self.key, clamps=clamps, params=self.params
        )
        state = run_inference(self.params, state, clamps, self.structure)
        nodes = dict(state.nodes)
        for name, node in self.structure.nodes.items():
            info = node.node_info
            inputs = gather_inputs(info, self.structure, state)
            nodes[name] = info.node_class.forward(
                self.params.nodes[name], inputs, state.nodes[name], info
            )
        energy = float(graph_energy(state._replace(nodes=nodes), self.structure))
        return energy / float(rows)

    def prepare(self, num_steps: int) -> None:
        self.advance(1)

    def advance(self, num_steps: int) -> float:
        params, optim_state = self.params, self.optim_state
        for _ in range(num_steps):
            params, optim_state, metrics, _ = self.step(params, optim_state, self.batch, self.key)
        self.params, self.optim_state = params, optim_state
        jax.block_until_ready((params, metrics))
        return float(metrics["energy"])


def build(task: str, seed: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: ``"fabricpc_mnist"``.
        seed: Seed of arrays that are not given.
        options: ``arrays``, ``batch`` and ``data``.

    Raises:
        ValueError: For another task.
    """
    if task != "fabricpc_mnist":
        raise ValueError(f"FabricPC has no task {task!r}: fabricpc_mnist.")
    return _Training(
        load(task, seed, options_of(options, arrays=None, batch=None, data=None)), seed
    )


def main() -> None:
    """Serve standard input and output."""
    serve(build, ("fabricpc", "jax", "jaxlib", "optax", "numpy"), _THREADS)

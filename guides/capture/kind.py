"""One kind of call, captured, checked and compiled: what compiled loops have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.optim
import torch
from pyro.infer.util import zero_grads
from torch import Tensor

from guides.capture.graph import CaptureError, Graph, capture_graph
from guides.capture.optimizers import Rule, rule_of
from guides.capture.restarts import Stack
from guides.capture.steps import Steps

__all__ = ["Compiled", "Kind"]

_AUTO_NODES = 4000
_MOST_STEPS = 16
_MANY_NUMBERS = 20_000
_TOLERANCE = {torch.float64: 1e-9}

Function = Callable[..., tuple[Tensor, list[Tensor | None], list[Tensor]]]
Setup = Callable[[], tuple[Function, list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Compiled:
    """What became of one kind of call: its shapes and its arguments that are no tensors.

    Args:
        mode: ``"inductor"``, ``"graph"`` or ``"eager"``.
        reason: Why the call runs in this mode where another one was asked for.
        num_nodes: Operations of the captured graph.
        capture_seconds: Time to capture it twice and to check it against the eager program.
        compile_seconds: Time to compile its steps, so far.
    """

    mode: str
    reason: str | None = None
    num_nodes: int = 0
    capture_seconds: float = 0.0
    compile_seconds: float = 0.0


class Kind:
    """Calls that one graph serves.

    Args:
        setup: Returns a function of data tensors to a loss, gradients and further results; the
            data of the first call; and the parameters. May raise :class:`CaptureError`.
        optim: The optimizer.
        mode: ``"inductor"`` or ``"graph"``.
        reason: Why the mode is not the one that was asked for.
        steps_per_call: Steps of one graph; None for what suits its size.
        stack: Where several runs are made at once, their parameters.
    """

    def __init__(
        self,
        setup: Setup,
        optim: pyro.optim.PyroOptim,
        *,
        mode: str,
        reason: str | None = None,
        steps_per_call: int | None = None,
        stack: Stack | None = None,
    ) -> None:
        self.stack = stack
        self.optim = optim
        self.mode = mode
        self.reason = reason
        self.steps_per_call = steps_per_call
        self.graph: Graph | None = None
        self.parameters: list[Tensor] = []
        self.num_numbers = 0
        self.rules: list[Rule] = []
        self.made: dict[tuple[int, str], Steps] = {}
        start = time.perf_counter()
        try:
            self._capture(setup)
        except CaptureError as error:
            self.graph, self.reason = None, str(error)
        self.capture_seconds = time.perf_counter() - start

    def _capture(self, setup: Setup) -> None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            function, data, self.parameters = setup()
            self.num_numbers = sum(tensor.numel() for tensor in (*self.parameters, *data))
            if not self.parameters:
                raise CaptureError("there are no parameters to learn")
            # The first evaluation may make checks, caches and parameters of its own.
            _eager(function, data)
            graph = capture_graph(function, data, self.parameters)
            _check(graph, function, data, self.parameters)
        if self.stack is not None and graph.live:
            raise CaptureError(f"{graph.live[0]} draws by the value of a parameter")
        self.graph = graph
        self._read_rules()
        if self.stack is not None and not self.rules:
            raise CaptureError(str(self.reason))

    def _read_rules(self) -> None:
        assert self.graph is not None
        self.rules = []
        self.made.clear()
        for place in self.graph.learning:
            rule = rule_of(self.optim, self.parameters[place])
            if isinstance(rule, str):
                self.rules = []
                self.reason = f"{rule}: the optimizer runs eagerly on the graph's gradients"
                return
            self.rules.append(rule)

    @property
    def per_call(self) -> int:
        """Steps in one call, where the batch stays."""
        if self.graph is None or not self.rules or self.graph.num_extras:
            return 1
        if self.steps_per_call is not None:
            return self.steps_per_call
        if self.mode == "graph" or self.num_numbers > _MANY_NUMBERS:
            # What is not compiled, or is busy with numbers, gains nothing from being longer.
            return 1
        return max(1, min(_MOST_STEPS, _AUTO_NODES // max(1, self.graph.num_nodes)))

    def steps(self, data: Sequence[Tensor], most: int | None) -> tuple[Tensor, list[Tensor]]:
        """Make up to ``most`` steps, one where that is None.

        Returns:
            The losses before each of them, and further results after the last.
        """
        assert self.graph is not None
        if not self.rules:
            return self._with_eager_optimizer(data)
        if self._is_outdated():
            self._read_rules()
        per_call = self.per_call
        num_steps = per_call if most is not None and most >= per_call else 1
        mode = self.mode
        if most is not None and num_steps < per_call and (1, mode) not in self.made:
            # The few steps that a run has left are not worth a compilation.
            mode = "graph"
        key = (num_steps, mode)
        if key not in self.made:
            small = self.num_numbers <= _MANY_NUMBERS
            self.made[key] = Steps(
                self.graph, self.rules, self.parameters, num_steps, mode, self.stack, small
            )
        return self.made[key](data)

    def _is_outdated(self) -> bool:
        """Whether optimizers were replaced, restored or given other options."""
        for rule in self.rules:
            current: Any = self.optim.optim_objs.get(rule.parameter)
            current = getattr(current, "optimizer", current)
            if current is not rule.optimizer:
                return True
            if current.state.get(rule.parameter) is not rule.state:
                return True
        return any(not made.is_current() for made in self.made.values())

    def _with_eager_optimizer(self, data: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        assert self.graph is not None
        key = (0, self.mode)
        if key not in self.made:
            self.made[key] = Steps(self.graph, [], self.parameters, 0, self.mode)
        loss, grads, extras = self.made[key].gradients(data)
        learning = [self.parameters[place] for place in self.graph.learning]
        for parameter, grad in zip(learning, grads, strict=True):
            parameter.grad = grad
        self.optim(learning)
        zero_grads(learning)
        return loss.reshape(1), extras

    def report(self) -> Compiled:
        """What became of the kind."""
        return Compiled(
            mode="eager" if self.graph is None else self.mode,
            reason=self.reason or next((m.reason for m in self.made.values() if m.reason), None),
            num_nodes=0 if self.graph is None else self.graph.num_nodes,
            capture_seconds=self.capture_seconds,
            compile_seconds=sum(made.seconds for made in self.made.values()),
        )


def _eager(function: Function, data: Sequence[Tensor]) -> list[Tensor]:
    with pyro.validation_enabled(False):
        loss, grads, extras = function(*data)
    return [loss, *(grad for grad in grads if grad is not None), *extras]


def _check(
    graph: Graph, function: Function, data: Sequence[Tensor], parameters: Sequence[Tensor]
) -> None:
    """Raise unless graph and program agree on fresh draws."""
    values = [parameter.detach() for parameter in parameters]
    for _ in range(2):
        seed = int(torch.randint(2**31 - 1, ()))
        torch.manual_seed(seed)
        expected = _eager(function, data)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        with torch.no_grad():
            found = graph.module(*values, *data, *graph.noise())
        if len(found) != len(expected):
            raise CaptureError("the graph and the program give gradients to other parameters")
        for ours, theirs in zip(found, expected, strict=True):
            tolerance = _TOLERANCE.get(theirs.dtype, 1e-4)
            size = theirs.abs().max().clamp_min(1.0) if theirs.numel() else 1.0
            if not bool(((ours - theirs).abs() <= tolerance * size).all()):
                raise CaptureError(
                    "the captured graph does not agree with the program on fresh draws"
                )
        if not torch.equal(after, torch.get_rng_state()):
            raise CaptureError("the captured graph draws other random numbers than the program")

"""One kind of call, captured, checked and compiled: what compiled loops have in common."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import pyro
import pyro.optim
import torch
from pyro.infer.util import zero_grads
from torch import Tensor

from guides.capture.graph import CaptureError, Graph, capture_graph
from guides.capture.optimizers import Rule, rule_of
from guides.capture.python_state import PythonState
from guides.capture.restarts import Stack
from guides.capture.steps import Steps, rng_devices
from guides.capture.surroundings import Surroundings, buffers_kept, called_modules, modules_of

__all__ = ["Compiled", "Kind", "Program"]

_AUTO_NODES = 4000
_MOST_STEPS = 16
_MANY_NUMBERS = 20_000
_TOLERANCE = {torch.float64: 1e-9}
_MOST_CHANGES = 8

Function = Callable[..., tuple[Tensor, list[Tensor | None], list[Tensor]]]
Setup = Callable[[], "Program"]


@dataclass(frozen=True)
class Program:
    """What a graph is captured from.

    Args:
        function: Takes data tensors; returns a loss, gradients and further results.
        data: The data of the first call.
        touched: All parameters that the program touches, by name.
        parameters: Those that may learn.
        programs: Model, guide and objective, whose modules and attributes are looked after.
        alone: Whether nothing but ``parameters`` may want a gradient.
    """

    function: Function
    data: list[Tensor]
    touched: dict[str, Tensor]
    parameters: list[Tensor]
    programs: tuple[Any, ...]
    alone: bool = False


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
        setup: Returns what to capture. May raise :class:`CaptureError`.
        optim: The optimizer.
        mode: ``"inductor"`` or ``"graph"``.
        reason: Why the mode is not the one that was asked for.
        steps_per_call: Steps of one graph; None for what suits its size.
        stack: Where several runs are made at once, their parameters.
        joint_noise: Whether the noise of all steps of a call comes from one draw.
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
        joint_noise: bool = False,
    ) -> None:
        self.stack = stack
        self.joint_noise = joint_noise
        self.optim = optim
        self.mode = mode
        self.reason = reason
        self.steps_per_call = steps_per_call
        self.graph: Graph | None = None
        self.parameters: list[Tensor] = []
        self.num_numbers = 0
        self.rules: list[Rule] = []
        self.made: dict[tuple[int, str], Steps] = {}
        self.capture_seconds = 0.0
        self._changes = 0
        self._idle: list[Tensor] = []
        self._marked = False
        self._around: Surroundings | None = None
        self._try(setup)

    def _try(self, setup: Setup) -> None:
        start = time.perf_counter()
        self.graph = None
        try:
            with _python_draws_kept():
                self._capture(setup)
        except CaptureError as error:
            # Pyro adds the shapes of the trace to what is raised inside of a program.
            self.graph, self.reason = None, (str(error).splitlines() or [""])[0]
        except Exception as error:
            # What is wrong with the program itself, its eager step says.
            first = (str(error).splitlines() or [""])[0][:160]
            self.graph, self.reason = None, f"capturing it raised {type(error).__name__}: {first}"
        self.capture_seconds += time.perf_counter() - start

    def is_current(self) -> bool:
        """Whether the graph, where there is one, is still that of the program."""
        if self.graph is None or self._around is None:
            return True
        # Pyro leaves zeros behind: whatever learned once is moved by every later step.
        return self._around.are_current() and all(p.grad is None for p in self._idle)

    def renew(self, setup: Setup) -> None:
        """Capture again, because what the graph depends on has changed."""
        self._changes += 1
        self.made.clear()
        self._marked = False
        if self._changes > _MOST_CHANGES:
            self.graph = None
            self.reason = (
                "what it depends on beside its arguments (an attribute, a closure or a global, a "
                f"buffer or mode of a module, the store) changed more than {_MOST_CHANGES} times: "
                "pass what moves as a tensor"
            )
            return
        self._try(setup)

    def _capture(self, setup: Setup) -> None:
        with torch.random.fork_rng(rng_devices()), called_modules() as called:
            program = setup()
            data, self.parameters = program.data, program.parameters
            function = _with_zeros(program.function, self.parameters)
            state = PythonState(program.programs, [*program.touched.values(), *data])
            self.num_numbers = sum(tensor.numel() for tensor in (*self.parameters, *data))
            if not self.parameters:
                raise CaptureError("there are no parameters to learn")
            with buffers_kept(*program.programs):
                # The first evaluation may make checks, caches and parameters of its own.
                _eager(function, data)
                graph = capture_graph(function, data, self.parameters)
                _check(graph, function, data, self.parameters)
            state.settle()
        if self.stack is not None and graph.live:
            raise CaptureError(f"{graph.live[0]} draws by the value of a parameter")
        if program.alone and any(constant.requires_grad for constant in graph.constants):
            raise CaptureError(
                "it reads a tensor that requires a gradient and is no parameter of Pyro's store "
                "(register its module with pyro.module)"
            )
        self.graph = graph
        learning = set(graph.learning)
        self._idle = [p for i, p in enumerate(self.parameters) if i not in learning]
        modules = [*modules_of(*program.programs), *called.values()]
        # Uncompiled graphs read such tensors live.
        fixed = [c for c in graph.constants if self.mode == "inductor" or not c.requires_grad]
        self._around = Surroundings(modules, program.touched, fixed, state)
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
        if self.rules and self._is_outdated():
            self._read_rules()
        if not self.rules:
            return self._with_eager_optimizer(data)
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
                self.graph,
                self.rules,
                self.parameters,
                num_steps,
                mode,
                self.stack,
                small,
                self.joint_noise,
            )
        found = self.made[key](data)
        if not self._marked:
            self._marked = True
            for place in self.graph.learning:
                parameter = self.parameters[place]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return found

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


def _with_zeros(function: Function, parameters: Sequence[Tensor]) -> Function:
    """Gradients of zero for what learned in earlier calls, as Pyro's steps leave them behind."""
    learned = [parameter.grad is not None for parameter in parameters]

    def filled(*data: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        loss, grads, extras = function(*data)
        triples = zip(grads, learned, parameters, strict=True)
        return (
            loss,
            [torch.zeros_like(p) if g is None and known else g for g, known, p in triples],
            extras,
        )

    return filled


@contextlib.contextmanager
def _python_draws_kept() -> Iterator[None]:
    """Leave the random states of Python and numpy as they were."""
    state, array_state = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        numpy.random.set_state(array_state)


def _random_states() -> list[Tensor]:
    """The states that a program may draw from: that of the CPU, and those of GPUs in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in rng_devices())]


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
        after = _random_states()
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
        if not all(map(torch.equal, after, _random_states())):
            raise CaptureError("the captured graph draws other random numbers than the program")

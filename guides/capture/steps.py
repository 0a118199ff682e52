"""Several optimizer steps in one graph, and what runs it."""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from guides.capture.cuda_graphs import Recording, records
from guides.capture.graph import Draw, Graph, share_equal_terms, trace
from guides.capture.optimizers import Rule
from guides.capture.products import as_calls, choose_products
from guides.capture.restarts import Stack
from guides.capture.sums import join_products

__all__ = ["MODES", "Steps", "choose_mode", "compiler_missing", "lower", "rng_devices"]

_CALLS_AHEAD = 64
# Draws that stay in the graph are those of torch, from its own stream.
_CONFIG = {"fallback_random": True, "fx_graph_cache": True}
MODES = ("auto", "inductor", "graph", "eager")


def compiler_missing() -> str | None:
    """Why nothing can be compiled on this machine, None where it can."""
    from torch._inductor import config

    candidates = config.cpp.cxx
    names = [candidates] if isinstance(candidates, str) else [c for c in candidates if c]
    if any(shutil.which(name) for name in (*names, "g++", "clang++", "c++")):
        return None
    return "there is no C++ compiler (install g++ or clang++, or set CXX)"


def choose_mode(mode: str) -> tuple[str, str | None]:
    """The mode that is possible here, and why it is not the one that was asked for.

    Raises:
        ValueError: For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if mode not in ("auto", "inductor"):
        return mode, None
    missing = compiler_missing()
    if missing is None:
        return "inductor", None
    reason = f"{missing}; captured graphs run without being compiled"
    if mode == "inductor":
        warnings.warn(f"Nothing can be compiled: {reason}.", UserWarning, stacklevel=3)
    return "graph", reason


def lower(
    function: Callable[..., Any], inputs: Sequence[Tensor], mode: str, *, small: bool = False
) -> tuple[Callable[..., Sequence[Tensor]], str | None]:
    """What runs a function of tensors: its graph, or the compiled graph.

    Args:
        function: A pure function of tensors, which may write into its inputs at the end.
        inputs: Example inputs; they are not changed.
        mode: ``"graph"`` or ``"inductor"``.
        small: Whether calls are so short that what surrounds the kernels counts: it is compiled
            as well, then.

    Returns:
        What runs it, and why it is the graph where it should have been compiled.
    """

    def traced(*, libraries: bool) -> tuple[fx.GraphModule, bool]:
        with torch.no_grad():
            module = trace(function, [value.detach().clone() for value in inputs])
        share_equal_terms(module.graph)
        if join_products(module.graph):
            share_equal_terms(module.graph)
        chosen = choose_products(module, libraries=libraries, compiled=mode != "graph")
        module.recompile()
        return module, chosen

    if mode == "graph":
        return traced(libraries=True)[0], None
    on_cpu = all(value.device.type == "cpu" for value in inputs)
    # What is faster may be more than the compiler can do with a graph: then without it.
    attempts = [(True, {"cpp_wrapper": True})] if small and on_cpu else []
    attempts += [(True, {}), (False, {})]
    reason = ""
    for libraries, options in attempts:
        module, chosen = traced(libraries=libraries)
        try:
            # Patterns for packed weights would be looked for in products that are chosen.
            return _compiled(module, inputs, {**options, "pattern_matcher": not chosen}), None
        except Exception as error:
            reason = f"compiling it raised {type(error).__name__}: {str(error).splitlines()[:1]}"
    return traced(libraries=True)[0], reason


def _compiled(
    module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Sequence[Tensor]]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile as compile_graph
    from torch._inductor import config
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # The cache on disk, which later processes read, wants an environment of shapes.
    shapes = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))
    example: list[Any] = [shapes.from_tensor(value, static_shapes=True) for value in inputs]
    settings = config.patch({**_CONFIG, **options})
    with torch.no_grad(), settings, tracing(TracingContext(shapes)), as_calls():
        run: Callable[..., Sequence[Tensor]] = compile_graph(module, example)
        # The first call loads what was compiled; it must change nothing.
        run(*(value.detach().clone() for value in inputs))
    return run


@dataclass
class Steps:
    """Optimizer steps of a captured loss, several a call.

    Args:
        graph: The captured loss and gradients.
        rules: The update of every learning parameter.
        parameters: All parameters, in the order of the graph.
        num_steps: Steps a call; 0 for gradients alone.
        mode: ``"graph"`` or ``"inductor"``.
        stack: Parameters and states of several runs, which are made all at once.
        small: Whether the tensors are small.
        joint_noise: Whether the noise of all steps of a call comes from one draw, where it is all
            standard normal. Its numbers are those of the program for a generator whose stream
            does not depend on how many are drawn at once.
    """

    graph: Graph
    rules: list[Rule]
    parameters: list[Tensor]
    num_steps: int
    mode: str
    stack: Stack | None = None
    small: bool = False
    joint_noise: bool = False
    seconds: float = 0.0
    reason: str | None = None
    _run: Callable[..., Sequence[Tensor]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.learning = [self.parameters[i] for i in self.graph.learning]
        self.fixed = [
            p for i, p in enumerate(self.parameters) if i not in set(self.graph.learning)
        ]
        self.state = [rule.tensors() for rule in self.rules]
        if self.stack is not None:
            # Before any noise is drawn, so that runs of one seed differ by their jitter alone.
            for parameter in self.learning:
                self.stack.parameter(parameter)
        # Parameters whose coefficients agree now agree as long as they make the same steps.
        self._table: list[int] = []
        self._leaders: list[Rule] = []
        known: dict[Any, int] = {}
        for rule in self.rules:
            key = (
                rule.signature,
                rule.group["lr"],
                str(rule.coefficients(1).tolist()),
                rule.parameter.dtype,
            )
            if key not in known:
                known[key] = len(self._leaders)
                self._leaders.append(rule)
            self._table.append(known[key])

        left = () if self.stack is None else (self.stack.num_restarts,)
        self._draws = [draw.repeated(*left) for draw in self.graph.draws] * self.num_steps
        self._joint = _joint_normal(self.graph.draws) if self.joint_noise else None
        self._sizes = [math.prod(draw.shape or ()) for draw in self.graph.draws]
        if self._joint is not None:
            shape = (self.num_steps, *left, sum(self._sizes))
            self._draws = [replace(self._joint, shape=shape).repeated()]
        self._tables: list[Tensor] = []
        self._made_for: list[Any] = []
        self._place = 0
        self._views: list[Tensor] = []
        self._pointers: list[int] = []

    def is_current(self) -> bool:
        """Whether the optimizers are still those that the graph was made for."""
        # Steps of other calls may have moved some of the parameters only.
        lead = [(rule.group["lr"], rule.count()) for rule in self._leaders]
        return all(
            (rule.group["lr"], rule.count()) == lead[place] and rule.fixed == rule.signature[1:]
            for rule, place in zip(self.rules, self._table, strict=True)
        )

    def _function(self, *inputs: Tensor) -> list[Tensor]:
        sizes = [len(state) for state in self.state]
        learning, fixed, flat, numbers, data, noise = _split(
            inputs,
            len(self.learning),
            len(self.fixed),
            sum(sizes),
            len(self._leaders),
            self.graph.num_data,
        )
        order = list(self.graph.learning)
        state, start = [], 0
        for size in sizes:
            state.append(list(flat[start : start + size]))
            start += size
        evaluate: Callable[..., Any] = self.graph.module
        if self.stack is not None:
            dims = [0 if i in set(order) else None for i in range(len(self.parameters))]
            evaluate = torch.func.vmap(
                self.graph.module,
                in_dims=(*dims, *(None for _ in data), *(0 for _ in self.graph.draws)),
            )
        current = list(learning)
        losses: list[Tensor] = []
        extras: list[Tensor] = []
        for i in range(self.num_steps):
            parameters: list[Any] = [None] * len(self.parameters)
            for place, value in zip(order, current, strict=True):
                parameters[place] = value
            rest = iter(fixed)
            parameters = [next(rest) if value is None else value for value in parameters]
            own = self._noise_of(i, noise)
            loss, *results = evaluate(*parameters, *data, *own)
            grads, extras = results[: len(order)], results[len(order) :]
            losses.append(loss)
            for j, (rule, grad) in enumerate(zip(self.rules, grads, strict=True)):
                row = numbers[self._table[j]][i]
                current[j], state[j] = rule.update(current[j], grad, state[j], row)
        for before, after in zip(learning, current, strict=True):
            before.copy_(after)
        for before, after in zip(flat, [t for own in state for t in own], strict=True):
            before.copy_(after)
        return [torch.stack(losses), *extras]

    def _noise_of(self, step: int, noise: Sequence[Tensor]) -> list[Tensor]:
        """The noise of one of the steps of a call, a tensor a draw."""
        draws = self.graph.draws
        if self._joint is None:
            return list(noise[step * len(draws) : (step + 1) * len(draws)])
        parts = noise[0][step].split(self._sizes, -1)
        shapes = [
            (*part.shape[:-1], *(draw.shape or ()))
            for part, draw in zip(parts, draws, strict=True)
        ]
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _all(self, *inputs: Tensor) -> list[Tensor]:
        return list(self.graph.module(*inputs))

    def _numbers(self) -> list[Tensor]:
        """Coefficients of the next steps, from tables that are worked out well ahead."""
        place = self._place
        now = [(rule.rates(1)[0], float(rule.state.get("step", 0.0))) for rule in self._leaders]
        if place >= len(self._made_for) or now != self._made_for[place]:
            place = self._place = 0
            ahead = _CALLS_AHEAD * max(1, self.num_steps)
            each = [
                [(rate, count + i) for i, rate in enumerate(rule.rates(ahead))]
                for rule, (_, count) in zip(self._leaders, now, strict=True)
            ]
            self._made_for = [list(entry) for entry in zip(*each, strict=True)]
            self._tables = [
                rule.coefficients(ahead).to(rule.parameter.device, rule.parameter.dtype)
                for rule in self._leaders
            ]
        return [table[place : place + self.num_steps] for table in self._tables]

    def _inputs(self, data: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
        live = (*self.learning, *self.fixed)
        pointers = [tensor.data_ptr() for tensor in live]
        if pointers != self._pointers:
            # Views of the live tensors, as long as these stay where they are.
            self._pointers = pointers
            if self.stack is None:
                learning = [parameter.detach() for parameter in self.learning]
                flat = [tensor for state in self.state for tensor in state]
            else:
                learning = [self.stack.parameter(parameter) for parameter in self.learning]
                flat = [self.stack.state(t) for state in self.state for t in state]
            self._views = [*learning, *(parameter.detach() for parameter in self.fixed), *flat]
        return [*self._views, *self._numbers(), *data, *noise]

    def _noise(self) -> list[Tensor]:
        return [draw() for draw in self._draws]

    def _prepare(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        start = time.perf_counter()
        # Draws that stay in the graph are made while it is traced; they are not the program's.
        with torch.random.fork_rng(rng_devices()):
            self._run, self.reason = lower(function, inputs, self.mode, small=self.small)
            if records(inputs, self.mode, self.reason) and not self.graph.live and self.num_steps:
                self._record(inputs)
        self.seconds = time.perf_counter() - start

    def _record(self, inputs: Sequence[Tensor]) -> None:
        assert self._run is not None
        compiled, recording = self._run, Recording(self._run, len(self._views))
        kept = [view.clone() for view in self._views]
        try:
            with torch.no_grad():
                recording(*inputs)
            self._run = recording
        except RuntimeError as error:
            first = (str(error).splitlines() or [""])[0]
            self._run = compiled
            self.reason = f"recording it on the GPU raised {type(error).__name__}: {first}"
        for view, value in zip(self._views, kept, strict=True):
            view.copy_(value)

    def __call__(self, data: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Make the steps; returns the losses before each of them, and the extras of the last."""
        if self._run is None:
            # Draws of an example, which are not the program's.
            with torch.random.fork_rng(rng_devices()):
                example = self._inputs(data, self._noise())
            self._prepare(self._function, example)
        inputs = self._inputs(data, self._noise())
        assert self._run is not None
        with torch.no_grad():
            losses, *extras = self._run(*inputs)
        for rule in self.rules:
            rule.advance(self.num_steps)
        self._place += self.num_steps
        return losses, extras

    def gradients(self, data: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The loss, its gradients and the extras, without a step."""
        values = [parameter.detach() for parameter in self.parameters]
        if self._run is None:
            with torch.random.fork_rng(rng_devices()):
                example = [*values, *data, *self.graph.noise()]
            self._prepare(self._all, example)
        inputs = [*values, *data, *self.graph.noise()]
        assert self._run is not None
        with torch.no_grad():
            loss, *results = self._run(*inputs)
        count = len(self.graph.learning)
        return loss, list(results[:count]), list(results[count:])


def _joint_normal(draws: Sequence[Draw]) -> Draw | None:
    """A draw that stands for several, where all are standard normal and of one kind."""
    if not draws or any(not draw.is_standard_normal for draw in draws):
        return None
    kinds = {(draw.dtype, draw.device) for draw in draws}
    return draws[0] if len(kinds) == 1 else None


def rng_devices() -> list[int]:
    """Devices whose random state is forked beside that of the CPU."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def _split(values: Sequence[Tensor], *sizes: int) -> list[Sequence[Tensor]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return [*parts, values[start:]]

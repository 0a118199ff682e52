"""What a graph depends on beside its inputs, looked at before every call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from guides.capture.python_state import PLAIN, PythonState

__all__ = ["Surroundings", "buffers_kept", "called_modules", "modules_of"]


@contextlib.contextmanager
def called_modules() -> Iterator[dict[int, nn.Module]]:
    """Collect the modules that are called inside, which a program may hold in a closure."""
    found: dict[int, nn.Module] = {}

    def note(module: nn.Module, args: Any) -> None:
        if not isinstance(module, fx.GraphModule):  # a graph that is being checked
            found[id(module)] = module

    handle = nn_module.register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules of programs that are modules, or methods of modules."""
    owners = [getattr(program, "__self__", program) for program in programs]
    return [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]


@contextlib.contextmanager
def buffers_kept(*programs: Any) -> Iterator[None]:
    """Put back buffers that evaluations move, such as running statistics."""
    modules = modules_of(*programs)
    buffers = {id(b): b for m in modules for b in m._buffers.values() if b is not None}.values()
    kept = [(buffer, buffer.detach().clone()) for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


class Surroundings:
    """Parameters, modules and the state of Python as they were at the capture.

    A graph was made for the parameters of the store under their names, for what of them learns,
    for the mode of the modules, and for the numbers that modules, objects, closures and globals
    hold. Where any of that is another one now, the graph is not that of the program any more.

    Args:
        modules: The modules of the program.
        parameters: The parameters that it touches, by name in the store.
        constants: Tensors that are part of the graph.
        state: What the program reads beside modules.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        parameters: Mapping[str, Tensor],
        constants: Sequence[Tensor],
        state: PythonState,
    ) -> None:
        self._state = state
        unique = {id(module): module for module in modules}.values()
        self._names = list(parameters)
        own_parameters = [p for m in unique for p in m._parameters.values() if p is not None]
        everything = (*parameters.values(), *own_parameters, *constants)
        self._parameters = list({id(t): t for t in everything}.values())
        # What a compiler has built in changes with its version alone.
        buffers = [b for m in unique for b in m._buffers.values() if b is not None]
        values = {id(t): t for t in (*constants, *buffers)}.values()
        self._versioned = [t for t in values if not t.is_inference()]
        self._plain: list[tuple[dict[str, Any], str]] = []
        self._held: list[tuple[dict[str, Any], str]] = []
        for module in unique:
            own: dict[str, Any] = module.__dict__
            self._plain += [(own, k) for k, v in own.items() if isinstance(v, PLAIN)]
            for held in (module._buffers, module._parameters, module._modules):
                self._held += [(held, k) for k in held]
        self._kept = [own.get(k) for own, k in self._held]
        self._before = self._now()

    def _now(self) -> list[Any]:
        store = pyro.get_param_store()._params
        return [
            torch.get_default_dtype(),
            *[id(store.get(name)) for name in self._names],
            *[t.requires_grad for t in self._parameters],
            *[t.dtype for t in self._parameters],
            *[t._version for t in self._versioned],
            *[id(own.get(k)) for own, k in self._held],
            *[own.get(k) for own, k in self._plain],
        ]

    def are_current(self) -> bool:
        """Whether nothing has changed since the capture."""
        try:
            return self._state.is_current() and self._now() == self._before
        except (RuntimeError, ValueError):  # a number became something that has no truth
            return False

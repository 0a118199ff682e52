"""What can go wrong between a model and its guide: their order, and which program q follows."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.layout import layout
from guides.probe import Program

__all__ = ["check_follows", "check_order", "same_program"]


def check_order(where: str, model: Any, guide: Any) -> None:
    """Raise where model and guide stand in each other's place, or are no programs.

    Args:
        where: The call that takes them, for the message: ``"elbo(model, guide, *args)"``.
        model: What was passed as the model.
        guide: What was passed as the guide.

    Raises:
        TypeError: Naming what was passed.
    """
    if isinstance(model, (ProgramGuide, AutoGuide, GuideMessenger)):
        raise TypeError(
            f"The order is {where}, and the model is a program, not a guide; got a "
            f"{type(model).__name__} first. Swap the two, or pass the program."
        )
    for role, program in (("model", model), ("guide", guide)):
        if isinstance(program, type) or not callable(program):
            got = f"the class {program.__name__}" if isinstance(program, type) else _named(program)
            fix = " Build one: guides.make(name, model, *args)." if role == "guide" else ""
            raise TypeError(
                f"The order is {where}, and the {role} is something to call; got {got}.{fix}"
            )


def _named(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"a {type(value).__name__}"


def check_follows(
    guide: Any,
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    learning: bool = False,
) -> None:
    """Warn where q follows another program than the one that is fitted or scored.

    Refined and top-down guides run the program that they were built for. Another program is all
    right where it is that one in a wrapper (handlers of ``pyro.poutine``, ``functools.partial``,
    a module or a function around it); then, and for all other guides, nothing is said.

    Args:
        guide: Any guide.
        model: The program that is fitted or scored.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        learning: Whether parameters will move: then two modules that are equal now part later.
    """
    if not isinstance(guide, ProgramGuide) or same_program(model, guide.model):
        return
    schemes = getattr(guide, "schemes", {})
    reading = [key for key, scheme in schemes.items() if scheme.reads_model]
    if not reading:
        return
    parted = learning and any(
        isinstance(program, nn.Module) and any(p.requires_grad for p in program.parameters())
        for program in (model, guide.model)
    )
    if not parted and _equal(guide, model, args, kwargs):
        return
    kind = type(schemes[reading[0]]).__name__
    warnings.warn(
        f"A {kind} guide finds q by the program that it was built for, and this is another one: "
        "q follows the first, the score is of the second. Build the guide for this program, or "
        "copy both at once: model, guide = copy.deepcopy((model, guide)).",
        UserWarning,
        stacklevel=3,
    )


def same_program(model: Any, other: Any) -> bool:
    """Whether one of two programs is the other, wraps it, or shares parameters with it.

    Example:
        >>> def model(x):
        ...     return x
        >>> same_program(poutine.condition(model, {"z": 1.0}), model)
        True
        >>> same_program(lambda x: x, model)
        False
    """
    if model is other:
        return True
    first, second = list(_within(model, {})), list(_within(other, {}))
    held = {id(part) for part in first}
    return any(id(part) in held for part in second)


def _within(program: Any, seen: dict[int, Any], depth: int = 4) -> Iterator[Any]:
    """A program, its modules and parameters, and what it wraps or calls."""
    if id(program) in seen:
        return
    # Held, because the identity of an object that is gone passes to another one.
    seen[id(program)] = program
    yield program
    if isinstance(program, nn.Module):
        yield from program.modules()
        yield from program.parameters()
        return
    if depth == 0:
        return
    inner: list[Any] = []
    unwrapped = poutine.unwrap(program)
    if unwrapped is not program:
        inner.append(unwrapped)
    if isinstance(program, functools.partial):
        inner += [program.func, *program.args, *program.keywords.values()]
    if isinstance(program, types.MethodType):
        inner += [program.__self__, program.__func__]
    if isinstance(program, types.FunctionType):
        for cell in program.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        named = (program.__globals__.get(name) for name in program.__code__.co_names)
        inner += [value for value in named if isinstance(value, (nn.Module, types.FunctionType))]
    wrapped = getattr(program, "__wrapped__", None)
    inner += [] if wrapped is None else [wrapped]
    if not isinstance(program, (types.FunctionType, types.MethodType, functools.partial)):
        inner += list(getattr(program, "__dict__", {}).values())
    for part in inner:
        if callable(part):
            yield from _within(part, seen, depth - 1)


def _steps(like: Tensor) -> Tensor:
    """Irregular numbers of a given shape, the same ones every time."""
    return 0.3 * torch.sin(torch.arange(1.0, like.numel() + 1)).to(like).reshape(like.shape)


def _equal(
    guide: ProgramGuide, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether both programs have the same density, seen at one point."""
    totals = []
    values: dict[str, Any] | None = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    programs: tuple[Callable[..., Any], ...] = (guide.model, model)
    for program in programs:
        with torch.no_grad(), torch.random.fork_rng(devices):
            # Subsamples that the programs draw are the same ones.
            torch.manual_seed(0)
            read = layout(program, args, kwargs, data_plate=guide.data_plate)
            if set(read.sites) != set(guide.latents):
                return False
            log_joint = LogJoint(program, args, kwargs, layout=read)
            if values is None:
                # Off the predictions, at which a weight may happen to say nothing.
                packed = read.pack(log_joint.predictions())
                moved = {name: value + _steps(value) for name, value in packed.items()}
                values = read.constrain(moved)
            totals.append(log_joint.total(*log_joint.rows(values)))
    return torch.allclose(totals[0], totals[1], rtol=1e-5, atol=1e-5)

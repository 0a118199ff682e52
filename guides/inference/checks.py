"""What a loop checks at its first step: whose parameters are whose, and which of them learn."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro.optim
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from guides.capture.surroundings import buffers_kept
from guides.guide import ProgramGuide
from guides.inference.solvers.solver import check_solver
from guides.supports import feasible

__all__ = ["capture", "check_arguments", "check_ownership", "check_program", "warn_frozen"]


def check_program(order: str, model: Any, optim: Any) -> None:
    """Raise unless a loop was given a program, and then an optimizer.

    Args:
        order: The call as it is meant, for the message.
        model: What came first.
        optim: What came second.

    Raises:
        TypeError: For something else.
    """
    if not callable(model) or isinstance(model, (type, ProgramGuide, pyro.optim.PyroOptim)):
        raise TypeError(
            f"The order is {order}, and the model is a Pyro program; got {type(model).__name__} "
            "first."
        )
    if not isinstance(optim, pyro.optim.PyroOptim):
        raise TypeError(
            f"optim must be a PyroOptim, got {type(optim).__name__}. Use for example "
            'pyro.optim.Adam({"lr": 1e-3}).'
        )


def check_arguments(
    model: Any,
    optim: Any,
    guide: Any,
    num_steps: int,
    step_size: Any,
    parameterization: str,
    solver: Any,
    warm_start: str | None,
    newton_steps: int,
    global_rate: float | None,
) -> None:
    """Raise unless a loop of predictive coding can be made of these arguments.

    Raises:
        TypeError: For arguments in another order.
        ValueError: For one out of range.
    """
    check_program("PredictiveCoding(model, optim, guide=None)", model, optim)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    if step_size != "auto" and not (isinstance(step_size, (int, float)) and step_size > 0):
        raise ValueError(f'step_size must be "auto" or a positive number, got {step_size!r}.')
    if parameterization not in ("auto", "centered", "noncentered"):
        raise ValueError(
            'parameterization must be "auto", "centered" or "noncentered", got '
            f"{parameterization!r}."
        )
    if solver != "auto":
        check_solver(solver, step_size)
    if warm_start not in (None, "guide", "last"):
        raise ValueError(f'warm_start must be None, "guide" or "last", got {warm_start!r}.')
    if warm_start == "guide" and guide is None:
        raise ValueError(
            'warm_start="guide" needs a guide to start from. Pass guide=, for example '
            'guides.make("amortized_normal", model, x).'
        )
    if newton_steps < 0:
        raise ValueError(f"newton_steps must not be negative, got {newton_steps}.")
    if global_rate is not None and not 0 < global_rate <= 1:
        raise ValueError(f"global_rate must be in (0, 1], got {global_rate}.")


def capture(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Unconstrained parameters that a program touches, by name; nothing else is disturbed."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    # Parameters that are made here must be ordinary tensors, also when called in inference mode.
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad():
        kept = buffers_kept(program)
        with kept, poutine.block(), poutine.trace(param_only=True) as trace, _Feasible():
            program(*args, **kwargs)
    return {
        name: site["value"].unconstrained()
        for name, site in trace.trace.nodes.items()
        if site["type"] == "param"
    }


class _Feasible(Messenger):
    """Give continuous latents a feasible value: priors may have no sampler, or draw badly."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is not None or site_is_subsample(msg):
            return
        # What cannot be given a value here is drawn, as the program would do by itself.
        with contextlib.suppress(NotImplementedError):
            if not msg["fn"].support.is_discrete:
                msg["value"] = feasible(msg["name"], msg["fn"], 0.0)


def check_ownership(
    programs: Mapping[str, Callable[..., Any]], used: Mapping[str, dict[str, Tensor]]
) -> None:
    """Raise where a module runs on its own weights while the store trains others of that name.

    Pyro's parameter store is global: two modules with equal attribute paths are one parameter to
    it, and the optimizer then moves the first module's tensor while the second one never learns.

    Args:
        programs: Model and guide by role.
        used: What each of them touched, from :func:`capture`.

    Raises:
        ValueError: Naming the parameter and the fix.
    """
    for role, program in programs.items():
        if not isinstance(program, nn.Module):
            continue
        own = {id(parameter) for parameter in program.parameters()}
        paths = {path.removesuffix("_unconstrained") for path, _ in program.named_parameters()}
        prefix = getattr(program, "_pyro_name", "") if isinstance(program, PyroModule) else None
        for name, tensor in used[role].items():
            path = name.replace("$$$", ".")
            if prefix is None:
                mine = any(path.endswith("." + p) for p in paths)
            else:
                mine = path.removeprefix(f"{prefix}." if prefix else "") in paths
            if mine and id(tensor) not in own:
                raise ValueError(
                    f"Parameter {name!r} of the {role} is another module's parameter in Pyro's "
                    "global store, because both have the same name. Give the modules different "
                    'names (PyroModule.__init__(self, "name")), or build and train each pair in '
                    "its own pyro.get_param_store().scope()."
                )
    if len(used) > 1:
        first, second = used.values()
        tensors = {id(tensor) for tensor in second.values()}
        shared = [name for name, tensor in first.items() if id(tensor) in tensors]
        if shared and any(isinstance(program, nn.Module) for program in programs.values()):
            raise ValueError(
                f"Model and guide share the parameter {shared[0]!r}: one optimizer step would "
                "serve two purposes. Give the guide a module of its own (copy.deepcopy), and the "
                "two modules different names."
            )


def warn_frozen(model: Any, learning: set[Tensor]) -> list[str]:
    """Names of trainable parameters of a model that get no gradient; warns where there are any."""
    if not isinstance(model, nn.Module):
        return []
    ids = {id(parameter) for parameter in learning}
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in ids
    ]
    if frozen:
        warnings.warn(
            f"No gradient reaches {', '.join(frozen)}: these parameters will not learn. Freeze "
            "them with requires_grad_(False) if that is meant; in a plain nn.Module, register "
            "its networks with pyro.module.",
            UserWarning,
            stacklevel=3,
        )
    return frozen

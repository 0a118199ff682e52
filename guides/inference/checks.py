"""What a loop checks at its first step: whose parameters are whose, and which of them learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from guides.supports import feasible, unwrap

__all__ = ["capture", "check_ownership", "warn_frozen"]


def capture(
    program: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Unconstrained parameters that a program touches, by name; nothing else is disturbed."""
    with torch.random.fork_rng(devices=[]), poutine.block(), torch.no_grad():
        with poutine.trace(param_only=True) as trace, _ImproperPriors():
            program(*args, **kwargs)
    return {
        name: site["value"].unconstrained()
        for name, site in trace.trace.nodes.items()
        if site["type"] == "param"
    }


class _ImproperPriors(Messenger):
    """Give sites that have no sampler a value."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and type(unwrap(msg["fn"])).__name__ == "ImproperUniform":
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
        paths = {name.replace("$$$", ".") for name, _ in program.named_parameters()}
        for name, tensor in used[role].items():
            path = name.replace("$$$", ".")
            mine = any(path == p or path.endswith("." + p) for p in paths)
            if mine and id(tensor) not in own:
                raise ValueError(
                    f"Parameter {name!r} of the {role} is another module's parameter in Pyro's "
                    "global store, because both have the same name. Give the modules different "
                    'names (PyroModule.__init__(self, "name")), or build and train each pair in '
                    "its own pyro.get_param_store().scope()."
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
            "them with requires_grad_(False) if that is meant.",
            UserWarning,
            stacklevel=3,
        )
    return frozen

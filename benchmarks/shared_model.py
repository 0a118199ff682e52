"""The shared model of the frozen regime: trained once a seed, then the same for every guide."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from guides.inference.checks import capture

__all__ = ["fingerprint", "load_state", "read_state", "state_of", "write_state"]

State = dict[str, Tensor]


def state_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> State:
    """Return the parameters of a program: a module's state, or its unconstrained store values."""
    if isinstance(model, nn.Module):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
    used = capture(model, args, kwargs)
    return {name: value.detach().clone() for name, value in used.items()}


def load_state(
    model: Callable[..., Any], state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Give a program the parameters that `state_of` returned."""
    if isinstance(model, nn.Module):
        model.load_state_dict(state)
        return
    # One call makes the parameters, with their constraints, in the store of this run.
    capture(model, args, kwargs)
    store = pyro.get_param_store()
    for name, value in state.items():
        store._params[name].data.copy_(value)


def fingerprint(state: State) -> str:
    """Return a digest of parameters: guides are paired only on a model with the same one.

    Example:
        >>> import torch
        >>> from benchmarks.shared_model import fingerprint
        >>> fingerprint({}), len(fingerprint({"w": torch.ones(2)}))
        ('no parameters', 16)
    """
    if not state:
        return "no parameters"
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()[:16]


def write_state(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write a state in one move, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save({"state": state, "about": dict(about)}, part)
    part.replace(path)


def read_state(path: Path) -> tuple[State, dict[str, Any]]:
    """Read what `write_state` wrote."""
    content = torch.load(path, weights_only=True)
    return content["state"], content["about"]

"""Recipes: what a guide was asked for, without its data, in a form that JSON can hold.

    value                      description
    None, bool, int, str ...   itself
    tuple, list, dict          {"tuple": [...]}, {"list": [...]}, {"dict": [[key, value], ...]}
    tensor, array              {"tensor": [dtype, shape]}, {"array": [dtype, shape]}
    dtype, device              {"dtype": name}, {"device": name}
    anything else              {"other": class}, which cannot be built again

Tensors come back as zeros, boolean ones as True: a mask that hides everything would hide latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Recipe", "build", "describe", "others"]


@dataclass(frozen=True)
class Recipe:
    """What a guide was asked for: plain descriptions, no data and no modules.

    Args:
        kind: ``"make"`` for :func:`guides.make`, ``"laplace"`` for a Laplace posterior.
        cells: ``(key, name, options)`` of every cell; the key is None where there is one only.
        options: Options of the guide as a whole.
        args: Positional arguments of the example call.
        kwargs: Keyword arguments of the example call.
    """

    kind: str
    cells: tuple[tuple[str | None, str, dict[str, Any]], ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    args: Any = None
    kwargs: Any = None

    @classmethod
    def of(
        cls,
        kind: str,
        name: str | Mapping[str, str | tuple[str, Mapping[str, Any]]] | None,
        options: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None,
    ) -> Recipe:
        """Describe what :func:`guides.make` was called with.

        Args:
            kind: See the class.
            name: Name of a guide, or names and options by cell; None for a Laplace posterior.
            options: Options of the one cell and of the guide, or of the composite guide.
            args: Positional arguments of the example call.
            kwargs: Keyword arguments of the example call.
        """
        cells: list[tuple[str | None, str, dict[str, Any]]] = []
        own = {key: value for key, value in options.items() if key in ("data_plate", "jacobian")}
        rest = {key: value for key, value in options.items() if key not in (*own, "name")}
        if isinstance(name, str):
            cells.append((None, name, _described(rest)))
        elif name is not None:
            for key, entry in name.items():
                cell, cell_options = (entry, {}) if isinstance(entry, str) else entry
                cells.append((key, cell, _described(cell_options)))
        call = describe(tuple(args)), describe(dict(kwargs or {}))
        return cls(kind, tuple(cells), _described(own), *call)


def _described(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: describe(value) for key, value in options.items()}


def describe(value: Any) -> Any:
    """The description of a value.

    Example:
        >>> describe((torch.zeros(3, 2), None, "a"))
        {'tuple': [{'tensor': ['float32', [3, 2]]}, None, 'a']}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return {"tensor": [_name(value.dtype), list(value.shape)]}
    if isinstance(value, np.ndarray):
        return {"array": [value.dtype.str, list(value.shape)]}
    if type(value) in (tuple, torch.Size):
        return {"tuple": [describe(item) for item in value]}
    if type(value) is list:
        return {"list": [describe(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[describe(k), describe(v)] for k, v in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    own = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return {"other": f"{own.__module__}.{own.__qualname__}"}


def build(description: Any, device: torch.device | None = None) -> Any:
    """A value of that description: zeros where there was a tensor.

    Args:
        description: What :func:`describe` returned.
        device: Device of the tensors.

    Raises:
        ValueError: For something that cannot be described, or is no description.

    Example:
        >>> build({"tuple": [{"tensor": ["float32", [2]]}, None, "a"]})
        (tensor([0., 0.]), None, 'a')
    """
    if not isinstance(description, dict):
        return description
    ((tag, content),) = description.items()
    if tag == "tensor":
        dtype = getattr(torch, content[0])
        # Expanded, so that a call of many rows takes no memory.
        one = torch.full((), dtype == torch.bool, dtype=dtype, device=device)
        return one.expand(content[1])
    if tag == "array":
        return np.zeros(content[1], dtype=np.dtype(content[0]))
    if tag == "tuple":
        return tuple(build(item, device) for item in content)
    if tag == "list":
        return [build(item, device) for item in content]
    if tag == "dict":
        return {build(key, device): build(value, device) for key, value in content}
    if tag == "dtype":
        return getattr(torch, content)
    if tag == "device":
        return torch.device(content)
    if tag == "other":
        raise ValueError(f"A {content} cannot be built from its description. Pass one.")
    raise ValueError(f"Unknown description {tag!r}.")


def others(description: Any, path: str = "") -> list[tuple[str, str]]:
    """What a description holds that cannot be built, as ``(where, class)``.

    Example:
        >>> others(describe([1, torch.nn.Linear(1, 1)]), "args")
        [('args[1]', 'torch.nn.modules.linear.Linear')]
    """
    if not isinstance(description, dict):
        return []
    ((tag, content),) = description.items()
    if tag == "other":
        return [(path, content)]
    if tag in ("tuple", "list"):
        return [o for i, item in enumerate(content) for o in others(item, f"{path}[{i}]")]
    if tag == "dict":
        return [o for key, value in content for o in others(value, f"{path}[{key!r}]")]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

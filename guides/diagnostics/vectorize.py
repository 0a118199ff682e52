"""Many runs of a program that draws at random, at once where it allows that."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["vectorize"]


def vectorize(
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    values: Mapping[str, Tensor],
    length: int,
) -> dict[str, Tensor] | None:
    """The runs at once, or None where the program does not allow it."""

    def numbered(_: Tensor, one: dict[str, Tensor]) -> dict[str, Tensor]:
        return run(one)

    try:
        with warnings.catch_warnings(), _EmptyIsBatched():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(numbered, randomness="different")(
                torch.arange(length), dict(values)
            )
    except (RuntimeError, TypeError, ValueError):
        # Control flow on values, or a sampler without a batching rule. The loop gives the same
        # numbers, and raises by itself if it is the program that is at fault.
        return None


class _EmptyIsBatched(TorchFunctionMode):
    """Under vmap, uninitialized float tensors are born with one slice a run.

    torch.distributions draws by filling them, ``torch.empty(shape).normal_()``, which vmap
    refuses for a tensor that all runs share.
    """

    _functions = frozenset({torch.empty, torch.empty_like, Tensor.new_empty, Tensor.new})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in self._functions or not result.is_floating_point():
            return result
        # The old constructor `tensor.new` also takes data, which must stay.
        if func is Tensor.new and not all(isinstance(a, (int, torch.Size)) for a in args[1:]):
            return result
        return torch.rand_like(result)

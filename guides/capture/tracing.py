"""The operations of a function of tensors, written down as they run."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode

__all__ = ["CaptureError", "Metadata", "WithinTorch", "reason_of", "trace", "unvalidated"]

_TRACING = threading.RLock()
_LEAVES_TORCH = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)


class CaptureError(RuntimeError):
    """A program that no graph stands for; the message is the reason."""


def trace(function: Callable[..., Any], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operations of a function of tensors, as they run on these inputs."""
    with _cheap_metadata():
        module: fx.GraphModule = proxy_tensor.make_fx(function, _allow_non_fake_inputs=True)(
            *inputs
        )
    return module


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """Let no distribution check values, not even one that was told to when it was made.

    ``expand`` writes the setting of its day into the instance, so that the priors of a
    ``PyroSample``, made with the module, would check values whatever the setting is now.
    """

    def keep(owner: Any, value: bool) -> None:
        owner.__dict__["_validate_args"] = value

    # A property of the class comes before what is written in an instance.
    switched_off = property(lambda owner: False, keep)
    with mock.patch.object(torch.distributions.Distribution, "_validate_args", switched_off):
        yield


class WithinTorch(TorchFunctionMode):
    """Refuse what leaves torch: results would be written down as constants, silently."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_TORCH:
            raise CaptureError(
                f"the program reads the values of a tensor outside of torch ({func.__name__})"
            )
        return func(*args, **(kwargs or {}))


def reason_of(error: Exception) -> str:
    """Why a trace failed, in one line."""
    text = str(error)
    if "get value out of a tracing tensor" in text or "data-dependent" in text:
        return "the program reads the value of a tensor (an if, .item(), float() or bool())"
    if "has no attribute" in text or not text:
        return f"capturing it raised {type(error).__name__}"
    return f"capturing it raised {type(error).__name__}: {text.splitlines()[0][:160]}"


@dataclass(frozen=True)
class Metadata:
    """What is known of a tensor of a graph, beside its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def contiguous(cls, shape: Sequence[int], like: Metadata) -> Metadata:
        """Of a tensor of this shape whose numbers lie in order."""
        stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return cls(tuple(shape), tuple(stride), like.dtype, like.device)

    def transposed(self) -> Metadata:
        """Of the transpose of a matrix."""
        return Metadata(self.shape[::-1], self.stride[::-1], self.dtype, self.device)


@contextlib.contextmanager
def _cheap_metadata() -> Iterator[None]:
    """Write shapes down as they are.

    torch makes a mode of fake tensors for every operation, which takes two thirds of the time of
    a capture and serves symbolic shapes alone.
    """
    owner = threading.get_ident()

    def metadata(value: Any, include_real: bool = False) -> Any:
        if threading.get_ident() != owner:
            return original(value, include_real)
        if isinstance(value, Tensor):
            return Metadata(tuple(value.shape), value.stride(), value.dtype, value.device)
        if isinstance(value, (list, tuple)):
            return type(value)([metadata(item) for item in value])
        return value if isinstance(value, (int, float, bool)) else None

    if not hasattr(proxy_tensor, "extract_val"):
        yield
        return
    # One at a time: patches of two threads would not be undone in their order.
    with _TRACING:
        original = proxy_tensor.extract_val
        with mock.patch.object(proxy_tensor, "extract_val", metadata):
            yield

"""One source of an encoder: the fixed description of an input, and its standardization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from guides.arguments import did_you_mean
from guides.encoders.inputs import Input, alike
from guides.layout import Layout

__all__ = ["KINDS", "Source", "describe", "standardization", "unit"]

KINDS = ("vector", "image", "set")
_SMALLEST_IMAGE = 8


@dataclass(frozen=True)
class Source:
    """How one input enters the network.

    A masked source carries its mask behind its values, element by element in a set.

    Args:
        name: Name of the input.
        kind: One of ``KINDS``.
        shape: Shape of a row's value: ``(D,)``, ``(C, H, W)``, or ``(M, D)`` for a set of M
            elements; other calls may have other M.
        mask_shape: Shape of a row's mask, of an element's in a set: ``(d,)``, or ``(C, H, W)``
            with ones for what the mask does not tell apart. None where there is no mask.
        num_inner: Dimensions behind the rows that count the elements of a set.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    mask_shape: tuple[int, ...] | None = None
    num_inner: int = 0

    @property
    def width(self) -> int:
        """Number of features with statistics of their own; the elements of a set share them."""
        return self.shape[1] if self.kind == "set" else prod(self.shape)

    @property
    def num_features(self) -> int:
        """Features of a row, of an element in a set: values and mask."""
        return self.width + (0 if self.mask_shape is None else prod(self.mask_shape))

    def statistics(self, item: Input, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """How the features are standardized, see :func:`standardization`.

        Returns:
            Shift and scale, ``(width,)`` each; what a mask hides does not count.
        """
        value, present, _ = self._arranged(item, dtype)
        value = value.reshape(-1, self.width)
        return standardization(value, None if present is None else present.reshape(value.shape))

    def features(self, item: Input, shift: Tensor, scale: Tensor) -> Tensor:
        """The standardized value, zero where it is masked, with its mask: ``(B, features)``.

        Raises:
            ValueError: Where the input has another shape than at construction, or a mask and
                the encoder was built without one.
        """
        value, present, mask = self._arranged(item, shift.dtype)
        if self.kind != "set":
            shift, scale = shift.reshape(self.shape), scale.reshape(self.shape)
        value = (value - shift) / scale
        if present is not None:
            value = torch.where(present, value, value.new_zeros(()))
        depth = 2 if self.kind == "set" else 1
        if mask is None:
            return value.flatten(1)
        return torch.cat([value.flatten(depth), mask.to(value).flatten(depth)], -1).flatten(1)

    def _arranged(
        self, item: Input, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Value and presence ``(B, *shape)``, and the mask as it stands behind the value."""
        if item.mask is not None and self.mask_shape is None:
            raise ValueError(
                f"Observed site {item.name!r} is masked in this call, but the guide was built "
                "from a call without a mask. Build it with the mask (all True where nothing is "
                "missing)."
            )
        value = _arrange(item.value.to(dtype), self.kind, self.num_inner)
        expected = (value.shape[1], self.width) if self.kind == "set" else self.shape
        if value.shape[1:] != expected:
            raise ValueError(
                f"This encoder reads {prod(expected)} features a row, got "
                f"{prod(value.shape[1:])} of {item.name!r}. Pass data of the shape that built "
                "the guide, or inputs= that maps it to that shape."
            )
        if self.mask_shape is None:
            return value, None, None
        elements = value.shape[1:2] if self.kind == "set" else ()
        shape = (value.shape[0], *elements, *self.mask_shape)
        if item.mask is None:
            return value, None, torch.ones(shape, dtype=torch.bool, device=value.device)
        present = _arrange(item.mask.expand_as(item.value), self.kind, self.num_inner)
        mask = _arrange(item.mask, self.kind, self.num_inner)
        try:
            mask = mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"The mask of observed site {item.name!r} has shape {tuple(mask.shape[1:])} a "
                f"row, but the guide was built with {shape[1:]}. Pass a mask of that shape."
            ) from None
        return value, present, mask


def standardization(value: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Center of every feature, and one scale for all: rare features must not be blown up.

    Args:
        value: Rows of features ``(N, F)``.
        present: Which of them count ``(N, F)``; None for all, of at least one row.

    Returns:
        Shift and scale, ``(F,)`` each.
    """
    if present is None:
        shift = value.mean(0)
        variance = (value - shift).square().mean()
    else:
        zero = value.new_zeros(())
        shift = torch.where(present, value, zero).sum(0) / present.sum(0).clamp(min=1)
        deviations = torch.where(present, value - shift, zero)
        variance = deviations.square().sum() / present.sum().clamp(min=1)
    return shift, unit(variance, shift).expand(len(shift))


def unit(variance: Tensor, shift: Tensor) -> Tensor:
    """The scale that features are divided by ``()``, one where they are constant up to rounding.

    Args:
        variance: Their mean squared deviation from ``shift``, ``()``.
        shift: Their centers.
    """
    scale = variance.sqrt()
    rounding = 4 * torch.finfo(scale.dtype).eps * shift.abs().amax()
    return torch.where(scale > rounding, scale, torch.ones_like(scale))


def describe(
    inputs: Sequence[Input], layout: Layout, choice: str | Mapping[str, str] = "auto"
) -> tuple[Source, ...]:
    """The sources of an encoder, from the inputs of the call that builds it.

    Args:
        inputs: The inputs.
        layout: The layout of that call.
        choice: One of ``KINDS`` to force it on every input that allows it, or a mapping from
            names of inputs to kinds; ``"auto"`` decides by shape: a plate of alike elements in a
            row is a set, ``(C, H, W)`` or ``(H, W)`` of at least 8 x 8 is an image, anything else
            is one vector a row.

    Raises:
        ValueError: For an unknown choice, or one that no input allows.
    """
    names = [item.name for item in inputs]
    chosen = dict.fromkeys(names, choice) if isinstance(choice, str) else dict(choice)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(
            f"features= names {unknown[0]!r}, which the encoder does not read. Its inputs: "
            f"{', '.join(names)}."
        )
    kinds = []
    for item in inputs:
        wanted = chosen.get(item.name, "auto")
        if wanted not in ("auto", *KINDS):
            raise ValueError(
                f"features must be one of auto, {', '.join(KINDS)}, got {wanted!r}. "
                f"{did_you_mean(wanted, KINDS)}It says how the encoder reads its inputs."
            )
        kinds.append(_kind(item, layout, wanted))
    forced = [kind for kind in dict.fromkeys(chosen.values()) if kind != "auto"]
    missed = [kind for kind in forced if kind not in kinds]
    if missed:
        shapes = ", ".join(f"{item.name!r} {tuple(item.value.shape[1:])}" for item in inputs)
        needed = {
            "image": "an input of shape (C, H, W) or (H, W) a row",
            "set": "an input with elements in a row: a further plate, or shape (M, D)",
        }
        raise ValueError(
            f"features={missed[0]!r} needs {needed[missed[0]]}; the inputs have {shapes}. Pass "
            'inputs= that give this shape, or features="auto".'
        )
    return tuple(_source(item, kind) for item, kind in zip(inputs, kinds, strict=True))


def _kind(item: Input, layout: Layout, choice: str) -> str:
    shape = item.value.shape[1:]
    num_event = len(shape) - item.num_inner
    if choice == "set":
        return "set" if item.num_inner or len(shape) > 1 else "vector"
    if choice == "image":
        return "image" if len(shape) in (2, 3) else "vector"
    if choice == "vector":
        return "vector"
    if alike(item, layout):
        return "set"
    # A plate of vectors is no image, however long both are.
    large = len(shape) in (2, 3) and num_event != 1 and min(shape[-2:]) >= _SMALLEST_IMAGE
    return "image" if large else "vector"


def _source(item: Input, kind: str) -> Source:
    num_inner = max(item.num_inner, 1) if kind == "set" else 0
    shape = tuple(_arrange(item.value, kind, num_inner).shape[1:])
    mask_shape: tuple[int, ...] | None = None
    if item.mask is not None:
        mask_shape = tuple(_arrange(item.mask, kind, num_inner).shape[1:])
        mask_shape = mask_shape[1:] if kind == "set" else mask_shape
    return Source(item.name, kind, shape, mask_shape, num_inner)


def _arrange(value: Tensor, kind: str, num_inner: int) -> Tensor:
    """``(B, D)``, ``(B, C, H, W)`` or ``(B, M, D)``."""
    if kind == "vector":
        return value.flatten(1)
    if kind == "image":
        return value.unsqueeze(1) if value.dim() == 3 else value
    value = value.flatten(1, num_inner)
    return value.unsqueeze(-1) if value.dim() == 2 else value.flatten(2)

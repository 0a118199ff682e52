"""Encoder: direct amortization, a network from a datum to the parameters of its q."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guides.arguments import check_widths
from guides.encoders import Input, body, describe, read_inputs
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group

__all__ = ["Encoder"]


class Encoder(Scheme):
    """A network shared by all rows.

        lam_n = init + W h(standardize(x_n))

    Inputs are the observed values in the data plate; ``inputs=`` replaces them. They are centered
    by feature and scaled by input with statistics of the data that built the guide (kept as
    buffers), so that counts in the thousands and pixels alike arrive near unit scale. Entries
    that a mask hides become zero, which is the mean, and the mask itself is read too.

    The network h follows from the shape of a row (:mod:`guides.encoders`): a perceptron for
    vectors, convolutions for images, deep sets for a plate of alike elements in every row;
    several inputs are read side by side.

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        inputs: What the network reads: a callable ``(*args, **kwargs) -> (B, ...)``, or names of
            the model's arguments whose first axis is the rows. By default the observed values.
        encoder: A module ``(B, F) -> (B, P)`` that replaces the network. It gets the flat,
            standardized inputs (begin with ``nn.Unflatten(1, shape)`` for images), and its
            output is used as the parameters themselves.
        hidden: Widths of the hidden layers.
        features: How a row is read: ``"auto"``, ``"vector"``, ``"image"`` or ``"set"``; or a
            mapping from inputs to these.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114

    Raises:
        ValueError: For inputs that the call lacks, a choice of ``features`` that they do not
            allow, or an ``encoder`` whose output has another shape.
    """

    amortized = True
    shift: Tensor
    scale: Tensor
    init: Tensor
    network: nn.Module

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        features: str | Mapping[str, str] = "auto",
    ) -> None:
        super().__init__()
        if isinstance(inputs, str):
            inputs = (inputs,)
        self.inputs = inputs if inputs is None or callable(inputs) else tuple(inputs)
        found = read_inputs(self.inputs, call)
        self.sources = describe(found, call.layout, features)
        with torch.no_grad():
            pairs = [s.statistics(i, init.dtype) for s, i in zip(self.sources, found, strict=True)]
            self.register_buffer("shift", torch.cat([shift for shift, _ in pairs]))
            self.register_buffer("scale", torch.cat([scale for _, scale in pairs]))
            standardized = self._standardized(found)
        self.features = standardized.shape[1]
        self.register_buffer("init", init.clone())
        self.custom = encoder is not None
        if encoder is not None:
            if features != "auto":
                raise ValueError(
                    "encoder= replaces the network that features= would choose. Pass one of them."
                )
            self._check(encoder, standardized, init)
            self.network = encoder
        else:
            layers, width = body(self.sources, check_widths("hidden", hidden), init)
            self.network = nn.Sequential(*layers, _head(width, init))

    def forward(self, group: Group, call: Call) -> Tensor:
        """Parameters ``(B, P)``.

        Raises:
            ValueError: Where the inputs are missing or have another shape than at construction.
        """
        lam = self.network(self.features_of(group, call))
        return lam if self.custom else self.init + lam

    def features_of(self, group: Group, call: Call) -> Tensor:
        """The standardized inputs and their masks, one flat vector a row ``(B, F)``.

        F is fixed unless a row holds a set, whose number of elements may change between calls.
        """
        return self._standardized(read_inputs(self.inputs, call))

    def hidden_of(self, group: Group, call: Call) -> Tensor:
        """What the last hidden layer says, ``(B, H)``: the features before the linear head.

        Raises:
            ValueError: Where ``encoder=`` replaced the network, which may have no such layer.
        """
        if self.custom or not isinstance(self.network, nn.Sequential):
            raise ValueError(
                "An encoder= of your own maps inputs to parameters at once; there is no hidden "
                "layer to read. Leave encoder= out, and choose the network by hidden=, features=."
            )
        hidden: Tensor = self.features_of(group, call)
        for layer in list(self.network)[:-1]:
            hidden = layer(hidden)
        return hidden

    def _standardized(self, inputs: list[Input]) -> Tensor:
        if [item.name for item in inputs] != [source.name for source in self.sources]:
            raise ValueError(
                f"This encoder reads {', '.join(s.name for s in self.sources)}, but this call "
                f"observes {', '.join(item.name for item in inputs)}. Call with the data that "
                "built the guide."
            )
        widths = [source.width for source in self.sources]
        parts = zip(
            self.sources, inputs, self.shift.split(widths), self.scale.split(widths), strict=True
        )
        return torch.cat([s.features(item, shift, scale) for s, item, shift, scale in parts], -1)

    def _check(self, encoder: Any, inputs: Tensor, init: Tensor) -> None:
        if not isinstance(encoder, nn.Module):
            kind = "the class " if isinstance(encoder, type) else "a "
            name = encoder.__name__ if isinstance(encoder, type) else type(encoder).__name__
            raise TypeError(
                "encoder must be a torch.nn.Module, whose parameters the guide can own; got "
                f"{kind}{name}. For a perceptron of other widths pass hidden=."
            )
        needed = (
            f"encoder must map (B, {inputs.shape[1]}) to (B, {init.shape[0]}): the flat, "
            f"standardized inputs of a row, as {inputs.dtype}, to the parameters of the family."
        )
        try:
            with torch.no_grad():
                lam = encoder(inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            line = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{needed} On inputs of shape {tuple(inputs.shape)} it raised "
                f"{type(error).__name__}: {line}. For images begin with nn.Unflatten(1, shape)."
            ) from error
        if not isinstance(lam, Tensor):
            raise TypeError(f"{needed} Got a {type(lam).__name__} in place of a tensor.")
        if lam.shape != (inputs.shape[0], init.shape[0]):
            raise ValueError(f"{needed} Got {tuple(lam.shape)} for B={inputs.shape[0]}.")

    def extra_repr(self) -> str:
        """What the network reads."""
        masked = " with mask"
        return ", ".join(
            f"{s.name}: {s.kind} {s.shape}{masked if s.mask_shape is not None else ''}"
            for s in self.sources
        )


def _head(width: int, init: Tensor) -> nn.Linear:
    head = nn.Linear(width, init.shape[0], dtype=init.dtype, device=init.device)
    with torch.no_grad():
        # A small last layer starts every datum near `init`, whatever its inputs.
        head.weight.mul_(0.1)
        head.bias.zero_()
    return head

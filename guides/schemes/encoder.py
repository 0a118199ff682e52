"""Encoder: direct amortization, a network from a datum to the parameters of its q."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guides.rows import bind
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group

__all__ = ["Encoder"]


class Encoder(Scheme):
    """A network shared by all rows.

        lam_n = init + W h(standardize(x_n))        h: a multilayer perceptron

    Inputs are the observed values in the data plate, one flat vector a row; ``inputs=`` replaces
    them. They are centered by feature and scaled by input site with statistics of the data that
    built the guide (kept as buffers), so that counts in the thousands and pixels alike arrive
    near unit scale.

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        inputs: What the network reads: a callable ``(*args, **kwargs) -> (B, F)``, or names of
            the model's arguments whose first axis is the rows. By default the observed values.
        encoder: A module ``(B, F) -> (B, P)`` that replaces the network; its output is used as
            the parameters themselves.
        hidden: Widths of the hidden layers.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2014)
        | https://arxiv.org/abs/1312.6114
    """

    amortized = True

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        if isinstance(inputs, str):
            inputs = (inputs,)
        self.inputs = inputs if inputs is None or callable(inputs) else tuple(inputs)
        self.dtype = init.dtype
        parts = self._parts(group, call)
        features = [part.shape[1] for part in parts]
        self.features = sum(features)
        with torch.no_grad():
            self.register_buffer("shift", torch.cat([part.mean(0) for part in parts]))
            self.register_buffer("scale", torch.cat([_scale(part) for part in parts]))
        self.register_buffer("init", init.clone())
        self.custom = encoder is not None
        if encoder is not None:
            self._check(encoder, parts, init)
            self.network = encoder
        else:
            self.network = _perceptron(self.features, tuple(hidden), init)

    def forward(self, group: Group, call: Call) -> Tensor:
        """Parameters ``(B, P)``.

        Raises:
            ValueError: Where the inputs are missing or have another length than at construction.
        """
        inputs = torch.cat(self._parts(group, call), -1)
        if inputs.shape[1] != self.features:
            raise ValueError(
                f"This encoder reads {self.features} features a row, got {inputs.shape[1]}. Pass "
                "data of the shape that built the guide, or inputs= that maps it to that shape."
            )
        lam = self.network((inputs - self.shift) / self.scale)
        return lam if self.custom else self.init + lam

    def _parts(self, group: Group, call: Call) -> list[Tensor]:
        """The inputs, one ``(B, F)`` tensor a source."""
        num_rows = call.layout.num_rows
        if callable(self.inputs):
            sources = {"inputs": self.inputs(*call.args, **call.kwargs)}
        elif self.inputs is not None:
            sources = _arguments(self.inputs, call)
        else:
            sources = {
                name: site.rows()
                for name, site in call.layout.observed.items()
                if site.row_dim is not None
            }
            if not sources:
                raise ValueError(
                    "An amortized guide reads the observed values in the data plate, and there "
                    "are none in this call. Call with data, or pass inputs= (a callable of the "
                    "model's arguments, or names of them)."
                )
        parts = []
        for name, value in sources.items():
            if value is None or value.dim() == 0 or value.shape[0] != num_rows:
                shape = None if value is None else tuple(value.shape)
                raise ValueError(
                    f"Encoder input {name!r} must have one row per datum ({num_rows}), got shape "
                    f"{shape}."
                )
            parts.append(value.reshape(num_rows, -1).to(self.dtype))
        return parts

    def _check(self, encoder: nn.Module, parts: list[Tensor], init: Tensor) -> None:
        inputs = torch.cat(parts, -1)
        with torch.no_grad():
            lam = encoder((inputs - self.shift) / self.scale)
        if lam.shape != (inputs.shape[0], init.shape[0]):
            raise ValueError(
                f"encoder must map (B, {inputs.shape[1]}) to (B, {init.shape[0]}): the parameters "
                f"of the family. Got {tuple(lam.shape)} for B={inputs.shape[0]}."
            )


def _arguments(names: tuple[str, ...], call: Call) -> dict[str, Any]:
    bound = bind(call.model, call.args, call.kwargs)
    missing = [name for name in names if name not in bound]
    if missing:
        raise ValueError(
            f"inputs= names arguments that the call does not have: {', '.join(missing)}. "
            f"Arguments of the call: {', '.join(bound) or 'none'}."
        )
    return {name: torch.as_tensor(bound[name]) for name in names}


def _scale(part: Tensor) -> Tensor:
    """One scale for all features of an input: rare pixels must not be blown up."""
    variance = (part - part.mean(0)).square().mean()
    scale = torch.where(variance > 0, variance.sqrt(), torch.ones_like(variance))
    return scale.expand(part.shape[1])


def _perceptron(features: int, hidden: tuple[int, ...], init: Tensor) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = features
    options = {"dtype": init.dtype, "device": init.device}
    for size in hidden:
        layers += [nn.Linear(width, size, **options), nn.SiLU()]
        width = size
    last = nn.Linear(width, init.shape[0], **options)
    with torch.no_grad():
        # A small last layer starts every datum near `init`, whatever its inputs.
        last.weight.mul_(0.1)
        last.bias.zero_()
    return nn.Sequential(*layers, last)

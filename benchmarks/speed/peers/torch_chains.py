"""The steps of PCX and FabricPC on their own tasks, in hand-written eager torch.

Both relax latents between layers by gradient descent on an energy, all latents at once, and then
take one AdamW step of the weights on the mean energy at the last latents. Their exact steps stand
in ``scripts/pcx_peer.py`` and ``scripts/fabricpc_peer.py``; those programs and these compute the
same loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ADAM", "FabricClassifier", "PCXDecoder", "linear", "weights_of"]

ADAM: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "loop": {},
}
"""Implementations of torch's Adam."""

Tensors = dict[str, Tensor]


def linear(x: Tensor, weights: Tensors, name: str) -> Tensor:
    """A linear layer.

    Args:
        x: Its input ``(..., inputs)``.
        weights: All weights by name.
        name: Its name, to which ``.weight`` and ``.bias`` are added.
    """
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def weights_of(given: Tensors, prefixes: tuple[str, ...]) -> Tensors:
    """Copies of the arrays whose names begin so, to be trained.

    Args:
        given: Arrays by name.
        prefixes: Beginnings of names.
    """
    return {
        name: value.clone().requires_grad_()
        for name, value in given.items()
        if name.startswith(prefixes)
    }


class _Chain:
    """What the two share: a relaxation, and a step of AdamW at its end."""

    optim: torch.optim.Optimizer

    def __init__(self, given: Tensors) -> None:
        self.x = given["x"]
        self.weights = weights_of(given, ("layers.",))

    def relaxed(self) -> list[Tensor]:
        """The latents after all iterations."""
        raise NotImplementedError(f"{type(self).__name__} does not relax.")

    def energy(self, z: list[Tensor], weights: Tensors) -> Tensor:
        """The energy of all rows."""
        raise NotImplementedError(f"{type(self).__name__} has no energy.")

    def frozen(self) -> Tensors:
        """The weights, without gradients."""
        return {name: weight.detach() for name, weight in self.weights.items()}

    def check(self) -> float:
        """Mean energy of a row at the last latents."""
        return self.energy(self.relaxed(), self.frozen()).item() / len(self.x)

    def prepare(self, num_steps: int) -> None:
        """Nothing: eager torch compiles nothing."""

    def advance(self, num_steps: int) -> float:
        """Make steps and return the last one's loss."""
        loss = self.x
        for _ in range(num_steps):
            loss = self.energy(self.relaxed(), self.weights) / len(self.x)
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
        return loss.item()


class PCXDecoder(_Chain):
    """The steps of ``scripts/pcx_peer.py``."""

    def __init__(self, given: Tensors, options: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.momentum = float(options["momentum"])
        self.optim = torch.optim.AdamW(
            self.weights.values(),
            lr=3.401383559476183e-4,
            weight_decay=1.2514685116492747e-05,
            **ADAM[options["adam"]],
        )

    def energy(self, z: list[Tensor], weights: Tensors) -> Tensor:
        """Half the squared errors, or the cross-entropy of classes."""
        first = z[1] - F.hardtanh(linear(z[0], weights, "layers.0"))
        second = z[2] - F.hardtanh(linear(z[1], weights, "layers.1"))
        third = self.x - linear(z[2], weights, "layers.2")
        return 0.5 * (first.square().sum() + second.square().sum() + third.square().sum())

    def relaxed(self) -> list[Tensor]:
        """The latents after 20 iterations."""
        weights = self.frozen()
        z = [self.x.new_zeros(len(self.x), size) for size in (64, 128, 128)]
        momentum = [torch.zeros_like(value) for value in z]
        for _ in range(20):
            z = [value.requires_grad_() for value in z]
            grads = torch.autograd.grad(self.energy(z, weights), z)
            for trace, grad in zip(momentum, grads, strict=True):
                trace.mul_(self.momentum).add_(grad)
            z = [
                v.detach().sub_(trace, alpha=0.019849750737164974)
                for v, trace in zip(z, momentum, strict=True)
            ]
        return z


class FabricClassifier(_Chain):
    """The steps of ``scripts/fabricpc_peer.py``."""

    def __init__(self, given: Tensors, options: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.labels = F.one_hot(given["labels"], 10).to(self.x)
        self.optim = torch.optim.AdamW(
            self.weights.values(),
            lr=0.001,
            weight_decay=0.1,
            **ADAM[options["adam"]],
        )

    def energy(self, z: list[Tensor], weights: Tensors) -> Tensor:
        """Half the squared errors, or the cross-entropy of classes."""
        first = z[0] - torch.sigmoid(linear(self.x, weights, "layers.0"))
        second = z[1] - torch.sigmoid(linear(z[0], weights, "layers.1"))
        output = torch.softmax(linear(z[1], weights, "layers.2"), -1)
        cross = -(self.labels * output.clamp(1e-7, 1.0).log()).sum()
        return 0.5 * (first.square().sum() + second.square().sum()) + cross

    def relaxed(self) -> list[Tensor]:
        """The latents after 20 iterations."""
        weights = self.frozen()
        first = torch.sigmoid(linear(self.x, weights, "layers.0"))
        z = [first, torch.sigmoid(linear(first, weights, "layers.1"))]
        for _ in range(20):
            z = [value.requires_grad_() for value in z]
            grads = torch.autograd.grad(self.energy(z, weights), z)
            z = [v.detach().sub_(grad, alpha=0.05) for v, grad in zip(z, grads, strict=True)]
        return z

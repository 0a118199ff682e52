"""Networks between variables: plain multilayer perceptrons, smooth by default."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

__all__ = ["inverse_softplus", "mlp"]


def mlp(
    in_features: int, hidden: Sequence[int], activation: Callable[[], nn.Module] = nn.SiLU
) -> tuple[nn.Module, int]:
    """A multilayer perceptron without an output layer.

    The activation is SiLU by default because posteriors are read off exact Hessians of the log
    joint (Laplace): a ReLU network has zero curvature almost everywhere and kinks elsewhere, so
    its Hessian misses what the network does.

    Args:
        in_features: Size of the input.
        hidden: Sizes of the hidden layers; none makes the network the identity.
        activation: A constructor without arguments.

    Returns:
        The network ``(..., in_features) -> (..., out)`` and its output size.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> network, size = mlp(3, (16, 8))
        >>> size
        8
    """
    wrong = [size for size in (in_features, *hidden) if size < 1]
    if wrong:
        raise ValueError(f"Layer sizes must be at least 1, got {wrong[0]} in {tuple(hidden)}.")
    sizes = (in_features, *hidden)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers), sizes[-1]


def inverse_softplus(value: Tensor) -> Tensor:
    """The raw numbers whose softplus is ``value``, elementwise: where scales start.

    Args:
        value: Positive numbers.

    Example:
        >>> import torch
        >>> torch.nn.functional.softplus(inverse_softplus(torch.tensor([0.5, 2.0])))
        tensor([0.5000, 2.0000])
    """
    return value.expm1().log()

"""What a flow starts from: standard Gaussian noise, or any other family."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from guides.families import FAMILIES
from guides.families.family import Family, standard_normal_log_prob

__all__ = ["Base", "StandardNormal", "base_family"]

Base = None | str | Callable[[int], Family]
"""What the option ``base=`` of a flow takes."""


class StandardNormal(Family):
    """Standard Gaussian noise: the base of a flow that names no other. It has no parameters.

        q(e) = Normal(e; 0, I)

    Args:
        size: Length K of the packed latents.

    Example:
        >>> e, log_q = StandardNormal(3).rsample_and_log_prob(torch.zeros(5, 0))
        >>> e.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    @property
    def num_params(self) -> int:
        """Zero."""
        return 0

    def init(self, loc: Tensor) -> Tensor:
        """No parameters, ``(..., 0)``."""
        return loc[..., :0]

    def location(self, lam: Tensor) -> Tensor:
        """Zero."""
        return lam.new_zeros(*lam.shape[:-1], self.size)

    def moved(self, lam: Tensor, loc: Tensor) -> Tensor:
        """Refused: it lies at zero.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("StandardNormal has no location to move: use Normal.")

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The noise itself."""
        noise = noise.expand(torch.broadcast_shapes(noise.shape, (*lam.shape[:-1], 1)))
        return noise, standard_normal_log_prob(noise)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        return standard_normal_log_prob(value)

    def entropy(self, lam: Tensor) -> Tensor:
        """K times that of one coordinate."""
        one = 0.5 * math.log(2 * math.pi * math.e)
        return lam.new_full(lam.shape[:-1], self.size * one)


def base_family(base: Base, size: int) -> Family:
    """The family that the option ``base=`` of a flow names.

    Args:
        base: None for standard Gaussian noise; a key of ``FAMILIES``, started at standard
            deviation one; or a callable from a size to a family.
        size: Length K of the packed latents.

    Raises:
        ValueError: For an unknown name, a family without a density, or one of another size.
        TypeError: If the callable returns no family.
    """
    if base is None:
        return StandardNormal(size)
    if isinstance(base, str):
        if base not in FAMILIES:
            raise ValueError(
                f"base must name a family, got {base!r}. Families: {', '.join(FAMILIES)}."
            )
        module, _, attribute = FAMILIES[base].partition(":")
        make = getattr(importlib.import_module(module), attribute)
        family = make(size) if not make.has_density else make(size, init_scale=1.0)
    else:
        family = base(size)
        if not isinstance(family, Family):
            raise TypeError(
                "base must be None, the name of a family or a callable from a size to a family; "
                f"this one returned {type(family).__name__}."
            )
    if not family.has_density:
        raise ValueError(
            f"The base of a flow needs a density, and {type(family).__name__} has none. Use "
            "base=None for standard Gaussian noise."
        )
    if family.size != size:
        raise ValueError(
            f"The base of a flow has the flow's size {size}, got {family.size}. Pass a callable "
            "that takes the size, for example base=StudentT."
        )
    return family

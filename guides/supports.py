"""Supports of latent sites: what can be mapped to unconstrained space, and what moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

__all__ = ["check_support", "feasible", "is_real", "support_numbers", "unwrap"]


def unwrap(fn: Any) -> Any:
    """The innermost distribution under ``Independent``, ``expand`` and ``mask`` wrappers."""
    wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
    while type(fn).__name__ in wrappers:
        fn = fn.base_dist
    return fn


def check_support(name: str, fn: Any) -> None:
    """Raise where a latent site is discrete or states no support.

    Args:
        name: Name of the site.
        fn: Its distribution.
    """
    family = type(unwrap(fn)).__name__
    try:
        discrete = fn.support.is_discrete
    except NotImplementedError:
        raise NotImplementedError(
            f"Latent site {name!r} ({family}) states no support, so it cannot be mapped to "
            "unconstrained space. Give its distribution a `support`."
        ) from None
    if discrete:
        raise NotImplementedError(
            f"Guides and predictive coding need continuous latents, but site {name!r} is "
            f"discrete ({family}). Marginalize it in the model (a mixture distribution, or a sum "
            "over its values in pyro.factor), relax it (RelaxedOneHotCategorical), or fit with "
            "TraceEnum_ELBO and config_enumerate."
        )


def feasible(name: str, fn: Any, offset: float) -> Tensor:
    """A point inside the support that needs no sampling (improper priors have no sampler)."""
    shape = fn.batch_shape + fn.event_shape
    like = _example(fn)
    if is_real(fn.support):
        return torch.full(shape, offset, dtype=like.dtype, device=like.device)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"Latent site {name!r} has support {fn.support}, for which no bijection from "
            "unconstrained space is registered with torch's biject_to. Register one, or sample "
            "an unconstrained variable and transform it with pyro.deterministic."
        ) from None
    unconstrained = torch.full(
        transform.inverse_shape(shape), offset, dtype=like.dtype, device=like.device
    )
    return transform(unconstrained)


def _example(fn: Any) -> Tensor:
    """A floating point parameter of the distribution, for dtype and device."""
    base = unwrap(fn)
    for name in (*getattr(base, "arg_constraints", {}), "base_dist"):
        value = getattr(base, name, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if name == "base_dist" and value is not None and value is not base:
            return _example(value)
    return torch.zeros(())


def is_real(support: Any) -> bool:
    """Whether the map from unconstrained space is the identity."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def support_numbers(support: Any) -> list[Tensor]:
    """Every number by which a constraint is parameterized."""
    numbers = []
    for value in vars(support).values():
        if isinstance(value, Tensor):
            numbers.append(value)
        elif isinstance(value, (int, float)):
            numbers.append(torch.as_tensor(float(value)))
        elif isinstance(value, constraints.Constraint):
            numbers += support_numbers(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                numbers += (
                    support_numbers(item) if isinstance(item, constraints.Constraint) else []
                )
    return numbers

"""Supports of latent sites: what can be mapped to unconstrained space, and what moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from guides.capturing import is_capturing
from guides.ripple import ripple

__all__ = [
    "check_data",
    "check_support",
    "feasible",
    "is_masked",
    "is_real",
    "support_numbers",
    "unwrap",
]


def unwrap(fn: Any) -> Any:
    """The innermost distribution under ``Independent``, ``expand`` and ``mask`` wrappers."""
    wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
    while type(fn).__name__ in wrappers:
        fn = fn.base_dist
    return fn


def is_masked(fn: Any) -> bool:
    """Whether there is a ``mask`` among the wrappers that :func:`unwrap` takes off."""
    base = unwrap(fn)
    while fn is not base:
        if type(fn).__name__ == "MaskedDistribution":
            return True
        fn = fn.base_dist
    return False


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
            f"discrete ({family}). Sum it out exactly: guides.enumeration.enumerated(model) is a "
            "program without it; or marginalize it in the model (a mixture distribution), or "
            "relax it (RelaxedOneHotCategorical)."
        )


def feasible(name: str, fn: Any, offset: float) -> Tensor:
    """A point inside the support that needs no sampling (improper priors have no sampler).

    The point is irregular: at exact zeros a legal program may divide by zero or take a logarithm.
    """
    shape = torch.Size(fn.batch_shape + fn.event_shape)
    like = _example(fn)

    def around(shape: torch.Size) -> Tensor:
        return offset + 0.1 * ripple(like.new_empty(shape))

    if is_real(fn.support):
        return around(shape)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"Latent site {name!r} has support {fn.support}, for which no bijection from "
            "unconstrained space is registered with torch's biject_to. Register one, or sample "
            "an unconstrained variable and transform it with pyro.deterministic."
        ) from None
    return transform(around(torch.Size(transform.inverse_shape(shape))))


def check_data(name: str, fn: Any, value: Any, mask: Any) -> None:
    """Raise where observed values lie outside the support of their distribution.

    Distributions that were built without validation are not checked, nor is what a mask hides.
    A dtype that the distribution cannot score is refused in any case.

    Args:
        name: Name of the site.
        fn: Its distribution.
        value: The observed value.
        mask: The mask of the site.
    """
    base = unwrap(fn)
    if isinstance(value, Tensor) and not value.is_floating_point() and _needs_floats(base):
        raise TypeError(
            f"Observed site {name!r} holds values of {value.dtype}, and {type(base).__name__} "
            "scores floating point values only: pass x.to(torch.get_default_dtype())."
        )
    if not getattr(base, "_validate_args", False) or not isinstance(value, Tensor):
        return
    if is_capturing():
        return
    mask = getattr(fn, "_mask", None) if mask is None else mask
    if mask is False or isinstance(mask, Tensor):
        return
    try:
        inside = fn.support.check(value)
    except (NotImplementedError, RuntimeError):
        return
    if not bool(inside.all()) and not (value.is_floating_point() and bool(value.isnan().any())):
        raise ValueError(
            f"Observed site {name!r} has values outside the support {fn.support} of its "
            f"distribution ({type(base).__name__}). Pass data of that support."
        )


def _needs_floats(base: Any) -> bool:
    """Distributions whose density is torch's binary cross entropy, which takes no integers."""
    return isinstance(
        base, (torch.distributions.Bernoulli, torch.distributions.ContinuousBernoulli)
    )


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

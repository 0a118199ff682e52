"""Location-scale sites: the affine map behind non-centered variables, and their errors.

A location-scale distribution is the law of

    z = loc + scale * e        e ~ base        (MultivariateNormal: z = loc + scale_tril @ e)

Non-centered relaxation moves ``e`` instead of ``z``. The error of such a site is d log p / d loc,
the precision-weighted prediction error of predictive coding: ``(z - loc) / scale**2`` for a
Normal.

Pyro's ``LocScaleReparam`` raises on most of these families and is silently wrong on LogNormal,
which is no location-scale family, so the map is our own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guides.supports import unwrap

__all__ = ["error", "inverse", "is_location_scale", "location", "shift"]

_WITHOUT_MEAN = ("Categorical", "HalfCauchy")
_ELEMENTWISE = ("Normal", "Laplace", "Cauchy", "StudentT")


def is_location_scale(fn: Any) -> bool:
    """Whether the affine map exists for this distribution."""
    return type(unwrap(fn)).__name__ in (*_ELEMENTWISE, "MultivariateNormal")


def location(fn: Any) -> Tensor:
    """The location, expanded to the shape of a value."""
    return unwrap(fn).loc.expand(fn.batch_shape + fn.event_shape)


def shift(fn: Any, e: Tensor) -> Tensor:
    """The value ``loc + scale * e`` for a standardized ``e`` of the value's shape."""
    base = unwrap(fn)
    if type(base).__name__ == "MultivariateNormal":
        return base.loc + (base.scale_tril @ e.unsqueeze(-1)).squeeze(-1)
    return base.loc + base.scale * e


def inverse(fn: Any, value: Tensor) -> Tensor:
    """The standardized ``e`` of a value, inverse of :func:`shift`."""
    base = unwrap(fn)
    centered = value - base.loc
    if type(base).__name__ == "MultivariateNormal":
        tril = base.scale_tril.expand(*centered.shape, -1)
        return torch.linalg.solve_triangular(tril, centered.unsqueeze(-1), upper=False).squeeze(-1)
    return centered / base.scale


def error(fn: Any, value: Tensor) -> tuple[Tensor, str]:
    """Prediction error of a site and the formula it follows.

    Args:
        fn: The distribution of the site.
        value: Its value.

    Returns:
        The error, shaped as the value, and its label: ``"d log p / d loc"`` for location-scale
        families, ``"(value - mean) / variance"`` otherwise.

    Raises:
        NotImplementedError: Where the family has neither location nor mean and variance.
    """
    base = unwrap(fn)
    family = type(base).__name__
    if family in _WITHOUT_MEAN:
        raise NotImplementedError(
            f"{family} has no mean and variance, so a site of it has no prediction error. Leave "
            "errors out, or write categories as OneHotCategorical."
        )
    if not is_location_scale(fn):
        mean, variance = fn.mean, fn.variance
        return (value - mean) / variance, "(value - mean) / variance"
    centered = value - base.loc
    if family == "Normal":
        result = centered / base.scale**2
    elif family == "MultivariateNormal":
        factor = base.scale_tril.expand(*centered.shape, -1)
        result = torch.cholesky_solve(centered.unsqueeze(-1), factor).squeeze(-1)
    elif family == "Laplace":
        result = centered.sign() / base.scale
    elif family == "Cauchy":
        result = 2 * centered / (base.scale**2 + centered**2)
    else:  # StudentT
        result = (base.df + 1) * centered / (base.df * base.scale**2 + centered**2)
    return result, "d log p / d loc"

"""Roots of increasing functions, all coordinates at once, with derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["above_minus_one", "increasing_root"]


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """Solve ``f(x) = target`` for every element.

        60 times (30 in single precision): a Newton step, or a bisection where that
        leaves the bracket or the last step did not halve the one before
        twice: x <- x - (f(x) - target) / f'(x), seen by automatic differentiation

    The safeguarded steps always arrive. Two Newton steps from a constant that is already the
    root move by nothing, and carry the first three derivatives of the implicit function exactly.

    Args:
        function: Elementwise value and slope, strictly increasing.
        target: Values ``(...)``.
        low: Points ``(...)`` with ``f(low) <= target``.
        high: Points ``(...)`` with ``f(high) >= target``.

    Returns:
        The roots ``(...)``.

    References:
        | Numerical Recipes (Press, Teukolsky, Vetterling & Flannery, 2007), section 9.4

    Example:
        >>> y = torch.tensor([-8.0, 0.125])
        >>> root = increasing_root(lambda x: (x**3 + x, 3 * x**2 + 1), y, -y.abs(), y.abs())
        >>> torch.allclose(root**3 + root, y)
        True
    """
    with torch.no_grad():
        x = 0.5 * (low + high)
        last = high - low
        for _ in range(60 if target.dtype == torch.float64 else 30):
            value, slope = function(x)
            error = value - target
            low = torch.where(error < 0, x, low)
            high = torch.where(error > 0, x, high)
            newton = x - error / slope
            inside = (newton >= low) & (newton <= high) & (2 * (newton - x).abs() <= last)
            moved = torch.where(inside, newton, 0.5 * (low + high))
            last = (moved - x).abs()
            x = moved
    x = x.detach()
    for _ in range(2):
        value, slope = function(x)
        x = x - (value - target) / slope
    return x


_SHIFT = math.log(math.e - 1)
_FLOOR = 1e-3


def above_minus_one(raw: Tensor) -> tuple[Tensor, Tensor]:
    """A number above minus one, zero at zero, and one plus it.

        m = (1 - 0.001) (softplus(raw + log(e - 1)) - 1)

    Flows are invertible where an inner product stays above minus one. Zero at zero, where the
    usual ``softplus(raw) - 1`` is -0.31, it lets a flow start at the identity. Near zero it is
    computed without cancellation; one plus it is returned too, because that must not round to
    zero.
    """
    above = _FLOOR + (1 - _FLOOR) * torch.nn.functional.softplus(raw + _SHIFT)
    near = raw.abs() < 0.5
    # Both branches must be finite: where() does not stop the gradient of the other one.
    exact = torch.log1p((1 - 1 / math.e) * torch.expm1(torch.where(near, raw, 0.0)))
    return torch.where(near, (1 - _FLOOR) * exact, above - 1), above

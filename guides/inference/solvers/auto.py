"""``solver="auto"``: a solver and coordinates chosen from the program alone.

In standardized coordinates ``z = loc + scale * e`` the Hessian of a hierarchy is

    H_e = I + J^T J         J: standardized predictions of what is observed, d / d e

so beyond the identity its rank is at most the number of observed values, however deep the
hierarchy: conjugate gradients need no more products than that, and the identity clusters the
rest. In centered coordinates the condition of the Hessian grows with the square of the depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from guides import location_scale
from guides.layout import Layout
from guides.supports import unwrap

__all__ = ["Choice", "choose"]

_KINKED = ("AsymmetricLaplace", "Laplace")


@dataclass(frozen=True)
class Choice:
    """What was chosen and why.

    Args:
        solver: A key of ``guides.inference.solvers.SOLVERS``.
        parameterization: ``"centered"`` or ``"noncentered"``.
        reason: The property of the program that decided.
    """

    solver: str
    parameterization: str
    reason: str


def choose(read: Layout) -> Choice:
    """The solver and the coordinates for a program.

    Args:
        read: Its layout.

    Returns:
        Gradient descent with backtracking where a density has a kink, which no quadratic model
        sees; truncated Newton steps otherwise. They stop by themselves after as many products as
        a row has coordinates, so that small latents get full Newton steps from them, without
        the products that a whole Hessian takes.
    """
    kinked = [n for n, site in read.sites.items() if type(unwrap(site.fn)).__name__ in _KINKED]
    if kinked:
        return Choice("gradient", "centered", f"the density of {kinked[0]!r} has a kink")
    moved = [n for n, site in read.sites.items() if location_scale.is_location_scale(site.fn)]
    if len(moved) == len(read.sites):
        return Choice("truncated_newton", "noncentered", "all latents are location-scale sites")
    if moved:
        centered = next(name for name in read.sites if name not in moved)
        reason = f"smooth densities; {centered!r} is no location-scale site and stays centered"
        return Choice("truncated_newton", "noncentered", reason)
    return Choice("truncated_newton", "centered", "smooth densities without location-scale sites")

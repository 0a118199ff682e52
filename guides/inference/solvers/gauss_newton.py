"""Gauss-Newton as a relaxation: curvature of the distributions, without that of their networks."""

from __future__ import annotations

from typing import ClassVar

from guides.gauss_newton import gauss_newton
from guides.inference.solvers.newton import Newton
from guides.inference.units import EnergyFunction, Point, Units

__all__ = ["GaussNewton"]


class GaussNewton(Newton):
    """``u <- u - t G^-1 dE/du`` with ``G = sum_sites J^T F J``, see :mod:`guides.gauss_newton`.

    The matrix is never indefinite where sites are Gaussian, or observed with a known divergence;
    it equals the Hessian where predictions are linear. Costs and steps are those of
    :class:`~guides.inference.solvers.newton.Newton`.
    """

    uncapturable: ClassVar[str | None] = "Gauss-Newton steps decompose matrices by their values"

    def energy(self, units: Units, point: Point) -> EnergyFunction:
        """The energy whose Hessian at the point is the Gauss-Newton matrix."""
        return gauss_newton(
            units.log_joint,
            units.packed(point.x),
            jacobian=units.jacobian,
            noncentered=units.noncentered,
        )

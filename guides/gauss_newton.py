"""The Gauss-Newton curvature of any program: an energy whose Hessian at one point is it.

    G = sum_sites J^T F J        J: derivative of the site's parameters (and of its value)
                                 F: curvature of its divergence from what it is at the point

Every observed site contributes ``KL(p(. | z_0) || p(. | z))``, whose Hessian at z_0 is the Fisher
information of its parameters pulled back; every Gaussian latent ``0.5 |e(z) - e(z_0)|^2`` with
its standardized value e, a sum of squares whose Hessian is the Gauss-Newton matrix. Other sites,
and divergences that are not known in closed form, keep their exact curvature.

References:
    | New Insights and Perspectives on the Natural Gradient Method (Martens, 2020)
    | https://arxiv.org/abs/1412.1193
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from guides import location_scale
from guides.energy import LogJoint, SiteTerms
from guides.supports import unwrap

__all__ = ["CurvatureTerms", "gauss_newton", "is_gaussian"]

_GAUSSIAN = ("Normal", "MultivariateNormal")


def is_gaussian(fn: Any) -> bool:
    """Whether the standardized value of a site is a residual."""
    return type(unwrap(fn)).__name__ in _GAUSSIAN


class CurvatureTerms(SiteTerms):
    """Site terms whose Hessian at the reference run is the Gauss-Newton curvature."""

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        """Minus what :class:`guides.energy.SiteTerms` has, up to first order: a divergence."""
        name, fn, value = site["name"], site["fn"], site["value"]
        if self.reference is None or name not in self.reference.fns:
            raise ValueError(f"Site {name!r} appeared while the curvature was taken.")
        before = self.reference.fns[name]
        if site["is_observed"] and name not in self.given:
            try:
                return kl_divergence(before, fn)
            except NotImplementedError:
                return -fn.log_prob(value)
        if not is_gaussian(fn):
            return -fn.log_prob(value)
        old = location_scale.inverse(before, self.reference.values[name])
        change = location_scale.inverse(fn, value) - old
        half = 0.5 * change.square()
        return half.flatten(-fn.event_dim).sum(-1) if fn.event_dim else half


def gauss_newton(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    *,
    jacobian: bool,
    noncentered: Collection[str] = (),
) -> Callable[[dict[str, Tensor]], tuple[Tensor, tuple[Tensor, Tensor]]]:
    """The energy whose Hessian at ``packed`` is the Gauss-Newton matrix.

    Args:
        log_joint: The log joint of the call.
        packed: The point, ``{group: (B, K) or (K,)}``.
        jacobian: Whether the energy is that of unconstrained space.
        noncentered: Sites that are moved in standardized coordinates.

    Returns:
        A function as :func:`guides.inference.units.energy_function` gives it.
    """
    with torch.no_grad():
        values, errors, _ = log_joint.unpack(packed, noncentered)
        reference = log_joint.run(values, errors=errors, density=False)

    def energy(point: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        values, errors, log_dets = log_joint.unpack(point, noncentered)
        terms = log_joint.run(values, errors=errors, terms=CurvatureTerms, reference=reference)
        rows, other = terms.total()
        for name, log_det in log_dets.items():
            if not jacobian or is_gaussian(terms.fns[name]):
                continue
            if log_joint.layout.sites[name].row_dim is None:
                other = other - log_det
            else:
                rows = rows - log_det
        return log_joint.total(rows, other), (rows, other)

    return energy

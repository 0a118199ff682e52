"""Families: what shapes q can take. One a file: parameters (..., P) to q over (..., K)."""

from __future__ import annotations

FAMILIES = {
    "delta": "guides.families.delta:Delta",
    "normal": "guides.families.normal:Normal",
    "multivariate_normal": "guides.families.multivariate_normal:MultivariateNormal",
    "spline_coupling": "guides.families.spline_coupling:SplineCoupling",
}

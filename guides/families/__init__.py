"""Families: what shapes q can take. One a file: parameters (..., P) to q over (..., K)."""

from __future__ import annotations

FAMILIES = {
    "delta": "guides.families.delta:Delta",
    "normal": "guides.families.normal:Normal",
    "multivariate_normal": "guides.families.multivariate_normal:MultivariateNormal",
    "low_rank_normal": "guides.families.low_rank_normal:LowRankNormal",
    "student_t": "guides.families.student_t:StudentT",
    "mixture": "guides.families.mixture:Mixture",
    "auxiliary": "guides.families.auxiliary:Auxiliary",
    "lateral_cholesky": "guides.families.lateral_cholesky:LateralCholesky",
    "lateral_symmetric": "guides.families.lateral_symmetric:LateralSymmetric",
    "planar": "guides.families.planar:Planar",
    "radial": "guides.families.radial:Radial",
    "householder": "guides.families.householder:Householder",
    "sylvester": "guides.families.sylvester:Sylvester",
    "iaf": "guides.families.iaf:InverseAutoregressive",
    "affine_coupling": "guides.families.affine_coupling:AffineCoupling",
    "spline_coupling": "guides.families.spline_coupling:SplineCoupling",
    "monotone": "guides.families.monotone:Monotone",
}

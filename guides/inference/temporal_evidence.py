"""The Laplace evidence of one step of a filter, differentiable in the parameters.

    log p(x_t | carried) ~ -E_t(u*) - 1/2 log det L_t + K/2 log 2 pi        L_t = d2E_t / du2

As in :mod:`guides.inference.laplace_corrected`: a Newton step whose value is nothing carries the
derivative of the minimum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.curvature import KinkError, check_kinks
from guides.inference.laplace_guide import IndefiniteHessianError
from guides.inference.temporal_step import StepJoint

__all__ = ["curvature_factor", "laplace_evidence"]

_ENERGY = "evidence=False, which learns from the energy"


def laplace_evidence(joint: StepJoint, u: Tensor) -> Tensor:
    """Log evidence of a step, ``(B,)``, zero in rows without it; needs gradients enabled.

    Args:
        joint: The step.
        u: Its minimum ``(B, K)``.

    Raises:
        IndefiniteHessianError: Where there is no minimum.
        KinkError: Where a density of the step has a kink there.
    """
    point = u.detach()
    size = point.shape[-1]

    def blocks(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, _ = joint.packed({"data": v}, expose_params=True)
        (slope,) = torch.autograd.grad(-rows.sum(), v, create_graph=True)
        columns = [
            torch.autograd.grad(slope[..., k].sum(), v, create_graph=True, materialize_grads=True)
            for k in range(size)
        ]
        return rows, slope, torch.stack([column for (column,) in columns], -1)

    _, slope, curved = blocks(point.clone().requires_grad_())
    # The evidence takes the curvature of the energy itself, whichever Hessian a belief has.
    plain = LogJoint(joint.model, joint.args, joint.kwargs, layout=joint.layout)
    try:
        check_kinks(plain, {"data": point}, {"local": curved.detach()})
    except KinkError as error:
        names = ", ".join(joint.layout.sites)
        raise KinkError(
            f"The Laplace evidence of the step of {names} needs a curvature, and has none: one of "
            "its densities has a kink where the relaxation ended. Pass evidence=False, which "
            "learns from the energy, or give the site a smooth density (StudentT, Normal)."
        ) from error
    curvature_factor(joint, curved.detach(), _ENERGY)
    step = torch.linalg.solve(curved.detach(), slope.unsqueeze(-1)).squeeze(-1)
    rows, _, curved = blocks(point - step)
    log_det = torch.linalg.cholesky(curved).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    rest = 0.5 * size * math.log(2 * math.pi) - log_det
    if joint.on is not None:
        rest = torch.where(joint.on, rest, torch.zeros_like(rest))
    return rows + rest


def curvature_factor(joint: StepJoint, curved: Tensor, way: str) -> Tensor:
    """Cholesky factor of the curvature of a step, ``(B, K, K)``.

    Args:
        joint: The step.
        curved: The curvature of its energy ``(B, K, K)``.
        way: What to do where there is no factor, beside relaxing further.

    Raises:
        IndefiniteHessianError: Where it is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(curved)
    if bool((info != 0).any()) or not bool(torch.isfinite(curved).all()):
        names = ", ".join(joint.layout.sites)
        raise IndefiniteHessianError(
            f"The energy of the step of {names} is not convex where its relaxation ended, in "
            f"{int((info != 0).sum())} of {len(info)} rows: there is no belief to carry. Relax "
            f"further (num_steps), or pass {way}."
        )
    return factor

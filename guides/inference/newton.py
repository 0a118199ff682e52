"""Newton's method to the mode: the last steps of a relaxation, before a Laplace posterior.

    du_n      = H_ll,n^-1 (g_n - H_lg,n du_g)                  S: the Schur complement of the
    du_global = S^-1 (g_global - N/B sum_n H_gl,n H_ll,n^-1 g_n)  global latents
    u         <- u - t du                                      t halved until the energy falls

Gradient relaxation slows down where curvatures differ; Newton steps do not, and near the mode they
double the number of right digits. Where a Hessian is indefinite its eigenvalues, in units of its
diagonal, are replaced by their absolute values, so that every step goes down and leaves saddles.
Neither the steps nor their end depend on the units of the latents: a row is done where a step
promises less energy than rounding hides.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.arrow import Arrow, Cholesky
from guides.inference.curvature import hessian, own_units
from guides.inference.switched_off import decoupled, empty
from guides.inference.units import energy_function

__all__ = ["newton", "newton_direction"]

_HALVINGS = 12


def newton(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    *,
    num_steps: int,
    jacobian: bool = True,
    kind: str = "exact",
) -> tuple[dict[str, Tensor], int]:
    """Take Newton steps down the energy, until they promise no more of it than rounding.

    Args:
        log_joint: The log joint of the call.
        packed: Start, centered and unconstrained, ``{group: (B, K) or (K,)}``.
        num_steps: Number of steps at most.
        jacobian: Whether the energy is that of unconstrained space.
        kind: Which Hessian the steps take: ``"exact"`` or ``"gauss_newton"``.

    Returns:
        The latents, and how many gradients of a row were taken (Hessian products count two).
    """
    energy = energy_function(log_joint, jacobian=jacobian)
    scale = log_joint.layout.scale
    state = {name: value.detach() for name, value in packed.items()}
    joint = "global" in state
    size = sum(value.shape[-1] for value in state.values())
    num_gradients = 0
    with torch.no_grad():
        for _ in range(num_steps):
            blocks = hessian(log_joint, state, jacobian=jacobian, kind=kind)
            grads, (rows, other) = torch.func.grad(energy, has_aux=True)(state)
            num_gradients += 2 * size + 1
            blocks = decoupled(blocks, empty(log_joint.layout, blocks))
            if not all(bool(torch.isfinite(block).all()) for block in blocks.values()):
                break  # there is no step to take; the Laplace posterior says why
            step = newton_direction(grads, blocks, scale)
            before = (scale * rows.sum() + other).reshape(1) if joint else rows
            factor = torch.ones_like(before)
            for _ in range(_HALVINGS):
                trial = {k: v - _unit(factor, v) * step[k] for k, v in state.items()}
                _, (new_rows, new_other) = energy(trial)
                num_gradients += 1
                after = (scale * new_rows.sum() + new_other).reshape(1) if joint else new_rows
                slack = 8 * torch.finfo(before.dtype).eps * (1 + before.abs())
                accepted = (after <= before + slack) & torch.isfinite(after)
                if bool(accepted.all()):
                    break
                factor = torch.where(accepted, factor, 0.5 * factor)
            factor = torch.where(accepted, factor, torch.zeros_like(factor))
            state = {k: v - _unit(factor, v) * step[k] for k, v in state.items()}
            # What a step promises is a number of nats, whatever the units of the latents are.
            promised = {k: grads[k] * step[k] for k in step}
            if joint:
                promise = torch.stack([p.sum() for p in promised.values()]).sum().reshape(1)
            else:
                promise = promised["data"].sum(-1) / scale
            rounding = torch.finfo(before.dtype).eps * (1 + before.abs())
            if bool(((promise <= rounding) | (factor == 0)).all()):
                break
    return state, num_gradients


def newton_direction(
    grads: Mapping[str, Tensor], blocks: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The Newton step by group, from the gradient of the total energy and Hessian blocks.

    Raises:
        ValueError: Where a Hessian is not finite.
    """
    right = {k: v / scale if k == "data" else v for k, v in grads.items()}
    return Arrow(blocks, scale, _Positive).solve(right)


class _Positive(Cholesky):
    """Factors of symmetric matrices, where these are indefinite with eigenvalues made positive."""

    def __init__(self, matrix: Tensor) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                "A Newton step needs a finite Hessian, and that of the energy is not: the latents "
                "ran to the edge of what numbers can hold, or the data are of very different "
                "sizes. Start from a guide (guide=), give latents a proper prior, scale the data "
                'to unit size, or relax by gradients (solver="gradient").'
            )
        symmetric = 0.5 * (matrix + matrix.mT)
        self.factor, info = torch.linalg.cholesky_ex(symmetric)
        # What is left of a coordinate's own curvature has no unit, which eigenvalues have: these
        # cannot tell a coordinate of wide scale from a direction without curvature.
        own = symmetric.diagonal(dim1=-2, dim2=-1)
        left = self.factor.diagonal(dim1=-2, dim2=-1).square()
        sound = (info == 0) & (left > 100 * torch.finfo(own.dtype).eps * own).all(-1)
        if not bool(sound.all()):
            self.factor[~sound] = _absolute(symmetric[~sound])


def _absolute(matrix: Tensor) -> Tensor:
    """Cholesky factors ``(..., K, K)`` of matrices whose eigenvalues lost their sign."""
    info = torch.finfo(matrix.dtype)
    unit = own_units(matrix).unsqueeze(-1)
    values, vectors = torch.linalg.eigh(matrix / unit / unit.mT)
    largest = values.abs().amax(-1, keepdim=True).clamp_min(info.tiny)
    values = torch.maximum(values.abs(), max(1e-6, 100 * info.eps) * largest)
    root = unit * vectors * values.sqrt().unsqueeze(-2)
    # The factor of a product, without forming it.
    upper = torch.linalg.qr(root.mT).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (sign.unsqueeze(-1) * upper).mT


def _unit(factor: Tensor, value: Tensor) -> Tensor:
    return factor.unsqueeze(-1) if value.dim() == 2 else factor

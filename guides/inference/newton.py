"""Newton's method to the mode: the last steps of a relaxation, before a Laplace posterior.

    du_n      = H_ll,n^-1 (g_n - H_lg,n du_g)                  S: the Schur complement of the
    du_global = S^-1 (g_global - N/B sum_n H_gl,n H_ll,n^-1 g_n)  global latents
    u         <- u - t du                                      t halved until the energy falls

Gradient relaxation slows down where curvatures differ; Newton steps do not, and near the mode they
double the number of right digits. Where a Hessian is indefinite its eigenvalues are replaced by
their absolute values, so that every step goes down and leaves saddles.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.arrow import Arrow
from guides.inference.curvature import hessian
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
    """Take Newton steps down the energy, until they no longer move the latents.

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
            moves = {k: _unit(factor, v) * step[k] for k, v in state.items()}
            state = {k: v - moves[k] for k, v in state.items()}
            root = torch.finfo(before.dtype).eps ** 0.5
            if all(bool((m.abs() <= root * (1 + state[k].abs())).all()) for k, m in moves.items()):
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


class _Positive:
    """Symmetric matrices with their eigenvalues made positive."""

    def __init__(self, matrix: Tensor) -> None:
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(
                "A Newton step needs a finite Hessian, and that of the energy is not: the latents "
                "ran to the edge of what numbers can hold, or the data are of very different "
                "sizes. Start from a guide (guide=), give latents a proper prior, scale the data "
                'to unit size, or relax by gradients (solver="gradient").'
            )
        symmetric = 0.5 * (matrix + matrix.mT)
        try:
            values, self.vectors = torch.linalg.eigh(symmetric)
        except torch.linalg.LinAlgError:
            # Entries of far different sizes; a plain gradient step of the largest one's scale.
            size = symmetric.abs().amax((-2, -1)).unsqueeze(-1)
            values = size.expand(matrix.shape[:-1])
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            self.vectors = eye.expand(matrix.shape)
        largest = values.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        self.values = torch.maximum(values.abs(), 1e-6 * largest)

    def solve(self, right: Tensor) -> Tensor:
        """The inverse times columns ``(..., K, R)``."""
        return self.vectors @ ((self.vectors.mT @ right) / self.values.unsqueeze(-1))

    def log_det(self) -> Tensor:
        """The log determinants ``(...)``."""
        return self.values.log().sum(-1)


def _unit(factor: Tensor, value: Tensor) -> Tensor:
    return factor.unsqueeze(-1) if value.dim() == 2 else factor

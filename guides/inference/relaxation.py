"""Relaxation: latents move down the energy of their own rows, everything at once.

    E(u) = -( N/B sum_n rows_n(u_global, u_n) + global(u_global) )
    u_n      <- u_n      - eta_n  dE/du_n / (N/B)       local latents never see the N/B
    u_global <- u_global - eta    dE/du_global

The step of a row is 1 / lambda_max of its own Hessian block, found by power iteration, and is
halved where the energy of the row would rise. With global latents all move as one unit; each
block is scaled by its own curvature, and half of that step is stable because two blocks of a
positive definite matrix can at most double each other's curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.energy import LogJoint

__all__ = ["Relaxed", "curvature", "energy_function", "relax"]

Packed = dict[str, Tensor]
_POWER_ITERATIONS = 12
_SAFETY = 1.1
_GROWTH = 1.2


@dataclass(frozen=True)
class Relaxed:
    """Latents after a relaxation.

    Args:
        packed: Packed latents by group, in the coordinates of the relaxation.
        energy: Energy of the rows ``(B,)`` at the end, without N/B.
        energy_global: Energy of everything outside the data plate.
        gradient: Gradient by group at the end; local blocks without N/B.
        step: Step size of the rows ``(B,)``, or of the one joint unit ``(1,)``, relative to
            ``scales`` where those are given.
        num_gradients: Gradients of a row that were taken, Hessian products counted twice.
        num_steps: Updates that were made.
    """

    packed: Packed
    energy: Tensor
    energy_global: Tensor
    gradient: Packed
    step: Tensor
    num_gradients: int
    num_steps: int


EnergyFunction = Callable[[Packed], tuple[Tensor, tuple[Tensor, Tensor]]]


def energy_function(
    log_joint: LogJoint, *, jacobian: bool, noncentered: Collection[str] = ()
) -> EnergyFunction:
    """The energy of packed latents: its total, and the rows' and global parts beside it."""

    def energy(packed: Packed) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, other = log_joint.packed(packed, jacobian=jacobian, noncentered=noncentered)
        return -log_joint.total(rows, other), (-rows, -other)

    return energy


def curvature(
    energy: EnergyFunction, packed: Packed, scale: float, num_iterations: int = _POWER_ITERATIONS
) -> Packed:
    """Largest absolute eigenvalue of each diagonal block of the Hessian, by power iteration.

    Args:
        energy: From :func:`energy_function`.
        packed: Where to take it.
        scale: The data plate's N/B, which is divided out of the local blocks.
        num_iterations: Hessian products a block.

    Returns:
        ``(B,)`` for the data group, ``(1,)`` for the global group.
    """

    def gradient(point: Packed) -> Packed:
        return torch.func.grad(lambda p: energy(p)[0])(point)

    result: Packed = {}
    with torch.no_grad():
        _, product = torch.func.vjp(gradient, packed)
        for name, value in packed.items():
            # One fixed start for every row: reproducible, blind to the place in the batch, and
            # it leaves the random state alone.
            generator = torch.Generator().manual_seed(0)
            vector = torch.randn(value.shape[-1], generator=generator, dtype=torch.float64)
            vector = vector.to(value).expand(value.shape)
            size = torch.ones(value.shape[:-1], dtype=value.dtype, device=value.device)
            for _ in range(num_iterations):
                vector = vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-30)
                block = {
                    k: vector if k == name else torch.zeros_like(v) for k, v in packed.items()
                }
                vector = product(block)[0][name]
                size = vector.norm(dim=-1)
            factor = scale if value.dim() == 2 else 1.0
            result[name] = (size / factor).reshape(-1)
    return result


def relax(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    *,
    num_steps: int,
    step_size: float | str | Packed = "auto",
    jacobian: bool = True,
    noncentered: Collection[str] = (),
    tolerance: float = 0.0,
    hold_globals: bool = False,
) -> Relaxed:
    """Relax packed latents by gradient descent on the energy.

    Args:
        log_joint: The log joint of the call.
        packed: Start, ``{group: (B, K) or (K,)}``.
        num_steps: Number of updates.
        step_size: A number for plain gradient descent with that step everywhere; ``"auto"`` for
            steps from the curvature with backtracking; or curvatures by group that were found
            before.
        jacobian: Whether the energy is that of unconstrained space.
        noncentered: Sites that are moved in standardized coordinates.
        tolerance: Stop when every gradient is smaller than this in absolute value.
        hold_globals: Move the rows' latents only; the gradient of the held ones is still taken.

    Returns:
        The relaxed latents.

    Raises:
        ValueError: Where the energy is not finite at the start, or a fixed step diverged.
    """
    scale = log_joint.layout.scale
    energy = energy_function(log_joint, jacobian=jacobian, noncentered=noncentered)
    evaluate = torch.func.grad(energy, has_aux=True)

    def gradient(point: Packed) -> tuple[Packed, Tensor, Tensor]:
        grads, (rows, other) = evaluate(point)
        return {k: g / scale if g.dim() == 2 else g for k, g in grads.items()}, rows, other

    state = {name: value.detach() for name, value in packed.items()}
    num_gradients = 0
    with torch.no_grad():
        grads, rows, other = gradient(state)
        num_gradients += 1
        _check_finite(log_joint, rows, other)
        automatic = not isinstance(step_size, (int, float))
        if step_size == "auto":
            found = curvature(energy, state, scale)
            num_gradients += 2 * _POWER_ITERATIONS * len(state) + 1
        elif automatic:
            found = dict(step_size)
        moving = [name for name in state if not (hold_globals and name == "global")]
        joint = "global" in moving
        if automatic:
            base = {
                k: 1.0 / (_SAFETY * c.clamp_min(1e-12) * (2.0 if len(moving) > 1 else 1.0))
                for k, c in found.items()
            }
        else:
            base = {
                k: torch.full(v.shape[:-1], step_size).to(v).reshape(-1) for k, v in state.items()
            }
        units = 1 if joint else rows.shape[0]
        factor = torch.ones(units, dtype=rows.dtype, device=rows.device)
        done = 0
        for _ in range(num_steps if moving else 0):
            if tolerance and all(bool((grads[k].abs() <= tolerance).all()) for k in moving):
                break
            step = {k: _expand(base[k] * factor, state[k]) for k in moving}
            trial = {
                k: (v - step[k] * grads[k]).to(v.dtype) if k in moving else v
                for k, v in state.items()
            }
            new_grads, new_rows, new_other = gradient(trial)
            num_gradients += 1
            done += 1
            if not automatic:
                state, grads, rows, other = trial, new_grads, new_rows, new_other
                continue
            before = (scale * rows.sum() + other).reshape(1) if joint else rows
            after = (scale * new_rows.sum() + new_other).reshape(1) if joint else new_rows
            # Rounding may raise a converged energy by an ulp or so; that is no reason to stop.
            slack = 8 * torch.finfo(before.dtype).eps * (1 + before.abs())
            accepted = (after <= before + slack) & torch.isfinite(after)
            factor = torch.where(accepted, (factor * _GROWTH).clamp_max(1.0), factor * 0.5)
            state = {
                k: _choose(accepted, trial[k], v) if k in moving else v for k, v in state.items()
            }
            grads = {
                k: _choose(accepted, new_grads[k], g) if k in moving else g
                for k, g in grads.items()
            }
            rows = torch.where(accepted, new_rows, rows)
            other = torch.where(accepted[0], new_other, other) if joint else new_other
        if not automatic:
            _check_finite(log_joint, rows, other, diverged=True)
        if hold_globals and "global" in state:
            # Rows were accepted one by one, so the gradient of what they share is taken at last.
            grads, rows, other = gradient(state)
            num_gradients += 1
    return Relaxed(state, rows, other, grads, factor, num_gradients, done)


def _expand(step: Tensor, value: Tensor) -> Tensor:
    """A step a row, or one for all, shaped to multiply packed latents."""
    return step.unsqueeze(-1) if value.dim() == 2 else step


def _choose(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.unsqueeze(-1) if old.dim() == 2 else accepted, new, old)


def _check_finite(
    log_joint: LogJoint, rows: Tensor, other: Tensor, diverged: bool = False
) -> None:
    if is_capturing() or (bool(torch.isfinite(rows).all()) and bool(torch.isfinite(other))):
        return
    if diverged:
        raise ValueError(
            "The relaxation diverged: the energy is not finite. The step must be below 2 / "
            'lambda_max of the energy\'s Hessian; use step_size="auto", or a smaller number.'
        )
    bad = (~torch.isfinite(rows)).nonzero().flatten().tolist()
    raise ValueError(
        "The energy is not finite at the start of the relaxation"
        + (f" (rows {bad[:5]}{' ...' if len(bad) > 5 else ''})" if bad else "")
        + ". Check that the data lie in the support of their distributions, or start from a guide "
        f"(guide=). Latent sites: {', '.join(log_joint.layout.sites)}."
    )

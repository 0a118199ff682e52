"""Relaxation: latents move down the energy of their own rows, everything at once.

    E(u) = -( N/B sum_n rows_n(u_global, u_n) + global(u_global) )
    u_n      <- u_n      - eta_n  dE/du_n / (N/B)       local latents never see the N/B
    u_global <- u_global - eta    dE/du_global

The step of a row is 1 / lambda_max of its own Hessian block, found by power iteration, and is
halved where the energy of the row would rise. With global latents all move as one unit; each
block is scaled by its own curvature, and half of that step is stable because two blocks of a
positive definite matrix can at most double each other's curvature.

How the steps are made is the solver's part (:mod:`guides.inference.solvers`); rows that are done
are taken out of the batch (:mod:`guides.inference.compaction`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.energy import LogJoint
from guides.inference import solvers
from guides.inference.compaction import Batch
from guides.inference.solvers.solver import Solver, check_solver
from guides.inference.units import EnergyFunction, Packed, Point, Units, energy_function

__all__ = ["Relaxed", "curvature", "energy_function", "relax"]

_POWER_ITERATIONS = 12
_SAFETY = 1.1


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
        num_products: Gradients and Hessian products, each counted once.
        row_gradients: As ``num_gradients``, summed over the rows: those that were taken out of
            the batch cost nothing any more.
    """

    packed: Packed
    energy: Tensor
    energy_global: Tensor
    gradient: Packed
    step: Tensor
    num_gradients: int
    num_steps: int
    num_products: int
    row_gradients: int


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
        product = torch.func.vjp(gradient, packed)[1]
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
    solver: str | Solver = "gradient",
    data_args: Mapping[str, int] | None = None,
) -> Relaxed:
    """Relax packed latents on the energy.

    Args:
        log_joint: The log joint of the call.
        packed: Start, ``{group: (B, K) or (K,)}``.
        num_steps: Number of updates.
        step_size: A number for plain steps of that size everywhere, never shortened; ``"auto"``
            for steps from the curvature with backtracking; or curvatures by group that were found
            before. Solvers that find the length of their steps themselves take ``"auto"`` only.
        jacobian: Whether the energy is that of unconstrained space.
        noncentered: Sites that are moved in standardized coordinates.
        tolerance: A unit stops when its gradient is nowhere larger than this in absolute value.
        hold_globals: Move the rows' latents only; the gradient of the held ones is still taken.
        solver: A key of ``guides.inference.solvers.SOLVERS``, or a solver.
        data_args: Which arguments of the model hold rows, see :func:`guides.rows.data_args_of`;
            rows that have stopped are then left out of the batch.

    Returns:
        The relaxed latents.

    Raises:
        ValueError: Where the energy is not finite at the start, a fixed step diverged, or the
            solver takes no step size.
    """
    method = solvers.make(solver)
    check_solver(method, step_size)
    fixed = isinstance(step_size, (int, float))
    number = float(step_size) if isinstance(step_size, (int, float)) else 1.0
    start = {name: value.detach() for name, value in packed.items()}
    units = Units(
        log_joint, start, jacobian=jacobian, noncentered=noncentered, hold_globals=hold_globals
    )
    done = 0
    with torch.no_grad():
        if not units.moving:
            return _held(units, start)
        point = units.at(units.flatten(start))
        _check_finite(log_joint, point)
        if fixed:
            steps = {
                k: torch.full(v.shape[:-1], number).to(v).reshape(-1) for k, v in start.items()
            }
        elif not method.uses_curvature:
            steps = {k: torch.ones_like(v[..., 0]).reshape(-1) for k, v in start.items()}
        else:
            if step_size == "auto":
                found = curvature(units.function, start, units.scale)
                units.count(gradients=1, products=_POWER_ITERATIONS * len(start))
            else:
                found = dict(step_size)  # type: ignore[arg-type]
            share = 2.0 if len(units.moving) > 1 else 1.0
            steps = {k: 1.0 / (_SAFETY * c.clamp_min(1e-12) * share) for k, c in found.items()}
        state = method.start(units, point, units.weights(steps), fixed)
        batch = Batch(units, point, state, data_args)
        for i in range(num_steps):
            if tolerance and method.idle and not batch.settle(tolerance):
                break
            batch.step(method, last=i == num_steps - 1)
            done += 1
        point, factor = batch.gather()
        if fixed:
            _check_finite(log_joint, point, diverged=True)
        gradient = units.packed(point.gradient)
        gradient = {k: gradient[k] for k in units.moving}
        result, rows, other = units.packed(point.x), point.rows, point.other
        if units.joint:
            gradient = units.per_row(gradient)
        if hold_globals and "global" in start:
            # Rows were accepted one by one, so the gradient of what they share is taken at last.
            held = _held(units, result)
            gradient, rows, other = held.gradient, held.energy, held.energy_global
    counts = units.counts
    return Relaxed(
        result,
        rows,
        other,
        gradient,
        factor,
        counts.gradients + 2 * counts.products,
        done,
        counts.gradients + counts.products,
        counts.rows,
    )


def _held(units: Units, state: Packed) -> Relaxed:
    """The gradient of all latents, moving or not, at a state."""
    units.count(gradients=1)
    grads, (rows, other) = torch.func.grad(units.function, has_aux=True)(state)
    factor = torch.ones(len(rows) or 1, dtype=other.dtype, device=other.device)
    return Relaxed(state, rows, other, units.per_row(grads), factor, 1, 0, 1, max(1, len(rows)))


def _check_finite(log_joint: LogJoint, point: Point, diverged: bool = False) -> None:
    rows, other = point.rows, point.other
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

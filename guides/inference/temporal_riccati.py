"""The steady state of a filter: the limit of the Riccati recursion, read off a program.

    S <- A (S^-1 + H)^-1 A' + Q                 Q = G G', H: curvature of the data in the state

The recursion doubles the number of its steps at every turn. With W = (I + Q H)^-1 two steps of
A, Q and H are one step of

    A W A               Q + A W Q A'            H + A' H W A

so that Q goes to the limit of S, however slow the filter is. The limit exists where the program is
linear, is the same at every step and for every row, and what is unstable in it is observed;
everything else is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.curvature import hessian
from guides.inference.temporal_step import Carried, Sequential, linearize, predict

__all__ = ["stationary"]

# Turns, of which each doubles the number of steps.
_MOST = 60


def stationary(call: Sequential) -> Tensor:
    """The covariance of the filtered state in the steady state, ``(K, K)``.

    Args:
        call: A call of two steps or more.

    Raises:
        ValueError: Where the program has no steady state.
    """
    with torch.no_grad():
        system = _system(call)
        # In double precision, which takes sums of small noise over many steps.
        slope, predicted, seen = (matrix.double() for matrix in system)
        information = seen
        eye = torch.eye(len(slope), dtype=slope.dtype, device=slope.device)
        units = torch.ones_like(slope[0])
        for _ in range(_MOST):
            # In units of what is predicted, so that no state is lost beside a wider one.
            wide = predicted.diagonal()
            wide = torch.where(wide > 0, wide, torch.ones_like(wide)).sqrt()
            units = units * wide
            slope = slope / wide.unsqueeze(-1) * wide
            predicted = predicted / wide.unsqueeze(-1) / wide
            information = information * wide.unsqueeze(-1) * wide
            # No inverse of what is predicted, which may be singular.
            both = torch.cat([slope, predicted], -1)
            forward, belief = torch.linalg.solve(eye + predicted @ information, both).chunk(2, -1)
            moved = predicted + slope @ belief @ slope.mT
            change = (moved - predicted).abs().max()
            if not bool(torch.isfinite(moved).all()):
                break
            information = information + slope.mT @ information @ forward
            information = 0.5 * (information + information.mT)
            slope = slope @ forward
            predicted = 0.5 * (moved + moved.mT)
            if bool(change <= 4 * torch.finfo(moved.dtype).eps):
                seen = seen * units.unsqueeze(-1) * units
                belief = torch.linalg.solve(eye + predicted @ seen, predicted)
                return (belief * units.unsqueeze(-1) * units).to(system[0].dtype)
    raise ValueError(
        "The Riccati recursion did not settle: states that are unstable and unobserved have no "
        'steady state. Pass precision="riccati".'
    )


def _system(call: Sequential) -> tuple[Tensor, Tensor, Tensor]:
    """A, Q and H, the same everywhere."""
    found: dict[str, Tensor] = {}
    last = len(call.steps) - 1
    for offset in (0.0, 0.5):
        states: dict[int, Tensor] = {}
        for t in range(len(call.steps)):
            states[t] = predict(call, t, states) + offset
        for t in range(1, last + 1):
            _, slope, gain = linearize(call, t, states)
            assert slope is not None
            own = call.layout(t)
            joint = LogJoint(
                call.joint(t, states, Carried(states[t], gain)).model,
                call.args,
                call.kwargs,
                layout=own,
            )
            curved = hessian(joint, {"data": states[t]}, kind="gauss_newton")["local"]
            mask = call.steps[t].mask
            rows = slice(None) if mask is None else mask
            for what, value in (
                ("transition", slope),
                ("noise", gain @ gain.mT),
                ("curvature of the data", curved),
            ):
                for row in value[rows]:
                    known = found.setdefault(what, row)
                    slack = 1e3 * torch.finfo(row.dtype).eps * _sizes(what, known)
                    if not bool(((row - known).abs() <= slack).all()):
                        raise ValueError(
                            f'precision="steady" needs a program that is linear, and the same at '
                            f"every step and for every row, but its {what} changes between "
                            f'them. Pass precision="riccati", which follows the change.'
                        )
    if not found:
        raise ValueError(
            'precision="steady" reads the program off its steps after the first, which no row '
            'has in this call. Pass precision="riccati".'
        )
    return found["transition"], found["noise"], found["curvature of the data"]


def _sizes(what: str, matrix: Tensor) -> Tensor:
    """What rounding of a matrix is relative to."""
    if what == "transition":
        return matrix.abs().max()
    own = matrix.diagonal().clamp_min(0).sqrt()
    return own.unsqueeze(-1) * own

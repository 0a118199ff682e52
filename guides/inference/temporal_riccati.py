"""The steady state of a filter: the limit of the Riccati recursion, read off a program.

    S <- A (S^-1 + H)^-1 A' + Q                 Q = G G', H: curvature of the data in the state

The limit exists where the program is linear, is the same at every step and for every row, and
what is unstable in it is observed; everything else is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.curvature import hessian
from guides.inference.temporal_step import Carried, Sequential, linearize, predict

__all__ = ["stationary"]

_MOST = 100_000


def stationary(call: Sequential) -> Tensor:
    """The covariance of the filtered state in the steady state, ``(K, K)``.

    Args:
        call: A call of two steps or more.

    Raises:
        ValueError: Where the program has no steady state.
    """
    with torch.no_grad():
        slope, noise, information = _system(call)
        predicted = noise
        eye = torch.eye(len(noise), dtype=noise.dtype, device=noise.device)
        for _ in range(_MOST):
            # (S^-1 + H)^-1 without inverses of S, which may be singular at the start.
            belief = torch.linalg.solve(eye + predicted @ information, predicted)
            belief = 0.5 * (belief + belief.mT)
            moved = slope @ belief @ slope.mT + noise
            change = (moved - predicted).abs().max()
            predicted = moved
            if not bool(torch.isfinite(moved).all()):
                break
            if bool(change <= 4 * torch.finfo(moved.dtype).eps * moved.abs().max()):
                return torch.linalg.solve(eye + predicted @ information, predicted)
    raise ValueError(
        f"The Riccati recursion did not settle in {_MOST} steps: states that are unstable and "
        'unobserved have no steady state. Pass precision="riccati".'
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
                    slack = 1e3 * torch.finfo(row.dtype).eps * (1 + known.abs().max())
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

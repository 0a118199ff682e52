"""A guard for iterations that nothing was trained for: no update that lowers a row's bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guides.schemes.bound import RowBound

__all__ = ["first_better"]


def first_better(
    bound: RowBound, lam: Tensor, proposed: Sequence[Tensor], num_particles: int
) -> Tensor:
    """The first of several parameters that a row is better off with; else those it has.

    Bounds are compared at common, fresh noise, row by row: draws that a step was made of would
    speak for it. A gain must exceed its standard error, or chance would add up over iterations.

    Args:
        bound: The rows' bound.
        lam: Parameters that the rows have ``(B, P)``.
        proposed: Parameters that they may get instead, each ``(B, P)``, the first choice first.
            The result is attached to what these are attached to.
        num_particles: Draws of a comparison, an even number of at least 4.
    """
    with torch.no_grad():
        noise = bound.noise(lam, num_particles)

        def draws(at: Tensor) -> Tensor:
            _, log_q, log_p = bound.draws(at, noise)
            # The two of an antithetic pair are not independent: a pair is one draw.
            return (log_p - log_q).unflatten(0, (2, -1)).mean(0)

        before = draws(lam.detach())
        lost = ~before.isfinite().all(0)
        better = []
        for one in proposed:
            after = draws(one.detach())
            gain = after - before
            sure = gain.mean(0) > gain.std(0) / len(gain) ** 0.5
            finite = after.isfinite().all(0) & one.detach().isfinite().all(-1)
            better.append(((sure | lost) & finite).unsqueeze(-1))
    result = lam
    for one, accepted in reversed(list(zip(proposed, better, strict=True))):
        result = torch.where(accepted, one, result)
    return result

"""Sylvester: planar steps in several directions at once, with the right log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor

from guides.families.base import Base
from guides.families.family import inverse_softplus, positive
from guides.families.flow import SteppedFlow, directions
from guides.families.matrices import placed, reflected
from guides.families.roots import above_minus_one, increasing_root

__all__ = ["Sylvester"]


class Sylvester(SteppedFlow):
    """A Sylvester flow, Householder variant, with steps of the datum's own.

        loc, raw, (v, R1, R2, b)_1..T, base = split(lam)
        Q   = first M columns of H(v_1) ... H(v_M)              (K, M), orthonormal
        z_t = z_{t-1} + Q R1 tanh(R2 Q^T z_{t-1} + b)           R1, R2 (M, M), upper triangular
        log |det| = sum_i log(1 + tanh'(.)_i r1_ii r2_ii)       r1_ii r2_ii > -1

    The product of the diagonals comes out because ``det(I + Q R1 D R2 Q^T) = det(I + D R2 R1)``
    and R2 R1 is upper triangular. Pyro 1.9.2's ``Sylvester`` multiplies by the transposes instead
    and reports the same product, which is then not its determinant; bounds made with it are no
    bounds.

    In the coordinates ``Q^T z`` the inverse is triangular: from the last to the first, each is
    the root of an increasing function of one variable, so any point can be scored. It starts at
    the identity (R1 zero).

    References:
        | Sylvester normalizing flows for variational inference (van den Berg et al., 2018)
        | https://arxiv.org/abs/1803.05649

    Args:
        size: Length K of the packed latents.
        transforms: Number T of steps, of M (K + M + 2) parameters each.
        rank: Number M of directions of a step; by default 4, or K where that is less.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1, or ``rank`` is not between 1 and K.

    Example:
        >>> family = Sylvester(3, transforms=2, rank=2)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    upper: Tensor
    diagonal: Tensor

    def __init__(
        self,
        size: int,
        *,
        transforms: int = 2,
        rank: int | None = None,
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        rank = min(4, size) if rank is None else rank
        if not 1 <= rank <= size:
            raise ValueError(f"rank must be between 1 and the size {size}, got {rank}.")
        v = directions(transforms * rank, size).reshape(transforms, -1)
        zeros = v.new_zeros(transforms, rank * (rank - 1) + rank)
        ones = v.new_full((transforms, rank), inverse_softplus(1.0))
        start = torch.cat([v, zeros, ones, v.new_zeros(transforms, rank)], -1)
        super().__init__(size, start, init_scale=init_scale, base=base)
        self.rank = rank
        self.register_buffer("upper", torch.triu_indices(rank, rank, 1), persistent=False)
        both = torch.arange(rank).expand(2, -1)
        self.register_buffer("diagonal", both, persistent=False)

    def step(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Within the M directions of Q."""
        q, r1, r2, b, above = self.factors(parameters)
        t = torch.tanh(_times(r2, _times(q.mT, z)) + b)
        # 1 + (1 - t^2) r1 r2, written as a sum of terms that are not negative.
        log_det = (t.square() + (1 - t.square()) * above).log().sum(-1)
        return z + _times(q, _times(r1, t)), log_det

    def step_inverse(self, parameters: Tensor, y: Tensor) -> Tensor:
        """By back substitution, one root a direction."""
        q, r1, r2, b, above = self.factors(parameters)
        target = _times(q.mT, y)
        solved: list[Tensor] = []
        tanhs: list[Tensor] = []
        for i in reversed(range(self.rank)):
            s, t = (torch.stack(found, -1) if found else None for found in (solved, tanhs))
            goal, bias = target[..., i], b[..., i]
            if s is not None and t is not None:
                goal = goal - (r1[..., i, i + 1 :] * t).sum(-1)
                bias = bias + (r2[..., i, i + 1 :] * s).sum(-1)
            one, two, plus = r1[..., i, i], r2[..., i, i], above[..., i]

            def along(
                s: Tensor,
                bias: Tensor = bias,
                one: Tensor = one,
                two: Tensor = two,
                plus: Tensor = plus,
            ) -> tuple[Tensor, Tensor]:
                t = torch.tanh(two * s + bias)
                return s + one * t, t.square() + (1 - t.square()) * plus

            root = increasing_root(along, goal, goal - one.abs(), goal + one.abs())
            solved.insert(0, root)
            tanhs.insert(0, torch.tanh(two * root + bias))
        return y - _times(q, _times(r1, torch.stack(tanhs, -1)))

    def factors(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q ``(..., K, M)``, R1 and R2 ``(..., M, M)``, b and ``1 + r1_ii r2_ii`` ``(..., M)``."""
        rank, off = self.rank, self.rank * (self.rank - 1) // 2
        v, upper1, upper2, a, raw, b = parameters.split(
            [rank * self.size, off, off, rank, rank, rank], -1
        )
        q = torch.eye(self.size, dtype=v.dtype, device=v.device)[:rank]  # rows are columns of Q
        for normal in reversed(v.unflatten(-1, (rank, self.size)).unbind(-2)):
            q = reflected(normal.unsqueeze(-2), q)
        two = positive(raw)
        product, above = above_minus_one(a * two)
        r1 = placed(upper1, self.upper, rank) + placed(product / two, self.diagonal, rank)
        r2 = placed(upper2, self.upper, rank) + placed(two, self.diagonal, rank)
        return q.mT, r1, r2, b, above


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)

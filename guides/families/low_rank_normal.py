"""LowRankNormal: a Gaussian whose covariance is a diagonal plus a few directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from guides.families.family import (
    Family,
    inverse_softplus,
    positive,
    standard_normal_log_prob,
)

__all__ = ["LowRankNormal"]

_START = 0.3


class LowRankNormal(Family):
    """A Gaussian with low-rank plus diagonal covariance in unconstrained space.

        loc, raw, W = split(lam)                        W: (K, R)
        D = diag(softplus(raw)),  V = D W
        q(u) = Normal(u; loc, D^2 + V V^T)
        u = loc + D (e + W f)                           e ~ Normal(0, I_K), f ~ Normal(0, I_R)

    The factor is counted in units of the diagonal, which keeps the problem well conditioned when
    posterior scales differ. P = K (2 + R) grows linearly with K, where the full covariance grows
    with its square; densities solve R x R systems only (Woodbury).

    W = 0 is a saddle: the gradient of every bound with respect to W vanishes there. W starts at
    small fixed values, the same for every row, with the diagonal lowered so that all standard
    deviations are ``init_scale``.

    References:
        | Gaussian variational approximation with a factor covariance structure (Ong et al., 2018)
        | https://arxiv.org/abs/1701.03208

    Args:
        size: Length K of the packed latents.
        rank: Number R of directions; by default half of K, at most 8.
        init_scale: Standard deviation at the start.

    Raises:
        ValueError: If ``rank`` is not in 1 .. K.

    Example:
        >>> family = LowRankNormal(6, rank=2)
        >>> family.num_params, family.noise_size
        (24, 8)
    """

    start: Tensor

    path_gradient = True
    has_scale = True

    def __init__(self, size: int, *, rank: int | None = None, init_scale: float = 0.1) -> None:
        super().__init__(size)
        rank = min((size + 1) // 2, 8) if rank is None else rank
        if not 1 <= rank <= size:
            raise ValueError(
                f"rank must be in 1 .. {size}, the number of packed latents, got {rank}. For the "
                "whole covariance use multivariate_normal, for none of it normal."
            )
        self.rank = rank
        self.raw_scale = inverse_softplus(init_scale / math.sqrt(1 + _START**2))
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        start = _START * start / start.norm(dim=-1, keepdim=True)
        self.register_buffer("start", start.to(torch.get_default_dtype()), persistent=False)

    @property
    def num_params(self) -> int:
        """K (2 + R)."""
        return self.size * (2 + self.rank)

    @property
    def noise_size(self) -> int:
        """K + R."""
        return self.size + self.rank

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale`` and weak correlations."""
        start = self.start.to(loc).flatten().expand(*loc.shape[:-1], -1)
        return torch.cat([loc, torch.full_like(loc, self.raw_scale), start], -1)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``loc + D (e + W f)``."""
        loc, scale, factor = self._parts(lam)
        own, shared = noise.split([self.size, self.rank], -1)
        standard = own + (factor @ shared.unsqueeze(-1)).squeeze(-1)
        return loc + scale * standard, self._standard_log_prob(standard, factor, scale)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        loc, scale, factor = self._parts(lam)
        return self._standard_log_prob((value - loc) / scale, factor, scale)

    def entropy(self, lam: Tensor) -> Tensor:
        """The Gaussian's entropy."""
        _, scale, factor = self._parts(lam)
        constant = 0.5 * self.size * math.log(2 * math.pi * math.e)
        return scale.log().sum(-1) + _log_diagonal(self._capacitance(factor)) + constant

    def covariance(self, lam: Tensor) -> Tensor:
        """The covariance ``(..., K, K)``."""
        _, scale, factor = self._parts(lam)
        directions = scale.unsqueeze(-1) * factor
        return torch.diag_embed(scale.square()) + directions @ directions.mT

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, rank = self.size, self.rank
        loc, raw, factor = lam.split([size, size, size * rank], -1)
        return loc, positive(raw), factor.unflatten(-1, (size, rank))

    def _capacitance(self, factor: Tensor) -> Tensor:
        """Cholesky factor of ``I + W^T W``, ``(..., R, R)``; its eigenvalues are at least one."""
        unit = torch.eye(self.rank, dtype=factor.dtype, device=factor.device)
        return torch.linalg.cholesky(unit + factor.mT @ factor)

    def _standard_log_prob(self, standard: Tensor, factor: Tensor, scale: Tensor) -> Tensor:
        """Log density of ``loc + D standard``, with ``standard ~ Normal(0, I + W W^T)``."""
        tril = self._capacitance(factor)
        column = standard.unsqueeze(-1)
        half = torch.linalg.solve_triangular(tril, factor.mT @ column, upper=False)
        shared = torch.linalg.solve_triangular(tril.mT, half, upper=True)
        own = (column - factor @ shared).squeeze(-1)
        # |own|^2 + |shared|^2 is Woodbury's form without its difference of large numbers.
        log_prob = standard_normal_log_prob(own) - 0.5 * shared.squeeze(-1).square().sum(-1)
        return log_prob - _log_diagonal(tril) - scale.log().sum(-1)


def _log_diagonal(tril: Tensor) -> Tensor:
    return tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

"""Renyi: the variational Renyi bound, per datum."""

from __future__ import annotations

import math

from torch import Tensor

from guides.objectives.weighted import Weighted

__all__ = ["Renyi"]


class Renyi(Weighted):
    """The variational Renyi bound of order alpha, per datum.

        g ~ q(g),   z_nk ~ q(z_n | g)                k = 1..num_particles
        w_nk  = p(x_n, z_nk | g) / q(z_nk | g)
        bound = E[ log p(g)/q(g) + N/B sum_n 1/(1 - alpha) log 1/K sum_k w_nk^(1 - alpha) ]

    ``alpha=0`` is :class:`guides.objectives.IWELBO`, ``alpha=1`` the ELBO; between them it goes
    from covering mass to seeking modes. As there, weights are per datum, conditional on a shared
    draw of the global latents, and joint where all latents are global.

    The loss is minus the bound for all N rows (lower is better). For ``alpha >= 0`` it bounds
    -log p(x) from above in expectation; for ``alpha < 0`` it is no bound.

    References:
        | Renyi Divergence Variational Inference (Li & Turner, 2016)
        | https://arxiv.org/abs/1602.02311

    Args:
        alpha: The order; any finite number.
        num_particles: Draws K of the rows' latents for each draw of the global latents.
        num_outer: Draws of the global latents.

    Example:
        >>> Renyi(0.5, num_particles=8, num_outer=2)  # doctest: +ELLIPSIS
        Renyi(alpha=0.5, num_particles=8, num_outer=2; weights per datum, ...)
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 2, *, num_outer: int = 1) -> None:
        super().__init__(num_particles, num_outer=num_outer)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha}.")
        self.alpha = alpha

    def combine(self, log_w: Tensor) -> Tensor:
        """Log of the power mean of order ``1 - alpha``."""
        order = 1.0 - self.alpha
        if order == 0.0:
            return log_w.mean(1)
        return ((order * log_w).logsumexp(1) - math.log(log_w.shape[1])) / order

    def _options(self) -> str:
        return f"alpha={self.alpha}, "

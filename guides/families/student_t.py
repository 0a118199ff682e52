"""StudentT: independent coordinates with heavy tails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guides.families.family import Family, inverse_softplus, positive

__all__ = ["StudentT"]


class StudentT(Family):
    """Independent Student-t variables in unconstrained space.

        loc, raw = split(lam)
        e_k ~ StudentT(df)
        u = loc + softplus(raw) e

    Importance weights p / q stay bounded where the posterior has Gaussian tails, so this is a
    safe proposal where the mean-field Gaussian is too narrow. ``df`` is fixed: noise must not
    depend on parameters, so that refinement can hold it while the parameters move.

    With a quadratic energy the ELBO is finite for ``df`` above 2, and its gradient has finite
    variance for ``df`` above 4.

    Args:
        size: Length K of the packed latents.
        df: Degrees of freedom, above 2.
        init_scale: Standard deviation at the start.

    Raises:
        ValueError: If ``df`` is not above 2.

    Example:
        >>> family = StudentT(3, df=5.0)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    path_gradient = True
    has_scale = True

    def __init__(self, size: int, *, df: float = 5.0, init_scale: float = 0.1) -> None:
        super().__init__(size)
        if not 2 < df < math.inf:
            raise ValueError(
                f"df must be finite and above 2, so that q has a variance, got {df}. For Gaussian "
                "tails use normal."
            )
        self.df = float(df)
        self.raw_scale = inverse_softplus(init_scale * math.sqrt((df - 2) / df))
        half, more = torch.tensor([df / 2, (df + 1) / 2], dtype=torch.float64)
        # The density is exp(-_log_norm) (1 + e^2 / df)^(-(df + 1) / 2).
        self._log_norm = float(half.lgamma() - more.lgamma() + 0.5 * math.log(df * math.pi))
        spread = (df + 1) / 2 * float(more.digamma() - half.digamma())
        self._entropy = self._log_norm + spread

    @property
    def num_params(self) -> int:
        """2 K."""
        return 2 * self.size

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale``."""
        return torch.cat([loc, torch.full_like(loc, self.raw_scale)], -1)

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard Student-t draws."""
        df = torch.full((*shape, self.size), self.df, dtype=like.dtype, device=like.device)
        return torch.distributions.StudentT(df, validate_args=False).sample()

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """``loc + scale * noise``."""
        loc, raw = lam.split(self.size, -1)
        scale = positive(raw)
        return loc + scale * noise, self._standard_log_prob(noise) - scale.log().sum(-1)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        loc, raw = lam.split(self.size, -1)
        scale = positive(raw)
        return self._standard_log_prob((value - loc) / scale) - scale.log().sum(-1)

    def entropy(self, lam: Tensor) -> Tensor:
        """Sum of the coordinates' entropies."""
        return (positive(lam[..., self.size :]).log() + self._entropy).sum(-1)

    def _standard_log_prob(self, e: Tensor) -> Tensor:
        tails = torch.log1p(e.square() / self.df)
        return -(0.5 * (self.df + 1) * tails + self._log_norm).sum(-1)

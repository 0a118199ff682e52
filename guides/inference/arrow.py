"""Matrices in arrow form: a block for every row, one for the globals, and what couples them.

    H = [ H_ll,n           H_lg,n ]      S = H_gg - N/B sum_n H_gl,n H_ll,n^-1 H_lg,n
        [ N/B sum H_gl,n   H_gg   ]
    x_g = S^-1 (b_g - N/B sum_n H_gl,n H_ll,n^-1 b_n)        x_n = H_ll,n^-1 (b_n - H_lg,n x_g)
    log det H = N/B sum_n log det H_ll,n + log det S

The determinant is that of all N rows; with globals that is what it says for ``N = B`` alone, since
S of a minibatch is an estimate, and the logarithm of an estimate is biased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Arrow", "Cholesky", "Factor"]


class Factor(Protocol):
    """A factorized symmetric matrix, or a batch of them."""

    def solve(self, right: Tensor) -> Tensor:
        """The inverse times columns ``(..., K, R)``."""

    def log_det(self) -> Tensor:
        """The log determinants ``(...)``."""


class Cholesky:
    """Factors of positive definite matrices ``(..., K, K)``, differentiable."""

    def __init__(self, matrix: Tensor) -> None:
        # Symmetric up to rounding, which the factorization does not look at.
        self.factor = torch.linalg.cholesky(matrix)

    def solve(self, right: Tensor) -> Tensor:
        """The inverse times columns ``(..., K, R)``."""
        return torch.cholesky_solve(right, self.factor)

    def log_det(self) -> Tensor:
        """The log determinants ``(...)``."""
        return 2.0 * self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


class Arrow:
    """A factorized arrow.

    Args:
        blocks: ``"local"`` (B, K, K) and ``"cross"`` (B, K, G), both without N/B, and
            ``"global"`` (G, G) with it; keys for the groups that exist.
        scale: N/B of the data plate.
        factor: How a block is factorized.

    Example:
        >>> local, cross = torch.tensor([[[4.0]]]), torch.tensor([[[2.0]]])
        >>> arrow = Arrow({"local": local, "cross": cross, "global": torch.tensor([[2.0]])}, 1.0)
        >>> arrow.solve({"data": torch.tensor([[6.0]]), "global": torch.tensor([4.0])})
        {'data': tensor([[1.]]), 'global': tensor([1.])}
        >>> arrow.log_det().exp().round().item()  # of [[4, 2], [2, 2]]
        4.0
    """

    def __init__(
        self,
        blocks: Mapping[str, Tensor],
        scale: float,
        factor: Callable[[Tensor], Factor] = Cholesky,
    ) -> None:
        self.scale = scale
        self.local = factor(blocks["local"]) if "local" in blocks else None
        self.schur: Factor | None = None
        self.cross: Tensor | None = None
        if "global" in blocks:
            matrix = blocks["global"]
            if self.local is not None:
                self.cross = blocks["cross"]
                self.gain = self.local.solve(self.cross)  # (B, K, G)
                matrix = matrix - scale * torch.einsum("bkg,bkh->gh", self.cross, self.gain)
            self.schur = factor(matrix)

    def solve(self, right: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse times a vector.

        Args:
            right: ``"data"`` (B, K), without N/B, and ``"global"`` (G,), with it.

        Returns:
            The solution by group.
        """
        found: dict[str, Tensor] = {}
        if self.local is not None:
            found["data"] = self.local.solve(right["data"].unsqueeze(-1)).squeeze(-1)
        if self.schur is not None:
            target = right["global"]
            if self.cross is not None:
                pulled = torch.einsum("bkg,bk->g", self.cross, found["data"])
                target = target - self.scale * pulled
            found["global"] = self.schur.solve(target.unsqueeze(-1)).squeeze(-1)
            if self.cross is not None:
                found["data"] = found["data"] - self.gain @ found["global"]
        return found

    def log_det(self) -> Tensor:
        """The log determinant of the matrix of all N rows."""
        total = torch.zeros(())
        if self.local is not None:
            total = total + self.scale * self.local.log_det().sum()
        return total if self.schur is None else total + self.schur.log_det()

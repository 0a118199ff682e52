"""Whitening: a Gaussian with full covariance whose inverse map whitens, fitted or learned."""

from __future__ import annotations

from typing import ClassVar

import pyro
import torch
from torch import Tensor, nn

from zoo.covariance import Covariance
from zoo.model import Model
from zoo.rows import check_rows, data_plate

__all__ = ["KINDS", "Whitening", "whitening_matrix"]

KINDS = ("pca", "zca", "cholesky")


def whitening_matrix(x: Tensor, kind: str, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The mean of rows and a matrix W that whitens them: W (x - mean) has identity covariance.

        S = covariance(x) + epsilon I = U diag(l) U'
        pca         W = diag(l)^-1/2 U'           scaled projections, largest first
        zca         W = U diag(l)^-1/2 U'         symmetric: the whitened rows stay nearest
        cholesky    W = L^-1, S = L L'            unit d is regressed on units before it

    All are linear flows with log |det W| = -1/2 sum log l, so all give the same density.

    References:
        | The "independent components" of natural scenes are edge filters (Bell & Sejnowski, 1997)
        | https://doi.org/10.1016/S0042-6989(97)00121-1
        | Optimal whitening and decorrelation (Kessy, Lewin & Strimmer, 2018)
        | https://arxiv.org/abs/1512.00809

    Args:
        x: Rows ``(N, D)``.
        kind: ``"pca"``, ``"zca"`` or ``"cholesky"``.
        epsilon: Added to the variance of every coordinate. It changes the likelihood, and is
            needed where coordinates are constant or rows are fewer than dimensions.

    Returns:
        The mean ``(D,)`` and W ``(D, D)``.

    Raises:
        ValueError: For an unknown kind, fewer than two rows, or a covariance without inverse.

    Example:
        >>> mean, weight = whitening_matrix(torch.randn(500, 3), "zca")
        >>> torch.allclose(weight, weight.T, atol=1e-5)
        True
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if x.dim() != 2 or len(x) < 2:
        raise ValueError(f"Whitening needs at least two rows (N, D), got {tuple(x.shape)}.")
    mean = x.mean(0)
    centered = x - mean
    covariance = centered.mT @ centered / len(x)
    covariance = covariance + epsilon * torch.eye(x.shape[1]).to(x)
    if kind == "cholesky":
        factor, failed = torch.linalg.cholesky_ex(covariance)
        smallest = torch.zeros(()) if failed else factor.diagonal().min()
    else:
        values, vectors = torch.linalg.eigh(covariance)
        smallest = values[0]
    if not bool(smallest > 0):
        raise ValueError(
            f"The covariance of {len(x)} rows of {x.shape[1]} coordinates has no inverse. Raise "
            f"epsilon (now {epsilon:g}), or leave constant coordinates out."
        )
    if kind == "cholesky":
        eye = torch.eye(x.shape[1]).to(x)
        return mean, torch.linalg.solve_triangular(factor, eye, upper=False)
    pca = (vectors / values.sqrt()).mT.flip(0)
    return mean, pca if kind == "pca" else (vectors / values.sqrt()) @ vectors.mT


class Whitening(Model):
    """A fully visible Gaussian whose lateral weights are learned by maximum likelihood.

        x ~ Normal(loc, A A')             A triangular or symmetric, see zoo.covariance

    At the maximum A^-1 is a whitening matrix of the data: Cholesky whitening where A is
    triangular, ZCA where it is symmetric, whose filters on natural images have a center and an
    opposite surround. It has no latents: ``SVI(model, lambda *args, **kwargs: None, ...)``
    learns it, or :meth:`fit`.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022)
        | https://arxiv.org/abs/2011.07464

    Args:
        x_dim: Dimension D of a row.
        parameterization: ``"cholesky"`` or ``"symmetric"``.

    Sites:
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown parameterization or a size below 1.

    Example:
        >>> model = Whitening(4, "symmetric")
        >>> x = torch.randn(500, 4) @ torch.randn(4, 4)
        >>> model.fit(x).whiten(x).T.cov().round(decimals=2).diagonal()
        tensor([1., 1., 1., 1.])
    """

    default_guide: ClassVar[str | None] = None

    def __init__(self, x_dim: int, parameterization: str = "cholesky") -> None:
        super().__init__()
        self.x_dim = x_dim
        self.loc = nn.Parameter(torch.zeros(x_dim))
        self.covariance = Covariance(x_dim, parameterization)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Data ``(B, D)``; None simulates.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The rows ``(B, D)``.

        Raises:
            ValueError: Where the data are no rows of this model; see :func:`zoo.rows.data_plate`.
        """
        with data_plate(x, size, index, event_shape=(self.x_dim,)):
            data: Tensor = pyro.sample("x", self.covariance(self.loc), obs=x)
            return data

    def whiten(self, x: Tensor) -> Tensor:
        """A^-1 (x - loc), ``(B, D)``: white where the model fits."""
        check_rows(x, event_shape=(self.x_dim,))
        return (x - self.loc.detach()) @ self.covariance.whitening.detach().mT

    def log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x), ``(B,)``."""
        check_rows(x, event_shape=(self.x_dim,))
        result: Tensor = self.covariance(self.loc).log_prob(x)
        return result

    @torch.no_grad()
    def fit(self, x: Tensor, epsilon: float = 0.0) -> Whitening:
        """Set the parameters to the maximum likelihood, in closed form.

        Args:
            x: Rows ``(N, D)``.
            epsilon: Added to the variance of every coordinate.

        Returns:
            The model itself.
        """
        check_rows(x, event_shape=(self.x_dim,))
        below = torch.tril_indices(self.x_dim, self.x_dim, -1).unbind()
        if self.covariance.parameterization == "cholesky":
            mean, weight = whitening_matrix(x, "cholesky", epsilon)
            scale = torch.linalg.inv(weight)
            self.covariance.log_scale.copy_(scale.diagonal().log())
        else:
            mean, weight = whitening_matrix(x, "zca", epsilon)
            values, vectors = torch.linalg.eigh(weight)
            scale = -(vectors * values.log()) @ vectors.mT  # the logarithm of A
            self.covariance.log_scale.copy_(scale.diagonal())
        if self.covariance.lateral is not None:
            self.covariance.lateral.copy_(scale[below])
        self.loc.copy_(mean)
        return self

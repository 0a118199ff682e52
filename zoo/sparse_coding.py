"""SparseCoding: data as sums of few basis vectors; noiseless and square, ICA."""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.model import Model
from zoo.rows import check_rows, data_plate

__all__ = ["PRIORS", "SparseCoding"]

PRIORS = ("laplace", "cauchy", "normal")


class SparseCoding(Model):
    """A linear model whose coefficients are sparse.

        z_k ~ Laplace(0, prior_scale)       or Cauchy, or Normal       k = 1 .. K
        x   ~ Normal(basis @ z, noise_scale)

    The columns of the basis have unit length: otherwise the basis grows and the coefficients
    shrink, and the prior says nothing. The MAP estimate under a Laplace prior is the lasso, under
    a Cauchy prior that of Olshausen and Field's penalty log(1 + z^2). A normal prior is the
    control: probabilistic PCA, whose basis is arbitrary within its subspace.

    Without noise and with as many basis vectors as dimensions it is independent component
    analysis, and the density of x is in closed form: see :meth:`noiseless_log_prob`.

    References:
        | Emergence of simple-cell receptive field properties by learning a sparse code for
        | natural images (Olshausen & Field, 1996) https://doi.org/10.1038/381607a0
        | An information-maximization approach to blind separation and blind deconvolution
        | (Bell & Sejnowski, 1995) https://doi.org/10.1162/neco.1995.7.6.1129

    Args:
        x_dim: Dimension D of a row.
        z_dim: Number K of basis vectors.
        prior: ``"laplace"``, ``"cauchy"`` or ``"normal"``.
        prior_scale: Scale of the coefficients.
        noise_scale: Standard deviation of the noise, fixed.

    Sites:
        z: Latent, support real, event shape ``(K,)``, in plate ``"data"``.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1, scales that are not positive, or an unknown prior.

    Example:
        >>> model = SparseCoding(x_dim=16, z_dim=32)
        >>> model(size=3).shape
        torch.Size([3, 16])
        >>> bool((model.basis.norm(dim=0) - 1).abs().max() < 1e-6)
        True
    """

    default_guide: ClassVar[str] = "amortized_normal"

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        prior: str = "laplace",
        prior_scale: float = 1.0,
        noise_scale: float = 0.3,
    ) -> None:
        super().__init__()
        if min(x_dim, z_dim) < 1:
            raise ValueError(f"x_dim and z_dim must be at least 1, got {x_dim} and {z_dim}.")
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}.")
        if min(prior_scale, noise_scale) <= 0:
            raise ValueError(
                f"prior_scale and noise_scale must be positive, got {prior_scale}, {noise_scale}. "
                "The noiseless case is noiseless_log_prob."
            )
        self.x_dim, self.z_dim, self.prior = x_dim, z_dim, prior
        self.directions = nn.Parameter(torch.randn(x_dim, z_dim))
        self.register_buffer("prior_loc", torch.zeros(z_dim), persistent=False)
        self.register_buffer(
            "prior_scale", torch.full((z_dim,), float(prior_scale)), persistent=False
        )
        self.register_buffer("noise_scale", torch.tensor(float(noise_scale)), persistent=False)

    @property
    def basis(self) -> Tensor:
        """The basis ``(D, K)``, columns of unit length."""
        return self.directions / self.directions.norm(dim=0)

    def coefficients(self) -> dist.TorchDistribution:
        """The prior, event shape ``(K,)``."""
        family = {"laplace": dist.Laplace, "cauchy": dist.Cauchy, "normal": dist.Normal}
        prior: dist.TorchDistribution
        prior = family[self.prior](self.prior_loc, self.prior_scale).to_event(1)
        return prior

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
            z = pyro.sample("z", self.coefficients())
            row = dist.Normal(z @ self.basis.mT, self.noise_scale).to_event(1)
            data: Tensor = pyro.sample("x", row, obs=x)
            return data

    def noiseless_log_prob(self, x: Tensor) -> Tensor:
        """Log p(x) as the noise goes to zero, ``(B,)``: independent component analysis.

            log p(x) = log p_z(basis^-1 x) - log |det basis|

        Args:
            x: Data ``(B, D)``.

        Raises:
            ValueError: Where the basis is not square.
        """
        if self.z_dim != self.x_dim:
            raise ValueError(
                f"The noiseless case needs as many basis vectors as dimensions, got {self.z_dim} "
                f"for {self.x_dim}: build the model with z_dim={self.x_dim}."
            )
        check_rows(x, event_shape=(self.x_dim,))
        basis = self.basis
        z = torch.linalg.solve(basis, x.mT).mT
        result: Tensor = self.coefficients().log_prob(z) - torch.linalg.slogdet(basis)[1]
        return result

    def gaussian_log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x) under the normal prior, ``(B,)``.

        Args:
            x: Data ``(B, D)``.

        Raises:
            ValueError: Under another prior, whose evidence has no closed form.
        """
        if self.prior != "normal":
            raise ValueError(
                f"The evidence has a closed form under prior='normal' only, not {self.prior!r}: "
                "use guides.diagnostics.log_evidence."
            )
        check_rows(x, event_shape=(self.x_dim,))
        scaled = self.basis * self.prior_scale
        noise = self.noise_scale.square() * torch.eye(self.x_dim).to(scaled)
        factor = torch.linalg.cholesky(scaled @ scaled.mT + noise)
        white = torch.linalg.solve_triangular(factor, x.mT, upper=False)
        constant = 0.5 * self.x_dim * math.log(2 * math.pi)
        return -0.5 * white.square().sum(0) - factor.diagonal().log().sum() - constant

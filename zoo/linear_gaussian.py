"""LinearGaussian: a chain of linear maps with Gaussian noise, whose posterior is known exactly.

It is in the zoo as the oracle: whatever infers can be held against ``posterior`` and
``log_evidence``. Factor analysis and probabilistic PCA are special cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.model import Model, latent_names
from zoo.rows import check_rows, data_plate

__all__ = ["COVARIANCES", "LinearGaussian", "LinearLevel"]

COVARIANCES = ("full", "diagonal", "isotropic", "unit")


class LinearLevel(nn.Module):
    """One variable of the chain, given the one above it.

        v ~ Normal(weight @ parent + bias, S)          S = scale_tril @ scale_tril.T

    Args:
        dim: Dimension of the variable.
        parent_dim: Dimension of the one above; 0 for the top.
        covariance: ``"full"``, ``"diagonal"``, ``"isotropic"`` or ``"unit"`` (the identity).
        bias: Whether there is a bias; without, the top has mean zero.
    """

    zeros: Tensor

    def __init__(self, dim: int, parent_dim: int, covariance: str, bias: bool) -> None:
        super().__init__()
        self.dim = dim
        self.covariance = covariance
        # Scales near 1 and maps of norm near 1 keep the joint covariance well-conditioned.
        num_scales = {"full": dim, "diagonal": dim, "isotropic": 1, "unit": 0}[covariance]
        num_lower = dim * (dim - 1) // 2 if covariance == "full" else 0
        weight = torch.randn(dim, parent_dim) / max(parent_dim, 1) ** 0.5
        log_scale = 0.5 * torch.rand(num_scales) - 0.5
        lower = 0.4 * torch.randn(num_lower) / dim**0.5
        self.weight = nn.Parameter(weight) if parent_dim else None
        self.bias = nn.Parameter(torch.randn(dim)) if bias else None
        self.log_scale = nn.Parameter(log_scale) if num_scales else None
        self.lower = nn.Parameter(lower) if num_lower else None
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    @property
    def scale(self) -> Tensor:
        """The diagonal of ``scale_tril``, ``(dim,)``."""
        if self.log_scale is None:
            return torch.ones_like(self.zeros)
        return self.log_scale.exp().expand(self.dim)

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factor of the covariance, ``(dim, dim)``."""
        diagonal = torch.diag(self.scale)
        if self.lower is None:
            return diagonal
        below = tuple(torch.tril_indices(self.dim, self.dim, -1, device=self.lower.device))
        return diagonal.index_put(below, self.lower)

    def loc(self, parent: Tensor | None) -> Tensor:
        """The mean given the variable above, ``(..., dim)``; ``(dim,)`` for the top."""
        bias = self.zeros if self.bias is None else self.bias
        if parent is None or self.weight is None:
            return bias
        return F.linear(parent, self.weight, bias)

    def forward(self, parent: Tensor | None) -> dist.TorchDistribution:
        """The conditional distribution, event shape ``(dim,)``.

        Args:
            parent: Values of the variable above ``(..., parent_dim)``; None for the top.
        """
        if self.covariance == "full":
            return dist.MultivariateNormal(self.loc(parent), scale_tril=self.scale_tril)
        factors: dist.TorchDistribution
        factors = dist.Normal(self.loc(parent), self.scale).to_event(1)
        return factors


class LinearGaussian(Model):
    """A linear Gaussian chain of any depth, with its exact posterior and evidence.

        z_L     ~ Normal(m, S_L)
        z_{l-1} ~ Normal(W_l z_l + b_l, S_{l-1})            l = L .. 2
        x       ~ Normal(W_1 z_1 + b_1, S_0)

    Options give its special cases: ``covariance=("unit", "diagonal"), bias=(False, True)`` at
    depth one is factor analysis, ``("unit", "isotropic")`` probabilistic PCA.

    References:
        | A unifying review of linear Gaussian models (Roweis & Ghahramani, 1999)
        | https://doi.org/10.1162/089976699300016674
        | Probabilistic principal component analysis (Tipping & Bishop, 1999)
        | https://doi.org/10.1111/1467-9868.00196

    Args:
        dims: Dimensions of all variables, from the top latent to the data.
        covariance: Of each variable given the one above: ``"full"``, ``"diagonal"``,
            ``"isotropic"`` or ``"unit"``; one for all, or one a variable, in the order of
            ``dims``.
        bias: Whether means have a bias, which for the top is its mean; one for all, or one a
            variable.

    Sites:
        z1 .. zL: Latents, support real, event shape ``(dim,)``, in plate ``"data"``; z1 is
            nearest the data; ``z`` where there is only one.
        x: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: If ``dims`` names fewer than two variables, or an option fits none.

    Example:
        >>> model = LinearGaussian(dims=(2, 3, 5))
        >>> x = model(size=4)
        >>> model.posterior(x)
        MultivariateNormal(loc: torch.Size([4, 5]), precision_matrix: torch.Size([4, 5, 5]))
        >>> model.log_evidence(x).shape
        torch.Size([4])
        >>> {name: value.shape[-1] for name, value in model.split(model.posterior(x).mean).items()}
        {'z2': 2, 'z1': 3}
    """

    def __init__(
        self,
        dims: Sequence[int] = (2, 3, 5),
        covariance: str | Sequence[str] = "full",
        bias: bool | Sequence[bool] = True,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        if len(self.dims) < 2 or min(self.dims) < 1:
            raise ValueError(
                f"dims must name at least one latent and the data, top first, got {self.dims}: "
                "for example dims=(2, 5)."
            )
        number = len(self.dims)
        kinds = (covariance,) * number if isinstance(covariance, str) else tuple(covariance)
        biases = (bias,) * number if isinstance(bias, bool) else tuple(bias)
        for option, given in (("covariance", kinds), ("bias", biases)):
            if len(given) != number:
                raise ValueError(
                    f"{option} must be one value, or one for each of the {number} variables of "
                    f"dims={self.dims}, got {len(given)}."
                )
        unknown = [kind for kind in kinds if kind not in COVARIANCES]
        if unknown:
            raise ValueError(
                f"covariance must be one of {', '.join(COVARIANCES)}, got {unknown[0]!r}."
            )
        above = (0, *self.dims)
        self.levels = nn.ModuleList(
            LinearLevel(*options) for options in zip(self.dims, above, kinds, biases, strict=False)
        )

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent sites, top first."""
        return latent_names(len(self.dims) - 1)

    @property
    def x_dim(self) -> int:
        """Dimension D of a row."""
        return self.dims[-1]

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
        *latent_levels, data_level = self._chain
        with data_plate(x, size, index, event_shape=(self.x_dim,)):
            value = None
            for name, level in zip(self.latents, latent_levels, strict=True):
                value = pyro.sample(name, level(value))
            data: Tensor = pyro.sample("x", data_level(value), obs=x)
            return data

    def posterior(self, x: Tensor) -> torch.distributions.MultivariateNormal:
        """The exact p(z_L, .., z_1 | x), a normal batch ``(B,)`` over all latents, top first.

        Args:
            x: Data ``(B, D)``.
        """
        mean, precision, _ = self._condition(x)
        return torch.distributions.MultivariateNormal(
            mean, precision_matrix=precision.expand(len(mean), -1, -1)
        )

    def log_evidence(self, x: Tensor) -> Tensor:
        """The exact log p(x), ``(B,)``.

        Args:
            x: Data ``(B, D)``.
        """
        # log p(x) = log p(x, z) - log p(z | x) at any z: here at the posterior mean.
        _, precision, errors = self._condition(x)
        log_scales = torch.cat([level.scale.log() for level in self._chain]).sum()
        log_scales = log_scales + torch.linalg.cholesky(precision).diagonal().log().sum()
        constant = 0.5 * self.x_dim * math.log(2 * math.pi)
        result: Tensor = -0.5 * errors.square().sum(-1) - log_scales - constant
        return result

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Cut concatenated latents ``(..., sum of dims)``, top first, into sites."""
        parts = torch.split(values, list(self.dims[:-1]), -1)
        return dict(zip(self.latents, parts, strict=True))

    @property
    def _chain(self) -> list[LinearLevel]:
        return cast("list[LinearLevel]", list(self.levels))

    def _condition(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior mean ``(B, K)``, precision ``(K, K)``, whitened errors at the mean.

        Whitened errors are linear in the latents, ``errors = target - design @ z``, and their
        squared norm is -2 log p(x, z) up to a constant: the posterior is that of least squares.
        """
        check_rows(x, event_shape=(self.x_dim,))
        total = sum(self.dims[:-1])
        designs, targets = [], []
        end = 0
        for position, level in enumerate(self._chain):
            observed = position == len(self.dims) - 1
            parts: list[Tensor] = [] if level.weight is None else [level.weight]
            parts += [] if observed else [-torch.eye(level.dim).to(level.zeros)]
            block = torch.cat(parts, -1)
            end += 0 if observed else level.dim
            design = F.pad(block, (end - block.shape[1], total - end))
            target = (x if observed else torch.zeros_like(x[:, :1])) - level.loc(None)
            both = torch.cat([design, target.expand(len(x), -1).mT], -1)
            whitened = torch.linalg.solve_triangular(level.scale_tril, both, upper=False)
            designs.append(whitened[:, :total])
            targets.append(whitened[:, total:])
        design, target = torch.cat(designs), torch.cat(targets)  # (K + D, K), (K + D, B)
        precision = design.mT @ design
        mean = torch.cholesky_solve(design.mT @ target, torch.linalg.cholesky(precision))
        return mean.mT, precision, (target - design @ mean).mT

"""The contract of a family: parameters of one datum to a distribution over its packed latents.

A family is a pure map from parameters and noise to draws with their log density,

    noise ~ base          (*S, ..., noise_size)
    u, log_q = push(lam, noise)

so that refinement can differentiate a bound at fixed noise, under any ``torch.func`` transform.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

__all__ = [
    "Family",
    "PushedDistribution",
    "inverse_positive",
    "inverse_softplus",
    "limited",
    "positive",
    "standard_normal_log_prob",
]

_FLOOR = 1e-8


class Family(nn.Module, abc.ABC):
    """q(u; lam) over packed, unconstrained latents u of length K.

    A family may have weights of its own (a flow's networks), shared by all rows; what belongs to
    one row is its parameter vector ``lam`` of length :attr:`num_params`.

    Args:
        size: Length K of the packed latents.
    """

    has_density: bool = True
    """Whether ``log_prob`` is a density; False for a point mass."""

    scores_external_points: bool = True
    """Whether ``log_prob`` can be evaluated at points that the family did not draw."""

    path_gradient: bool = False
    """Whether ``log_prob`` is cheap and smooth enough for path ("sticking the landing") gradients
    in refinement."""

    symmetric_noise: bool = True
    """Whether noise and minus the noise have one law, so that draws may come in such pairs."""

    has_scale: bool = False
    """Whether the parameters begin with location and raw scale, ``[loc (K), raw (K), ...]``."""

    twice_differentiable: bool = True
    """Whether second derivatives of ``push`` are right (backpropagation through inner steps)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        self.size = size

    @property
    @abc.abstractmethod
    def num_params(self) -> int:
        """Length P of the parameter vector of one row."""

    @abc.abstractmethod
    def init(self, loc: Tensor) -> Tensor:
        """Parameters ``(..., P)`` of a narrow q around ``loc`` of shape ``(..., K)``."""

    @property
    def noise_size(self) -> int:
        """Length of the noise vector behind one draw."""
        return self.size

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Base noise ``(*shape, noise_size)`` with the dtype and device of ``like``."""
        return torch.randn(*shape, self.noise_size, dtype=like.dtype, device=like.device)

    @abc.abstractmethod
    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws and their log density, a pure and differentiable function.

        Args:
            lam: Parameters ``(..., P)``.
            noise: Base noise ``(*S, ..., noise_size)``; broadcasts with ``lam``.

        Returns:
            Draws ``(*S, ..., K)`` and log densities ``(*S, ...)``.
        """

    def forward(self, method: str, *args: Any) -> Any:
        """Call a method by name, so that ``torch.func.functional_call`` can replace weights."""
        return getattr(self, method)(*args)

    def distribution(self, lam: Tensor) -> TorchDistribution:
        """The distribution: batch shape ``lam.shape[:-1]``, event shape ``(K,)``."""
        return PushedDistribution(self, lam)

    def location(self, lam: Tensor) -> Tensor:
        """Its location parameter ``(..., K)``: the point that stands for q where one is needed.

        Every parameter vector begins with it. It is mean and median of q where q is symmetric
        around it, as Gaussians are; a flow or a mixture bends around it, so that it is neither.
        """
        return lam[..., : self.size]

    def moved(self, lam: Tensor, loc: Tensor) -> Tensor:
        """The parameters with another location ``(..., K)`` and everything else kept."""
        return torch.cat([loc, lam[..., self.size :]], -1)

    def natural(
        self, lam: Tensor, gradient: Tensor, limit: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Precondition a gradient by the Fisher information of q, coordinate by coordinate.

        With location and scale the information is 1 / scale^2 and 2 (d scale / d raw / scale)^2;
        a constant stands for that of other parameters, which have no unit. It makes steps
        independent of the units of the latents. A family without scale is left as it is.

        Args:
            lam: Parameters ``(..., P)``.
            gradient: Gradient in them ``(..., P)``.
            limit: Largest absolute value of a coordinate of the whitened gradient: a trust
                region of so many standard deviations of q. None for none.

        Returns:
            The direction ``F^-1 g`` and the whitened gradient ``F^-1/2 g``, both ``(..., P)``.
        """
        root = self.root(lam)
        whitened = limited(root * gradient, limit)
        return root * whitened, whitened

    def root(self, lam: Tensor) -> Tensor:
        """How far one unit goes in each parameter, ``F^-1/2`` of its diagonal, ``(..., P)``."""
        if not self.has_scale:
            return torch.ones_like(lam)
        size = self.size
        raw = lam[..., size : 2 * size]
        scale = positive(raw)
        relative = scale / torch.sigmoid(raw) / math.sqrt(2)
        # What bends the family has no unit; its information is of the order of ten.
        rest = torch.full_like(lam[..., 2 * size :], 0.3)
        return torch.cat([scale, relative, rest], -1)

    def rsample_and_log_prob(
        self, lam: Tensor, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Reparameterized draws and their log density, ``(*S, ..., K)`` and ``(*S, ...)``."""
        return self.push(lam, self.noise((*sample_shape, *lam.shape[:-1]), lam))

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density ``(...)`` of points ``(..., K)``.

        Raises:
            NotImplementedError: Where the family cannot score points that it did not draw.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot score points that it did not draw itself."
        )

    def entropy(self, lam: Tensor) -> Tensor | None:
        """Entropy ``(...)`` in closed form, None where there is none."""
        return None

    def of_gaussian(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """The parameters ``(..., P)`` that stand for a Gaussian, as Laplace refinement finds it.

        Args:
            loc: Mean ``(..., K)``.
            scale_tril: Cholesky factor ``(..., K, K)`` of the covariance.

        Raises:
            NotImplementedError: Where the family holds no Gaussian in closed form.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no parameters for a given Gaussian. Laplace refinement "
            "works with delta, normal, multivariate_normal, lateral_cholesky and "
            "lateral_symmetric."
        )


class PushedDistribution(TorchDistribution):
    """The distribution of a family at given parameters, expandable to plates.

    It remembers the density of its last draws: scoring them needs no inverse pass and has no
    rounding of one.

    Args:
        family: The family.
        lam: Its parameters ``(..., P)``.
        batch_shape: Batch shape where it is expanded.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, family: Family, lam: Tensor, batch_shape: torch.Size | None = None) -> None:
        self.family = family
        self.lam = lam
        self.drawn: tuple[Tensor, Tensor] | None = None
        batch_shape = lam.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(batch_shape, torch.Size([family.size]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PushedDistribution:
        """The same distribution with more rows."""
        return PushedDistribution(self.family, self.lam, torch.Size(batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterized draws."""
        shape = (*sample_shape, *self.batch_shape)
        self.drawn = self.family.push(self.lam, self.family.noise(shape, self.lam))
        return self.drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, of own draws without an inverse pass."""
        if self.drawn is not None and self.drawn[0] is value:
            return self.drawn[1]
        return self.family.log_prob(self.lam, value)

    def entropy(self) -> Tensor:
        """Entropy in closed form."""
        found = self.family.entropy(self.lam)
        if found is None:
            raise NotImplementedError(f"{type(self.family).__name__} has no closed-form entropy.")
        return found


def standard_normal_log_prob(e: Tensor) -> Tensor:
    """Log density of standard Gaussian noise, summed over the last dimension."""
    return -0.5 * e.square().sum(-1) - 0.5 * e.shape[-1] * math.log(2 * math.pi)


def positive(raw: Tensor) -> Tensor:
    """The map from unconstrained parameters to scales: softplus, which grows only linearly.

    The floor keeps a scale from rounding to zero, where a density no longer exists.
    """
    return nn.functional.softplus(raw) + _FLOOR


def limited(value: Tensor, limit: float | None) -> Tensor:
    """Values cut off at ``-limit`` and ``limit``."""
    return value if limit is None else value.clamp(-limit, limit)


def inverse_positive(scale: Tensor) -> Tensor:
    """The raw parameters of given scales, inverse of :func:`positive`."""
    above = (scale - _FLOOR).clamp_min(torch.finfo(scale.dtype).tiny)
    return above + torch.log(-torch.expm1(-above))


def inverse_softplus(value: float) -> float:
    """The raw parameter of a scale."""
    if not value > 0:
        raise ValueError(f"init_scale must be positive, got {value}.")
    return value + math.log(-math.expm1(-value))

"""A guide from particles: Gaussian kernels around them that keep their mean and covariance.

    q(u_n) = sum_k W_nk Normal(u; a u_nk + (1 - a) m_n, h^2 S_n)         a = sqrt(1 - h^2)

with m_n and S_n the weighted mean and covariance of row n's particles. The mixture has exactly
that mean and covariance at every bandwidth: towards h = 1 it is their moment-matched Gaussian,
towards h = 0 the particles themselves. By default h is Silverman's,
(4 / (ESS (d + 2)))^(1 / (d + 4)). Groups are independent of one another.

References:
    | Combined Parameter and State Estimation in Simulation-Based Filtering (Liu & West, 2001)
    | https://doi.org/10.1007/978-1-4757-3437-9_10
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.guide import ProgramGuide
from guides.inference.particle_density import Particles
from guides.layout import Layout
from guides.schemes.scheme import Call
from guides.sites import Group, Plate

__all__ = ["ParticleGuide"]

_FULL = 5  # particles a coordinate from which a full covariance is taken


class _Kernels(dist.TorchDistribution):
    """Gaussian kernels of one covariance a row: distances are taken in its whitened space.

    Args:
        points: ``batch + (K, d)``.
        weights: ``batch + (K,)``.
        tril: ``batch + (d, d)``; or standard deviations ``batch + (d,)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector

    def __init__(self, points: Tensor, weights: Tensor, tril: Tensor) -> None:
        self.points, self.weights, self.tril = points, weights, tril
        self.full = tril.dim() == points.dim()
        super().__init__(weights.shape[:-1], points.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Kernels:
        parts = (self.points, self.weights, self.tril)
        own = len(self.batch_shape)
        return _Kernels(*(part.expand(*batch_shape, *part.shape[own:]) for part in parts))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            index = dist.Categorical(self.weights).sample(torch.Size(sample_shape))[
                ..., None, None
            ]
            points = self.points.expand(*index.shape[:-2], *self.points.shape[-2:])
            loc = points.gather(-2, index.expand(*index.shape[:-1], points.shape[-1])).squeeze(-2)
            noise = torch.randn_like(loc)
            if self.full:
                return loc + (self.tril @ noise.unsqueeze(-1)).squeeze(-1)
            return loc + self.tril * noise

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws without gradient: the guide has no parameters that could want one."""
        return self.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        center = self.points.mean(-2)
        points = self._white(self.points - center.unsqueeze(-2))  # (..., K, d)
        given = self._white((value - center).unsqueeze(-2))  # (..., 1, d)
        cross = (given @ points.mT).squeeze(-2)  # (..., K)
        squares = given.square().sum(-1) + points.square().sum(-1) - 2 * cross
        scale = self.tril.diagonal(dim1=-2, dim2=-1) if self.full else self.tril
        constant = scale.log().sum(-1) + 0.5 * scale.shape[-1] * math.log(2 * math.pi)
        return (self.weights.log() - 0.5 * squares).logsumexp(-1) - constant

    def _white(self, value: Tensor) -> Tensor:
        if not self.full:
            return value / self.tril.unsqueeze(-2)
        return torch.linalg.solve_triangular(self.tril.mT, value, upper=True, left=False)


class ParticleGuide(ProgramGuide):
    """Gaussian kernels around particles, as a guide; fixed numbers, no parameters.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide in Pyro's store.
    """

    def set(
        self,
        read: Layout,
        particles: Particles,
        log_weights: Tensor,
        *,
        bandwidth: float | None = None,
    ) -> None:
        """Take the particles of a call.

        Args:
            read: The layout of the call.
            particles: By site, packed and unconstrained, ``(K, B, d)`` or ``(K, d)``.
            log_weights: ``(K, B)``, or ``(K, 1)`` where they are joint.
            bandwidth: h between 0 and 1; Silverman's by default.
        """
        self.plate = read.data_plate
        self.kernels: dict[str, str] = {}
        for group in read.groups:
            points = torch.cat([particles[site.name] for site in group.sites], -1).movedim(0, -2)
            weights = log_weights.softmax(0).T  # (U, K)
            if group.plate is None:
                weights = weights[0]
            else:
                weights = weights.expand(group.plate.num_rows, -1)
            self._set_group(group.name, points, weights, bandwidth)

    def _set_group(
        self, name: str, points: Tensor, weights: Tensor, bandwidth: float | None
    ) -> None:
        num, size = points.shape[-2:]
        effective = 1 / weights.square().sum(-1)  # (B,)
        mean = (weights.unsqueeze(-1) * points).sum(-2, keepdim=True)
        centered = points - mean
        # Unbiased for weighted draws; a single effective draw has no spread to speak of.
        correction = 1 / (1 - 1 / effective).clamp_min(1e-3)
        variance = (weights.unsqueeze(-1) * centered.square()).sum(-2)
        variance = (variance * correction.unsqueeze(-1)).clamp_min(1e-12)
        if bandwidth is None:
            h = (4 / (effective * (size + 2))) ** (1 / (size + 4))
        else:
            h = torch.full_like(effective, bandwidth)
        h = h.clamp(1e-3, 1.0)[..., None]
        shrunk = mean + (1 - h.square()).sqrt().unsqueeze(-1) * centered
        full = num >= _FULL * size
        if full:
            outer = torch.einsum("...k,...kd,...ke->...de", weights, centered, centered)
            outer = outer * correction[..., None, None]
            jitter = 1e-6 * torch.diag_embed(variance)
            kernel = h.unsqueeze(-1) * torch.linalg.cholesky(outer + jitter)
        else:
            kernel = h * variance.sqrt()
        self.kernels[name] = "full" if full else "diagonal"
        self.register_buffer(f"points_{name}", shrunk)
        self.register_buffer(f"weights_{name}", weights)
        self.register_buffer(f"kernel_{name}", kernel)
        self.register_buffer(f"mean_{name}", mean.squeeze(-2))

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """The mixture of a group."""
        points = getattr(self, f"points_{group.name}")
        weights = getattr(self, f"weights_{group.name}")
        kernel = getattr(self, f"kernel_{group.name}")
        if group.plate is not None:
            rows = self._rows(group.plate)
            ones = (1,) * (-group.plate.dim - 1)

            def placed(value: Tensor) -> Tensor:
                value = value[rows]
                return value.reshape(value.shape[0], *ones, *value.shape[1:])

            points, weights, kernel = placed(points), placed(weights), placed(kernel)
        return _Kernels(points, weights, kernel)

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The weighted mean of the particles."""
        mean: Tensor = getattr(self, f"mean_{group.name}")
        return mean if group.plate is None else mean[self._rows(group.plate)]

    def _rows(self, plate: Plate) -> Tensor | slice:
        """Positions of the call's rows among the rows of the guide."""
        own: Any = self.plate
        if plate.size != own.size:
            raise ValueError(
                f"This particle posterior is for {own.num_rows} of {own.size} rows, but plate "
                f"{plate.name!r} has size {plate.size}. Build a posterior for these rows."
            )
        if plate.index is None and own.index is None:
            return slice(None)
        built = torch.arange(own.size) if own.index is None else own.index.cpu()
        asked = torch.arange(plate.size) if plate.index is None else plate.index.cpu()
        position = torch.full((own.size,), -1)
        position[built] = torch.arange(len(built))
        rows = position[asked]
        if (rows < 0).any():
            raise ValueError(
                f"This particle posterior does not cover rows {asked[rows < 0][:5].tolist()}. "
                "Build a posterior for these rows."
            )
        return rows

    def __repr__(self) -> str:
        """Which kernels stand for the particles of which group."""
        parts = ", ".join(
            f"{name}: {getattr(self, f'points_{name}').shape[-2]} Gaussian kernels, {kind} "
            "covariance"
            for name, kind in self.kernels.items()
        )
        return f"ParticleGuide({parts}; mean and covariance are those of the particles)"

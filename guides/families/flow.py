"""The contract of a flow: an invertible map over any base, between location and scale."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from guides.families.base import Base, StandardNormal, base_family
from guides.families.family import Family, inverse_softplus, positive

__all__ = ["Flow", "SteppedFlow", "directions"]


class Flow(Family):
    """An invertible map from a base family to the latents.

        loc, raw, flow, base = split(lam)
        e ~ base family(base)                     Normal(0, I) by default
        u = loc + softplus(raw) * y(e; flow)
        log q(u) = log base(e) - log |det dy/de| - sum_k log softplus(raw_k)

    Location and scale act last, so the map works in standardized coordinates, wherever the
    posterior lies and however narrow it is. A subclass says what the map is.

    Args:
        size: Length K of the packed latents.
        start: The map's parameters of one datum at the start, ``(F,)``.
        init_scale: Standard deviation at the start.
        base: See :func:`guides.families.base.base_family`.
    """

    volume_preserving: bool = False
    """Whether the map has log-determinant zero for every parameter."""

    start: Tensor

    has_scale = True

    def __init__(self, size: int, start: Tensor, *, init_scale: float, base: Base) -> None:
        super().__init__(size)
        self.raw_scale = inverse_softplus(init_scale)
        self.base = base_family(base, size)
        self.register_buffer("start", start.to(torch.get_default_dtype()), persistent=False)
        self.scores_external_points = self.scores_external_points and bool(
            self.base.scores_external_points
        )
        self.twice_differentiable = self.twice_differentiable and bool(
            self.base.twice_differentiable
        )

    @abc.abstractmethod
    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The map and the logarithm of its determinant.

        Args:
            flow: The map's parameters ``(..., F)``.
            e: Points of the base ``(*S, ..., K)``.

        Returns:
            Points ``y`` ``(*S, ..., K)`` and log-determinants ``(*S, ...)``.
        """

    @abc.abstractmethod
    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The point ``e`` behind ``y``, and the log-determinant of ``transform`` at ``e``."""

    @property
    def num_params(self) -> int:
        """2 K, the map's parameters, and the base's."""
        return 2 * self.size + len(self.start) + self.base.num_params

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale``, the map near the identity."""
        start = self.start.to(loc).expand(*loc.shape[:-1], len(self.start))
        base = self.base.init(torch.zeros_like(loc))
        return torch.cat([loc, torch.full_like(loc, self.raw_scale), start, base], -1)

    @property
    def noise_size(self) -> int:
        """That of the base."""
        return self.base.noise_size

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Noise of the base."""
        return self.base.noise(shape, like)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Through the base and the map, then to location and scale."""
        loc, raw, flow, base = self.split(lam)
        e, log_q = self.base.push(base, noise)
        centered, log_det = self.outward(raw, flow, e)
        return loc + centered, log_q - log_det

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points, by the inverse map.

        Raises:
            NotImplementedError: Where the base cannot score points that it did not draw.
        """
        loc, raw, flow, base = self.split(lam)
        e, log_det = self.inward(raw, flow, value - loc)
        return self.base.log_prob(base, e) - log_det

    def entropy(self, lam: Tensor) -> Tensor | None:
        """The base's entropy and the scales', where the map preserves volumes; None otherwise."""
        _, raw, _, base = self.split(lam)
        entropy = self.base.entropy(base) if self.volume_preserving else None
        return None if entropy is None else entropy + positive(raw).log().sum(-1)

    def split(self, lam: Tensor) -> list[Tensor]:
        """Location, raw scale, the map's parameters, and the base's."""
        sizes = [self.size, self.size, len(self.start), self.base.num_params]
        return list(lam.split(sizes, -1))

    def outward(self, raw: Tensor, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """``u - loc`` and the log-determinant of everything; scales come after the map."""
        scale = positive(raw)
        y, log_det = self.transform(flow, e)
        return scale * y, log_det + scale.log().sum(-1)

    def inward(self, raw: Tensor, flow: Tensor, centered: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`outward`, with the log-determinant of ``outward``."""
        scale = positive(raw)
        e, log_det = self.inverse(flow, centered / scale)
        return e, log_det + scale.log().sum(-1)

    def _needs_normal_base(self) -> None:
        if not isinstance(self.base, StandardNormal):
            raise NotImplementedError(
                f"{type(self).__name__} over a {type(self.base).__name__} base has no parameters "
                "for a given Gaussian. Use base=None."
            )


class SteppedFlow(Flow):
    """A flow of T like steps, each with parameters of the datum's own.

        z_0 = e;  z_t = step(z_{t-1}; flow_t);  y = z_T

    Args:
        size: Length K of the packed latents.
        start: The steps' parameters of one datum at the start, ``(T, F / T)``.
        init_scale: Standard deviation at the start.
        base: See :func:`guides.families.base.base_family`.
    """

    def __init__(self, size: int, start: Tensor, *, init_scale: float, base: Base) -> None:
        if len(start) < 1:
            raise ValueError(f"transforms must be at least 1, got {len(start)}.")
        super().__init__(size, start.flatten(), init_scale=init_scale, base=base)
        self.transforms = len(start)

    @abc.abstractmethod
    def step(self, parameters: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """One step, ``(*S, ..., K)`` and its log-determinant ``(*S, ...)``."""

    @abc.abstractmethod
    def step_inverse(self, parameters: Tensor, y: Tensor) -> Tensor:
        """The point that ``step`` takes to ``y``."""

    def transform(self, flow: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The steps in turn."""
        log_det = torch.zeros_like(e[..., 0])
        for parameters in self._steps(flow):
            e, more = self.step(parameters, e)
            log_det = log_det + more
        return e, log_det

    def inverse(self, flow: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The steps' inverses in reverse."""
        log_det = torch.zeros_like(y[..., 0])
        for parameters in reversed(self._steps(flow)):
            y = self.step_inverse(parameters, y)
            log_det = log_det + self.step(parameters, y)[1]
        return y, log_det

    def _steps(self, flow: Tensor) -> list[Tensor]:
        return list(flow.unflatten(-1, (self.transforms, -1)).unbind(-2))


def directions(number: int, size: int) -> Tensor:
    """Fixed random vectors ``(number, size)`` of length about one, where a flow starts.

    Steps that start equal would have equal gradients and never part.
    """
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(number, size, generator=generator, dtype=torch.float64)
    return vectors / size**0.5

"""SplineCoupling: a rational-quadratic coupling flow with shared weights and a per-datum base."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from guides.families.base import Base
from guides.families.coupling import CouplingFlow
from guides.families.zuko_parts import MonotonicRQSTransform

__all__ = ["SplineCoupling"]


class SplineCoupling(CouplingFlow):
    """A neural spline flow in standardized coordinates; splines from Zuko.

        loc, raw, context, base = split(lam)
        e ~ Normal(0, I)
        u = loc + softplus(raw) * spline_T(... spline_1(e; context) ...; context)

    The weights of the splines are shared by all rows; each row has its own base and a context
    that bends the flow. Location and scale act after the splines, so that the spline's box
    (``|e| < 5``) sits on the posterior wherever it lies. Weights start near the identity, so
    training starts at the mean-field Gaussian. With K = 1 the splines are conditioned on the
    context alone.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number of coupling layers; the masks alternate.
        bins: Bins of each spline.
        hidden: Widths of the hidden layers of the coupling networks.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1, ``bins`` below 2 or ``context`` below 0.

    Example:
        >>> import torch
        >>> family = SplineCoupling(3)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    has_scale = True

    def __init__(
        self,
        size: int,
        *,
        context: int = 8,
        transforms: int = 4,
        bins: int = 8,
        hidden: Sequence[int] = (64,),
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins}.")
        super().__init__(
            size,
            context=context,
            transforms=transforms,
            hidden=hidden,
            total=3 * bins - 1,
            init_scale=init_scale,
            base=base,
        )
        self.bins = bins

    def univariate(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """A spline inside the box, the identity outside."""
        return self._spline(phi).call_and_ladj(x)

    def univariate_inverse(self, number: int, phi: Tensor, y: Tensor) -> Tensor:
        """In closed form, by a quadratic equation."""
        return self._spline(phi).inv(y)

    def _spline(self, phi: Tensor) -> MonotonicRQSTransform:
        return MonotonicRQSTransform(*phi.split([self.bins, self.bins, self.bins - 1], -1))

"""AffineCoupling: each half shifted and scaled by a network of the other half."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from guides.families.base import Base
from guides.families.coupling import CouplingFlow
from guides.families.zuko_parts import MonotonicAffineTransform

__all__ = ["AffineCoupling"]


class AffineCoupling(CouplingFlow):
    """A flow of affine coupling steps (RealNVP) in standardized coordinates.

        loc, raw, context, base = split(lam)
        e ~ Normal(0, I)
        y_a = z_a;  y_b = exp(s) z_b + t          s, t = network(z_a, context)
        u = loc + softplus(raw) * y

    Log scales are bounded by ``|s| < 6.9``, as in Zuko. Weights are shared by all rows and start
    near the identity, so training starts at the mean-field Gaussian. Both directions take one
    pass. With K = 1 a step is a shift and a scale by the context, and q stays as the base is.

    References:
        | Density estimation using Real NVP (Dinh, Sohl-Dickstein & Bengio, 2017)
        | https://arxiv.org/abs/1605.08803

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number of coupling layers; the masks alternate.
        hidden: Widths of the hidden layers of the coupling networks.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1 or ``context`` below 0.

    Example:
        >>> import torch
        >>> family = AffineCoupling(3)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        size: int,
        *,
        context: int = 8,
        transforms: int = 4,
        hidden: Sequence[int] = (64,),
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        super().__init__(
            size,
            context=context,
            transforms=transforms,
            hidden=hidden,
            total=2,
            init_scale=init_scale,
            base=base,
        )

    def univariate(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``exp(s) x + t``."""
        affine = MonotonicAffineTransform(*phi.unbind(-1))
        y = affine(x)
        return y, affine.log_abs_det_jacobian(y, y)

    def univariate_inverse(self, number: int, phi: Tensor, y: Tensor) -> Tensor:
        """``exp(-s) (y - t)``."""
        return MonotonicAffineTransform(*phi.unbind(-1)).inv(y)

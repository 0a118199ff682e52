"""Monotone: every coordinate through the integral of a positive network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from guides.families.autoregressive import AutoregressiveFlow
from guides.families.base import Base
from guides.families.conditioned import small_last_layer
from guides.families.roots import increasing_root

__all__ = ["Monotone"]

_BOUND = 5.0
_BOX = 6.0


class Monotone(AutoregressiveFlow):
    """A flow of unconstrained monotone networks (UNAF) in standardized coordinates.

        loc, raw, context, base = split(lam)
        e ~ Normal(0, I)
        shift, signal = MADE(z_<i, context)
        log g(t) = 5 tanh(network(t, signal) / 5) (1 - (t / 6)^2)^2        zero for |t| > 6
        y_i = shift + integral of g from 0 to z_i
        u   = loc + softplus(raw) * y

    Any smooth increasing function can be approached inside the box ``|z| < 6``; outside it the
    map is a shift. Zuko's transform of this kind is not used because its integral can be
    differentiated once only, and not under ``torch.func``.

    **Accuracy.** The integral is a Gauss-Legendre sum, the log-determinant that of the exact
    integral, so the density is off by the error of the sum. Networks are smooth (tanh) and the
    box is bounded, so it falls geometrically with ``points``: with 32 and weights of the usual
    size it is below 1e-8, with weights twice that size 1e-4, and 1e-8 again with 64.

    Weights are shared by all rows and start near the identity, so training starts at the
    mean-field Gaussian. Points that were not drawn are scored by finding K roots a step. With
    K = 1 the networks are conditioned on the context alone.

    References:
        | Unconstrained monotonic neural networks (Wehenkel & Louppe, 2019)
        | https://arxiv.org/abs/1908.05164

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number T of steps.
        signal: Numbers that a coordinate's function receives from those before it.
        points: Nodes of the integral.
        hidden: Widths of the hidden layers of the masked networks, and of the integrand's.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms``, ``signal`` or ``points`` is below 1, or ``context`` below 0.

    Example:
        >>> family = Monotone(3, transforms=1)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    nodes: Tensor
    weights: Tensor

    def __init__(
        self,
        size: int,
        *,
        context: int = 8,
        transforms: int = 2,
        signal: int = 8,
        points: int = 32,
        hidden: Sequence[int] = (32,),
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        if signal < 1 or points < 1 or not hidden:
            raise ValueError(
                "signal and points must be at least 1 and hidden must name a layer, got "
                f"signal={signal}, points={points}, hidden={tuple(hidden)}."
            )
        super().__init__(
            size,
            context=context,
            transforms=transforms,
            hidden=hidden,
            total=1 + signal,
            init_scale=init_scale,
            base=base,
        )
        self.integrands = nn.ModuleList(_Integrand(signal, hidden) for _ in range(transforms))
        nodes, weights = np.polynomial.legendre.leggauss(points)
        # Plain numbers: as buffers they would be rounded by a cast and back.
        self._nodes: list[float] = ((nodes + 1) / 2).tolist()
        self._weights: list[float] = (weights / 2).tolist()

    def univariate(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The integral and the logarithm of what is integrated."""
        y, log_slope = self._integral(number, phi, x)
        return y + phi[..., 0], log_slope

    def univariate_inverse(self, number: int, phi: Tensor, y: Tensor) -> Tensor:
        """By a safeguarded Newton method."""
        target = y - phi[..., 0]
        reach = target.abs() + _BOX

        def integral(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self._integral(number, phi, x)
            return value, log_slope.exp()

        return increasing_root(integral, target, -reach, reach)

    def _integral(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From zero to x ``(..., n)``, and the log slope at x."""
        inside = x.clamp(-_BOX, _BOX)
        t = inside.unsqueeze(-1) * x.new_tensor([*self._nodes, 1.0])  # (..., n, points + 1)
        log_slope = self.integrands[number](t, phi[..., 1:])
        mean = (log_slope[..., :-1].exp() * x.new_tensor(self._weights)).sum(-1)
        return inside * mean + (x - inside), log_slope[..., -1]


class _Integrand(nn.Module):
    """The logarithm of a positive function of one variable, shaped by a signal."""

    def __init__(self, signal: int, hidden: Sequence[int]) -> None:
        super().__init__()
        first, *rest = hidden
        self.at = nn.Linear(1, first, bias=False)
        self.by = nn.Linear(signal, first)
        layers: list[nn.Module] = [nn.Tanh()]
        for width in rest:
            layers += [nn.Linear(first, width), nn.Tanh()]
            first = width
        self.rest = small_last_layer(nn.Sequential(*layers, nn.Linear(first, 1)))

    def forward(self, t: Tensor, signal: Tensor) -> Tensor:
        """Points ``(..., m)`` and signals ``(..., signal)`` to log slopes ``(..., m)``."""
        inputs = self.at(t.unsqueeze(-1)) + self.by(signal).unsqueeze(-2)
        log_slope = _BOUND * torch.tanh(self.rest(inputs).squeeze(-1) / _BOUND)
        return log_slope * (1 - (t / _BOX).square()).square()

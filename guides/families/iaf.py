"""InverseAutoregressive: every coordinate gated by a network of those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from guides.families.autoregressive import AutoregressiveFlow
from guides.families.base import Base

__all__ = ["InverseAutoregressive"]


class InverseAutoregressive(AutoregressiveFlow):
    """Inverse autoregressive flow with numerically stable gates.

        loc, raw, context, base = split(lam)
        e ~ Normal(0, I)
        m, s  = MADE(z_<i, context)
        sigma = sigmoid(s + gate_bias)
        y_i   = sigma z_i + (1 - sigma) m
        u     = loc + softplus(raw) * y

    Weights are shared by all rows; the order of the coordinates is reversed from step to step.
    Gates start nearly open, and the scales start larger by what T gates take away, so training
    starts at the mean-field Gaussian with standard deviation ``init_scale``. Drawing takes one
    pass a step; scoring points that were not drawn takes K. With K = 1 a step is a gate by the
    context, and q stays as the base is.

    References:
        | Improving variational inference with inverse autoregressive flow (Kingma et al., 2016)
        | https://arxiv.org/abs/1606.04934

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number T of steps.
        hidden: Widths of the hidden layers of the masked networks.
        gate_bias: How far gates are open at the start.
        init_scale: Standard deviation at the start.
        base: What the flow starts from: None for standard Gaussian noise, the name of a family,
            or a callable from a size to a family.

    Raises:
        ValueError: If ``transforms`` is below 1 or ``context`` below 0.

    Example:
        >>> family = InverseAutoregressive(3)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        size: int,
        *,
        context: int = 8,
        transforms: int = 2,
        hidden: Sequence[int] = (64, 64),
        gate_bias: float = 2.0,
        init_scale: float = 0.1,
        base: Base = None,
    ) -> None:
        gate = float(torch.sigmoid(torch.tensor(gate_bias, dtype=torch.float64)))
        super().__init__(
            size,
            context=context,
            transforms=transforms,
            hidden=hidden,
            total=2,
            init_scale=init_scale / gate**transforms,
            base=base,
        )
        self.gate_bias = gate_bias

    def univariate(self, number: int, phi: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Between x and m, by the gate."""
        m, s = phi.unbind(-1)
        gate = torch.sigmoid(s + self.gate_bias)
        # sigmoid(-s) is what remains of one without cancellation.
        y = gate * x + torch.sigmoid(-s - self.gate_bias) * m
        return y, torch.nn.functional.logsigmoid(s + self.gate_bias)

    def univariate_inverse(self, number: int, phi: Tensor, y: Tensor) -> Tensor:
        """``(y - (1 - sigma) m) / sigma``."""
        m, s = phi.unbind(-1)
        # Odds against: (1 - sigma) / sigma = exp(-s).
        odds = torch.exp(-s - self.gate_bias)
        return y + odds * (y - m)

"""Auxiliary: a flow over the latents and auxiliary variables, with a bound in place of log q."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guides.families.family import (
    Family,
    inverse_softplus,
    positive,
    standard_normal_log_prob,
)

__all__ = ["Auxiliary"]

_BOUND = 3.0


class Auxiliary(Family):
    """An auxiliary-variable flow: latents u and auxiliary variables v drawn together.

        loc, raw, context = split(lam)
        y, v ~ Normal(0, I)
        repeat T times:
            v <- v * exp(s(y, context)) + t(y, context)
            y <- y * exp(s(v, context)) + t(v, context)
        u = loc + softplus(raw) y
        log_q = log q(u, v) - log r(v | y, context)     r: a Gaussian that is learned as well

    **The second result of** ``push`` **is not log q(u)**, which is an integral over v. Its mean
    is larger by the Kullback-Leibler divergence between q(v | u) and r(v | u):

        E[log_q] = E[log q(u)] + E[KL(q(v | u) || r(v | u))]

    so the ELBO made with it is a valid bound, looser than that of q(u), and importance weights
    made with it average to the evidence, as weights over (u, v). Points cannot be scored, its own
    neither once their v is gone.

    The networks are shared by all rows; a row has its own location, scale and context. It starts
    at the mean-field Gaussian, with v independent of u.

    References:
        | Inference suboptimality in variational autoencoders (Cremer, Li & Duvenaud, 2018)
        | https://arxiv.org/abs/1801.03558
        | Hierarchical variational models (Ranganath, Tran & Blei, 2016)
        | https://arxiv.org/abs/1511.02386

    Args:
        size: Length K of the packed latents.
        num_auxiliary: Number of auxiliary variables; by default K.
        context: Length of the per-datum context.
        transforms: Number T of pairs of coupling steps.
        hidden: Widths of the hidden layers of the networks.
        init_scale: Standard deviation at the start.

    Raises:
        ValueError: If ``num_auxiliary`` or ``transforms`` is below 1, or ``context`` below 0.

    Example:
        >>> family = Auxiliary(3, num_auxiliary=2)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    scores_external_points = False

    has_scale = True

    def __init__(
        self,
        size: int,
        *,
        num_auxiliary: int | None = None,
        context: int = 8,
        transforms: int = 2,
        hidden: Sequence[int] = (64,),
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(size)
        number = size if num_auxiliary is None else num_auxiliary
        if number < 1 or transforms < 1 or context < 0:
            raise ValueError(
                "num_auxiliary and transforms must be at least 1 and context at least 0, got "
                f"num_auxiliary={number}, transforms={transforms}, context={context}."
            )
        self.num_auxiliary = number
        self.context = context
        self.raw_scale = inverse_softplus(init_scale)
        self.steps = nn.ModuleList()
        for _ in range(transforms):
            self.steps.append(_Coupling(size, number, context, hidden))
            self.steps.append(_Coupling(number, size, context, hidden))
        self.reverse = _Coupling(size, number, context, hidden)

    @property
    def num_params(self) -> int:
        """2 K plus the length of the context."""
        return 2 * self.size + self.context

    @property
    def noise_size(self) -> int:
        """K plus the number of auxiliary variables."""
        return self.size + self.num_auxiliary

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale`` and a zero context."""
        context = loc.new_zeros(*loc.shape[:-1], self.context)
        return torch.cat([loc, torch.full_like(loc, self.raw_scale), context], -1)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draws, and ``log q(u, v) - log r(v | u)``, whose mean is no less than E[log q(u)]."""
        value, auxiliary, log_joint = self.push_joint(lam, noise)
        return value, log_joint - self.reverse_log_prob(lam, value, auxiliary)

    def push_joint(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents ``(*S, ..., K)``, auxiliary variables ``(*S, ..., A)`` and log q(u, v)."""
        loc, scale, context = self._parts(lam)
        y, v = noise.split([self.size, self.num_auxiliary], -1)
        log_q = standard_normal_log_prob(noise) - scale.log().sum(-1)
        for number, step in enumerate(self.steps):
            if number % 2 == 0:
                shift, log_scale = step(y, context)
                v = v * log_scale.exp() + shift
            else:
                shift, log_scale = step(v, context)
                y = y * log_scale.exp() + shift
            log_q = log_q - log_scale.sum(-1)
        return loc + scale * y, v, log_q

    def joint_log_prob(self, lam: Tensor, value: Tensor, auxiliary: Tensor) -> Tensor:
        """Log q(u, v) ``(...)`` at latents ``(..., K)`` and auxiliary variables ``(..., A)``."""
        loc, scale, context = self._parts(lam)
        y, v = (value - loc) / scale, auxiliary
        log_det = -scale.log().sum(-1)
        for number in reversed(range(len(self.steps))):
            if number % 2 == 0:
                shift, log_scale = self.steps[number](y, context)
                v = (v - shift) * (-log_scale).exp()
            else:
                shift, log_scale = self.steps[number](v, context)
                y = (y - shift) * (-log_scale).exp()
            log_det = log_det - log_scale.sum(-1)
        return standard_normal_log_prob(y) + standard_normal_log_prob(v) + log_det

    def reverse_log_prob(self, lam: Tensor, value: Tensor, auxiliary: Tensor) -> Tensor:
        """Log r(v | u) ``(...)``, normalized over v."""
        loc, scale, context = self._parts(lam)
        shift, log_scale = self.reverse((value - loc) / scale, context)
        standard = (auxiliary - shift) * (-log_scale).exp()
        return standard_normal_log_prob(standard) - log_scale.sum(-1)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Refused: q(u) is an integral over the auxiliary variables.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Auxiliary has no log q(u): that is an integral over its auxiliary variables. What it "
            "returns with its own draws is log q(u, v) - log r(v | u), for bounds and importance "
            "weights. To score points, use a family that can, for example spline_coupling."
        )

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loc, raw, context = lam.split([self.size, self.size, self.context], -1)
        return loc, positive(raw), context


class _Coupling(nn.Module):
    """Shift and log scale of one half, from the other half and the context."""

    def __init__(self, inputs: int, outputs: int, context: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [inputs + context, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, hidden, strict=False):
            layers += [nn.Linear(before, after), nn.SiLU()]
        last = nn.Linear(widths[-1], 2 * outputs)
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.zero_()
        self.network = nn.Sequential(*layers, last)

    def forward(self, half: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and log scale; scales lie within ``exp(+-3)``."""
        shape = torch.broadcast_shapes(half.shape[:-1], context.shape[:-1])
        inputs = torch.cat([half.expand(*shape, -1), context.expand(*shape, -1)], -1)
        shift, raw = self.network(inputs).chunk(2, -1)
        return shift, _BOUND * torch.tanh(raw / _BOUND)

"""AffineFlow: autoregressive affine flows over time, which take predictable parts away.

    y_t = (x_t - shift(x_<t)) / scale(x_<t)              normalizing: all steps at once
    x_t = shift(x_<t) + scale(x_<t) y_t                  generating: one step after the other

Given the past the map is affine, so that a Gaussian stays Gaussian: a flow of any number of
levels is one shift and one scale for x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from zoo.networks import mlp

__all__ = ["AffineFlow", "AffineLevel", "DifferenceLevel", "FlowState"]


class AffineLevel(nn.Module):
    """One level of a flow: shift and scale of a step from the ``order`` steps before it.

        h = network(x_{t-order}, .., x_{t-1})          zeros before the first step
        shift = W h + b,    log scale = log_bound * tanh(V h + c)

    Both heads start near zero: the level starts near the identity. Scales stay between 1 / bound
    and bound, without which a step that is predicted exactly makes the likelihood unbounded.

    Args:
        x_dim: Dimension D of a step.
        order: Steps that are looked back on.
        hidden: Sizes of the network's hidden layers; none makes the shift linear.
        constant_scale: Whether the scale is one number a dimension, not a function of the past.
        bound: Largest scale, and inverse of the smallest.

    Raises:
        ValueError: For sizes below 1, or a bound that is not above 1.
    """

    def __init__(
        self,
        x_dim: int,
        order: int,
        hidden: Sequence[int] = (),
        constant_scale: bool = False,
        bound: float = 10.0,
    ) -> None:
        super().__init__()
        if min(x_dim, order) < 1 or not bound > 1:
            raise ValueError(
                f"x_dim and order must be at least 1 and bound above 1, got {x_dim}, {order}, "
                f"{bound}."
            )
        self.x_dim, self.order = x_dim, order
        self.log_bound = float(torch.tensor(bound).log())
        self.network, features = mlp(order * x_dim, hidden)
        self.shift = nn.Linear(features, x_dim)
        self.raw_scale: nn.Module | None = None
        self.raw_bias: nn.Parameter | None = None
        _shrink(self.shift)
        if constant_scale:
            self.raw_bias = nn.Parameter(torch.zeros(x_dim))
        else:
            head = nn.Linear(features, x_dim)
            _shrink(head)
            self.raw_scale = head

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, each ``(..., D)``, given the past ``(..., order * D)``."""
        h = self.network(past)
        raw = self.raw_bias if self.raw_scale is None else self.raw_scale(h)
        assert raw is not None
        shift: Tensor = self.shift(h)
        return shift, (self.log_bound * torch.tanh(raw)).exp().expand(shift.shape)


class DifferenceLevel(nn.Module):
    """A temporal difference, a level without parameters: shift x_{t-1}, scale 1.

    Args:
        x_dim: Dimension D of a step.
    """

    order = 1

    def __init__(self, x_dim: int) -> None:
        super().__init__()
        self.x_dim = x_dim

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale, each ``(..., D)``, given the step before ``(..., D)``."""
        return past, torch.ones_like(past)


class AffineFlow(nn.Module):
    """Levels of an autoregressive flow, the first one nearest the data.

    Args:
        levels: Modules as :class:`AffineLevel`; each normalizes what the one before leaves.

    Raises:
        ValueError: Without levels.

    Example:
        >>> flow = AffineFlow([AffineLevel(2, order=3), DifferenceLevel(2)])
        >>> y, log_det = flow.normalize(torch.randn(4, 5, 2))
        >>> y.shape, log_det.shape
        (torch.Size([4, 5, 2]), torch.Size([4, 5]))
    """

    def __init__(self, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        if not levels:
            raise ValueError("A flow needs at least one level.")
        self.levels = nn.ModuleList(levels)

    @property
    def chain(self) -> list[AffineLevel | DifferenceLevel]:
        """The levels, the one nearest the data first."""
        return cast("list[AffineLevel | DifferenceLevel]", list(self.levels))

    def scales(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of every step of given sequences, each ``(B, T, D)``: all at once."""
        shift, scale = torch.zeros_like(x), torch.ones_like(x)
        y = x
        for level in self.chain:
            own_shift, own_scale = level(_windows(y, level.order))
            shift, scale = shift + scale * own_shift, scale * own_scale
            y = (y - own_shift) / own_scale
        return shift, scale

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of sequences, and log |det dy/dx| a step.

        Args:
            x: Sequences ``(B, T, D)``.

        Returns:
            ``(B, T, D)`` and ``(B, T)``.
        """
        shift, scale = self.scales(x)
        return (x - shift) / scale, -scale.log().sum(-1)

    def generate(self, y: Tensor) -> Tensor:
        """The sequences that leave ``y``: the inverse of :meth:`normalize`, step by step.

        Args:
            y: What :meth:`normalize` would leave, ``(B, T, D)``; white noise makes patterns.
        """
        state = FlowState(self, y[..., 0, :])
        steps: list[Tensor] = []
        for t in range(y.shape[-2]):
            shift, scale = state.next()
            steps.append(shift + scale * y[..., t, :])
            state.push(steps[-1])
        return torch.stack(steps, -2)


class FlowState:
    """A flow in the middle of a sequence: what every level has seen.

    Args:
        flow: The flow.
        like: A tensor ``(..., D)`` whose shape and type the steps have.
    """

    def __init__(self, flow: AffineFlow, like: Tensor) -> None:
        self.levels = flow.chain
        self.like = like
        self.seen: list[list[Tensor]] = [[] for _ in self.levels]
        self.maps: list[tuple[Tensor, Tensor]] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Shift and scale of the next step given the past, each ``(..., D)``."""
        self.maps = [
            level(_window(seen, level.order, self.like))
            for level, seen in zip(self.levels, self.seen, strict=True)
        ]
        shift, scale = torch.zeros_like(self.like), torch.ones_like(self.like)
        for own_shift, own_scale in self.maps:
            shift, scale = shift + scale * own_shift, scale * own_scale
        return shift, scale

    def push(self, x: Tensor) -> None:
        """Take the step that :meth:`next` spoke of."""
        for seen, (shift, scale) in zip(self.seen, self.maps, strict=True):
            seen.append(x)
            x = (x - shift) / scale


def _shrink(head: nn.Linear) -> None:
    with torch.no_grad():
        head.weight.mul_(0.01)
        head.bias.zero_()


def _window(steps: Sequence[Tensor], order: int, like: Tensor) -> Tensor:
    """The last ``order`` steps side by side, ``(..., order * D)``, zeros where there are none."""
    recent = list(steps[max(len(steps) - order, 0) :])
    missing = [torch.zeros_like(like)] * (order - len(recent))
    return torch.cat([*missing, *recent], -1)


def _windows(x: Tensor, order: int) -> Tensor:
    """The ``order`` steps before every step, ``(B, T, order * D)``."""
    number = x.shape[-2]
    padded = torch.cat([torch.zeros_like(x[..., :1, :]).repeat_interleave(order, -2), x], -2)
    return torch.cat([padded[..., k : k + number, :] for k in range(order)], -1)

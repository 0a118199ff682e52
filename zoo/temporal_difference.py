"""TemporalDifference: differences in time as a flow without parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.affine_flow import AffineFlow, DifferenceLevel
from zoo.autoregressive_flow import emit
from zoo.model import Model
from zoo.rows import data_plate
from zoo.sequence import steps

__all__ = ["TemporalDifference"]


class TemporalDifference(Model):
    """A random walk of a given order, which repeated differences make white.

        y   = differences of x, ``order`` times         shift x_{t-1}, scale 1: log-determinant 0
        y_t ~ Normal(0, scale)                          scale learned, one a dimension

    The fixed flow behind generalized coordinates: position, velocity, acceleration. Before the
    first step everything is zero.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022),
        | section 3.1 https://arxiv.org/abs/2011.07464
        | Hierarchical models in the brain (Friston, 2008)
        | https://doi.org/10.1371/journal.pcbi.1000211

    Args:
        x_dim: Dimension D of a step.
        order: How many times differences are taken.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> model = TemporalDifference(order=2)
        >>> model.differences(torch.tensor([[[1.0], [3.0], [6.0]]])).flatten()
        tensor([1., 1., 1.])
    """

    default_guide: ClassVar[str | None] = None
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(self, x_dim: int = 1, order: int = 1, num_steps: int = 10) -> None:
        super().__init__()
        if min(x_dim, order, num_steps) < 1:
            raise ValueError(
                f"x_dim, order and num_steps must be at least 1, got {x_dim}, {order}, "
                f"{num_steps}."
            )
        self.x_dim, self.num_steps = x_dim, num_steps
        self.flow = AffineFlow([DifferenceLevel(x_dim) for _ in range(order)])
        self.log_scale = nn.Parameter(torch.zeros(x_dim))

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        size: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The generative process.

        Args:
            x: Sequences ``(B, T, D)``; None simulates ``num_steps`` steps.
            lengths: Steps of every sequence ``(B,)``; all T by default.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The sequences ``(B, T, D)``.

        Raises:
            ValueError: Where the data are no sequences of this model.
        """
        time = steps(x, lengths, self.num_steps)
        noise = self.log_scale.exp()
        plate = data_plate(x, size, index, event_shape=(time.number, self.x_dim))
        with plate:
            like = torch.zeros(plate.subsample_size, self.x_dim).to(noise)
            shifts, scales, state = emit(self.flow, x, time.number, like)
            data = []
            for t in range(time.number):
                shift, scale = (shifts[:, t], scales[:, t]) if state is None else state.next()
                with time.active(t):
                    seen = None if x is None else x[:, t]
                    step = dist.Normal(shift, scale * noise).to_event(1)
                    data.append(pyro.sample(f"x_{t + 1}", step, obs=seen))
                if state is not None:
                    state.push(data[-1])
        return torch.stack(data, -2)

    def differences(self, x: Tensor) -> Tensor:
        """Differences of sequences, ``order`` times, ``(B, T, D)``."""
        return self.flow.normalize(x)[0]

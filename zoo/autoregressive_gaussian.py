"""AutoregressiveGaussian: a fully visible model, every step predicted from the steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.model import Model
from zoo.networks import inverse_softplus, mlp
from zoo.rows import data_plate
from zoo.sequence import steps

__all__ = ["AutoregressiveGaussian"]


class AutoregressiveGaussian(Model):
    """A Gaussian of every step given the ``order`` steps before it, without latents.

        h    = network(x_{t-order}, .., x_{t-1})        zeros before the first step
        x_t  ~ Normal(W h + b, min_scale + softplus(V h + c))

    Without hidden layers and with ``constant_scale`` it is AR(p). Its precision-weighted errors
    (x_t - loc) / scale are those of predictive coding over time, and the same numbers as what an
    affine flow leaves (:class:`zoo.autoregressive_flow.AutoregressiveFlow`): one model, two
    readings.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022),
        | equations 2 and 3 https://arxiv.org/abs/2011.07464

    Args:
        x_dim: Dimension D of a step.
        order: Steps that are looked back on.
        hidden: Sizes of the network's hidden layers.
        constant_scale: Whether scales are numbers, not functions of the past.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> model = AutoregressiveGaussian(x_dim=2, order=3, num_steps=7)
        >>> model(size=4).shape
        torch.Size([4, 7, 2])
    """

    default_guide: ClassVar[str | None] = None
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}
    min_scale: ClassVar[float] = 0.01

    def __init__(
        self,
        x_dim: int = 1,
        order: int = 1,
        hidden: Sequence[int] = (),
        constant_scale: bool = False,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(x_dim, order, num_steps) < 1:
            raise ValueError(
                f"x_dim, order and num_steps must be at least 1, got {x_dim}, {order}, "
                f"{num_steps}."
            )
        self.x_dim, self.order, self.num_steps = x_dim, order, num_steps
        self.network, features = mlp(order * x_dim, hidden)
        self.loc = nn.Linear(features, x_dim)
        start = float(inverse_softplus(torch.tensor(1.0 - self.min_scale)))
        self.raw_scale: nn.Linear | None = None
        self.raw_bias: nn.Parameter | None = None
        if constant_scale:
            self.raw_bias = nn.Parameter(torch.full((x_dim,), start))
        else:
            self.raw_scale = nn.Linear(features, x_dim)
            nn.init.constant_(self.raw_scale.bias, start)

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
        plate = data_plate(x, size, index, event_shape=(time.number, self.x_dim))
        with plate:
            start = torch.zeros(plate.subsample_size, self.x_dim).to(self.loc.bias)
            data = [start] * self.order
            for t in pyro.markov(range(time.number), history=self.order):
                with time.active(t):
                    seen = None if x is None else x[:, t]
                    past = torch.cat(data[-self.order :], -1)
                    data.append(pyro.sample(f"x_{t + 1}", self.step(past), obs=seen))
        return torch.stack(data[self.order :], -2)

    def step(self, past: Tensor) -> dist.TorchDistribution:
        """Distribution of a step, event shape ``(D,)``.

        Args:
            past: The steps before it side by side, ``(..., order * D)``, first to last.
        """
        h = self.network(past)
        raw = self.raw_bias if self.raw_scale is None else self.raw_scale(h)
        assert raw is not None
        scale = self.min_scale + F.softplus(raw)
        row: dist.TorchDistribution = dist.Normal(self.loc(h), scale).to_event(1)
        return row

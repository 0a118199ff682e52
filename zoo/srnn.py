"""SRNN: a deterministic recurrent layer over the data below a chain of latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import torch
from torch import Tensor, nn

from zoo.hierarchical_vae import Conditional
from zoo.likelihood import make_likelihood
from zoo.model import Model
from zoo.networks import mlp
from zoo.recurrent import Recurrent
from zoo.rows import data_plate
from zoo.sequence import steps

__all__ = ["SRNN"]


class SRNN(Model):
    """A stochastic recurrent neural network.

        d_t = GRU(x_{t-1}, d_{t-1})                       x_0 = 0, d_0 learned
        z_t ~ Normal(loc([z_{t-1}, d_t]), scale(...))     z_0 = 0
        x_t ~ likelihood(network([z_t, d_t]))             see zoo.likelihood

    Recurrence is split in two: what the data say flows through d, what is uncertain through z.
    Given the data the latents are a Markov chain.

    References:
        | Sequential neural models with stochastic layers (Fraccaro et al., 2016)
        | https://arxiv.org/abs/1605.07571

    Args:
        x_dim: Dimension D of a step.
        z_dim: Dimension K of the latent of a step.
        recurrent: Size H of the recurrent state.
        hidden: Sizes of the hidden layers of transition and emission.
        likelihood: A key of ``zoo.likelihood.LIKELIHOODS``.
        data_mean: Mean of the steps ``(D,)``, from which the output bias starts.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        z_1 .. z_T: Latents, support real, event shape ``(K,)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown likelihood or sizes below 1.

    Example:
        >>> model = SRNN(x_dim=8, z_dim=3, recurrent=16, hidden=(16,), num_steps=5)
        >>> model(size=4).shape
        torch.Size([4, 5, 8])
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        x_dim: int = 88,
        z_dim: int = 32,
        recurrent: int = 128,
        hidden: Sequence[int] = (128,),
        likelihood: str = "bernoulli",
        data_mean: Tensor | None = None,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(x_dim, z_dim, recurrent, num_steps) < 1:
            raise ValueError(
                "x_dim, z_dim, recurrent and num_steps must be at least 1, got "
                f"{x_dim}, {z_dim}, {recurrent}, {num_steps}."
            )
        self.x_dim, self.z_dim, self.num_steps = x_dim, z_dim, num_steps
        self.cell = Recurrent(x_dim, recurrent)
        self.transition = Conditional(z_dim + recurrent, z_dim, hidden, nn.SiLU)
        self.network, features = mlp(z_dim + recurrent, hidden)
        self.likelihood = make_likelihood(likelihood, features, x_dim, data_mean)
        self.register_buffer("zeros", torch.zeros(x_dim + z_dim), persistent=False)

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
        event_shape, values = (time.number, self.x_dim), self.likelihood.values
        with data_plate(x, size, index, event_shape=event_shape, values=values):
            before, z = self.zeros.split([self.x_dim, self.z_dim])
            d, data = None, []
            for t in range(time.number):
                d = self.cell(before, d)
                with time.active(t):
                    left = torch.broadcast_shapes(z.shape[:-1], d.shape[:-1])
                    above = torch.cat([z.expand(*left, -1), d.expand(*left, -1)], -1)
                    z = pyro.sample(f"z_{t + 1}", self.transition(above))
                    both = torch.cat([z, d.expand(*z.shape[:-1], -1)], -1)
                    seen = None if x is None else x[:, t]
                    emission = self.likelihood(self.network(both))
                    before = pyro.sample(f"x_{t + 1}", emission, obs=seen)
                data.append(before)
        return torch.stack(data, -2)

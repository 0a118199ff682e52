"""DeepMarkov: a state space model whose transitions and emissions are networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.likelihood import make_likelihood
from zoo.model import Model
from zoo.rows import data_plate
from zoo.sequence import steps
from zoo.transition import GatedTransition

__all__ = ["DeepMarkov"]


class DeepMarkov(Model):
    """A deep Markov model.

        z_1 ~ Normal(loc, exp(log_scale))
        z_t ~ GatedTransition(z_{t-1})                    t = 2 .. T, see zoo.transition
        x_t ~ likelihood(f(E2 f(E1 z_t)))                 t = 1 .. T, see zoo.likelihood

    The defaults are the sizes of Krishnan et al. for polyphonic music.

    References:
        | Structured inference networks for nonlinear state space models (Krishnan, Shalit &
        | Sontag, 2017) https://arxiv.org/abs/1609.09869

    Args:
        x_dim: Dimension D of a step.
        z_dim: Dimension K of the state.
        emission: Size of the hidden layers of the emission.
        transition: Size of the hidden layers of the transition.
        likelihood: A key of ``zoo.likelihood.LIKELIHOODS``.
        activation: Constructor of f; the paper's is ``nn.ReLU``.
        data_mean: Mean of the steps ``(D,)``, from which the output bias starts.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        z_1 .. z_T: Latents, support real, event shape ``(K,)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For an unknown likelihood or sizes below 1.

    Example:
        >>> model = DeepMarkov(x_dim=8, z_dim=3, emission=16, transition=16, num_steps=5)
        >>> model(size=4).shape
        torch.Size([4, 5, 8])
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        x_dim: int = 88,
        z_dim: int = 100,
        emission: int = 100,
        transition: int = 200,
        likelihood: str = "bernoulli",
        activation: Callable[[], nn.Module] = nn.SiLU,
        data_mean: Tensor | None = None,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(x_dim, z_dim, emission, transition, num_steps) < 1:
            raise ValueError(
                "x_dim, z_dim, emission, transition and num_steps must be at least 1, got "
                f"{x_dim}, {z_dim}, {emission}, {transition}, {num_steps}."
            )
        self.x_dim, self.z_dim, self.num_steps = x_dim, z_dim, num_steps
        self.initial_loc = nn.Parameter(torch.zeros(z_dim))
        self.initial_log_scale = nn.Parameter(torch.zeros(z_dim))
        self.transition = GatedTransition(z_dim, transition, activation)
        self.network = nn.Sequential(
            nn.Linear(z_dim, emission), activation(), nn.Linear(emission, emission), activation()
        )
        self.likelihood = make_likelihood(likelihood, emission, x_dim, data_mean)

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
            first = dist.Normal(self.initial_loc, self.initial_log_scale.exp()).to_event(1)
            z, data = None, []
            for t in pyro.markov(range(time.number)):
                with time.active(t):
                    z = pyro.sample(f"z_{t + 1}", first if z is None else self.transition(z))
                    seen = None if x is None else x[:, t]
                    data.append(pyro.sample(f"x_{t + 1}", self.emit(z), obs=seen))
        return torch.stack(data, -2)

    def emit(self, z: Tensor) -> dist.TorchDistribution:
        """p(x_t | z_t): batch shape ``(...)``, event shape ``(D,)``.

        Args:
            z: States ``(..., K)``.
        """
        step: dist.TorchDistribution = self.likelihood(self.network(z))
        return step

"""FlowStateSpace: a state space model of what an autoregressive flow leaves of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.affine_flow import AffineFlow, AffineLevel
from zoo.autoregressive_flow import emit
from zoo.model import Model
from zoo.networks import inverse_softplus, mlp
from zoo.rows import data_plate
from zoo.sequence import steps
from zoo.transition import GatedTransition

__all__ = ["FlowStateSpace"]


class FlowStateSpace(Model):
    """A sequential latent variable model, with an autoregressive flow below it or without.

        z_1 ~ Normal(loc, exp(log_scale))
        z_t ~ GatedTransition(z_{t-1})                             see zoo.transition
        y_t ~ Normal(W network(z_t) + b, min_scale + softplus(s))  s one number a dimension
        x_t = shift(x_<t) + scale(x_<t) y_t                        see zoo.affine_flow

    Given the past the flow is affine, so that x_t is Gaussian given z_t and the past. The latents
    explain what cannot be predicted from pixels alone. ``levels=0`` is the control without a
    flow, x_t = y_t.

    References:
        | Improving sequential latent variable models with autoregressive flows (Marino, Chen, He
        | & Mandt, 2020) https://arxiv.org/abs/2010.03172

    Args:
        x_dim: Dimension D of a step.
        z_dim: Dimension K of the state.
        hidden: Sizes of the hidden layers of the emission.
        transition: Size of the hidden layers of the transition.
        levels: Levels of the flow: 0, 1 or more.
        order: Steps that each level looks back on.
        flow_hidden: Sizes of the hidden layers of each level.
        min_scale: Smallest standard deviation of y.
        data_mean: Mean of the steps ``(D,)``, from which the output bias starts.
        num_steps: Steps of a sequence that is simulated.
        data_scale: Standard deviation of the steps ``(D,)``, from which that of y starts, or a
            little above its floor; 0.7 by default.

    Sites:
        z_1 .. z_T: Latents, support real, event shape ``(K,)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1, a negative number of levels, or a floor not positive.

    Example:
        >>> model = FlowStateSpace(x_dim=8, z_dim=3, hidden=(16,), transition=16, num_steps=5)
        >>> x = model(size=4)
        >>> model.whiten(x).shape
        torch.Size([4, 5, 8])
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        hidden: Sequence[int] = (128,),
        transition: int = 64,
        levels: int = 1,
        order: int = 2,
        flow_hidden: Sequence[int] = (64,),
        min_scale: float = 0.01,
        data_mean: Tensor | None = None,
        num_steps: int = 10,
        data_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if min(x_dim, z_dim, transition, num_steps) < 1 or levels < 0 or not min_scale > 0:
            raise ValueError(
                "x_dim, z_dim, transition and num_steps must be at least 1, levels at least 0 and "
                f"min_scale positive, got {x_dim}, {z_dim}, {transition}, {num_steps}, {levels}, "
                f"{min_scale}."
            )
        self.x_dim, self.z_dim, self.num_steps = x_dim, z_dim, num_steps
        self.min_scale = min_scale
        self.initial_loc = nn.Parameter(torch.zeros(z_dim))
        self.initial_log_scale = nn.Parameter(torch.zeros(z_dim))
        self.transition = GatedTransition(z_dim, transition)
        self.network, features = mlp(z_dim, hidden)
        self.emission = nn.Linear(features, x_dim)
        self.raw_scale = nn.Parameter(torch.zeros(x_dim))
        if data_mean is not None:
            with torch.no_grad():
                self.emission.bias.copy_(data_mean)
        if data_scale is not None:
            with torch.no_grad():
                rest = (data_scale - min_scale).clamp(min=0.1 * min_scale)
                self.raw_scale.copy_(inverse_softplus(rest))
        self.flow: AffineFlow | None = None
        if levels:
            self.flow = AffineFlow([AffineLevel(x_dim, order, flow_hidden) for _ in range(levels)])
        self.register_buffer("start", torch.zeros(x_dim), persistent=False)

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
            like = self.start.expand(plate.subsample_size, -1)
            state = None
            if self.flow is not None:
                shifts, scales, state = emit(self.flow, x, time.number, like)
            first = dist.Normal(self.initial_loc, self.initial_log_scale.exp()).to_event(1)
            z, data = None, []
            for t in pyro.markov(range(time.number)):
                with time.active(t):
                    z = pyro.sample(f"z_{t + 1}", first if z is None else self.transition(z))
                    loc, scale = self.emission(self.network(z)), self.scale
                    if self.flow is not None:
                        pair = (shifts[:, t], scales[:, t]) if state is None else state.next()
                        loc, scale = pair[0] + pair[1] * loc, pair[1] * scale
                    seen = None if x is None else x[:, t]
                    step = dist.Normal(loc, scale).to_event(1)
                    data.append(pyro.sample(f"x_{t + 1}", step, obs=seen))
                if state is not None:
                    state.push(data[-1])
        return torch.stack(data, -2)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of y, ``(D,)``."""
        return self.min_scale + F.softplus(self.raw_scale)

    def whiten(self, x: Tensor) -> Tensor:
        """What the flow leaves of sequences, ``(B, T, D)``: the data as the latents see them."""
        return x if self.flow is None else self.flow.normalize(x)[0]

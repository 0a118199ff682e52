"""AutoregressiveFlow: white noise made into sequences, and sequences made white."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.affine_flow import AffineFlow, AffineLevel, FlowState
from zoo.model import Model
from zoo.rows import check_rows, data_plate
from zoo.sequence import steps

__all__ = ["AutoregressiveFlow", "emit"]


def emit(
    flow: AffineFlow, x: Tensor | None, number: int, like: Tensor
) -> tuple[Tensor, Tensor, FlowState | None]:
    """Shift and scale of every step: all at once of given sequences, else a state to step on.

    Args:
        flow: The flow.
        x: Sequences ``(B, T, D)``, or None to simulate.
        number: Steps T.
        like: Zeros ``(B, D)``.

    Returns:
        Shift and scale ``(B, T, D)``, and None; or placeholders and the state.
    """
    if x is not None:
        return *flow.scales(x), None
    placeholder = like.unsqueeze(-2).expand(*like.shape[:-1], number, like.shape[-1])
    return placeholder, placeholder, FlowState(flow, like)


class AutoregressiveFlow(Model):
    """An affine autoregressive flow over time, one level or several stacked, without latents.

        y_t ~ Normal(0, 1)
        x_t = shift(x_<t) + scale(x_<t) y_t          that is, x_t ~ Normal(shift, scale)

    What the flow leaves of data is white where it fits: temporal normalization, the job that
    Marino gives to the retina and thalamus. With several levels the second looks back on what
    the first leaves, as differences of differences are accelerations.

    References:
        | Improving sequential latent variable models with autoregressive flows (Marino, Chen, He
        | & Mandt, 2020) https://arxiv.org/abs/2010.03172
        | Masked autoregressive flow for density estimation (Papamakarios, Pavlakou & Murray, 2017)
        | https://arxiv.org/abs/1705.07057

    Args:
        x_dim: Dimension D of a step.
        order: Steps that each level looks back on.
        hidden: Sizes of the hidden layers of each level.
        levels: Levels of the flow.
        constant_scale: Whether scales are numbers, not functions of the past.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> model = AutoregressiveFlow(x_dim=2, order=3, levels=2, num_steps=7)
        >>> x = model(size=4)
        >>> model.whiten(x).shape
        torch.Size([4, 7, 2])
    """

    default_guide: ClassVar[str | None] = None
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        x_dim: int = 1,
        order: int = 1,
        hidden: Sequence[int] = (),
        levels: int = 1,
        constant_scale: bool = False,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(levels, num_steps) < 1:
            raise ValueError(
                f"levels and num_steps must be at least 1, got {levels} and {num_steps}."
            )
        self.x_dim, self.num_steps = x_dim, num_steps
        self.flow = AffineFlow(
            [AffineLevel(x_dim, order, hidden, constant_scale) for _ in range(levels)]
        )
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
            shifts, scales, state = emit(self.flow, x, time.number, like)
            data = []
            for t in range(time.number):
                pair = (shifts[:, t], scales[:, t]) if state is None else state.next()
                with time.active(t):
                    seen = None if x is None else x[:, t]
                    step = dist.Normal(*pair).to_event(1)
                    data.append(pyro.sample(f"x_{t + 1}", step, obs=seen))
                if state is not None:
                    state.push(data[-1])
        return torch.stack(data, -2)

    def whiten(self, x: Tensor) -> Tensor:
        """What the flow leaves of sequences, ``(B, T, D)``; white noise where the model fits."""
        y, _ = self.flow.normalize(x)
        return y

    def generate(self, y: Tensor) -> Tensor:
        """The sequences that leave ``y``, ``(B, T, D)``: the inverse of :meth:`whiten`."""
        return self.flow.generate(y)

    def log_evidence(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The exact log p(x), ``(B,)``.

        Args:
            x: Sequences ``(B, T, D)``.
            lengths: Steps of every sequence ``(B,)``; all T by default.

        Raises:
            ValueError: Where the data are no sequences of this model.
        """
        time = steps(x, lengths, self.num_steps)
        check_rows(x, event_shape=(time.number, self.x_dim))
        on = None
        if time.lengths is not None:
            on = torch.arange(time.number, device=x.device) < time.lengths[:, None]  # (B, T)
            # What overflows in the padding would turn gradients into NaN.
            x = torch.where(on[..., None], x, torch.zeros_like(x))
        y, log_det = self.flow.normalize(x)
        white = torch.distributions.Normal(torch.zeros_like(y), torch.ones_like(y))
        terms = white.log_prob(y).sum(-1) + log_det  # (B, T)
        return (terms if on is None else torch.where(on, terms, torch.zeros_like(terms))).sum(-1)

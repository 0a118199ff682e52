"""PatternGenerator: a flow in its generating direction, white noise in, coordinated motion out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from zoo.affine_flow import AffineFlow, AffineLevel, FlowState
from zoo.model import Model
from zoo.rows import data_plate
from zoo.sequence import steps

__all__ = ["PatternGenerator"]


class PatternGenerator(Model):
    """A drive that is white in time, turned into a movement whose steps depend on each other.

        u_t ~ Normal(0, I)                                     the drive
        m_t = shift(m_<t) + scale(m_<t) u_t                    the movement
        x_t ~ Normal(m_t, noise_scale)                         the movement as it is seen

    The flow is that of :class:`zoo.autoregressive_flow.AutoregressiveFlow`, run the other way:
    there it takes dependence away, here it puts dependence in, as a central pattern generator
    does. :meth:`of` takes a trained flow over.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022),
        | section 6.2 https://arxiv.org/abs/2011.07464

    Args:
        x_dim: Dimension D of a step.
        order: Steps that each level looks back on.
        hidden: Sizes of the hidden layers of each level.
        levels: Levels of the flow.
        constant_scale: Whether scales are numbers, not functions of the past.
        noise_scale: Standard deviation of what is seen about the movement.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        u_1 .. u_T: Latents, support real, event shape ``(D,)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1, or noise that is not positive.

    Example:
        >>> from zoo.autoregressive_flow import AutoregressiveFlow
        >>> flow = AutoregressiveFlow(x_dim=2, order=3)
        >>> model = PatternGenerator.of(flow)
        >>> model(size=4).shape
        torch.Size([4, 10, 2])
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        x_dim: int = 1,
        order: int = 1,
        hidden: Sequence[int] = (),
        levels: int = 1,
        constant_scale: bool = False,
        noise_scale: float = 0.1,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(levels, num_steps) < 1 or not noise_scale > 0:
            raise ValueError(
                "levels and num_steps must be at least 1 and noise_scale positive, got "
                f"{levels}, {num_steps}, {noise_scale}."
            )
        self.x_dim, self.num_steps = x_dim, num_steps
        self.flow = AffineFlow(
            [AffineLevel(x_dim, order, hidden, constant_scale) for _ in range(levels)]
        )
        self.register_buffer("drive_loc", torch.zeros(x_dim), persistent=False)
        self.register_buffer("noise_scale", torch.tensor(float(noise_scale)), persistent=False)

    @classmethod
    def of(cls, trained: Model, noise_scale: float = 0.1) -> PatternGenerator:
        """A generator that runs the flow of a trained model.

        Args:
            trained: A model with a ``flow``, such as an ``AutoregressiveFlow``; the two share it.
            noise_scale: See the class.
        """
        model = cls(trained.x_dim, noise_scale=noise_scale, num_steps=trained.num_steps)
        model.flow = trained.flow
        return model

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
        drive = dist.Normal(self.drive_loc, 1.0).to_event(1)
        with data_plate(x, size, index, event_shape=(time.number, self.x_dim)):
            data: list[Tensor] = []
            state: FlowState | None = None
            for t in range(time.number):
                with time.active(t):
                    u = pyro.sample(f"u_{t + 1}", drive)
                    if state is None:
                        state = FlowState(self.flow, torch.zeros_like(u))
                    shift, scale = state.next()
                    movement = shift + scale * u
                    state.push(movement)
                    seen = None if x is None else x[:, t]
                    step = dist.Normal(movement, self.noise_scale).to_event(1)
                    data.append(pyro.sample(f"x_{t + 1}", step, obs=seen))
        return torch.stack(data, -2)

    def move(self, u: Tensor) -> Tensor:
        """The movement that a drive ``(B, T, D)`` makes, ``(B, T, D)``."""
        return self.flow.generate(u)

"""VisualPathway: whitening in space, whitening in time, and predictive coding, in one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from zoo.affine_flow import AffineFlow, AffineLevel
from zoo.autoregressive_flow import emit
from zoo.hierarchical_vae import Conditional
from zoo.model import Model
from zoo.networks import mlp
from zoo.rows import data_plate
from zoo.sequence import steps
from zoo.whitening import whitening_matrix

__all__ = ["VisualPathway"]


class _Unwhiten(Transform):
    """x = mean + W^-1 s, with the log-determinant known."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, mean: Tensor, whitening: Tensor, unwhitening: Tensor) -> None:
        super().__init__()
        self.mean, self.whitening, self.unwhitening = mean, whitening, unwhitening

    def _call(self, s: Tensor) -> Tensor:
        return self.mean + s @ self.unwhitening.mT

    def _inverse(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.whitening.mT

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Minus log |det W|, ``(...)``."""
        return -torch.linalg.slogdet(self.whitening)[1].expand(x.shape[:-1])


class VisualPathway(Model):
    """Retina, thalamus and cortex as one generative program of videos.

        z2_t ~ Normal(0, I)                                  cortex, the level above
        z1_t ~ Normal(loc(z2_t), scale(z2_t))                cortex, the level below
        y_t  ~ Normal(network(z1_t), noise)                  what is left for it to explain
        s_t  = shift(s_<t) + scale(s_<t) y_t                 thalamus: whitening in time
        x_t  = mean + W^-1 s_t                               retina: whitening in space (ZCA)

    Read from the bottom up, a frame is whitened in space by W, then in time by the flow, and a
    hierarchical latent Gaussian model explains what is left. W is fixed, taken from frames by
    :meth:`fit_retina`; without frames it is the identity. The density of x is exact.

    References:
        | Predictive coding, variational autoencoders, and biological connections (Marino, 2022),
        | figure 14 https://arxiv.org/abs/2011.07464
        | What does the retina know about natural scenes? (Atick & Redlich, 1992)
        | https://doi.org/10.1162/neco.1992.4.2.196

    Args:
        x_dim: Pixels D of a frame.
        z_dims: Dimensions of the two levels, the lower first.
        hidden: Sizes of the hidden layers between levels.
        order: Frames that the flow looks back on.
        num_steps: Frames of a sequence that is simulated.

    Sites:
        z2_1, z1_1 .. z2_T, z1_T: Latents, support real, event shapes ``(z_dims[1],)`` and
            ``(z_dims[0],)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> model = VisualPathway(x_dim=9, z_dims=(4, 2), hidden=(8,), num_steps=3)
        >>> x = model(size=5)
        >>> x.shape, model.stages(x)["thalamus"].shape
        (torch.Size([5, 3, 9]), torch.Size([5, 3, 9]))
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    mean: Tensor
    whitening: Tensor
    unwhitening: Tensor

    def __init__(
        self,
        x_dim: int,
        z_dims: tuple[int, int] = (32, 8),
        hidden: Sequence[int] = (64,),
        order: int = 2,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(x_dim, num_steps, *z_dims) < 1 or len(z_dims) != 2:
            raise ValueError(
                "x_dim, num_steps and the two z_dims must be at least 1, got "
                f"{x_dim}, {num_steps}, {tuple(z_dims)}."
            )
        self.x_dim, self.z_dims, self.num_steps = x_dim, tuple(z_dims), num_steps
        self.level = Conditional(z_dims[1], z_dims[0], hidden, nn.SiLU)
        self.network, features = mlp(z_dims[0], hidden)
        self.output = nn.Linear(features, x_dim)
        self.log_noise = nn.Parameter(torch.zeros(x_dim))
        self.flow = AffineFlow([AffineLevel(x_dim, order)])
        for name, value in (
            ("mean", torch.zeros(x_dim)),
            ("whitening", torch.eye(x_dim)),
            ("unwhitening", torch.eye(x_dim)),
        ):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("prior_loc", torch.zeros(z_dims[1]), persistent=False)

    def fit_retina(self, x: Tensor, epsilon: float = 1e-3) -> VisualPathway:
        """Take the spatial whitening from frames, ZCA; returns the model.

        Args:
            x: Sequences ``(B, T, D)``.
            epsilon: See :func:`zoo.whitening.whitening_matrix`.
        """
        mean, weight = whitening_matrix(x.reshape(-1, x.shape[-1]), "zca", epsilon)
        self.mean, self.whitening = mean, weight
        self.unwhitening = torch.linalg.inv(weight)
        return self

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
        retina = _Unwhiten(self.mean, self.whitening, self.unwhitening)
        prior = dist.Normal(self.prior_loc, 1.0).to_event(1)
        noise = self.log_noise.exp()
        plate = data_plate(x, size, index, event_shape=(time.number, self.x_dim))
        with plate:
            like = torch.zeros_like(self.mean).expand(plate.subsample_size, -1)
            seen = None if x is None else retina.inv(x)
            shifts, scales, state = emit(self.flow, seen, time.number, like)
            data = []
            for t in range(time.number):
                with time.active(t):
                    z2 = pyro.sample(f"z2_{t + 1}", prior)
                    z1 = pyro.sample(f"z1_{t + 1}", self.level(z2))
                    shift, scale = (shifts[:, t], scales[:, t]) if state is None else state.next()
                    loc = shift + scale * self.output(self.network(z1))
                    step = dist.Normal(loc, scale * noise).to_event(1)
                    frame = dist.TransformedDistribution(step, [retina])
                    obs = None if x is None else x[:, t]
                    data.append(pyro.sample(f"x_{t + 1}", frame, obs=obs))
                if state is not None:
                    state.push(retina.inv(data[-1]))
        return torch.stack(data, -2)

    def stages(self, x: Tensor) -> dict[str, Tensor]:
        """What each stage passes on, each ``(B, T, D)``: ``"retina"`` and ``"thalamus"``."""
        seen = (x - self.mean) @ self.whitening.mT
        return {"retina": seen, "thalamus": self.flow.normalize(seen)[0]}

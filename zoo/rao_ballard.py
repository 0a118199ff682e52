"""RaoBallard: two levels of predictive coding over overlapping image patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from zoo.model import Model
from zoo.rows import data_plate

__all__ = ["ACTIVATIONS", "PRIORS", "RaoBallard", "modules_of"]

PRIORS: dict[str, Callable[[Tensor, Tensor], dist.TorchDistribution]] = {
    "normal": dist.Normal,
    "laplace": dist.Laplace,
    "cauchy": dist.Cauchy,
}
ACTIVATIONS = {"identity": lambda v: v, "tanh": torch.tanh, "logistic": torch.sigmoid}


def modules_of(
    images: Tensor, image_shape: tuple[int, int], size: int, stride: int
) -> tuple[Tensor, Tensor]:
    """Cut images into overlapping squares along their width, as the first level sees them.

    Args:
        images: Rows ``(B, height * width)``.
        image_shape: Height and width; the height is ``size``.
        size: Side of a square.
        stride: Pixels from one square to the next.

    Returns:
        Squares ``(B, M, size * size)``, and the Gaussian window ``(size * size,)`` that weighs
        their pixels in the original model: standard deviation size / 4, largest value 1.

    Raises:
        ValueError: Where the squares do not cover the image.

    Example:
        >>> squares, window = modules_of(torch.zeros(2, 16 * 26), (16, 26), 16, 5)
        >>> squares.shape, window.shape
        (torch.Size([2, 3, 256]), torch.Size([256]))
    """
    height, width = image_shape
    if height != size or width < size or (width - size) % stride:
        raise ValueError(
            f"Squares of side {size} every {stride} pixels do not cover an image of {height} x "
            f"{width}: its height must be {size}, its width {size} plus a multiple of {stride}."
        )
    squares = images.reshape(-1, height, width).unfold(2, size, stride)  # (B, h, M, size)
    axis = (torch.arange(size, dtype=images.dtype) - (size - 1) / 2) / (size / 4)
    window = torch.exp(-0.5 * axis.square())
    return squares.movedim(2, 1).flatten(2), torch.outer(window, window).flatten()


class RaoBallard(Model):
    """The two-level network of Rao and Ballard (1999) as a generative model.

        z2   ~ Normal(0, scale_2)                                one for all modules
        z1_m ~ Normal(f(above_m @ z2), scale_1)                  m = 1 .. M
        x_m  ~ Normal(f(below @ z1_m), scale_x)

    or, with ``prior="laplace"`` or ``"cauchy"``, such activities around the same predictions.

    Each module explains one of M overlapping squares of an image; the second level, with M times
    their receptive field, predicts what all modules have found. f is the identity, tanh or the
    logistic function. Its energy is the paper's: squared errors over variances at each level (for
    which sigma stands in equations 23 and 24 of Marino, 2022) and a quadratic penalty of the
    activities; relaxing it is the paper's dynamics. Pixels that lie in several squares are data
    of each of them, as there.

    Under a normal prior the basis below is arbitrary up to rotations that the level above can
    follow; heavy tails make activities sparse and the basis vectors filters of their own, as in
    :class:`zoo.sparse_coding.SparseCoding`. The basis is free in length: keep its columns at
    unit length while it learns, or give it a weight decay (the paper's prior of the weights).

    References:
        | Predictive coding in the visual cortex: a functional interpretation of some
        | extra-classical receptive-field effects (Rao & Ballard, 1999)
        | https://doi.org/10.1038/4580

    Args:
        x_dim: Pixels D of a square.
        z_dims: Units of a module, and units of the second level.
        num_modules: Squares M of an image.
        activation: ``"identity"``, ``"tanh"`` or ``"logistic"``.
        scales: Standard deviations of pixels, of the first and of the second level.
        shared: Whether all modules have the same basis below; else each has its own.
        prior: Of the activities of both levels: ``"normal"``, ``"laplace"`` or ``"cauchy"``.

    Sites:
        z2: Latent, support real, event shape ``(z_dims[1],)``, in plate ``"data"``.
        z1: Latent, support real, event shape ``(M, z_dims[0])``, in plate ``"data"``.
        x: Observed, event shape ``(M, D)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1, scales that are not positive, an unknown activation or
            prior.

    Example:
        >>> model = RaoBallard(x_dim=64, z_dims=(8, 4))
        >>> model(size=2).shape
        torch.Size([2, 3, 64])
    """

    default_guide: ClassVar[str] = "amortized_normal"

    def __init__(
        self,
        x_dim: int = 256,
        z_dims: tuple[int, int] = (32, 128),
        num_modules: int = 3,
        activation: str = "tanh",
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
        shared: bool = True,
        prior: str = "normal",
    ) -> None:
        super().__init__()
        if min(x_dim, num_modules, *z_dims) < 1 or len(z_dims) != 2:
            raise ValueError(
                "x_dim, num_modules and the two z_dims must be at least 1, got "
                f"{x_dim}, {num_modules}, {tuple(z_dims)}."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            )
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}.")
        if min(scales) <= 0 or len(scales) != 3:
            raise ValueError(f"scales must be three positive numbers, got {tuple(scales)}.")
        self.x_dim, self.z_dims, self.num_modules = x_dim, tuple(z_dims), num_modules
        self.activation, self.prior = activation, prior
        first, second = z_dims
        number = 1 if shared else num_modules
        self.below = nn.Parameter(torch.randn(number, x_dim, first) / first**0.5)
        self.above = nn.Parameter(torch.randn(num_modules, first, second) / second**0.5)
        for name, scale in zip(("scale_x", "scale_1", "scale_2"), scales, strict=True):
            self.register_buffer(name, torch.tensor(float(scale)), persistent=False)
        self.register_buffer("top", torch.zeros(second), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process.

        Args:
            x: Squares ``(B, M, D)``, see :func:`modules_of`; None simulates.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The squares ``(B, M, D)``.

        Raises:
            ValueError: Where the data are no rows of this model; see :func:`zoo.rows.data_plate`.
        """
        f, activity = ACTIVATIONS[self.activation], PRIORS[self.prior]
        with data_plate(x, size, index, event_shape=(self.num_modules, self.x_dim)):
            z2 = pyro.sample("z2", activity(self.top, self.scale_2).to_event(1))
            above = torch.einsum("mks,...s->...mk", self.above, z2)
            z1 = pyro.sample("z1", activity(f(above), self.scale_1).to_event(2))
            basis = self.below.expand(self.num_modules, -1, -1)
            below = torch.einsum("mdk,...mk->...md", basis, z1)
            data: Tensor = pyro.sample("x", dist.Normal(f(below), self.scale_x).to_event(2), obs=x)
            return data

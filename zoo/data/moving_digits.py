"""Moving digits: digits that drift over a dark square and bounce off its edges."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.data.dataset import Dataset
from zoo.data.sequences import Sequences

__all__ = ["load", "render"]


def load(
    *,
    side: int = 16,
    num_steps: int = 20,
    num_digits: int = 1,
    num_train: int = 1000,
    num_validation: int = 200,
    num_test: int = 200,
    digits: Dataset | None = None,
    dequantize: bool = True,
    seed: int = 0,
) -> Sequences:
    """Moving digits, frames in rows of side * side, values from 0 to 1.

    Each digit starts at a random place with a random velocity of 0.5 to 1.5 pixels a frame in each
    direction, moves in a straight line and is mirrored at the edges; places between pixels are
    interpolated bilinearly; digits that overlap add up to at most 1. Training and test sequences
    show different digits.

    References:
        | Unsupervised learning of video representations using LSTMs (Srivastava et al., 2015)
        | https://arxiv.org/abs/1502.04681

    Args:
        side: Side of a frame in pixels.
        num_steps: Frames of a sequence.
        num_digits: Digits in a sequence.
        num_train: Training sequences.
        num_validation: Validation sequences, of training digits.
        num_test: Test sequences, of test digits.
        digits: Where digits come from; by default the 8 x 8 digits that scikit-learn ships.
            ``zoo.data.load("mnist")`` gives the usual ones, which want ``side=64``.
        dequantize: Round values to 256 levels and add uniform noise of one level, so that
            densities of continuous models are bounded by those of the levels: the value is
            (level + u) / 256.
        seed: Seed of everything; the global generator is left alone.

    Raises:
        ValueError: Where a digit does not fit the frame, or numbers are below 1.

    Example:
        >>> data = load(num_train=3, num_validation=1, num_test=2, num_steps=5)
        >>> data.train.shape, data.image_shape
        (torch.Size([3, 5, 256]), (16, 16))
    """
    numbers = (num_steps, num_digits, num_train, num_validation, num_test)
    if min(numbers) < 1:
        raise ValueError(
            "num_steps, num_digits, num_train, num_validation and num_test must be at least 1, "
            f"got {', '.join(map(str, numbers))}."
        )
    if digits is None:
        from zoo.data.digits import load as load_digits

        digits = load_digits(binarize="none")
    height, width = digits.image_shape
    if max(height, width) >= side:
        raise ValueError(
            f"A digit of {height} x {width} pixels cannot move in a frame of side {side}: use a "
            "larger side."
        )
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, rows in (
        (num_train, digits.train),
        (num_validation, digits.train),
        (num_test, digits.test),
    ):
        shape = (number, num_digits)
        images = rows.reshape(-1, height, width)[
            torch.randint(len(rows), shape, generator=generator)
        ]
        frames = _move(images, side, num_steps, generator)
        if dequantize:
            level = (frames * 255).round()
            frames = (level + torch.rand(level.shape, generator=generator)) / 256
        parts.append(frames.reshape(number, num_steps, -1).to(torch.get_default_dtype()))
    train, validation, test = parts
    values = "256 levels with uniform noise of one" if dequantize else "values from 0 to 1"
    return Sequences(
        "moving_digits",
        train,
        torch.full((num_train,), num_steps),
        test,
        torch.full((num_test,), num_steps),
        f"a frame of {side} x {side} pixels, {values}",
        validation,
        torch.full((num_validation,), num_steps),
        (side, side),
    )


def _move(images: Tensor, side: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """Frames ``(N, T, side, side)`` of digits ``(N, M, h, w)``."""
    number, count, height, width = images.shape
    room = torch.tensor([side - height, side - width], dtype=torch.float64)
    place = torch.rand(number, count, 2, generator=generator, dtype=torch.float64) * room
    speed = 0.5 + torch.rand(number, count, 2, generator=generator, dtype=torch.float64)
    sign = torch.randint(2, (number, count, 2), generator=generator) * 2 - 1
    times = torch.arange(num_steps, dtype=torch.float64)
    straight = place[:, None] + times[:, None, None] * (speed * sign)[:, None]  # (N, T, M, 2)
    folded = straight.remainder(2 * room)
    places = torch.where(folded > room, 2 * room - folded, folded)
    frames = render(images[:, None].expand(-1, num_steps, -1, -1, -1), places, side)
    return frames.sum(2).clamp(max=1)


def render(images: Tensor, places: Tensor, side: int) -> Tensor:
    """Put images on dark squares, between pixels by bilinear interpolation.

    Args:
        images: ``(..., h, w)``.
        places: Upper left corners ``(..., 2)``, down and right, in pixels.
        side: Side of the square.

    Returns:
        Squares ``(..., side, side)``.
    """
    height, width = images.shape[-2:]
    pixels = torch.arange(side, dtype=torch.float64)

    def weights(corner: Tensor, size: int) -> Tensor:  # (..., side, size): triangle of width one
        distance = pixels[:, None] - (corner[..., None, None] + torch.arange(size))
        return (1 - distance.abs()).clamp(min=0)

    down, right = weights(places[..., 0], height), weights(places[..., 1], width)
    return down @ images.double() @ right.mT

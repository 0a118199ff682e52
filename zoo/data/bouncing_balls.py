"""Bouncing balls: balls that move in a box and collide, as videos; made from nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.data.sequences import Sequences

__all__ = ["load", "trajectories"]

_SUBSTEPS = 10


def load(
    *,
    side: int = 15,
    num_steps: int = 40,
    num_balls: int = 3,
    radius: float = 1.2,
    num_train: int = 500,
    num_validation: int = 100,
    num_test: int = 100,
    seed: int = 0,
) -> Sequences:
    """Bouncing balls, frames in rows of side * side, values from 0 to 1.

    Balls of equal mass in a box of side 10 start apart, at speed 0.5 a frame; they are mirrored at
    the walls and exchange momentum elastically along the line between them. A pixel is as bright
    as exp(-(d / radius)^4), d being the distance to a ball's center, summed and cut at 1.

    References:
        | The recurrent temporal restricted Boltzmann machine (Sutskever, Hinton & Taylor, 2008)
        | https://papers.nips.cc/paper/3567

    Args:
        side: Side of a frame in pixels.
        num_steps: Frames of a sequence.
        num_balls: Balls in a sequence.
        radius: Radius of a ball, in a box of side 10.
        num_train: Training sequences.
        num_validation: Validation sequences.
        num_test: Test sequences.
        seed: Seed of everything; the global generator is left alone.

    Raises:
        ValueError: For numbers below 1, or balls that do not fit the box.

    Example:
        >>> load(num_train=2, num_validation=1, num_test=1, num_steps=5).train.shape
        torch.Size([2, 5, 225])
    """
    numbers = (side, num_steps, num_balls, num_train, num_validation, num_test)
    if min(numbers) < 1:
        raise ValueError(
            "side, num_steps, num_balls, num_train, num_validation and num_test must be at least "
            f"1, got {', '.join(map(str, numbers))}."
        )
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.arange(side, dtype=torch.float64) + 0.5) * 10 / side
    parts = []
    for number in (num_train, num_validation, num_test):
        places = trajectories(number, num_steps, num_balls, radius, generator)
        across = (grid - places[..., 0:1]).square()  # (N, T, M, side)
        along = (grid - places[..., 1:2]).square()
        distance = across[..., :, None] + along[..., None, :]
        frames = torch.exp(-((distance / radius**2) ** 2)).sum(2).clamp(max=1)
        parts.append(frames.reshape(number, num_steps, -1).to(torch.get_default_dtype()))
    train, validation, test = parts
    return Sequences(
        "bouncing_balls",
        train,
        torch.full((num_train,), num_steps),
        test,
        torch.full((num_test,), num_steps),
        f"a frame of {side} x {side} pixels, values from 0 to 1",
        validation,
        torch.full((num_validation,), num_steps),
        (side, side),
    )


def trajectories(
    number: int, num_steps: int, num_balls: int, radius: float, generator: torch.Generator
) -> Tensor:
    """Places of balls of equal mass in a box of side 10: ``(number, num_steps, num_balls, 2)``.

    Args:
        number: Boxes.
        num_steps: Frames.
        num_balls: Balls in a box.
        radius: Radius of a ball.
        generator: Source of starts and directions.

    Raises:
        ValueError: Where the balls find no room.
    """
    place = torch.empty(number, num_balls, 2, dtype=torch.float64)
    missing = torch.ones(number, dtype=torch.bool)
    for _ in range(200):
        count = int(missing.sum())
        if not count:
            break
        tried = radius + (10 - 2 * radius) * torch.rand(
            count, num_balls, 2, generator=generator, dtype=torch.float64
        )
        apart = torch.cdist(tried, tried) + 100 * torch.eye(num_balls, dtype=torch.float64)
        fits = apart.flatten(1).min(1).values > 2 * radius
        place[missing.nonzero().flatten()[fits]] = tried[fits]
        missing[missing.nonzero().flatten()[fits]] = False
    if bool(missing.any()):
        raise ValueError(
            f"{num_balls} balls of radius {radius} find no room in a box of side 10. Use fewer or "
            "smaller ones."
        )
    angle = 2 * torch.pi * torch.rand(number, num_balls, generator=generator, dtype=torch.float64)
    speed = 0.5 * torch.stack([angle.cos(), angle.sin()], -1)
    frames = [place.clone()]
    for _ in range(num_steps - 1):
        for _ in range(_SUBSTEPS):
            place = place + speed / _SUBSTEPS
            out = ((place < radius) & (speed < 0)) | ((place > 10 - radius) & (speed > 0))
            speed = torch.where(out, -speed, speed)
            for a in range(num_balls):
                for b in range(a):
                    speed = _collide(place, speed, a, b, radius)
        frames.append(place.clone())
    return torch.stack(frames, 1)


def _collide(place: Tensor, speed: Tensor, a: int, b: int, radius: float) -> Tensor:
    """Exchange the velocities along the line between two balls that touch and approach."""
    line = place[:, a] - place[:, b]
    distance = line.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    normal = line / distance
    approach = ((speed[:, a] - speed[:, b]) * normal).sum(-1, keepdim=True)
    meets = (distance < 2 * radius) & (approach < 0)
    push = torch.where(meets, approach, torch.zeros_like(approach)) * normal
    speed = speed.clone()
    speed[:, a] -= push
    speed[:, b] += push
    return speed

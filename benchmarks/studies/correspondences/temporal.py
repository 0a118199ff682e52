"""Flows over time: what they take from moving digits, and the patterns they make run backwards."""

from __future__ import annotations

import math
from typing import Any

import pyro.optim as optimizers
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import zoo
import zoo.data
from guides.inference import CompiledSVI
from zoo.data.digits import load as load_digits

__all__ = [
    "autocorrelation",
    "lag_one",
    "pattern_generator",
    "radii",
    "strokes",
    "temporal_whitening",
]

Result = tuple[dict[str, Any], dict[str, Tensor]]


def lag_one(x: Tensor) -> float:
    """Correlation of a step with the step before it, over all pixels, rows and steps.

    Args:
        x: Sequences ``(B, T, D)``. Each pixel's mean is taken off first: what never changes
            would correlate with itself.

    Example:
        >>> steps = torch.tensor([1.0, -1.0]).repeat(4)
        >>> lag_one(torch.stack([steps, -steps])[..., None])
        -1.0
    """
    x = x - x.mean((0, 1))
    now, before = x[:, 1:], x[:, :-1]
    return float((now * before).sum() / (now.square().sum() * before.square().sum()).sqrt())


def temporal_whitening(
    num_steps: int = 600, num_rows: int = 2000, hidden: tuple[int, ...] = (128,)
) -> Result:
    """Lag-one correlation of moving digits, before and after flows of one and of two levels.

    The first steps of a test sequence, which have no past, are left out of every number.
    """
    data = zoo.data.load("moving_digits", num_train=num_rows, num_validation=1, num_test=200)
    order = 2
    numbers: dict[str, Any] = {"lag_one_digits": lag_one(data.test[:, 2 * order :])}
    pictures = {"digits": data.test[0]}
    for times in (1, 2):
        model = zoo.TemporalDifference(data.x_dim, order=times)
        left = model.differences(data.test)
        name = f"differences_{times}"
        numbers[f"lag_one_{name}"] = lag_one(left[:, 2 * order :])
        pictures[name] = left[0]
    for levels in (1, 2):
        flow = zoo.AutoregressiveFlow(data.x_dim, order, hidden, levels)
        optim = optimizers.ClippedAdam({"lr": 2e-3, "lrd": 0.1 ** (1 / num_steps)})
        svi = CompiledSVI(flow, _nothing, optim, Trace_ELBO(), mode="graph")
        for _ in range(num_steps):
            svi.step(data.train[torch.randint(len(data.train), (20,))])
        with torch.no_grad():
            left = flow.whiten(data.test)
            evidence = flow.log_evidence(data.test).mean()
        name = f"flow_{levels}"
        numbers[f"lag_one_{name}"] = lag_one(left[:, 2 * order :])
        numbers[f"log_density_{name}"] = float(evidence) / data.test[0].numel()
        pictures[name] = left[0]
    return numbers, pictures


def radii(images: Tensor, num_angles: int = 64) -> Tensor:
    """How far the ink of an image is from its center of mass, at angles around it.

    The mean distance of the ink near an angle, with weights exp(8 cos(difference)).

    Args:
        images: Square images in rows, ``(N, side * side)``; ink is bright.
        num_angles: Angles, from the right on downwards.

    Returns:
        In pixels, ``(N, num_angles)``.

    Example:
        >>> axis = torch.arange(9.0) - 4
        >>> down, right = torch.meshgrid(axis, axis, indexing="ij")
        >>> dots = down.hypot(right) == 3
        >>> radii(dots.float().reshape(1, -1), num_angles=4)
        tensor([[3., 3., 3., 3.]])
    """
    side = math.isqrt(images.shape[-1])
    axis = torch.arange(side, dtype=images.dtype)
    down, right = (part.flatten() for part in torch.meshgrid(axis, axis, indexing="ij"))
    total = images.sum(-1, keepdim=True)
    down = down - (images * down).sum(-1, keepdim=True) / total  # (N, side * side)
    right = right - (images * right).sum(-1, keepdim=True) / total
    around = torch.arange(num_angles) * (2 * math.pi / num_angles)
    apart = torch.atan2(down, right)[..., None] - around
    near = images[..., None] * torch.exp(8 * (apart.cos() - 1))
    distance: Tensor = (near * down.hypot(right)[..., None]).sum(1) / near.sum(1)
    return distance


def strokes(zeros: Tensor, number: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """A pen that goes round handwritten zeros, from rest, ``(number, num_steps, 2)``.

        phase_t = phase_{t-1} + 2 pi / 16 + .25 e_t
        x_t     = (1 - exp(-t / 8)) radius(phase_t) (cos phase_t, sin phase_t) / 3 + .1 noise

    The zeros are data, the pace is drawn: it wanders, so that correlations die out as the lag
    grows. A movement that set in at once would be errors of the first steps, which have no past:
    the flow would take them for noise.

    Args:
        zeros: Images of zeros in rows ``(N, side * side)``; each sequence goes round one of them.
        number: Sequences.
        num_steps: Steps.
        generator: Source of the zeros and of the pace.
    """
    around = radii(zeros)[torch.randint(len(zeros), (number,), generator=generator)]
    start = torch.rand(number, 1, generator=generator) * 2 * math.pi
    pace = 2 * math.pi / 16 + 0.25 * torch.randn(number, num_steps, generator=generator)
    phase = start + pace.cumsum(1)
    angle = phase.remainder(2 * math.pi) * (around.shape[1] / (2 * math.pi))
    share, low = angle.frac(), angle.long() % around.shape[1]
    high = (low + 1) % around.shape[1]
    radius = torch.lerp(around.gather(1, low), around.gather(1, high), share) / 3
    risen = 1 - torch.exp(-torch.arange(num_steps) / 8)
    x = (risen * radius)[..., None] * torch.stack([phase.cos(), phase.sin()], -1)
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def autocorrelation(x: Tensor, most: int) -> Tensor:
    """Correlations at lags 0 to ``most`` of every pair of coordinates, ``(most + 1, D, D)``.

    Args:
        x: Sequences ``(B, T, D)``.
        most: Largest lag.

    Returns:
        In [k, i, j] the correlation of coordinate i with coordinate j, k steps before.
    """
    x = (x - x.mean((0, 1))) / x.std((0, 1), correction=0)
    number = x.shape[1]
    return torch.stack(
        [
            torch.einsum("nti,ntj->ij", x[:, k:], x[:, : number - k]) / (len(x) * (number - k))
            for k in range(most + 1)
        ]
    )


def pattern_generator(
    num_steps: int = 600, num_rows: int = 400, order: int = 8, most: int = 32
) -> Result:
    """A flow learns how a pen goes round zeros; run the other way, noise makes such movements.

    Correlations are those of steps 33 to 96, when the movement has risen, and of the pattern after
    160 steps from rest. Held-out sequences go round zeros that the flow has not seen.
    """
    generator = torch.Generator().manual_seed(0)
    length, risen, settled = 96, 32, 160
    digits = load_digits(binarize="none")
    parts = (digits.train, digits.train_labels), (digits.test, digits.test_labels)
    train, test = (
        strokes(rows[labels == 0], num_rows, length, generator) for rows, labels in parts
    )
    flow = zoo.AutoregressiveFlow(x_dim=2, order=order, constant_scale=True, num_steps=length)
    optim = optimizers.ClippedAdam({"lr": 0.03, "lrd": 0.05 ** (1 / num_steps)})
    svi = CompiledSVI(flow, _nothing, optim, Trace_ELBO(), mode="graph")
    for _ in range(num_steps):
        svi.step(train[torch.randint(len(train), (50,))])
    motor = zoo.PatternGenerator.of(flow)
    drive = torch.randn(num_rows, settled + length - risen, 2, generator=generator)
    with torch.no_grad():
        made = motor.move(drive)[:, settled:]
        white = flow.whiten(test)[:, risen:]
    train, test = train[:, risen:], test[:, risen:]
    curves = {
        name: autocorrelation(value, most)
        for name, value in (("training", train), ("held out", test), ("generated", made))
    }
    difference = curves["generated"] - curves["training"]
    whitened = autocorrelation(white, most)[1:]
    numbers = {
        "largest_difference": float(difference.abs().max()),
        "largest_difference_of_held_out": float(
            (curves["held out"] - curves["training"]).abs().max()
        ),
        "largest_of_training": float(curves["training"][1:].abs().max()),
        "largest_of_whitened": float(whitened.abs().max()),
        "lag_one_training": lag_one(train),
        "lag_one_whitened": lag_one(white),
        "std_generated_over_training": float((made.std((0, 1)) / train.std((0, 1))).mean()),
    }
    pictures = {f"correlation, {name}": curve for name, curve in curves.items()}
    pictures["correlation, whitened"] = autocorrelation(white, most)
    return numbers, pictures | {"training": train[0], "generated": made[0]}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""

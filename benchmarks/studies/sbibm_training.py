"""How the guides of the study on sbibm are trained: settings, objectives, loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.objectives import ForwardKL

__all__ = [
    "OBJECTIVES",
    "SETTINGS",
    "Settings",
    "forward_kl",
    "reverse_kl",
    "simulate",
    "sufficient_statistics",
    "train",
]


@dataclass(frozen=True)
class Settings:
    """How the guide of one task is built and trained.

    Args:
        guide: Name of the guide.
        options: Its options.
        num_steps: Updates by forward KL.
        reverse_steps: Updates by reverse KL.
        batch_size: Fresh simulations a step.
        lr: Learning rate at its highest; it falls to zero along a cosine.
        reverse_model: Options of the model that reverse KL is trained on.
    """

    guide: str
    options: Mapping[str, Any]
    num_steps: int = 10_000
    reverse_steps: int = 2_500
    batch_size: int = 256
    lr: float = 2e-3
    reverse_model: Mapping[str, Any] = field(default_factory=dict)

    def text(self, model: zoo.Model) -> str:
        """The settings in a line."""
        options = {**self.options, "batch_size": self.batch_size, "lr": self.lr}
        if getattr(model, "leak", 0):
            options["leak"] = model.leak
        parts = [f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()]
        return f"{self.guide}: {', '.join(parts)}"


def sufficient_statistics(
    x: Tensor, *, size: int | None = None, index: Tensor | None = None
) -> Tensor:
    """Means, log scales and correlation of the four points of SLCP, which are sufficient.

    Args:
        x: Data ``(B, 8)``.
        size: Not used; the encoder passes on whatever the model is called with.
        index: Not used.

    Returns:
        ``(B, 5)``, the correlation through Fisher's transform.
    """
    points = x.unflatten(-1, (4, 2))
    mean = points.mean(-2)
    residual = points - mean.unsqueeze(-2)
    scale = residual.square().mean(-2).sqrt() + 1e-6
    correlation = (residual / scale.unsqueeze(-2)).prod(-1).mean(-1, keepdim=True)
    return torch.cat([mean / 3, scale.log(), (0.9999 * correlation).atanh()], -1)


_FLOW = {"hidden": (256, 256), "init_scale": 1.0, "context": 32, "family_hidden": (64, 64)}

SETTINGS = {
    "two_moons": Settings(
        "amortized_spline_coupling",
        {**_FLOW, "transforms": 6, "bins": 12},
        num_steps=10_000,
        reverse_model={"leak": 1e-3},
    ),
    "slcp": Settings(
        "amortized_spline_coupling",
        {**_FLOW, "transforms": 8, "bins": 8, "inputs": sufficient_statistics},
        num_steps=8_000,
    ),
    "gaussian_mixture": Settings(
        "amortized_spline_coupling", {**_FLOW, "transforms": 6, "bins": 12}
    ),
}


def simulate(model: zoo.Model, size: int) -> Tensor:
    """Data of simulated parameters, a row a simulation."""
    with torch.no_grad(), poutine.block():
        return model(size=size)


def forward_kl(model: zoo.Model, guide: guides.Guide, size: int) -> Tensor:
    """Minus the mean log density of simulated parameters: KL(p || q) up to a constant."""
    return ForwardKL(size=size).differentiable_loss(model, guide)


def reverse_kl(model: zoo.Model, guide: guides.Guide, size: int) -> Tensor:
    """Minus the mean ELBO of simulated data: KL(q || p) up to a constant."""
    x = simulate(model, size)
    return Trace_ELBO().differentiable_loss(model, guide, x) / size


OBJECTIVES: dict[str, Callable[[zoo.Model, guides.Guide, int], Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
}


def train(
    model: zoo.Model, settings: Settings, objective: str, num_steps: int, *, report: int = 1000
) -> guides.Guide:
    """Build a guide from simulations and train it.

    Args:
        model: The model to simulate.
        settings: How.
        objective: A key of ``OBJECTIVES``.
        num_steps: Number of updates.
        report: Steps between two printed lines.
    """
    x = simulate(model, 10_000)
    guide = guides.make(settings.guide, model, x, **settings.options)
    optim = torch.optim.Adam(guide.parameters(), settings.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: _rate(step, num_steps))
    loss, recent, start = OBJECTIVES[objective], [], time.perf_counter()
    for step in range(1, num_steps + 1):
        optim.zero_grad()
        value = loss(model, guide, settings.batch_size)
        value.backward()
        # One simulation far out must not undo what thousands taught.
        norm = torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        if torch.isfinite(norm):
            optim.step()
        schedule.step()
        recent.append(value.item())
        if step % report == 0:
            seconds = time.perf_counter() - start
            print(f"{objective} {step} loss {np.mean(recent):.4f} {seconds:.0f} s", flush=True)
            recent = []
    return guide.eval()


def _rate(step: int, num_steps: int, warm_up: int = 200) -> float:
    return (
        min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(num_steps, 1)))
    )

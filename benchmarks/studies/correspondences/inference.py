"""Inference: what the precision of a unit does, and what more iterations a time step bring."""

from __future__ import annotations

import math
from typing import Any, cast

import pyro
import pyro.optim as optimizers
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from guides.diagnostics import elbo, log_evidence
from guides.inference import SVI, PredictiveCoding
from zoo.linear_gaussian import LinearLevel

__all__ = ["GAINS", "ITERATIONS", "closed_form", "iterations", "precision"]

Result = tuple[dict[str, Any], dict[str, Tensor]]

GAINS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
ITERATIONS = (1, 2, 4, 8)


def closed_form(
    weight: Tensor, noise: float, precision: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior of z ~ N(0, I), x ~ N(W z, noise^2) with the units' precision multiplied.

        Lambda = I + W' diag(g) W / noise^2
        z      = Lambda^-1 W' diag(g) x / noise^2             gain dz/dx_1: its first column

    Args:
        weight: W ``(D, K)``.
        noise: Standard deviation of the data.
        precision: Factors g of the precision of every unit, ``(D,)``.
        x: Data ``(B, D)``.

    Returns:
        Means ``(B, K)``, covariance ``(K, K)`` and dz/dx_1 ``(K,)``.
    """
    inner = weight.mT * precision / noise**2
    covariance = torch.linalg.inv(torch.eye(weight.shape[1]).to(weight) + inner @ weight)
    reach = covariance @ inner
    return x @ reach.mT, covariance, reach[:, 0]


def precision(gains: tuple[float, ...] = GAINS) -> Result:
    """Gain of an error unit, uncertainty, and the error left at it, as its precision rises."""
    noise = 0.8
    generator = torch.Generator().manual_seed(0)
    model = zoo.LinearGaussian((2, 3), ("unit", "isotropic"), bias=False).double()
    weight = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    level = cast(LinearLevel, model.levels[1])
    assert level.weight is not None
    assert level.log_scale is not None
    with torch.no_grad():
        level.weight.copy_(weight)
        level.log_scale.fill_(math.log(noise))
    model.requires_grad_(False)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    loop = PredictiveCoding(
        model,
        optimizers.PyroOptim(torch.optim.Adam, {"lr": 0.0}),
        num_steps=200,
        solver="conjugate_gradient",
    )
    names = ("gain", "std", "error")
    measured: dict[str, list[float]] = {name: [] for name in names}
    largest = 0.0
    moved = x + torch.eye(3, dtype=torch.float64)[0]
    for g in gains:
        factors = torch.tensor([g, 1.0, 1.0], dtype=torch.float64)
        attending = loop.given(gain={"x": factors})
        found, other = attending.infer(x)["z"], attending.infer(moved)["z"]
        covariance = attending.posterior(x).covariance("data")[0]
        # What the unit's own prediction w_1 z moves when the unit is moved: its gain.
        measured["gain"].append(float(((other - found) @ weight[0]).mean()))
        measured["std"].append(float((weight[0] @ covariance @ weight[0]).sqrt()))
        measured["error"].append(float((x[:, 0] - found @ weight[0]).abs().mean()))
        mean, exact, _ = closed_form(weight, noise, factors, x)
        largest = max(largest, float((found - mean).abs().max()))
        largest = max(largest, float((covariance - exact).abs().max()))
    grid = torch.logspace(math.log10(gains[0]), math.log10(gains[-1]), 61, dtype=torch.float64)
    curves: dict[str, list[float]] = {f"exact {name}": [] for name in names}
    for g in grid.tolist():
        factors = torch.tensor([g, 1.0, 1.0], dtype=torch.float64)
        mean, exact, reach = closed_form(weight, noise, factors, x)
        curves["exact gain"].append(float(weight[0] @ reach))
        curves["exact std"].append(float((weight[0] @ exact @ weight[0]).sqrt()))
        curves["exact error"].append(float((x[:, 0] - mean @ weight[0]).abs().mean()))
    numbers: dict[str, Any] = {"largest_difference_from_closed_form": largest, **measured}
    pictures = {name: torch.tensor(values) for name, values in (measured | curves).items()}
    return numbers, pictures | {"precision": torch.tensor(gains), "grid": grid}


def iterations(
    num_steps: int = 60,
    num_rows: int = 200,
    length: int = 4,
    counts: tuple[int, ...] = ITERATIONS,
) -> Result:
    """The bound of amortized variational filtering, by iterations at every time step.

    One program, a deep Markov model with weights that are fixed and large, and binary data drawn
    from it; a filter for every number of iterations, each trained for the same number of steps
    from the same seed. Gains are paired by held-out sequence.
    """
    model = zoo.DeepMarkov(12, z_dim=3, emission=16, transition=8, num_steps=length)
    with torch.no_grad():
        for parameter in (*model.network.parameters(), *model.likelihood.parameters()):
            parameter.mul_(3.0)
    model.requires_grad_(False)
    train, test = model(size=num_rows), model(size=300)
    numbers: dict[str, Any] = {}
    rows: list[Tensor] = []
    for count in counts:
        pyro.set_rng_seed(0)
        guide = guides.make(
            "iterative_filtering_normal",
            model,
            train,
            num_iterations=count,
            num_particles=2,
            network=32,
        )
        optim = optimizers.ClippedAdam({"lr": 1e-2, "lrd": 0.1 ** (1 / num_steps)})
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(num_steps):
            svi.step(train)
        rows.append(elbo(model, guide, test, num_samples=50).rows / length)
        numbers[f"bound_{count}"] = float(rows[-1].mean())
        if len(rows) > 1:
            gained = rows[-1] - rows[-2]  # paired by sequence
            numbers[f"gained_{count}"] = float(gained.mean())
            numbers[f"gained_{count}_error"] = float(gained.std() / len(gained) ** 0.5)
    evidence = log_evidence(model, guide, test, num_samples=500).rows.mean() / length
    numbers["log_evidence"] = float(evidence)
    for count in counts:
        numbers[f"below_{count}"] = numbers["log_evidence"] - numbers[f"bound_{count}"]
    return numbers, {"iterations": torch.tensor(counts)}

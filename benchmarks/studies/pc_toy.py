"""One latent, one weight: where predictive coding, Langevin and its exact version lead.

    python -m benchmarks.studies.pc_toy

    x ~ N(1, 5) are data; the model is z ~ N(mu, 1), x ~ N(w z, 1), with mu and w learned

Maximum likelihood is w = 2, mu = 1/2. Learning at the relaxed latent ignores its variance, so w
can always lower the energy by growing: it diverges, slowly. Learning at Langevin draws sees the
variance; the unadjusted sampler sees a little too much, and lands where

    w^2 = s^2 / (1 + eta s^2 / 2) - 1,    s^2 = 5

while the Metropolis-adjusted sampler lands at maximum likelihood. The results go to
``benchmarks/records/pc_toy``, the figure to ``docs/figures/pc_toy.svg``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from benchmarks.study import StudyLog
from guides.inference import LangevinPredictiveCoding, LaplaceCorrected, PredictiveCoding

__all__ = [
    "STEPS",
    "Toy",
    "corrected",
    "data",
    "landing",
    "langevin",
    "main",
    "point",
    "point_curve",
    "run",
    "settled",
    "train",
]

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records" / "pc_toy" / "study.jsonl"
FIGURE = ROOT / "docs" / "figures" / "pc_toy.svg"
STEPS = (0.01, 0.05, 0.1, 0.2)
START = (1.0, 0.0)
NUM_ROWS = 1000
CORRECTED_STEPS = 400


class Toy(nn.Module):
    """The model with its two parameters.

    Args:
        w: First weight.
        mu: First mean.
    """

    def __init__(self, w: float = START[0], mu: float = START[1]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.mu = nn.Parameter(torch.tensor(mu, dtype=torch.float64))

    def program(self, x: Tensor) -> None:
        """The Pyro program."""
        pyro.module("toy", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)

    def numbers(self) -> list[float]:
        """W and mu."""
        return [float(self.w.detach()), float(self.mu.detach())]


def data(num_rows: int = NUM_ROWS) -> Tensor:
    """Rows with mean 1 and variance 5, exactly, so that the landing points are exact."""
    x = torch.randn(num_rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 1 + math.sqrt(5) * (x - x.mean()) / x.std(correction=0)


def landing(step: float) -> float:
    """Where w lands with the unadjusted sampler; step 0 is maximum likelihood.

    Example:
        >>> round(landing(0.1) ** 2, 6), landing(0.0)
        (3.0, 2.0)
    """
    return math.sqrt(5 / (1 + 5 * step / 2) - 1)


def point_curve(num_steps: int, learning_rate: float) -> list[list[float]]:
    """Learning at the exact mode of every row, from the moments of the data: [step, w, mu].

    Gradients of the mean energy at z* = (mu + w x) / (1 + w^2) need the mean 1 and the second
    moment 6 of the data only, so that millions of steps cost nothing.
    """
    w, mu = START
    mean, square = 1.0, 6.0
    kept = [[0.0, w, mu]]
    marks = {round(10 ** (i / 12)) for i in range(12 * 8)}
    for step in range(1, num_steps + 1):
        precision = 1 + w * w
        z = (mu + w * mean) / precision
        zz = (mu * mu + 2 * mu * w * mean + w * w * square) / precision**2
        xz = (mu * mean + w * square) / precision
        w, mu = w - learning_rate * (w * zz - xz), mu - learning_rate * (mu - z)
        if step in marks or step == num_steps:
            kept.append([float(step), w, mu])
    return kept


def train(loop: Any, toy: Toy, x: Tensor, num_steps: int) -> tuple[list[list[float]], Tensor]:
    """The curve at round steps, and w and mu of every step."""
    marks = {round(10 ** (i / 12)) for i in range(12 * 8)}
    curve, every = [[0.0, *toy.numbers()]], []
    for step in range(1, num_steps + 1):
        loop.step(x)
        every.append(toy.numbers())
        if step in marks or step == num_steps:
            curve.append([float(step), *every[-1]])
    return curve, torch.tensor(every, dtype=torch.float64)


def settled(every: Tensor, blocks: int = 8) -> dict[str, float]:
    """Mean of the last three quarters, with the error between blocks of them."""
    rest = every[len(every) // 4 :]
    means = rest[: len(rest) // blocks * blocks].reshape(blocks, -1, 2).mean(1)
    error = means.std(0) / math.sqrt(blocks)
    return {
        "w": float(means[:, 0].mean()),
        "w_error": float(error[0]),
        "mu": float(means[:, 1].mean()),
        "mu_error": float(error[1]),
    }


def point(x: Tensor, num_steps: int) -> dict[str, Any]:
    """Point-estimate learning: the loop for some steps, its recursion for all."""
    toy = Toy()
    loop = PredictiveCoding(
        toy.program,
        pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 0.01 / len(x)}),
        num_steps=1,
        solver="newton",
    )
    _, every = train(loop, toy, x, 500)
    curve = point_curve(num_steps, 0.01)
    reached = point_curve(500, 0.01)[-1]
    return {
        "curve": curve,
        "w": curve[-1][1],
        "mu": curve[-1][2],
        "loop_minus_recursion": abs(float(every[-1, 0]) - reached[1]),
    }


def corrected(x: Tensor, num_steps: int) -> dict[str, Any]:
    """Learning at the Laplace evidence, which is exact here: gradient ascent to the maximum."""
    toy = Toy()
    loop = LaplaceCorrected(
        toy.program,
        pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 0.3 / len(x)}),
        num_steps=1,
    )
    curve, every = train(loop, toy, x, num_steps)
    return {"curve": curve, "w": float(every[-1, 0]), "mu": float(every[-1, 1])}


def langevin(x: Tensor, num_steps: int, **options: Any) -> dict[str, Any]:
    """Learning at persistent chains, one draw a row and step."""
    toy = Toy()
    loop = LangevinPredictiveCoding(
        toy.program,
        pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 0.1 / len(x)}),
        persistent=True,
        num_samples=1,
        mode="graph",
        **options,
    )
    curve, every = train(loop, toy, x, num_steps)
    return {"curve": curve, **settled(every)}


def run(
    records: Path = RECORDS, figure: Path | None = FIGURE, *, point_steps: int = 2_000_000,
    num_steps: int = 4000,
) -> None:  # fmt: skip
    """Run what is missing, and draw."""
    x = data()
    jobs: dict[str, Any] = {"point estimate": lambda: point(x, point_steps)}
    for step in STEPS:
        jobs[f"langevin, eta {step:g}"] = lambda step=step: {
            **langevin(x, num_steps, step_size=step, num_mixing=0),
            "predicted_w": landing(step),
        }
    jobs["mala"] = lambda: {
        **langevin(x, num_steps, sampler="mala", num_mixing=1),
        "predicted_w": landing(0.0),
    }
    jobs["laplace corrected"] = lambda: {
        **corrected(x, min(num_steps, CORRECTED_STEPS)),
        "predicted_w": landing(0.0),
    }
    with StudyLog(
        records,
        title="The toy that point estimates cannot learn",
        question="Where do predictive coding, Langevin and Metropolis-adjusted draws lead?",
        protocol=(
            f"{NUM_ROWS} rows with mean 1 and variance 5; z ~ N(mu, 1), x ~ N(w z, 1), started at "
            f"w = {START[0]:g}, mu = {START[1]:g}. Point estimate: gradient descent at rate 0.01 "
            f"at the exact mode, {point_steps:,} steps. Langevin and MALA: persistent chains, one "
            f"draw a row and step, rate 0.1, {num_steps:,} steps; w is the mean of the last "
            "three quarters, its error that between eight blocks. Laplace-corrected: gradient "
            f"ascent on the Laplace evidence at rate 0.3, {CORRECTED_STEPS} steps."
        ),
        command="python -m benchmarks.studies.pc_toy",
        modules=["benchmarks.studies.pc_toy"],
        columns={
            "predicted_w": "closed form: sqrt(5 / (1 + 5 eta / 2) - 1), maximum likelihood at 0",
            "w_error": "standard error between blocks of steps",
            "loop_minus_recursion": "w of the loop minus that of its recursion after 500 steps",
        },
    ) as log:
        for name, job in jobs.items():
            if log.done({"method": name}):
                continue
            with pyro.get_param_store().scope():
                pyro.set_rng_seed(0)
                log.add(key={"method": name}, values=job())
        found = {name: log.values(method=name) or {} for name in jobs}
        log.note(
            "Learning at a point diverges: its w grows to "
            f"{found['point estimate']['w']:.1f} in {point_steps:,} steps and goes on. Langevin "
            "learning lands at the predicted weights, the adjusted sampler and the "
            "Laplace-corrected loop at maximum likelihood."
        )
    if figure is not None:
        from benchmarks.studies.pc_toy_figure import draw

        figure.parent.mkdir(parents=True, exist_ok=True)
        figure.write_text(draw(found), encoding="utf-8")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    run(args.records, args.figure)


if __name__ == "__main__":
    main()

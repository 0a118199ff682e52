"""Linear chains: how many Hessian products a relaxation needs, by depth and by solver.

    python -m benchmarks.studies.pc_chains

    x16 (clamped) -> depth x h16 -> y (clamped)     every scale 1, weights Normal(0, 1 / fan_in)

The energy is a quadratic whose minimum is known. Every relaxation starts at the feed-forward
state; what counts is the smallest number of gradients and Hessian products, each counted once
and the first gradient included, after which the latents are within 1e-3 of the minimum, relative
to the distance at the start. Gradient descent moves the latents themselves by 1 / lambda_max, and
its count is the number of its steps; the other solvers are run as `PredictiveCoding` runs them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from benchmarks.study import StudyLog
from guides.inference import PredictiveCoding

__all__ = ["DEPTHS", "SOLVERS", "Chain", "gradient_steps", "main", "products", "relaxation", "run"]

RECORDS = Path(__file__).parents[1] / "records" / "pc_chains" / "study.jsonl"
DEPTHS = (2, 5, 10, 20)
WIDTH = 16
SOLVERS: dict[str, dict[str, Any]] = {
    "auto": {"solver": "auto"},
    "conjugate_gradient": {"solver": "conjugate_gradient", "parameterization": "noncentered"},
}


class Chain:
    """A chain with its data and its minimum, in float64.

    Args:
        depth: Number of latent sites.
        outputs: Size of the clamped output.
        seed: Of weights and data; the order of the draws is that of the published figures.
    """

    def __init__(self, depth: int, outputs: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = [WIDTH] * (depth + 1) + [outputs]
        weights = [
            rng.standard_normal((size, fan_in)) / fan_in**0.5
            for fan_in, size in itertools.pairwise(sizes)
        ]
        self.depth = depth
        self.weights = [torch.from_numpy(weight) for weight in weights]
        self.x = torch.from_numpy(rng.standard_normal(WIDTH)).unsqueeze(0)
        self.y = torch.from_numpy(rng.standard_normal(outputs)).unsqueeze(0)

    def model(self, x: Tensor, y: Tensor) -> None:
        """The program."""
        value = x
        with pyro.plate("data", len(x)):
            for i, weight in enumerate(self.weights):
                loc = value @ weight.T
                last = i == self.depth
                value = pyro.sample(
                    "y" if last else f"h{i + 1}",
                    dist.Normal(loc, 1.0).to_event(1),
                    obs=y if last else None,
                )

    def start(self) -> Tensor:
        """The feed-forward state of all latents ``(K,)``."""
        value, parts = self.x, []
        for weight in self.weights[:-1]:
            value = value @ weight.T
            parts.append(value.squeeze(0))
        return torch.cat(parts)

    def quadratic(self) -> tuple[Tensor, Tensor]:
        """Hessian ``(K, K)`` and minimum ``(K,)`` of the energy."""
        size = WIDTH * self.depth
        errors = torch.zeros(size + self.y.shape[-1], size, dtype=torch.float64)
        constant = torch.zeros(len(errors), dtype=torch.float64)
        errors[:size] = torch.eye(size, dtype=torch.float64)
        for i, weight in enumerate(self.weights[1:], 1):
            row = slice(i * WIDTH, i * WIDTH + len(weight))
            errors[row, (i - 1) * WIDTH : i * WIDTH] = -weight
        constant[:WIDTH] = (self.x @ self.weights[0].T).squeeze(0)
        constant[size:] = -self.y.squeeze(0)
        hessian = errors.T @ errors
        return hessian, torch.linalg.solve(hessian, errors.T @ constant)

    def distance(self, values: dict[str, Tensor]) -> float:
        """Distance of latents to the minimum over that of the start."""
        _, minimum = self.quadratic()
        found = torch.cat([values[f"h{i}"].squeeze(0) for i in range(1, self.depth + 1)])
        return float((found - minimum).norm() / (self.start() - minimum).norm())


def relaxation(chain: Chain, num_steps: int, **options: Any) -> tuple[dict[str, Tensor], int]:
    """Latents after a relaxation, and the gradients and products that it took."""
    with pyro.get_param_store().scope():
        optim = PyroOptim(torch.optim.Adam, {"lr": 1e-3})  # weights are constants: never used
        pc = PredictiveCoding(chain.model, optim, num_steps=num_steps, **options)
        return pc.infer(chain.x, chain.y), pc.num_products


def products(chain: Chain, *, tolerance: float = 1e-3, most: int = 1000, **options: Any) -> int:
    """The fewest gradients and products after which a solver is within the tolerance."""
    low, high = 0, 1
    while chain.distance(relaxation(chain, high, **options)[0]) > tolerance:
        low, high = high, 2 * high
        if low > most:
            raise ValueError(f"Still farther than {tolerance} after {low} steps.")
    while high - low > 1:
        middle = (low + high) // 2
        if chain.distance(relaxation(chain, middle, **options)[0]) > tolerance:
            low = middle
        else:
            high = middle
    return relaxation(chain, high, **options)[1]


def gradient_steps(chain: Chain, tolerance: float = 1e-3) -> int:
    """Steps of centered gradient descent at 1 / lambda_max, mode by mode.

    Mode k keeps ``(1 - lambda_k / lambda_max)^T`` of its distance, which the loop's own gradient
    descent is held to by a test.
    """
    hessian, minimum = chain.quadratic()
    values, vectors = torch.linalg.eigh(hessian)
    modes = vectors.T @ (chain.start() - minimum)
    kept = 1 - values / values[-1]
    low, high = 0, 1_000_000
    while high - low > 1:
        middle = (low + high) // 2
        if float((modes * kept**middle).norm() / modes.norm()) > tolerance:
            low = middle
        else:
            high = middle
    return high


def run(records: Path = RECORDS, *, seeds: int = 3) -> None:
    """Run what is missing."""
    with StudyLog(
        records,
        title="Linear chains: products until equilibrium",
        question="How much does a relaxation cost as the hierarchy grows deeper?",
        protocol=(
            "x16 -> depth x h16 -> y, weights Normal(0, 1 / fan_in), unit scales, both ends "
            "clamped, feed-forward start, float64. Gradients and Hessian products, each counted "
            "once and the first gradient included, until the latents are within 1e-3 of the "
            "minimum, relative to the start. Plain gradient descent: steps of 1 / lambda_max in "
            "the latents themselves. Medians over 3 seeds of weights and data."
        ),
        command="python -m benchmarks.studies.pc_chains",
        over=("seed",),
        modules=["benchmarks.studies.pc_chains"],
        columns={"products": "gradients and Hessian products to 1e-3"},
    ) as log:
        medians: dict[tuple[str, int], list[int]] = {}
        for outputs in (4, 16):
            for name in ("gradient, centered", *SOLVERS):
                for depth in DEPTHS:
                    found = []
                    for seed in range(seeds):
                        key = {"solver": name, "outputs": outputs, "depth": depth, "seed": seed}
                        if not log.done(key):
                            chain = Chain(depth, outputs, seed)
                            count = (
                                products(chain, **SOLVERS[name])
                                if name in SOLVERS
                                else gradient_steps(chain)
                            )
                            log.add(key=key, values={"products": count})
                        values = log.values(**key)
                        found.append(int(values["products"]) if values else 0)
                    medians.setdefault((name, outputs), []).append(int(statistics.median(found)))
                print(name, outputs, medians[name, outputs], flush=True)
        lines = [
            f"{name}, {outputs} outputs: {', '.join(map(str, counts))}"
            for (name, outputs), counts in medians.items()
        ]
        log.note(f"Medians at depths {', '.join(map(str, DEPTHS))}. " + "; ".join(lines) + ".")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    run(options.records, seeds=options.seeds)


if __name__ == "__main__":
    main()

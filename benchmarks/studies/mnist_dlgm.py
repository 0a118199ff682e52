"""Learning one deep latent Gaussian model by nine kinds of inference, at one budget of gradients.

    python -m benchmarks.studies.mnist_dlgm --jobs 2

The program has levels of 20, 128 and 256 latents below which lie 784 binary pixels: the sizes of
divide-and-conquer predictive coding. Every method trains it on statically binarized MNIST from the
same initial weights of its seed, in batches of 100, until it has spent the same number of
gradients of a row's log joint. What is scored is the *model*: its evidence on held-out images,
with a proposal that owes nothing to the method, and by annealing beside it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
from benchmarks.pool import results
from benchmarks.study import StudyLog
from guides.diagnostics import annealed_importance_sampling
from guides.energy import LogJoint
from guides.inference import (
    CompiledSVI,
    DivideAndConquer,
    HybridPredictiveCoding,
    IncrementalPredictiveCoding,
    LangevinPredictiveCoding,
    PredictiveCoding,
)
from guides.inference.curvature import hessian
from guides.inference.newton import newton
from guides.objectives import RefinementELBO
from zoo.data import binarized_mnist
from zoo.model import Model
from zoo.rows import data_plate

__all__ = [
    "DLGM",
    "METHODS",
    "Method",
    "evidence",
    "independent_pixels",
    "main",
    "run",
    "score",
    "summary",
    "summary_of",
    "train",
]

RECORDS = Path(__file__).parents[1] / "records" / "mnist_dlgm" / "study.jsonl"
SIZES = (20, 128, 256, 784)
BUDGET = 400_000
BATCH = 100
NUM_TEST, NUM_ANNEALED = 1000, 100
PUBLISHED = (
    "Published figures of the same sizes are not comparable: 102.5 (divide-and-conquer, Sennesh "
    "et al., 2024) is a bound of 4 particles that were refined on the scored images over 2000 "
    "epochs, with continuous pixels in training and thresholded ones in scoring; 144.6 (Monte "
    "Carlo predictive coding, Oliviers et al., 2024, levels of 20, 128 and 128) is a mean over "
    "5000 draws from the prior of thresholded images, an estimator that lies tens of nats too "
    "high."
)


class DLGM(Model):
    """A deep latent Gaussian model with unit noise at every level.

        z3 ~ Normal(0, I)
        z2 ~ Normal(W3 silu(z3) + b3, I)
        z1 ~ Normal(W2 silu(z2) + b2, I)
        x  ~ Bernoulli(logits = W1 silu(z1) + b1)

    Noise is fixed, the same for all methods: with point estimates a learned scale collapses.

    Args:
        sizes: Dimensions from the top level to the data.
        data_mean: Mean of the data, from which the output bias starts.
    """

    def __init__(self, sizes: tuple[int, ...] = SIZES, data_mean: Tensor | None = None) -> None:
        super().__init__()
        self.sizes = sizes
        self.maps = nn.ModuleList(
            nn.Linear(above, below) for above, below in itertools.pairwise(sizes)
        )
        if data_mean is not None:
            with torch.no_grad():
                cast(nn.Linear, self.maps[-1]).bias.copy_(
                    torch.logit(data_mean.clamp(0.001, 0.999))
                )
        self.register_buffer("top", torch.zeros(sizes[0]), persistent=False)

    def forward(
        self, x: Tensor | None = None, *, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """The generative process; see :class:`zoo.vae.VAE` for the arguments."""
        event_shape = (self.sizes[-1],)
        with data_plate(x, size, index, event_shape=event_shape, values="binary"):
            z = pyro.sample(f"z{len(self.maps)}", dist.Normal(self.top, 1.0).to_event(1))
            *between, last = self.maps
            for level, weights in zip(range(len(between), 0, -1), between, strict=True):
                z = pyro.sample(f"z{level}", dist.Normal(weights(F.silu(z)), 1.0).to_event(1))
            row = dist.Bernoulli(logits=last(F.silu(z))).to_event(1)
            data: Tensor = pyro.sample("x", row, obs=x)
            return data


@dataclass(frozen=True)
class Method:
    """How the model is trained.

    Args:
        build: From model, example rows and learning rate to a loop.
        cost: Gradients a row and step, for loops that do not count them themselves.
        rate: Learning rate.
        persistent: Whether the loop keeps state by row, and wants the rows' numbers.
    """

    build: Callable[[DLGM, Tensor, pyro.optim.PyroOptim], Any]
    cost: int | None = None
    rate: float = 1e-3


def _svi(name: str, objective: Callable[[], Any], **options: Any) -> Any:
    def build(model: DLGM, x: Tensor, optim: pyro.optim.PyroOptim) -> CompiledSVI:
        guide = guides.make(name, model, x, **options)
        return CompiledSVI(model, guide, optim, objective(), mode="graph")

    return build


_ITERATIONS = 4
_FEW = 3e-3
"""Learning rate of methods that make few updates from many gradients."""

METHODS: dict[str, Method] = {
    "direct amortization": Method(_svi("bottom_up_normal", Trace_ELBO, hidden=(256,)), cost=1),
    "iterative": Method(
        _svi(
            "iterative_normal",
            RefinementELBO,
            num_iterations=_ITERATIONS,
            num_particles=1,
            network=(256,),
            start="encoder",
            update="learned_step",
            encodings=("natural_gradient", "parameters"),
            rate=0.3,
        ),
        cost=_ITERATIONS + 1,
    ),
    "flow": Method(
        _svi(
            "amortized_iaf",
            Trace_ELBO,
            hidden=(256,),
            transforms=2,
            family_hidden=(512, 512),
            context=64,
        ),
        cost=1,
    ),
    "predictive coding": Method(
        lambda model, x, optim: PredictiveCoding(model, optim, num_steps=10, mode="graph"),
        rate=_FEW,
    ),
    "incremental": Method(
        lambda model, x, optim: IncrementalPredictiveCoding(
            model, optim, num_steps=10, mode="graph"
        ),
        rate=3e-4,
    ),
    "Langevin": Method(
        lambda model, x, optim: LangevinPredictiveCoding(
            model, optim, num_steps=4, num_mixing=3, num_samples=4, mode="graph"
        ),
        rate=_FEW,
    ),
    "hybrid": Method(
        lambda model, x, optim: HybridPredictiveCoding(
            model,
            optim,
            guides.make("amortized_delta", model, x, hidden=(256,)),
            num_steps=5,
            mode="graph",
        ),
        rate=_FEW,
    ),
    "divide and conquer": Method(
        lambda model, x, optim: DivideAndConquer(
            model, optim, num_particles=4, num_sweeps=1, anneal=5
        ),
        rate=_FEW,
    ),
    "divide and conquer, published": Method(
        lambda model, x, optim: DivideAndConquer(
            model, optim, num_particles=4, num_sweeps=1, anneal=5, variant="published"
        ),
        rate=_FEW,
    ),
}


def train(
    method: str, seed: int, data: Tensor, *, budget: int, sizes: tuple[int, ...] = SIZES
) -> tuple[DLGM, dict[str, Any]]:
    """Train until the budget is spent; the model, and what it took."""
    pyro.set_rng_seed(seed)
    model = DLGM(sizes, data.mean(0))
    chosen = METHODS[method]
    optim = pyro.optim.ClippedAdam({"lr": chosen.rate, "clip_norm": 1e4})
    loop = chosen.build(model, data[:BATCH], optim)
    generator = torch.Generator().manual_seed(seed)
    spent, updates, started = 0, 0, time.perf_counter()
    order = torch.empty(0, dtype=torch.int64)
    while spent < budget:
        if len(order) < BATCH:
            order = torch.randperm(len(data), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        loss = loop.step(data[rows], size=len(data), index=rows)
        if not math.isfinite(loss):
            raise FloatingPointError(f"{method}, seed {seed}: the loss became {loss}.")
        updates += 1
        if chosen.cost is None:
            spent = int(loop.gradient_evaluations)
        else:
            spent += chosen.cost * len(rows)
    reasons = [kind.reason for kind in getattr(loop, "compiled", []) if kind.reason]
    return model.requires_grad_(False).eval(), {
        "updates": updates,
        "gradients": spent,
        "train_seconds": round(time.perf_counter() - started, 1),
        **({"ran eagerly": reasons[0]} if reasons else {}),
    }


def evidence(
    model: DLGM, x: Tensor, num_samples: int = 5000, num_steps: int = 40
) -> tuple[Tensor, Tensor]:
    """Importance-weighted evidence of every image, with a proposal refined for the image.

    The mode is found from what the program predicts, by predictive coding and one Gauss-Newton
    step; the proposal is the Gaussian with the Gauss-Newton curvature there. The draws of one
    image are rows of one call, which are products of large matrices.

    Returns:
        Evidence in nats and effective sample size, each ``(B,)``.
    """
    found, sizes = [], []
    idle = pyro.optim.ClippedAdam({"lr": 0.0})
    relaxation = PredictiveCoding(model, idle, num_steps=num_steps, solver="auto")
    draws = LogJoint(model, (x[:1].expand(num_samples, -1),))
    for part in x.split(50):
        joint = LogJoint(model, (part,))
        start = joint.layout.pack(relaxation.infer(part))
        packed, _ = newton(joint, start, num_steps=1, kind="gauss_newton")
        precision = hessian(joint, packed, kind="gauss_newton")["local"]  # (B, K, K)
        factor = torch.linalg.cholesky(precision)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        for row in range(len(part)):
            noise = torch.randn(num_samples, precision.shape[-1])
            # The draw has covariance (L L')^-1: solve L' u = noise.
            moved = torch.linalg.solve_triangular(factor[row].mT, noise.mT, upper=True).mT
            draws.args = (part[row : row + 1].expand(num_samples, -1),)
            log_p, _ = draws.packed({"data": packed["data"][row] + moved})
            constant = 0.5 * noise.shape[1] * math.log(2 * math.pi)
            log_w = log_p + 0.5 * noise.square().sum(-1) + constant - log_det[row]
            found.append(log_w.logsumexp(0) - math.log(num_samples))
            sizes.append((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp())
    return torch.stack(found), torch.stack(sizes)


def score(model: DLGM, test: Tensor, seed: int, num_annealed: int) -> dict[str, Any]:
    """Evidence by both estimators."""
    pyro.set_rng_seed(10_000 + seed)
    started = time.perf_counter()
    with torch.no_grad():
        rows, sizes = evidence(model, test)
    values: dict[str, Any] = {
        "log_evidence": [round(float(value), 3) for value in rows],
        "effective_draws": round(float(sizes.median()), 1),
        "score_seconds": round(time.perf_counter() - started, 1),
    }
    if num_annealed:
        started = time.perf_counter()
        annealed = annealed_importance_sampling(
            model, test[:num_annealed], num_chains=8, num_temperatures=200, num_leapfrog=5
        )
        values["annealed"] = [round(float(v), 3) for v in torch.as_tensor(annealed.rows)]
        values["annealed_draws"] = round(
            float(torch.as_tensor(annealed.effective_sample_size).median()), 2
        )
        values["annealed_seconds"] = round(time.perf_counter() - started, 1)
    return values


def _job(job: dict[str, Any], tick: Any) -> dict[str, Any]:
    method, seed = job["method"], job["seed"]
    torch.set_num_threads(1)
    data = binarized_mnist.load()
    with pyro.get_param_store().scope():
        try:
            model, history = train(method, seed, data.train, budget=job["budget"])
        except (ValueError, RuntimeError, ArithmeticError) as error:
            return {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        test = data.test[: job["num_test"]]
        return {**history, **score(model, test, seed, job["num_annealed"])}


def run(
    records: Path = RECORDS,
    *,
    seeds: int = 3,
    budget: int = BUDGET,
    num_test: int = NUM_TEST,
    num_annealed: int = NUM_ANNEALED,
    jobs: int = 1,
    methods: tuple[str, ...] = tuple(METHODS),
) -> None:
    """Run what is missing, one seed of all methods after the other."""
    with StudyLog(
        records,
        title="One deep latent Gaussian model, nine kinds of inference",
        question=(
            "At one budget of gradients, which inference leaves the best model behind, and do two "
            "estimators of its evidence agree?"
        ),
        protocol=(
            f"{'-'.join(map(str, SIZES))} deep latent Gaussian model, SiLU between levels, unit "
            "noise, statically binarized MNIST, 50,000 training images in batches of "
            f"{BATCH}, Adam (1e-3; 3e-3 for loops that make few updates of many gradients; "
            "incremental 3e-4), the same initial weights for all methods of "
            f"a seed, until {budget:,} gradients of a row's log joint are spent; nothing was "
            f"tuned on the test set. Evidence of the first {num_test} test images: 5000 "
            "importance samples an image from a Gaussian at the mode that predictive coding finds "
            "from the prior, with the Gauss-Newton curvature. Beside it, on the first "
            f"{num_annealed}: "
            "annealed importance sampling from the prior, 8 chains, 200 temperatures, 5 leapfrog "
            "steps. Both are lower bounds in expectation; the higher one is the nearer. "
            + PUBLISHED
        ),
        command="python -m benchmarks.studies.mnist_dlgm --jobs 2",
        over=("seed",),
        modules=["benchmarks.studies.mnist_dlgm"],
        columns={
            "log_evidence": "nats an image, 5000 importance samples",
            "annealed": "nats an image, annealed importance sampling, 100 images",
            "effective_draws": "median over images, of 5000",
            "annealed_draws": "median over images, of 8 chains",
            "updates": "of the parameters",
        },
    ) as log:
        sizes = {"budget": budget, "num_test": num_test, "num_annealed": num_annealed}
        missing = [
            {"method": method, "seed": seed, **sizes}
            for seed in range(seeds)
            for method in methods
            if not log.done({"method": method, "seed": seed})
        ]
        for job, values in results("benchmarks.studies.mnist_dlgm:_job", missing, jobs):
            method, seed = job["method"], job["seed"]
            log.add(key={"method": method, "seed": seed}, values=values)
            print(method, seed, summary_of(values), flush=True)
        for text in summary(log, seeds):
            log.note(text)
        data = binarized_mnist.load()
        pixels = float(independent_pixels(data.train, data.test[:num_test]).mean())
        log.note(
            f"Independent pixels, each with its mean in training: {pixels:.2f} nats an image."
        )


def independent_pixels(train: Tensor, test: Tensor) -> Tensor:
    """Log probability of every test image ``(B,)`` if each pixel had its mean in training."""
    logits = torch.logit(train.mean(0).clamp(0.001, 0.999))
    probability = dist.Bernoulli(logits=logits).to_event(1)
    row: Tensor = probability.log_prob(test)
    return row


def summary_of(values: dict[str, Any]) -> str:
    """One run in a line."""
    if "failed" in values:
        return str(values["failed"])
    mean = sum(values["log_evidence"]) / len(values["log_evidence"])
    return f"{mean:.2f} nats, {values['updates']} updates, {values['train_seconds']} s"


def summary(log: StudyLog, seeds: int) -> list[str]:
    """How the two estimators compare on the images that both score, once all runs are there."""
    gaps = []
    for method in METHODS:
        for seed in range(seeds):
            values = log.values(method=method, seed=seed)
            if values is None:
                return []
            if "annealed" in values:
                annealed = torch.tensor(values["annealed"])
                weighted = torch.tensor(values["log_evidence"])[: len(annealed)]
                gaps.append(float((annealed - weighted).mean()))
    if not gaps:
        return []
    return [
        "Annealing minus importance sampling on the same images, over all runs: from "
        f"{min(gaps):+.2f} to {max(gaps):+.2f} nats."
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    run(
        options.records,
        seeds=options.seeds,
        budget=options.budget,
        jobs=options.jobs,
        methods=tuple(options.methods),
    )


if __name__ == "__main__":
    main()

"""Little data: what refinement during training is worth when an encoder can overfit.

    python -m benchmarks.studies.mnist_little_data

Three guides train a 784-200-200-50 VAE with 2,000 statically binarized MNIST images, three seeds
each: an encoder alone, an encoder refined by natural gradient steps (semi-amortized), and learned
refinement (iterative). All stop by the same rule: the epoch with the best ELBO on 1,000 validation
images, under the method's own guide, is kept. What is scored is the *model*: the importance-
weighted evidence of 1,000 test images, with one proposal for all methods that owes nothing to
their guides, a Gaussian refined for every image by Gauss-Newton steps from the prior.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from benchmarks.study import StudyLog
from guides.diagnostics import elbo, log_evidence
from guides.inference import SVI
from guides.objectives import RefinementELBO
from zoo.data import binarized_mnist

__all__ = ["METHODS", "evidence", "main", "run", "summary", "train"]

RECORDS = Path(__file__).parents[1] / "records" / "mnist_little_data" / "study.jsonl"
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 2000, 1000, 1000
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "direct": ("amortized_normal", {}),
    "semi_amortized": (
        "semi_amortized_normal",
        {"num_iterations": 4, "num_particles": 1, "backprop": "none"},
    ),
    "iterative": (
        "iterative_normal",
        {
            "num_iterations": 4,
            "num_particles": 1,
            "start": "encoder",
            "update": "learned_step",
            "encodings": ("natural_gradient", "parameters"),
            "rate": 0.3,
        },
    ),
}


def train(
    method: str, seed: int, train: Tensor, validation: Tensor, *, epochs: int, patience: int
) -> tuple[zoo.VAE, dict[str, Any]]:
    """Train model and guide; return the model of the best epoch, and how it went."""
    pyro.set_rng_seed(seed)
    name, options = METHODS[method]
    model = zoo.VAE(x_dim=784, z_dim=50, hidden=(200, 200), data_mean=train.mean(0))
    guide = guides.make(name, model, train, hidden=(200, 200), **options)
    objective = Trace_ELBO() if method == "direct" else RefinementELBO()
    optim = pyro.optim.ClippedAdam({"lr": 1e-3, "clip_norm": 1e4})
    svi = SVI(model, guide, optim, objective)
    best, best_state, best_epoch, curve = -math.inf, model.state_dict(), 0, []
    for epoch in range(1, epochs + 1):
        for args, kwargs in guides.rows.minibatches(model, (train,), batch_size=100):
            svi.step(*args, **kwargs)
        if epoch % 5:
            continue
        guide.eval()
        score = elbo(model, guide, validation, num_samples=10).rows
        guide.train()
        value = float(torch.as_tensor(score).mean())
        curve.append([epoch, round(value, 2)])
        if value > best:
            best, best_epoch = value, epoch
            best_state = copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= patience:
            break
    model.load_state_dict(best_state)
    return model.requires_grad_(False).eval(), {
        "validation_elbo": round(best, 3),
        "best_epoch": best_epoch,
        "epochs": epoch,
        "curve": curve,
    }


def evidence(model: zoo.VAE, x: Tensor, seed: int = 0) -> Tensor:
    """Importance-weighted evidence of every image, with a proposal refined for the image."""
    pyro.set_rng_seed(seed)
    found = []
    for part in x.split(250):
        guide = guides.make(
            "laplace_multivariate_normal", model, part, start="prior", num_iterations=10
        )
        found.append(log_evidence(model, guide, part, num_samples=1000, chunk_size=250).rows)
    return torch.cat([torch.as_tensor(rows) for rows in found])


def run(records: Path = RECORDS, *, seeds: int = 3, epochs: int = 150) -> None:
    """Run what is missing."""
    data = binarized_mnist.load()
    test = data.test[:NUM_TEST]
    if data.validation is None:
        raise ValueError("The study needs validation images.")
    validation = data.validation[:NUM_VALIDATION]
    with StudyLog(
        records,
        title="Little data: refinement while learning",
        question=(
            "With 2,000 images, does refinement during training lead to a better model than an "
            "encoder alone?"
        ),
        protocol=(
            f"784-200-200-50 VAE, statically binarized MNIST, {NUM_TRAIN} training, "
            f"{NUM_VALIDATION} validation and {NUM_TEST} test images, Adam 1e-3, batches of 100, "
            f"at most {epochs} epochs. The epoch with the best validation ELBO under the "
            "method's own guide is kept (every 5 epochs, patience 30 epochs). Evidence: 1000 "
            "importance samples from a Gaussian refined for every image by 10 Gauss-Newton "
            "steps from the prior, the same for all methods."
        ),
        command="python -m benchmarks.studies.mnist_little_data",
        over=("seed",),
        modules=["benchmarks.studies.mnist_little_data"],
        columns={"log_evidence": "nats an image, 1000 importance samples"},
    ) as log:
        for seed in range(seeds):
            rows = torch.randperm(
                len(data.train), generator=torch.Generator().manual_seed(100 + seed)
            )[:NUM_TRAIN]
            for method in METHODS:
                key = {"method": method, "seed": seed}
                if log.done(key):
                    continue
                with pyro.get_param_store().scope():
                    model, history = train(
                        method, seed, data.train[rows], validation, epochs=epochs, patience=30
                    )
                    scored = evidence(model, test)
                log.add(
                    key=key,
                    values={
                        "log_evidence": [round(float(value), 3) for value in scored],
                        **history,
                    },
                )
                print(method, seed, float(scored.mean()), history["best_epoch"], flush=True)
        for text in summary(log, seeds):
            log.note(text)


def summary(log: StudyLog, seeds: int) -> list[str]:
    """The paired differences to the encoder alone, as a sentence, once every run is there."""
    sentences = []
    for method in METHODS:
        if method == "direct":
            continue
        gaps = []
        for seed in range(seeds):
            pair = [log.values(method=name, seed=seed) for name in (method, "direct")]
            if any(values is None for values in pair):
                return []
            high, low = (torch.tensor(values["log_evidence"]) for values in pair if values)
            gaps.append((high - low).double())
        each = ", ".join(
            f"{float(gap.mean()):+.2f} ± {2 * float(gap.std()) / len(gap) ** 0.5:.2f}"
            for gap in gaps
        )
        mean = sum(float(gap.mean()) for gap in gaps) / len(gaps)
        sentences.append(f"{method} {mean:+.2f} on average (seeds: {each})")
    return [
        "Evidence of a test image against the encoder alone, paired by image, ± 2 standard "
        f"errors: {'; '.join(sentences)}."
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=150)
    options = parser.parse_args()
    run(options.records, seeds=options.seeds, epochs=options.epochs)


if __name__ == "__main__":
    main()

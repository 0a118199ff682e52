"""MNIST classifier by predictive coding and by backpropagation: same net, same seeds, same epochs.

    python -m benchmarks.studies.pc_classifier

The net 784-128-128-128-10 as a program; x is given, the label, one-hot, is observed in training:

    h1 ~ Normal(act(W0 x + b0), 1)      h2 ~ Normal(act(W1 h1 + b1), 1)
    h3 ~ Normal(act(W2 h2 + b2), 1)     y  ~ Normal(W3 h3 + b3, 1)

Backpropagation descends 1/2 |y - f(x)|^2 of the feed-forward net f. Predictive coding relaxes h1,
h2, h3 from their feed-forward values by 8 updates and descends the energy there. A class is
predicted with y free; the feed-forward values then have no errors at all, so they are the relaxed
state, and the prediction is that of the feed-forward net (a test holds this).

One update of size eta from feed-forward values *is* backpropagation (its errors are eta times
backpropagation's), and AdamW does not see the factor eta. So the regime stands beside each result:
eta times the largest curvature of a row's energy, and the part of the drop in energy, from the
feed-forward values to the minimum, that the 8 updates achieve. Where it is small, the run is
backpropagation in all but name.

References:
    | Benchmarking predictive coding networks made simple (Pinchetti et al., 2024)
    | https://arxiv.org/abs/2407.01163
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study import StudyLog
from guides.energy import LogJoint
from guides.inference import IncrementalPredictiveCoding, PredictiveCoding
from guides.inference.relaxation import curvature
from guides.inference.units import energy_function
from guides.layout import layout
from zoo.data import mnist
from zoo.model import Model

__all__ = [
    "METHODS",
    "Backpropagation",
    "Classifier",
    "accuracy",
    "incremental",
    "main",
    "regime",
    "relaxed_by",
    "run",
    "train",
    "warmup_cosine",
]

RECORDS = Path(__file__).parents[1] / "records" / "pc_classifier" / "study.jsonl"
SIZES = (784, 128, 128, 128, 10)
NUM_STEPS, BATCH_SIZE, EPOCHS = 8, 128, 25
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 2e-3
_OPTIM: Any = pyro.optim  # its names are made when it is imported

ABOUT: dict[str, Any] = {
    "title": "MNIST classifier: predictive coding beside backpropagation",
    "question": (
        "Does predictive coding classify as well as backpropagation of the same net with the same "
        "seeds and epochs, and in which regime? Published: 98.26 % (PC) and 98.45 % (iPC)."
    ),
    "protocol": (
        "784-128-128-128-10, GELU, squared errors, all 60,000 training images, batches of 128, 25 "
        "epochs, AdamW with a rate of 3e-4, warmup and cosine; 8 updates of hidden levels from "
        "their feed-forward values. Accuracy on the whole test set after the last epoch. Regime, "
        "on 100 test images with their labels after training: step size times the largest "
        "curvature of a row's energy, and the part of the drop in energy, from feed-forward "
        "values to the minimum, that the 8 updates achieve; medians over rows."
    ),
    "command": "python -m benchmarks.studies.pc_classifier",
    "over": ("seed",),
    "columns": {
        "accuracy": "per cent of the test images",
        "step_times_curvature": "0 would be backpropagation in all but name; below 2 is stable",
        "fraction_relaxed": "0 is feed-forward, 1 is the minimum of the energy",
    },
}


class Classifier(Model):
    """A chain of Gaussian levels from an image to its label."""

    data_args = {"x": 0, "y": 0}

    def __init__(self, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        """The generative process of labels.

        Args:
            x: Images ``(B, 784)``.
            y: One-hot labels ``(B, 10)``; None leaves them free.
        """
        *hidden, last = self.layers
        with pyro.plate("data", len(x)):
            h = x
            for number, layer in enumerate(hidden, 1):
                h = pyro.sample(f"h{number}", dist.Normal(F.gelu(layer(h)), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(last(h), 1.0).to_event(1), obs=y)

    def predict(self, x: Tensor) -> Tensor:
        """The feed-forward net."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.gelu(layer(x))
        scores: Tensor = last(x)
        return scores


class Backpropagation:
    """What predictive coding is compared with: descent of half the squared errors of a batch.

    Args:
        model: The net.
        schedule: What :class:`pyro.optim.PyroLRScheduler` takes.
    """

    def __init__(self, model: Classifier, schedule: dict[str, Any]) -> None:
        self.model = model
        self.adamw = schedule["optimizer"](model.parameters(), **schedule["optim_args"])
        self.optim = torch.optim.lr_scheduler.LambdaLR(self.adamw, schedule["lr_lambda"])

    def step(self, x: Tensor, y: Tensor) -> float:
        """One update of the weights."""
        loss = 0.5 * (y - self.model.predict(x)).square().sum()
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()
        return loss.item()


def warmup_cosine(num_steps: int) -> Callable[[int], float]:
    """From 1 to 1.1 over a tenth of the steps, then down to 0.1 as half a cosine."""
    warm = 0.1 * num_steps

    def factor(step: int) -> float:
        if step < warm:
            return 1.0 + 0.1 * step / warm
        done = min((step - warm) / (num_steps - warm), 1.0)
        return 0.1 + 0.5 * (1 + math.cos(math.pi * done))

    return factor


Build = Callable[["Classifier", dict[str, Any], str], Any]


def relaxed_by(step_size: float | str) -> Build:
    """Predictive coding with gradient steps of this size."""

    def build(model: Classifier, schedule: dict[str, Any], mode: str) -> PredictiveCoding:
        optim = _OPTIM.PyroLRScheduler(torch.optim.lr_scheduler.LambdaLR, schedule)
        return PredictiveCoding(model, optim, num_steps=NUM_STEPS, step_size=step_size, mode=mode)

    return build


def incremental(
    model: Classifier, schedule: dict[str, Any], mode: str
) -> IncrementalPredictiveCoding:
    """Weights move at every update of the latents, each time by a third of a batch's step."""
    slower = {**schedule["optim_args"], "lr": LEARNING_RATE / 3}
    optim = _OPTIM.PyroLRScheduler(
        torch.optim.lr_scheduler.LambdaLR, {**schedule, "optim_args": slower}
    )
    return IncrementalPredictiveCoding(
        model, optim, num_steps=NUM_STEPS, step_size="auto", mode=mode
    )


METHODS: dict[str, Build] = {
    "backpropagation": lambda model, schedule, mode: Backpropagation(model, schedule),
    "predictive coding, small steps": relaxed_by(0.03),
    "predictive coding, relaxed": relaxed_by("auto"),
    "incremental": incremental,
}


def train(
    method: str,
    seed: int,
    x: Tensor,
    labels: Tensor,
    *,
    epochs: int = EPOCHS,
    batch_size: int | None = None,
    mode: str = "auto",
    sizes: tuple[int, ...] = SIZES,
) -> tuple[Classifier, Any]:
    """Train a classifier; every epoch leaves out the rows that fill no batch, other ones each.

    Args:
        method: A key of ``METHODS``.
        seed: Seed of the weights and of the order of the rows.
        x: Images ``(N, 784)``, from -1 to 1.
        labels: Classes ``(N,)``.
        epochs: Passes over the rows.
        batch_size: Rows of a batch, by default 128.
        mode: How a step runs, see :class:`guides.inference.PredictiveCoding`.
        sizes: Dimensions of the levels.

    Returns:
        The classifier and the loop that trained it.
    """
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    pyro.set_rng_seed(seed)
    model = Classifier(sizes)
    num_batches = len(x) // batch_size
    schedule = {
        "optimizer": torch.optim.AdamW,
        "optim_args": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
        "lr_lambda": warmup_cosine(epochs * num_batches),
    }
    loop = METHODS[method](model, schedule, mode)
    y = F.one_hot(labels, sizes[-1]).to(x)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch_size)[:num_batches]:
            loop.step(x[rows], y[rows])
            loop.optim.step()
    return model, loop


def accuracy(model: Classifier, x: Tensor, labels: Tensor) -> float:
    """Percentage of right classes, y free."""
    with torch.no_grad():
        return float((model.predict(x).argmax(-1) == labels).double().mean() * 100)


def regime(loop: Any, x: Tensor, y: Tensor) -> dict[str, float]:
    """How far the updates relax: step times curvature, and their part of the drop in energy."""
    log_joint = LogJoint(loop.model, (x, y), layout=layout(loop.model, (x, y)))
    energy = energy_function(log_joint, jacobian=True)
    start = log_joint.layout.pack(log_joint.predictions())
    found = curvature(energy, start, 1.0, 30)["data"]

    def after(num_steps: int, step_size: float | str) -> Tensor:
        loop_ = PredictiveCoding(loop.model, loop.optim, num_steps=num_steps, step_size=step_size)
        packed = log_joint.layout.pack(loop_.infer(x, y))
        return energy(packed)[1][0].detach().double()

    given = loop.step_size
    step = given if isinstance(given, float) else 1 / (1.1 * float(found.quantile(0.9)))
    first = energy(start)[1][0].detach().double()
    drop, whole = first - after(NUM_STEPS, step), first - after(1000, "auto")
    return {
        "step_times_curvature": round(step * float(found.median()), 4),
        "fraction_relaxed": round(float((drop / whole.clamp_min(1e-12)).median()), 4),
    }


def run(
    records: Path = RECORDS,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = EPOCHS,
    mode: str = "auto",
    sizes: tuple[int, ...] = SIZES,
) -> None:
    """Run what is missing.

    Args:
        records: The file of the log.
        seeds: The seeds.
        epochs: Passes over the training images.
        mode: How a step runs, see :class:`guides.inference.PredictiveCoding`.
        sizes: Dimensions of the levels.
    """
    data = mnist.load()
    x, labels = 2 * data.train - 1, data.train_labels
    test_x, test_labels = 2 * data.test - 1, data.test_labels
    if labels is None or test_labels is None:
        raise ValueError("The study needs labels.")
    with StudyLog(records, **ABOUT, modules=["benchmarks.studies.pc_classifier"]) as log:
        for seed in seeds:
            for method in METHODS:
                key = {"method": method, "seed": seed}
                if log.done(key):
                    continue
                with pyro.get_param_store().scope():
                    begun = time.process_time()
                    model, loop = train(
                        method, seed, x, labels, epochs=epochs, mode=mode, sizes=sizes
                    )
                    values: dict[str, Any] = {
                        "cpu_seconds": round(time.process_time() - begun, 1),
                        "accuracy": round(accuracy(model, test_x, test_labels), 2),
                    }
                    if not isinstance(loop, Backpropagation):
                        rows = slice(0, 100)
                        y = F.one_hot(test_labels[rows], sizes[-1]).to(x)
                        values |= regime(loop, test_x[rows], y)
                        values["mode"] = loop.compiled[0].mode if loop.compiled else "eager"
                log.add(key=key, values=values)
                print(method, seed, values, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--mode", default="auto")
    options = parser.parse_args()
    run(options.records, seeds=options.seeds, epochs=options.epochs, mode=options.mode)


if __name__ == "__main__":
    main()

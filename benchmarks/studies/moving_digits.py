"""Moving digits: a state space model of frames, with an autoregressive flow below it or without.

    python -m benchmarks.studies.moving_digits

Digits drift over a dark square and bounce off its edges. A flow predicts a frame from the two
before it, pixel by pixel, and leaves the rest to the latents; the control has a wider emission
instead, so that both have as many parameters.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch

import guides
import zoo
from benchmarks.memory import keep_freed_memory
from benchmarks.studies.sequence_training import Settings, Training, bound, parser
from benchmarks.study import StudyLog
from guides.objectives import AnalyticELBO
from zoo.data import moving_digits
from zoo.data.sequences import Sequences

__all__ = [
    "FLOOR",
    "METHODS",
    "build",
    "count",
    "gaussian_pixels",
    "main",
    "measure",
    "per_pixel",
    "run",
]

RECORDS = Path(__file__).parents[1] / "records" / "moving_digits" / "study.jsonl"
METHODS = {"with a flow": 1, "without": 0}
RATES = {"with a flow": 1e-2, "without": 3e-3}
"""The better of these two for each model, on the validation split after 20 epochs."""

FLOOR = 1 / 256
"""Smallest standard deviation of a pixel given the latents and the past: one level."""

_BOUND = 10.0
"""How far the scale of a level of the flow may lie below one."""

SETTINGS = Settings(
    epochs=100,
    last=0.1,
    batch=50,
    shapes=1,
    every=5,
    warm=0.2,
    objective=AnalyticELBO,
)

ABOUT: dict[str, Any] = {
    "title": "Moving digits: a flow below a state space model",
    "question": (
        "Does an autoregressive flow over time make a state space model of frames better, at "
        "equal numbers of parameters?"
    ),
    "protocol": (
        "Digits of scikit-learn, 8 x 8, one a sequence, 20 frames of 16 x 16 pixels; 1000 "
        "sequences for training, 200 for validation, 200 of other digits for testing. Values are "
        "(level + u) / 256 with u uniform, the same draw of u for both. The figure is the bound "
        "in nats a pixel of all 20 frames, of densities over levels (the density over values "
        "from 0 to 1, plus log 256), lower is better: a bound on the code length of levels; no "
        "frame is left out, the flow sees zeros before the first. The standard deviation of a "
        "pixel given latents and past is at least 1/256 in both, the smallest scale of the flow "
        "counted in. The control's emission is wider, so that both models have as many "
        "parameters within half a per cent; the guide is the same, a filter "
        "q(z_t | z_{t-1}, x_1 .. x_t) on frames as they are; deviations start at those of the "
        "training pixels in both. 100 epochs in batches of 50, the KL divergence of every step in "
        "closed form given the draw before, Adam with a falling rate that starts at 0.01 with a "
        "flow and at 0.003 without: the better of the two for each model on the validation split "
        "after 20 epochs (with: 2.821 against 2.991 nats a pixel; without: 4.308 against 4.263)."
    ),
    "command": "python -m benchmarks.studies.moving_digits",
    "over": ("seed",),
    "columns": {
        "nats_per_pixel": "of the test split, over 256 levels; lower is better",
        "gaussian_pixels": "of one Gaussian a pixel of training mean and deviation, no less wide",
        "validation": "the same of the validation split, where it was best",
        "parameters": "of the model",
    },
}


def build(levels: int, data: Sequences, *, z_dim: int = 16, width: int = 128) -> Any:
    """The model; without a flow its emission is widened until it has as many parameters.

    Args:
        levels: Levels of the flow.
        data: The frames.
        z_dim: Dimension of the state.
        width: Hidden layer of the emission of the model with a flow.
    """

    def make(levels: int, width: int) -> zoo.FlowStateSpace:
        # Scales multiply: with the flow's smallest one the floor of a pixel is the control's.
        floor = FLOOR * _BOUND**levels
        return zoo.FlowStateSpace(
            data.x_dim,
            z_dim=z_dim,
            hidden=(width,),
            levels=levels,
            min_scale=floor,
            data_mean=data.data_mean,
            data_scale=data.train.flatten(0, 1).std(0),
        )

    if levels:
        return make(levels, width)
    with torch.random.fork_rng([]):
        wanted = count(make(1, width))
        base, step = count(make(0, 1)), count(make(0, 2)) - count(make(0, 1))
    return make(0, 1 + max(0, round((wanted - base) / step)))


def count(model: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    method: str,
    data: Sequences,
    seed: int,
    *,
    settings: Settings = SETTINGS,
    width: int = 128,
    checkpoint: Path | None = None,
    seconds: float = 180.0,
) -> dict[str, Any]:
    """Train one model, from its checkpoint if there is one, and score it on the test split.

    Args:
        method: A key of ``METHODS``.
        data: The frames.
        seed: Seed of everything but the data.
        settings: How it is trained, but for the rate.
        width: See :func:`build`.
        checkpoint: Where the state is kept.
        seconds: Between two checkpoints.
    """
    pyro.set_rng_seed(seed)
    model = build(METHODS[method], data, width=width)

    def guide_of(program: Any, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        return guides.make("filtering_normal", program, x, lengths, recurrent=64, hidden=64)

    settings = replace(settings, rate=RATES[method])
    training = Training(model, guide_of, data, settings, seed, checkpoint, seconds)
    training.run()
    training.restore_best()
    started = time.process_time()
    rows = bound(
        training.program,
        training.guide,
        data.test,
        data.test_lengths,
        num_samples=settings.draws,
        seed=10_000 + seed,
    )
    return {
        "nats_per_pixel": round(per_pixel(float(-rows.double().mean()), data), 4),
        "gaussian_pixels": round(gaussian_pixels(data), 4),
        "validation": round(per_pixel(training.best["value"] * data.test.shape[1], data), 4),
        "parameters": count(model),
        "guide_parameters": count(training.guide),
        "best_epoch": training.best["epoch"],
        "epochs": training.done,
        "train_seconds": round(training.spent["wall"], 1),
        "train_cpu_seconds": round(training.spent["cpu"], 1),
        "score_cpu_seconds": round(time.process_time() - started, 1),
    }


def gaussian_pixels(data: Sequences) -> float:
    """Nats a pixel of the test split under one Gaussian a pixel, whatever the time."""
    train = data.train.flatten(0, 1)
    pixels = torch.distributions.Normal(train.mean(0), train.std(0).clamp(min=FLOOR))
    return per_pixel(float(-pixels.log_prob(data.test).flatten(1).sum(1).double().mean()), data)


def per_pixel(nats: float, data: Sequences) -> float:
    """Nats a pixel over 256 levels, from nats a sequence over values from 0 to 1."""
    return nats / (data.test.shape[1] * data.x_dim) + math.log(256)


def run(
    records: Path = RECORDS,
    *,
    seeds: int = 3,
    methods: tuple[str, ...] = tuple(METHODS),
    epochs: int | None = None,
    checkpoints: Path | None = None,
    data: Sequences | None = None,
    width: int = 128,
) -> None:
    """Run what is missing, one seed of both models after the other.

    Args:
        records: The log.
        seeds: Number of seeds.
        methods: Keys of ``METHODS``.
        epochs: Passes over the data, in place of the study's own.
        checkpoints: Folder for states of interrupted runs, by default beside the log.
        data: Other frames.
        width: See :func:`build`.
    """
    folder = records.parent / "checkpoints" if checkpoints is None else checkpoints
    settings = SETTINGS if epochs is None else replace(SETTINGS, epochs=epochs)
    with StudyLog(records, **ABOUT, modules=["benchmarks.studies.moving_digits"]) as log:
        for seed in range(seeds):
            for method in methods:
                if log.done({"method": method, "seed": seed}):
                    continue
                with pyro.get_param_store().scope():
                    values = measure(
                        method,
                        moving_digits.load() if data is None else data,
                        seed,
                        settings=settings,
                        width=width,
                        checkpoint=folder / f"{method.replace(' ', '_')}_{seed}.pt",
                    )
                log.add(key={"method": method, "seed": seed}, values=values)
                print(f"{method}, seed {seed}: {values['nats_per_pixel']:.4f}", flush=True)


def main() -> None:
    """Command line."""
    options = parser(__doc__, RECORDS, tuple(METHODS)).parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    run(
        options.records,
        seeds=options.seeds,
        methods=tuple(options.methods),
        epochs=options.epochs,
        checkpoints=options.checkpoints,
    )


if __name__ == "__main__":
    main()

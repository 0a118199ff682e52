"""JSB chorales: what a posterior that looks ahead, or that is refined, is worth to a model.

    python -m benchmarks.studies.jsb_chorales --jobs 2

The deep Markov model at the sizes of Krishnan, Shalit and Sontag is trained with posteriors of the
form of the exact one, q(z_t | z_{t-1}, x_t .. x_T), with both sides of the sequence, and with the
past alone; a recurrent network with latents (VRNN) is trained with filters that correct the
program's prediction once, or five times, a step. Beside every figure stand those of two count
models, which know nothing of chords.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import guides
import zoo
from benchmarks.memory import keep_freed_memory
from benchmarks.pool import results
from benchmarks.studies.sequence_training import Settings, Training, bound, parser, per_step
from benchmarks.study import StudyLog
from guides.objectives import AnalyticELBO
from zoo.data import jsb_chorales
from zoo.data.sequences import Sequences, pad

__all__ = [
    "METHODS",
    "Method",
    "count_models",
    "deep_markov",
    "main",
    "measure",
    "pieces",
    "run",
    "vrnn",
]

RECORDS = Path(__file__).parents[1] / "records" / "jsb_chorales" / "study.jsonl"

# A hundred latents a step that start with a tenth of the prior's width are a hundred nats from it.
_KRISHNAN = {"recurrent": 600, "cell": "rnn", "combiner": "average", "init_scale": 0.5}
_DEEP = Settings(
    epochs=500,
    rate=4e-3,
    last=0.02,
    beta=0.2,
    warm=0.5,
    weight_decay=0.7,
    shapes=1,
    clip=10.0,
    objective=AnalyticELBO,
)
_SHORT = 20
"""Steps of a piece that deep Markov models are trained on: a pass has three times the updates."""
_FILTER = Settings(
    epochs=60,
    rate=3e-4,
    last=0.2,
    beta=0.5,
    warm=0.5,
    batch=100,
    shapes=1,
    clip=2.0,
    every=5,
    draws=1,
    objective=AnalyticELBO,
)
_PIECE = 10
"""Steps of a piece that filters are trained on: a step of theirs costs as many as came before."""

ABOUT: dict[str, Any] = {
    "title": "JSB chorales: smoothing, filtering, and filters that iterate",
    "question": (
        "Is a deep Markov model better with a posterior that looks ahead than with one that only "
        "looks back, and a filter of five iterations a step better than one of one?"
    ),
    "protocol": (
        "229 chorales for training, 76 for validation, 77 for testing, 88 keys, a quarter "
        "note a step. The figure is the bound per time step in nats, lower is better: minus "
        "the sum of all bounds over the sum of all steps of the test split, means of draws "
        "from q; no importance weighting. Weights are those of the best look at the "
        "validation split. Deep Markov model: 100 latents a step, emission 100, transition "
        "200; recurrent networks of 600 in q, averaged with a layer of the last draw; trained "
        "on pieces of 20 steps in batches of 20, validated on whole chorales, 10 draws from q "
        "on the test split. Filters: VRNN of 32 latents, 128 recurrent units, trained and "
        "validated on pieces of 10 steps in batches of 100, scored on whole chorales by one "
        "draw. Adam with a falling rate and clipped elements of the gradient, latents weighted "
        "less than the data in the first part of training, the KL divergence of every step in "
        "closed form given the draw before, and for the deep Markov model a weight decay of 0.7. "
        "Equal settings within each pair, chosen on the validation split of trial runs of 20 to "
        "430 epochs of one seed. "
        "CPU seconds are those of one process of one thread, its validation looks and "
        "captures included."
    ),
    "command": "python -m benchmarks.studies.jsb_chorales --jobs 2",
    "over": ("seed",),
    "columns": {
        "nats": "a time step of the test split, sum over sum; lower is better",
        "nats_by_row": "mean over chorales of each chorale's nats a step, another unit",
        "validation": "nats a step of the validation split (pieces for filters) where it was best",
        "independent_notes": "nats a step of notes with their training frequencies",
        "markov_notes": "nats a step of notes that each depend on themselves a step ago",
        "best_epoch": "of the epochs that were made",
    },
}


@dataclass(frozen=True)
class Method:
    """A model and its guide.

    Args:
        model: From the data to the model.
        guide: Name of the guide.
        options: Its options.
        settings: How they are trained.
        piece: Steps of the pieces that they are trained on; None for whole sequences.
        whole: Whether they are validated on whole sequences all the same.
    """

    model: Callable[[Sequences], Any]
    guide: str
    options: Mapping[str, Any]
    settings: Settings = field(default=_DEEP)
    piece: int | None = None
    whole: bool = False


def deep_markov(data: Sequences) -> zoo.DeepMarkov:
    """The deep Markov model at the published sizes."""
    return zoo.DeepMarkov(data.x_dim, data_mean=data.data_mean)


def vrnn(data: Sequences) -> zoo.VRNN:
    """The recurrent network with latents."""
    return zoo.VRNN(data.x_dim, z_dim=32, recurrent=128, data_mean=data.data_mean)


METHODS: dict[str, Method] = {
    "smoothing": Method(deep_markov, "smoothing_normal", _KRISHNAN, piece=_SHORT, whole=True),
    "filtering": Method(deep_markov, "filtering_normal", _KRISHNAN, piece=_SHORT, whole=True),
    "two-sided smoothing": Method(
        deep_markov, "two_sided_smoothing_normal", _KRISHNAN, piece=_SHORT, whole=True
    ),
    "filter, 1 iteration": Method(
        vrnn, "iterative_filtering_normal", {"num_iterations": 1, "network": 128}, _FILTER, _PIECE
    ),
    "filter, 5 iterations": Method(
        vrnn, "iterative_filtering_normal", {"num_iterations": 5, "network": 128}, _FILTER, _PIECE
    ),
}


def pieces(data: Sequences, steps: int, *, whole: bool = False) -> Sequences:
    """Training and validation sequences cut into pieces of so many steps, the last ones shorter.

    Args:
        data: The sequences.
        steps: Steps of a piece.
        whole: Whether validation sequences stay whole.
    """

    def cut(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        whole = [row[: int(number)] for row, number in zip(x, lengths, strict=True)]
        return pad([piece for row in whole for piece in row.split(steps)])

    assert data.validation is not None
    assert data.validation_lengths is not None
    train, train_lengths = cut(data.train, data.train_lengths)
    if whole:
        return replace(data, train=train, train_lengths=train_lengths)
    validation, validation_lengths = cut(data.validation, data.validation_lengths)
    return replace(
        data,
        train=train,
        train_lengths=train_lengths,
        validation=validation,
        validation_lengths=validation_lengths,
    )


def count_models(
    train: Tensor, train_lengths: Tensor, test: Tensor, test_lengths: Tensor
) -> dict[str, float]:
    """Nats a time step of two count models, each with one count of both kinds added.

        independent    p(key sounds) = (1 + times it sounds) / (2 + steps)
        markov         p(key sounds | it sounded a step ago, or not), by the same rule; the first
                       step of a sequence by the independent one

    Args:
        train: Training sequences ``(N, T, D)``, zeros and ones.
        train_lengths: Steps of each ``(N,)``.
        test: Test sequences ``(M, T', D)``.
        test_lengths: Steps of each ``(M,)``.

    Returns:
        ``independent_notes`` and ``markov_notes``.
    """
    x, y = train.double(), test.double()
    on, own = _real(x, train_lengths), _real(y, test_lengths)
    marginal = (1 + (x * on).sum((0, 1))) / (2 + on.sum((0, 1)))
    follows = on[:, 1:]
    chance = []
    for before in (0.0, 1.0):
        counted = follows * (x[:, :-1] == before)
        chance.append((1 + (x[:, 1:] * counted).sum((0, 1))) / (2 + counted.sum((0, 1))))
    first = marginal.expand(len(y), 1, -1)
    later = torch.where(y[:, :-1] == 1, chance[1], chance[0])
    figures = {"independent_notes": marginal, "markov_notes": torch.cat([first, later], 1)}
    return {
        name: float(
            -((torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p)) * own).sum() / test_lengths.sum()
        )
        for name, p in figures.items()
    }


def _real(x: Tensor, lengths: Tensor) -> Tensor:
    """One where a row has the step ``(N, T, 1)``."""
    return (torch.arange(x.shape[1]) < lengths[:, None])[..., None].double()


def measure(
    method: Method,
    data: Sequences,
    seed: int,
    *,
    checkpoint: Path | None = None,
    seconds: float = 180.0,
) -> dict[str, Any]:
    """Train one model, from its checkpoint if there is one, and score it on the test split.

    Args:
        method: Model, guide and settings.
        data: The sequences.
        seed: Seed of everything.
        checkpoint: Where the state is kept.
        seconds: Between two checkpoints.
    """
    pyro.set_rng_seed(seed)
    model = method.model(data)

    def build(program: Any, x: Tensor, lengths: Tensor) -> Any:
        return guides.make(method.guide, program, x, lengths, **method.options)

    seen = data if method.piece is None else pieces(data, method.piece, whole=method.whole)
    training = Training(model, build, seen, method.settings, seed, checkpoint, seconds)
    training.run()
    training.restore_best()
    started = time.process_time()
    rows = bound(
        training.program,
        training.guide,
        data.test,
        data.test_lengths,
        num_samples=method.settings.draws,
        seed=10_000 + seed,
    )
    counts = count_models(data.train, data.train_lengths, data.test, data.test_lengths)
    return {
        "nats": round(per_step(rows, data.test_lengths), 4),
        **{name: round(value, 2) for name, value in counts.items()},
        "validation": round(training.best["value"], 4),
        "nats_by_row": round(float(-(rows / data.test_lengths).mean()), 4),
        "best_epoch": training.best["epoch"],
        "epochs": training.done,
        "updates": training.done * training.per_epoch,
        "parameters": sum(
            p.numel() for part in (model, training.guide) for p in part.parameters()
        ),
        "train_seconds": round(training.spent["wall"], 1),
        "train_cpu_seconds": round(training.spent["cpu"], 1),
        "score_cpu_seconds": round(time.process_time() - started, 1),
        "curve": training.curve,
    }


def _job(job: dict[str, Any], tick: Any) -> dict[str, Any]:
    name, seed, epochs = job["method"], job["seed"], job["epochs"]
    torch.set_num_threads(1)
    keep_freed_memory()
    method = METHODS[name]
    if epochs is not None:
        method = replace(method, settings=replace(method.settings, epochs=epochs))
    words = "".join(letter if letter.isalnum() else "_" for letter in name)
    with pyro.get_param_store().scope():
        return measure(
            method, jsb_chorales.load(), seed, checkpoint=job["folder"] / f"{words}_{seed}.pt"
        )


def run(
    records: Path = RECORDS,
    *,
    seeds: int = 3,
    methods: tuple[str, ...] = tuple(METHODS),
    jobs: int = 1,
    epochs: int | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Run what is missing, one seed of all methods after the other.

    Args:
        records: The log.
        seeds: Number of seeds.
        methods: Keys of ``METHODS``.
        jobs: Processes at a time.
        epochs: Passes over the data, in place of each method's own.
        checkpoints: Folder for states of interrupted runs, by default beside the log.
    """
    folder = records.parent / "checkpoints" if checkpoints is None else checkpoints
    with StudyLog(records, **ABOUT, modules=["benchmarks.studies.jsb_chorales"]) as log:
        missing = [
            {"method": method, "seed": seed, "epochs": epochs, "folder": folder}
            for seed in range(seeds)
            for method in methods
            if not log.done({"method": method, "seed": seed})
        ]
        for job, values in results("benchmarks.studies.jsb_chorales:_job", missing, jobs):
            method, seed = job["method"], job["seed"]
            log.add(key={"method": method, "seed": seed}, values=values)
            print(f"{method}, seed {seed}: {values['nats']:.3f} nats a step", flush=True)


def main() -> None:
    """Command line."""
    command = parser(__doc__, RECORDS, tuple(METHODS))
    command.add_argument("--jobs", type=int, default=1)
    options = command.parse_args()
    run(
        options.records,
        seeds=options.seeds,
        methods=tuple(options.methods),
        jobs=options.jobs,
        epochs=options.epochs,
        checkpoints=options.checkpoints,
    )


if __name__ == "__main__":
    main()

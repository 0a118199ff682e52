"""Where one frozen decoder loses nats: encoder, refinement, and the best q of every image.

    python -m benchmarks.studies.mnist_gaps --cache DIR

On the first 1000 test images of statically binarized MNIST and the decoder that
``mnist_decoder.safetensors`` holds, every image gets an ELBO under

    encoder             the encoder that the decoder was trained with
    refined             a learned refinement of it, at 1x, 2x and 4x its trained iterations
    normal              the best diagonal Gaussian of the image itself
    multivariate_normal the best Gaussian with full covariance
    sylvester           the best Sylvester flow, with weights of the image's own
    log_evidence        importance-weighted, from the full-covariance Gaussian

"Best" is found by Adam with 10 draws a step from two starts, and the better start of the image is
kept; the training curves are recorded, so that a plateau can be seen. Differences are paired by
image. Results are appended to ``benchmarks/records/mnist_gaps/study.jsonl`` as they come, and a
study that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
import zoo
from benchmarks.studies.mnist_decoder import ENCODER, HIDDEN, Z_DIM, load_decoder, make_encoder
from benchmarks.study import StudyLog
from guides.diagnostics import elbo, log_evidence
from guides.inference import SVI
from guides.objectives import RefinementELBO
from zoo.data import binarized_mnist

__all__ = [
    "best_local",
    "fit_local",
    "load_encoder",
    "main",
    "run",
    "summary",
    "train_refiner",
]

RECORDS = Path(__file__).parents[1] / "records" / "mnist_gaps" / "study.jsonl"
NUM_IMAGES = 1000
NUM_DRAWS = 1000
REFINER: dict[str, Any] = {
    "num_iterations": 5,
    "num_particles": 4,
    "start": "encoder",
    "hidden": HIDDEN,
    "update": "learned_step",
    "encodings": ("natural_gradient", "parameters"),
    "rate": 0.3,
}
FLOW: dict[str, Any] = {"transforms": 4}
STAGES = ("local", "refined")


def load_encoder(model: zoo.VAE, x: Tensor) -> guides.Guide:
    """The direct encoder that the decoder was trained with."""
    from safetensors.torch import load_file

    guide = make_encoder(model, x)
    guide.load_state_dict(load_file(ENCODER))
    return guide.requires_grad_(False).eval()


def fit_local(
    model: zoo.VAE,
    name: str,
    x: Tensor,
    start: Tensor | None,
    *,
    num_steps: int,
    options: dict[str, Any] | None = None,
) -> tuple[guides.Guide, list[float]]:
    """Fit parameters of each image by themselves; the curve of the mean ELBO beside them.

    Args:
        model: The frozen decoder.
        name: A local guide.
        x: Images ``(B, 784)``.
        start: Location and raw scale ``(B, 2 K)`` to start from; None for the prior.
        num_steps: Updates.
        options: Options of the guide.
    """
    with pyro.get_param_store().scope():
        guide = guides.make(name, model, x, init_scale=0.5, **(options or {}))
        if start is not None:
            with torch.no_grad():
                _scheme(guide).table[:, : 2 * Z_DIM] = start
        optim = pyro.optim.ClippedAdam(
            {"lr": 0.05, "lrd": 0.01 ** (1 / num_steps), "clip_norm": 1e4}
        )
        objective = Trace_ELBO(num_particles=10, vectorize_particles=True)
        losses = SVI(model, guide, optim, objective).run(num_steps, ((x,), {})).losses
    tenth = max(1, num_steps // 20)
    curve = [-sum(losses[i : i + tenth]) / tenth / len(x) for i in range(0, num_steps, tenth)]
    return guide, [round(value, 3) for value in curve]


def best_local(
    log: StudyLog,
    model: zoo.VAE,
    name: str,
    x: Tensor,
    starts: dict[str, Tensor | None],
    cache: Path,
    num_steps: int,
    options: dict[str, Any] | None = None,
) -> Tensor:
    """The parameters of the better start, image by image; recorded under the guide's name."""
    file = cache / f"{name}.pt"
    key = {"method": name, "start": "better of both"}
    if log.done(key) and file.exists():
        return torch.load(file, weights_only=True)
    tables, rows = [], []
    for label, start in starts.items():
        guide, curve = fit_local(model, name, x, start, num_steps=num_steps, options=options)
        score = elbo(model, guide, x, num_samples=NUM_DRAWS)
        tables.append(_scheme(guide).table.detach())
        rows.append(score.rows)
        log.add(
            key={"method": name, "start": label},
            values={
                "elbo": _rounded(score.rows),
                "draw_gradients": 10 * num_steps,
                "curve": curve,
                "last_tenth": round(curve[-1] - curve[-3], 3),
            },
        )
    better = torch.stack(rows).argmax(0)
    lam = torch.stack(tables)[better, torch.arange(len(x))]
    with torch.no_grad():
        _scheme(guide).table.copy_(lam)
    # Scored again with fresh draws: the larger of two estimates is biased upwards.
    score = elbo(model, guide, x, num_samples=NUM_DRAWS)
    log.add(
        key=key,
        values={
            "elbo": _rounded(score.rows),
            "draw_gradients": 10 * num_steps * len(starts),
            "second_start_wins": round(float(better.double().mean()), 3),
        },
    )
    torch.save(lam, file)
    if name == "multivariate_normal":
        evidence = log_evidence(model, guide, x, num_samples=5000, chunk_size=100)
        log.add(
            key={"method": "log_evidence", "start": "multivariate_normal"},
            values={"log_evidence": _rounded(evidence.rows), "num_samples": 5000},
        )
    return lam


def train_refiner(model: zoo.VAE, train: Tensor, num_steps: int, cache: Path) -> guides.Guide:
    """Train a refinement network on the frozen decoder, from the trained encoder."""
    file = cache / "refiner.pt"
    with pyro.get_param_store().scope():
        guide = guides.make("iterative_normal", model, train[:5000], **REFINER)
        encoder = _scheme(load_encoder(model, train[:5000]))
        _scheme(guide).encoder.load_state_dict(encoder.state_dict())
        if file.exists():
            guide.load_state_dict(torch.load(file, weights_only=True))
            return guide.eval()
        optim = pyro.optim.ClippedAdam(
            {"lr": 1e-3, "lrd": 0.05 ** (1 / num_steps), "clip_norm": 1e3}
        )
        svi = SVI(model, guide, optim, RefinementELBO())
        generator = torch.Generator().manual_seed(0)
        _scheme(guide).encoder.requires_grad_(False)
        with warnings.catch_warnings():
            # The encoder stays as it was trained, and Pyro says so at every step.
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            for _ in range(num_steps):
                rows = torch.randint(len(train), (100,), generator=generator)
                svi.step(train[rows])
        torch.save(guide.state_dict(), file)
    return guide.eval()


def run(
    cache: Path,
    records: Path = RECORDS,
    num_images: int = NUM_IMAGES,
    stages: Sequence[str] = STAGES,
) -> None:
    """Run what is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(0)
    data = binarized_mnist.load()
    x = data.test[:num_images]
    model = load_decoder()
    with StudyLog(
        records,
        title="Where one frozen decoder loses nats",
        question=(
            "How much of the inference gap of a trained VAE is the encoder's, how much the "
            "family's, and how much of it does a learned refinement win back?"
        ),
        protocol=(
            f"Frozen 784-200-200-50 decoder, statically binarized MNIST, the first {num_images} "
            f"test images. ELBO: {NUM_DRAWS} draws an image. Best q of an image: Adam, 10 draws "
            "a step, step size 0.05 falling to 0.0005, two starts, the better start of the image "
            "scored again. Evidence: 5000 importance samples. Differences are paired by image."
        ),
        command="python -m benchmarks.studies.mnist_gaps --cache DIR",
        modules=["benchmarks.studies.mnist_gaps"],
        columns={
            "elbo": "nats an image, mean and 2 standard errors over images",
            "draw_gradients": "gradients of the log joint at a draw, an image",
        },
    ) as log:
        if "local" in stages:
            _local(log, model, x, cache)
        if "refined" in stages:
            _refined(log, model, data.train, x, cache)
        for text in summary(log):
            log.note(text)


def summary(log: StudyLog) -> list[str]:
    """The paired differences that the study is about, as sentences; those that can be made."""

    def rows(method: str, start: str = "better of both", score: str = "elbo") -> Tensor | None:
        values = log.values(method=method, start=start)
        return None if values is None else torch.tensor(values[score], dtype=torch.float64)

    found = {
        "the encoder": rows("encoder", ""),
        "refinement at its trained iterations": rows("refined, 1x iterations", "encoder"),
        "refinement at 4 times its iterations": rows("refined, 4x iterations", "encoder"),
        "the best diagonal Gaussian": rows("normal"),
        "the best full covariance": rows("multivariate_normal"),
        "the best Sylvester flow": rows("sylvester"),
        "the evidence": rows("log_evidence", "multivariate_normal", "log_evidence"),
    }

    def difference(high: str, low: str) -> str | None:
        above, below = found[high], found[low]
        if above is None or below is None:
            return None
        gap = above - below
        error = 2 * float(gap.std()) / len(gap) ** 0.5
        return f"{high} is {float(gap.mean()):+.3f} ± {error:.3f} nats an image from {low}"

    pairs = [
        ("refinement at its trained iterations", "the encoder"),
        ("the best diagonal Gaussian", "the encoder"),
        ("the best diagonal Gaussian", "refinement at its trained iterations"),
        ("refinement at 4 times its iterations", "refinement at its trained iterations"),
        ("the best full covariance", "the best diagonal Gaussian"),
        ("the best Sylvester flow", "the best diagonal Gaussian"),
        ("the evidence", "the best full covariance"),
    ]
    sentences = [text for high, low in pairs if (text := difference(high, low)) is not None]
    if len(sentences) < len(pairs):
        return []
    return [f"Paired by image, ± 2 standard errors: {'; '.join(sentences)}."]


def _local(log: StudyLog, model: zoo.VAE, x: Tensor, cache: Path) -> None:
    """The encoder, and the best member of each family for each image."""
    encoder = load_encoder(model, x)
    start = encoder.parameters_of(x)["data"].detach()
    if not log.done({"method": "encoder", "start": ""}):
        score = elbo(model, encoder, x, num_samples=NUM_DRAWS)
        log.add(
            key={"method": "encoder", "start": ""},
            values={"elbo": _rounded(score.rows), "draw_gradients": 0},
        )
    starts = {"encoder": start, "prior": None}
    best = best_local(log, model, "normal", x, starts, cache, 500)
    after = {"best diagonal": best[:, : 2 * Z_DIM], "prior": None}
    best_local(log, model, "multivariate_normal", x, after, cache, 500)
    best_local(log, model, "sylvester", x, after, cache, 500, FLOW)


def _refined(log: StudyLog, model: zoo.VAE, train: Tensor, x: Tensor, cache: Path) -> None:
    """The refinement of the encoder, at multiples of the iterations it was trained with."""
    trained = int(REFINER["num_iterations"])
    for times in (1, 2, 4):
        key = {"method": f"refined, {times}x iterations", "start": "encoder"}
        if log.done(key):
            continue
        refiner = train_refiner(model, train, 1500, cache)
        _scheme(refiner).eval_iterations = times * trained
        score = elbo(model, refiner, x, num_samples=NUM_DRAWS)
        log.add(
            key=key,
            values={
                "elbo": _rounded(score.rows),
                "draw_gradients": _scheme(refiner).evaluations,
            },
        )


def _scheme(guide: guides.Guide) -> Any:
    """The scheme of the rows."""
    return guide.schemes["data"]


def _rounded(rows: Tensor | None) -> list[float]:
    if rows is None:
        raise ValueError("The study needs a score for every image.")
    return [round(float(value), 3) for value in rows]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="where fits are kept")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    options = parser.parse_args()
    run(options.cache, options.records, options.images, options.stages)


if __name__ == "__main__":
    main()

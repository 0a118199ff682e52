"""Make the figures of the correspondences and the record of their numbers.

    python -m benchmarks.studies.correspondences                    all
    python -m benchmarks.studies.correspondences whitening          those named

Figures go to ``docs/figures``, numbers to ``benchmarks/records/correspondences``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from benchmarks.studies.correspondences import inference, spatial, temporal, wiring
from benchmarks.studies.correspondences.figures import FIGURES
from benchmarks.study import StudyLog

__all__ = ["FIGURES_FOLDER", "RECORDS", "STUDIES", "main", "run"]

ROOT = Path(__file__).parents[3]
RECORDS = ROOT / "benchmarks" / "records" / "correspondences" / "study.jsonl"
FIGURES_FOLDER = ROOT / "docs" / "figures"

STUDIES: dict[str, tuple[Callable[..., Any], int]] = {
    "whitening": (spatial.whitening, 1),
    "sparse_coding": (spatial.sparse_coding, 1),
    "rao_ballard": (spatial.rao_ballard, 1),
    "temporal_whitening": (temporal.temporal_whitening, 3),
    "pattern_generator": (temporal.pattern_generator, 1),
    "precision": (inference.precision, 1),
    "iterations": (inference.iterations, 3),
    "error_units": (wiring.error_units, 1),
    "level_gradients": (wiring.level_gradients, 1),
    "separate_inputs": (wiring.separate_inputs, 1),
}
"""Every study, and from how many seeds it is run."""


def run(names: Sequence[str], records: Path, folder: Path) -> None:
    """Run studies, add their numbers to a record and draw their figures.

    Args:
        names: Keys of ``STUDIES``.
        records: The record, which a later run of the same study supersedes line by line.
        folder: Where the figures go, one SVG a study.

    Raises:
        ValueError: For a name that is no study.
    """
    unknown = [name for name in names if name not in STUDIES]
    if unknown:
        raise ValueError(f"Studies are {', '.join(STUDIES)}; got {unknown[0]!r}.")
    folder.mkdir(parents=True, exist_ok=True)
    with StudyLog(
        records,
        title="Correspondences",
        question="What of predictive coding's account of the brain can be measured, and is it so?",
        protocol=(
            "Two photographs and the handwritten digits that scikit-learn ships, or data that "
            "programs draw; one core, seconds to minutes a study. docs/correspondences.md says "
            "what each study does and what its numbers are evidence for."
        ),
        command="python -m benchmarks.studies.correspondences",
        over=("seed",),
        modules=[
            f"benchmarks.studies.correspondences.{name}"
            for name in ("spatial", "temporal", "inference", "wiring")
        ],
    ) as log:
        for name in names:
            study, seeds = STUDIES[name]
            runs: list[dict[str, Any]] = []
            pictures: dict[str, Tensor] = {}
            for seed in range(seeds):
                with pyro.get_param_store().scope():
                    pyro.set_rng_seed(seed)
                    numbers, shown = study()
                log.add(key={"study": name, "seed": seed}, values=numbers)
                runs.append(numbers)
                pictures = pictures or shown
            drawn = FIGURES[name](runs, pictures)
            (folder / f"{name}.svg").write_text(drawn, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(STUDIES))
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--figures", type=Path, default=FIGURES_FOLDER)
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run(options.names or list(STUDIES), options.records, options.figures)


if __name__ == "__main__":
    main()

"""Reference posteriors of the benchmark sbibm: ten observations a task, 10,000 draws each.

These are answers, not rows to learn from, so they are no entry of ``zoo.data.DATASETS``. The
programs that go with them are ``zoo.make("two_moons")``, ``"slcp"`` and ``"gaussian_mixture"``.
"""

from __future__ import annotations

import bz2
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.data.files import RemoteFile, fetch

__all__ = ["FILES", "NUM_OBSERVATIONS", "TASKS", "ReferencePosterior", "load", "read_csv"]

TASKS = ("two_moons", "slcp", "gaussian_mixture")
NUM_OBSERVATIONS = 10

_TAG = "v1.1.0"
_BASE = f"https://raw.githubusercontent.com/sbi-benchmark/sbibm/{_TAG}/sbibm"


def _uncompressed(content: bytes) -> bytes:
    return bz2.decompress(content) if content[:3] == b"BZh" else content


def _files() -> dict[str, RemoteFile]:
    """``"<task>/<number>/<name>.csv"`` -> the file; the checksums stand beside this module."""
    files = {}
    for line in Path(__file__).with_suffix(".sha256").read_text().splitlines():
        sha256, key = line.split()
        task, number, name = key.split("/")
        compressed = name == "reference_posterior_samples.csv"
        path = f"tasks/{task}/files/num_observation_{number}/{name}{'.bz2' * compressed}"
        files[key] = RemoteFile(
            path=f"sbibm/{path}",
            sha256=sha256,
            urls=(f"{_BASE}/{path}",),
            decode=_uncompressed,
        )
    return files


FILES = _files()


@dataclass(frozen=True)
class ReferencePosterior:
    """One observation of a task with draws from its posterior.

    Args:
        task: Name of the task, a key of ``zoo.MODELS``.
        number: Number of the observation, from 1.
        x: The observation ``(D,)``.
        parameters: The parameters ``(K,)`` that generated it.
        draws: Draws ``(10000, K)`` from its posterior.
    """

    task: str
    number: int
    x: Tensor
    parameters: Tensor
    draws: Tensor


def read_csv(content: bytes) -> Tensor:
    r"""The numbers of a csv file under its one line of titles.

    Args:
        content: The text of the file.

    Returns:
        A row a line, of the default dtype.

    Example:
        >>> read_csv(b"a,b\n1.0,2.0\n3.0,4.0\n")
        tensor([[1., 2.],
                [3., 4.]])
    """
    lines = content.decode("ascii").splitlines()[1:]
    rows = np.loadtxt(lines, delimiter=",", ndmin=2)
    return torch.from_numpy(rows).to(torch.get_default_dtype())


def load(task: str, *, mirror: str | None = None) -> tuple[ReferencePosterior, ...]:
    """The ten reference posteriors of a task.

    References:
        | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021)
        | https://arxiv.org/abs/2101.04653
        | Files: https://github.com/sbi-benchmark/sbibm, MIT license.

    Args:
        task: One of ``TASKS``.
        mirror: Base address of a mirror of one's own.

    Raises:
        ValueError: For an unknown task, or a file with a wrong checksum.
        FileNotFoundError: Where the files are nowhere and cannot be downloaded.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}. Available tasks: {', '.join(TASKS)}.")

    def table(number: int, name: str) -> Tensor:
        return read_csv(fetch(FILES[f"{task}/{number}/{name}.csv"], mirror=mirror))

    return tuple(
        ReferencePosterior(
            task=task,
            number=number,
            x=table(number, "observation")[0],
            parameters=table(number, "true_parameters")[0],
            draws=table(number, "reference_posterior_samples"),
        )
        for number in range(1, NUM_OBSERVATIONS + 1)
    )

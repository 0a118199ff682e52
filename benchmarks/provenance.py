"""Where a number comes from: versions of what computed it, and the machine that did."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["machine", "versions"]

_DISTRIBUTIONS = {
    "pyro-zoo": "pyro-zoo",
    "torch": "torch",
    "pyro": "pyro-ppl",
    "numpy": "numpy",
    "zuko": "zuko",
    "arviz": "arviz",
    "sklearn": "scikit-learn",
}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries a run depends on."""
    found = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(jobs: int) -> dict[str, str | int]:
    """Return what wall seconds depend on: processor, cores, threads a run and runs at a time.

    No host name and no path: records are published.

    Args:
        jobs: Number of runs that shared the machine.
    """
    import torch

    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "jobs": jobs,
    }

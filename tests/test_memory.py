"""Memory that a run frees stays with its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import torch
from benchmarks.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
x = torch.ones(2**21)  # 8 MB
for _ in range(3):
    parts = [torch.add(x, number) for number in range(5)]
    del parts
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(150):
    parts = [torch.add(x, number) for number in range(5)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 3:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    assert 4 * _faults("keep") < _faults("leave")

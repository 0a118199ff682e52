"""Memory that a run frees stays with its process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import torch
from benchmarks.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
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
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    assert 4 * _faults("keep") < _faults("leave")

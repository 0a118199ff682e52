"""Inject one-line faults, one at a time, and see the suite catch every one.

    python -m tests.mutate            all faults, about an hour on one core, slow tests included
    python -m tests.mutate jacobian   those whose name or file contains the word
    python -m tests.mutate --stale    only whether the code still has the lines, in a second

Each fault is made in a copy of the repository and run against the tests named beside it. A fault
that survives is a hole in the tests: the script prints it and exits with 1.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fault import Fault
from tests.faults_coding import FAULTS as CODING
from tests.faults_core import FAULTS as CORE
from tests.faults_sampling import FAULTS as SAMPLING
from tests.faults_sequences import FAULTS as SEQUENCES

ROOT = Path(__file__).resolve().parent.parent
FAULTS = [*CORE, *CODING, *SAMPLING, *SEQUENCES]


def stale(fault: Fault, root: Path = ROOT) -> str:
    """Why a fault cannot be injected any more, or its tests cannot run; empty if they can."""
    path = root / fault.file
    if not path.is_file():
        return f"there is no {fault.file}"
    if fault.right not in path.read_text():
        return f"{fault.right!r} is not in {fault.file}"
    if fault.right == fault.wrong:
        return "it changes nothing"
    for word in shlex.split(fault.tests):
        if not word.startswith("tests/"):
            continue
        file, _, node = word.partition("::")
        if not (root / file).is_file():
            return f"there is no {file}"
        if node and f"def {node.partition('[')[0]}(" not in (root / file).read_text():
            return f"there is no test {word}"
    return ""


def inject(fault: Fault, copy: Path) -> str:
    """Make the fault in a copy, run its tests, undo it; the verdict."""
    reason = stale(fault, copy)
    if reason:
        return f"STALE, {reason}"
    path = copy / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.right, fault.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(
            [*command, *shlex.split(fault.tests)], cwd=copy, capture_output=True, text=True
        )
    finally:
        path.write_text(text)
    # Only failed tests catch a fault: other codes say that none could run.
    if run.returncode == 1:
        return "caught"
    return "SURVIVED" if run.returncode == 0 else f"NO TESTS, pytest said {run.returncode}"


def main(arguments: Sequence[str]) -> int:
    """Run the faults; 0 if all were caught."""
    words = [word for word in arguments if word != "--stale"]
    chosen = [f for f in FAULTS if all(word in f"{f.name} {f.file}" for word in words)]
    if "--stale" in arguments:
        found = {fault.name: stale(fault) for fault in chosen}
        for name, reason in found.items():
            if reason:
                print(f"STALE {name}: {reason}")
        return int(any(found.values()))
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "repository"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "records")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, fault in enumerate(chosen, 1):
            start = time.monotonic()
            verdict = inject(fault, copy)
            seconds = time.monotonic() - start
            print(f"{number:3} {verdict:9} {fault.name} ({seconds:.0f} s)", flush=True)
            missed += verdict != "caught"
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

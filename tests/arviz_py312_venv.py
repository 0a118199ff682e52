"""Make an environment with Python >= 3.12 and ArviZ 1.x, and print its interpreter.

``python tests/arviz_py312_venv.py DIR``: ArviZ 1.x needs Python 3.12, where the pinned torch may
not exist, so the torch-free core of the export is tested in an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = ["numpy", "arviz>=1,<2", "h5netcdf", "h5py"]
VERSIONS = ("3.12", "3.13", "3.14")


def candidates() -> Iterator[str]:
    """Interpreters that may be new enough, likeliest first."""
    yield sys.executable
    for version in VERSIONS:
        found = shutil.which(f"python{version}")
        if found is not None:
            yield found
    roots = [os.environ.get("PYENV_ROOT"), str(Path.home() / ".pyenv")]
    for root in filter(None, roots):
        for version in VERSIONS:
            for path in sorted(Path(root).glob(f"versions/{version}.*/bin/python")):
                yield str(path)


def is_new_enough(interpreter: str) -> bool:
    code = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))"
    try:
        run = subprocess.run([interpreter, "-c", code], capture_output=True, check=False)
    except OSError:
        return False
    # A shim of pyenv exists for versions that are not selected, and fails when it is run.
    return run.returncode == 0


def main(folder: str) -> int:
    base = next((path for path in candidates() if is_new_enough(path)), None)
    if base is None:
        print("No Python >= 3.12 was found: ArviZ 1.x cannot be tested here.", file=sys.stderr)
        return 1
    target = Path(folder).resolve()
    interpreter = target / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([base, "-m", "venv", str(target)], check=True, stdout=sys.stderr)
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", *REQUIREMENTS]
    subprocess.run([str(interpreter), *install], check=True, stdout=sys.stderr)
    print(interpreter)
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))

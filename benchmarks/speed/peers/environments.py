"""Virtual environments of the peers, one each: `python -m benchmarks.speed.peers.environments`.

PCX needs a JAX below 0.5 and FabricPC one from 0.7 on, so no environment could hold both; and a
peer must not see this project's libraries. Versions are pinned, those that decide speed above all.
An environment that is there with these versions is left as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["REQUIREMENTS", "build", "interpreter", "main"]

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "numpyro": ("numpyro==0.22.0", "jax==0.10.2", "jaxlib==0.10.2", "numpy==2.4.6"),
    "pcx": (
        "pcx==0.6.3",
        "jax==0.4.38",
        "jaxlib==0.4.38",
        "equinox==0.11.12",
        "optax==0.2.5",
        "numpy==2.4.6",
    ),
    "fabricpc": (
        "fabricpc==0.6.0",
        "jax==0.10.2",
        "jaxlib==0.10.2",
        "optax==0.2.8",
        "numpy==2.4.6",
    ),
}

# The hand-written JAX program needs JAX alone, and is compared with that of NumPyro's tasks.
_SHARED = {"jax": "numpyro"}


def interpreter(name: str, folder: str | Path) -> Path:
    """The interpreter of a peer's environment, whether it is there or not.

    Args:
        name: ``"numpyro"``, ``"jax"``, ``"pcx"`` or ``"fabricpc"``.
        folder: The folder of all environments.

    Raises:
        ValueError: For an unknown name.
    """
    home = _SHARED.get(name, name)
    if home not in REQUIREMENTS:
        known = ", ".join([*REQUIREMENTS, *_SHARED])
        raise ValueError(f"No environment is known for peer {name!r}. Available: {known}.")
    inside = ("Scripts", "python.exe") if sys.platform == "win32" else ("bin", "python")
    return Path(folder).absolute().joinpath(home, *inside)


def build(name: str, folder: str | Path, *, index_options: Sequence[str] = ()) -> Path:
    """Build a peer's environment where it is missing or has other versions.

    Args:
        name: As for :func:`interpreter`.
        folder: The folder of all environments, made if need be.
        index_options: Further options of `pip install`, such as ``("--no-index",)``.

    Returns:
        Its interpreter.

    Raises:
        ValueError: For an unknown name.
        RuntimeError: Where Python's venv or pip fails, for example without a network.
    """
    python = interpreter(name, folder)
    home = _SHARED.get(name, name)
    required = REQUIREMENTS[home]
    stamp = Path(folder).absolute() / home / "requirements.txt"
    wanted = "\n".join(required) + "\n"
    if python.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    target = python.parents[1]
    target.parent.mkdir(parents=True, exist_ok=True)
    made = _call([sys.executable, "-m", "venv", "--clear", str(target)])
    if made.returncode:
        raise RuntimeError(
            f"Python's venv could not make the environment of peer {name!r}: {_last(made)} "
            "Install the part of Python that holds venv and ensurepip."
        )
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    done = _call([*pip, *index_options, *required])
    if done.returncode:
        raise RuntimeError(
            f"pip could not install {required[0]} for peer {name!r}: {_last(done)} "
            "It needs a package index; run it where there is one, or leave this peer out."
        )
    # Written last: an environment that was cut short is built again.
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    text = (errors or lines or ["no message"])[-1].strip()
    return text if text.endswith(".") else f"{text}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Build environments and print their interpreters.

    Args:
        arguments: Of the command line.

    Returns:
        0 where all are there, else 1.
    """
    parser = argparse.ArgumentParser(description="Build the virtual environments of the peers.")
    parser.add_argument("--to", required=True, help="folder of the environments, such as a cache")
    parser.add_argument("--peers", nargs="+", choices=list(REQUIREMENTS), help="only these")
    chosen = parser.parse_args(arguments)
    failed = 0
    for name in chosen.peers or REQUIREMENTS:
        try:
            print(f"{name}: {build(name, chosen.to)}", flush=True)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())

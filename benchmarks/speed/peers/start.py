"""The script that an interpreter runs to become a peer: `python start.py scripts.numpyro_peer`.

The interpreter is that of the peer's own environment, which has neither torch nor Pyro and must
not see those of this project. So no path is added: the packages above this folder are entered by
hand, without what they import, and the modules beside this file are found as in the project.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

__all__ = ["main"]

_HERE = Path(__file__).resolve().parent
_PEERS = "benchmarks.speed.peers"
_PACKAGES = {
    "benchmarks": _HERE.parents[1],
    "benchmarks.speed": _HERE.parent,
    _PEERS: _HERE,
    f"{_PEERS}.scripts": _HERE / "scripts",
}


def main(name: str) -> None:
    """Import a module of this folder under its full name, and call its ``main``.

    Args:
        name: The module, such as ``"torch_peer"`` or ``"scripts.numpyro_peer"``.
    """
    # The folder of this script comes first by default; its modules are reached by full name only.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    for package, folder in _PACKAGES.items():
        module = types.ModuleType(package)
        module.__path__ = [str(folder)]
        sys.modules[package] = module
    importlib.import_module(f"{_PEERS}.{name}").main()


if __name__ == "__main__":
    main(sys.argv[1])

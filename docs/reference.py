"""Write the API reference, one HTML page a module, from the docstrings.

python docs/reference.py [FOLDER]            build/reference by default
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("zoo", "guides", "benchmarks")

# `python docs/reference.py` puts docs/, not the repository, on the path.
sys.path.insert(0, str(ROOT))


def write(folder: Path) -> Path:
    """Write the pages.

    Args:
        folder: Where to.

    Returns:
        The page to open first.
    """
    import pdoc

    for package in PACKAGES:
        root = importlib.import_module(package)
        found = pkgutil.walk_packages(root.__path__, f"{package}.")
        for name in [package, *(info.name for info in found if info.ispkg)]:
            _list_modules(importlib.import_module(name))
    pdoc.render.configure(docformat="google", math=True, footer_text="pyro-zoo")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as a module that cannot be imported
        # Names that a module imports for its annotations only are not there to be linked to.
        warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
        pdoc.pdoc(*PACKAGES, output_directory=folder)
    return folder / "index.html"


def _list_modules(package: ModuleType) -> None:
    """Let ``__all__`` of a package name what it defines and its modules.

    As written it names what is loaded on first use, and pdoc takes that for all there is.
    """
    if "__all__" not in vars(package):
        return
    defined = [name for name in vars(package)["__all__"] if name in vars(package)]
    modules = [info.name for info in pkgutil.iter_modules(package.__path__)]
    vars(package)["__all__"] = [*defined, *(name for name in modules if not name.startswith("_"))]


def main(arguments: Sequence[str]) -> int:
    """Write to the folder named first, and say where the pages are."""
    print(write(Path(arguments[0]) if arguments else ROOT / "build" / "reference"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

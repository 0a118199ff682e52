"""Digest of the code behind a run: what must be unchanged for a finished run to be reused.

The digest is known before anything runs. It is a walk over import statements, written anywhere
in a module, that stays inside `zoo`, `guides` and `benchmarks`. Names that a package loads on
first use (`"SVI": "guides.inference.svi"`) are followed where they are imported, and all of them
where the package is imported as an object. Comments, docstrings and blank lines do not count:
polishing a docstring leaves every record valid.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TypeGuard

__all__ = ["closure", "code_digest", "imported_names", "local_files", "source_digest", "stripped"]

PACKAGES = ("zoo", "guides", "benchmarks")
_NAMED = re.compile(r"^(?:zoo|guides|benchmarks)(?:\.\w+)+(?::\w+)?$")

# The registries name every model and every guide. A run uses one of each, and says which.
_REGISTRIES = ("zoo", "guides", "benchmarks", "benchmarks.suites")


@cache
def _find(module: str) -> Path | None:
    """Return the source file of a project module without importing it, or None."""
    root = importlib.util.find_spec(module.partition(".")[0])
    if root is None or not root.submodule_search_locations:
        return None
    path = Path(next(iter(root.submodule_search_locations))).joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def stripped(source: str) -> str:
    """Return source code without comments, docstrings, blank lines and trailing spaces."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    for row in range(first.lineno - 1, first.end_lineno or first.lineno):
                        lines[row] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache
def _parsed(module: str) -> ast.Module:
    path = _find(module)
    return ast.parse("" if path is None else path.read_text(encoding="utf-8"))


@cache
def _lazy(module: str) -> dict[str, str]:
    """What a package loads on first use: entries such as `"SVI": "guides.inference.svi"`."""
    entries = {}
    for node in ast.walk(_parsed(module)):
        for key, value in zip(node.keys, node.values, strict=True) if _is_dict(node) else ():
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                if isinstance(value.value, str) and _NAMED.match(value.value):
                    entries[str(key.value)] = value.value.partition(":")[0]
    return entries


def _is_dict(node: ast.AST) -> TypeGuard[ast.Dict]:
    return isinstance(node, ast.Dict)


def _from(package: str, name: str) -> list[str]:
    """Modules behind `from package import name`."""
    module = f"{package}.{name}"
    if _find(module) is not None:
        return _whole(module)
    return [package, _lazy(package).get(name, package)]


def _whole(module: str) -> list[str]:
    """A module used as an object: whatever it loads on first use may be used."""
    return [module] if module in _REGISTRIES else [module, *_lazy(module).values()]


def _imports(module: str) -> set[str]:
    """Names of project modules that a module refers to."""
    path, found = _find(module), set()
    package = path is not None and path.name == "__init__.py"
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.update(_whole(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found.update(_from(node.module, alias.name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not package:
            if _NAMED.match(node.value):
                found.add(node.value.partition(":")[0])
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def closure(roots: Iterable[str]) -> list[str]:
    """Return every project module that the roots import, themselves included, sorted by name.

    Args:
        roots: Module names, with or without `:attribute`; unknown ones are left out.
    """
    todo = [root.partition(":")[0] for root in roots]
    seen: set[str] = set()
    while todo:
        module = todo.pop()
        if module in seen or _find(module) is None:
            continue
        seen.add(module)
        if "." in module:
            todo.append(module.rpartition(".")[0])
        todo.extend(_imports(module))
    return sorted(seen)


def local_files(path: Path) -> list[Path]:
    """Return a file of the user's own and all modules beside it that it imports, sorted.

    Args:
        path: A task file; imports are followed from module to module within its folder.
    """
    folder = path.resolve().parent
    todo, seen = [path.resolve()], set[Path]()
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in imported_names(file):
            if name.partition(".")[0] in PACKAGES:
                continue
            base = folder.joinpath(*name.split("."))
            for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                if candidate.is_file():
                    todo.append(candidate)
            # Importing a module runs the packages that it lies in.
            parents = (
                folder.joinpath(*name.split(".")[:i]) for i in range(1, name.count(".") + 1)
            )
            todo += [f / "__init__.py" for f in parents if (f / "__init__.py").is_file()]
    return sorted(seen)


def imported_names(path: Path) -> list[str]:
    """Return every name that a file imports, `package.name` for `from package import name`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names += [module] if module else []
            names += [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


@cache
def source_digest(path: Path) -> str:
    """Return the sha256 of one file's code, comments and docstrings left out."""
    return hashlib.sha256(stripped(path.read_text(encoding="utf-8")).encode()).hexdigest()


def code_digest(modules: Iterable[str], files: Iterable[Path] = ()) -> str:
    """Return one digest over project modules and files of the user's own.

    Args:
        modules: Names as `closure` returns them. A module that is no longer there changes the
            digest, as it should.
        files: Task files outside the project.

    Returns:
        The first 16 hexadecimal digits of a sha256.

    Example:
        >>> from benchmarks.digest import closure, code_digest
        >>> modules = closure(["benchmarks.records"])
        >>> "benchmarks.report" in modules
        False
        >>> len(code_digest(modules))
        16
    """
    total = hashlib.sha256()
    for module in sorted(modules):
        path = _find(module)
        total.update(f"{module}={source_digest(path) if path else 'missing'};".encode())
    for path in sorted(files):
        total.update(f"file:{path.name}={source_digest(path)};".encode())
    return total.hexdigest()[:16]

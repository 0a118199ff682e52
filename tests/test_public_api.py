"""The shape of the packages: who imports whom, what is public, what the top level holds.

The code is read with ``ast`` wherever that is enough, so that a forbidden import is named by file
and line even in a module that does not import.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.model_cases import MODEL_CASES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("zoo", "guides", "benchmarks")
REGISTRIES = {
    "zoo": "MODELS",
    "guides": "GUIDES",
    "guides.families": "FAMILIES",
    "guides.inference": "LOOPS",
    "guides.objectives": "OBJECTIVES",
    "guides.schemes": "SCHEMES",
}
# The grid is made of two literals, families and schemes.
COMPUTED = ("guides",)

# package -> what it must not import, at module level or inside a function
FORBIDDEN = {
    "zoo": {"guides", "benchmarks", "tests", "docs"},
    "guides": {"zoo", "benchmarks", "tests", "docs"},
    "benchmarks": {"tests", "docs"},
}
# what may be imported at module level besides the standard library and the project's own packages
ALLOWED = {"torch", "pyro", "numpy"}
HEAVY = ("arviz", "matplotlib", "plotly", "dask", "sklearn", "pandas", "xarray", "pooch")

TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "docs",
    "guides",
    "pyproject.toml",
    "tests",
    "zoo",
}


def module_names() -> Iterator[str]:
    """Every module of the three packages, by dotted name, without importing any of them."""

    def walk(folder: Path, prefix: str) -> Iterator[str]:
        for info in pkgutil.iter_modules([str(folder)]):
            yield f"{prefix}.{info.name}"
            if info.ispkg:
                yield from walk(folder / info.name, f"{prefix}.{info.name}")

    for package in PACKAGES:
        yield package
        yield from walk(ROOT / package, package)


MODULES = sorted(module_names())
PUBLIC_MODULES = [name for name in MODULES if not re.search(r"\._", name)]


def source(module: str) -> Path:
    """The file of a module."""
    path = ROOT.joinpath(*module.split("."))
    # benchmarks/records/ is a folder of data beside the module benchmarks/records.py.
    package = path / "__init__.py"
    return package if package.exists() else path.with_suffix(".py")


def imports(body: list[ast.stmt], *, module_level: bool) -> Iterator[tuple[str, int]]:
    """Names imported in ``body``, with their lines; at module level, what runs on import only."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level) + (node.module or ""), node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif module_level and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(node.orelse, module_level=True)
        else:
            inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]
            yield from imports(inner, module_level=module_level)


def parse(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(source(module).read_text(encoding="utf-8"))


def registry(package: str) -> dict[str, object]:
    """The registry of a package, imported."""
    found = getattr(importlib.import_module(package), REGISTRIES[package])
    assert isinstance(found, dict)
    return found


def resolve(entry: object) -> list[Any]:
    """What a registry value stands for: itself, or the object behind each ``"module:attr"``."""
    if isinstance(entry, tuple):
        return [part for item in entry for part in resolve(item)]
    if not isinstance(entry, str):
        return [entry]
    module, _, attribute = entry.partition(":")
    return [getattr(importlib.import_module(module), attribute)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrow(module: str) -> None:
    """tests, docs, benchmarks -> guides -> torch; benchmarks -> zoo; guides and zoo apart."""
    forbidden = FORBIDDEN[module.split(".")[0]]
    wrong = [
        f"{source(module).relative_to(ROOT)}:{line} imports {name}"
        for name, line in imports(parse(module).body, module_level=False)
        if name.split(".")[0] in forbidden or name.startswith(".")
    ]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_module_level_imports_are_light(module: str) -> None:
    """Everything but torch, pyro and numpy is imported where it is used."""
    in_families = module.startswith("guides.families")
    wrong = []
    for name, line in imports(parse(module).body, module_level=True):
        top = name.split(".")[0]
        # pyro.contrib.zuko imports zuko, under another name
        needs_zuko = top == "zuko" or name.startswith("pyro.contrib.zuko")
        light = top in sys.stdlib_module_names or top in PACKAGES or top in ALLOWED
        if (needs_zuko and not in_families) or not (light or needs_zuko):
            wrong.append(f"{source(module).relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import zoo", HEAVY),
        ("import guides", HEAVY),
        ("import guides.diagnostics.arviz_arrays", (*HEAVY, "torch", "pyro", "zuko")),
    ],
)
def test_import_is_light(statement: str, absent: tuple[str, ...]) -> None:
    """What a bare import loads, read from ``sys.modules`` of a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted(set(sys.modules) & set({absent!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", [name for name in REGISTRIES if name not in COMPUTED])
def test_registry_is_a_dict_literal(package: str) -> None:
    """One literal, written once: no decorator, no scan, no key assigned elsewhere."""
    name = REGISTRIES[package]
    literals = []
    for node in parse(package).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            literals.append(node.value)  # type: ignore[attr-defined]
    assert len(literals) == 1
    (literal,) = literals
    assert isinstance(literal, ast.Dict)
    keys = [key.value for key in literal.keys if isinstance(key, ast.Constant)]
    assert len(keys) == len(literal.keys)
    assert len(set(keys)) == len(keys)
    assert list(registry(package)) == keys


@pytest.mark.parametrize("package", REGISTRIES)
def test_registry_values_resolve(package: str) -> None:
    """Every value is, or names, something callable that says what it is."""
    for key, entry in registry(package).items():
        for target in resolve(entry):
            assert callable(target), f"{key!r} resolves to {target!r}"
            assert inspect.getdoc(target), f"{key!r}: {target!r} has no docstring"


def test_files_are_named_as_their_keys() -> None:
    """Registry key = file name: grep for one finds the other."""
    for package in ("zoo", "guides.families"):
        for key, entry in registry(package).items():
            assert resolve(entry)[0].__module__.split(".")[-1] == key


def test_default_guides_are_registered() -> None:
    """A model's ``default_guide`` is a key of ``GUIDES``; fully visible models have none."""
    for key, entry in registry("zoo").items():
        default = getattr(resolve(entry)[0], "default_guide", None)
        if not MODEL_CASES[key].latents:
            assert default is None, f"zoo model {key!r} has nothing for {default!r} to infer"
            continue
        assert default in registry("guides"), f"zoo model {key!r} has default_guide={default!r}"


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_dunder_all_is_honest(module: str) -> None:
    """``__all__`` lists each public name once, and only names that exist."""
    imported = importlib.import_module(module)
    listed = getattr(imported, "__all__", None)
    if listed is None:
        return
    assert len(set(listed)) == len(listed)
    missing = [name for name in listed if not hasattr(imported, name)]
    assert not missing
    defined = {
        node.name
        for node in parse(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    assert defined <= set(listed), f"public here, but not in __all__: {defined - set(listed)}"


@pytest.mark.parametrize(
    "package", [name for name in PUBLIC_MODULES if source(name).stem == "__init__"]
)
def test_no_module_hides_an_export(package: str) -> None:
    """Importing ``a.b`` sets the attribute b of a: an export named b would become a module."""
    for name in MODULES:
        if name.startswith(f"{package}.") and not name.endswith("__main__"):
            importlib.import_module(name)
    imported = importlib.import_module(package)
    exported = {name: getattr(imported, name) for name in getattr(imported, "__all__", ())}
    modules = [name for name, value in exported.items() if inspect.ismodule(value)]
    hidden = [name for name in modules if source(f"{package}.{name}").stem != "__init__"]
    assert not hidden


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_have_docstrings(module: str) -> None:
    """Modules, and the public classes, functions and methods that they define."""
    tree = parse(module)
    bare = [] if ast.get_docstring(tree) else [module]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        inner = node.body if isinstance(node, ast.ClassDef) else []
        functions = [n for n in inner if isinstance(n, ast.FunctionDef) and n.name[0] != "_"]
        bare += [f"{module}.{n.name}" for n in (node, *functions) if not ast.get_docstring(n)]
    assert not bare


def test_top_level_is_fixed() -> None:
    """A new file or folder at the top is a decision, made here."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        found = {line.split("/")[0] for line in listing.stdout.splitlines()}
        assert found <= TOP_LEVEL, f"not foreseen at the top level: {found - TOP_LEVEL}"
    assert all((ROOT / name).exists() for name in TOP_LEVEL)


def test_versions_agree() -> None:
    """pyproject.toml, CITATION.cff and the newest section of CHANGELOG.md name one version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?(\d[^\]\s]*)", changelog, flags=re.MULTILINE)
    cited = re.search(r"^version: (\S+)", citation, flags=re.MULTILINE)
    assert newest is not None
    assert cited is not None
    assert {newest[1], cited[1]} == {project["version"]}


def test_every_direct_dependency_is_pinned() -> None:
    """What pyproject.toml asks for, constraints.txt pins to the version tested."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(entry for extra in extras for entry in extra)]
    names = {re.split(r"[\[<>=!~ ;]", entry)[0] for entry in wanted} - {project["name"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0] for line in lines if "==" in line}
    assert names <= pins, f"not pinned in constraints.txt: {sorted(names - pins)}"


def test_records_stay_out_of_the_wheel() -> None:
    """The build's own exclusion list names the records, so that the wheel stays small."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    assert "benchmarks/records/" in build["build"]["targets"]["wheel"]["exclude"]


def test_sites_of_models_are_documented() -> None:
    """A program's interface is its sites: a model lists them, and shows itself at work."""
    for key, entry in registry("zoo").items():
        text = inspect.getdoc(resolve(entry)[0]) or ""
        assert "Sites:" in text, f"zoo model {key!r} has no 'Sites:' section"
        assert ">>>" in text, f"zoo model {key!r} has no example"

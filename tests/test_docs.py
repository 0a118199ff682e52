"""What the documentation says is run: code blocks, doctests, links, tables, commands.

The ``python`` blocks of one Markdown file share one namespace and run top to bottom, as a reader
would type them, with Pyro's param store and the random number generators fenced off.
"""

import contextlib
import doctest
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyro
import pytest

import benchmarks.__main__ as command_line
from tests.test_public_api import MODULES, ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    flags=re.MULTILINE | re.DOTALL,
)


def page_id(path: Path) -> str:
    """The path of a page inside the repository, as a test id."""
    return path.relative_to(ROOT).as_posix()


def run_blocks(path: Path) -> int:
    """Run the ``python`` blocks of a page in one namespace; returns how many there were.

    A ``text`` block right below one is what it prints: words must agree, figures within 0.05.
    """
    text = path.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        # so that a traceback names the line of the page
        above = "\n" * text.count("\n", 0, block.start("code"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(above + block["code"], str(path), "exec"), namespace)
        if block["output"] is not None:
            compare(printed.getvalue(), block["output"])
    return len(blocks)


def compare(printed: str, told: str) -> None:
    """Assert that two texts agree word by word, figures within 0.05."""
    assert len(printed.split()) == len(told.split()), printed
    for got, expected in zip(printed.split(), told.split(), strict=True):
        if re.fullmatch(r"-?\d+\.\d+", expected):
            assert float(got) == pytest.approx(float(expected), abs=0.05), printed
        else:
            assert got == expected, printed


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to work in; conftest gives the empty param store and the seed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_code_blocks_run(path: Path) -> None:
    """Every ``python`` block of every page."""
    run_blocks(path)


def test_a_failing_block_fails(tmp_path: Path) -> None:
    """The runner itself: blocks share a namespace, an error names the line of the page."""
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\na = 1\n```\n\ntext\n\n```python\nassert a == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page)
    assert caught.traceback[-1].lineno == 9  # counted from 0: line 10 of the page
    page.write_text("```python\na = 1\n```\n```python\nassert a == 1\n```\n")
    assert run_blocks(page) == 2
    page.write_text("```python\nprint('a', 1.23)\n```\n\n```text\na 1.20\n```\n")
    assert run_blocks(page) == 1
    page.write_text("```python\nprint('a', 1.23)\n```\n\n```text\na 1.30\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page)


def test_readme_example_is_short() -> None:
    """The first block of the README is the promise of the project: at most 15 lines of code."""
    first = BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert first is not None
    lines = [
        line for line in first["code"].splitlines() if line.strip() and not line.startswith("#")
    ]
    assert len(lines) <= 15


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    """The ``Example:`` of every docstring."""
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    for case in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        report: list[str] = []
        doctest.DocTestRunner(optionflags=flags).run(case, out=report.append)
        assert not report, "".join(report)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    """Relative links name files of the repository, and anchors name headings."""

    def anchors(page: Path) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}

    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_make_targets_in_the_text_exist() -> None:
    """A ``make NAME`` that a page tells the reader to type is a target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        told = set(re.findall(r"`make ([a-z-]+)", text))
        told |= set(re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE))
        assert told <= targets, f"{page_id(path)} tells of {told - targets}"


def test_command_lines_in_the_text_are_accepted() -> None:
    """Every ``pyro-zoo`` command that a page or the Makefile tells is one that it parses."""
    parser = command_line._parser()
    told = re.compile(r"(?:python -m benchmarks|`pyro-zoo) ((?:list|run|report)[^`\n#]*)")
    for path in [*PAGES, ROOT / "Makefile"]:
        for line in told.findall(path.read_text(encoding="utf-8")):
            options = parser.parse_args(shlex.split(line))
            assert options.command in ("list", "run", "report")


def test_generated_tables_are_current() -> None:
    """The README's tables are what the registries and the committed records give."""
    done = subprocess.run(
        [sys.executable, "docs/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

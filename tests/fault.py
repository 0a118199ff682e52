"""One injected fault: what `python -m tests.mutate` changes, and which tests must see it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One line of one file, replaced.

    Args:
        name: what goes wrong, as a sentence.
        file: path from the root of the repository.
        right: text of the file, every occurrence of which is replaced.
        wrong: what replaces it.
        tests: arguments of pytest: files, nodes, or ``-k`` with a quoted expression.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str

"""Whether a program is being captured as a graph: checks that read values are then left out.

A capture runs the program once to write its operations down, and cannot branch on a value. What
was checked in the eager call just before it need not be checked again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["capturing", "is_capturing"]

_CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)


def is_capturing() -> bool:
    """Whether operations are being written down, so that no value may be read."""
    return _CAPTURING.get()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Leave out checks of values inside."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)

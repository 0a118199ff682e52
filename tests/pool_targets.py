"""What the workers of ``test_pool.py`` are asked to do."""

from __future__ import annotations

import os
from typing import Any


def square(payload: dict[str, Any], tick: Any) -> int:
    """The square of a number; a process of its own ends at zero."""
    if payload["number"] == 0:
        os._exit(3)
    return payload["number"] ** 2


def process(payload: dict[str, Any], tick: Any) -> int:
    """Which process is asked."""
    return os.getpid()

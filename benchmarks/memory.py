"""What the allocator of the C library does with memory that a long run frees."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# Of malloc.h: glibc alone has them.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST = 2**31 - 1
_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have freed memory stay with the process, to be used again.

    By default large buffers go back to the system when they are freed, and come back as pages of
    zeros that are faulted in one by one: for a temporary of a megabyte that costs more than the
    operation it is for, at every operation. Numbers do not change.

    Returns:
        Whether the C library has such a setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _PAD))
    return all(mallopt(name, value) == 1 for name, value in settings)

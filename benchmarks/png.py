"""PNG: grey-level pictures as data URIs, with the standard library alone."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np

__all__ = ["data_uri", "strip"]


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def data_uri(grey: np.ndarray) -> str:
    """Return an 8-bit grey-level picture `(height, width)` as a PNG in a data URI.

    Example:
        >>> import numpy as np
        >>> from benchmarks.png import data_uri
        >>> data_uri(np.zeros((2, 2), dtype=np.uint8))[:26]
        'data:image/png;base64,iVBO'
    """
    if grey.ndim != 2 or grey.dtype != np.uint8:
        raise ValueError(f"A picture is uint8 (height, width), got {grey.dtype} {grey.shape}.")
    height, width = grey.shape
    lines = b"".join(b"\0" + row.tobytes() for row in grey)  # filter type 0 before every line
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(lines, 9))
        + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


def strip(images: np.ndarray, gap: int = 1, ground: int = 255) -> np.ndarray:
    """Put images `(n, height, width)` side by side, dark on light, with gaps between them."""
    count, height, width = images.shape
    picture = np.full((height, count * (width + gap) - gap), ground, dtype=np.uint8)
    for i in range(count):
        left = i * (width + gap)
        picture[:, left : left + width] = 255 - images[i]
    return picture

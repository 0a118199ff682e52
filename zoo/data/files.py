"""Files of data sets: found or downloaded, and checked by their content.

A file is looked for, in this order, in

    $PYRO_ZOO_DATA/<path>       a folder of one's own: a wrong checksum there is an error
    system folders              where a Linux distribution packages the data set
    <cache>/<path>              <cache> is $PYRO_ZOO_CACHE, else pooch's cache folder for pyro-zoo
    mirrors                     downloaded to the cache; $PYRO_ZOO_MIRROR/<path> replaces them

The checksum is that of the *content*, after decompression or parsing: mirrors compress the same
bytes with different gzip headers. A download is written under a temporary name and moved into
the cache only when its content is right, so that an interrupted one leaves nothing behind.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RemoteFile", "cache_folder", "fetch", "gunzip"]

Decoder = Callable[[bytes], bytes]


def gunzip(content: bytes) -> bytes:
    """Decompress gzip data; data that are not compressed pass through.

    Example:
        >>> gunzip(gzip.compress(b"rows")), gunzip(b"rows")
        (b'rows', b'rows')
    """
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


@dataclass(frozen=True)
class RemoteFile:
    """A file of a data set.

    Args:
        path: Where it lies below a data folder, the cache or a mirror of one's own.
        sha256: Checksum of the decoded content.
        urls: Mirrors, tried in turn.
        decode: From the bytes of the file to its content.
        system: Paths at which a distribution's package puts the file.
        alternatives: Other files that hold the content, path -> decoder; looked for on this
            machine, not downloaded.
    """

    path: str
    sha256: str
    urls: Sequence[str]
    decode: Decoder = gunzip
    system: Sequence[str] = ()
    alternatives: Mapping[str, Decoder] = field(default_factory=dict)

    def candidates(self, folder: Path) -> Iterator[tuple[Path, Decoder]]:
        """Paths that may hold the content in a folder, with their decoders."""
        yield folder / self.path, self.decode
        if self.path.endswith(".gz"):
            yield folder / self.path.removesuffix(".gz"), self.decode
        for path, decode in self.alternatives.items():
            yield folder / path, decode


def cache_folder() -> Path:
    """The folder that downloads are kept in."""
    if folder := os.environ.get("PYRO_ZOO_CACHE"):
        return Path(folder)
    return Path(_pooch().os_cache("pyro-zoo"))


def fetch(file: RemoteFile, *, mirror: str | None = None, timeout: float = 30.0) -> bytes:
    """Return the content of a file, from the first place that has it.

    Args:
        file: The file.
        mirror: Base address used instead of the file's own mirrors; by default
            ``$PYRO_ZOO_MIRROR``.
        timeout: Seconds without an answer after which a mirror is given up.

    Returns:
        The decoded content.

    Raises:
        ValueError: If the file in ``$PYRO_ZOO_DATA`` is not the right one.
        FileNotFoundError: If the file is nowhere and no mirror gives the right one.
        ModuleNotFoundError: If a download is needed and pooch is not installed.
    """
    if folder := os.environ.get("PYRO_ZOO_DATA"):
        for path, decode in file.candidates(Path(folder)):
            if path.is_file():
                content = _verified(file, path.read_bytes(), decode)
                if content is None:
                    raise ValueError(
                        f"{path} is not the file that is expected: the SHA-256 of its content is "
                        f"not {file.sha256}. Replace it, or unset PYRO_ZOO_DATA to download it."
                    )
                return content
    packaged = [(Path(path), file.decode) for path in file.system]
    for path, decode in (*packaged, *file.candidates(cache_folder())):
        if path.is_file():
            content = _verified(file, path.read_bytes(), decode)
            if content is not None:
                return content
    return _download(file, mirror or os.environ.get("PYRO_ZOO_MIRROR"), timeout)


def _download(file: RemoteFile, mirror: str | None, timeout: float) -> bytes:
    urls = [f"{mirror.rstrip('/')}/{file.path}"] if mirror else list(file.urls)
    target = cache_folder() / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    downloader = _pooch().HTTPDownloader(timeout=timeout)
    failures = []
    for url in urls:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = Path(folder) / target.name
            try:
                downloader(url, str(partial), None)
            except OSError as error:  # all of requests' errors are
                failures.append(f"{url}: {_reason(error)}")
                continue
            content = _verified(file, partial.read_bytes(), file.decode)
            if content is None:
                failures.append(f"{url}: the content has a wrong checksum")
                continue
            os.replace(partial, target)
            return content
    raise FileNotFoundError(
        f"{file.path} could not be downloaded ({'; '.join(failures)}). Put the file at {target}, "
        f"or at {file.path} inside a folder that the environment variable PYRO_ZOO_DATA names; "
        f"the SHA-256 of its content is {file.sha256}."
    ) from None


def _verified(file: RemoteFile, raw: bytes, decode: Decoder) -> bytes | None:
    try:
        content = decode(raw)
    except (ValueError, KeyError, EOFError, OSError, zlib.error):
        return None
    return content if hashlib.sha256(content).hexdigest() == file.sha256 else None


def _reason(error: OSError) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"{type(error).__name__}{'' if status is None else f' (HTTP status {status})'}"


def _pooch() -> Any:
    try:
        import pooch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'Downloading data sets needs pooch: pip install "pyro-zoo[data]".'
        ) from None
    return pooch

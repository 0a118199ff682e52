"""Study: a log of results for one question with a protocol of its own, which the report shows.

A suite compares guides on tasks; a study answers one question in its own way and writes what it
finds with `StudyLog`. `python -m benchmarks report FOLDER` turns every such file into a table.

A file holds JSON lines of three kinds:

* `study`: title, question, protocol, command and provenance, written whenever the log is opened;
* `result`: one measurement, `key` (what was measured) and `values` (what came out);
* `note`: a sentence or two on the results, for the reader of the report.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.digest import closure, code_digest
from benchmarks.provenance import machine, versions
from benchmarks.records import append

__all__ = ["StudyLog"]

Record = dict[str, Any]


class StudyLog:
    """Append-only results of a study, resumed by key.

    Every result is on disk as soon as `add` returns. A study that is stopped goes on where it was:
    it asks `done` before it measures.

    Args:
        path: The file, `benchmarks/records/NAME/study.jsonl` for a committed one.
        title: Heading of the study in the report.
        question: What it asks, in a sentence.
        protocol: How it is measured, for a reader who wants to repeat it.
        command: What is typed to make the results.
        over: Names of the key that the report averages over, such as `("seed",)`.
        columns: Explanations of columns, by name.
        modules: Modules whose code decides the results, such as `"benchmarks.studies.sbibm"`;
            the digest covers whatever of this project they import.
        fresh: Whether results of other code count as missing, so that they are made again.

    Attributes:
        results: Results of all sessions by key, the latest of each.
        digest: Digest of the code, kept with every result.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from benchmarks.study import StudyLog
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "study.jsonl"
        >>> def study():
        ...     about = {
        ...         "title": "Means of draws",
        ...         "question": "How far is a mean of n standard normal draws from 0?",
        ...         "protocol": "One mean for every n.",
        ...         "command": "python -m benchmarks.studies.means",
        ...     }
        ...     made = 0
        ...     with StudyLog(path, **about) as log:
        ...         for n in (10, 100):
        ...             key = {"n": n}
        ...             if log.done(key):
        ...                 continue
        ...             log.add(key=key, values={"error": n**-0.5})
        ...             made += 1
        ...         log.note("The error falls with the root of n.")
        ...     return made
        >>> study(), study()
        (2, 0)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | Path,
        *,
        title: str,
        question: str,
        protocol: str,
        command: str,
        over: Sequence[str] = (),
        columns: Mapping[str, str] | None = None,
        modules: Iterable[str] = (),
        fresh: bool = False,
    ) -> None:
        self.path = Path(path)
        self.fresh = fresh
        names = closure(modules)
        self.digest = code_digest(names) if names else ""
        self._header: Record = {
            "kind": "study",
            "title": title,
            "question": question,
            "protocol": protocol,
            "command": command,
            "over": list(over),
            "columns": dict(columns or {}),
            "digests": {self.digest: names} if names else {},
        }
        self.results: dict[str, Record] = {}
        self._notes: list[str] = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._read(line)
        self._written = False
        self._last = time.perf_counter()

    def _read(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return  # an empty line, or one that was cut short: its result is made again
        if record.get("kind") == "result" and "key" in record:
            self.results[_text(record["key"])] = record
        elif record.get("kind") == "note":
            self._notes.append(record["text"])

    def done(self, key: Mapping[str, Any]) -> bool:
        """Whether a result is recorded under a key.

        Args:
            key: As given to `add`; the order of its names does not matter.
        """
        record = self.results.get(_text(key))
        if record is None:
            self._last = time.perf_counter()
            return False
        return not self.fresh or record.get("digest") == self.digest

    def add(
        self, *, key: Mapping[str, Any], values: Mapping[str, Any], seconds: float | None = None
    ) -> None:
        """Record a result.

        Args:
            key: What was measured: names and plain values, such as `{"task": "slcp", "seed": 0}`.
            values: What came out: numbers, text, or lists of numbers, one a datum, which the
                report shows as mean ± 2 standard errors. Tensors and arrays become lists.
            seconds: What it took; by default the time since the log was opened, or since the
                last `add` or unanswered `done`.

        Raises:
            ValueError: For a name that is in both.
            TypeError: For a value that is not JSON.
        """
        both = sorted(set(key) & set(values))
        if both:
            raise ValueError(
                f"A name is either part of the key or a value; {', '.join(map(repr, both))} is "
                "both. Rename one of them."
            )
        now = time.perf_counter()
        record: Record = {
            "kind": "result",
            "key": {name: _plain(value, name) for name, value in key.items()},
            "values": {name: _plain(value, name) for name, value in values.items()},
            "seconds": round(now - self._last if seconds is None else seconds, 3),
            "finished": _now(),
            "digest": self.digest,
        }
        self._last = now
        self._write([record])
        self.results[_text(record["key"])] = record

    def values(self, **key: Any) -> dict[str, Any] | None:
        """Return the latest values under a key, None where there are none yet."""
        record = self.results.get(_text(key))
        return None if record is None else record["values"]

    def note(self, text: str) -> None:
        """Add a sentence or two that the report prints below the table, each only once."""
        if text not in self._notes:
            self._write([{"kind": "note", "text": text}])
            self._notes.append(text)

    def _write(self, records: Sequence[Record]) -> None:
        """Append; a log that only reads leaves its file as it was."""
        if not self._written:
            here = {"started": _now(), "versions": versions(), "machine": machine(1)}
            records = [{**self._header, **here}, *records]
            self._written = True
        append(self.path, records)

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held open: what was added is on disk already."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _text(key: Mapping[str, Any]) -> str:
    plain = {name: _plain(value, name) for name, value in key.items()}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON has it: arrays as lists, no NaN, no infinities."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    raise TypeError(
        f"A study records numbers, text, lists and dictionaries of them; '{name}' is a "
        f"{type(value).__name__}. Convert it first."
    )

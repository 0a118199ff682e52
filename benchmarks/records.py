"""Records: one JSON object a line, one run a line, in files that are only ever appended to.

A folder of records holds lines of these kinds:

* `task`: what was compared, in words, so that a report needs nothing but this folder;
* `command`: how it was started, and the modules that its digest covers;
* `run`: one method on one task with one seed, finished, failed or refused;
* `study`, `result` and `note`: the lines of a study, in a file of its own; see `benchmarks.study`.

A run is found again by its `key`, a digest of everything that decides its outcome (task, method,
regime, seed, settings, code). The last line of a file may be cut short, by a full disk or a lost
machine: it is left out when reading, and the next append starts on a line of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Record", "Records", "Study", "append", "read_records", "rounded", "run_key"]

Record = dict[str, Any]


@dataclass
class Study:
    """One study: what it asks, and what came out.

    Args:
        name: Name of its file.
        about: Its latest header.
        sessions: All headers, one whenever the log was opened.
        results: Latest result of every key.
        notes: Remarks for the reader.
    """

    name: str
    about: Record = field(default_factory=dict)
    sessions: list[Record] = field(default_factory=list)
    results: dict[str, Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Sort in one line of the file."""
        if record["kind"] == "study":
            self.about = record
            self.sessions.append(record)
        elif record["kind"] == "note":
            if record["text"] not in self.notes:
                self.notes.append(record["text"])
        else:
            # Columns may also stand side by side, without a key: then every line is a result.
            key = record.get("key", {"line": len(self.results)})
            self.results[json.dumps(key, sort_keys=True)] = record

    @property
    def seconds(self) -> float:
        """What all results took."""
        return float(sum(record.get("seconds") or 0.0 for record in self.results.values()))


@dataclass
class Records:
    """Everything that a folder of records holds.

    Args:
        runs: Runs in the order they were written.
        tasks: Task descriptions by name, the latest of each.
        commands: Commands in the order they were given.
        studies: Studies by the name of their file.
        unreadable: How many lines were cut short.
    """

    runs: list[Record] = field(default_factory=list)
    tasks: dict[str, Record] = field(default_factory=dict)
    commands: list[Record] = field(default_factory=list)
    studies: dict[str, Study] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, record: Record, file: str = "study") -> None:
        """Sort one record by its kind.

        Args:
            record: The record.
            file: Name of its file, by which the lines of a study are kept together.
        """
        kind = record.get("kind")
        if kind == "run":
            self.runs.append(record)
        elif kind == "task":
            self.tasks[record["name"]] = record
        elif kind == "command":
            self.commands.append(record)
        elif kind in ("study", "result", "note"):
            self.studies.setdefault(file, Study(file)).add(record)
        else:
            raise ValueError(
                f"A record's kind is 'run', 'task' or 'command', or of a study 'study', 'result' "
                f"or 'note'; got {kind!r}. Is this a file that `benchmarks run` wrote?"
            )

    def latest(self) -> list[Record]:
        """Return the last run of every (task, regime, method, seed): what a report shows."""
        last: dict[tuple[str, str, str, int], Record] = {}
        for run in self.runs:
            place = (run["task"], run["regime"], run["method"], run["seed"])
            last.pop(place, None)
            last[place] = run
        return list(last.values())

    def keys(self) -> set[str]:
        """Return the keys of all runs, failed ones included."""
        return {run["key"] for run in self.runs}


def run_key(**parts: Any) -> str:
    """Return a short digest of what decides a run's outcome.

    Example:
        >>> from benchmarks.records import run_key
        >>> run_key(task="vae", seed=0) == run_key(seed=0, task="vae")
        True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rounded(values: Any, digits: int = 4) -> list[float | None]:
    """Return numbers as a list with few decimals; NaN and infinities, which JSON lacks, as None.

    Args:
        values: Numbers, one a row. Shape `(B,)`.
        digits: Decimals kept: 4 is below any Monte Carlo error here, and keeps files small.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"Per-row scores have shape (B,), got {array.shape}.")
    return [round(float(value), digits) if np.isfinite(value) else None for value in array]


def append(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a file, each with one write, so that none is lost or interleaved.

    Args:
        path: A `.jsonl` file; it and its folder are made if they are not there.
        records: Objects of plain JSON values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        for record in records
    ]
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size:
            os.lseek(descriptor, size - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                lines.insert(0, b"\n")
        for line in lines:
            os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(file: Path, files: Sequence[Path]) -> str:
    """What a file is called among others: by its folder too where names would be the same."""
    same = sum(other.stem == file.stem for other in files) > 1
    return f"{file.parent.name}-{file.stem}" if same else file.stem


def read_records(folder: str | Path) -> Records:
    """Read every `*.jsonl` file of a folder, sorted by name.

    Args:
        folder: The `--out` of a run, a folder of such folders, or one file.

    Raises:
        FileNotFoundError: If there are no records there.
    """
    place = Path(folder)
    files = [place] if place.is_file() else sorted(place.glob("*.jsonl"))
    files = files or sorted(place.glob("*/*.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"A report needs records (*.jsonl), found none in '{folder}'. "
            "Make some with: python -m benchmarks run quick --out DIR"
        )
    records = Records()
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                records.unreadable += 1
                continue
            records.add(record, _name(file, files))
    return records

"""Progress: what is running, how far it is, how long it takes; plain lines where none look."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable
from typing import Any, TextIO

__all__ = ["Progress", "duration"]

# Where a phase begins within a run, as a share of it.
_PHASES = {
    "shared model": (0.0, 1.0),
    "fit": (0.0, 0.5),
    "refit": (0.5, 0.8),
    "relax": (0.5, 0.9),
    "evidence": (0.8, 0.95),
    "score": (0.95, 1.0),
}


def duration(seconds: float) -> str:
    """Return a duration as a person would say it.

    Example:
        >>> from benchmarks.progress import duration
        >>> duration(42.4), duration(200), duration(8000)
        ('42 s', '3 min 20 s', '2 h 13 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Progress:
    """A bar on a terminal, one line a finished run elsewhere.

    Args:
        total: Number of runs to do.
        stream: Where to write; standard error by default, so that results can be piped.
        shown: Whether to write at all.
    """

    def __init__(self, total: int, *, stream: TextIO | None = None, shown: bool = True) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.shown = shown
        self.done = 0
        self.start = time.monotonic()
        self.running: dict[Hashable, tuple[str, float]] = {}
        self.bar: Any = None
        if shown and self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total,
                file=self.stream,
                smoothing=0,
                dynamic_ncols=True,
                leave=False,
                bar_format="{percentage:3.0f}% {bar:14} {elapsed} gone, {remaining} left {desc}",
            )

    def started(self, name: Hashable) -> None:
        """A run has started."""
        self.running[name] = ("start", 0.0)
        self._refresh()

    def tick(self, name: Hashable, phase: str, fraction: float) -> None:
        """A run is so far through a phase."""
        low, high = _PHASES.get(phase, (0.0, 1.0))
        self.running[name] = (phase, low + (high - low) * fraction)
        self._refresh()

    def finished(
        self, name: Hashable, line: str, *, failed: bool = False, counts: bool = True
    ) -> None:
        """A run has ended.

        Args:
            name: Which one.
            line: What came of it.
            failed: Whether it failed, which is said on a terminal too.
            counts: Whether it is one of the total; shared models are not.
        """
        self.running.pop(name, None)
        self.done += counts
        if self.bar is not None:
            if failed:
                self.bar.write(line, file=self.stream)
            self._refresh()
        elif self.shown:
            left = (time.monotonic() - self.start) * (self.total / max(1, self.done) - 1)
            rest = f" ({duration(left)} left)" if 0 < self.done < self.total else ""
            width = len(str(self.total))
            print(f"[{self.done:{width}}/{self.total}] {line}{rest}", file=self.stream, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.set_description_str("", refresh=False)
            self.bar.close()

    def _refresh(self) -> None:
        if self.bar is None:
            return
        partial = sum(fraction for _, fraction in self.running.values())
        self.bar.n = min(self.total, self.done + 0.999 * partial)
        now = "; ".join(f"{name} ({phase})" for name, (phase, _) in self.running.items())
        self.bar.set_description_str(f"[{self.done}/{self.total}] {now}", refresh=False)
        self.bar.refresh()

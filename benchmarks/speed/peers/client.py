"""Peer: the runner's end, one process that answers requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["MODULES", "Peer", "PeerError"]

_START = Path(__file__).with_name("start.py")

MODULES = {
    "numpyro": "scripts.numpyro_peer",
    "jax": "scripts.jax_pc_peer",
    "torch": "torch_peer",
    "pcx": "scripts.pcx_peer",
    "fabricpc": "scripts.fabricpc_peer",
    "zoo": "zoo_peer",
}


class PeerError(RuntimeError):
    """A peer that answered with an error, or ended."""


class Peer:
    """A peer's process, started on entry and ended on exit.

    Args:
        name: A key of ``MODULES``.
        python: Its interpreter; by default this one, which suits ``"torch"`` only.
        threads: Threads that it may use.

    Raises:
        ValueError: For an unknown name.

    Example:
        >>> with Peer("torch", threads=1) as peer:
        ...     answer = peer.ask("eight_schools", num_steps=2, guide="normal")
        >>> answer["seconds"] > 0, answer["threads"]
        (True, 1)
    """

    def __init__(self, name: str, python: str | Path | None = None, *, threads: int = 2) -> None:
        if name not in MODULES:
            raise ValueError(f"Unknown peer {name!r}. Available: {', '.join(MODULES)}.")
        self.name = name
        self.python = str(python or sys.executable)
        self.threads = threads
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        threads = str(self.threads)
        variables = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.python != sys.executable:
            # A peer's libraries are those of its own interpreter.
            variables.pop("PYTHONPATH", None)
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [self.python, str(_START), MODULES[self.name]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=variables,
        )
        return self

    def ask(
        self, task: str, *, num_steps: int = 0, seed: int = 0, **options: Any
    ) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Args:
            task: Name of the task.
            num_steps: Timed steps.
            seed: Seed of the random draws.
            **options: Options of the program.

        Returns:
            The answer; see :mod:`~benchmarks.speed.peers.protocol`.

        Raises:
            PeerError: Where the peer answers with an error, or has ended.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise PeerError(f"The {self.name} peer is not running. Use it in a with statement.")
        request = {"task": task, "num_steps": num_steps, "seed": seed, "options": options}
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"The {self.name} peer ended at task {task!r}.{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"The {self.name} peer failed at task {task!r}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f" It said: {lines[-1]}" if lines else ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()

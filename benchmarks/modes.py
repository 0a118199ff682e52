"""Modes: how the updates of a run are computed, and which way pays for how many of them.

    eager     Pyro traces model and guide anew at every update
    graph     captured once, then run operation by operation; needs no compiler
    inductor  captured and compiled, several updates a call where the batch stays

All three draw the same random numbers and agree up to rounding, so a mode decides what a run costs
and not what it finds. Capturing a program takes as long as 75 to 250 of its eager updates, for
each shape of batch, and a captured update a half to a fifth of an eager one, so a graph pays after
100 to 600 updates; compiling takes 10 to 60 seconds and pays after some tens of thousands.
"""

from __future__ import annotations

from typing import Any

from guides.capture.steps import MODES, compiler_missing

__all__ = ["COMPILED_FROM", "GRAPH_FROM", "check_mode", "mode_for", "report_of"]

GRAPH_FROM = 1_000
COMPILED_FROM = 20_000


def check_mode(mode: str) -> None:
    """Raise where there is no such mode.

    Raises:
        ValueError: For an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.")


def mode_for(mode: str, num_steps: int) -> tuple[str, str | None]:
    """Return the mode of a run of updates, and why it was chosen where that was left open.

    Args:
        mode: `"auto"`, `"eager"`, `"graph"` or `"inductor"`.
        num_steps: Updates of the run.

    Example:
        >>> from benchmarks.modes import mode_for
        >>> mode_for("graph", 10), mode_for("auto", 1200)[0]
        (('graph', None), 'graph')
        >>> mode_for("auto", 480)
        ('eager', 'a capture pays from 1,000 updates on, and these are 480')
    """
    check_mode(mode)
    if mode != "auto":
        return mode, None
    if num_steps < GRAPH_FROM:
        return "eager", (
            f"a capture pays from {GRAPH_FROM:,} updates on, and these are {num_steps:,}"
        )
    if num_steps < COMPILED_FROM:
        return "graph", (
            f"compiling pays from {COMPILED_FROM:,} updates on, and these are {num_steps:,}"
        )
    missing = compiler_missing()
    return ("inductor", None) if missing is None else ("graph", missing)


def report_of(loop: Any, asked: str, chosen: str, why: str | None) -> dict[str, Any]:
    """Return what a record says of how a loop's updates were computed.

    Args:
        loop: The loop after its updates.
        asked: The mode that was asked for.
        chosen: What became of it before the first update; see `mode_for`.
        why: The reason of that choice.

    Returns:
        `asked`, `mode` (joined by ` and ` where kinds of calls differ), the `reason` where it is
        not the mode that was asked for, and the seconds that capturing and compiling took.
    """
    kinds = getattr(loop, "compiled", None)
    said: dict[str, Any] = {"asked": asked}
    if kinds is None:
        if chosen != "eager":
            why = "this loop has no captured form"
        return {**said, "mode": "eager", **({} if why is None else {"reason": why})}
    # Updates that were made before anything was captured are those of the eager loop.
    modes = list(dict.fromkeys(kind.mode for kind in kinds)) or ["eager"]
    reasons = [kind.reason for kind in kinds if kind.reason is not None]
    if not kinds and chosen != "eager":
        reasons = ["the first update runs as it is, and there was no other"]
    said["mode"] = " and ".join(modes)
    reason = reasons[0] if reasons else why
    if reason is not None:
        said["reason"] = reason
    for name in ("capture_seconds", "compile_seconds"):
        said[name] = round(sum(getattr(kind, name) for kind in kinds), 3)
    return said

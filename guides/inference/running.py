"""Run a loop: steps over batches, a progress bar, an early stop and a resumable state."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from guides.inference.checks import capture

__all__ = ["Run", "Runs", "plateau", "run"]

Stop = Callable[[list[float]], "str | bool"]


@dataclass
class Run:
    """What a run leaves behind.

    Args:
        losses: One loss a step, all steps so far.
        stop_reason: ``"num_steps"``, ``"interrupted"``, or what ``stop`` returned.
        state: Everything needed to go on: pass it as ``state=`` to another run.
    """

    losses: list[float]
    stop_reason: str
    state: dict[str, Any] = field(repr=False)


def plateau(window: int = 100, tolerance: float = 1e-3) -> Stop:
    """Stop when the mean loss of a window no longer improves on the window before it.

    Args:
        window: Steps in a window.
        tolerance: Smallest relative improvement that counts.
    """

    def stop(losses: list[float]) -> str | bool:
        if len(losses) < 2 * window or len(losses) % window:
            return False
        before = sum(losses[-2 * window : -window]) / window
        after = sum(losses[-window:]) / window
        small = before - after <= tolerance * max(abs(before), 1.0)
        return f"plateau: {before:.4g} to {after:.4g} in {window} steps" if small else False

    return stop


def run(
    loop: Any,
    num_steps: int,
    batches: Any,
    *,
    stop: Stop | None = None,
    progress: bool = True,
    state: Mapping[str, Any] | None = None,
) -> Run:
    """Make ``num_steps`` steps of a loop.

    Args:
        loop: Anything with ``step(*args, **kwargs) -> float`` and an ``optim``; with
            ``steps(most, *args, **kwargs) -> list[float]`` it makes several at once on one batch.
        num_steps: Steps in all, those of ``state`` included.
        batches: One call ``(args, kwargs)``; an iterable of calls, of tensors or of tuples of
            tensors (positional arguments); or a ``DataLoader``. Iterables are cycled; to resume
            exactly they must give the same batches again.
        stop: Called with all losses after each step; a true value ends the run and is the
            reason.
        progress: Show a progress bar (only where standard error is a terminal).
        state: State of an earlier run to go on from.

    Returns:
        Losses, the reason for stopping, and a resumable state. Ctrl-C ends a run early and
        loses nothing.

    Raises:
        ValueError: For negative ``num_steps`` or no batches.
        FloatingPointError: Where a loss is not finite.
    """
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    losses: list[float] = []
    from tqdm.auto import tqdm

    feed = _feed(batches)
    if state is not None:
        losses = list(state["losses"])
        first = next(feed)
        _restore(loop, state, first)
        feed = itertools.chain([first], feed)
        for _ in range(len(losses)):
            next(feed)
        torch.set_rng_state(state["rng"])
    reason = "num_steps"
    # A compiled loop makes several steps at once, where they are all on one batch.
    several = getattr(loop, "steps", None) if _is_call(batches) else None
    hidden = not progress or not sys.stderr.isatty()
    with tqdm(total=num_steps, initial=len(losses), disable=hidden, leave=False) as bar:
        try:
            while len(losses) < num_steps and reason == "num_steps":
                args, kwargs = next(feed)
                if several is None:
                    made = [loop.step(*args, **kwargs)]
                else:
                    made = several(num_steps - len(losses), *args, **kwargs)
                for loss in made:
                    if not loss == loss or abs(loss) == float("inf"):
                        error = FloatingPointError(
                            f"The loss became {loss} at step {len(losses)}. Lower the learning "
                            "rate, clip gradients (pyro.optim.ClippedAdam), or check the data. "
                            "The run so far is this error's attribute `run`."
                        )
                        left = Run(losses, "not finite", _state(loop, losses))
                        error.run = left  # type: ignore[attr-defined]
                        raise error
                    losses.append(loss)
                    if stop is not None and reason == "num_steps" and (answer := stop(losses)):
                        # Losses of steps that were made in the same call are kept.
                        reason = answer if isinstance(answer, str) else "stop"
                bar.update(len(made))
                if len(losses) // 10 != (len(losses) - len(made)) // 10:
                    bar.set_postfix(loss=f"{losses[-1]:.5g}")
        except KeyboardInterrupt:
            reason = "interrupted"
    return Run(losses, reason, _state(loop, losses))


class Runs:
    """A loop with steps, of which it can make many."""

    def run(
        self,
        num_steps: int,
        batches: Any,
        *,
        stop: Stop | None = None,
        progress: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make many steps; see :func:`guides.inference.running.run`."""
        return run(self, num_steps, batches, stop=stop, progress=progress, state=state)


def _state(loop: Any, losses: list[float]) -> dict[str, Any]:
    store = pyro.get_param_store()
    getter = getattr(loop, "get_state", None)
    return {
        "losses": list(losses),
        "params": {name: store[name].unconstrained().detach().clone() for name in store},
        "optim": copy.deepcopy(loop.optim.get_state()),
        "rng": torch.get_rng_state(),
        "loop": None if getter is None else getter(),
    }


def _restore(loop: Any, state: Mapping[str, Any], call: tuple[Any, Any]) -> None:
    """Bring model, guide, optimizer and loop to a saved state."""
    for program in (loop.model, loop.guide):
        if program is not None:
            # Registers the module's own tensors, which are then overwritten in place: a store
            # that was loaded before would hold tensors that no module uses.
            capture(program, *call)
    store = pyro.get_param_store()
    for name, value in state["params"].items():
        if name not in store:
            raise ValueError(
                f"The state has a parameter {name!r} that this model and guide do not have. "
                f"Parameters here: {', '.join(store) or 'none'}. Resume with the model and guide "
                "that made the state, built under the same names (name=)."
            )
        with torch.no_grad():
            store[name].unconstrained().copy_(value)
    # An optimizer takes a saved state only for parameters that it has not seen.
    loop.optim.optim_objs.clear()
    loop.optim.set_state(copy.deepcopy(state["optim"]))
    if state["loop"] is not None:
        loop.set_state(state["loop"])


def _feed(batches: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if _is_call(batches):
        return itertools.repeat((tuple(batches[0]), dict(batches[1])))
    if isinstance(batches, tuple) and any(isinstance(item, Tensor) for item in batches):
        raise TypeError(
            "batches must be one call (args, kwargs), an iterable of calls, or a DataLoader; got "
            "a tuple of tensors. For full-batch steps pass ((x, y, ...), {})."
        )
    if isinstance(batches, Tensor):
        raise TypeError(
            "batches must be one call (args, kwargs), an iterable of calls, or a DataLoader; got "
            "a tensor. For full-batch steps pass ((x,), {})."
        )
    if not isinstance(batches, (Iterable, DataLoader)):
        raise TypeError(
            "batches must be one call (args, kwargs), an iterable of calls, or a DataLoader; got "
            f"{type(batches).__name__}."
        )
    return _cycle(batches)


def _cycle(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    kept: list[Any] | None = None if hasattr(batches, "__len__") else []
    first = True
    while True:
        source = batches if kept is None or first else kept
        count = 0
        for batch in source:
            count += 1
            if kept is not None and first:
                kept.append(batch)
            if _is_call(batch):
                yield tuple(batch[0]), dict(batch[1])
            elif isinstance(batch, (tuple, list)):
                yield tuple(batch), {}
            else:
                yield (batch,), {}
        first = False
        if not count:
            raise ValueError("batches is empty: there is nothing to step on.")


def _is_call(batch: Any) -> bool:
    return (
        isinstance(batch, tuple)
        and len(batch) == 2
        and isinstance(batch[0], (tuple, list))
        and isinstance(batch[1], dict)
    )

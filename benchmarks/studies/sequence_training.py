"""How the studies of sequences train a model with a guide, and go on where they were stopped.

Batches are of similar lengths, so that little is computed on padding, and of few shapes, so that
few graphs are captured. Data count more than the latents at first: for a weight w = 1 / beta that
falls to one,

    w E_q[log p(x | z)] - KL(q, p(z)) = w (E_q[log p(x | z)] - beta KL(q, p(z)))

which is the annealed bound up to a factor that Adam does not see, and leaves guides as they are.
The state is written to a checkpoint every few minutes; a run that goes on from one makes the
updates that the uninterrupted run makes, up to rounding where a graph and eager steps take turns.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.optim
import torch
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from guides.diagnostics import elbo
from guides.inference import CompiledSVI
from guides.inference.checks import capture
from zoo.data.sequences import Sequences

__all__ = ["Settings", "Training", "Weighted", "bound", "buckets", "epoch", "parser", "per_step"]


@dataclass(frozen=True)
class Settings:
    """How a model and its guide are trained.

    Args:
        epochs: Passes over the training sequences.
        rate: Learning rate of Adam at the start; it falls exponentially.
        last: Part of the rate that is left at the end.
        beta: Weight of the KL divergence at the start, which grows to one along a line.
        warm: Part of all updates after which it is one.
        batch: Sequences of a batch, about.
        shapes: Lengths that batches are padded to, at most.
        weight_decay: Of Adam, on the gradient of a batch's sum.
        clip: Largest absolute value of an element of that gradient.
        every: Epochs between looks at the validation split.
        draws: Draws from q for the test bound.
        objective: Constructor of the objective.
        mode: How a step runs, see :class:`guides.inference.CompiledSVI`.
    """

    epochs: int
    rate: float = 1e-3
    last: float = 0.1
    beta: float = 0.1
    warm: float = 0.3
    batch: int = 20
    shapes: int = 3
    weight_decay: float = 0.0
    clip: float = 1e4
    every: int = 10
    draws: int = 10
    objective: Callable[[], Any] = Trace_ELBO
    mode: str = "graph"


class _Weight(Messenger):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight


class Weighted:
    """A program whose observations count ``weight`` times.

    Args:
        program: A program of sequences and their lengths.
    """

    def __init__(self, program: Callable[..., Any]) -> None:
        self.program = program

    def __call__(self, x: Tensor, lengths: Tensor, weight: Tensor | None = None) -> Any:
        """The program, with a weight of shape ``()``, or as it is."""
        with contextlib.nullcontext() if weight is None else _Weight(weight):
            return self.program(x, lengths)


def buckets(lengths: Tensor, batch: int, shapes: int) -> list[Tensor]:
    """Rows by length, in at most ``shapes`` parts, such that padding is least.

    Args:
        lengths: Steps of every row ``(N,)``.
        batch: Rows of a batch, about: parts end at multiples of it.
        shapes: Parts at most.

    Returns:
        Numbers of rows, shorter rows first.
    """
    order = torch.argsort(lengths, stable=True)
    ordered = lengths[order].tolist()
    places = range(batch, len(ordered) - batch // 2, batch)
    best: tuple[float, list[int]] = (math.inf, [])
    for cuts in itertools.combinations(places, min(shapes - 1, len(places))):
        ends = [*cuts, len(ordered)]
        padded = sum(
            (end - start) * ordered[end - 1] for start, end in zip([0, *cuts], ends, strict=True)
        )
        best = min(best, (padded, ends))
    return [order[start:end] for start, end in zip([0, *best[1][:-1]], best[1], strict=True)]


def epoch(parts: list[Tensor], batch: int, seed: int) -> list[tuple[int, Tensor]]:
    """Batches of one epoch in random order: the part, and its rows.

    Batches of a part are equally large; the few rows that fill none differ from epoch to epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[int, Tensor]] = []
    for number, rows in enumerate(parts):
        count = max(1, round(len(rows) / batch))
        size = len(rows) // count
        order = rows[torch.randperm(len(rows), generator=generator)]
        found += [(number, order[i * size : (i + 1) * size]) for i in range(count)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    x: Tensor,
    lengths: Tensor,
    *,
    num_samples: int = 1,
    rows: int = 40,
    seed: int = 0,
) -> Tensor:
    """The bound of every sequence ``(N,)`` in nats; no random number of the run is used.

    Args:
        model: The program.
        guide: Its guide.
        x: Sequences ``(N, T, D)``.
        lengths: Steps of each ``(N,)``.
        num_samples: Draws from q.
        rows: Sequences at a time, of similar lengths.
        seed: Seed of the draws.
    """
    result = torch.empty(len(x))
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        for part in torch.argsort(lengths, stable=True).split(rows):
            own = lengths[part]
            data = x[part][:, : int(own.max())]
            found = elbo(model, guide, data, own, num_samples=num_samples).rows
            result[part] = torch.as_tensor(found).to(result)
    return result


def parser(description: str | None, records: Path, methods: Sequence[str]) -> ArgumentParser:
    """The command line that the studies of sequences have in common.

    Args:
        description: What the study is.
        records: Where its log is by default.
        methods: Methods to choose from.
    """
    result = ArgumentParser(description=description)
    result.add_argument("--records", type=Path, default=records)
    result.add_argument("--checkpoints", type=Path)
    result.add_argument("--seeds", type=int, default=3)
    result.add_argument("--epochs", type=int)
    result.add_argument("--methods", nargs="*", default=list(methods), choices=list(methods))
    return result


def per_step(rows: Tensor, lengths: Tensor) -> float:
    """Nats a time step: minus the sum of all bounds over the sum of all steps."""
    return float(-rows.double().sum() / lengths.sum())


@dataclass
class Training:
    """One run: a model and its guide, trained, with the state to go on from.

    Args:
        model: The model.
        build: From the weighted program and an example call to the guide.
        data: Training and validation sequences.
        settings: How they are trained.
        seed: Seed of the batches and of the draws.
        checkpoint: Where the state is written; None for nowhere.
        seconds: Between two checkpoints.
    """

    model: Any
    build: Callable[..., Any]
    data: Sequences
    settings: Settings
    seed: int
    checkpoint: Path | None = None
    seconds: float = 180.0
    done: int = 0
    curve: list[list[float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: {"wall": 0.0, "cpu": 0.0})

    def __post_init__(self) -> None:
        self.program = Weighted(self.model)
        rows = self.data.train_lengths.argsort()[-self.settings.batch :]
        self.guide = self.build(self.program, self.data.train[rows], self.data.train_lengths[rows])
        pyro.set_rng_seed(self.seed)
        settings = self.settings
        self.parts = buckets(self.data.train_lengths, settings.batch, settings.shapes)
        self.per_epoch = len(epoch(self.parts, settings.batch, 0))
        total = settings.epochs * self.per_epoch
        self.warm = max(1.0, settings.warm * total)
        optim = pyro.optim.ClippedAdam(
            {
                "lr": settings.rate,
                "betas": (0.95, 0.999),
                "clip_norm": settings.clip,
                "weight_decay": settings.weight_decay,
                "lrd": settings.last ** (1 / total),
            }
        )
        self.loop = CompiledSVI(
            self.program, self.guide, optim, settings.objective(), mode=settings.mode
        )

    def run(self, epochs: int | None = None) -> None:
        """Train to the end, or as many epochs as are given, from where the checkpoint is."""
        self._restore()
        last = self.settings.epochs if epochs is None else min(self.settings.epochs, epochs)
        clocks = time.perf_counter(), time.process_time()
        saved = clocks[0]
        while self.done < last:
            losses = [
                self.loop.step(*self._call(number, rows, self.done * self.per_epoch + i))
                for i, (number, rows) in enumerate(
                    epoch(self.parts, self.settings.batch, 100_003 * self.seed + self.done)
                )
            ]
            if not all(map(math.isfinite, losses)):
                raise FloatingPointError(f"A loss of epoch {self.done + 1} is not finite.")
            self.done += 1
            if self.done % self.settings.every == 0 or self.done == self.settings.epochs:
                self._look()
            now = time.perf_counter(), time.process_time()
            self.spent["wall"] += now[0] - clocks[0]
            self.spent["cpu"] += now[1] - clocks[1]
            clocks = now
            if now[0] - saved > self.seconds or self.done == last:
                self._save()
                saved = now[0]

    def restore_best(self) -> None:
        """Bring model and guide to where the validation bound was best."""
        for name, module in self._modules().items():
            module.load_state_dict(self.best[name])

    def _call(self, number: int, rows: Tensor, update: int) -> tuple[Tensor, Tensor, Tensor]:
        beta = self.settings.beta
        beta = min(1.0, beta + (1 - beta) * update / self.warm)
        lengths = self.data.train_lengths[rows]
        steps = int(self.data.train_lengths[self.parts[number]].max())
        return self.data.train[rows][:, :steps], lengths, torch.tensor(1 / beta)

    def _look(self) -> None:
        assert self.data.validation is not None
        assert self.data.validation_lengths is not None
        lengths = self.data.validation_lengths
        found = per_step(bound(self.program, self.guide, self.data.validation, lengths), lengths)
        self.curve.append([self.done, round(found, 5)])
        minutes = self.spent["cpu"] / 60
        print(f"  epoch {self.done}: {found:.4f} ({minutes:.1f} CPU minutes)", flush=True)
        if not self.best or found < self.best["value"]:
            states = {
                name: {key: value.detach().clone() for key, value in module.state_dict().items()}
                for name, module in self._modules().items()
            }
            self.best = {"value": found, "epoch": self.done, **states}

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "guide": self.guide}

    def _names(self) -> dict[str, str]:
        """The prefix of each module in Pyro's store, whatever its number in this process."""
        return {name: module._pyro_name for name, module in self._modules().items()}  # type: ignore[misc]

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        names = {prefix: name for name, prefix in self._names().items()}
        optim = {_renamed(k, names): v for k, v in self.loop.optim.get_state().items()}
        state = {
            "done": self.done,
            "curve": self.curve,
            "best": self.best,
            "spent": self.spent,
            "settings": repr(self.settings),
            "rng": torch.get_rng_state(),
            "optim": optim,
            **{name: module.state_dict() for name, module in self._modules().items()},
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        beside = self.checkpoint.with_suffix(".part")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)  # whole, or not at all

    def _restore(self) -> None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if state["settings"] != repr(self.settings):
            raise ValueError(
                f"The checkpoint {self.checkpoint} was made with other settings. Remove it, or "
                "train with those it was made with."
            )
        call = self._call(0, self.parts[0][:2], 0)
        for program in (self.loop.model, self.loop.guide):
            capture(program, call, {})
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        optim = {_renamed(k, self._names()): v for k, v in state["optim"].items()}
        self.loop.optim.optim_objs.clear()
        self.loop.optim.set_state(optim)
        self.done, self.curve = state["done"], state["curve"]
        self.best, self.spent = state["best"], state["spent"]
        torch.set_rng_state(state["rng"])


def _renamed(full: str, names: Mapping[str, str]) -> str:
    """A parameter's name in the store, with the prefix of its module replaced."""
    for before, after in names.items():
        rest = full.removeprefix(before)
        if rest != full and rest.startswith((".", "$$$")):
            return after + rest
    raise ValueError(
        f"Parameter {full!r} belongs to none of {', '.join(names)}: model and guide must be "
        "modules with names of their own."
    )

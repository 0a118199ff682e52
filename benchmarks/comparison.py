"""Comparison: `compare`, the benchmark of a notebook: any Pyro program, any guides, right here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.differences import Estimate, paired
from benchmarks.records import Records, append
from benchmarks.standings import Standings, standings
from benchmarks.table import html_table, text_table
from benchmarks.task import Task, listed
from guides.arguments import did_you_mean

__all__ = ["Comparison", "compare"]


@dataclass
class Comparison:
    """What `compare` found; prints as its leaderboards.

    Args:
        records: All runs, as `benchmarks run` would have recorded them.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from benchmarks import Budget, compare
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> result = compare(model, (torch.randn(20),), guides=["normal", AutoNormal],
        ...                  budget=Budget().scaled("smoke"), progress=False)
        >>> [run["status"] for run in result.runs]
        ['ok', 'ok']
    """

    records: Records

    @property
    def runs(self) -> list[dict[str, Any]]:
        """The runs, failed ones included."""
        return self.records.latest()

    @property
    def standings(self) -> list[Standings]:
        """Leaderboards, one a regime, best method first."""
        return standings(self.runs, self.records.tasks)

    def difference(
        self, method: str, other: str, score: str = "elbo", regime: str | None = None
    ) -> Estimate:
        """Return the paired difference of two methods, `method` minus `other`.

        Args:
            method: A method's name.
            other: Another's.
            score: `elbo` or `log_evidence`.
            regime: `joint` or `frozen`, where there are both.

        Raises:
            ValueError: If the two cannot be paired.
        """
        sides = [
            [
                run
                for run in self.runs
                if run["method"] == name
                and run["status"] == "ok"
                and regime in (None, run["regime"])
            ]
            for name in (method, other)
        ]
        found = paired(sides[0], sides[1], score)
        if found is None:
            names = dict.fromkeys(run["method"] for run in self.runs if run["status"] == "ok")
            raise ValueError(
                f"'{method}' and '{other}' have no finished run with the same seed and model. "
                f"Finished: {', '.join(names) or 'none'}."
            )
        return found

    def report(self, path: str | Path = "report.html") -> Path:
        """Write the HTML report and return where it is."""
        from benchmarks.report import render

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(self.records), encoding="utf-8")
        return target

    def save(self, folder: str | Path) -> Path:
        """Append all records to a folder, from which `benchmarks report` works."""
        path = Path(folder) / "runs.jsonl"
        tasks = list(self.records.tasks.values())
        append(path, [*self.records.commands, *tasks, *self.records.runs])
        return path

    def __str__(self) -> str:
        return text_table(self.records)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.records)


def compare(
    model: Callable[..., Any] | None = None,
    args: Sequence[Any] | torch.Tensor = (),
    *,
    make_model: Callable[[], Callable[..., Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    guides: Iterable[Any] = ("normal", "multivariate_normal"),
    loops: Iterable[Any] = ("svi",),
    held_out: Sequence[Any] | torch.Tensor | None = None,
    held_out_kwargs: Mapping[str, Any] | None = None,
    regimes: Iterable[str] = (),
    seeds: int = 1,
    budget: Budget | None = None,
    mode: str = "auto",
    name: str = "model",
    progress: bool = True,
    **fields: Any,
) -> Comparison:
    """Fit one Pyro program with several guides and loops, and score them alike.

    Everything runs in this process, each run in a parameter store of its own: what the caller's
    store holds is neither read nor changed.

    Args:
        model: Any Pyro program; a module is copied for each run.
        args: Its positional arguments; one tensor stands for `(tensor,)`.
        make_model: Instead of `model`: builds the program afresh for each run.
        kwargs: Its keyword arguments.
        guides: Names of `guides.GUIDES`, mappings of cells to names (composite guides, as
            `guides.make` takes them), Pyro guide classes, functions of one argument `model`
            that build a guide, guides, or `benchmarks.Method`; one of them stands for itself.
        loops: `"svi"`, `"predictive_coding"`, or functions `(model, guide, optim)`.
        held_out: Positional arguments on which it is scored; the training data by default.
        held_out_kwargs: Keyword arguments with them.
        regimes: `"joint"`, `"frozen"` or both; see `benchmarks.Task`.
        seeds: Number of seeds.
        budget: Numbers of updates and draws.
        mode: How updates are computed: `"eager"`, `"graph"` (captured), `"inductor"` (compiled),
            or `"auto"`, the way that pays for the number of updates; see `benchmarks.modes`. The
            results are the same up to rounding; records say what ran, and why.
        name: What the task is called.
        progress: Whether to show progress.
        **fields: Other fields of `benchmarks.Task`, such as `baseline` or `data_plate`.

    Returns:
        Records, leaderboards, paired differences, and a report on request. A method that fails is
        a recorded failure.

    Raises:
        ValueError: If the request itself makes no sense.
        TypeError: For an argument that neither this function nor a task has.
    """
    from benchmarks.runner import compare_here

    own = list(inspect.signature(compare).parameters)[:-1]
    known = [*own, *(item.name for item in dataclass_fields(Task) if item.name not in own)]
    unknown = [field for field in fields if field not in known]
    if unknown:
        raise TypeError(
            f"compare has no argument {unknown[0]!r}. {did_you_mean(unknown[0], known)}It takes "
            f"{', '.join(known)}. Options of guides are guide_options={{name: {{...}}}}."
        )
    task = Task(
        name=name,
        model=model,
        make_model=make_model,
        args=args,  # type: ignore[arg-type]
        kwargs={} if kwargs is None else kwargs,
        held_out=held_out,  # type: ignore[arg-type]
        held_out_kwargs={} if held_out_kwargs is None else held_out_kwargs,
        guides=listed(guides),
        loops=listed(loops),
        regimes=listed(regimes),
        budget=Budget() if budget is None else budget,
        **fields,
    )
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds must be a number of seeds, at least 1; got {seeds!r}.")
    return Comparison(compare_here(task, seeds=seeds, progress=progress, mode=mode))

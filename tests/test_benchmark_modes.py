"""Modes of the benchmark: the same results, and a record that says what ran and why."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import zoo
from benchmarks import Budget, Task, compare
from benchmarks.__main__ import main
from benchmarks.execute import execute
from benchmarks.fit import Meter, fit
from benchmarks.methods import as_method, as_methods
from benchmarks.modes import COMPILED_FROM, GRAPH_FROM, mode_for
from benchmarks.plan import plans_of
from benchmarks.records import read_records
from benchmarks.report import render
from guides.capture import steps as capture_steps
from guides.inference import SVI

SMOKE = Budget(num_steps=12, local_lr=0.02).scaled("smoke")


def rows_model(x: torch.Tensor, size: int | None = None, index: Any = None) -> None:
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def branching(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    scale = 1.0 if z > 0 else 2.0
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Every number of nested scores by its path."""
    if isinstance(value, dict):
        return {
            k: v for key, part in value.items() for k, v in numbers(part, f"{name}/{key}").items()
        }
    return {name: float(value)} if isinstance(value, (int, float)) else {}


def tiny_vae(**budget: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.bernoulli(torch.full((14, 6), 0.4), generator=generator)
    return Task(
        name="tiny",
        make_model=lambda: zoo.make("vae", x_dim=6, z_dim=2, hidden=(4,)),
        args=(x[:9],),
        held_out=(x[9:],),
        budget=Budget(num_steps=12, **budget).scaled("smoke"),
    )


def test_auto_is_the_mode_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode_for("auto", GRAPH_FROM - 1)[0] == "eager"
    assert mode_for("auto", GRAPH_FROM)[0] == "graph"
    monkeypatch.setattr("benchmarks.modes.compiler_missing", lambda: None)
    assert mode_for("auto", COMPILED_FROM) == ("inductor", None)
    monkeypatch.setattr("benchmarks.modes.compiler_missing", lambda: "there is no C++ compiler")
    assert mode_for("auto", COMPILED_FROM) == ("graph", "there is no C++ compiler")
    for mode in ("eager", "graph", "inductor"):
        assert mode_for(mode, 1) == (mode, None)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("normal", None),
        ("amortized_multivariate_normal", 4),
        ("iterative_normal", 4),
        ("predictive_coding", None),
    ],
)
def test_a_captured_run_scores_what_an_eager_one_scores(name: str, batch_size: Any) -> None:
    """Whole runs: minibatches and their ragged rest, refits, evidence guides, curves."""
    task = tiny_vae(batch_size=batch_size)
    methods = as_methods(["normal"], ["svi", "predictive_coding"], model=None)
    method = next((m for m in methods if m.name == name), None) or as_method(name)
    runs = {
        mode: execute(task, method, "joint", 0, mode=mode, images=False)
        for mode in ("eager", "graph")
    }
    for mode, run in runs.items():
        assert {phase["mode"] for phase in run["computed"].values()} == {mode}
        assert all("reason" not in phase for phase in run["computed"].values())
    eager, graph = runs["eager"], runs["graph"]
    assert graph["gradient_evaluations"] == eager["gradient_evaluations"]
    assert [p["step"] for p in graph["curve"]] == [p["step"] for p in eager["curve"]]
    for ours, theirs in zip(graph["curve"], eager["curve"], strict=True):
        assert ours["elbo"] == pytest.approx(theirs["elbo"], rel=1e-4)
    assert numbers(graph["scores"]) == pytest.approx(numbers(eager["scores"]), rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(capture_steps.compiler_missing() is not None, reason="no C++ compiler")
def test_a_compiled_run_scores_what_an_eager_one_scores() -> None:
    task = Task(name="rows", model=rows_model, args=(torch.linspace(-2.0, 2.0, 8),), budget=SMOKE)
    eager, compiled = (
        execute(task, as_method("normal"), "frozen", 0, mode=mode, images=False)
        for mode in ("eager", "inductor")
    )
    assert compiled["computed"]["fit"]["mode"] == "inductor"
    assert [p["step"] for p in compiled["curve"]] == [p["step"] for p in eager["curve"]]
    assert compiled["gradient_evaluations"] == eager["gradient_evaluations"]
    for ours, theirs in zip(compiled["curve"], eager["curve"], strict=True):
        assert ours["elbo"] == pytest.approx(theirs["elbo"], rel=1e-4)
    scores = numbers(compiled["scores"])
    assert scores == pytest.approx(numbers(eager["scores"]), rel=1e-4, abs=1e-4)


def test_a_fall_back_is_recorded_with_its_reason_and_shown() -> None:
    result = compare(
        branching,
        torch.linspace(-1.0, 1.0, 6),
        guides=["multivariate_normal"],
        mode="graph",
        budget=SMOKE,
        progress=False,
    )
    (run,) = result.runs
    fit_phase = run["computed"]["fit"]
    assert (fit_phase["asked"], fit_phase["mode"]) == ("graph", "eager")
    assert "reads the value of a tensor" in fit_phase["reason"]
    page = render(result.records)
    assert "reads the value of a tensor" in page
    assert "asked for graph, ran eager" in page


def test_a_loop_of_ones_own_says_that_it_was_not_captured() -> None:
    def own(model: Any, guide: Any, optim: Any) -> SVI:
        return SVI(model, guide, optim, pyro.infer.Trace_ELBO())

    x = torch.linspace(-1.0, 1.0, 6)
    options = {"guides": ["normal"], "loops": [own], "budget": SMOKE, "progress": False}
    (run,) = compare(rows_model, x, mode="graph", **options).runs
    assert run["computed"]["fit"] == {
        "asked": "graph",
        "mode": "eager",
        "reason": "this loop has no captured form",
    }
    (run,) = compare(rows_model, x, **options).runs
    assert "a capture pays from 1,000 updates on" in run["computed"]["fit"]["reason"]


def test_the_mode_is_part_of_the_key_of_a_run() -> None:
    task = tiny_vae()
    keys = {mode: plans_of(task, None, seeds=1, mode=mode)[0].key for mode in ("auto", "eager")}
    assert keys["auto"] != keys["eager"]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode must be one of auto, inductor, graph, eager; got"):
        compare(rows_model, torch.zeros(3), mode="fast", progress=False)


class Several:
    """Makes up to four updates a call, whose losses count them."""

    def __init__(self, bad: int | None = None) -> None:
        self.made, self.calls, self.bad = 0, [], bad

    def steps(self, most: int) -> list[float]:
        count = 4 if most >= 4 else 1
        self.calls.append(count)
        self.made += count
        losses = [float(i) for i in range(self.made - count + 1, self.made + 1)]
        return [float("nan") if loss == self.bad else loss for loss in losses]


def test_several_updates_a_call_stop_at_every_look() -> None:
    loop, meter, seen = Several(), Meter(), []
    fit(
        loop,
        iter([((), {})] * 20),
        14,
        meter=meter,
        rows=lambda call: 3,
        num_particles=2,
        several=True,
        checkpoints={6, 14, 99},
        monitor=lambda: seen.append(loop.made),
    )
    assert seen == [6, 14]
    assert loop.calls == [4, 1, 1, 4, 4]
    assert meter.gradient_evaluations == 14 * 3 * 2


def test_a_loss_that_is_no_number_is_found_within_a_call() -> None:
    options = {"meter": Meter(), "rows": lambda call: 1, "num_particles": 1, "several": True}
    with pytest.raises(FloatingPointError, match="after 3 updates"):
        fit(Several(bad=3), iter([((), {})] * 20), 8, **options)


def test_the_command_line_records_the_mode(tmp_path: Any) -> None:
    path = tmp_path / "my_task.py"
    path.write_text(
        "import torch\nfrom benchmarks import Budget\n"
        "from tests.test_benchmark_modes import rows_model as model\n"
        "args = (torch.linspace(-2.0, 2.0, 8),)\nguides = ['normal']\n"
        "budget = Budget(num_steps=12).scaled('smoke')\n"
    )
    out = tmp_path / "records"
    command = ["run", str(path), "--seeds", "1", "--jobs", "1", "--out", str(out), "--no-report"]
    assert main([*command, "--mode", "graph"]) == 0
    (run,) = read_records(out).runs
    assert run["computed"]["fit"]["mode"] == run["computed"]["fit"]["asked"] == "graph"
    assert run["computed"]["fit"]["capture_seconds"] > 0

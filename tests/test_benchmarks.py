"""Benchmarks: any program, any guide, one record a run; nothing lost, nothing run twice."""

import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from torch import nn

import guides
import zoo
from benchmarks import Budget, Method, Task, compare, load_tasks, read_records
from benchmarks.__main__ import main
from benchmarks.autoguides import num_latents
from benchmarks.budget import Budget as BudgetClass
from benchmarks.differences import estimate, paired
from benchmarks.digest import closure, code_digest, source_digest, stripped
from benchmarks.execute import execute, train_shared_model
from benchmarks.methods import as_method, as_methods
from benchmarks.plan import digest_of, plan
from benchmarks.progress import Progress
from benchmarks.records import Records, append, rounded
from benchmarks.report import render
from benchmarks.runner import run_line
from benchmarks.shared_model import fingerprint
from benchmarks.study import StudyLog
from benchmarks.suites.autoguides import AUTOGUIDES
from benchmarks.task import GRID
from guides.families import FAMILIES
from guides.layout import layout

ROOT = Path(__file__).resolve().parents[1]
SMOKE = Budget(num_steps=10).scaled("smoke")

USER_FILE = '''"""A latent for every row, and guides of the reader's own."""
import os
import time

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from benchmarks import Budget, Method


def model(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Slow(AutoNormal):
    def forward(self, *args, **kwargs):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().forward(*args, **kwargs)


class Broken:
    def __init__(self, model):
        raise RuntimeError("broken on purpose")


class Deadly:
    def __init__(self, model):
        os.kill(os.getpid(), 9)


x = torch.linspace(-2.0, 2.0, 12)
args = (x,)
held_out = (x[:5] + 0.1,)
budget = Budget(num_steps=10).scaled("smoke")
'''


def normal_model(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def global_model(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


class OwnGuide(nn.Module):
    """The exact posterior of `normal_model`, with a wrong scale to learn."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, size=None, index=None):
        pyro.module("own", self)
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("z", dist.Normal(x / 2, self.log_scale.exp()))


def write_file(folder: Path, guides: str) -> Path:
    path = folder / "my_task.py"
    path.write_text(f"{USER_FILE}guides = {guides}\n")
    return path


def command(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# ---------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def comparison():
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        x = torch.linspace(-2.0, 2.0, 20)
        return compare(
            normal_model,
            (x,),
            guides=[
                "normal",
                "amortized_normal",
                AutoNormal,
                OwnGuide(),
                Method("exact", build=lambda model: exact_guide),
            ],
            loops=["svi", "predictive_coding"],
            held_out=(x[:8] + 0.3,),
            seeds=2,
            budget=replace(SMOKE, num_samples=50, num_evidence_samples=500),
            progress=False,
        )


def exact_guide(x, size=None, index=None):
    with pyro.plate("data", size or len(x), subsample=index):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_compare_takes_names_classes_instances_and_loops(comparison):
    runs = comparison.runs
    assert {run["method"] for run in runs} == {
        "normal",
        "amortized_normal",
        "AutoNormal",
        "OwnGuide",
        "exact",
        "predictive_coding",
    }
    failed = {run["method"]: run["error"] for run in runs if run["status"] != "ok"}
    assert not failed
    assert len(runs) == 12
    assert "exact" in str(comparison)
    assert comparison._repr_html_().count("<tr>") == 7


def test_a_model_without_parameters_is_one_shared_model(comparison):
    """There is nothing to train, so guides meet the same posterior and may be compared by ELBO."""
    assert {run["regime"] for run in comparison.runs} == {"frozen"}
    assert {run["model_digest"] for run in comparison.runs} == {"no parameters"}


def test_scores_of_known_guides_are_right(comparison):
    """The posterior's ELBO is the evidence, and the Laplace posterior is exact here."""
    x = torch.linspace(-2.0, 2.0, 20)[:8] + 0.3
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    for run in comparison.runs:
        if run["method"] in ("exact", "predictive_coding"):
            assert run["rows"]["elbo"] == pytest.approx(evidence.tolist(), abs=2e-4)
        else:
            assert np.mean(run["rows"]["elbo"]) < evidence.mean() + 1e-3
        assert run["scores"]["elbo"]["num_rows"] == 8


def test_local_guides_are_refitted_to_held_out_rows_and_encoders_are_not(comparison):
    by_name = {run["method"]: run for run in comparison.runs}
    refitted = {name for name, run in by_name.items() if run["refitted"]}
    assert refitted == {"normal", "AutoNormal", "predictive_coding"}
    # 10 updates of one draw: on 8 held-out rows, or on 20 training rows
    assert by_name["normal"]["gradient_evaluations"] == {"training": 0, "held_out": 80}
    assert by_name["amortized_normal"]["gradient_evaluations"] == {"training": 200, "held_out": 0}


def test_refined_guides_learn_and_pay_for_their_refinement():
    """Mean field is exact here, and an iteration costs as much as the update after it."""
    x = torch.linspace(-2.0, 2.0, 16)
    names = ("iterative_normal", "semi_amortized_normal", "laplace_normal")
    budget = Budget(num_steps=300, num_samples=200, num_evidence_samples=200)
    options = {name: {"num_iterations": 2, "hidden": (16,)} for name in names[1:]}
    options[names[0]] = {"num_iterations": 2, "network": (16,)}
    fields = {"budget": budget, "guide_options": options, "progress": False}
    runs = compare(normal_model, x, guides=names, held_out=x + 0.1, **fields).runs
    evidence = float(dist.Normal(0.0, 2.0**0.5).log_prob(x + 0.1).mean())
    # a Newton step of one latent takes its gradient and one row of curvature
    # and a gradient of the iterative bound two draws
    each = {"iterative_normal": 2, "semi_amortized_normal": 1, "laplace_normal": 2}
    for run in runs:
        assert run["status"] == "ok", run
        assert not run["refitted"]
        total = 300 * 16 * (1 + 2 * each[run["method"]])
        assert run["gradient_evaluations"] == {"training": total, "held_out": 0}
        assert np.mean(run["rows"]["elbo"]) == pytest.approx(evidence, abs=0.1)


def test_difference_of_a_comparison_is_paired(comparison):
    found = comparison.difference("exact", "normal")
    rows = {(run["method"], run["seed"]): np.array(run["rows"]["elbo"]) for run in comparison.runs}
    table = np.stack([rows["exact", seed] - rows["normal", seed] for seed in (0, 1)])
    assert found.value == pytest.approx(table.mean(), abs=1e-12)
    assert found.value > 0
    with pytest.raises(ValueError, match="no finished run with the same seed"):
        comparison.difference("exact", "unknown")


def test_compare_leaves_the_caller_alone():
    """Neither the parameter store, nor random states, nor the guide given are changed."""
    pyro.param("mine", torch.tensor(1.0))
    guide = AutoNormal(normal_model)
    guide(torch.zeros(3))
    before = {name: value.clone() for name, value in guide.named_parameters()}
    held = guide._model
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    result = compare(normal_model, torch.zeros(3), guides=[guide], budget=SMOKE, progress=False)
    assert result.runs[0]["status"] == "ok"
    # three parameters of its own, as Pyro names them, were there before; none was added
    assert pyro.param("mine") == 1.0
    assert set(pyro.get_param_store().keys()) == {
        "mine",
        *(f"AutoNormal.{name.replace('_unconstrained', '')}" for name in before),
    }
    assert all(torch.equal(value, before[name]) for name, value in guide.named_parameters())
    assert guide._model is held
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()


def test_runs_are_reproducible_and_apart():
    """A run's numbers depend on its seed only, not on what ran before it."""
    x = torch.linspace(-1.0, 1.0, 6)
    both = compare(normal_model, x, guides=["normal", AutoNormal], budget=SMOKE, progress=False)
    alone = compare(normal_model, x, guides=[AutoNormal], budget=SMOKE, progress=False)
    assert both.runs[1]["rows"]["elbo"] == alone.runs[0]["rows"]["elbo"]


def test_a_failing_method_is_a_record():
    class Broken:
        def __init__(self, model):
            raise RuntimeError("broken on purpose")

    result = compare(
        normal_model, torch.zeros(4), guides=[Broken, "normal"], budget=SMOKE, progress=False
    )
    broken, normal = result.runs
    assert (broken["status"], normal["status"]) == ("failed", "ok")
    assert broken["error"]["type"] == "RuntimeError"
    assert broken["error"]["message"] == "broken on purpose"
    assert broken["error"]["where"].startswith("benchmarks/")
    assert "broken on purpose" in str(result)


def test_global_latents_are_scored_jointly():
    result = compare(
        global_model,
        torch.zeros(5),
        guides=["normal", "multivariate_normal"],
        budget=SMOKE,
        progress=False,
    )
    for run in result.runs:
        assert run["scores"]["elbo"]["joint"]
        assert run["rows"] == {}
    (table,) = result.standings
    assert table.unit == "nats in all"
    assert table.places[0].difference is not None


def test_held_out_rows_need_latents_of_their_own():
    with pytest.raises(ValueError, match="outside the data plate: 'mean'"):
        compare(global_model, torch.zeros(5), guides=["normal"], held_out=torch.ones(3))


def test_an_exact_evidence_is_used_where_a_model_knows_it():
    pyro.set_rng_seed(0)
    model = zoo.make("linear_gaussian", dims=(2, 4)).requires_grad_(False)
    x = model(size=10).detach()
    result = compare(
        model,
        x,
        guides=["multivariate_normal"],
        loops=["predictive_coding"],
        budget=SMOKE,
        progress=False,
    )
    (run,) = result.runs
    assert run["tier"] == "exact"
    assert run["rows"]["exact_log_evidence"] == pytest.approx(
        model.log_evidence(x).tolist(), abs=1e-3
    )


def test_a_point_that_is_no_mode_leaves_its_model_scored():
    """Jointly, the evidence guide scores the model; on a frozen model nothing is left to score."""

    def two_modes(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2 * 4.0, 0.5), obs=x)

    fields = {"guides": ["amortized_delta"], "budget": SMOKE, "progress": False}
    joint = {"regimes": ["joint"], "evidence_guide": "normal"}
    (run,) = compare(two_modes, torch.full((4,), 4.0), **fields, **joint).runs
    assert run["status"] == "ok"
    assert "not positive definite" in run["no_elbo"]
    assert set(run["scores"]) == {"log_evidence"}
    assert len(run["rows"]["log_evidence"]) == 4
    (run,) = compare(two_modes, torch.full((4,), 4.0), **fields, regimes=["frozen"]).runs
    assert run["status"] == "failed"
    assert run["error"]["type"] == "IndefiniteHessianError"


# ---------------------------------------------------------------------------- autoguides


def rows_model(x, size=None, index=None):
    """A latent shared by all rows and one for each, as `global_model` and `normal_model`."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# What Pyro 1.9.2 does: of its nine, two keep parameters of rows apart over minibatches.
SAFE = {autoguide.AutoNormal, autoguide.AutoDelta}


@pytest.mark.parametrize("kind", AUTOGUIDES)
def test_autoguides_that_are_wrong_on_minibatches_are_found_by_trying(kind):
    """Wrong: a row's q changes with the rows that stand beside it, which is seen after a fit."""
    x = torch.linspace(-3.0, 3.0, 12)
    budget = replace(SMOKE, batch_size=4)
    (run,) = compare(rows_model, x, guides=[kind], budget=budget, progress=False).runs
    if kind in SAFE:
        assert run["status"] == "ok"
        return
    assert run["status"] == "refused"
    assert run["refusal"]["why"] == "minibatches"
    assert "different rows get the same q of 'z'" in run["refusal"]["message"]
    # an oracle of its own: built on 4 rows, it holds fewer parameters than built on 12
    numbers = []
    for rows in (4, 12):
        with pyro.get_param_store().scope():
            guide = kind(rows_model)
            guide(x[:rows], size=12, index=torch.arange(rows))
            numbers.append(sum(value.numel() for value in guide.parameters()))
    small, large = numbers
    assert small < large
    assert f"it has {small:,} parameters, on all 12 rows {large:,}" in run["refusal"]["message"]
    # on all rows at once there is nothing wrong with it
    (run,) = compare(rows_model, x, guides=[kind], budget=SMOKE, progress=False).runs
    assert run["status"] == "ok", run


def test_a_safe_autoguide_follows_the_rows_that_a_minibatch_names():
    """AutoNormal over minibatches finds the posterior of every row, not that of random ones."""
    x = torch.linspace(-3.0, 3.0, 12)
    budget = Budget(num_steps=600, batch_size=4, num_samples=400, num_evidence_samples=400)
    (run,) = compare(normal_model, x, guides=[AutoNormal], budget=budget, progress=False).runs
    evidence = dist.Normal(0.0, 2.0**0.5).log_prob(x)
    # mean field is exact here: rows are independent
    assert np.mean(run["rows"]["elbo"]) == pytest.approx(float(evidence.mean()), abs=0.05)
    assert run["gradient_evaluations"]["training"] == 600 * 4


def test_large_targets_are_refused_to_autoguides_and_to_them_only():
    x = torch.zeros(250)
    call = {"guides": ["normal", AutoNormal], "budget": SMOKE, "progress": False}
    result = compare(normal_model, x, **call)
    ours, theirs = result.runs
    assert (ours["status"], theirs["status"]) == ("ok", "refused")
    assert theirs["refusal"]["why"] == "latents"
    assert "at most 200 latents; this one has 250" in theirs["refusal"]["message"]
    assert "not ranked: too many latents" in str(result)
    assert "refused" in run_line(theirs)
    lifted = compare(normal_model, x, **{**call, "autoguide_limit": None})
    assert [run["status"] for run in lifted.runs] == ["ok", "ok"]
    # a refitted guide is one of the held-out rows, so these are what counts
    held_out = compare(normal_model, x, held_out=x[:50], **call)
    assert [run["status"] for run in held_out.runs] == ["ok", "ok"]


def test_shared_latents_need_no_check_of_minibatches():
    def model(x, size=None, index=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=index):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    budget = replace(SMOKE, batch_size=4)
    guides_ = [autoguide.AutoMultivariateNormal]
    (run,) = compare(model, torch.zeros(12), guides=guides_, budget=budget, progress=False).runs
    assert run["status"] == "ok"


def test_the_suite_of_autoguides_has_targets_of_every_kind():
    tasks = {task.name: task for task in load_tasks("autoguides")}
    for task in tasks.values():
        assert all(kind in task.guides for kind in AUTOGUIDES)
        found = layout(task.build_model(), task.args, task.kwargs)
        assert (num_latents(found) > 200) == (task.name == "vae_300_rows")
    schools = tasks["eight_schools_centered"]
    assert num_latents(layout(schools.build_model(), schools.args)) == 10


def test_frozen_runs_share_one_model_and_seeds_do_not():
    task = Task(
        name="tiny",
        make_model=lambda: zoo.make("vae", x_dim=6, z_dim=2, hidden=(4,)),
        args=(torch.bernoulli(torch.full((9, 6), 0.4)),),
        held_out=(torch.bernoulli(torch.full((5, 6), 0.4)),),
        regimes=("frozen",),
        budget=SMOKE,
    )
    prints = {}
    for seed in (0, 1):
        state, about = train_shared_model(task, seed)
        assert about["gradient_evaluations"] == 10 * 9
        for name in ("normal", "amortized_normal"):
            run = execute(task, as_method(name), "frozen", seed, state=state)
            prints[name, seed] = run["model_digest"]
        assert prints["normal", seed] == fingerprint(state)
    assert prints["normal", 0] == prints["amortized_normal", 0] != prints["normal", 1]


def test_a_function_with_parameters_can_be_frozen():
    """Parameters in Pyro's store, constrained ones too, are trained once and then left alone."""

    def model(x):
        scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = compare(
        model,
        torch.linspace(-1.0, 1.0, 10),
        guides=["normal", "amortized_normal"],
        regimes=("joint", "frozen"),
        decoder_guide="normal",
        budget=SMOKE,
        progress=False,
    )
    assert [run["status"] for run in result.runs] == ["ok"] * 4
    shared = {run["model_digest"] for run in result.runs if run["regime"] == "frozen"}
    assert len(shared) == 1
    # the shared model is the one that its own guide trains jointly with the same seed
    joint = {run["method"]: run["model_digest"] for run in result.runs if run["regime"] == "joint"}
    assert joint["normal"] in shared
    assert joint["amortized_normal"] not in shared
    found = result.difference("normal", "amortized_normal", regime="frozen")
    assert found.num_rows == 10


# ---------------------------------------------------------------------------- requests


def test_one_guide_needs_no_list_and_arrays_are_tensors():
    x = np.linspace(-1.0, 1.0, 6)
    result = compare(normal_model, x, guides="normal", budget=SMOKE, progress=False)
    (run,) = result.runs
    assert (run["method"], run["status"], run["dtype"]) == ("normal", "ok", "float32")
    result = compare(normal_model, (x,), guides=AutoNormal, budget=SMOKE, progress=False)
    assert [run["method"] for run in result.runs] == ["AutoNormal"]


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"budget": 3}, TypeError, "must be a benchmarks.Budget, got 3"),
        ({"args": "x"}, TypeError, "args must be a tuple"),
        ({"args": (torch.zeros(3), 1, 2, 3)}, ValueError, "must run when it is called with args"),
        ({"args": (None,)}, ValueError, r"called with args = \(None\), but raised TypeError"),
        ({"args": (np.array(["a"]),)}, TypeError, "dtype <U1, which no tensor holds"),
        ({"kwargs": torch.zeros(2)}, TypeError, "kwargs must be a dictionary"),
        ({"seeds": 1.5}, ValueError, "seeds must be a number of seeds"),
        ({"guides": "abnormal"}, ValueError, "'abnormal' is not a guide of the grid"),
        ({"guides": []}, ValueError, "guides= is empty"),
        ({"model": torch.zeros(3)}, TypeError, "model must be a Pyro program"),
    ],
)
def test_mistakes_are_told_before_anything_runs(fields, error, words):
    call = {"model": normal_model, "args": (torch.zeros(3),), "guides": ["normal"], **fields}
    with pytest.raises(error, match=words):
        compare(**call, progress=False)


def test_a_prior_that_cannot_be_drawn_from_is_no_mistake():
    def model(x):
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        mean = pyro.sample("mean", flat)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    (run,) = compare(model, torch.zeros(4), guides="normal", budget=SMOKE, progress=False).runs
    assert run["status"] == "ok", run


def test_the_default_grid_leaves_out_what_does_not_apply():
    """Without rows there is nothing for an encoder to read; with one latent nothing to couple."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=x)

    task = {"guides": GRID, "budget": SMOKE, "progress": False}
    result = compare(model, torch.zeros(3), **task)
    names = {run["method"] for run in result.runs}
    assert {"normal", "delta", "multivariate_normal"} <= names
    assert not any(name.startswith("amortized") for name in names)
    assert all(run["status"] == "ok" for run in result.runs)
    out = result.records.tasks["model"]["left_out"]
    assert names | set(out) == set(GRID)
    assert "Left out, as it does not apply: amortized_normal" in str(result)
    # what a task names itself is tried, and its failure is a result
    result = compare(model, torch.zeros(3), **{**task, "guides": ["amortized_normal"]})
    assert [run["status"] for run in result.runs] == ["failed"]


def test_messages_are_whole_in_the_table():
    class Wordy:
        def __init__(self, model):
            raise RuntimeError(f"This sentence has {'very ' * 30}many words. Another follows.")

    shown = str(compare(normal_model, torch.zeros(3), guides=[Wordy], progress=False))
    assert "many words." in " ".join(shown.split())
    assert "Another" not in shown
    assert max(len(line) for line in shown.splitlines()) < 110


def test_a_run_that_was_stopped_on_its_way_up_says_so():
    """From a start far away 15 updates are too few, and 400 are enough."""
    x = torch.full((10,), 8.0)
    call = {"guides": ["normal"], "progress": False}
    scores = {"num_samples": 100, "num_evidence_samples": 100, "num_khat_samples": 100}
    scores["num_curve_samples"] = 100
    early = compare(normal_model, x, budget=Budget(num_steps=15, **scores), **call)
    late = compare(normal_model, x, budget=Budget(num_steps=400, **scores), **call)
    assert not early.standings[0].places[0].converged
    assert "not converged" in str(early)
    assert "Not converged." in render(early.records)
    assert late.standings[0].places[0].converged
    assert "onverged" not in str(late)


# ---------------------------------------------------------------------------- methods


def test_schemes_are_those_of_the_registry():
    """Whether held-out rows need a fit of their own is what the scheme says of itself."""
    for name, (scheme, family) in guides.GUIDES.items():
        method = as_method(name)
        module, _, attribute = scheme.partition(":")
        assert method.refit is not getattr(importlib.import_module(module), attribute).amortized
        assert method.scheme == attribute
        assert FAMILIES[method.family] == family
        assert method.point == (method.family == "delta")


def test_methods_know_what_they_are():
    assert as_method("amortized_multivariate_normal").scheme == "Encoder"
    assert as_method("normal").refit
    assert as_method(AutoDelta).point
    own = as_method(lambda model: AutoNormal(model, init_scale=0.5))
    assert own.make_guide(normal_model, (), {}).__class__ is AutoNormal
    instance = as_method(exact_guide)
    assert instance.make_guide(normal_model, (), {}) is exact_guide


def test_a_guide_given_is_copied_onto_the_model_of_the_run():
    """What it shares with its model, the copy shares with that of the run."""
    model, other = (zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,)) for _ in range(2))
    x = torch.zeros(2, 4)
    auto = AutoNormal(model)
    auto(x)
    for guide in (auto, guides.make("normal", model, x)):
        here = as_method(guide, model=model).make_guide(other, (x,), {})
        assert here is not guide
        assert here.model is not guide.model
        own = {id(value) for value in guide.parameters()}
        assert own.isdisjoint(id(value) for value in here.parameters())
        # the copy scores the other model
        torch.nn.init.zeros_(other.likelihood.output.weight)
        pyro.infer.Trace_ELBO().loss(other, here, x)
    assert guides.make("normal", model, x).model is model


def test_a_guide_that_holds_the_models_decoder_holds_the_runs():
    model, other = (zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,)) for _ in range(2))
    guide = OwnGuide()
    guide.decoder = model.network
    here = as_method(guide, model=model).make_guide(other, (), {})
    assert here.decoder is other.network
    assert guide.decoder is model.network


def test_totals_and_rows_are_not_mixed():
    """A guide with joint weights puts the whole table in totals, per-row guides too."""
    x = torch.linspace(-1.0, 1.0, 6)
    result = compare(
        normal_model, x, guides=["normal", AutoDiagonalNormal], budget=SMOKE, progress=False
    )
    normal, auto = result.runs
    assert not normal["scores"]["elbo"]["joint"]
    assert auto["scores"]["elbo"]["joint"]
    assert normal["scores"]["elbo"]["total"] == pytest.approx(
        6 * normal["scores"]["elbo"]["value"], rel=1e-4
    )
    (table,) = result.standings
    assert table.unit == "nats in all"
    by_name = {place.method: place for place in table.places}
    assert by_name["normal"].elbo.value == normal["scores"]["elbo"]["total"]
    gap = auto["scores"]["elbo"]["total"] - normal["scores"]["elbo"]["total"]
    assert by_name["AutoDiagonalNormal"].difference.value == pytest.approx(gap)
    assert result.difference("AutoDiagonalNormal", "normal").value == pytest.approx(gap)


@pytest.mark.parametrize(
    ("entries", "loops", "message"),
    [
        (["nromal"], ["svi"], "not a guide of the grid"),
        ([3], ["svi"], "A guide is a name of the grid"),
        ([AutoNormal, AutoNormal], ["svi"], "Two methods are called 'AutoNormal'"),
        (["normal"], ["sgd"], "A loop is 'svi'"),
    ],
)
def test_wrong_methods_are_refused(entries, loops, message):
    with pytest.raises((ValueError, TypeError), match=message):
        as_methods(entries, loops)


def test_loops_of_ones_own_are_crossed_with_guides():
    def halved(model, guide, optim):
        svi = pyro.infer.SVI(model, guide, optim, pyro.infer.Trace_ELBO())
        return SimpleNamespace(step=lambda *args: svi.step(*args) / 2)

    result = compare(
        normal_model,
        torch.zeros(4),
        guides=["normal"],
        loops=["svi", halved],
        budget=SMOKE,
        progress=False,
    )
    assert [run["method"] for run in result.runs] == ["normal", "normal+halved"]
    assert {run["status"] for run in result.runs} == {"ok"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs either model= "),
        ({"model": normal_model, "regimes": ("both",)}, "A regime is one of"),
    ],
)
def test_wrong_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Task(name="task", **fields)


def test_wrong_budgets_are_refused():
    with pytest.raises(ValueError, match="num_steps must be positive"):
        Budget(num_steps=0)
    with pytest.raises(ValueError, match="one of full, demo, smoke"):
        Budget().scaled("huge")
    assert BudgetClass().scaled("demo").num_steps < BudgetClass().num_steps


# ---------------------------------------------------------------------------- statistics


def fabricated(method, seed, rows, model_digest="a", regime="frozen"):
    return {
        "method": method,
        "seed": seed,
        "regime": regime,
        "model_digest": model_digest,
        "status": "ok",
        "rows": {"elbo": rounded(rows, 12)},
        "scores": {"elbo": {"total": float(np.sum(rows)), "total_error": 0.1, "joint": False}},
    }


def test_paired_differences_equal_a_numpy_computation():
    generator = np.random.default_rng(0)
    left, right = generator.normal(size=(2, 3, 40))
    found = paired(
        [fabricated("a", seed, left[seed]) for seed in range(3)],
        [fabricated("b", seed, right[seed]) for seed in reversed(range(3))],
        "elbo",
    )
    table = left - right
    error = math.sqrt(table.mean(0).var(ddof=1) / 40 + table.mean(1).var(ddof=1) / 3)
    assert found.value == pytest.approx(table.mean(), abs=1e-10)
    assert found.standard_error == pytest.approx(error, abs=1e-10)
    assert found.per_seed == pytest.approx(table.mean(1), abs=1e-10)


def test_the_standard_error_covers():
    """Over repetitions, the estimate is within two of its standard errors 95 times of 100."""
    generator = np.random.default_rng(1)
    inside, repetitions = 0, 400
    for _ in range(repetitions):
        rows = generator.normal(size=60) * 2  # what is hard is hard with every seed
        runs = [
            fabricated("a", s, rows + generator.normal() * 0.3 + generator.normal(size=60) * 0.1)
            for s in range(8)
        ]
        found = estimate(runs, "elbo")
        inside += abs(found.value) < 2 * found.standard_error
    share = inside / repetitions
    assert abs(share - 0.954) < 3 * math.sqrt(0.954 * 0.046 / repetitions) + 0.02


def test_frozen_runs_on_different_models_are_not_paired():
    ours = [fabricated("a", 0, np.ones(4))]
    other = [fabricated("b", 0, np.zeros(4), model_digest="another")]
    assert paired(ours, other, "elbo") is None
    joint = [fabricated("b", 0, np.zeros(4), model_digest="another", regime="joint")]
    assert paired([{**ours[0], "regime": "joint"}], joint, "elbo").value == 1.0


# ---------------------------------------------------------------------------- records


def run_record(**fields):
    return {
        "kind": "run",
        "key": "k",
        "task": "t",
        "regime": "frozen",
        "method": "m",
        "seed": 0,
        "status": "ok",
        **fields,
    }


def test_records_round_trip(tmp_path):
    values = torch.randn(50, dtype=torch.float64)
    record = run_record(rows={"elbo": rounded(values), "khat": rounded([math.nan, math.inf, 0.5])})
    append(tmp_path / "runs.jsonl", [record, {"kind": "task", "name": "t"}])
    append(tmp_path / "runs.jsonl", [{"kind": "command", "digests": {}}])
    read = read_records(tmp_path)
    assert read.runs == [record]
    assert read.runs[0]["rows"]["elbo"] == pytest.approx(values.tolist(), abs=5e-5)
    assert read.runs[0]["rows"]["khat"] == [None, None, 0.5]
    assert list(read.tasks) == ["t"]
    assert len(read.commands) == 1


def test_a_line_cut_short_costs_only_itself(tmp_path):
    path = tmp_path / "runs.jsonl"
    append(path, [run_record(seed=0), run_record(seed=1)])
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_records(tmp_path).runs) == 1
    append(path, [run_record(seed=2)])
    read = read_records(tmp_path)
    assert [run["seed"] for run in read.runs] == [0, 2]
    assert read.unreadable == 1


def test_the_latest_record_of_a_run_counts():
    records = Records()
    for value in (1, 2):
        records.add(run_record(value=value))
    assert [run["value"] for run in records.latest()] == [2]


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none in"):
        read_records(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"kind": "recipe"}\n')
    with pytest.raises(ValueError, match="kind is 'run', 'task' or 'command'"):
        read_records(tmp_path)


# ---------------------------------------------------------------------------- digests


def test_digest_covers_what_a_run_imports_and_nothing_else():
    modules = set(closure(["benchmarks.worker", "guides.families.normal:Normal"]))
    assert {"benchmarks.execute", "guides.layout", "guides.families.normal"} <= modules
    # behind names that their packages load on first use
    assert {"guides.diagnostics.scores", "guides.inference.predictive_coding"} <= modules
    # what draws reports, and what other methods are made of, may change without a rerun
    assert not {"benchmarks.report", "benchmarks.svg", "benchmarks.__main__"} & modules
    assert not {"guides.families.spline_coupling", "guides.diagnostics.arviz_export"} & modules
    assert "zoo.vae" in closure(["benchmarks.suites.quick"])


def test_digest_misses_no_module_that_a_run_loads(tmp_path):
    """What a run really imports, read from a fresh interpreter, is covered by the digest."""
    path = write_file(tmp_path, "['amortized_spline_coupling']")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.worker import work
from benchmarks.task_file import load_tasks
(task,) = load_tasks({str(path)!r})
payload = dict(kind="run", source={str(path)!r}, task=task.name, budget=task.budget, seed=0,
               state=None, images=False, regime="joint", method="amortized_spline_coupling",
               data=task.data_digest, mode="graph")
assert work(payload, lambda phase, fraction: None)["status"] == "ok"
print(*(n for n in sys.modules if n.split(".")[0] in ("zoo", "guides", "benchmarks")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    _, covered = digest_of(str(path), as_method("amortized_spline_coupling"))
    assert set(done.stdout.split()) <= set(covered)


def test_digest_ignores_comments_and_docstrings_only():
    plain = 'def f(x):\n    return "# not a comment"\n'
    polished = '"""Doc."""\n\n\ndef f(x):  # why\n    """Doc."""\n\n    return "# not a comment"\n'
    assert stripped(plain) == stripped(polished)
    assert stripped(plain) != stripped(plain.replace("x", "y"))


def test_digest_changes_with_the_code(tmp_path):
    path = write_file(tmp_path, "['normal']")

    def key() -> str:
        source_digest.cache_clear()
        return plan(str(path), seeds=1)[0].key

    first = key()
    path.write_text(path.read_text() + "# a remark\n")
    assert key() == first
    path.write_text(path.read_text().replace("dist.Normal(z, 1.0)", "dist.Normal(z, 2.0)"))
    assert key() != first


def test_digest_and_key_cover_modules_beside_a_task_file_and_its_data(tmp_path):
    path = write_file(tmp_path, "['normal']")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "scale.py").write_text("from zoo.networks import mlp\nSCALE = 1.0\n")
    (tmp_path / "bystander.py").write_text("A = 1\n")
    path.write_text("from parts import scale\n" + path.read_text())

    def look():
        source_digest.cache_clear()
        sys.modules.pop("parts.scale", None)
        (item,) = plan(str(path), seeds=1)
        return item

    first = look()
    files = {name for name in first.modules if name.startswith("file:")}
    assert files == {"file:my_task.py", "file:parts/__init__.py", "file:parts/scale.py"}
    assert "zoo.networks" in first.modules
    (tmp_path / "bystander.py").write_text("A = 2\n")
    assert look().key == first.key
    (tmp_path / "parts" / "scale.py").write_text("SCALE = 2.0\n")
    second = look()
    assert second.digest != first.digest
    # the same code with other data: the digest of code stays, the key does not
    (tmp_path / "end").write_text("2.0")
    text = path.read_text().replace("linspace(-2.0, 2.0", "linspace(-2.0, END")
    reading = "END = float(Path(__file__).with_name('end').read_text())"
    path.write_text(f"from pathlib import Path\n{reading}\n{text}")
    third = look()
    (tmp_path / "end").write_text("3.0")
    fourth = look()
    assert third.digest == fourth.digest
    assert third.data != fourth.data
    assert third.key != fourth.key


def test_data_that_change_from_process_to_process_are_refused(tmp_path):
    path = write_file(tmp_path, "['normal']")
    path.write_text(path.read_text().replace("torch.linspace(-2.0, 2.0, 12)", "torch.randn(12)"))
    done = command("run", path.name, "--seeds", 1, "--jobs", 1, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "must have the same data whenever it is loaded" in " ".join(done.stdout.split())


def test_a_missing_module_changes_a_digest():
    assert code_digest(["guides.layout"]) != code_digest(["guides.layout", "guides.gone"])


# ---------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with a task file, run once: fine, broken and deadly guides."""
    place = tmp_path_factory.mktemp("elsewhere")
    path = write_file(place, "['normal', 'amortized_normal', Slow, Broken, Deadly]")
    done = command("run", path.name, "--seeds", 1, "--jobs", 2, "--out", "out", cwd=place)
    return SimpleNamespace(path=place, file=path, out=place / "out", done=done)


def test_a_file_gives_records_and_a_report(folder):
    assert folder.done.returncode == 0, folder.done.stderr
    assert folder.done.stdout.splitlines()[-1] == f"Report: {Path('out') / 'report.html'}"
    records = read_records(folder.out)
    status = {run["method"]: run["status"] for run in records.runs}
    assert status == {
        "normal": "ok",
        "amortized_normal": "ok",
        "Slow": "ok",
        "Broken": "failed",
        "Deadly": "failed",
    }
    run = next(run for run in records.runs if run["method"] == "normal")
    for name in (
        "task",
        "model",
        "regime",
        "family",
        "scheme",
        "loop",
        "seed",
        "config",
        "scores",
        "rows",
        "gradient_evaluations",
        "wall_seconds",
        "curve",
        "tier",
        "versions",
        "machine",
        "digest",
        "model_digest",
        "dtype",
    ):
        assert name in run, name
    assert run["machine"]["threads"] == 1
    assert run["curve"][-1]["gradient_evaluations"] == 10 * 5
    assert "out/report.html" not in json.dumps(records.runs)


def test_records_name_no_folder_of_the_machine(folder):
    text = (folder.out / "runs.jsonl").read_text()
    assert str(folder.path) not in text
    assert str(ROOT) not in text
    assert os.uname().nodename not in text or len(os.uname().nodename) < 4


def test_failures_are_recorded_with_their_message(folder):
    errors = {
        run["method"]: run["error"]
        for run in read_records(folder.out).runs
        if run["status"] == "failed"
    }
    assert errors["Broken"]["message"] == "broken on purpose"
    assert errors["Deadly"]["type"] == "WorkerDied"
    assert "exit code -9" in errors["Deadly"]["message"]
    assert "2 failed" in folder.done.stdout
    # without a terminal progress is one line a run
    assert "[5/5]" in folder.done.stderr


def test_a_second_run_resumes(folder):
    before = (folder.out / "runs.jsonl").read_bytes()
    again = command("run", folder.file.name, "--seeds", 1, "--out", "out", cwd=folder.path)
    assert again.returncode == 0, again.stderr
    assert "5 of 5 runs were recorded already and were skipped" in again.stdout
    assert (folder.out / "runs.jsonl").read_bytes() == before


def test_report_alone_and_mistakes(folder, capsys):
    assert main(["report", str(folder.out), "--to", str(folder.path / "other.html")]) == 0
    assert (folder.path / "other.html").is_file()
    for words, message in (
        (["run", "nothing"], "neither a suite"),
        (["run", str(folder.file), "--methods", "nothing"], "No method is called 'nothing'"),
        (["run", str(folder.file), "--models", "nothing"], "has no task 'nothing'"),
        (["run", str(folder.file), "--seeds", "0"], "--seeds must be at least 1"),
        (["report", str(folder.path / "nowhere")], "found none in"),
    ):
        capsys.readouterr()
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_list(capsys, folder):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("quick", "hierarchical_vae", "amortized_spline_coupling", "predictive_coding"):
        assert name in shown
    assert main(["list", str(folder.file)]) == 0
    assert capsys.readouterr().out.startswith("my_task")


def test_a_file_without_a_task_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("x = 1\n")
    with pytest.raises(ValueError, match="must define TASK, TASKS, or at least `model`"):
        load_tasks(str(path))


def test_where_every_run_fails_the_exit_code_says_so(tmp_path):
    path = write_file(tmp_path, "[Broken]")
    done = command("run", path.name, "--seeds", 1, "--jobs", 1, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "every run failed" in done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
    # so does the same command again, which finds them recorded
    done = command("run", path.name, "--seeds", 1, "--jobs", 1, "--out", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "every run failed" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("args = (1.5,)", "must run when it is called with args = (1.5)"),
        ("args = (x, x, x, x)", "but raised TypeError"),
        ("budget = 3", "budget must be a benchmarks.Budget, got 3"),
        ("raise KeyError('gone')", "cannot be imported (line "),
        ("def", "cannot be imported (line "),
    ],
)
def test_mistakes_in_a_file_are_one_line(line, words, tmp_path, capsys):
    path = write_file(tmp_path, "['normal']")
    path.write_text(f"{path.read_text()}{line}\n")
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("pyro-zoo: ")
    assert words in shown
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- studies


def study(path, **fields):
    about = {"title": "T", "question": "Q?", "protocol": "P", "command": "C", **fields}
    return StudyLog(path, **about)


def test_a_study_is_resumed_by_key(tmp_path):
    path = tmp_path / "records" / "study.jsonl"
    with study(path) as log:
        assert not log.done({"seed": 0, "task": "a"})
        log.add(key={"seed": 0, "task": "a"}, values={"nats": torch.tensor([1.0, math.inf])})
        log.note("A remark.")
    before = path.read_bytes()
    with study(path) as log:
        # the order of names does not matter, and a log that adds nothing writes nothing
        assert log.done({"task": "a", "seed": 0})
        assert not log.done({"task": "a", "seed": 1})
        log.note("A remark.")
    assert path.read_bytes() == before
    (read,) = read_records(path.parent).studies.values()
    (result,) = read.results.values()
    assert result["values"] == {"nats": [1.0, None]}
    assert read.notes == ["A remark."]
    assert read.about["versions"]["torch"] == torch.__version__
    # cut short by a lost machine: the result is made again, on a line of its own
    path.write_bytes(before[: before.index(b'"note"')])
    with study(path) as log:
        log.add(key={"seed": 1, "task": "a"}, values={"nats": 2})
    assert len(read_records(path).studies["study"].results) == 2


def test_results_of_other_code_can_be_made_again(tmp_path):
    path = tmp_path / "study.jsonl"
    with study(path, modules=["benchmarks.records"]) as log:
        log.add(key={"seed": 0}, values={"nats": 1.0})
        assert log.digest == code_digest(closure(["benchmarks.records"]))
    for fresh in (False, True):
        with study(path, modules=["benchmarks.svg"], fresh=fresh) as log:
            assert log.done({"seed": 0}) is not fresh


def test_a_study_takes_plain_values_only(tmp_path):
    with study(tmp_path / "study.jsonl") as log:
        with pytest.raises(ValueError, match="'seed' is both"):
            log.add(key={"seed": 0}, values={"seed": 1})
        with pytest.raises(TypeError, match="'model' is a Linear"):
            log.add(key={"seed": 0}, values={"model": nn.Linear(1, 1)})


def test_an_interrupt_loses_no_finished_run(tmp_path):
    """Ctrl-C while the slow guide runs: the fast one is recorded; the same command goes on."""
    path = write_file(tmp_path, "['normal', Slow]")
    words = [sys.executable, "-m", "benchmarks", "run", path.name, "--seeds", "1", "--out", "out"]
    # Longer than a loaded machine takes to send the signal, and never slept out.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": "240"}
    process = subprocess.Popen(
        [*words, "--jobs", "1"],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
        # A shell ignores the signal for what it runs in the background, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "out" / "runs.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if records.is_file() and '"kind":"run"' in records.read_text():
            break
        time.sleep(0.1)
    # what a terminal does: the signal reaches the workers as well
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "1 of 2 runs are recorded in out; the same command goes on from there" in out
    assert "Traceback" not in err
    assert [run["method"] for run in read_records(tmp_path / "out").runs] == ["normal"]
    again = command(*words[3:], cwd=tmp_path)
    assert "1 of 2 runs were recorded already" in again.stdout, again.stderr
    assert len(read_records(tmp_path / "out").runs) == 2


def test_progress_is_quiet_when_asked(capsys):
    bar = Progress(2, shown=False)
    bar.started("a")
    bar.finished("a", "done")
    bar.close()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_terminal_sees_what_runs_and_the_time_left():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    bar = Progress(2, stream=stream)
    for name in ("first", "second"):
        bar.started(name)
        bar.tick(name, "fit", 0.5)
        bar.finished(name, f"{name}: FAILED", failed=name == "second")
    bar.close()
    shown = stream.getvalue()
    assert "[0/2] first (fit)" in shown
    assert "[1/2] second (fit)" in shown
    assert " left" in shown
    # a failure is said above the bar, a success only counts
    assert "second: FAILED" in shown
    assert "first: FAILED" not in shown


# ---------------------------------------------------------------------------- the suite


def test_quick_holds_every_cell_of_the_default_grid():
    assert set(GRID) <= set(guides.GUIDES)
    assert len(GRID) == 8
    for task in load_tasks("quick"):
        methods = {m.name for m in as_methods(task.guides, task.loops)}
        assert methods == {*GRID, "predictive_coding"}
        assert task.regimes == ("joint", "frozen")
        # every row is on one side of the split, and on one only
        assert len(task.args[0]) + len(task.held_out[0]) == 1797


@pytest.mark.parametrize("name", ["vae", "hierarchical_vae"])
def test_quick_runs(name, tmp_path):
    words = ["run", "quick", "--models", name, "--seeds", "1", "--budget", "smoke", "--jobs", "2"]
    methods = ["normal", "amortized_spline_coupling", "predictive_coding"]
    done = command(*words, "--methods", *methods, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = read_records(tmp_path / "out").runs
    assert len(runs) == 6
    assert {run["status"] for run in runs} == {"ok"}, [run.get("error") for run in runs]
    frozen = [run for run in runs if run["regime"] == "frozen"]
    assert len({run["model_digest"] for run in frozen}) == 1
    assert all("images" in run for run in runs)

"""The speed comparison: all sides make the same steps, take turns, and are recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.speed import runner
from benchmarks.speed.peers import problems, torch_peer, zoo_peer
from benchmarks.speed.peers.client import PeerError
from benchmarks.speed.runner import Comparison, Side


@pytest.mark.parametrize("task", problems.TASKS)
@pytest.mark.parametrize("guide", ["normal", "multivariate_normal"])
@pytest.mark.usefixtures("float64")
def test_our_programs_compute_the_losses_of_the_others(
    task: str, guide: str, tmp_path: Path
) -> None:
    gaussian = task in ("eight_schools", "radon")
    small = {} if gaussian else {"batch": 5}
    made = problems.arrays(task, 1, guide=guide, dtype="float64", **small)
    problems.save(tmp_path / "arrays.npz", made)
    options = {"arrays": str(tmp_path / "arrays.npz")}
    momentum = {"momentum": 0.0} if task == "pcx_decoder" else {}
    theirs = torch_peer.build(task, 0, {**options, **momentum})
    ours = zoo_peer.build(task, 0, {**options, "guide": guide, "by": "eager"})
    assert ours.check() == pytest.approx(theirs.check(), rel=1e-12)
    assert torch.isfinite(torch.tensor(ours.advance(2)))


@pytest.mark.parametrize("task", ["pcx_decoder", "fabricpc_mnist", "pc"])
@pytest.mark.usefixtures("float64")
def test_our_steps_of_predictive_coding_are_those_of_the_others(task: str, tmp_path: Path) -> None:
    """Captured as compiled: energies of successive steps, weights moved in between."""
    made = problems.arrays(task, 1, dtype="float64", batch=5)
    problems.save(tmp_path / "arrays.npz", made)
    options = {"arrays": str(tmp_path / "arrays.npz")}
    momentum = {"momentum": 0.0} if task == "pcx_decoder" else {}
    theirs = torch_peer.build(task, 0, {**options, **momentum})
    ours = zoo_peer.build(task, 0, {**options, "by": "graph"})
    first = ours.advance(1)
    # Others divide by the rows and leave constants out: differences of steps tell.
    scale = 1.0 if task == "pc" else 5.0
    before = theirs.advance(1)
    for _ in range(3):
        a, b = ours.advance(1), theirs.advance(1)
        # AdamW adds its eps to gradients of the sum here, of the mean there.
        assert (a - first) == pytest.approx(scale * (b - before), rel=1e-3)


def test_a_comparison_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = (
        Side("compiled", "zoo", 4, {"by": "graph"}),
        Side("Pyro SVI", "zoo", 4, {"by": "pyro"}),
        Side("hand-written torch", "torch", 8),
        Side("NumPyro, jitted update", "numpyro", 8, {"loop": "update"}),
    )
    small = Comparison("eight_schools", "eight schools, small", sides, "normal")
    monkeypatch.setattr(runner, "COMPARISONS", (small,))
    file = tmp_path / "study.jsonl"
    words = ["speed", "--without-peers", "--rounds", "2", "--threads", "1", "--to", str(file)]
    assert main(words) == 0
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = {line["key"]["side"]: line["values"] for line in lines if line["kind"] == "result"}
    assert list(found) == ["compiled", "Pyro SVI", "hand-written torch"]
    assert found["compiled"]["ratio"] == 1.0
    assert found["compiled"]["break_even"] > 0
    assert found["compiled"]["loss"] == pytest.approx(found["hand-written torch"]["loss"])
    notes = [line["text"] for line in lines if line["kind"] == "note"]
    assert any("NumPyro, jitted update left out" in text for text in notes)
    assert main(["report", str(tmp_path), "--to", str(tmp_path / "report.html")]) == 0
    assert "eight schools, small" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_other_losses_are_no_comparison() -> None:
    answers = {"compiled": {"loss": 1.0}, "other": {"loss": 1.1}, "products": {"loss": 0.0}}
    with pytest.raises(PeerError, match=r"other computes the loss 1\.1, compiled 1\.0"):
        runner._check_losses("eight schools", answers)


def test_misuse_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["speed"]) == 1
    assert "--peers DIR" in capsys.readouterr().err
    words = ["speed", "--without-peers", "--tasks", "nonsense", "--to", str(tmp_path / "s.jsonl")]
    assert main(words) == 1
    assert "Unknown task 'nonsense'" in capsys.readouterr().err

"""Studies of sequences: units, baselines, padding, and runs that go on where they were stopped."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import guides
import zoo
from benchmarks.studies import jsb_chorales, moving_digits
from benchmarks.studies.sequence_training import (
    Settings,
    Training,
    Weighted,
    bound,
    buckets,
    epoch,
    per_step,
)
from zoo.data import moving_digits as frames
from zoo.data.sequences import Sequences

SETTINGS = Settings(epochs=4, batch=3, shapes=2, every=1, draws=2, mode="eager")


def chorales() -> Sequences:
    generator = torch.Generator().manual_seed(0)

    def rows(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
        own = torch.tensor(lengths)
        x = (torch.rand(len(own), max(lengths), 5, generator=generator) < 0.3).float()
        return x * (torch.arange(max(lengths)) < own[:, None])[..., None], own

    train, validation, test = rows(2, 5, 3, 2, 6, 3, 4), rows(3, 1, 4), rows(2, 5)
    return Sequences("chorales", *train, *test, "five keys", *validation)


def model_of(data: Sequences) -> Any:
    return zoo.DeepMarkov(data.x_dim, z_dim=2, emission=4, transition=4)


def training(data: Sequences, settings: Settings, checkpoint: Path | None = None) -> Training:
    pyro.set_rng_seed(3)

    def build(program: Any, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        return guides.make("smoothing_normal", program, x, lengths, recurrent=4, hidden=4)

    return Training(model_of(data), build, data, settings, 3, checkpoint, seconds=0.0)


def test_count_models_by_hand() -> None:
    train = torch.tensor([[[1.0], [1.0], [0.0]], [[0.0], [1.0], [1.0]]])
    lengths = torch.tensor([3, 2])  # the last step of the second row is padding
    found = jsb_chorales.count_models(train, lengths, train[:1], lengths[:1])
    sounds = (1 + 3) / (2 + 5)
    on, off = (1 + 1) / (2 + 2), (1 + 1) / (2 + 1)
    own = -(2 * math.log(sounds) + math.log(1 - sounds)) / 3
    assert found["independent_notes"] == pytest.approx(own)
    markov = -(math.log(sounds) + math.log(on) + math.log(1 - on)) / 3
    assert found["markov_notes"] == pytest.approx(markov)
    silent = jsb_chorales.count_models(train, lengths, 1 - train[1:], lengths[1:])
    markov = -(math.log(sounds) + math.log(1 - on)) / 2
    assert silent["markov_notes"] == pytest.approx(markov)
    second = jsb_chorales.count_models(train, lengths, train[1:], lengths[1:])
    assert second["markov_notes"] == pytest.approx(-(math.log(1 - sounds) + math.log(off)) / 2)


def test_the_count_models_of_the_chorales_are_those_of_the_reference() -> None:
    from zoo.data import jsb_chorales as chorale_data

    try:
        data = chorale_data.load()
    except FileNotFoundError:
        pytest.skip("the chorales are not at hand")
    found = jsb_chorales.count_models(data.train, data.train_lengths, data.test, data.test_lengths)
    assert found["independent_notes"] == pytest.approx(11.06, abs=0.005)
    assert found["markov_notes"] == pytest.approx(10.47, abs=0.005)


def test_nats_a_step_are_a_sum_over_a_sum() -> None:
    rows, lengths = torch.tensor([-6.0, -20.0]), torch.tensor([2, 10])
    assert per_step(rows, lengths) == pytest.approx(26 / 12)
    assert per_step(rows, lengths) != pytest.approx(float(-(rows / lengths).mean()))


def test_padding_counts_in_no_bound() -> None:
    data = chorales()
    run = training(data, SETTINGS)
    padded = data.train.clone()
    padded[torch.arange(6) >= data.train_lengths[:, None]] = 1.0
    longer = torch.cat([padded, torch.ones(7, 3, 5)], 1)
    first, *others = (
        bound(run.program, run.guide, x, data.train_lengths, num_samples=3, rows=2)
        for x in (data.train, padded, longer)
    )
    assert all(torch.equal(first, other) for other in others)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    bound(run.program, run.guide, data.train, data.train_lengths)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("float64")
def test_the_bound_is_that_of_pyro_row_by_row() -> None:
    data = chorales()
    run = training(replace(data, train=data.train.double(), test=data.test.double()), SETTINGS)
    draws, x, lengths = 400, data.test.double(), data.test_lengths
    found = bound(run.program, run.guide, x, lengths, num_samples=draws)
    for row in range(len(x)):
        own = x[row : row + 1, : int(lengths[row])], lengths[row : row + 1]
        torch.manual_seed(1)
        single = -torch.tensor(
            [Trace_ELBO().loss(run.program, run.guide, *own) for _ in range(draws)]
        )
        error = 2**0.5 * float(single.std()) / draws**0.5
        assert abs(float(found[row] - single.mean())) < 5 * error


@pytest.mark.usefixtures("float64")
def test_the_weight_is_on_the_data_alone() -> None:
    data = chorales()
    model = model_of(data)
    program = Weighted(model)
    x, lengths = data.train.double(), data.train_lengths
    guide = guides.make("filtering_normal", program, x, lengths, recurrent=4, hidden=4)
    losses = {}
    for weight in (None, 1.0, 3.0):
        given = () if weight is None else (torch.tensor(weight),)
        torch.manual_seed(0)
        losses[weight] = Trace_ELBO().loss(program, guide, x, lengths, *given)
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(x, lengths)
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x, lengths)
    data_term = replayed.log_prob_sum(lambda name, site: site["is_observed"]).item()
    assert losses[None] == losses[1.0]
    assert losses[3.0] - losses[1.0] == pytest.approx(-2 * data_term, rel=1e-9)


def test_parts_have_the_least_padding_and_epochs_the_rows_of_their_part() -> None:
    lengths = torch.tensor([9, 2, 3, 8, 2, 3, 5, 9, 2, 4, 3, 2])
    ordered = lengths.sort().values.tolist()
    parts = buckets(lengths, 3, 2)
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    padded = sum(len(part) * int(lengths[part].max()) for part in parts)
    assert padded == min(k * ordered[k - 1] + (12 - k) * 9 for k in (3, 6, 9))
    assert len(buckets(lengths[:3], 3, 4)) == 1
    parts = buckets(torch.arange(1, 12), 4, 2)
    seen = set()
    for seed in range(20):
        batches = epoch(parts, 4, seed)
        rows = torch.cat([rows for _, rows in batches]).tolist()
        assert len(set(rows)) == len(rows)
        seen |= set(rows)
        for number, members in itertools.groupby(
            sorted(batches, key=lambda b: b[0]), lambda b: b[0]
        ):
            sizes = [len(own) for _, own in members]
            assert len(set(sizes)) == 1
            assert len(parts[number]) - sum(sizes) < len(sizes)
    assert seen == set(range(11))


def test_a_run_that_was_stopped_makes_the_updates_of_one_that_was_not(tmp_path: Path) -> None:
    data = chorales()
    states = []
    for stops in ([None], [1, 3, None]):
        path = tmp_path / f"{len(stops)}.pt"
        for stop in stops:
            with pyro.get_param_store().scope():
                run = training(data, SETTINGS, path)
                run.run(stop)
                moments = _moments(run)
        states.append((run, moments))
    (whole, moved), (resumed, theirs) = states
    assert whole.done == resumed.done == 4
    assert whole.curve == resumed.curve
    assert len(whole.curve) == 4
    for name, module in whole._modules().items():
        other = resumed._modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.equal(value, other[key])
            assert torch.equal(whole.best[name][key], resumed.best[name][key])
    assert len(moved) == len(theirs) > 10
    assert all(map(torch.equal, moved, theirs))
    with pyro.get_param_store().scope(), pytest.raises(ValueError, match="other settings"):
        training(data, replace(SETTINGS, rate=0.5), path).run()


@pytest.mark.slow
def test_a_captured_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data, states = chorales(), []
    settings = replace(SETTINGS, epochs=3, shapes=1, mode="graph")
    for stops in ([None], [1, None]):
        for stop in stops:
            with pyro.get_param_store().scope():
                run = training(data, settings, tmp_path / f"{len(stops)}.pt")
                run.run(stop)
                assert [kind.mode for kind in run.loop.compiled] == ["graph"]
        states.append(run)
    # The first step of a process is eager, which another order of sums may tell from a graph's.
    for name, module in states[0]._modules().items():
        theirs = states[1]._modules()[name].state_dict()
        for key, value in module.state_dict().items():
            assert torch.allclose(value, theirs[key], rtol=1e-4, atol=1e-6)
    for ours, other in zip(states[0].curve, states[1].curve, strict=True):
        assert ours == pytest.approx(other, rel=1e-4)


def _moments(run: Training) -> list[torch.Tensor]:
    states = run.loop.optim.get_state()
    paths = {name.partition(".")[2] + name.partition("$$$")[2]: name for name in states}
    assert len(paths) == len(states)
    return [
        value["exp_avg"]
        for path in sorted(paths)
        for value in states[paths[path]]["state"].values()
    ]


def test_weights_of_the_best_look_are_scored() -> None:
    data = chorales()
    with pyro.get_param_store().scope():
        run = training(data, SETTINGS)
        run.run()
        assert run.best["value"] == pytest.approx(min(value for _, value in run.curve), abs=1e-5)
        run.restore_best()
        lengths = data.validation_lengths
        rows = bound(run.program, run.guide, data.validation, lengths)
        assert per_step(rows, lengths) == run.best["value"]
        assert {int(beta) for beta in (1 / run._call(0, run.parts[0], 99)[2],)} == {1}


def test_pieces_are_all_steps_of_their_sequences_once() -> None:
    data = chorales()
    cut = jsb_chorales.pieces(data, 2)
    assert cut.train_lengths.tolist() == [2, 2, 2, 1, 2, 1, 2, 2, 2, 2, 2, 1, 2, 2]
    assert cut.train.shape == (14, 2, 5)
    assert torch.equal(cut.train[1:4].reshape(-1, 5)[:5], data.train[1, :5])
    assert float(cut.train.sum()) == float(data.train.sum())
    assert cut.validation_lengths is not None
    assert int(cut.validation_lengths.sum()) == int(data.validation_lengths.sum())
    assert cut.test is data.test


def test_the_study_of_chorales_is_resumed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    small = {"network": 4, "num_iterations": 2}
    methods = {
        "smoothing": jsb_chorales.Method(
            model_of, "smoothing_normal", {"recurrent": 4, "combiner": "average"}, SETTINGS
        ),
        "filter": jsb_chorales.Method(model_of, "iterative_filtering_normal", small, SETTINGS, 2),
    }
    monkeypatch.setattr(jsb_chorales, "METHODS", methods)
    monkeypatch.setattr(jsb_chorales.jsb_chorales, "load", chorales)
    records = tmp_path / "study.jsonl"
    for _ in range(2):
        jsb_chorales.run(records, seeds=1, methods=tuple(methods), epochs=2)
    lines = records.read_text().splitlines()
    assert sum(json.loads(line)["kind"] == "result" for line in lines) == 2
    assert capsys.readouterr().out.count("nats a step") == 2
    assert (tmp_path / "checkpoints" / "smoothing_0.pt").is_file()


def test_models_of_frames_are_as_large_and_have_one_floor() -> None:
    data = frames.load(num_train=4, num_validation=2, num_test=2, num_steps=3, side=12)
    models = {
        name: moving_digits.build(levels, data) for name, levels in moving_digits.METHODS.items()
    }
    sizes = [moving_digits.count(model) for model in models.values()]
    assert abs(sizes[0] - sizes[1]) < 0.005 * sizes[0]
    flow = models["with a flow"]
    level = flow.flow.levels[0]
    assert flow.min_scale * math.exp(-level.log_bound) == pytest.approx(moving_digits.FLOOR)
    assert models["without"].min_scale == moving_digits.FLOOR
    # Both start as wide as the pixels are, or a little above their own floor.
    width = data.train.flatten(0, 1).std(0)
    for model in models.values():
        start = width.clamp(min=1.1 * model.min_scale)
        assert torch.allclose(model.scale, start, rtol=1e-4)
    # A uniform density over values from 0 to 1 has the code length of 256 equal levels.
    assert moving_digits.per_pixel(0.0, data) == pytest.approx(math.log(256))


def test_the_simplest_model_of_frames_is_one_gaussian_a_pixel() -> None:
    data = frames.load(num_train=4, num_validation=2, num_test=3, num_steps=3, side=10)
    train, test = data.train.double().reshape(-1, 100), data.test.double().reshape(-1, 100)
    mean, width = train.mean(0), train.std(0).clamp(min=1 / 256)
    nats = (width * math.sqrt(2 * math.pi)).log() + 0.5 * ((test - mean) / width) ** 2
    expected = float(nats.mean()) + math.log(256)
    assert moving_digits.gaussian_pixels(data) == pytest.approx(expected, rel=1e-4)


def test_the_study_of_frames_is_resumed(tmp_path: Path, capsys: Any) -> None:
    data = frames.load(num_train=8, num_validation=4, num_test=3, num_steps=3, side=10)
    records = tmp_path / "study.jsonl"
    for _ in range(2):
        moving_digits.run(records, seeds=1, epochs=1, data=data, width=8)
    assert len(capsys.readouterr().out.strip().splitlines()) == 4  # two looks and two results

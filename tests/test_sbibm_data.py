"""The loader of sbibm's reference posteriors, on fabricated files and on the real ones."""

import bz2
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
from zoo.data import sbibm
from zoo.data.files import cache_folder as default_cache

pytestmark = pytest.mark.usefixtures("cache_folder")

# Read before a fixture hides them, where this machine may have the real files.
REAL = {
    name: os.environ[name] for name in ("PYRO_ZOO_DATA", "PYRO_ZOO_CACHE") if name in os.environ
}
EXCERPT = json.loads(Path(__file__).with_name("sbibm_excerpt.json").read_text())["tasks"]


def fabricate(folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """Small files in the benchmark's layout, which the loader takes for the real ones."""
    rng = np.random.default_rng(0)
    replaced, arrays = {}, {}
    for key, file in sbibm.FILES.items():
        draws = key.endswith("reference_posterior_samples.csv")
        arrays[key] = rng.normal(size=(7 if draws else 1, 3)).astype(np.float32)
        lines = ["a,b,c", *(",".join(map(str, row)) for row in arrays[key].tolist())]
        content = ("\n".join(lines) + "\n").encode()
        replaced[key] = dataclasses.replace(file, sha256=hashlib.sha256(content).hexdigest())
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bz2.compress(content) if draws else content)
    monkeypatch.setattr(sbibm, "FILES", replaced)
    return arrays


@pytest.mark.parametrize("route", ["download", "folder"])
def test_ten_observations_a_task(server, tmp_path, monkeypatch, route) -> None:
    folder = server.folder if route == "download" else tmp_path / "data"
    arrays = fabricate(folder, monkeypatch)
    if route == "download":
        loaded = sbibm.load("slcp", mirror=server.url)
    else:
        monkeypatch.setenv("PYRO_ZOO_DATA", str(folder))
        loaded = sbibm.load("slcp")
    assert [posterior.number for posterior in loaded] == list(range(1, 11))
    assert {posterior.task for posterior in loaded} == {"slcp"}
    for posterior in loaded:
        expected = {
            name: torch.as_tensor(arrays[f"slcp/{posterior.number}/{name}.csv"])
            for name in ("observation", "true_parameters", "reference_posterior_samples")
        }
        assert posterior.x.equal(expected["observation"][0])
        assert posterior.parameters.equal(expected["true_parameters"][0])
        assert posterior.draws.equal(expected["reference_posterior_samples"])
    assert len(server.requests) == (30 if route == "download" else 0)


def test_every_file_has_an_address_and_a_checksum() -> None:
    names = ("observation", "true_parameters", "reference_posterior_samples")
    assert set(sbibm.FILES) == {
        f"{task}/{number}/{name}.csv"
        for task in sbibm.TASKS
        for number in range(1, 11)
        for name in names
    }
    file = sbibm.FILES["two_moons/3/reference_posterior_samples.csv"]
    assert file.path == (
        "sbibm/tasks/two_moons/files/num_observation_3/reference_posterior_samples.csv.bz2"
    )
    assert file.urls == (
        f"https://raw.githubusercontent.com/sbi-benchmark/sbibm/v1.1.0/sbibm/{file.path[6:]}",
    )
    assert len({file.sha256 for file in sbibm.FILES.values()}) == 90


def test_a_wrong_file_is_an_error(tmp_path, monkeypatch) -> None:
    fabricate(tmp_path, monkeypatch)
    path = tmp_path / sbibm.FILES["slcp/4/reference_posterior_samples.csv"].path
    path.write_bytes(bz2.compress(b"a,b,c\n1,2,3\n"))
    monkeypatch.setenv("PYRO_ZOO_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"reference_posterior_samples\.csv\.bz2 is not the file"):
        sbibm.load("slcp")
    path.write_bytes(b"BZh broken")
    with pytest.raises(ValueError, match=r"reference_posterior_samples\.csv\.bz2 is not the file"):
        sbibm.load("slcp")


def test_an_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"Unknown task 'sir'\. Available tasks: two_moons, slcp"):
        sbibm.load("sir")


@pytest.mark.usefixtures("float64")
def test_numbers_have_the_default_dtype() -> None:
    assert sbibm.read_csv(b"a\n0.1\n").dtype is torch.float64


def test_every_task_is_a_model_of_the_zoo() -> None:
    assert set(sbibm.TASKS) <= set(zoo.MODELS)
    assert set(sbibm.TASKS) == set(EXCERPT)


def on_this_machine() -> bool:
    folders = [Path(folder) for folder in REAL.values()] or [default_cache()]
    return all(
        any(path.is_file() for folder in folders for path, _ in file.candidates(folder))
        for file in sbibm.FILES.values()
    )


@pytest.mark.skipif(
    not on_this_machine(),
    reason="the real sbibm files are not on this machine: set PYRO_ZOO_DATA to their folder",
)
@pytest.mark.parametrize("task", sbibm.TASKS)
def test_real_files(task, monkeypatch) -> None:
    monkeypatch.delenv("PYRO_ZOO_CACHE")
    for name, folder in REAL.items():
        monkeypatch.setenv(name, folder)
    loaded = sbibm.load(task)
    dim = 5 if task == "slcp" else 2
    assert all(posterior.draws.shape == (10_000, dim) for posterior in loaded)
    # the excerpt that the tests of the programs use
    part = EXCERPT[task]
    posterior = loaded[part["number"] - 1]
    assert posterior.x.equal(torch.tensor(part["x"]))
    assert posterior.draws[:500].equal(torch.tensor(part["draws"]))
    model = zoo.make(task)
    for posterior in loaded:
        log_p = model.likelihood(posterior.draws).log_prob(posterior.x)
        assert torch.isfinite(log_p).all()

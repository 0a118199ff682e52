"""DistributedDataParallel: two processes get the gradients of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ddp_worker import CASES, NUM_ROWS, FixedNoise, build, one_step

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo processes made, each from half of the rows."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ddp_worker", str(rank), "2", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", CASES)
def test_two_processes_get_the_gradients_of_one(case: str, ranks: list[dict[str, Any]]) -> None:
    loss, gradients, parameters = one_step(case, torch.arange(NUM_ROWS), parallel=False)
    losses = [rank[case][0] for rank in ranks]
    # Each process estimates the loss of all N rows from its own; the halves differ.
    assert torch.allclose((losses[0] + losses[1]) / 2, loss)
    assert not torch.allclose(losses[0], losses[1])
    assert gradients
    for rank in ranks:
        _, found, updated = rank[case]
        assert set(found) == set(gradients) == set(parameters)
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-11), name
            assert torch.allclose(updated[name], parameters[name], rtol=1e-7, atol=1e-9), name
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


def test_the_fixed_noise_is_that_of_the_rows() -> None:
    """The oracle is honest only if the noise follows the rows, and moves the draws."""
    _, guide, x = build("stl")
    family = guide.families["data"]
    assert isinstance(family, FixedNoise)
    lam = guide.parameters_of(x)["data"].detach()
    whole = family.distribution(lam).rsample((3,))
    family.rows = torch.tensor([5, 2])
    assert torch.equal(family.distribution(lam[[5, 2]]).rsample((3,)), whole[:, [5, 2]])
    assert whole.std(0).min() > 0

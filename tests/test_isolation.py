"""The suite's own fence: a test that leaves global state changed fails, and spoils no other."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parent / "conftest.py"

# Each leak is followed by a test that sees the state it should find.
LEAKS = """
import random

import numpy
import pyro
import pytest
import torch
from torch.distributions import Distribution


def test_leaks_dtype():
    torch.set_default_dtype(torch.float64)


def test_leaks_grad_mode():
    torch.set_grad_enabled(False)


def test_leaks_validation():
    pyro.enable_validation(False)


def test_leaks_a_setting():
    pyro.settings.set(module_local_params=True)


def test_leaks_a_handler():
    pyro.poutine.block().__enter__()


@pytest.mark.usefixtures("float64")
def test_keeps_float64():
    assert torch.zeros(1).dtype is torch.float64


DRAWS = []


@pytest.mark.parametrize("turn", [1, 2])
def test_keeps_state(turn):
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert Distribution._validate_args
    assert not pyro.settings.get("module_local_params")
    assert not pyro.poutine.runtime._PYRO_STACK
    assert not list(pyro.get_param_store())
    pyro.param("left behind", torch.zeros(1))
    DRAWS.append((torch.rand(1).item(), random.random(), numpy.random.rand()))
    assert DRAWS[0] == DRAWS[-1]
"""


def test_a_leaking_test_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "test_leaks.py").write_text(LEAKS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if " test_leaks.py::" in line]
    errors = [line for line in lines if line.startswith("ERROR")]
    assert {line.split("::")[1].split(" ")[0] for line in errors} == {
        "test_leaks_dtype",
        "test_leaks_grad_mode",
        "test_leaks_validation",
        "test_leaks_a_setting",
        "test_leaks_a_handler",
    }, done.stdout
    assert not [line for line in lines if line.startswith("FAILED")], done.stdout
    assert "the default dtype is torch.float64, was torch.float32" in done.stdout

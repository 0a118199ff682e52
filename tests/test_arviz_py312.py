"""The export under ArviZ 1.x, whose DataTree needs Python >= 3.12, where torch is not installed.

Runs where ``PYRO_ZOO_PY312`` names an interpreter with numpy and ArviZ 1.x; CI makes one by
``python tests/arviz_py312_venv.py DIR``. Arrays of real exports are made here and converted there.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import guides
from guides.diagnostics.arviz_export import to_arrays
from tests import arviz_programs as programs
from tests.arviz_core_check import save_arrays

ROOT = Path(__file__).resolve().parents[1]
INTERPRETER = os.environ.get("PYRO_ZOO_PY312")

pytestmark = pytest.mark.skipif(
    INTERPRETER is None,
    reason="set PYRO_ZOO_PY312=$(python tests/arviz_py312_venv.py DIR) to test ArviZ 1.x",
)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(INTERPRETER), *args], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def test_that_interpreter_has_no_torch():
    assert run("-c", "import torch").returncode != 0
    assert run("-c", "import guides.diagnostics.arviz_arrays").returncode == 0


def test_core_and_real_exports_in_a_datatree(tmp_path: Path):
    exports = {
        "eight_schools": (programs.eight_schools, "normal", programs.EIGHT_SCHOOLS, None),
        "minibatches": (programs.two_levels, "multivariate_normal", (torch.randn(7),), 3),
        "nested": (programs.nested, "normal", (torch.randn(2, 5), torch.randn(5)), None),
    }
    paths = []
    for name, (model, guide_name, args, batch_size) in exports.items():
        guide = guides.make(guide_name, model, *args)
        arrays = to_arrays(model, guide, *args, num_samples=200, batch_size=batch_size)
        paths.append(tmp_path / f"{name}.npz")
        save_arrays(paths[-1], *arrays)
    finished = run("tests/arviz_core_check.py", *map(str, paths))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("ok export") == 3
    assert ", 0 failed" in finished.stdout
    assert "arviz 1." in finished.stdout

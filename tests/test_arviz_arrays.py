"""The torch-free core of the ArviZ export; the checks themselves run on Python 3.12 too."""

import builtins
from pathlib import Path

import numpy as np
import pytest

from guides.diagnostics.arviz_arrays import Labeled, from_arrays
from tests.arviz_core_check import CHECKS, conjugate, load_arrays, save_arrays


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_core(check):
    check()


def test_arrays_survive_the_way_to_another_interpreter(tmp_path: Path):
    path = tmp_path / "export.npz"
    save_arrays(path, conjugate(), {"data": range(30)}, {"/": {"guide": "normal"}})
    groups, coords, attrs = load_arrays(path)
    assert coords == {"data": list(range(30))}
    assert attrs == {"/": {"guide": "normal"}}
    for group, variables in conjugate().items():
        for name, array in variables.items():
            assert groups[group][name].dims == array.dims
            np.testing.assert_array_equal(groups[group][name].values, array.values)


def test_without_arviz_the_error_names_the_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "arviz":
            raise ModuleNotFoundError("No module named 'arviz'", name="arviz")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    groups = {"posterior": {"z": Labeled(np.zeros((1, 2)), ("chain", "draw"))}}
    with pytest.raises(ImportError, match="pip install arviz"):
        from_arrays(groups)

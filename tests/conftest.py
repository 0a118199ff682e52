"""Every test starts from the same state and must leave it as it was.

Pyro's parameter store, the random number generators, torch's default dtype, the validation flags
and the grad mode are global: a test that changes one of them changes the tests after it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer.util import is_validation_enabled
from torch.distributions import Distribution


def global_state() -> dict[str, Any]:
    """What a test must not leave changed, by the name it is reported under."""
    return {
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "Pyro's inference validation": is_validation_enabled(),
        "Pyro's distribution validation": pyro.distributions.is_validation_enabled(),
        "torch's distribution validation": Distribution._validate_args,
        "Pyro's module_local_params": pyro.settings.get("module_local_params"),
        "Pyro's handler stack": len(pyro.poutine.runtime._PYRO_STACK),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each difference between two states."""
    return [
        f"{name} is {after[name]}, was {value}"
        for name, value in before.items()
        if after[name] != value
    ]


def restore(state: dict[str, Any]) -> None:
    """Undo what can be undone, so that one faulty test does not fail the rest."""
    torch.set_default_dtype(state["the default dtype"])
    torch.set_grad_enabled(state["the grad mode"])
    pyro.enable_validation(state["Pyro's inference validation"])
    pyro.settings.set(module_local_params=state["Pyro's module_local_params"])
    del pyro.poutine.runtime._PYRO_STACK[state["Pyro's handler stack"] :]
    torch.set_num_threads(state["the number of threads"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Seed 0, an empty parameter store, validation on; a test that leaves them changed fails."""
    before = global_state()
    # Pyro's seed is Python's and numpy's too.
    rng = pyro.util.get_rng_state()
    try:
        with pyro.get_param_store().scope(), pyro.validation_enabled(True):
            pyro.set_rng_seed(0)
            inside = global_state()
            yield
            changed = changes(inside, global_state())
    finally:
        pyro.util.set_rng_state(rng)
        restore(before)
    if changed:
        pytest.fail(
            f"The test left global state changed: {'; '.join(changed)}. Use a context manager or "
            "the fixture float64."
        )


@pytest.fixture
def float64() -> Iterator[None]:
    """Tensors and models made in the test are float64; `pytest.mark.usefixtures("float64")`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no data folder, no proxy between this process and its own server."""
    monkeypatch.delenv("PYRO_ZOO_DATA", raising=False)
    monkeypatch.delenv("PYRO_ZOO_MIRROR", raising=False)
    monkeypatch.setenv("PYRO_ZOO_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """A web server on this machine that serves an empty folder."""
    from tests.file_server import serving

    with serving(tmp_path / "served") as running:
        yield running

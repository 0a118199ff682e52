"""What the ArviZ core promises, as plain functions that need neither torch nor pytest.

They need numpy, arviz and a netCDF backend (h5netcdf with h5py).

``python tests/arviz_core_check.py [FILE.npz ...]`` runs every check with the ArviZ that is
installed, so that the same promises are checked on Python 3.11 with 0.x (through
``test_arviz_arrays.py``) and on Python 3.12 with 1.x (through ``test_arviz_py312.py``). A FILE
holds the arrays of a real export, written on the side that has torch by :func:`save_arrays`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warnings.simplefilter("error")
    # 2026-11: ArviZ 0.23 announces its refactoring on the first import of each day.
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)

import arviz as az
import numpy as np

from guides.diagnostics.arviz_arrays import (
    FIXED_GROUPS,
    SAMPLED_GROUPS,
    Labeled,
    from_arrays,
)

IS_TREE = int(az.__version__.split(".")[0]) >= 1
NUM_DRAWS, NUM_ROWS = 500, 30


def save_arrays(path: Path, groups: dict, coords: dict, attrs: dict) -> None:
    """Write the arguments of ``from_arrays`` to one ``.npz`` file."""
    arrays, dims = {}, {}
    for group, variables in groups.items():
        for name, array in variables.items():
            arrays[f"{group}/{name}"] = array.values
            dims[f"{group}/{name}"] = array.dims
    meta = {"dims": dims, "coords": {k: np.asarray(v).tolist() for k, v in coords.items()}}
    np.savez(path, __meta__=np.array(json.dumps({**meta, "attrs": attrs})), **arrays)


def load_arrays(path: Path) -> tuple[dict, dict, dict]:
    """Inverse of :func:`save_arrays`."""
    groups: dict[str, dict[str, Labeled]] = {}
    with np.load(path) as file:
        meta = json.loads(str(file["__meta__"]))
        for key, dims in meta["dims"].items():
            group, name = key.split("/")
            groups.setdefault(group, {})[name] = Labeled(file[key], tuple(dims))
    return groups, meta["coords"], meta["attrs"]


def conjugate() -> dict[str, dict[str, Labeled]]:
    """Exact draws for ``mu ~ N(0, 1), x[n] ~ N(mu, 1)``, with lp and log_q in closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1.0, NUM_ROWS)
    precision = 1.0 + NUM_ROWS
    mean, sd = x.sum() / precision, precision**-0.5
    mu = rng.normal(mean, sd, (1, NUM_DRAWS))
    log_likelihood = normal_log_density(x, mu[..., None], 1.0)
    log_prior = normal_log_density(mu, 0.0, 1.0)
    sampled = ("chain", "draw")
    rows = (*sampled, "data")
    predictive = mu[..., None] + rng.normal(size=(1, NUM_DRAWS, NUM_ROWS))
    prior = rng.normal(size=(1, 100))
    return {
        "posterior": {"mu": Labeled(mu, sampled)},
        "posterior_predictive": {"x": Labeled(predictive, rows)},
        "prior": {"mu": Labeled(prior, sampled)},
        "prior_predictive": {
            "x": Labeled(prior[..., None] + rng.normal(size=(1, 100, NUM_ROWS)), rows)
        },
        "log_likelihood": {"x": Labeled(log_likelihood, rows)},
        "log_prior": {"mu": Labeled(log_prior, sampled)},
        "sample_stats": {
            "lp": Labeled(log_likelihood.sum(-1) + log_prior, sampled),
            "log_q": Labeled(normal_log_density(mu, mean, sd), sampled),
        },
        "observed_data": {"x": Labeled(x, ("data",))},
        "constant_data": {"t": Labeled(np.arange(NUM_ROWS), ("data",))},
    }


def normal_log_density(x: np.ndarray, loc: np.ndarray | float, scale: float) -> np.ndarray:
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def raises(error: type[Exception], text: str, groups: dict, **options: object) -> None:
    try:
        from_arrays(groups, **options)
    except error as caught:
        if text not in str(caught):
            raise AssertionError(f"message {str(caught)!r} lacks {text!r}") from caught
        return
    raise AssertionError(f"{error.__name__} ({text!r}) was not raised")


def group_names(data: object) -> set[str]:
    return set(data.children) if IS_TREE else set(data.groups())


def posterior(values: np.ndarray, *dims: str) -> dict:
    return {"posterior": {"z": Labeled(values, dims)}}


def check_every_group_arrives_in_the_container_of_the_installed_arviz():
    data = from_arrays(conjugate(), attrs={"/": {"inference_library": "pyro-ppl"}})
    assert type(data).__name__ == ("DataTree" if IS_TREE else "InferenceData")
    assert group_names(data) == {*SAMPLED_GROUPS, *FIXED_GROUPS}
    for group, variables in conjugate().items():
        assert data[group].attrs["inference_library"] == "pyro-ppl"
        for name, array in variables.items():
            assert data[group][name].dims == array.dims
            np.testing.assert_array_equal(data[group][name].values, array.values)


def check_length_one_axes_stay_and_floats_are_widened():
    single = np.ones((1, 3, 1, 2, 1), np.float32)
    data = from_arrays(posterior(single, "chain", "draw", "a", "b", "c"))
    assert data["posterior"]["z"].shape == (1, 3, 1, 2, 1)
    assert data["posterior"]["z"].dtype == np.float64
    whole = from_arrays({"observed_data": {"n": Labeled(np.arange(3), ("row",))}})
    assert whole["observed_data"]["n"].dtype.kind == "i"


def check_labels_and_counting_coordinates():
    data = from_arrays(
        posterior(np.zeros((1, 2, 3, 2)), "chain", "draw", "school", "kind"),
        coords={"school": ["a", "b", "c"]},
    )
    z = data["posterior"]["z"]
    assert list(z.coords["school"].values) == ["a", "b", "c"]
    assert list(z.coords["kind"].values) == [0, 1]
    assert list(z.coords["draw"].values) == [0, 1]


def check_a_group_without_variables_is_left_out():
    data = from_arrays({**posterior(np.zeros((1, 2)), "chain", "draw"), "constant_data": {}})
    assert group_names(data) == {"posterior"}


def check_prior_may_have_its_own_number_of_draws_but_log_likelihood_may_not():
    groups = conjugate()
    groups["prior"] = {"mu": Labeled(np.zeros((1, 7)), ("chain", "draw"))}
    groups["prior_predictive"] = {}
    assert from_arrays(groups)["prior"]["mu"].shape == (1, 7)
    groups["log_prior"] = {"mu": Labeled(np.zeros((1, 7)), ("chain", "draw"))}
    raises(ValueError, "'draw' has 500 entries", groups)


def check_arviz_functions_run_on_the_result():
    data = from_arrays(conjugate())
    summary = az.summary(data)
    assert len(summary) == 1
    loo = az.loo(data, pointwise=True)
    total = loo.elpd if IS_TREE else loo.elpd_loo
    assert abs(float(total) - exact_loo(conjugate())) < 0.2
    if IS_TREE:
        stats = data["sample_stats"]
        corrected = az.loo_approximate_posterior(data, log_p=stats["lp"], log_q=stats["log_q"])
        assert abs(float(corrected.elpd) - float(loo.elpd)) < 1e-6
        assert "mu" in az.psense_summary(data).index


def exact_loo(groups: dict) -> float:
    """The exact leave-one-out log predictive density of the conjugate model."""
    x = groups["observed_data"]["x"].values
    precision = 1.0 + NUM_ROWS - 1.0
    means = (x.sum() - x) / precision
    return float(normal_log_density(x, means, (1 + 1 / precision) ** 0.5).sum())


def check_lp_minus_log_q_of_exact_draws_is_the_constant_log_evidence():
    stats = from_arrays(conjugate())["sample_stats"]
    gap = (stats["lp"] - stats["log_q"]).values
    x = conjugate()["observed_data"]["x"].values
    covariance = np.eye(NUM_ROWS) + 1.0
    quadratic = x @ np.linalg.solve(covariance, x)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    np.testing.assert_allclose(gap, -0.5 * (quadratic + log_det), atol=1e-10)


def check_netcdf_round_trip():
    data = from_arrays(conjugate(), attrs={"/": {"num_samples": NUM_DRAWS, "guide": "normal"}})
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "data.nc")
        data.to_netcdf(path)
        back = az.from_netcdf(path)
        assert group_names(back) == {*SAMPLED_GROUPS, *FIXED_GROUPS}
        assert back["posterior"].attrs["num_samples"] == NUM_DRAWS
        back.close()


def check_clear_errors():
    draws = np.zeros((1, 4, 3))
    sampled = ("chain", "draw")
    raises(ValueError, "At least one group", {})
    raises(ValueError, "schema", {"posteriors": {"z": Labeled(draws, (*sampled, "a"))}})
    raises(ValueError, "schema", posterior(draws, *sampled, "a"), attrs={"typo": {}})
    raises(ValueError, "Name every axis once", posterior(draws, *sampled))
    raises(ValueError, "begin with 'chain', 'draw'", posterior(draws, "draw", "chain", "a"))
    raises(ValueError, "begin with 'chain', 'draw'", posterior(draws[0], "draw", "a"))
    raises(
        ValueError, "repeats a dimension", posterior(np.zeros((1, 4, 3, 3)), *sampled, "a", "a")
    )
    raises(ValueError, "is a variable", posterior(draws, *sampled, "z"))
    raises(ValueError, "without '/'", {"posterior": {"a/z": Labeled(draws, (*sampled, "a"))}})
    raises(ValueError, "without '/'", posterior(draws, *sampled, "a/b"))
    raises(ValueError, "has no entries", posterior(np.zeros((1, 0)), *sampled))
    raises(TypeError, "wrap it", {"posterior": {"z": draws}})
    raises(TypeError, "detach", {"posterior": {"z": Labeled([[1.0]], sampled)}})
    raises(TypeError, "object", posterior(np.array([[None]]), *sampled))
    raises(
        ValueError,
        "no 'chain' or 'draw'",
        {"observed_data": {"x": Labeled(np.zeros(4), ("draw",))}},
    )
    raises(
        ValueError,
        "different names",
        {
            **posterior(draws, *sampled, "a"),
            "log_likelihood": {"x": Labeled(np.zeros((1, 4, 5)), (*sampled, "a"))},
        },
    )
    for bad in (np.nan, np.inf):
        raises(
            ValueError,
            "1 of its 4 entries",
            {"log_likelihood": {"x": Labeled(np.array([[0.0, 1.0, bad, 2.0]]), sampled)}},
        )
        raises(
            ValueError,
            "lp",
            {"sample_stats": {"lp": Labeled(np.array([[0.0, bad]]), sampled)}},
        )
    good = posterior(draws, *sampled, "a")
    raises(ValueError, "3 entries but 2 labels", good, coords={"a": [0, 1]})
    raises(ValueError, "which no variable has", good, coords={"b": [0, 1]})
    raises(ValueError, "counts the draws", good, coords={"draw": [0, 1, 2, 3]})
    raises(ValueError, "one list", good, coords={"a": [[0, 1, 2]]})
    raises(TypeError, "netCDF", good, attrs={"posterior": {"flag": True}})
    raises(TypeError, "netCDF", good, attrs={"/": {"nothing": None}})


def check_importing_the_core_loads_no_torch_and_no_pyro():
    import subprocess

    code = (
        "import sys, guides.diagnostics.arviz_arrays as core\n"
        "heavy = {'torch', 'pyro', 'arviz', 'xarray', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {sorted(heavy)}' if heavy else 0)"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def check_export(path: Path) -> None:
    """Arrays of a real export convert here as well, and ArviZ works on them."""
    with warnings.catch_warnings():
        _check_export(path)


def _check_export(path: Path) -> None:
    groups, coords, attrs = load_arrays(path)
    data = from_arrays(groups, coords=coords, attrs=attrs)
    assert group_names(data) == set(groups)
    assert "R-hat" in data["posterior"].attrs["warning"]
    for group, variables in groups.items():
        for name, array in variables.items():
            assert data[group][name].dims == array.dims, (group, name)
    assert len(az.summary(data)) > 0
    # The approximation may be poor: that ArviZ says so is right, and not what is checked here.
    warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto", UserWarning)
    for name in groups["log_likelihood"]:
        assert np.isfinite(float(az.loo(data, var_name=name)["elpd" if IS_TREE else "elpd_loo"]))
        if IS_TREE:
            stats = data["sample_stats"]
            corrected = az.loo_approximate_posterior(
                data, log_p=stats["lp"], log_q=stats["log_q"], var_name=name
            )
            assert np.isfinite(float(corrected.elpd))


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check
    for name, check in sorted(globals().items())
    if name.startswith("check_") and name != "check_export"
}


def main(paths: list[str]) -> int:
    failed = 0
    for name, check in CHECKS.items():
        failed += _report(name, check)
    for path in paths:
        failed += _report(f"export {path}", lambda path=path: check_export(Path(path)))
    print(f"arviz {az.__version__}, python {sys.version.split()[0]}")
    print(f"{len(CHECKS) + len(paths) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _report(name: str, check: Callable[[], None]) -> int:
    try:
        check()
    except Exception as error:
        print(f"FAILED {name}: {type(error).__name__}: {error}")
        return 1
    print(f"ok {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

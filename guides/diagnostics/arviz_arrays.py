"""Labeled NumPy arrays to the container of the installed ArviZ.

The conversion core of :func:`guides.diagnostics.to_arviz`. It knows nothing of Pyro and imports no
torch, so the same code is tested on Python 3.11 with ArviZ 0.x, whose container is
``arviz.InferenceData``, and on Python 3.12 with ArviZ 1.x, whose container is
``xarray.DataTree``. Datasets are built here rather than by ``from_dict``, whose two generations
disagree: 0.x drops ``log_prior`` without a word, and both guess which axes are samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["FIXED_GROUPS", "SAMPLED_GROUPS", "SAMPLE_DIMS", "Labeled", "from_arrays"]

SAMPLE_DIMS = ("chain", "draw")

# In the order of the ArviZ schema. The first five share the posterior's draws one by one.
SAMPLED_GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "prior",
    "prior_predictive",
)
FIXED_GROUPS = ("observed_data", "constant_data")

_ALIGNED = SAMPLED_GROUPS[:5]
_LOG_DENSITIES = {"log_likelihood": None, "log_prior": None, "sample_stats": ("lp", "log_q")}
_SCHEMA = "https://python.arviz.org/en/latest/schema/schema.html"


class Labeled(NamedTuple):
    """An array with one name for each axis.

    Args:
        values: The numbers.
        dims: Names of the axes; in a sampled group the first two are ``"chain"`` and ``"draw"``.
    """

    values: NDArray[Any]
    dims: tuple[str, ...]


def from_arrays(
    groups: Mapping[str, Mapping[str, Labeled]],
    *,
    coords: Mapping[str, ArrayLike] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Build ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (ArviZ 1.x).

    Nothing is squeezed, reordered or guessed; floats become ``float64``. A group without
    variables is left out. Dimensions without coordinates get ``0, 1, 2, ...``.

    Args:
        groups: ``{group: {variable: Labeled}}``, the groups being those of
            :data:`SAMPLED_GROUPS` (axes ``chain, draw, ...``) and :data:`FIXED_GROUPS`.
        coords: ``{dimension: labels}``, one label an entry.
        attrs: ``{group: {key: text or number}}``; the key ``"/"`` holds those of all groups.

    Returns:
        The container of the installed ArviZ.

    Raises:
        TypeError: For values that are not numeric NumPy arrays, or attributes that a file
            cannot hold.
        ValueError: For an unknown group, dims that do not fit their array, one dimension with
            two sizes, labels of the wrong length, a clash of names, or NaN in a log density.
        ImportError: Without ArviZ.

    Example:
        >>> mu = Labeled(np.zeros((1, 100, 2)), ("chain", "draw", "school"))
        >>> data = from_arrays({"posterior": {"mu": mu}}, coords={"school": ["a", "b"]})
        >>> data["posterior"]["mu"].sel(school="b").shape
        (1, 100)
    """
    import xarray

    groups = {group: dict(variables) for group, variables in groups.items() if variables}
    coords = {dim: _labels(dim, labels) for dim, labels in (coords or {}).items()}
    attrs = attrs or {}
    _check_groups(groups, attrs)
    sizes = _check_sizes(groups)
    _check_coords(coords, sizes)
    _check_names(groups, {*sizes, *coords})
    shared = {"created_at": datetime.now(timezone.utc).isoformat(), **attrs.get("/", {})}
    datasets = {}
    for group in (*SAMPLED_GROUPS, *FIXED_GROUPS):
        if group not in groups:
            continue
        datasets[group] = xarray.Dataset(
            {name: (array.dims, _widen(array.values)) for name, array in groups[group].items()},
            coords={
                dim: coords.get(dim, np.arange(size))
                for array in groups[group].values()
                for dim, size in zip(array.dims, array.values.shape, strict=True)
            },
            attrs=_check_attrs(group, {**shared, **attrs.get(group, {})}),
        )
    return _contain(datasets, _check_attrs("/", shared))


def _contain(datasets: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    import xarray

    arviz = _import_arviz()
    # By version: in 1.x, `hasattr(arviz, "InferenceData")` raises a MigrationWarning.
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(attrs=attrs, **datasets)
    tree = xarray.DataTree.from_dict(dict(datasets))
    tree.attrs.update(attrs)
    return tree


def _import_arviz() -> Any:
    try:
        import arviz
    except ModuleNotFoundError as error:
        if error.name != "arviz":
            raise
        raise ImportError(
            "The export to ArviZ needs the package arviz, which is not installed. "
            "Install it: pip install arviz"
        ) from error
    return arviz


def _check_groups(
    groups: Mapping[str, Mapping[str, Labeled]], attrs: Mapping[str, Mapping[str, Any]]
) -> None:
    if not groups:
        raise ValueError("At least one group with one variable is needed; got none.")
    known = (*SAMPLED_GROUPS, *FIXED_GROUPS)
    for group in (*groups, *attrs):
        if group not in known and group != "/":
            raise ValueError(
                f"Groups are those of the ArviZ schema ({_SCHEMA}): {', '.join(known)}. "
                f"Got {group!r}."
            )
    for group, variables in groups.items():
        for name, array in variables.items():
            _check_array(group, name, array)


def _check_array(group: str, name: str, array: Labeled) -> None:
    where = f"{name!r} of group {group!r}"
    if not isinstance(array, Labeled):
        raise TypeError(f"{where} is a {type(array).__name__}; wrap it: Labeled(values, dims).")
    values, dims = array
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biufc":
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise TypeError(
            f"{where} is {kind}; a numeric NumPy array is needed. "
            "For a torch tensor: tensor.detach().cpu().numpy()."
        )
    if len(dims) != values.ndim:
        raise ValueError(
            f"{where} has shape {values.shape} but {len(dims)} dims {tuple(dims)}. "
            "Name every axis once."
        )
    if len(set(dims)) != len(dims):
        raise ValueError(f"{where} repeats a dimension: {tuple(dims)}. Give each its own name.")
    leading = tuple(dims[:2]) == SAMPLE_DIMS
    if group in SAMPLED_GROUPS and not leading:
        raise ValueError(
            f"{where} has dims {tuple(dims)}; in this group they begin with 'chain', 'draw'. "
            "One set of independent draws is one chain: values[None]."
        )
    if group in FIXED_GROUPS and set(dims) & set(SAMPLE_DIMS):
        raise ValueError(f"{where} has dims {tuple(dims)}; data has no 'chain' or 'draw'.")
    if group in _LOG_DENSITIES:
        _check_log_density(where, name, values, _LOG_DENSITIES[group])


def _check_log_density(
    where: str, name: str, values: NDArray[Any], only: Sequence[str] | None
) -> None:
    if only is not None and name not in only:
        return
    bad = np.isnan(values) | np.isposinf(values)
    if bad.any():
        raise ValueError(
            f"{where} is a log density, but {int(bad.sum())} of its {values.size} entries are "
            "NaN or +inf, which PSIS-LOO would spread over every result. "
            "Look for parameters that diverged, or data outside the support."
        )


def _check_sizes(groups: Mapping[str, Mapping[str, Labeled]]) -> dict[str, int]:
    """One size for every dimension; draws are counted once for the groups that share them."""
    seen: dict[tuple[str, str], tuple[int, str]] = {}
    for group, variables in groups.items():
        for name, (values, dims) in variables.items():
            for dim, size in zip(dims, values.shape, strict=True):
                scope = "" if dim not in SAMPLE_DIMS or group in _ALIGNED else "prior"
                first, owner = seen.setdefault((scope, dim), (size, f"{group}/{name}"))
                if first != size:
                    raise ValueError(
                        f"Dimension {dim!r} has {first} entries in {owner} and {size} in "
                        f"{group}/{name}. Give axes of different lengths different names."
                    )
                if size == 0:
                    raise ValueError(
                        f"Dimension {dim!r} of {group}/{name} has no entries. "
                        "Leave an empty variable out."
                    )
    return {dim: size for (_, dim), (size, _) in seen.items()}


def _labels(dim: str, labels: ArrayLike) -> NDArray[Any]:
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype == object:
        raise ValueError(
            f"Coordinates of {dim!r} must be one list of numbers or of texts; got "
            f"shape {array.shape} and type {array.dtype}."
        )
    return array


def _check_coords(coords: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> None:
    for dim, labels in coords.items():
        if dim in SAMPLE_DIMS:
            raise ValueError(f"{dim!r} counts the draws; give it no labels of its own.")
        if dim not in sizes:
            raise ValueError(
                f"Coordinates are given for {dim!r}, which no variable has. "
                f"Dimensions: {', '.join(sizes)}."
            )
        if len(labels) != sizes[dim]:
            raise ValueError(
                f"Dimension {dim!r} has {sizes[dim]} entries but {len(labels)} labels. "
                "Give one label an entry."
            )


def _check_names(groups: Mapping[str, Mapping[str, Labeled]], dims: set[str]) -> None:
    for group, variables in groups.items():
        for name in variables:
            if name in dims or name in SAMPLE_DIMS:
                raise ValueError(
                    f"{name!r} is a variable of group {group!r} and a dimension; xarray would "
                    f"take it for coordinates. Rename the dimension, say to '{name}_dim'."
                )
    for name in {*dims, *(name for variables in groups.values() for name in variables)}:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(
                f"{name!r} cannot name a variable or a dimension: a text without '/' is needed, "
                "because '/' separates groups."
            )


def _check_attrs(group: str, attrs: dict[str, Any]) -> dict[str, Any]:
    for key, value in attrs.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, (str, int, float)) for i in items):
            raise TypeError(
                f"Attribute {key!r} of {group!r} is {value!r}; a netCDF file holds texts, "
                "numbers and lists of them only. Write it as a text."
            )
    return attrs


def _widen(values: NDArray[Any]) -> NDArray[Any]:
    wide = {"f": np.float64, "c": np.complex128}.get(values.dtype.kind)
    return values if wide is None else values.astype(wide, copy=False)

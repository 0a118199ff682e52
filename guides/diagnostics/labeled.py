"""Labeled arrays in the groups of the ArviZ schema, and what they must satisfy. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIXED_GROUPS", "SAMPLED_GROUPS", "SAMPLE_DIMS", "Labeled", "check"]

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


def check(
    groups: Mapping[str, Mapping[str, Labeled]],
    coords: Mapping[str, NDArray[Any]],
    attrs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise for what no container should hold; see :func:`guides.diagnostics.arviz_arrays`.

    Args:
        groups: Labeled arrays by group and variable.
        coords: Labels by dimension.
        attrs: Attributes by group, ``"/"`` for all.

    Raises:
        TypeError: For values that are not numeric arrays, or attributes a file cannot hold.
        ValueError: For shapes, names or values that do not fit.
    """
    _check_groups(groups, attrs)
    sizes = _check_sizes(groups)
    _check_coords(coords, sizes)
    _check_names(groups, {*sizes, *coords})
    for group, items in attrs.items():
        _check_attrs(group, items)


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


def _check_coords(coords: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> None:
    for dim, labels in coords.items():
        if labels.ndim != 1 or labels.dtype == object:
            raise ValueError(
                f"Coordinates of {dim!r} must be one list of numbers or of texts; got "
                f"shape {labels.shape} and type {labels.dtype}."
            )
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


def _check_attrs(group: str, attrs: Mapping[str, Any]) -> None:
    for key, value in attrs.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, (str, int, float)) for i in items):
            raise TypeError(
                f"Attribute {key!r} of {group!r} is {value!r}; a netCDF file holds texts, "
                "numbers and lists of them only. Write it as a text."
            )

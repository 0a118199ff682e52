"""Labeled NumPy arrays to the container of the installed ArviZ.

The conversion core of :func:`guides.diagnostics.to_arviz`. It knows nothing of Pyro and imports no
torch, so the same code is tested on Python 3.11 with ArviZ 0.x, whose container is
``arviz.InferenceData``, and on Python 3.12 with ArviZ 1.x, whose container is
``xarray.DataTree``. Datasets are built here rather than by ``from_dict``, whose two generations
disagree: 0.x drops ``log_prior`` without a word, and both guess which axes are samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from guides.diagnostics.labeled import FIXED_GROUPS, SAMPLE_DIMS, SAMPLED_GROUPS, Labeled, check

__all__ = ["FIXED_GROUPS", "SAMPLED_GROUPS", "SAMPLE_DIMS", "Labeled", "from_arrays"]


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
    labels = {dim: np.asarray(given) for dim, given in (coords or {}).items()}
    attrs = attrs or {}
    check(groups, labels, attrs)
    shared = {"created_at": datetime.now(UTC).isoformat(), **attrs.get("/", {})}
    datasets = {}
    for group in (*SAMPLED_GROUPS, *FIXED_GROUPS):
        if group not in groups:
            continue
        datasets[group] = xarray.Dataset(
            {name: (array.dims, _widen(array.values)) for name, array in groups[group].items()},
            coords={
                dim: labels.get(dim, np.arange(size))
                for array in groups[group].values()
                for dim, size in zip(array.dims, array.values.shape, strict=True)
            },
            attrs={
                **shared,
                "sample_dims": list(SAMPLE_DIMS) if group in SAMPLED_GROUPS else [],
                **attrs.get(group, {}),
            },
        )
    return _contain(datasets, shared)


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


def _widen(values: NDArray[Any]) -> NDArray[Any]:
    wide = {"f": np.float64, "c": np.complex128}.get(values.dtype.kind)
    return values if wide is None else values.astype(wide, copy=False)

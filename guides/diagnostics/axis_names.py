"""Names for the axes of a site's value: plates, then events.

    value axes  =  batch (one axis a plate)  +  event

Batch axes are named by the plates that own them, event axes by ``infer={"event_dims": [...]}`` at
the site; what is left is numbered ``<site>_dim_0, <site>_dim_1, ...`` from the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Axes", "site_axes"]

Frame = Any  # pyro's CondIndepStackFrame


@dataclass(frozen=True)
class Axes:
    """Axes of one site, batch first.

    Args:
        names: One name an axis; None marks an axis that exists only because a plate further left
            needs the place, and that is dropped.
        num_batch: How many of them are batch axes.
        row: Position of the data plate's axis, None outside the data plate.
    """

    names: tuple[str | None, ...]
    num_batch: int
    row: int | None

    @property
    def padding(self) -> tuple[int, ...]:
        """Positions to drop."""
        return tuple(i for i, name in enumerate(self.names) if name is None)

    def batch(self) -> Axes:
        """The axes of a log density, whose event axes are summed."""
        return Axes(self.names[: self.num_batch], self.num_batch, self.row)


def site_axes(
    site: str,
    shape: Sequence[int],
    event_dim: int,
    frames: Sequence[Frame],
    infer: Mapping[str, Any],
    data_plate: str | None,
    *,
    deterministic: bool = False,
) -> Axes:
    """Name the axes of a value.

    Args:
        site: Name of the site.
        shape: Shape of its value, batch and event.
        event_dim: Number of event axes.
        frames: The site's ``cond_indep_stack``.
        infer: The site's ``infer``, where ``event_dims`` may name the event axes.
        data_plate: Name of the data plate.
        deterministic: The site is ``pyro.deterministic``, which by default declares all axes as
            event: then plates are found by their sizes, from the left where that fits.

    Raises:
        ValueError: If ``event_dims`` has not one name an event axis.
    """
    plates = {frame.dim: frame for frame in frames if frame.vectorized}
    if deterministic:
        event_dim = _event_dim(shape, event_dim, plates)
    num_batch = len(shape) - event_dim
    names: list[str | None] = []
    numbered = 0
    row = None
    for position, size in enumerate(shape[:num_batch]):
        dim = position - num_batch
        if dim in plates:
            names.append(plates[dim].name)
            row = position if plates[dim].name == data_plate else row
        elif size == 1 and any(other < dim for other in plates):
            names.append(None)
        else:
            names.append(f"{site}_dim_{numbered}")
            numbered += 1
    given = infer.get("event_dims")
    if given is None:
        names += [f"{site}_dim_{numbered + i}" for i in range(event_dim)]
    else:
        if isinstance(given, str) or len(given) != event_dim:
            raise ValueError(
                f"Site {site!r} has {event_dim} event dimensions, but infer['event_dims'] is "
                f"{given!r}. Give a list with one name for each."
            )
        names += list(given)
    return Axes(tuple(names), num_batch, row)


def _event_dim(shape: Sequence[int], declared: int, plates: Mapping[int, Frame]) -> int:
    """Event axes of a deterministic value, whose plates Pyro does not keep."""
    if not plates:
        return declared
    depth = -min(plates)

    def fits(event_dim: int) -> bool:
        num_batch = len(shape) - event_dim
        return num_batch >= depth and all(
            shape[num_batch + dim] == frame.size for dim, frame in plates.items()
        )

    # From the left: an (N, 3) value in a plate of N = 3 rows has its rows first.
    candidates = [declared, *range(len(shape) - depth, -1, -1)]
    return next((e for e in candidates if 0 <= e < len(shape) and fits(e)), declared)

"""Sites and groups of sites: where latents live, and how they are packed into one vector.

Sites are packed unconstrained through ``biject_to(support)``, site by site in the order of the
program; the log-determinant is kept at each site's own plates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

__all__ = ["Group", "Observed", "Plate", "Site"]


@dataclass(frozen=True)
class Plate:
    """A vectorized plate as one call sees it.

    Args:
        name: Name of the plate.
        dim: Its batch dimension, negative.
        num_rows: Rows in this call (B).
        size: Rows in all (N); ``size / num_rows`` is the plate's scale.
        index: Row numbers ``(B,)`` of a subsample, None for the full plate.
        random: Whether the program itself draws the subsample.
    """

    name: str
    dim: int
    num_rows: int
    size: int
    index: Tensor | None = None
    random: bool = False

    @property
    def scale(self) -> float:
        """The factor N/B by which the plate multiplies the log density of its rows."""
        return self.size / self.num_rows


@dataclass(frozen=True)
class Site:
    """One latent site: where its values live and how they are packed.

    Args:
        name: Name of the site.
        family: Class name of its distribution.
        batch_shape: Batch shape under the plates of this call.
        event_dim: Number of event dimensions of the constrained value.
        shape: Shape of the constrained value, ``batch_shape + event_shape``.
        unconstrained_event: Event shape of the unconstrained value.
        transform: Bijection from unconstrained to constrained values; None where it is identity.
        row_dim: Batch dimension of the data plate, None for a global site.
        plates: The plates of the site, outermost first.
        inner: Batch dimensions that are packed, as ``(dim, size)``.
        masked: Whether a mask switches part of the site off.
        fn: The distribution of the site in this trace.
        mask: The mask of the handlers around the site, at its batch shape; None where there is
            none.
    """

    name: str
    family: str
    batch_shape: torch.Size
    event_dim: int
    shape: torch.Size
    unconstrained_event: torch.Size
    transform: Transform | None
    row_dim: int | None
    plates: tuple[Plate, ...]
    inner: tuple[tuple[int, int], ...]
    masked: bool
    dtype: torch.dtype
    device: torch.device
    fn: Any = field(repr=False, compare=False)
    mask: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """Number of packed coordinates, of one row where the site is in the data plate."""
        return prod(size for _, size in self.inner) * prod(self.unconstrained_event)

    def place(self, packed: Tensor) -> Tensor:
        """Bring a packed slice into the site's own shape.

        Args:
            packed: ``left + (B, 1, ..., 1) + (size,)`` in the data plate (B at the plate's
                dimension), ``left + (size,)`` for a global site.

        Returns:
            ``left + batch_shape + unconstrained_event``, with dimensions of size one between.
        """
        event = len(self.unconstrained_event)
        inner = [size for _, size in self.inner]
        value = packed.reshape((*packed.shape[:-1], *inner, *self.unconstrained_event))
        num_batch = packed.dim() - 1
        depth = len(self.batch_shape)
        if num_batch < depth:
            value = value.reshape((1,) * (depth - num_batch) + value.shape)
            num_batch = depth
        if not inner:
            return value
        slots = {num_batch + dim: num_batch + j for j, (dim, _) in enumerate(self.inner)}
        order = [slots.get(i, i) for i in range(num_batch)]
        order += range(num_batch + len(inner), num_batch + len(inner) + event)
        value = value.permute(*order, *slots)
        return value.reshape(value.shape[: num_batch + event])

    def flatten(self, value: Tensor) -> Tensor:
        """Pack an unconstrained value of shape ``batch_shape + unconstrained_event``.

        Returns:
            ``(B, size)`` in the data plate, ``(size,)`` for a global site.
        """
        if self.row_dim is None:
            return value.reshape(self.size)
        rows = len(self.batch_shape) + self.row_dim
        return value.movedim(rows, 0).reshape(value.shape[rows], self.size)

    def constrain(self, unconstrained: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map to the support; also the log-determinant at the site's plates (None for zero).

        Where the mask of the site is off the log-determinant is zero, as its density is.
        """
        if self.transform is None:
            return unconstrained, None
        value = self.transform(unconstrained)
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        extra = log_det.dim() - (value.dim() - self.event_dim)
        log_det = log_det.flatten(-extra).sum(-1) if extra else log_det
        if self.mask is not None:
            log_det = torch.where(self.mask, log_det, torch.zeros_like(log_det))
        return value, log_det

    def unconstrain(self, value: Tensor) -> Tensor:
        """Inverse of :meth:`constrain`, without the log-determinant."""
        return value if self.transform is None else self.transform.inv(value)

    def rows(self, term: Tensor) -> Tensor:
        """Sum a term at the site's batch shape to ``(B,)``, or to a scalar for a global site."""
        if self.row_dim is None:
            return term.sum()
        rows = term.dim() + self.row_dim
        return term.movedim(rows, 0).reshape(term.shape[rows], -1).sum(-1)


@dataclass(frozen=True)
class Observed:
    """One observed site.

    Args:
        name: Name of the site.
        value: Its value, ``batch_shape + event_shape``.
        row_dim: Batch dimension of the data plate, None outside it.
        plates: The plates of the site, outermost first.
        event_dim: Number of event dimensions.
        mask: Which entries count, boolean, with the dimensions of ``value``; event dimensions
            have size one unless the mask tells their entries apart. None where there is no mask.
        fn: The distribution of the site in this trace.
    """

    name: str
    value: Tensor = field(repr=False)
    row_dim: int | None
    plates: tuple[Plate, ...]
    event_dim: int
    mask: Tensor | None = field(default=None, repr=False)
    fn: Any = field(default=None, repr=False, compare=False)

    def rows(self) -> Tensor:
        """The value as one vector a row, ``(B, features)``."""
        return self.rows_first(self.value).flatten(1)

    def rows_first(self, value: Tensor) -> Tensor:
        """A tensor with the dimensions of the value, rows moved to the front ``(B, ...)``."""
        if self.row_dim is None:
            raise ValueError(f"Observed site {self.name!r} is not in the data plate.")
        rows = value.movedim(value.dim() - self.event_dim + self.row_dim, 0)
        # A program of rows alone has one feature a row.
        return rows.unsqueeze(-1) if rows.dim() == 1 else rows


@dataclass(frozen=True)
class Group:
    """Latents that share one packed vector: ``"global"``, or ``"data"`` for those of the rows.

    Args:
        name: ``"global"`` or ``"data"``; other names where a guide splits these groups.
        sites: Its sites in the order of packing, which is the order of the program.
        plate: The data plate, None for the global group.
    """

    name: str
    sites: tuple[Site, ...]
    plate: Plate | None

    @property
    def size(self) -> int:
        """Length K of the packed vector."""
        return sum(site.size for site in self.sites)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the packed latents: ``(B, K)`` or ``(K,)``."""
        return (self.size,) if self.plate is None else (self.plate.num_rows, self.size)

    @property
    def dtype(self) -> torch.dtype:
        """Common floating point type of the sites."""
        dtype = self.sites[0].dtype
        for site in self.sites[1:]:
            dtype = torch.promote_types(dtype, site.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the sites."""
        return self.sites[0].device

    def slices(self) -> Iterator[tuple[Site, slice]]:
        """The sites with their places in the packed vector."""
        start = 0
        for site in self.sites:
            yield site, slice(start, start + site.size)
            start += site.size

    def batch(self, parameters: Tensor) -> Tensor:
        """Put rows at the data plate's dimension: ``(..., B, P)`` to ``(..., B, 1, .., 1, P)``."""
        if self.plate is None:
            return parameters
        ones = (1,) * (-self.plate.dim - 1)
        return parameters.reshape(*parameters.shape[:-1], *ones, parameters.shape[-1])

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Split packed latents into unconstrained, site-shaped values.

        Args:
            packed: ``left + (B, 1, ..., 1) + (K,)`` or ``left + (K,)``; see :meth:`batch`.
        """
        return {
            site.name: site.place(packed[..., part]).to(site.dtype) for site, part in self.slices()
        }

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Pack constrained values ``{site: batch_shape + event_shape}`` to :attr:`shape`."""
        return torch.cat(
            [
                site.flatten(site.unconstrain(values[site.name].expand(site.shape))).to(self.dtype)
                for site in self.sites
            ],
            -1,
        )

"""What a model's latents are: one blocked trace read into groups of packed, unconstrained sites.

A *layout* answers, for one call ``model(*args, **kwargs)``: which sites are latent, which plate
holds the data, and how the latents are packed into vectors,

    global group:  u_global                (K_global,)     every latent outside the data plate
    data group:    u_data[n], n = 1..B     (B, K_data)     every latent inside it

Packing is ``biject_to(support)`` site by site; the log-determinant is kept at each site's own
plates, so that scales and masks of nested plates act on it as they act on the site itself.

The layout is read again on every call, because plates, indices and supports move with the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

__all__ = ["Group", "Layout", "Observed", "Plate", "Site", "layout", "unwrap"]

Program = Callable[..., Any]
Frame = Any  # pyro's CondIndepStackFrame


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
        """Map to the support; also the log-determinant at the site's plates (None for zero)."""
        if self.transform is None:
            return unconstrained, None
        value = self.transform(unconstrained)
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        extra = log_det.dim() - (value.dim() - self.event_dim)
        return value, log_det.flatten(-extra).sum(-1) if extra else log_det

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
    """

    name: str
    value: Tensor = field(repr=False)
    row_dim: int | None
    plates: tuple[Plate, ...]
    event_dim: int

    def rows(self) -> Tensor:
        """The value as one vector a row, ``(B, features)``."""
        if self.row_dim is None:
            raise ValueError(f"Observed site {self.name!r} is not in the data plate.")
        rows = self.value.dim() - self.event_dim + self.row_dim
        return self.value.movedim(rows, 0).reshape(self.value.shape[rows], -1)


@dataclass(frozen=True)
class Group:
    """Latents that share one packed vector: ``"global"``, or ``"data"`` for those of the rows.

    Args:
        name: ``"global"`` or ``"data"``.
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
        return {site.name: site.place(packed[..., part]) for site, part in self.slices()}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Pack constrained values ``{site: batch_shape + event_shape}`` to :attr:`shape`."""
        return torch.cat(
            [
                site.flatten(site.unconstrain(values[site.name].expand(site.shape))).to(self.dtype)
                for site in self.sites
            ],
            -1,
        )


@dataclass(frozen=True)
class Layout:
    """The latents of one call of a model.

    Args:
        data_plate: The plate whose rows are data, None where there is none.
        groups: Non-empty groups: global first, then data.
        observed: Observed sites by name, deterministic ones and factors left out.
        plates: All vectorized plates by name.
        ambiguous: Names of the plates that could all be the data plate, when nothing decides.
        simulated: Unobserved sites that were declared not to be latent.
    """

    data_plate: Plate | None
    groups: tuple[Group, ...]
    observed: Mapping[str, Observed]
    plates: Mapping[str, Plate]
    ambiguous: tuple[str, ...] = ()
    simulated: tuple[str, ...] = ()

    @property
    def sites(self) -> dict[str, Site]:
        """All latent sites by name."""
        return {site.name: site for group in self.groups for site in group.sites}

    @property
    def depth(self) -> int:
        """Number of batch dimensions that the program uses."""
        dims = [len(site.batch_shape) for site in self.sites.values()]
        return max([*dims, *(-plate.dim for plate in self.plates.values()), 0])

    @property
    def num_rows(self) -> int:
        """Rows of the data plate in this call, zero without one."""
        return 0 if self.data_plate is None else self.data_plate.num_rows

    @property
    def scale(self) -> float:
        """The data plate's N/B, one without a data plate."""
        return 1.0 if self.data_plate is None else self.data_plate.scale

    @property
    def indices(self) -> dict[str, Tensor]:
        """Row numbers of the subsampled plates, by plate."""
        return {p.name: p.index for p in self.plates.values() if p.index is not None}

    def group(self, name: str) -> Group | None:
        """The group of that name, None where the model has no such latents."""
        return next((group for group in self.groups if group.name == name), None)

    def pack(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Constrained values of all latents, packed and unconstrained, by group."""
        missing = [name for name in self.sites if name not in values]
        if missing:
            raise ValueError(
                f"Values are needed for every latent site; missing: {', '.join(missing)}. "
                f"Given: {', '.join(values) or 'none'}."
            )
        return {group.name: group.pack(values) for group in self.groups}

    def constrain(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Packed latents ``{group: (B, K) or (K,)}`` to constrained values by site."""
        return {
            site: self.sites[site].constrain(value)[0]
            for group in self.groups
            for site, value in group.unpack(group.batch(packed[group.name])).items()
        }


def unwrap(fn: Any) -> Any:
    """The innermost distribution under ``Independent``, ``expand`` and ``mask`` wrappers."""
    wrappers = ("Independent", "ExpandedDistribution", "MaskedDistribution")
    while type(fn).__name__ in wrappers:
        fn = fn.base_dist
    return fn


class _Probe(Messenger):
    """Give latents a feasible value, fix known indices, and write every site down."""

    def __init__(
        self, indices: Mapping[str, Tensor], latents: frozenset[str] | None, offset: float
    ) -> None:
        super().__init__()
        self.indices = indices
        self.latents = latents
        self.offset = offset
        self.sites: dict[str, dict[str, Any]] = {}
        self.subsamples: dict[str, tuple[dict[str, Any], bool, bool]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            explicit = msg["value"] is not None
            random = not explicit and not _is_full(msg["fn"])
            if random and name in self.indices:
                msg["value"] = self.indices[name]
            self.subsamples[name] = (msg, explicit, random)
        elif not msg["is_observed"] and (self.latents is None or name in self.latents):
            _check_support(name, msg["fn"])
            if msg["value"] is None:
                msg["value"] = _feasible(name, msg["fn"], self.offset)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not site_is_subsample(msg):
            self.sites[msg["name"]] = msg.copy()


def _is_full(fn: Any) -> bool:
    return fn.subsample_size is None or fn.subsample_size >= fn.size


def _check_support(name: str, fn: Any) -> None:
    family = type(unwrap(fn)).__name__
    try:
        discrete = fn.support.is_discrete
    except NotImplementedError:
        raise NotImplementedError(
            f"Latent site {name!r} ({family}) states no support, so it cannot be mapped to "
            "unconstrained space. Give its distribution a `support`."
        ) from None
    if discrete:
        raise NotImplementedError(
            f"Guides and predictive coding need continuous latents, but site {name!r} is "
            f"discrete ({family}). Marginalize it in the model (a mixture distribution, or a sum "
            "over its values in pyro.factor), relax it (RelaxedOneHotCategorical), or fit with "
            "TraceEnum_ELBO and config_enumerate."
        )


def _feasible(name: str, fn: Any, offset: float) -> Tensor:
    """A point inside the support that needs no sampling (improper priors have no sampler)."""
    shape = fn.batch_shape + fn.event_shape
    like = _example(fn)
    if _is_real(fn.support):
        return torch.full(shape, offset, dtype=like.dtype, device=like.device)
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        raise NotImplementedError(
            f"Latent site {name!r} has support {fn.support}, for which no bijection from "
            "unconstrained space is registered with torch's biject_to. Register one, or sample "
            "an unconstrained variable and transform it with pyro.deterministic."
        ) from None
    unconstrained = torch.full(
        transform.inverse_shape(shape), offset, dtype=like.dtype, device=like.device
    )
    return transform(unconstrained)


def _example(fn: Any) -> Tensor:
    """A floating point parameter of the distribution, for dtype and device."""
    base = unwrap(fn)
    for name in (*getattr(base, "arg_constraints", {}), "base_dist"):
        value = getattr(base, name, None)
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        if name == "base_dist" and value is not None and value is not base:
            return _example(value)
    return torch.zeros(())


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _support_numbers(support: Any) -> list[Tensor]:
    """Every number by which a constraint is parameterized."""
    numbers = []
    for value in vars(support).values():
        if isinstance(value, Tensor):
            numbers.append(value)
        elif isinstance(value, (int, float)):
            numbers.append(torch.as_tensor(float(value)))
        elif isinstance(value, constraints.Constraint):
            numbers += _support_numbers(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                numbers += (
                    _support_numbers(item) if isinstance(item, constraints.Constraint) else []
                )
    return numbers


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No gradients, random state restored, nothing seen by handlers outside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), poutine.block():
        yield


def _probe(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    latents: frozenset[str] | None,
    offset: float = 0.0,
) -> _Probe:
    probe = _Probe(indices, latents, offset)
    try:
        with _undisturbed(), probe:
            model(*args, **kwargs)
    except Exception as error:
        given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        error.add_note(f"While reading the layout of the model called with ({', '.join(given)}).")
        raise
    return probe


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    plain = isinstance(value, (int, float, str, type(None)))
    return repr(value) if plain else type(value).__name__


def layout(
    model: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    data_plate: str | None = "auto",
    latents: Iterable[str] | None = None,
    indices: Mapping[str, Tensor] | None = None,
    check: bool = False,
) -> Layout:
    """Read the layout of ``model(*args, **kwargs)``.

    The trace is blocked, runs without gradients and restores the random state. Latents are set
    to a feasible point instead of being drawn, so improper priors work.

    Args:
        model: Any Pyro program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        data_plate: Name of the plate whose rows are data; None for none (all latents in one
            global group); ``"auto"`` takes the plate named ``"data"``, else the one plate that
            holds every observed site.
        latents: Names of the latent sites; other unobserved sites are simulated and left out.
            By default every unobserved site is latent.
        indices: Row numbers for plates that the program subsamples at random.
        check: Trace once more with the latents moved, and raise where a support or the
            structure of the program depends on a latent.

    Returns:
        The layout of this call.

    Raises:
        ValueError: For an unknown ``data_plate``, an undeclared subsampled plate, an empty data
            plate, NaN in an observed site, lazy parameters, or a support that depends on a
            latent.
        NotImplementedError: For a discrete latent, or a support without a bijection.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> [(g.name, g.size) for g in layout(model, (torch.zeros(5),)).groups]
        [('global', 1), ('data', 2)]
    """
    kwargs = {} if kwargs is None else kwargs
    names = None if latents is None else frozenset(latents)
    _check_materialized(model)
    probe = _probe(model, args, kwargs, indices or {}, names)
    result = _read(probe, data_plate, names)
    if check:
        moved = _probe(model, args, kwargs, result.indices, names, offset=0.37)
        _check_static(result, _read(moved, data_plate, names))
    return result


def _check_materialized(model: Program) -> None:
    if isinstance(model, nn.Module):
        for name, parameter in model.named_parameters():
            if nn.parameter.is_lazy(parameter):
                raise ValueError(
                    f"Model parameter {name!r} is not initialized yet (a lazy module). Call the "
                    "model once on example data before building a guide for it."
                )


def _read(probe: _Probe, data_plate: str | None, names: frozenset[str] | None) -> Layout:
    plates: dict[str, Plate] = {}
    for site in probe.sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name not in plates:
                plates[frame.name] = _plate(frame, probe)
    latent = {
        name: site
        for name, site in probe.sites.items()
        if not site["is_observed"] and (names is None or name in names)
    }
    observed = {name: site for name, site in probe.sites.items() if _is_data(site)}
    row_plate, ambiguous = _choose_data_plate(data_plate, plates, observed)
    for plate in plates.values():
        if plate.size != plate.num_rows and plate is not row_plate:
            raise ValueError(
                f"Plate {plate.name!r} is subsampled ({plate.num_rows} of {plate.size} rows) but "
                "is not the data plate. Only the data plate may be subsampled: pass "
                f"data_plate={plate.name!r}, or give the plate its full size."
            )
    if row_plate is not None and row_plate.num_rows == 0:
        raise ValueError(
            f"The data plate {row_plate.name!r} is empty. Pass a batch of at least one row."
        )
    for name, site in observed.items():
        if site["value"].is_floating_point() and torch.isnan(site["value"]).any():
            raise ValueError(
                f"Observed site {name!r} contains NaN. Fill missing entries with any value in the "
                "support and switch them off with poutine.mask (or obs_mask)."
            )
    sites = {name: _latent_site(name, site, plates, row_plate) for name, site in latent.items()}
    groups = [
        Group("global", tuple(s for s in sites.values() if s.row_dim is None), None),
        Group("data", tuple(s for s in sites.values() if s.row_dim is not None), row_plate),
    ]
    return Layout(
        data_plate=row_plate,
        groups=tuple(group for group in groups if group.sites),
        observed={name: _observed_site(name, s, plates, row_plate) for name, s in observed.items()},
        plates=plates,
        ambiguous=ambiguous,
        simulated=tuple(
            name
            for name, site in probe.sites.items()
            if not site["is_observed"] and name not in latent
        ),
    )


def _plate(frame: Frame, probe: _Probe) -> Plate:
    subsample, explicit, random = probe.subsamples.get(frame.name, ({}, False, False))
    size = frame.size if frame.full_size is None else frame.full_size
    # An explicit index of full length is kept: it may be a permutation, which moves the rows.
    index = torch.as_tensor(subsample["value"]) if explicit or random else None
    return Plate(frame.name, frame.dim, int(frame.size), int(size), index, random)


def _is_data(site: dict[str, Any]) -> bool:
    """Observed by the user: no deterministic, factor or reparameterized site."""
    deterministic = site["infer"].get("_deterministic", False)
    computed = type(unwrap(site["fn"])).__name__ in ("Delta", "Unit")
    return site["is_observed"] and not deterministic and not computed


def _choose_data_plate(
    data_plate: str | None, plates: Mapping[str, Plate], observed: Mapping[str, dict[str, Any]]
) -> tuple[Plate | None, tuple[str, ...]]:
    if data_plate is None:
        return None, ()
    if data_plate != "auto":
        if data_plate not in plates:
            raise ValueError(
                f"The program has no vectorized plate named {data_plate!r}. "
                f"Its plates: {', '.join(plates) or 'none'}."
            )
        return plates[data_plate], ()
    if "data" in plates:
        return plates["data"], ()
    held = [{frame.name for frame in site["cond_indep_stack"]} for site in observed.values()]
    holding = [name for name in plates if held and all(name in names for names in held)]
    if len(holding) == 1:
        return plates[holding[0]], ()
    return None, tuple(holding)


def _latent_site(
    name: str, site: dict[str, Any], plates: Mapping[str, Plate], row_plate: Plate | None
) -> Site:
    fn, value = site["fn"], site["value"]
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    in_plate = row_plate is not None and any(frame.name == row_plate.name for frame in frames)
    row_dim = row_plate.dim if in_plate and row_plate is not None else None
    transform = None if _is_real(fn.support) else biject_to(fn.support)
    shape = fn.batch_shape + fn.event_shape
    unconstrained = shape if transform is None else transform.inverse_shape(shape)
    num_batch = len(fn.batch_shape)
    inner = tuple(
        (dim, fn.batch_shape[dim])
        for dim in range(-num_batch, 0)
        if dim != row_dim and fn.batch_shape[dim] != 1
    )
    mask = site["mask"]
    return Site(
        name=name,
        family=type(unwrap(fn)).__name__,
        batch_shape=fn.batch_shape,
        event_dim=fn.event_dim,
        shape=shape,
        unconstrained_event=unconstrained[num_batch:],
        transform=transform,
        row_dim=row_dim,
        plates=tuple(plates[frame.name] for frame in frames),
        inner=inner,
        masked=not _all_on(mask) or not _all_on(getattr(fn, "_mask", None)),
        dtype=value.dtype,
        device=value.device,
        fn=fn,
    )


def _all_on(mask: Any) -> bool:
    if mask is None or mask is True:
        return True
    return isinstance(mask, Tensor) and bool(mask.all())


def _observed_site(
    name: str, site: dict[str, Any], plates: Mapping[str, Plate], row_plate: Plate | None
) -> Observed:
    fn, value = site["fn"], site["value"]
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    in_plate = row_plate is not None and any(frame.name == row_plate.name for frame in frames)
    shape = torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape)
    return Observed(
        name=name,
        value=value.expand(shape),
        row_dim=row_plate.dim if in_plate and row_plate is not None else None,
        plates=tuple(plates[frame.name] for frame in frames),
        event_dim=fn.event_dim,
    )


def _check_static(first: Layout, moved: Layout) -> None:
    """Raise where structure or a support changed when only the latents moved."""
    before, after = first.sites, moved.sites
    if list(before) != list(after) or any(before[s].shape != after[s].shape for s in before):
        raise ValueError(
            "The structure of the program depends on its latents: sites "
            f"{', '.join(sorted(before))} became {', '.join(sorted(after))}, or changed shape, "
            "when the latents moved. Guides need a static structure: sample every variable on "
            "every run."
        )
    for name in before:
        numbers = zip(
            _support_numbers(before[name].fn.support),
            _support_numbers(after[name].fn.support),
            strict=True,
        )
        if any(not torch.equal(a, b) for a, b in numbers):
            raise ValueError(
                f"The support of latent site {name!r} depends on another latent: it moved when "
                "the latents moved. Sample a variable of fixed support and transform it, for "
                "example u ~ Uniform(0, 1) and pyro.deterministic(name, low + (high - low) * u)."
            )

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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from guides.arguments import did_you_mean
from guides.capturing import is_capturing
from guides.probe import Probe, Program, probe
from guides.sites import Group, Observed, Plate, Site
from guides.supports import is_real, support_numbers, unwrap

__all__ = ["Layout", "layout", "mask_of"]

Frame = Any  # pyro's CondIndepStackFrame


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
        order: Names of latent and observed sites in the order of the program.
    """

    data_plate: Plate | None
    groups: tuple[Group, ...]
    observed: Mapping[str, Observed]
    plates: Mapping[str, Plate]
    ambiguous: tuple[str, ...] = ()
    simulated: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

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

    def fresh_indices(self) -> dict[str, Tensor]:
        """Rows drawn anew for a data plate that the program subsamples at random, else nothing.

        Reading a layout restores the random state: its own rows are those of the next draw of
        noise, and would be correlated with it. They are where the index of the plate is.
        """
        plate = self.data_plate
        if plate is None or not plate.random or plate.index is None:
            return {}
        return {
            plate.name: torch.randperm(plate.size, device=plate.index.device)[: plate.num_rows]
        }

    def group(self, name: str) -> Group | None:
        """The group of that name, None where the model has no such latents."""
        return next((group for group in self.groups if group.name == name), None)

    def split(self, partition: Mapping[str, Iterable[str]]) -> Layout:
        """The same layout with other groups of sites.

        Args:
            partition: Names of sites by name of the group, in the order of the groups. The
                sites of a group are all global, or all in the data plate.
        """
        groups = []
        for name, names in partition.items():
            sites = tuple(self.sites[site] for site in names)
            plate = None if sites[0].row_dim is None else self.data_plate
            groups.append(Group(name, sites, plate))
        return replace(self, groups=tuple(groups))

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


def layout(
    model: Program,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    data_plate: str | None = "auto",
    latents: Iterable[str] | None = None,
    indices: Mapping[str, Tensor] | None = None,
    check: bool = False,
    gradients: bool = False,
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
        gradients: Keep the graph from parameters to supports, for programs that learn the
            support of a latent.

    Returns:
        The layout of this call.

    Raises:
        ValueError: For an unknown ``data_plate``, an undeclared subsampled plate, an empty data
            plate, NaN in an observed site or values that its plates do not hold, lazy
            parameters, or a support that depends on a latent.
        TypeError: For observed values that are no tensor, or of a dtype without a density.
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
    first = probe(model, args, kwargs, indices or {}, names, gradients=gradients)
    result = _read(first, data_plate, names)
    if check:
        moved = probe(model, args, kwargs, result.indices, names, offset=0.37)
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


def _read(read: Probe, data_plate: str | None, names: frozenset[str] | None) -> Layout:
    plates: dict[str, Plate] = {}
    for site in read.sites.values():
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"Sequential plate {frame.name!r} is subsampled ({frame.size} of "
                    f"{frame.full_size}). Vectorize it: `with pyro.plate(...)` in place of the "
                    "loop."
                )
            if frame.vectorized and frame.name not in plates:
                plates[frame.name] = _plate(frame, read)
    latent = {
        name: site
        for name, site in read.sites.items()
        if not site["is_observed"] and (names is None or name in names)
    }
    observed = {name: site for name, site in read.sites.items() if _is_data(site)}
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
        if not isinstance(site["value"], Tensor):
            raise TypeError(
                f"Observed site {name!r} holds a {type(site['value']).__name__}, and only tensors "
                "have a log density: pass torch.as_tensor(value), floating values as "
                "torch.as_tensor(value, dtype=torch.get_default_dtype())."
            )
        if is_capturing() or not site["value"].is_floating_point():
            continue
        if torch.isnan(site["value"]).any():
            raise ValueError(
                f"Observed site {name!r} contains NaN. PredictiveCoding infers missing entries: "
                f"pc.given(missing=[{name!r}]), whose .model is the program that its posterior is "
                "for. Everywhere else fill them with any value in the support and switch them off "
                "with pyro.poutine.mask."
            )
    sites = {name: _latent_site(name, site, plates, row_plate) for name, site in latent.items()}
    groups = [
        Group("global", tuple(s for s in sites.values() if s.row_dim is None), None),
        Group("data", tuple(s for s in sites.values() if s.row_dim is not None), row_plate),
    ]
    return Layout(
        data_plate=row_plate,
        groups=tuple(group for group in groups if group.sites),
        observed={
            name: _observed_site(name, s, plates, row_plate) for name, s in observed.items()
        },
        plates=plates,
        ambiguous=ambiguous,
        simulated=tuple(
            name
            for name, site in read.sites.items()
            if not site["is_observed"] and name not in latent
        ),
        order=tuple(name for name in read.sites if name in latent or name in observed),
    )


def _plate(frame: Frame, read: Probe) -> Plate:
    subsample, explicit, random = read.subsamples.get(frame.name, ({}, False, False))
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
                f"{did_you_mean(data_plate, plates)}Its plates: {', '.join(plates) or 'none'}."
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
    transform = None if is_real(fn.support) else biject_to(fn.support)
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
        masked=not all(_all_on(item) for item, _ in ((mask, 0), *_own_masks(fn))),
        mask=mask if isinstance(mask, Tensor) else None,
        dtype=value.dtype,
        device=value.device,
        fn=fn,
    )


def _own_masks(fn: Any) -> list[tuple[Any, int]]:
    """The mask of every wrapper of a distribution, None for no mask, and its event dimensions."""
    found, base = [], unwrap(fn)
    while fn is not base:
        found.append((getattr(fn, "_mask", None), fn.event_dim))
        fn = fn.base_dist
    return found


def _all_on(mask: Any) -> bool:
    if mask is None or mask is True or is_capturing():
        return True
    return isinstance(mask, Tensor) and bool(mask.all())


def _observed_site(
    name: str, site: dict[str, Any], plates: Mapping[str, Plate], row_plate: Plate | None
) -> Observed:
    fn, value = site["fn"], site["value"]
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    in_plate = row_plate is not None and any(frame.name == row_plate.name for frame in frames)
    expected = fn.batch_shape + fn.event_shape
    try:
        shape = torch.broadcast_shapes(value.shape, expected)
    except RuntimeError:
        raise ValueError(
            f"The value of observed site {name!r} has shape {tuple(value.shape)}, which does not "
            f"fit its distribution's {tuple(expected)}. Pass data of the model's shape."
        ) from None
    if _crosses(shape, value.shape, fn):
        raise ValueError(
            f"The value of observed site {name!r} must have the shape of its distribution, "
            f"{tuple(expected)}, got {tuple(value.shape)}: broadcast to {tuple(shape)}, "
            "rows would be scored against one another. Add or remove the axis of length one "
            "(unsqueeze, squeeze); entries beyond the plates need to_event or a plate."
        )
    return Observed(
        name=name,
        value=value.expand(shape),
        row_dim=row_plate.dim if in_plate and row_plate is not None else None,
        plates=tuple(plates[frame.name] for frame in frames),
        event_dim=fn.event_dim,
        mask=mask_of(site["mask"], fn, shape, value.device),
        fn=fn,
    )


def _crosses(shape: torch.Size, value: torch.Size, fn: Any) -> bool:
    """Whether broadcasting a value repeats the density, whose sum is then a plausible number.

    A value may be smaller than its distribution, and wider in event dimensions of length one.
    """
    num_batch = len(shape) - fn.event_dim
    batch, event = shape[:num_batch], shape[num_batch:]
    # Without all its dimensions a value that widens the event does so by its rows.
    shifted = event != fn.event_shape and len(value) < len(fn.batch_shape) + fn.event_dim
    extra = num_batch - len(fn.batch_shape)
    return shifted or batch[:extra].numel() != 1 or batch[extra:] != fn.batch_shape


def mask_of(mask: Any, fn: Any, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Which entries of an observed value count: the handler's mask and the distribution's own.

    Args:
        mask: Of the handlers, at the batch shape.
        fn: The distribution; each mask inside it stands at the batch shape of its own level.
        shape: Shape of the value.
        device: Device of the value.

    Returns:
        A boolean tensor: full batch dimensions, event dimensions of size one where they agree.
    """
    event_dim = fn.event_dim
    result: Tensor | None = None
    for item, depth in ((mask, event_dim), *_own_masks(fn)):
        if item is None or item is True:
            continue
        placed = torch.as_tensor(item, device=device)
        placed = placed.reshape(placed.shape + (1,) * depth)
        result = placed if result is None else result & placed
    if result is None:
        return None
    result = result.reshape((1,) * (len(shape) - result.dim()) + tuple(result.shape))
    batch = len(shape) - event_dim
    return result.expand(shape[:batch] + result.shape[batch:])


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
            support_numbers(before[name].fn.support),
            support_numbers(after[name].fn.support),
            strict=True,
        )
        if any(not torch.equal(a, b) for a, b in numbers):
            raise ValueError(
                f"The support of latent site {name!r} depends on another latent: it moved when "
                "the latents moved. Sample a variable of fixed support and transform it, for "
                "example u ~ Uniform(0, 1) and pyro.deterministic(name, low + (high - low) * u)."
            )

"""A guide is a family times a scheme: the class behind the grid.

    q(z | call) = prod over groups of family(u_group; scheme(group, call)), pushed to supports

For every group the guide draws one auxiliary, packed and unconstrained vector inside the plates
of the group, and then each latent site as ``Delta(value, log_density)`` at the site's own plates,
where ``log_density`` is minus the log-determinant of the map to the support. That makes the ELBO
exact for nested plates, constrained and global sites, minibatches and vectorized particles alike.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.arguments import did_you_mean
from guides.families.family import Family, PushedDistribution
from guides.layout import Layout, layout
from guides.location_scale import is_location_scale, location
from guides.probe import Program
from guides.recipe import Recipe
from guides.schemes.local import Local
from guides.schemes.recording import Scaled, active
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group, Site
from guides.supports import support_numbers

__all__ = ["Guide", "ProgramGuide", "start_of", "upstream_of"]

_COUNTER = itertools.count()

Cell = tuple[Callable[[int], Family], Callable[[Tensor, Group, Call], Scheme]]


class _Reference:
    """Holds the model without owning it: no submodule, and not copied by the guide."""

    def __init__(self, model: Program) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        # A guide that is copied after its model, in one copy, refines against that copy.
        return _Reference(memo.get(id(self.model), self.model))


class ProgramGuide(PyroModule):
    """A guide over the groups of a program's layout.

    Subclasses say what q of a group is; this class reads the layout, enters plates, unpacks,
    constrains and scores.

    Args:
        model: Any Pyro program.
        args: Positional arguments of an example call.
        kwargs: Keyword arguments of that call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide's parameters in Pyro's parameter store. Unique by default,
            because equal names in two modules are one parameter to Pyro.
    """

    jacobian: bool = True
    has_density: bool = True
    recipe: Recipe | None = None
    """How the guide was built, for :func:`guides.save`; None where that is not known."""

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        data_plate: str | None = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(_unique(type(self)) if name is None else name)
        self._reference = _Reference(model)
        first = layout(model, args, kwargs, data_plate=data_plate, check=True)
        with torch.enable_grad():
            graph = layout(model, args, kwargs, data_plate=data_plate, gradients=True)
        # q must follow a support that the model learns, with its gradient.
        self._learned_support = any(
            number.requires_grad
            for site in graph.sites.values()
            for number in support_numbers(site.fn.support)
        )
        if not first.groups:
            raise ValueError("The model has no latent sites, so there is nothing to infer.")
        self.data_plate = None if first.data_plate is None else first.data_plate.name
        self.latents = tuple(first.sites)
        self._observed = frozenset(first.observed)
        self._partition: dict[str, tuple[str, ...]] | None = None
        self._sizes = {group.name: group.size for group in first.groups}
        self._example = first

    def _split(self, partition: Mapping[str, Sequence[str]]) -> None:
        """Take these groups of sites in place of global and data, in this order."""
        self._partition = {name: tuple(sites) for name, sites in partition.items()}
        self._example = self._example.split(self._partition)
        self._sizes = {group.name: group.size for group in self._example.groups}

    @property
    def plain(self) -> frozenset[str]:
        """Sites that are scored as they are, without the map to their support: point masses."""
        return frozenset() if self.jacobian else frozenset(self.latents)

    @property
    def model(self) -> Program:
        """The program the guide was built for."""
        return self._reference.model

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """Q of one group: batch shape ``(B, 1, ..., 1)`` or ``()``, event shape ``(K,)``.

        Args:
            group: The group.
            call: This call.
            upstream: Packed draws of the groups before it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what q of a group is.")

    def layout(self, *args: Any, **kwargs: Any) -> Layout:
        """The layout of a call, checked against the one that built the guide.

        Raises:
            ValueError: Where the sites of the call are not those the guide was built for.
        """
        return self._layout(args, kwargs, None)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latents; has the model's own signature.

        Returns:
            Constrained values by site.
        """
        read = self._layout(args, kwargs, None)
        plates: dict[str, pyro.plate] = {}
        if read.data_plate is not None:
            plate = read.data_plate
            if plate.random:
                # The live plate draws the subsample, and the data are read again at its rows.
                live = pyro.plate(plate.name, plate.size, plate.num_rows, dim=plate.dim)
                read = self._layout(args, kwargs, {plate.name: live.indices})
            else:
                live = pyro.plate(plate.name, plate.size, subsample=plate.index, dim=plate.dim)
            plates[plate.name] = live
        call = self._call(args, kwargs, read)
        packed: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for group in read.groups:
            # Outside the plate: refinement runs the program, which enters the plate itself.
            q = self.group_distribution(group, call, packed)
            with contextlib.ExitStack() as stack:
                if group.plate is not None:
                    stack.enter_context(plates[group.plate.name])
                if (mask := self.group_mask(group)) is not None:
                    stack.enter_context(poutine.mask(mask=mask))
                # The prefix keeps auxiliary names of several guides of one program apart.
                packed[group.name] = pyro.sample(
                    f"_{self._pyro_name}_{group.name}", q, infer={"is_auxiliary": True}
                )
            with contextlib.nullcontext() if mask is None else poutine.mask(mask=mask):
                for name, unconstrained in group.unpack(packed[group.name]).items():
                    values[name] = self._sample_site(read.sites[name], unconstrained, plates)
        return values

    def group_mask(self, group: Group) -> Tensor | None:
        """Rows whose latents of a group count, ``(B, 1, .., 1)``; None for all of them."""
        return None

    def _sample_site(
        self, site: Site, unconstrained: Tensor, plates: dict[str, pyro.plate]
    ) -> Tensor:
        value, log_det = site.constrain(unconstrained)
        with contextlib.ExitStack() as stack:
            for plate in site.plates:
                if plate.name not in plates:
                    plates[plate.name] = pyro.plate(plate.name, plate.size, dim=plate.dim)
                stack.enter_context(plates[plate.name])
            if log_det is None or site.name in self.plain:
                density = value.new_zeros(())
            else:
                density = -log_det
            return pyro.sample(
                site.name, dist.Delta(value, log_density=density, event_dim=site.event_dim)
            )

    def rsample_packed(
        self,
        num_samples: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        indices: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Layout]:
        """Draws in packed, unconstrained space, all at once.

        Args:
            num_samples: Number of draws S.
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            indices: Row numbers for a plate that the program subsamples at random.

        Returns:
            Draws by group, ``(S, B, K)`` or ``(S, K)``; their log densities in unconstrained
            space, ``(S, B)`` or ``(S,)``; the layout of the call.
        """
        kwargs = {} if kwargs is None else kwargs
        read = self._layout(args, kwargs, indices)
        call = self._call(args, kwargs, read)
        draws: dict[str, Tensor] = {}
        log_q: dict[str, Tensor] = {}
        upstream: dict[str, Tensor] = {}  # draws (S, ...) at the plates' dimensions
        num_batch = 0 if read.data_plate is None else -read.data_plate.dim
        with self._pyro_context:
            for group in read.groups:
                q = self.group_distribution(group, call, upstream)
                # q of a group with upstream draws is batched over them already.
                batched = len(q.batch_shape) > (0 if group.plate is None else num_batch)
                value = q.rsample(() if batched else (num_samples,))
                density = q.log_prob(value)
                if (mask := self.group_mask(group)) is not None:
                    density = torch.where(mask, density, torch.zeros_like(density))
                log_q[group.name] = density.reshape(num_samples, *group.shape[:-1])
                draws[group.name] = value.reshape(num_samples, *group.shape)
                ones = (1,) * num_batch
                upstream[group.name] = (
                    value.reshape(num_samples, *ones, group.size) if group.plate is None else value
                )
        return draws, log_q, read

    def packed_density(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        indices: Mapping[str, Tensor] | None = None,
    ) -> tuple[Callable[[Mapping[str, Tensor]], dict[str, Tensor]], Layout]:
        """The density of q in packed, unconstrained space, as a function of any point.

        Args:
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            indices: Row numbers for a plate that the program subsamples at random.

        Returns:
            A function from one point ``{group: (B, K) or (K,)}`` to log densities by group,
            ``(B,)`` or ``()``, free of random draws, and the layout of the call. Families that
            cannot score points they did not draw raise ``NotImplementedError`` when it is called.
        """
        kwargs = {} if kwargs is None else kwargs
        read = self._layout(args, kwargs, indices)
        call = self._call(args, kwargs, read)
        with self._pyro_context:
            # The first group has nothing upstream: an encoder or a refinement runs once.
            first = self.group_distribution(read.groups[0], call, {})

        def density(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
            log_q: dict[str, Tensor] = {}
            upstream: dict[str, Tensor] = {}
            for group in read.groups:
                with self._pyro_context:
                    q = self.group_distribution(group, call, upstream) if upstream else first
                value = group.batch(packed[group.name])
                score = q.log_prob(value)
                if (mask := self.group_mask(group)) is not None:
                    score = torch.where(mask, score, torch.zeros_like(score))
                log_q[group.name] = score.reshape(group.shape[:-1])
                upstream[group.name] = value
            return log_q

        return density, read

    def locations(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The location of q, mapped to the supports: constrained values by site.

        Where q is symmetric in unconstrained space (the Gaussian families, ``student_t``) and the
        map to a support is elementwise, it is the median of every coordinate. Flows and mixtures
        bend around their location, which then is neither mean nor median: draw, and take those of
        the draws.
        """
        read = self._layout(args, kwargs, None)
        call = self._call(args, kwargs, read)
        located: dict[str, Tensor] = {}
        with self._pyro_context:
            for group in read.groups:
                located[group.name] = self.group_location(group, upstream_of(call, located))
        return read.constrain(located)

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Layout) -> Call:
        return Call(self.model, args, dict(kwargs), read)

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The center of q of one group, ``(B, K)`` or ``(K,)``."""
        raise NotImplementedError(f"{type(self).__name__} states no center of q.")

    def _layout(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        indices: Mapping[str, Tensor] | None,
    ) -> Layout:
        probe = layout(
            self.model,
            args,
            kwargs,
            data_plate=self.data_plate,
            latents=self.latents,
            indices=indices,
            gradients=self._learned_support and torch.is_grad_enabled(),
        )
        unknown = [name for name in probe.simulated if name not in self._observed]
        if unknown:
            raise ValueError(
                f"This call of the model samples {', '.join(unknown)}, which this guide does not "
                f"cover. It was built for a program with latent sites {', '.join(self.latents)}: "
                "build a guide for this program."
            )
        missing = [name for name in self.latents if name not in probe.sites]
        if missing:
            raise ValueError(
                f"This guide was built for a program with latent sites {', '.join(self.latents)}, "
                f"but this call of the model does not sample {', '.join(missing)}. Build a guide "
                "for this program."
            )
        if self._partition is not None:
            probe = probe.split(self._partition)
        for group in probe.groups:
            if group.size != self._sizes[group.name]:
                row = " a row" if group.plate is not None else ""
                raise ValueError(
                    f"The {group.name} latents have {group.size} coordinates{row} in this call, "
                    f"but the guide was built for {self._sizes[group.name]}: "
                    + "; ".join(
                        f"site {site.name!r} has shape {tuple(site.shape)}, was "
                        f"{tuple(self._example.sites[site.name].shape)}"
                        for site in group.sites
                    )
                    + ". Call with data of the same shape, or build a new guide."
                )
        return probe

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramGuide:
        # A copy under the same name would share its weights with the original in Pyro's store.
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = dict(self.__dict__)
        state.pop("_pyro_context")
        state.pop("_pyro_name")
        example = state.pop("_example")
        copied.__dict__.update(copy.deepcopy(state, memo))
        copied.__dict__["_example"] = example
        copied.__dict__["_pyro_name"] = _unique(type(self))
        copied.__dict__["_pyro_context"] = type(self._pyro_context)()
        return copied


def _unique(cls: type) -> str:
    return f"{cls.__name__.lower()}_{next(_COUNTER)}"


class Guide(ProgramGuide):
    """One cell of the grid: a posterior for any Pyro program.

        lam   = scheme(group, call)                         (B, P)
        u     ~ family(lam)                                 (B, K)   in unconstrained space
        z     = biject_to(support)(u)

    Latents outside the data plate are global: they get the Local scheme of the same family. The
    covariance between global and local latents is represented only where one group holds
    everything (``data_plate=None``). A composite guide has several cells, each for some of the
    latents, and q is their product.

    Args:
        model: Any Pyro program.
        *args: Positional arguments of an example call; their shapes fix the parameters' shapes.
        family: A callable from a packed size K to a :class:`guides.families.family.Family`.
        scheme: A callable ``(init, group, call)`` to a :class:`guides.schemes.scheme.Scheme`,
            used for the latents of the data plate.
        cells: For a composite guide, in place of ``family`` and ``scheme``: a mapping from
            ``"global"``, ``"data"``, the name of a plate or a pattern of site names (as in
            ``fnmatch``) to a pair ``(family, scheme)``. Every latent must be covered once.
        model_kwargs: Keyword arguments of the example call.
        data_plate: See :func:`guides.layout.layout`.
        jacobian: For families without a density: score values in unconstrained space, with the
            log-determinants of the maps to the supports. By default without, as AutoDelta.
        name: Prefix of the guide's parameters in Pyro's store; unique by default.

    Raises:
        ValueError: Where an amortized scheme has no data plate to work on, a latent is masked,
            the cells of a composite guide leave out a latent or cover it twice, or the layout
            cannot be read (:func:`guides.layout.layout`).

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> from guides.families.normal import Normal
        >>> guide = Guide(model, torch.zeros(5), family=Normal, scheme=Local)
        >>> guide(torch.zeros(5))["z"].shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Program,
        *args: Any,
        family: Callable[[int], Family] | None = None,
        scheme: Callable[[Tensor, Group, Call], Scheme] = Local,
        cells: Mapping[str, Cell] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        data_plate: str | None = "auto",
        jacobian: bool | None = None,
        name: str | None = None,
    ) -> None:
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        super().__init__(model, args, kwargs, data_plate=data_plate, name=name)
        self._covered: dict[str, list[str]] = {}
        if (family is None) == (cells is None):
            raise ValueError("Pass either family= (one cell), or cells= (a composite guide).")
        if family is not None:
            chosen = {group.name: (family, scheme) for group in self._example.groups}
            _check_data_plate(self._example, scheme)
        else:
            chosen = self._compose(cells or {})
        self._order(chosen)
        self._example_call = (args, kwargs)
        families: dict[str, Family] = {}
        for group in self._example.groups:
            member = chosen[group.name][0](group.size).to(group.device)
            families[group.name] = (
                member.to(group.dtype) if group.dtype.is_floating_point else member
            )
        self.families = nn.ModuleDict(families)
        self.has_density = all(member.has_density for member in families.values())
        if jacobian is not None and not jacobian and self.has_density:
            raise ValueError(
                "jacobian=False drops the change of variables, which only a family without a "
                "density (delta) may do: the ELBO of a density needs it."
            )
        self.jacobian = self.has_density if jacobian is None else jacobian
        # Grows while schemes are built: they may ask for what comes before them.
        self.schemes = nn.ModuleDict()
        call = self._call(args, kwargs, self._example)
        for group in self._example.groups:
            make = Local if group.plate is None else chosen[group.name][1]
            init = families[group.name].init(start_of(group))
            self.schemes[group.name] = make(init, group, call).to(group.device)
        rows = [group.name for group in self._example.groups if group.plate is not None]
        # One table of free rows is enough to keep new rows out.
        self.amortized = bool(rows) and all(self.schemes[name].amortized for name in rows)
        self._check()
        del self._example_call
        for module in self.schemes.modules():
            if isinstance(module, Scheme):
                module._built = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what belongs to a scheme: set on the guide it would change nothing."""
        schemes = self.__dict__.get("_modules", {}).get("schemes")
        if schemes is not None and name not in self.__dict__ and not hasattr(type(self), name):
            owners = [key for key, scheme in schemes.items() if name in scheme.settings]
            if owners:
                raise AttributeError(
                    f"{name!r} is a setting of the scheme of group {' and of '.join(owners)}: "
                    f"guide.schemes[{owners[0]!r}].{name} = {value!r}."
                )
        super().__setattr__(name, value)

    def _compose(self, cells: Mapping[str, Cell]) -> dict[str, Cell]:
        """Split the groups so that every one has a single cell; the cell by group."""
        if not cells:
            raise ValueError(
                "A composite guide needs a cell for its latents, and the mapping is empty. For "
                'one guide of all latents pass its name; else for example {"global": "normal", '
                '"data": "amortized_normal"}.'
            )
        covered: dict[str, list[str]] = {site: [] for site in self.latents}
        self._covered = covered
        for key in cells:
            for site in _matched(key, self._example):
                covered[site].append(key)
        sites = self._example.sites
        for site, keys in covered.items():
            if len(keys) != 1:
                problem = f"{' and '.join(map(repr, keys))} {'both' if len(keys) == 2 else 'all'}"
                raise ValueError(
                    f"{f'{problem} cover' if keys else 'No cell covers'} latent site {site!r}. "
                    f"Every latent needs exactly one cell: {_cover(site, keys, covered)} The "
                    f"cells are {', '.join(map(repr, cells))}, the latents "
                    f"{', '.join(self.latents)}."
                )
        partition: dict[str, list[str]] = {}
        chosen: dict[str, Cell] = {}
        for group in self._example.groups:
            keys = list(dict.fromkeys(covered[site.name][0] for site in group.sites))
            for i, key in enumerate(keys):
                own = [site.name for site in group.sites if covered[site.name][0] == key]
                name = group.name if len(keys) == 1 else f"{group.name}_{i}"
                partition[name], chosen[name] = own, cells[key]
                rowless = all(sites[s].row_dim is None for s, k in covered.items() if key in k)
                if rowless and _is_amortized(cells[key][1]):
                    raise ValueError(
                        f"Cell {key!r} is amortized, but global latents have no rows to read. "
                        "Use the family alone, for example 'multivariate_normal'."
                    )
        self._split(partition)
        return chosen

    def cell_of(self, group: str) -> str | None:
        """The key of the cell that a group belongs to; None for a guide of one cell."""
        if not self._covered:
            return None
        found = next(item for item in self._example.groups if item.name == group)
        return self._covered[found.sites[0].name][0]

    def _order(self, chosen: dict[str, Cell]) -> None:
        """Split groups by site for the schemes that represent the dependence between sites."""
        partition: dict[str, list[str]] = {}
        for group in self._example.groups:
            scheme = chosen[group.name][1]
            order = getattr(getattr(scheme, "func", scheme), "order", None)
            names = [site.name for site in group.sites]
            if order is None or group.plate is None:
                partition[group.name] = names
                continue
            if len(names) < 2:
                raise ValueError(
                    f"The scheme {_words(scheme)} represents the dependence between latent sites "
                    f"of a row, and there is one only: {names[0]}. Use the amortized guide of the "
                    "same family."
                )
            cell = chosen.pop(group.name)
            for name in reversed(names) if order == "reversed" else names:
                key = f"{group.name}_{name}".replace(".", "_")
                while key in partition or key in chosen:
                    # Sites "a.b" and "a_b" are two.
                    key += "_"
                partition[key], chosen[key] = [name], cell
        if list(partition) != [group.name for group in self._example.groups]:
            self._split(partition)

    def _check(self) -> None:
        example = self._example
        # Compares values, and those of a call that was rebuilt from its shapes say nothing.
        if not self.amortized and is_validation_enabled():
            _check_subsample_is_used(self, example)
        masked = [
            site.name
            for group in example.groups
            for site in group.sites
            if site.masked and self.families[group.name].has_density
        ]
        if masked:
            raise ValueError(
                f"Latent site {masked[0]!r} is masked: where its mask is off the prior is gone "
                "and the ELBO grows without bound. Sample it without the mask (mask only what "
                "is observed), or use the delta family."
            )

    def _call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Layout) -> Call:
        return Call(self.model, args, dict(kwargs), read, guide=self)

    @property
    def plain(self) -> frozenset[str]:
        """Sites of the cells without a density, unless ``jacobian=True``."""
        if self.jacobian:
            return frozenset()
        points = [g for g in self._example.groups if not self.families[g.name].has_density]
        return frozenset(site.name for group in points for site in group.sites)

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """The family at the scheme's parameters."""
        lam = self.schemes[group.name](group, replace(call, upstream=upstream))
        family = self.families[group.name]
        record = active()
        weighted = next(family.parameters(), None) is not None
        if weighted and record and record[-1].group == group.name and record[-1].fraction < 1.0:
            # Its own weights, too, learn from the mean over the iterations.
            return PushedDistribution(Scaled(family, record[-1].fraction), group.batch(lam))
        return family.distribution(group.batch(lam))

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The family's location at the scheme's parameters."""
        return self.families[group.name].location(self.schemes[group.name](group, call))

    def parameters_of(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The parameters of q by group, ``(B, P)`` or ``(P,)``.

        Groups that depend on others get their parameters at the centers of those.
        """
        read = self._layout(args, kwargs, None)
        call = self._call(args, kwargs, read)
        found: dict[str, Tensor] = {}
        located: dict[str, Tensor] = {}
        with self._pyro_context:
            for group in read.groups:
                found[group.name] = self.schemes[group.name](group, upstream_of(call, located))
                located[group.name] = self.families[group.name].location(found[group.name])
        return found

    def __repr__(self) -> str:
        """Family, scheme, what each group holds, and what the guide can do."""
        lines = []
        for group in self._example.groups:
            rows = "" if group.plate is None else f" per row of plate {group.plate.name!r}"
            lines.append(
                f"  {group.name}: {type(self.families[group.name]).__name__} x "
                f"{type(self.schemes[group.name]).__name__}, {group.size} coordinates{rows}: "
                + ", ".join(site.name for site in group.sites)
            )
        parts = {group.plate is None for group in self._example.groups}
        if len(parts) > 1:
            lines.append(
                "  covariance between global and data latents: not represented "
                "(data_plate=None puts all into one group)"
            )
        example = self._example
        external = all(f.scores_external_points for f in self.families.values())
        lines.append(
            f"  density: {_yes(self.has_density)}, amortized: {_yes(self.amortized)}, scores "
            f"external points: {_yes(external and self.has_density)}, minibatches: "
            f"{_yes(example.data_plate is not None)}"
        )
        return "Guide(\n" + "\n".join(lines) + "\n)"


def _check_data_plate(example: Layout, scheme: Any) -> None:
    if not _is_amortized(scheme) or example.group("data") is not None:
        return
    if example.ambiguous:
        raise ValueError(
            "Several plates hold every observed site, so an amortized guide cannot tell "
            f"which of them holds the data: pass data_plate= one of "
            f"{', '.join(example.ambiguous)}."
        )
    raise ValueError(
        "An amortized guide needs latents inside the data plate "
        f"({'none found' if example.data_plate is None else repr(example.data_plate.name)}"
        f"); all latents of this program are global: {', '.join(example.sites)}. Use the "
        "same family without an encoder."
    )


def _is_amortized(scheme: Any) -> bool:
    return bool(getattr(getattr(scheme, "func", scheme), "amortized", False))


def _words(scheme: Any) -> str:
    return str(getattr(getattr(scheme, "func", scheme), "__name__", "structured"))


def _matched(key: str, example: Layout) -> list[str]:
    """The latent sites that a key of a composite guide names."""
    sites = example.sites.values()
    plate = example.data_plate
    if key == "global":
        found = [site.name for site in sites if site.row_dim is None]
    elif key == "data" or (plate is not None and key == plate.name):
        found = [site.name for site in sites if site.row_dim is not None]
    elif key in example.plates:
        found = [s.name for s in sites if any(p.name == key for p in s.plates)]
    else:
        found = [site.name for site in sites if fnmatch.fnmatchcase(site.name, key)]
    if not found:
        raise ValueError(
            f"Cell {key!r} covers no latent: it is neither 'global' nor 'data' nor a plate of the "
            f"program ({', '.join(example.plates) or 'it has none'}), and no latent site matches. "
            f"{did_you_mean(key, ('global', 'data', *example.plates, *example.sites))}"
            f"Latents: {', '.join(example.sites)}."
        )
    return found


def _cover(site: str, keys: Sequence[str], covered: Mapping[str, Sequence[str]]) -> str:
    """What to change in the keys, so that a latent has one cell."""
    if not keys:
        return f'add one for it, "{site}": "normal".'
    widest = max(keys, key=lambda key: sum(key in others for others in covered.values()))
    rest = [s for s, others in covered.items() if widest in others and len(others) == 1]
    if rest:
        return f"in place of {widest!r} name what it is left with, {', '.join(map(repr, rest))}."
    return f"leave out {widest!r}."


def upstream_of(call: Call, located: Mapping[str, Tensor]) -> Call:
    """The call with the groups before held at these packed values."""
    upstream = {
        name: call.layout.group(name).batch(value)  # type: ignore[union-attr]
        for name, value in located.items()
    }
    return replace(call, upstream=upstream)


def _check_subsample_is_used(guide: ProgramGuide, example: Layout) -> None:
    """A subsample that the program draws but whose rows it ignores names no rows at all."""
    plate = example.data_plate
    if plate is None or not plate.random or not example.observed:
        return
    moved = guide._layout(
        guide._example_call[0],
        guide._example_call[1],
        {plate.name: (plate.index + 1) % plate.size},
    )
    if all(torch.equal(moved.observed[n].value, o.value) for n, o in example.observed.items()):
        raise ValueError(
            f"Plate {plate.name!r} draws {plate.num_rows} of {plate.size} rows at random, but the "
            "data of the call do not follow the draw, so which rows they are is not known. Use "
            "the drawn rows (`with pyro.plate(...) as rows: ... obs=x[rows]`), or pass their "
            "numbers: subsample=index."
        )


def start_of(group: Group) -> Tensor:
    """Where q starts, in unconstrained space: at the priors' locations, a little off.

    At an exactly symmetric point the components of a mixture, or the factors of a product, have
    equal gradients and would never part.
    """
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(group.size, generator=generator, dtype=torch.float64)
    start = start.to(dtype=group.dtype, device=group.device)
    for site, part in group.slices():
        if is_location_scale(site.fn):
            loc = site.flatten(location(site.fn).detach()).to(start)
            loc = loc.mean(0) if group.plate is not None else loc
            start[part] += torch.where(torch.isfinite(loc), loc, 0.0)
    return start


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"

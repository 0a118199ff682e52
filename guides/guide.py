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
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from guides.families.family import Family
from guides.layout import Layout, layout
from guides.location_scale import is_location_scale, location
from guides.probe import Program
from guides.schemes.local import Local
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group, Site
from guides.supports import support_numbers

__all__ = ["Guide", "ProgramGuide"]

_COUNTER = itertools.count()


class _Reference:
    """Holds the model without owning it: no submodule, and never copied with the guide."""

    def __init__(self, model: Program) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Reference:
        return self


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
        self._sizes = {group.name: group.size for group in first.groups}
        self._example = first

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
        call = Call(self.model, args, dict(kwargs), read)
        packed: dict[str, Tensor] = {}
        values: dict[str, Tensor] = {}
        for group in read.groups:
            with contextlib.ExitStack() as stack:
                if group.plate is not None:
                    stack.enter_context(plates[group.plate.name])
                q = self.group_distribution(group, call, packed)
                # The prefix keeps auxiliary names of several guides of one program apart.
                packed[group.name] = pyro.sample(
                    f"_{self._pyro_name}_{group.name}", q, infer={"is_auxiliary": True}
                )
            for name, unconstrained in group.unpack(packed[group.name]).items():
                values[name] = self._sample_site(read.sites[name], unconstrained, plates)
        return values

    def _sample_site(
        self, site: Site, unconstrained: Tensor, plates: dict[str, pyro.plate]
    ) -> Tensor:
        value, log_det = site.constrain(unconstrained)
        with contextlib.ExitStack() as stack:
            for plate in site.plates:
                if plate.name not in plates:
                    plates[plate.name] = pyro.plate(plate.name, plate.size, dim=plate.dim)
                stack.enter_context(plates[plate.name])
            if log_det is None or not self.jacobian:
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
        call = Call(self.model, args, dict(kwargs), read)
        draws: dict[str, Tensor] = {}
        log_q: dict[str, Tensor] = {}
        upstream: dict[str, Tensor] = {}
        num_batch = 0 if read.data_plate is None else -read.data_plate.dim
        with self._pyro_context:
            for group in read.groups:
                q = self.group_distribution(group, call, upstream)
                # q of a group with upstream draws is batched over them already.
                batched = len(q.batch_shape) > (0 if group.plate is None else num_batch)
                value = q.rsample(() if batched else (num_samples,))
                log_q[group.name] = q.log_prob(value).reshape(num_samples, *group.shape[:-1])
                draws[group.name] = value.reshape(num_samples, *group.shape)
                if group.plate is None:
                    ones = (1,) * num_batch
                    upstream[group.name] = value.reshape(num_samples, *ones, group.size)
        return draws, log_q, read

    def locations(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The center of q, as constrained values by site."""
        read = self._layout(args, kwargs, None)
        call = Call(self.model, args, dict(kwargs), read)
        with self._pyro_context:
            return read.constrain(
                {group.name: self.group_location(group, call) for group in read.groups}
            )

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
    everything (``data_plate=None``).

    Args:
        model: Any Pyro program.
        *args: Positional arguments of an example call; their shapes fix the parameters' shapes.
        family: A callable from a packed size K to a :class:`guides.families.family.Family`.
        scheme: A callable ``(init, group, call)`` to a :class:`guides.schemes.scheme.Scheme`,
            used for the latents of the data plate.
        model_kwargs: Keyword arguments of the example call.
        data_plate: See :func:`guides.layout.layout`.
        jacobian: For families without a density: score values in unconstrained space, with the
            log-determinants of the maps to the supports. By default without, as AutoDelta.
        name: Prefix of the guide's parameters in Pyro's store; unique by default.

    Raises:
        ValueError: Where an amortized scheme has no data plate to work on, a latent is masked, or
            the layout cannot be read (:func:`guides.layout.layout`).

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
        family: Callable[[int], Family],
        scheme: Callable[[Tensor, Group, Call], Scheme] = Local,
        model_kwargs: Mapping[str, Any] | None = None,
        data_plate: str | None = "auto",
        jacobian: bool | None = None,
        name: str | None = None,
    ) -> None:
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        super().__init__(model, args, kwargs, data_plate=data_plate, name=name)
        call = Call(model, args, kwargs, self._example)
        self._example_call = (args, kwargs)
        families, schemes = {}, {}
        for group in self._example.groups:
            member = family(group.size).to(group.device)
            if group.dtype.is_floating_point:
                member = member.to(group.dtype)
            start = _start(group)
            make = Local if group.plate is None else scheme
            families[group.name] = member
            schemes[group.name] = make(member.init(start), group, call).to(group.device)
        self.families = nn.ModuleDict(families)
        self.schemes = nn.ModuleDict(schemes)
        self.has_density = all(member.has_density for member in families.values())
        self.amortized = any(member.amortized for member in schemes.values())
        if jacobian is not None and not jacobian and self.has_density:
            raise ValueError(
                "jacobian=False drops the change of variables, which only a family without a "
                "density (delta) may do: the ELBO of a density needs it."
            )
        self.jacobian = self.has_density if jacobian is None else jacobian
        self._check(scheme)
        del self._example_call

    def _check(self, scheme: Any) -> None:
        example = self._example
        amortizing = getattr(getattr(scheme, "func", scheme), "amortized", False)
        if not amortizing:
            _check_subsample_is_used(self, example)
        if amortizing and "data" not in self.schemes:
            if example.ambiguous:
                raise ValueError(
                    "Several plates hold every observed site, so an amortized guide cannot tell "
                    f"which of them holds the data: pass data_plate= one of "
                    f"{', '.join(example.ambiguous)}."
                )
            raise ValueError(
                "An amortized guide needs latents inside the data plate "
                f"({'none found' if example.data_plate is None else repr(example.data_plate.name)}"
                f"); all latents of this program are global: {', '.join(self.latents)}. Use the "
                "same family without an encoder."
            )
        masked = [site.name for site in example.sites.values() if site.masked]
        if masked and self.has_density:
            raise ValueError(
                f"Latent site {masked[0]!r} is masked: where its mask is off the prior is gone "
                "and the ELBO grows without bound. Sample it without the mask (mask only what "
                "is observed), or use the delta family."
            )

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """The family at the scheme's parameters."""
        lam = self.schemes[group.name](group, call)
        return self.families[group.name].distribution(group.batch(lam))

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The family's location at the scheme's parameters."""
        lam = self.schemes[group.name](group, call)
        return self.families[group.name].location(lam)

    def parameters_of(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The parameters of q by group, ``(B, P)`` or ``(P,)``."""
        read = self._layout(args, kwargs, None)
        call = Call(self.model, args, dict(kwargs), read)
        with self._pyro_context:
            return {g.name: self.schemes[g.name](g, call) for g in read.groups}

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
        if len(self._example.groups) > 1:
            lines.append(
                "  covariance between global and data latents: not represented "
                "(data_plate=None puts all into one group)"
            )
        external = all(f.scores_external_points for f in self.families.values())
        lines.append(
            f"  density: {_yes(self.has_density)}, amortized: {_yes(self.amortized)}, scores "
            f"external points: {_yes(external and self.has_density)}, minibatches: yes"
        )
        return "Guide(\n" + "\n".join(lines) + "\n)"


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


def _start(group: Group) -> Tensor:
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

"""The log joint of any Pyro program as one pure function of its latents and rows.

    log p(x, z) = sum_n rows[n] + global        rows: (B,), one term a datum
    unscaled by the data plate's N/B;           the user's poutine.scale and poutine.mask stay

Predictive coding, refinement, Laplace, Langevin and capture all differentiate this function. It
is free of random draws and side effects, so ``torch.func`` transforms (grad, vmap, vjp) apply.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides import location_scale
from guides.layout import Layout
from guides.layout import layout as read_layout
from guides.probe import Program
from guides.ripple import ripple

__all__ = ["LogJoint", "SiteTerms"]


class SiteTerms(Messenger):
    """Collect the log density of every sample site, reduced to rows.

    ``terms[name]`` is ``(B,)`` for a site in the data plate, a scalar otherwise; the data plate's
    N/B is divided out, all other scales and masks act.

    Args:
        layout: The layout whose data plate and indices hold.
        values: Constrained values to substitute, by site.
        errors: Standardized values of location-scale sites, by site; the value follows from them.
        center: Set missing latents to the mean their parents predict.
        density: Whether to evaluate log densities at all.
        complete: Whether an unobserved site without a value is an error.
    """

    def __init__(
        self,
        layout: Layout,
        values: Mapping[str, Tensor] | None = None,
        *,
        errors: Mapping[str, Tensor] | None = None,
        center: bool = False,
        density: bool = True,
        complete: bool = True,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.given = {} if values is None else values
        self.errors = {} if errors is None else errors
        self.center = center
        self.density = density
        self.complete = complete
        self.indices = layout.indices
        self.values: dict[str, Tensor] = {}
        self.masks: dict[str, Any] = {}
        self.terms: dict[str, Tensor] = {}
        self.fns: dict[str, Any] = {}
        self.reference: SiteTerms | None = None

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name in self.indices:
                msg["value"] = self.indices[name]
        elif msg["is_observed"]:
            return
        elif name in self.given:
            msg["value"] = self.given[name]
        elif name in self.errors:
            msg["value"] = location_scale.shift(fn, self.errors[name])
        elif self.center and name in self.layout.sites:
            msg["value"] = _prediction(fn, self.layout.sites[name])
        elif self.complete:
            raise ValueError(
                f"Site {name!r} has neither data nor a value, so its log density cannot be "
                "evaluated. Call with the observed data, and with a value for every latent: "
                f"{', '.join(self.layout.sites) or 'none'}."
            )

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if not site_is_subsample(msg) and not msg["infer"].get("_deterministic", False):
            self.record(msg)

    def record(self, site: Mapping[str, Any]) -> None:
        """Write down one sample site: a message, or a node of a trace."""
        name = site["name"]
        self.values[name] = site["value"]
        self.fns[name] = site["fn"]
        self.masks[name] = site["mask"]
        if not self.density:
            return
        plate = self.layout.data_plate
        scale = site["scale"]
        if self.in_data_plate(site) and plate.size != plate.num_rows:
            scale = scale / plate.scale
        self.terms[name] = self.reduce(
            scale_and_mask(self.density_of(site), scale, site["mask"]), site
        )

    def in_data_plate(self, site: Mapping[str, Any]) -> bool:
        """Whether a site is inside the data plate."""
        plate = self.layout.data_plate
        frames = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
        return plate is not None and plate.name in frames

    def reduce(self, term: Tensor, site: Mapping[str, Any]) -> Tensor:
        """Sum a term at a site's batch shape to ``(B,)``, outside the data plate to a scalar."""
        plate = self.layout.data_plate
        if not self.in_data_plate(site):
            return term.sum()
        return _sum_to_rows(term, plate.dim, plate.num_rows)

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        """The term of a site at its batch shape, before scales and masks: its log density."""
        term: Tensor = site["fn"].log_prob(site["value"])
        return term

    def total(self) -> tuple[Tensor, Tensor]:
        """Sum of the terms: rows ``(B,)`` (``(0,)`` without a data plate) and a scalar."""
        rows = [term for term in self.terms.values() if term.dim() == 1]
        other = [term for term in self.terms.values() if term.dim() == 0]
        like = (rows + other)[0] if rows or other else torch.zeros(())
        return sum(rows, like.new_zeros(self.layout.num_rows)), sum(other, like.new_zeros(()))


def _sum_to_rows(term: Tensor, dim: int, num_rows: int) -> Tensor:
    if term.dim() < -dim or term.shape[dim] != num_rows:
        shape = (1,) * max(-dim - term.dim(), 0) + tuple(term.shape)
        position = len(shape) + dim
        term = term.expand(*shape[:position], num_rows, *shape[position + 1 :])
    return term.movedim(dim, 0).reshape(num_rows, -1).sum(-1)


def _prediction(fn: Any, site: Any) -> Tensor:
    """The mean where it is finite and inside the support, else the center of that support."""
    if location_scale.is_location_scale(fn):
        return location_scale.location(fn)
    fallback = site.constrain(
        torch.zeros(
            site.batch_shape + site.unconstrained_event, dtype=site.dtype, device=site.device
        )
    )[0]
    try:
        mean = fn.mean.expand(site.shape)
    except (NotImplementedError, AttributeError):
        return fallback
    valid = torch.isfinite(site.unconstrain(mean)).all() & torch.isfinite(mean).all()
    return torch.where(valid, mean, fallback)


class LogJoint:
    """log p(x, z) of one call of a program, as a pure function of z.

    Building it traces the program once, so that its parameters are registered in the parameter
    store before any transform runs. Parameters and data are read live.

    Args:
        model: Any Pyro program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        data_plate: See :func:`guides.layout.layout`.
        layout: A layout of this call, if it was read already.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> log_joint = LogJoint(model, (torch.zeros(3),))
        >>> rows, global_term = log_joint.rows({"z": torch.zeros(3)})
        >>> rows.shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        data_plate: str | None = "auto",
        layout: Layout | None = None,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = {} if kwargs is None else kwargs
        if layout is None:
            layout = read_layout(model, args, self.kwargs, data_plate=data_plate)
        self.layout = layout

    def run(
        self,
        values: Mapping[str, Tensor] | None = None,
        *,
        validate: bool = False,
        expose_params: bool = False,
        terms: type[SiteTerms] = SiteTerms,
        reference: SiteTerms | None = None,
        **options: Any,
    ) -> SiteTerms:
        """Run the program with values substituted.

        Args:
            values: Constrained values by site.
            validate: Let distributions check their arguments and values. Off by default, because
                the checks read tensor values, which transforms such as vmap cannot do.
            expose_params: Let handlers outside see the parameters of the program.
            terms: What is collected of every site; see :meth:`SiteTerms.density_of`.
            reference: An earlier run that ``terms`` compares with.
            **options: See :class:`SiteTerms`.
        """
        collected = terms(self.layout, values, **options)
        collected.reference = reference
        hidden = poutine.block(hide_types=["sample"]) if expose_params else poutine.block()
        with pyro.validation_enabled(validate), hidden, collected:
            self.model(*self.args, **self.kwargs)
        return collected

    def rows(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log joint of constrained values.

        Args:
            values: ``{site: batch_shape + event_shape}`` for every latent.

        Returns:
            Terms of the rows ``(B,)`` and the sum of all terms outside the data plate.
        """
        return self.run(values).total()

    def sites(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log density by site, latent and observed: ``(B,)`` in the data plate, else a scalar."""
        return self.run(values).terms

    def packed(
        self,
        packed: Mapping[str, Tensor],
        *,
        jacobian: bool = True,
        plain: Collection[str] = (),
        noncentered: Collection[str] = (),
        expose_params: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log joint of packed, unconstrained latents.

        Args:
            packed: ``{group: (B, K) or (K,)}``.
            jacobian: Add the log-determinants of the maps to the supports, which makes this the
                log density in unconstrained space.
            plain: Sites whose log-determinants are left out all the same.
            noncentered: Location-scale sites whose slots hold standardized values; the density
                stays that of the centered variables.
            expose_params: As in :meth:`run`.

        Returns:
            Terms of the rows ``(B,)`` and a scalar, as in :meth:`rows`.
        """
        values, errors, log_dets = self.unpack(packed, noncentered)
        # Left out where it is off: a log joint that exposes its parameters always does.
        exposed = {"expose_params": True} if expose_params else {}
        rows, other = self.run(values, errors=errors, **exposed).total()
        if jacobian:
            for name, log_det in log_dets.items():
                if name in plain:
                    continue
                if self.layout.sites[name].row_dim is None:
                    other = other + log_det
                else:
                    rows = rows + log_det
        return rows, other

    def unpack(
        self, packed: Mapping[str, Tensor], noncentered: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Split packed latents: constrained values, standardized values, log-determinants."""
        values, errors, log_dets = {}, {}, {}
        for group in self.layout.groups:
            placed = group.unpack(group.batch(packed[group.name]))
            for site in group.sites:
                if site.name in noncentered:
                    errors[site.name] = placed[site.name]
                    continue
                values[site.name], log_det = site.constrain(placed[site.name])
                if log_det is not None:
                    log_dets[site.name] = site.rows(log_det)
        return values, errors, log_dets

    def check_rows(self, packed: Mapping[str, Tensor], *, jacobian: bool = True) -> None:
        """Raise where the latents of a row reach another row, or a term outside the data plate.

        Rows that talk to each other relax, and are weighted, wrongly one by one.

        Args:
            packed: Where to look, ``{group: (B, K) or (K,)}``.
            jacobian: As in :meth:`packed`.
        """
        if "data" not in packed:
            return

        def others(local: Tensor) -> tuple[Tensor, Tensor]:
            rows, other = self.packed({**packed, "data": local}, jacobian=jacobian)
            return rows[0], other

        with torch.no_grad():
            # Off the given point, where a coupling may happen to be flat.
            point = packed["data"] + 0.1 * ripple(packed["data"])
            first = torch.func.grad(lambda local: others(local)[0])(point)
            outside = torch.func.grad(lambda local: others(local)[1])(point)
        if bool((first[1:] != 0).any()) or bool((outside != 0).any()):
            raise ValueError(
                f"Rows of plate {self.layout.data_plate.name!r} are coupled: the latents of one "
                "row reach another row, or a site outside the plate (batch normalization does "
                "so, too). Pass data_plate=None, which takes all latents as one group."
            )

    def total(self, rows: Tensor, other: Tensor) -> Tensor:
        """The log joint of all N rows: rows scaled by N/B, plus the terms outside the plate."""
        return self.layout.scale * rows.sum() + other

    def predictions(self, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Latents set to what their parents predict, from the top down: the feed-forward start.

        Args:
            given: Latents that are known already, constrained values by site.

        Returns:
            Constrained values of all latents by site.
        """
        with torch.no_grad():
            values = self.run(given, center=True, density=False).values
        return {name: values[name].detach() for name in self.layout.sites}

    def standardize(
        self, values: Mapping[str, Tensor], names: Collection[str]
    ) -> dict[str, Tensor]:
        """Standardized values of location-scale sites, given constrained values of all latents."""
        with torch.no_grad():
            fns = self.run(values, density=False).fns
            return {name: location_scale.inverse(fns[name], values[name]) for name in names}

"""Draws and log densities of all rows, put together from the calls that hold them.

Sites outside the data plate are drawn in the first call and replayed in the others; rows are
concatenated. What is outside the data plate must not change with the rows, and is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guides.diagnostics.axis_names import Axes
from guides.diagnostics.resimulation import Call, Records, resimulate
from guides.layout import Layout
from guides.probe import Program
from guides.supports import unwrap

__all__ = ["Assembly", "assemble"]


@dataclass
class Assembly:
    """Groups of an export in the making: ``{group: {name: (values, axes)}}``.

    Args:
        groups: Finished variables.
        parts: Rows gathered so far.
    """

    groups: dict[str, dict[str, tuple[Tensor, Axes]]] = field(default_factory=dict)
    parts: dict[tuple[str, str], list[Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All variable names."""
        return {name for group in self.groups.values() for name in group}

    def add(self, group: str, name: str, values: Tensor, axes: Axes) -> None:
        """Add a finished variable."""
        self.groups.setdefault(group, {})[name] = (values, axes)

    def gather(
        self, group: str, name: str, values: Tensor, axes: Axes, call: Call, lead: int = 1
    ) -> None:
        """Add the rows of one call; ``lead`` axes (the draws) stand before the site's own."""
        members = self.groups.setdefault(group, {})
        values = values.detach().cpu()
        if axes.row is not None:
            row = axes.row + lead
            kept = values.movedim(row, 0)[call.skip :].movedim(0, row)
            parts = self.parts.setdefault((group, name), [])
            parts.append(kept)
            members[name] = (kept, axes)
        elif name not in members:
            members[name] = (values, axes)
        elif group not in ("posterior_predictive", "prior", "prior_predictive"):
            _check_same(name, members[name][0], values)

    def finish(self) -> None:
        """Concatenate the rows."""
        for (group, name), parts in self.parts.items():
            axes = self.groups[group][name][1]
            lead = parts[0].dim() - len(axes.names)
            row = lead + (axes.row or 0)
            self.groups[group][name] = (torch.cat(parts, row), axes)


def assemble(
    model: Program,
    guide: Callable[..., Any],
    calls: Sequence[Call],
    num_samples: int,
    wanted: Collection[str],
) -> Assembly:
    """Draw from the guide, score and simulate the model, call by call.

    Args:
        model: The program.
        guide: Its guide.
        calls: Calls that hold all rows between them.
        num_samples: Number of draws S.
        wanted: Names of the groups wanted.
    """
    result = Assembly()
    shared: dict[str, dict[str, Tensor]] = {"guide": {}, "predictive": {}, "prior": {}}
    for number, call in enumerate(calls):
        observed = call.layout.observed
        drawn = resimulate(guide, call, num_samples, shared["guide"])
        latents = _latents(drawn, call.layout)
        if number == 0:
            _check_density(drawn, call.layout)
            if len(calls) > 1:
                _check_rows_are_drawn_in_plate(guide, drawn, call)
        _share(shared["guide"], drawn, _drawn_sites(drawn))
        scored = resimulate(model, call, num_samples, latents, random=False)
        _gather_scores(result, drawn, scored, call)
        for name in observed:
            axes = scored.axes[name]
            result.gather("observed_data", name, scored.values[name][0], axes, call, lead=0)
        if "posterior_predictive" in wanted:
            given = {**latents, **shared["predictive"]}
            predicted = _simulate(model, call, num_samples, given, "posterior_predictive")
            for name in observed:
                axes = predicted.axes[name]
                result.gather("posterior_predictive", name, predicted.values[name], axes, call)
            _share(shared["predictive"], predicted, observed)
        if {"prior", "prior_predictive"} & set(wanted):
            prior = _simulate(model, call, num_samples, shared["prior"], "prior")
            for name, values in prior.values.items():
                group = _prior_group(name, prior, call.layout)
                if group is not None:
                    result.gather(group, name, values, prior.axes[name], call)
            _share(shared["prior"], prior, {*call.layout.sites, *observed})
    result.finish()
    _total(result)
    return result


def _latents(drawn: Records, read: Layout) -> dict[str, Tensor]:
    latents = {}
    for name, site in read.sites.items():
        if name not in drawn.values:
            listed = ", ".join(n for n in drawn.values if n not in drawn.observed)
            raise ValueError(
                f"The guide has no site {name!r}, which the model samples. Sites of the guide: "
                f"{listed or 'none'}. Call the model with its observed data, and use a guide "
                "that was built for it."
            )
        value = drawn.values[name]
        try:
            latents[name] = value.expand(value.shape[:1] + site.shape)
        except RuntimeError:
            raise ValueError(
                f"The guide draws site {name!r} with shape {tuple(value.shape[1:])}, but this "
                f"call of the model needs {tuple(site.shape)}. A guide fitted to all rows at once "
                "cannot be asked for a part of them: leave batch_size out, or use a guide of this "
                "package."
            ) from None
    return latents


def _check_density(drawn: Records, read: Layout) -> None:
    def point(name: str) -> bool:
        fn = unwrap(drawn.fns[name])
        return type(fn).__name__ == "Delta" and not bool(drawn.log_density[name].any())

    auxiliary = {*drawn.values} - {*read.sites} - drawn.observed
    if all(point(name) for name in {*read.sites, *auxiliary}):
        raise ValueError(
            "This guide is a point mass: it has no density, so there is no posterior to export. "
            "Export the Laplace posterior at its point: "
            "guides.inference.laplace(model, values, args, kwargs)."
        )


def _check_rows_are_drawn_in_plate(guide: Callable[..., Any], drawn: Records, call: Call) -> None:
    """Replay what is outside the data plate: rows that do not move are not drawn inside it."""
    shared: dict[str, Tensor] = {}
    _share(shared, drawn, _drawn_sites(drawn))
    shared = {name: value[:2] for name, value in shared.items()}
    again = resimulate(guide, call, min(2, next(iter(drawn.values.values())).shape[0]), shared)
    for name, site in call.layout.sites.items():
        moved = (again.values[name] != drawn.values[name][:2]).any()
        if site.row_dim is not None and not bool(moved):
            raise ValueError(
                f"The guide draws site {name!r}, which is in the data plate, outside of that "
                "plate (all rows in one joint draw, or as a point), so rows of several "
                "minibatches cannot be put together. Leave batch_size out, or use a guide whose "
                "rows are independent given the global latents."
            )


def _drawn_sites(drawn: Records) -> set[str]:
    """Sites of a guide that hold its randomness.

    Point masses are left to follow from them: replayed, a value that comes out one rounding error
    away from the point would have density zero.
    """
    points = {name for name, fn in drawn.fns.items() if type(unwrap(fn)).__name__ == "Delta"}
    return set(drawn.values) - drawn.observed - points


def _share(shared: dict[str, Tensor], records: Records, names: Collection[str]) -> None:
    """Keep what was drawn outside the data plate, for replay in the next call."""
    for name in names:
        if records.axes[name].row is None:
            shared.setdefault(name, records.values[name])


def _simulate(
    model: Program, call: Call, num_samples: int, given: Mapping[str, Tensor], group: str
) -> Records:
    try:
        return resimulate(model, call, num_samples, given, simulate=call.layout.observed)
    except NotImplementedError as error:
        raise ValueError(
            f"The group {group!r} needs a program that can be simulated, but one of its "
            f"distributions has no sampler: {error or 'NotImplementedError'}. Leave the group "
            "out (an improper prior has neither prior nor prior_predictive): groups=[...]."
        ) from error


def _gather_scores(result: Assembly, drawn: Records, scored: Records, call: Call) -> None:
    for name, term in drawn.log_density.items():
        # An observed site of a guide is a factor of q, but a messenger runs the model along.
        if name not in drawn.observed or not drawn.interleaved:
            result.gather("log_q", name, term, drawn.axes[name].batch(), call)
    for name, value in scored.values.items():
        axes = scored.axes[name]
        if name in call.layout.sites:
            result.gather("posterior", name, value, axes, call)
            result.gather("log_prior", name, scored.log_density[name], axes.batch(), call)
        elif name in call.layout.observed:
            result.gather("log_likelihood", name, scored.log_density[name], axes.batch(), call)
        elif name in scored.log_density:
            result.gather("factor", name, scored.log_density[name], axes.batch(), call)
        else:
            result.gather("posterior", name, value, axes, call)


def _prior_group(name: str, records: Records, read: Layout) -> str | None:
    if name in read.observed:
        return "prior_predictive"
    if name in read.sites or name not in records.log_density:
        return "prior"
    return None


def _total(result: Assembly) -> None:
    def total(*groups: str) -> Tensor:
        terms = [term for group in groups for term, _ in result.groups.get(group, {}).values()]
        return sum((t.double().reshape(len(t), -1).sum(-1) for t in terms), torch.zeros(()))

    scalar = Axes((), 0, None)
    result.add("sample_stats", "lp", total("log_likelihood", "log_prior", "factor"), scalar)
    result.add("sample_stats", "log_q", total("log_q"), scalar)
    for name, (term, axes) in result.groups.get("factor", {}).items():
        result.add("sample_stats", f"factor.{name}", term, axes)


def _check_same(name: str, first: Tensor, other: Tensor) -> None:
    same = first.shape == other.shape and torch.allclose(
        first.double(), other.double(), rtol=1e-4, atol=1e-5, equal_nan=True
    )
    if not same:
        raise ValueError(
            f"Site {name!r} is outside the data plate but changes with the rows of the minibatch. "
            "Put it into the data plate, or leave batch_size out."
        )

"""Draws from any guide with both log densities, the raw material of every score and export.

    values ~ q(z | call)        log_q, log_p: one term a row where the guide allows it

Our guides, Pyro's autoguides (messengers too), and guides written by hand come out in one form:
values by site, and log densities split into rows of the data plate and the rest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.autoguide.effect import GuideMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides.arguments import check_number
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.layout import Layout, layout
from guides.pairs import check_follows, check_order
from guides.probe import Program
from guides.supports import unwrap

__all__ = [
    "Draws",
    "check_density",
    "check_same_program",
    "draw",
    "draws_rows_outside",
    "guide_terms",
    "over_draws",
]

_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Draws:
    """S draws from a guide.

    Args:
        values: Constrained values by site, ``(S,) + site shape``.
        log_q_rows: Guide log density of the rows, ``(S, B)``.
        log_q_global: Guide log density of everything else, ``(S,)``.
        log_p_rows: Log joint of the rows, ``(S, B)``, without the data plate's N/B.
        log_p_global: Log joint of everything else, ``(S,)``.
        layout: Layout of the call.
        joint: Whether weights are joint over rows: there are global latents, or the guide draws
            local latents outside the data plate. Then single rows have no weights of their own.
        rows_complete: Whether every local latent is drawn inside the data plate, so that
            differences of row terms are per-datum ELBO terms.
    """

    values: dict[str, Tensor]
    log_q_rows: Tensor
    log_q_global: Tensor
    log_p_rows: Tensor
    log_p_global: Tensor
    layout: Layout
    joint: bool
    rows_complete: bool

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return self.log_q_global.shape[0]


def draw(
    model: Program,
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_samples: int,
    data_plate: str | None = "auto",
    indices: Mapping[str, Tensor] | None = None,
) -> Draws:
    """Draw from a guide, without gradients.

    Args:
        model: The program.
        guide: Any guide for it: of this package, of Pyro, or written by hand.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        num_samples: Number of draws S.
        data_plate: See :func:`guides.layout.layout`; a guide of this package brings its own.
        indices: Row numbers for a plate that the program subsamples at random.

    Returns:
        The draws with both log densities.

    Raises:
        ValueError: Where the guide leaves out a latent site, or has no density (a point mass).
    """
    check_number("num_samples", num_samples, integer=True, least=1)
    check_order("(model, guide, *args)", model, guide)
    kwargs = {} if kwargs is None else kwargs
    with torch.no_grad():
        if isinstance(guide, ProgramGuide):
            values, log_q_rows, log_q_global, read = _draw_program_guide(
                guide, args, kwargs, num_samples, indices
            )
            outside = False
            if guide.model is not model:
                check_same_program(guide, model, args, kwargs)
                check_follows(guide, model, args, kwargs)
        else:
            read = layout(model, args, kwargs, data_plate=data_plate, indices=indices)
            values, log_q_rows, log_q_global, outside = _draw_any_guide(
                model, guide, args, kwargs, read, num_samples
            )
        log_joint = LogJoint(model, args, kwargs, layout=read)
        log_p_rows, log_p_global = over_draws(log_joint.rows, values, read)
    has_global = any(group.plate is None for group in read.groups)
    return Draws(
        values=values,
        log_q_rows=log_q_rows,
        log_q_global=log_q_global,
        log_p_rows=log_p_rows,
        log_p_global=log_p_global,
        layout=read,
        joint=has_global or outside or read.data_plate is None,
        rows_complete=not outside and read.data_plate is not None,
    )


def _draw_program_guide(
    guide: ProgramGuide,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    indices: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Layout]:
    if not guide.has_density:
        raise ValueError(
            "A delta guide is a point mass: it has no density, so it has no ELBO, evidence or "
            "importance weights. Score the Laplace posterior at its point: "
            "guides.inference.laplace(model, guide.locations(...), args, kwargs)."
        )
    packed, log_q, read = guide.rsample_packed(num_samples, args, kwargs, indices)
    some = next(iter(packed.values()))
    rows = some.new_zeros(num_samples, read.num_rows)
    other = some.new_zeros(num_samples)
    values: dict[str, Tensor] = {}
    for group in read.groups:
        if group.plate is None:
            other = other + log_q[group.name]
        else:
            rows = rows + log_q[group.name]
        for site, part in group.slices():
            shape = (num_samples, *(() if site.row_dim is None else (read.num_rows,)))
            slots = _spread(packed[group.name][..., part], site, read, num_samples)
            value, log_det = site.constrain(slots)
            values[site.name] = value.reshape(num_samples, *site.shape)
            if log_det is None:
                continue
            log_det = log_det.reshape(num_samples, *site.batch_shape)
            if site.row_dim is not None:
                log_det = log_det.movedim(log_det.dim() + site.row_dim, 1)
            reduced = log_det.reshape(*shape, -1).sum(-1)
            if site.row_dim is None:
                other = other - reduced
            else:
                rows = rows - reduced
    return values, rows, other, read


def _spread(packed: Tensor, site: Any, read: Layout, num_samples: int) -> Tensor:
    """Draws ``(S, B, k)`` or ``(S, k)`` at the site's own batch dimensions, draws leftmost."""
    ones = (1,) * read.depth
    if site.row_dim is None:
        return site.place(packed.reshape(num_samples, *ones, packed.shape[-1]))
    left, right = ones[: read.depth + site.row_dim], ones[: -site.row_dim - 1]
    return site.place(packed.reshape(num_samples, *left, read.num_rows, *right, packed.shape[-1]))


def _draw_any_guide(
    model: Program,
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    num_samples: int,
) -> tuple[dict[str, Tensor], Tensor, Tensor, bool]:
    draws: dict[str, list[Tensor]] = {name: [] for name in read.sites}
    rows, other = [], []
    outside = False
    for _ in range(num_samples):
        terms = guide_terms(guide, args, kwargs, read)
        missing = [name for name in read.sites if name not in terms.values]
        if missing:
            raise ValueError(
                f"Guide has no site {missing[0]!r}, which the model samples. Sites in the guide: "
                f"{', '.join(terms.values) or 'none'}."
            )
        check_density(terms, read)
        for name in read.sites:
            draws[name].append(terms.values[name].expand(read.sites[name].shape))
        local, rest = terms.total()
        rows.append(local)
        other.append(rest)
        outside = outside or draws_rows_outside(terms, read)
    return (
        {name: torch.stack(values) for name, values in draws.items()},
        torch.stack(rows),
        torch.stack(other),
        outside,
    )


def guide_terms(
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    values: Mapping[str, Tensor] | None = None,
    *,
    expose_params: bool = False,
) -> SiteTerms:
    """Run a guide once and reduce the log densities of its sites.

    Args:
        guide: Any guide.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        read: Layout of the call.
        values: Values that its sites take in place of draws, by site; a ``GuideMessenger`` cannot
            be given any.
        expose_params: Let handlers outside see the parameters of the guide.
    """
    terms = SiteTerms(read, values, complete=False)
    messenger = poutine.unwrap(guide)
    hide = ["sample"] if expose_params else None
    if isinstance(messenger, GuideMessenger):
        # A messenger runs model and guide interleaved; only its own trace is q.
        with poutine.block(hide_types=hide):
            guide(*args, **kwargs)
        for name, site in messenger.get_traces()[1].nodes.items():
            if site["type"] == "sample" and not site_is_subsample(site):
                terms.record({**site, "name": name})
        return terms
    with poutine.block(hide_types=hide), terms:
        guide(*args, **kwargs)
    return terms


def check_density(terms: SiteTerms, read: Layout) -> None:
    """Raise where a guide's run shows a point mass at a latent."""

    def point(name: str) -> bool:
        fn = unwrap(terms.fns[name])
        return type(fn).__name__ == "Delta" and not bool(torch.as_tensor(fn.log_density).any())

    # A latent that is a point without any auxiliary draw that it could follow has no density.
    auxiliary = [name for name in terms.values if name not in read.sites and not point(name)]
    points = [name for name in read.sites if point(name)]
    if points and (not auxiliary or any(_stands_alone(name, terms) for name in points)):
        raise ValueError(
            f"This guide is a point mass at {points[0]!r}: it has no density, so it has no ELBO, "
            "evidence or importance weights. Score the Laplace posterior at its point: "
            "guides.inference.laplace(model, values, args, kwargs)."
        )


def _stands_alone(name: str, terms: SiteTerms) -> bool:
    """Whether a Delta's value does not move with anything that was drawn (an AutoDelta part)."""
    others = [other for other in terms.values if other not in terms.layout.sites]
    own = [other for other in others if other.startswith((name, f"_{name}"))]
    # AutoNormal draws "<site>_unconstrained" beside every site; joint guides draw one for all.
    return not own and any(other.endswith("_unconstrained") for other in others)


def draws_rows_outside(terms: SiteTerms, read: Layout) -> bool:
    """Whether the guide draws local latents by sites outside the data plate."""
    if read.data_plate is None:
        return False
    outside = {name for name, term in terms.terms.items() if term.dim() == 0}
    local = {name for name, site in read.sites.items() if site.row_dim is not None}
    if local & outside:
        return True
    if not outside - set(read.sites):
        return False
    # Auxiliary sites outside the plate are harmless only as the draws of global latents: the
    # local ones must then have their randomness inside the plate.
    inside = set(terms.terms) - outside - set(read.sites)
    points = any(type(unwrap(terms.fns[name])).__name__ == "Delta" for name in local)
    return read.group("global") is None or (points and not inside)


def over_draws(
    function: Callable[[dict[str, Tensor]], Any], values: Mapping[str, Tensor], read: Layout
) -> Any:
    """Apply a function of single draws to all draws: vmap in chunks, a loop where vmap fails.

    Indexing a vector by group (``theta[group]``) is right under vmap and silently wrong under an
    extra left batch dimension, so programs are vectorized this way only.

    Args:
        function: Maps constrained values of one draw to tensors.
        values: Values by site, ``(S,) + site shape``.
        read: Layout of the call; sets how many draws fit into a chunk.

    Returns:
        The function's tensors with a leading dimension S.
    """
    num_samples = next(iter(values.values())).shape[0]
    sizes = [math.prod(site.shape) for site in read.sites.values()]
    sizes += [site.value.numel() for site in read.observed.values()]
    chunk = max(1, min(num_samples, _CHUNK_ELEMENTS // max(1, *sizes, 1)))
    results = []
    vectorized = num_samples > 1
    for start in range(0, num_samples, chunk):
        part = {name: value[start : start + chunk] for name, value in values.items()}
        if vectorized:
            try:
                with warnings.catch_warnings():
                    # A missing batching rule costs time, not correctness.
                    warnings.filterwarnings("ignore", "There is a performance drop")
                    results.append(torch.func.vmap(function)(part))
                continue
            except RuntimeError:
                # Control flow on values cannot be vectorized; a loop gives the same numbers.
                vectorized = False
        length = min(chunk, num_samples - start)
        single = [function({k: v[i] for k, v in part.items()}) for i in range(length)]
        results.append(_stack(single))
    return _concatenate(results)


def _stack(items: list[Any]) -> Any:
    if isinstance(items[0], Tensor):
        return torch.stack(items)
    if isinstance(items[0], dict):
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}
    return tuple(torch.stack([item[i] for item in items]) for i in range(len(items[0])))


def _concatenate(items: list[Any]) -> Any:
    if isinstance(items[0], Tensor):
        return torch.cat(items)
    if isinstance(items[0], dict):
        return {key: torch.cat([item[key] for item in items]) for key in items[0]}
    return tuple(torch.cat([item[i] for item in items]) for i in range(len(items[0])))


def check_same_program(
    guide: ProgramGuide, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise where a guide is used for another program whose latents are not its own."""
    other = layout(model, args, kwargs, data_plate=guide.data_plate)
    if set(other.sites) != set(guide.latents):
        raise ValueError(
            f"This guide covers {', '.join(guide.latents)}, but the model samples "
            f"{', '.join(other.sites) or 'nothing'}. Build a guide for this program, or pass the "
            "program that it is for: guide.model, which clamps and releases as given() said."
        )

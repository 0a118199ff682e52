"""Run a program once a draw, and keep the value and log density of every site.

    values[s], log_density[s] = program(call | given[s]),    s = 1..S

Programs are vectorized over draws by ``torch.func.vmap`` where they allow it and looped
otherwise: an extra left batch dimension would be faster, but is silently wrong for programs that
index a latent by group (``theta[group]``). Given values are replayed; sites without one are drawn
anew, observed ones too where asked (as ``poutine.uncondition``), which works on a program that is
called with its data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides.diagnostics.axis_names import Axes, site_axes
from guides.diagnostics.vectorize import vectorize
from guides.layout import Layout
from guides.probe import Program
from guides.supports import unwrap

__all__ = ["Call", "Records", "resimulate"]

_CHUNK_ELEMENTS = 2**22
_NUM_PROBES = 8


@dataclass(frozen=True)
class Call:
    """One call of a program, on all rows or on a minibatch of them.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        layout: The layout of the call.
        rows: Positions ``(B,)`` of its rows among all rows.
        skip: Leading rows that an earlier call holds already.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    layout: Layout
    rows: Tensor
    skip: int = 0


@dataclass(frozen=True)
class Records:
    """Sites of S runs, in program order.

    Args:
        values: ``{site: (S,) + batch shape + event shape}``.
        log_density: ``{site: (S,) + batch shape}``, without the data plate's N/B; absent for
            deterministic sites.
        axes: ``{site: Axes}``.
        fns: Distributions of the sites in one of the runs.
        observed: Names of the sites that kept their data.
        interleaved: Whether the program is a guide that runs its model along.
    """

    values: dict[str, Tensor]
    log_density: dict[str, Tensor]
    axes: dict[str, Axes]
    fns: dict[str, Any]
    observed: frozenset[str]
    interleaved: bool


def resimulate(
    program: Program,
    call: Call,
    num_samples: int,
    given: Mapping[str, Tensor],
    *,
    simulate: Collection[str] = (),
    random: bool = True,
) -> Records:
    """Run a program S times without gradients.

    Args:
        program: A model, or a guide.
        call: Its call.
        num_samples: Number of runs S.
        given: Values to replay, ``{site: (S,) + site shape}``.
        simulate: Observed sites to draw instead of keeping their data.
        random: Whether the runs draw anything; if not, one looped run must agree with the
            vectorized ones.
    """
    first = _Recorder(call.layout, {k: v[0] for k, v in given.items()}, simulate)
    with torch.no_grad():
        # Outside vmap first: lazy parameters of guides must not be born as batched tensors.
        first.run(program, call)
        part = _over_draws(program, call, num_samples, given, simulate, random, first)
    return Records(
        values={name: part[f"value:{name}"] for name in first.values},
        log_density={name: part[f"log:{name}"] for name in first.log_density},
        axes=first.axes,
        fns=first.fns,
        observed=frozenset(first.observed),
        interleaved=isinstance(poutine.unwrap(program), GuideMessenger),
    )


class _Recorder(Messenger):
    """Replay given values and row numbers, and write every sample site down."""

    def __init__(
        self, layout: Layout, given: Mapping[str, Tensor], simulate: Collection[str]
    ) -> None:
        super().__init__()
        self.layout = layout
        self.indices = layout.indices
        self.given = given
        self.simulate = simulate
        self.values: dict[str, Tensor] = {}
        self.log_density: dict[str, Tensor] = {}
        self.axes: dict[str, Axes] = {}
        self.fns: dict[str, Any] = {}
        self.observed: set[str] = set()

    def run(self, program: Program, call: Call) -> dict[str, Tensor]:
        # Validation reads tensor values, which vmap cannot do.
        with pyro.validation_enabled(False), poutine.block(), self:
            program(*call.args, **call.kwargs)
        return {
            **{f"value:{name}": value for name, value in self.values.items()},
            **{f"log:{name}": value for name, value in self.log_density.items()},
        }

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            # Autoguides draw row numbers of their own, even where the model was told its rows.
            if name in self.indices and msg["fn"].subsample_size in (
                None,
                len(self.indices[name]),
            ):
                msg["value"] = self.indices[name]
        elif name in self.given:
            msg["value"] = self.given[name]
        elif name in self.simulate:
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        plate = self.layout.data_plate
        deterministic = msg["is_observed"] and type(unwrap(fn)).__name__ == "Delta"
        self.fns[name] = fn
        if msg["is_observed"]:
            self.observed.add(name)
        if not deterministic:
            value = value.expand(fn.batch_shape + fn.event_shape)
            scale = msg["scale"]
            frames = [frame.name for frame in msg["cond_indep_stack"]]
            if plate is not None and plate.name in frames and plate.size != plate.num_rows:
                scale = scale / plate.scale
            term = fn.log_prob(value)
            term = scale_and_mask(term, scale, msg["mask"])  # type: ignore[no-untyped-call]
            self.log_density[name] = term.expand(fn.batch_shape)
        self.values[name] = value
        self.axes[name] = site_axes(
            name,
            value.shape,
            fn.event_dim,
            msg["cond_indep_stack"],
            msg["infer"],
            None if plate is None else plate.name,
            deterministic=deterministic,
        )


def _over_draws(
    program: Program,
    call: Call,
    num_samples: int,
    given: Mapping[str, Tensor],
    simulate: Collection[str],
    random: bool,
    first: _Recorder,
) -> dict[str, Tensor]:
    def run(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _Recorder(call.layout, values, simulate).run(program, call)

    largest = max([value.numel() for value in first.values.values()], default=1)
    chunk = max(1, min(num_samples, _CHUNK_ELEMENTS // max(largest, 1)))
    # A messenger keeps its trace, in which tensors of vmap must not outlive it.
    vectorized = chunk >= _NUM_PROBES
    vectorized = vectorized and not isinstance(poutine.unwrap(program), GuideMessenger)
    if vectorized and random:
        vectorized = _draws_differ(run, first, given)
    parts = []
    for start in range(0, num_samples, chunk):
        stop = min(start + chunk, num_samples)
        values = {name: value[start:stop] for name, value in given.items()}
        part = vectorize(run, values, stop - start) if vectorized else None
        if part is not None and start == 0 and not random and _disagrees(part, first):
            part = None
        if part is None:
            vectorized = False
            runs = [run({k: v[i] for k, v in values.items()}) for i in range(stop - start)]
            part = {name: torch.stack([item[name] for item in runs]) for name in runs[0]}
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _draws_differ(
    run: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    first: _Recorder,
    given: Mapping[str, Tensor],
) -> bool:
    """Whether vectorized runs on the same given values draw every site anew.

    A sampler outside of torch (NumPy's, say) runs only once under vmap, and all draws would
    share its noise without a word.
    """
    same = {name: value[:1].expand(_NUM_PROBES, *value.shape[1:]) for name, value in given.items()}
    part = vectorize(run, same, _NUM_PROBES)
    if part is None:
        return False
    for name, fn in first.fns.items():
        if name in given or name in first.observed:
            continue
        value = part[f"value:{name}"]
        random = type(unwrap(fn)).__name__ not in ("Delta", "Unit")
        if random and value.numel() and bool((value == value[:1]).all()):
            return False
    return True


def _disagrees(part: Mapping[str, Tensor], first: _Recorder) -> bool:
    """Whether the first of the vectorized runs differs from the same run by itself."""
    alone = {
        **{f"value:{name}": value for name, value in first.values.items()},
        **{f"log:{name}": value for name, value in first.log_density.items()},
    }
    return not all(
        torch.allclose(
            part[name][0].double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True
        )
        for name, value in alone.items()
    )

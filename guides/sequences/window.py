"""Window: the program of one step, given the latents of the steps before it.

    p(x_t, z_t | z_1 .. z_{t-1}, x_1 .. x_{t-1})        run to the last site of the step

A window is a Pyro program again, of the sites of its step alone, so that whatever takes a program
takes a step of one. Nothing is asked of the program but that it can be run: a window runs it from
the start, and all windows of T steps cost T (T + 1) / 2 evaluations of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides.capture.surroundings import buffers_kept
from guides.capturing import is_capturing
from guides.energy import LogJoint
from guides.layout import Layout
from guides.location_scale import is_location_scale, location
from guides.probe import Program, probe
from guides.sequences.steps import Step

__all__ = ["Structure", "Window", "center", "check_windows", "step_terms", "structure"]

Structure = tuple[tuple[tuple[str, ...], bool], ...]
"""Latents of the steps, and whether any row lacks one."""


class Window:
    """The program of one step.

    Args:
        model: The program of the whole sequence.
        known: Constrained values of the latents before the step, by site.
        latents: Names of the latents of the step.
        terms: Names of its other sites that count: observations and factors; with none the
            program stops at the latents.
        density: Whether the latents' own density counts.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro import poutine
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = torch.zeros(len(x))
        ...         for t in range(x.shape[1]):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> second = Window(model, {"z_0": torch.zeros(2)}, ("z_1",), ("x_1",))
        >>> list(poutine.trace(second).get_trace(torch.zeros(2, 3)).nodes)[2:4]
        ['z_1', 'x_1']
    """

    def __init__(
        self,
        model: Program,
        known: Mapping[str, Tensor],
        latents: Sequence[str],
        terms: Sequence[str] = (),
        *,
        density: bool = True,
    ) -> None:
        self.model = model
        self.known = known
        self.latents = frozenset(latents)
        self.terms = frozenset(terms)
        self.density = density

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run the program as far as the step."""
        try:
            with _Handler(self):
                self.model(*args, **kwargs)
        except _Reached:
            pass


class _Reached(Exception):
    """All sites of the step were sampled: no error, but the end of the window."""


class _Handler(Messenger):
    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.left = set(window.latents | window.terms)

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg) or name in self.window.terms:
            return
        if name in self.window.latents:
            if not self.window.density:
                msg["mask"] = False
            return
        if not msg["is_observed"]:
            # Latents of later steps, where all come before all data, reach no site of this one.
            known = self.window.known.get(name)
            msg["value"] = center(msg["fn"]) if known is None else known
        msg["stop"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        self.left.discard(msg["name"])
        if not self.left:
            raise _Reached


def center(fn: Any) -> Tensor:
    """The location of a distribution that has one, else its mean.

    Args:
        fn: The distribution.
    """
    if is_location_scale(fn):
        return location(fn)
    mean: Tensor = fn.mean
    return mean


def step_terms(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    steps: Sequence[Step],
) -> list[tuple[str, ...]]:
    """What counts at each step beside the density of its latents: observations and factors.

    A factor belongs to the step whose sites the program sampled last before it.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        read: The layout of the call.
        steps: Its steps.

    Returns:
        Names by step.

    Raises:
        NotImplementedError: For a term that belongs to no step.
    """
    of = {name: t for t, step in enumerate(steps) for name in (*step.sites, *step.observed)}
    found: list[list[str]] = [list(step.observed) for step in steps]
    sites = probe(model, args, kwargs, read.indices, None).sites
    current = None
    dealt = len(steps) > 1 and _position(read, steps[1].sites[0]) < _position(
        read, steps[0].observed[0]
    )
    for name, site in sites.items():
        if name in of:
            current = of[name]
        elif site["is_observed"] and not site["infer"].get("_deterministic", False):
            frames = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
            inside = read.data_plate is not None and read.data_plate.name in frames
            if current is None or dealt or not inside:
                raise NotImplementedError(
                    f"Site {name!r} counts in the density of the program, but belongs to no step: "
                    "which of them it weighs is not known. Put it inside the data plate, after "
                    "the latents of its step, or leave it out."
                )
            found[current].append(name)
    return [tuple(names) for names in found]


def structure(steps: Sequence[Step]) -> Structure:
    """What calls have in common whose windows need one check.

    Args:
        steps: The steps of a call.
    """
    return tuple((step.sites, _lacked(step.mask)) for step in steps)


def check_windows(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    read: Layout,
    steps: Sequence[Step],
    terms: Sequence[Sequence[str]],
) -> None:
    """Raise unless the windows of all steps together are the program, at random latents.

    A window runs later latents at a center, and leaves out the rows that lack its step: both are
    wrong for data that count nevertheless. The generators of the caller are left where they are.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        read: The layout of the call.
        steps: Its steps.
        terms: What :func:`step_terms` found.

    Raises:
        NotImplementedError: Naming the first site that is scored otherwise.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []

    def scored(program: Program, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Every run from the same state, so that a program that draws by itself draws the same.
        with torch.random.fork_rng(devices):
            return LogJoint(program, args, kwargs, layout=read).run(given).terms

    with torch.no_grad(), buffers_kept(model):
        with torch.random.fork_rng(devices):
            values = read.constrain(
                {
                    group.name: torch.randn(group.shape, dtype=group.dtype, device=group.device)
                    for group in read.groups
                }
            )
        whole = scored(model, values)
        later = {name for step in steps for name in step.sites}
        for step, names in zip(steps, terms, strict=True):
            later -= set(step.sites)
            known = {name: value for name, value in values.items() if name not in later}
            own = scored(Window(model, known, step.sites, names), known)
            for name in (*step.sites, *names):
                part = own[name]
                if step.mask is not None:
                    part = torch.where(step.mask, part, torch.zeros_like(part))
                slack = torch.finfo(part.dtype).eps ** 0.5
                if not torch.allclose(part, whole[name], rtol=slack, atol=slack, equal_nan=True):
                    raise NotImplementedError(
                        f"Terms of the steps do not add up to the program's: site {name!r} of the "
                        f"step of {', '.join(step.sites)} depends on later latents, or counts "
                        "where those latents are masked. Sample the data of each step right after "
                        "its latents, and mask both."
                    )


def _lacked(mask: Tensor | None) -> bool:
    # Under capture no value can be read: every mask counts as one that takes steps away.
    return mask is not None and (is_capturing() or not bool(mask.all()))


def _position(read: Layout, name: str) -> int:
    return read.order.index(name)

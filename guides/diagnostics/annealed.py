"""Annealed importance sampling: evidence from chains that walk from a start to the posterior.

    u ~ f_0,  log w = 0
    for b' -> b along the schedule 0 = b_0 < ... < b_T = 1:
        log w <- log w + (b - b') (log f_1(u) - log f_0(u))
        u     <- one Hamiltonian transition that leaves f_b invariant
    log p(x) = log mean over chains of w,                       E[w] = p(x) exactly

The start is the prior, or any guide with a density; ``f_b`` is the geometric path between it and
the log joint, in unconstrained space (:mod:`guides.diagnostics.path`); transitions are those of
:mod:`guides.diagnostics.hamiltonian`. Pilot chains tune the step of every row along the path, and
are then thrown away: a step tuned on the weighted chains themselves would depend on where they
were, and E[w] = p(x) would be lost.

References:
    | Annealed importance sampling (Neal, 2001) https://arxiv.org/abs/physics/9803008
    | On the quantitative analysis of decoder-based generative models (Wu et al., 2017)
    | https://arxiv.org/abs/1611.04273
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guides.arguments import check_number
from guides.diagnostics.hamiltonian import PILOT_CHAINS, spread_of, transition, tune
from guides.diagnostics.path import Path, path
from guides.diagnostics.scores import Score
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.layout import layout as read_layout
from guides.pairs import check_order
from guides.probe import Program
from guides.rows import can_take_index, take_rows

__all__ = ["AnnealedScore", "annealed_importance_sampling", "temperatures"]

_CHUNK_ELEMENTS = 2**22
_SPREAD_DRAWS = 100
_STEEP = 4.0


@dataclass(frozen=True, repr=False)
class AnnealedScore(Score):
    """A score from annealed chains; see :class:`guides.diagnostics.Score`.

    Args:
        acceptance: Acceptance rate of the transitions by unit, ``(B,)`` or ``(1,)``.
        num_gradients: Gradients of the log joint of a row at one draw, pilot chains included.
    """

    acceptance: Tensor | None = None
    num_gradients: int = 0


def annealed_importance_sampling(
    model: Program,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    guide: ProgramGuide | None = None,
    num_chains: int = 16,
    num_temperatures: int = 500,
    schedule: str | Sequence[float] | Tensor = "sigmoid",
    num_leapfrog: int = 10,
    step_size: float | str = "auto",
    target_acceptance: float = 0.65,
    chunk_rows: int | None = None,
    data_args: Mapping[str, int] | None = None,
    data_plate: str | None = "auto",
) -> AnnealedScore:
    """Evidence of every row by annealed importance sampling, in nats.

    The mean weight is unbiased for p(x), so its logarithm is a lower bound on log p(x) in
    expectation, tighter with more chains and slower annealing. From the prior it owes nothing to
    any guide, which makes it the check on proposals that may miss a part of the posterior.

    Args:
        model: The program.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        guide: A guide of this package with a density, where the chains start; None for the prior.
        num_chains: Chains a row, C.
        num_temperatures: Steps of the schedule, T.
        schedule: ``"sigmoid"`` (slow at both ends), ``"linear"``, or the rising numbers from 0
            to 1 themselves, which then give T.
        num_leapfrog: Leapfrog steps a transition, L.
        step_size: ``"auto"`` for a step a row, tuned by pilot chains; or one number for all, in
            units of the spread of the start.
        target_acceptance: What pilot chains tune the step to.
        chunk_rows: Rows at a time; by default as many as fit into a few hundred megabytes.
        data_args: Arguments that hold rows, see :func:`guides.rows.data_args_of`.
        data_plate: See :func:`guides.layout.layout`.

    Returns:
        The score, per datum where rows have no latents in common, joint otherwise; with the
        effective sample size of the weights, of at most C. Its standard error is that of the log
        of the mean (delta method), and means little where the effective sample size is near 1.

    Raises:
        ValueError: Where the start has no density or cannot be drawn from, a latent is masked,
            rows that are coupled share a plate, a program with global latents is called with a
            minibatch, or the log joint is not a number at the start.
        TypeError: For a guide that is not of this package.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pyro.set_rng_seed(0)
        >>> x = torch.tensor([0.0, 3.0])
        >>> score = annealed_importance_sampling(model, x, num_chains=50, num_temperatures=30)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x)
        >>> bool(((score.rows - exact).abs() < 4 * score.rows_error).all())
        True
    """
    check_number("num_chains", num_chains, integer=True, least=1)
    check_number("num_leapfrog", num_leapfrog, integer=True, least=1)
    betas = temperatures(num_temperatures, schedule)
    if guide is not None:
        check_order("(model, *args, guide=guide)", model, guide)
        if not isinstance(guide, ProgramGuide):
            raise TypeError(
                "Annealing starts at a guide of this package, whose density is known everywhere, "
                f"or at the prior (guide=None); got a {type(guide).__name__}."
            )
        data_plate = guide.data_plate
    if step_size != "auto":
        check_number("step_size", step_size)
        if not float(step_size) > 0:
            raise ValueError(f'step_size must be positive, or "auto", got {step_size!r}.')
    if not 0.0 < target_acceptance < 1.0:
        raise ValueError(f"target_acceptance must lie in (0, 1), got {target_acceptance!r}.")
    kwargs = {} if model_kwargs is None else dict(model_kwargs)
    read = read_layout(model, args, kwargs, data_plate=data_plate)
    if not read.groups:
        raise ValueError("The model has no latent sites, so there is nothing to anneal.")
    options = (num_leapfrog, step_size, target_acceptance)
    with torch.no_grad():
        whole = path(model, args, kwargs, guide=guide, data_plate=data_plate, read=read)
        if not whole.joint:
            log_joint = LogJoint(model, args, kwargs, layout=read)
            log_joint.check_rows(read.pack(log_joint.predictions()))
        parts = []
        for part_args, part_kwargs in _calls(whole, num_chains, chunk_rows, data_args, guide):
            part = whole
            if part_args is not args:
                part = path(model, part_args, part_kwargs, guide=guide, data_plate=data_plate)
            parts.append(_anneal(part, betas, num_chains, *options))
        constant = whole.constant()
    log_w = torch.cat([part[0] for part in parts], 1)  # (C, U)
    first, second = torch.logsumexp(log_w, 0), torch.logsumexp(2 * log_w, 0)
    estimate = first - math.log(num_chains)
    inverse = torch.exp(second - 2 * first)  # of the effective sample size
    error = (inverse - 1 / num_chains).clamp_min(0).sqrt()
    joint, scale = whole.joint, read.scale
    dtype = read.groups[0].dtype
    return AnnealedScore(
        rows=None if joint else estimate.to(dtype),
        rows_error=None if joint else error.to(dtype),
        total=float(estimate.sum()) * scale + constant,
        standard_error=float(error.square().sum().sqrt()) * scale,
        joint=joint,
        num_samples=num_chains,
        estimator=(
            f"{'joint ' if joint else ''}annealed importance sampling, {num_chains} chains, "
            f"{len(betas) - 1} temperatures"
        ),
        effective_sample_size=(1 / inverse)[0] if joint else 1 / inverse,
        acceptance=torch.cat([part[1] for part in parts]),
        num_gradients=sum(part[2] for part in parts),
    )


def temperatures(num_temperatures: int, schedule: str | Sequence[float] | Tensor) -> list[float]:
    """The numbers ``b_0 = 0 < ... < b_T = 1`` of a schedule.

    Args:
        num_temperatures: T.
        schedule: See :func:`annealed_importance_sampling`.

    Raises:
        ValueError: For an unknown name, or numbers that do not rise from 0 to 1.

    Example:
        >>> temperatures(4, "linear")
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if not isinstance(schedule, str):
        betas = [float(b) for b in schedule]
        rising = all(low < high for low, high in itertools.pairwise(betas))
        if len(betas) < 2 or betas[0] != 0.0 or betas[-1] != 1.0 or not rising:
            raise ValueError(
                "A schedule must rise strictly from 0 to 1, both ends included, got "
                f"{betas[:3]} ... {betas[-3:]}."
            )
        return betas
    check_number("num_temperatures", num_temperatures, integer=True, least=1)
    if schedule not in ("sigmoid", "linear"):
        raise ValueError(
            f'schedule must be "sigmoid", "linear" or the numbers themselves, got {schedule!r}.'
        )
    line = [t / num_temperatures for t in range(num_temperatures + 1)]
    if schedule == "linear":
        return line
    raw = [1 / (1 + math.exp(-_STEEP * (2 * t - 1))) for t in line]
    return [(value - raw[0]) / (raw[-1] - raw[0]) for value in raw]


def _calls(
    whole: Path,
    num_chains: int,
    chunk_rows: int | None,
    data_args: Mapping[str, int] | None,
    guide: ProgramGuide | None,
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """The call in chunks of rows, or as it is."""
    read, log_joint = whole.layout, whole.log_joint
    call = (log_joint.model, log_joint.args, log_joint.kwargs)
    if chunk_rows is not None:
        check_number("chunk_rows", chunk_rows, integer=True, least=1)
        if whole.joint:
            raise ValueError(
                "Rows can be annealed in chunks only where they have no latents in common; this "
                "program has global latents, or no data plate. Leave out chunk_rows."
            )
    elif not whole.joint and read.data_plate is not None and not read.data_plate.random:
        # A guide with parameters of its own for every row must be told the numbers of its rows.
        numbered = guide is None or getattr(guide, "amortized", False) or can_take_index(call[0])
        wide = max(site.value.numel() for site in read.observed.values()) if read.observed else 1
        wide = max(wide, *(math.prod(site.shape) for site in read.sites.values()))
        fitting = max(1, _CHUNK_ELEMENTS * read.num_rows // (wide * num_chains))
        if numbered and fitting < read.num_rows:
            chunk_rows = fitting
    if chunk_rows is None or chunk_rows >= read.num_rows:
        yield call[1:]
        return
    for rows in torch.arange(read.num_rows).split(chunk_rows):
        yield take_rows(*call, rows, read, data_args)


def _anneal(
    part: Path,
    betas: Sequence[float],
    num_chains: int,
    num_leapfrog: int,
    step_size: float | str,
    target: float,
) -> tuple[Tensor, Tensor, int]:
    """Log weights ``(C, U)``, acceptance rates ``(U,)`` and the number of gradients of rows."""
    spread = spread_of(part.draw(_SPREAD_DRAWS))
    num_rows = max(1, part.layout.num_rows)
    num_gradients = 0
    if isinstance(step_size, str):
        steps, transitions = tune(part, betas, spread, num_leapfrog, target)
        num_gradients += transitions * PILOT_CHAINS * num_leapfrog * num_rows
    else:
        steps = torch.full((len(betas), part.num_units), float(step_size))
    point = part.draw(num_chains)
    ends = part.ends(point)
    _check_start(part, *ends)
    log_w = torch.zeros(num_chains, part.num_units, dtype=torch.float64, device=ends[0].device)
    accepted = torch.zeros_like(log_w[0])
    for t, (low, high) in enumerate(itertools.pairwise(betas)):
        log_w = log_w + (high - low) * _difference(*ends)
        if high < 1.0:  # a transition at the end would change no weight
            point, ends, rate = transition(part, point, ends, high, spread, steps[t], num_leapfrog)
            accepted = accepted + rate.mean(0)
    num_transitions = len(betas) - 2
    num_gradients += num_transitions * num_chains * num_leapfrog * num_rows
    return log_w, accepted / max(1, num_transitions), num_gradients


def _difference(start: Tensor, target: Tensor) -> Tensor:
    """What a unit of temperature adds to the log weights, ``(C, U)``."""
    return target.double() - start.double()


def _check_start(part: Path, start: Tensor, target: Tensor) -> None:
    if bool(torch.isnan(target).any()) or bool((target == math.inf).any()):
        raise ValueError(
            "The log joint is not a number at draws from the start, so they cannot be weighted. "
            "Check that the data lie in the support of their distributions, or start elsewhere "
            f"(guide=). Latent sites: {', '.join(part.layout.sites)}."
        )
    if not bool(torch.isfinite(start).all()):
        raise ValueError(
            "The density of the start is not finite at its own draws. Use float64, or start at "
            "another guide."
        )

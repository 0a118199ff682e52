"""One step of a filter by predictive coding: its energy, and how a belief is carried to the next.

    E_t(u)  = -log p(x_t | u, ..) - log p(u | u_{t-1}, ..)            the program's own prediction
            or -log p(x_t | u, ..) - log Normal(u; m, S)               a carried one

    u_t     = F(u_{t-1}, e),  e ~ Normal(0, 1)                         Gaussian latents of a step
    m       = F(u_{t-1}, 0)
    S       = A P A' + G G'                                            A = dF/du_{t-1}, G = dF/de

u are packed, unconstrained latents; F is the program itself, run from standardized errors, so
that several latents a step, with covariances and scales of any kind, are one case.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guides.capture.surroundings import buffers_kept
from guides.energy import LogJoint
from guides.layout import Layout
from guides.probe import Program
from guides.sequences.steps import Step
from guides.sequences.window import Window
from guides.supports import unwrap

__all__ = ["Carried", "Sequential", "StepJoint", "check_lags", "linearize", "predict"]


@dataclass(frozen=True)
class Carried:
    """A Gaussian prediction of a step.

    Args:
        mean: ``(B, K)``.
        covariance: ``(B, K, K)``.
    """

    mean: Tensor
    covariance: Tensor


def _gaussian_rows(carried: Carried, u: Tensor) -> Tensor:
    """Log density of rows under a prediction, ``(B,)``."""
    tril = torch.linalg.cholesky(carried.covariance)
    centered = (u - carried.mean).unsqueeze(-1)
    whitened = torch.linalg.solve_triangular(tril, centered, upper=False).squeeze(-1)
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = 0.5 * u.shape[-1] * math.log(2 * math.pi)
    return -0.5 * whitened.square().sum(-1) - log_det - constant


class StepJoint(LogJoint):
    """The log joint of one step, in the unconstrained latents of that step.

    Rows that do not have the step sit at their prediction, in a well of unit curvature.

    Args:
        window: The program of the step.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        layout: The layout of the step.
        on: Rows that have the step ``(B,)``; None for all.
        carried: The prediction; None where the program's own counts.
    """

    def __init__(
        self,
        window: Window,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        on: Tensor | None,
        carried: Carried | None,
    ) -> None:
        super().__init__(window, args, kwargs, layout=layout)
        self.on = on
        self.carried = carried
        if carried is None:
            self.start = layout.pack(self.predictions())["data"]
        else:
            self.start = carried.mean.detach()

    def packed(
        self,
        packed: Mapping[str, Tensor],
        *,
        jacobian: bool = True,
        plain: Collection[str] = (),
        noncentered: Collection[str] = (),
        expose_params: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log joint of the step's latents ``{"data": (B, K)}``; see :class:`LogJoint`."""
        rows, other = super().packed(
            packed,
            jacobian=jacobian,
            plain=plain,
            noncentered=noncentered,
            expose_params=expose_params,
        )
        u = packed["data"]
        if self.carried is not None:
            rows = rows + _gaussian_rows(self.carried, u)
        if self.on is not None:
            well = -0.5 * (u - self.start).square().sum(-1)
            rows = torch.where(self.on, rows, well)
        return rows, other


def predict(program: Sequential, position: int, states: Mapping[int, Tensor]) -> Tensor:
    """What a program predicts of a step, ``(B, K)``: all noise of the step at zero.

    Args:
        program: The call.
        position: Which step, from 0.
        states: Packed latents of the steps before it ``(B, K)``, by position.
    """
    return program.forward(position, states, None)


def linearize(
    program: Sequential, position: int, states: Mapping[int, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What a program predicts of a step, linear in the step before and in standard noise.

    Args:
        program: The call.
        position: Which step, from 0.
        states: Packed latents of the steps before it ``(B, K)``, by position.

    Returns:
        The prediction ``(B, K)``; A ``(B, K, K)``, None at the first step; G ``(B, K, K)``.

    Raises:
        NotImplementedError: Where a latent of the step is not Gaussian.
    """
    zeros = program.zeros(position)
    mean, noise = _jacobian(lambda e: program.forward(position, states, e), zeros)
    if position == 0:
        return mean, None, noise
    before = position - 1
    _, slope = _jacobian(
        lambda u: program.forward(position, {**states, before: u}, zeros), states[before]
    )
    return mean, slope, noise


def check_lags(program: Sequential) -> None:
    """Raise where a step depends on more than a carried Gaussian knows of the steps before it.

    The belief about the last step is all that is carried: latents of a step may read those of the
    step before, and data the latents of their own step. Gradients at random latents tell, and the
    generators of the caller are left where they are.

    Args:
        program: The call.

    Raises:
        NotImplementedError: Naming the step and what it reads.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.no_grad(), torch.random.fork_rng(devices), buffers_kept(program.model):
        states = {t: torch.randn_like(program.zeros(t)) for t in range(len(program.steps))}
        for t in range(1, len(states)):
            own, step = program.layout(t), program.steps[t]
            error, weights = torch.randn_like(states[t]), torch.randn_like(states[t])

            def data(before: dict[int, Tensor], t: int = t, own: Layout = own) -> Tensor:
                window = Window(
                    program.model,
                    program.values(before),
                    program.steps[t].sites,
                    program.terms[t],
                    density=False,
                )
                joint = LogJoint(window, program.args, program.kwargs, layout=own)
                return joint.packed({"data": states[t]}, jacobian=False)[0].sum()

            def latents(
                before: dict[int, Tensor], t: int = t, e: Tensor = error, w: Tensor = weights
            ) -> Tensor:
                return (w * program.forward(t, {**states, **before}, e)).sum()

            for what, function, last in (("data", data, t), ("latents", latents, t - 1)):
                slopes: dict[int, Tensor] = {}
                if last:
                    slopes = torch.func.grad(function)({s: states[s] for s in range(last)})
                for s, slope in slopes.items():
                    if bool((slope.abs() > torch.finfo(slope.dtype).eps ** 0.75).any()):
                        raise NotImplementedError(
                            'Only precision="fixed" takes programs of more than one lag: the '
                            f"{what} of the step of {', '.join(step.sites)} depend on "
                            f"{program.steps[s].sites[0]!r}, and beliefs are carried from the "
                            "latents of a step to those of the next alone. Put both lags in one "
                            "latent vector, or relax the whole window with PredictiveCoding."
                        )


@dataclass(frozen=True)
class Sequential:
    """One call of a program, cut into steps.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        read: The layout of the call.
        steps: Its steps.
        terms: What counts at each step beside its latents.
    """

    model: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    read: Layout
    steps: tuple[Step, ...]
    terms: tuple[tuple[str, ...], ...]

    def layout(self, position: int) -> Layout:
        """The layout of one step alone."""
        step = self.steps[position]
        alone = self.read.split({"data": step.sites})
        return replace(
            alone,
            observed={name: self.read.observed[name] for name in step.observed},
            order=(*step.sites, *step.observed),
        )

    def zeros(self, position: int) -> Tensor:
        """Packed zeros of a step, ``(B, K)``."""
        (group,) = self.layout(position).groups
        return torch.zeros(group.shape, dtype=group.dtype, device=group.device)

    def values(self, states: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Constrained values of packed steps, by site."""
        found: dict[str, Tensor] = {}
        for position, u in states.items():
            found |= self.layout(position).constrain({"data": u})
        return found

    def joint(
        self, position: int, states: Mapping[int, Tensor], carried: Carried | None
    ) -> StepJoint:
        """The log joint of one step, given the states before it."""
        own, step = self.layout(position), self.steps[position]
        window = Window(
            self.model,
            self.values({s: u for s, u in states.items() if s < position}),
            step.sites,
            self.terms[position],
            density=carried is None,
        )
        return StepJoint(window, self.args, self.kwargs, own, step.mask, carried)

    def gaussian(self, position: int) -> bool:
        """Whether all latents of a step are Gaussian."""
        sites = self.layout(position).sites
        return all(_is_gaussian(sites[name].fn) for name in self.steps[position].sites)

    def forward(self, position: int, states: Mapping[int, Tensor], e: Tensor | None) -> Tensor:
        """Latents of a step from standardized errors, ``(B, K)``; F above.

        With None for no errors the scales of the step take no part in it, nor in its gradient.
        """
        own = self.layout(position)
        (group,) = own.groups
        known = self.values({s: u for s, u in states.items() if s < position})
        window = Window(self.model, known, self.steps[position].sites)
        joint = LogJoint(window, self.args, self.kwargs, layout=own)
        errors = {} if e is None else group.unpack(group.batch(e))
        terms = joint.run({}, errors=errors, center=e is None, density=False, expose_params=True)
        _check_gaussian(terms.fns)
        return group.pack(terms.values)


def _check_gaussian(fns: Mapping[str, Any]) -> None:
    """Raise where a carried prediction would replace a density that is no Gaussian's."""
    for name, fn in fns.items():
        if not _is_gaussian(fn):
            raise NotImplementedError(
                f"A carried precision needs Gaussian latents, but site {name!r} is "
                f'{type(unwrap(fn)).__name__}. Pass precision="fixed", which takes the density of '
                "the program as it is, or write the site as a transformed Normal latent "
                "(pyro.deterministic)."
            )


def _is_gaussian(fn: Any) -> bool:
    return type(unwrap(fn)).__name__ in ("Normal", "MultivariateNormal")


def _jacobian(function: Any, point: Tensor) -> tuple[Tensor, Tensor]:
    """Value ``(B, K)`` and Jacobian ``(B, K, K)`` of a function whose rows know no other row."""
    found: Any = torch.func.vjp(function, point)
    value, pull = found
    size = value.shape[-1]
    basis = torch.eye(size, dtype=value.dtype, device=value.device)
    basis = basis.unsqueeze(1).expand(size, *value.shape)
    with warnings.catch_warnings():
        # A missing batching rule costs time, not correctness.
        warnings.filterwarnings("ignore", "There is a performance drop")
        rows = torch.func.vmap(pull)(basis)[0]  # (K of the value, B, K of the point)
    return value, rows.movedim(0, 1)

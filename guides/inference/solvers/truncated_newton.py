"""Truncated Newton: conjugate gradients that look at the true energy only now and then.

References:
    | The conjugate gradient method and trust regions in large scale optimization (Steihaug, 1983)
    | https://doi.org/10.1137/0720042
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.inference.solvers.solver import Solver, State, falls, pick
from guides.inference.units import Point, Units, dot

__all__ = ["TruncatedNewton"]


@dataclass
class TruncatedNewton(Solver):
    """One Hessian product or one gradient a step.

    Some steps walk through the quadratic model at ``u``, by one product each,

        a <- <r, r> / <d, H d>      p <- p + a d      r <- r + a H d      d <- -r + beta d

    inside a trust region, and the step after them takes the gradient at ``u + p``: a unit whose
    energy falls moves there; another one stays, and its trust region shrinks. A unit that finds
    its model right goes on with its conjugate direction, so that looking costs it nothing but the
    gradient: on a quadratic this is the linear method of conjugate gradients.

    Args:
        products: Products before the first look; twice as many before each later one while the
            model is right at most units, half as many (but two) where it was not.
        most: Products at most between two looks.
        forcing: A unit waits for the next look when its residual is this small against what it
            was at the last one.
    """

    uses_curvature: ClassVar[bool] = False
    numeric: ClassVar[bool] = False

    products: int = 4
    most: int = 8
    forcing: float = 1e-2

    def start(self, units: Units, point: Point, weights: Tensor, fixed: bool) -> State:
        """Down the gradient, without a bound on the step."""
        self._left = self._planned = self.products
        self._times: Callable[..., Tensor] | None = None
        zero = torch.zeros_like(point.x)
        return {
            "p": zero,
            "r": point.gradient,
            "d": -weights * point.gradient,
            "waits": torch.zeros_like(point.energy, dtype=torch.bool),
            "falls": torch.zeros_like(point.energy),
            "radius": torch.full_like(point.energy, torch.inf),
            "weights": weights,
        }

    def step(
        self, units: Units, point: Point, state: State, last: bool = False
    ) -> tuple[Point, State]:
        """A product, or a look."""
        if self._left and not last:
            if self._times is None:
                self._times = units.product(point.x)
            self._left -= 1
            self.idle = False
            state = self._walk(point, state)
            if not is_capturing() and bool(state["waits"].all()):
                self._left = 0
            return point, state
        self._times = None
        self.idle = True
        return self._look(units, point, state)

    def _walk(self, point: Point, state: State) -> State:
        """One step of conjugate gradients inside the model."""
        tiny = torch.finfo(point.x.dtype).tiny
        p, r, d, m = state["p"], state["r"], state["d"], state["weights"]
        hd = self._times(d)  # type: ignore[misc]
        curvature, slope = dot(d, hd), dot(r, d)
        length = slope.abs() / curvature.abs().clamp_min(tiny)
        # Along a concave direction the model has no minimum: a first one is walked as if it were
        # convex, and a later one is where the walk ends.
        convex = curvature > 0
        begun = dot(p, p) > 0
        metric = 1 / m
        room = _to_the_rim(p, d, state["radius"], metric)
        ends = ~convex | (length > room)
        length = torch.where(~convex & begun, torch.zeros_like(length), length)
        length = torch.minimum(length, room)
        length = torch.where(state["waits"] | (slope >= 0), torch.zeros_like(length), length)
        new_p = p + length.unsqueeze(-1) * d
        new_r = r + length.unsqueeze(-1) * hd
        beta = dot(new_r, m * new_r) / dot(r, m * r).clamp_min(tiny)
        new_d = beta.unsqueeze(-1) * d - m * new_r
        gain = -(length * slope + 0.5 * length.square() * curvature)
        small = dot(new_r, m * new_r) <= self.forcing**2 * dot(point.gradient, m * point.gradient)
        moved = {"p": new_p, "r": new_r, "d": new_d, "falls": state["falls"] + gain}
        kept = {name: state[name] for name in moved}
        waits = state["waits"] | ends | small | (slope >= 0)
        return {**state, **pick(~state["waits"], moved, kept), "waits": waits}

    def _look(self, units: Units, point: Point, state: State) -> tuple[Point, State]:
        """Evaluate where the walk has led, and go there or shrink the trust region."""
        tiny = torch.finfo(point.x.dtype).tiny
        p, m = state["p"], state["weights"]
        trial = units.at(point.x + p)
        accepted = falls(point, trial)
        size = dot(p, p / m).sqrt()
        ratio = (point.energy - trial.energy) / state["falls"].clamp_min(tiny)
        radius = state["radius"]
        radius = torch.where(ratio > 0.75, torch.maximum(radius, 2 * size), radius)
        radius = torch.where(accepted & (ratio > 0.25), radius, 0.5 * size)
        radius = torch.where(accepted, radius, 0.25 * size)
        new = point.where(accepted, trial)
        # Where the model foretold the gradient, the conjugate direction is still one.
        foretold, g = state["r"], new.gradient
        beta = dot(g, m * g) / dot(foretold, m * foretold).clamp_min(tiny)
        error = dot(g - foretold, m * (g - foretold))
        right = accepted & (error <= 0.01 * dot(foretold, m * foretold))
        kept = (state["d"] + m * foretold) * beta.unsqueeze(-1) - m * g
        right = right & (dot(kept, g) < 0)
        direction = torch.where(right.unsqueeze(-1), kept, -m * g)
        # A model that was wrong at most units is walked less far the next time.
        trusted = is_capturing() or 2 * int(right.sum()) >= len(right)
        longer = min(2 * self._planned, self.most)
        self._planned = longer if trusted else max(2, self._planned // 2)
        self._left = self._planned
        return new, {
            "p": torch.zeros_like(p),
            "r": g,
            "d": direction,
            "waits": torch.zeros_like(state["waits"]),
            "falls": torch.zeros_like(state["falls"]),
            "radius": radius,
            "weights": m,
        }


def _to_the_rim(p: Tensor, d: Tensor, radius: Tensor, metric: Tensor) -> Tensor:
    """The length along ``d`` at which ``p + length d`` leaves the trust region ``(U,)``."""
    a, b = dot(d, metric * d), dot(p, metric * d)
    c = (dot(p, metric * p) - radius.square()).clamp_max(0)
    root = (b.square() - a * c).clamp_min(0).sqrt()
    found = (root - b) / a.clamp_min(torch.finfo(a.dtype).tiny)
    return torch.where(torch.isfinite(radius), found, torch.full_like(found, torch.inf))

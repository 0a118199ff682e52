"""Solvers: how latents move down their energy. One algorithm a file."""

from __future__ import annotations

import copy
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from guides.inference.solvers.solver import Solver

__all__ = ["SOLVERS", "make"]

SOLVERS = {
    "adam": "guides.inference.solvers.adam:Adam",
    "conjugate_gradient": "guides.inference.solvers.conjugate_gradient:ConjugateGradient",
    "gauss_newton": "guides.inference.solvers.gauss_newton:GaussNewton",
    "gradient": "guides.inference.solvers.gradient:Gradient",
    "heavy_ball": "guides.inference.solvers.heavy_ball:HeavyBall",
    "lbfgs": "guides.inference.solvers.lbfgs:LBFGS",
    "nesterov": "guides.inference.solvers.nesterov:Nesterov",
    "newton": "guides.inference.solvers.newton:Newton",
    "truncated_newton": "guides.inference.solvers.truncated_newton:TruncatedNewton",
}


def make(solver: str | Solver) -> Solver:
    """A fresh solver for one relaxation.

    Args:
        solver: A key of ``SOLVERS``, or a solver whose settings are taken.

    Raises:
        ValueError: For a name that is no solver's.

    Example:
        >>> make("heavy_ball").momentum
        0.9
    """
    if not isinstance(solver, str):
        return copy.deepcopy(solver)
    if solver not in SOLVERS:
        raise ValueError(
            f"solver must be one of auto, {', '.join(SOLVERS)}, or a Solver; got {solver!r}."
        )
    module, name = SOLVERS[solver].split(":")
    found: Solver = getattr(importlib.import_module(module), name)()
    return found

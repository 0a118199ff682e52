"""The lists of ``docs/compiled.md``: what has a graph, and what has none, with its reason.

The pairs are those that the capture suite crosses (``tests/captured_cases.py``), which fails where
one of them does not come out as listed. The programs below are run here, and the reasons are what
``CompiledSVI.compiled`` says of them.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import guides
from guides.families import FAMILIES
from guides.grid import cell_name, refusal
from guides.inference import CompiledSVI
from guides.schemes import SCHEMES
from tests.captured_cases import (
    INELIGIBLE,
    NO_SUCH_OBJECTIVE,
    OBJECTIVE_CASES,
    OBJECTIVE_FAMILIES,
    PAIRS,
)
from tests.cases import CORE_GUIDES, TWO_LEVELS

__all__ = ["REFUSED", "Refused", "objectives", "outcome", "pairs", "programs"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Refused:
    """A program that runs eagerly.

    Args:
        model: The model, made afresh.
        guide: Its guide; the cell ``normal`` by default.
        loss: The objective.
        args: Arguments of a step.
    """

    model: Callable[[], Program]
    guide: Program | None = None
    loss: Callable[[], Any] = Trace_ELBO
    args: Callable[[], tuple[Any, ...]] = lambda: (torch.linspace(-1.0, 1.0, 4),)


def _observe(x: Tensor, loc: Any, scale: Any = 1.0) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def _latent() -> Tensor:
    z: Tensor = pyro.sample("z", dist.Normal(0.0, 1.0))
    return z


def _branching(x: Tensor) -> None:
    z = _latent()
    _observe(x, z, 1.0 if z > 0 else 2.0)


def _reading(x: Tensor) -> None:
    _observe(x, _latent(), 1.0 + abs(_latent_scale().item()))


def _latent_scale() -> Tensor:
    scale: Tensor = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    return scale


def _leaving(x: Tensor) -> None:
    _observe(x, _latent() + torch.from_numpy(np.tanh(x.numpy())))


def _selecting(x: Tensor) -> None:
    _observe(x[x > 0], _latent())


def _counting() -> Program:
    calls = itertools.count(1)

    def model(x: Tensor) -> None:
        with pyro.poutine.scale(scale=min(1.0, next(calls) / 1000)):
            _observe(x, _latent())

    return model


def _drawing(x: Tensor) -> None:
    _observe(x, _latent() + random.gauss(0.0, 1.0))


def _discrete(x: Tensor) -> None:
    _observe(x, pyro.sample("n", dist.Poisson(3.0)))


def _discrete_guide(x: Tensor) -> None:
    rate = pyro.param("rate", torch.tensor(2.0), constraint=dist.constraints.positive)
    pyro.sample("n", dist.Poisson(rate))


class _Normalized(PyroModule):
    def __init__(self) -> None:
        super().__init__("normalized")
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.norm(z)[:, 0], 1.0), obs=x)


def _unregistered() -> Program:
    weight = torch.ones((), requires_grad=True)

    def model(x: Tensor) -> None:
        _observe(x, _latent() * weight)

    return model


def _mixture(x: Tensor) -> None:
    z = _latent()
    with pyro.plate("data", len(x)):
        which = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z + which, 1.0), obs=x)


def _mixture_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))


def _array(x: Any) -> None:
    _observe(torch.as_tensor(x), _latent())


REFUSED: dict[str, Refused] = {
    "Branches on a drawn value: `if z > 0`": Refused(lambda: _branching),
    "Reads a drawn value: `scale.item()`": Refused(lambda: _reading),
    "Leaves torch: `x.numpy()`": Refused(lambda: _leaving),
    "Selects rows by value: `x[x > 0]`": Refused(lambda: _selecting),
    "Anneals by a Python counter": Refused(_counting),
    "Draws outside of torch: `random.gauss`": Refused(lambda: _drawing),
    "Draws that are not reparameterized: a Poisson latent": Refused(
        lambda: _discrete, _discrete_guide
    ),
    "The same, with the objective made for it": Refused(
        lambda: _discrete, _discrete_guide, TraceGraph_ELBO
    ),
    "Enumerates a discrete latent": Refused(
        lambda: _mixture, _mixture_guide, lambda: TraceEnum_ELBO(max_plate_nesting=1)
    ),
    "Batch normalization while it learns": Refused(_Normalized),
    "Trains a tensor that Pyro does not know": Refused(_unregistered),
    "An array as argument": Refused(
        lambda: _array, _mixture_guide, args=lambda: (np.linspace(-1.0, 1.0, 4, dtype="float32"),)
    ),
    "An argument that requires a gradient": Refused(
        lambda: _array,
        _mixture_guide,
        args=lambda: (torch.linspace(-1.0, 1.0, 4).requires_grad_(),),
    ),
}
"""Programs that run eagerly, by what they do."""


def outcome(program: Refused) -> tuple[str, str | None]:
    """The mode in which a program runs when a graph is asked for, and the reason."""
    with (
        pyro.get_param_store().scope(),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    ):
        # Pyro's warnings about such programs are not what is asked here.
        warnings.simplefilter("ignore")
        pyro.set_rng_seed(0)
        model, args = program.model(), program.args()
        guide = guides.make("normal", model, *args) if program.guide is None else program.guide
        optim = pyro.optim.ClippedAdam({"lr": 0.01})
        loop = CompiledSVI(model, guide, optim, program.loss(), mode="graph")
        for _ in range(2):
            loop.step(*args)
        (kind,) = loop.compiled
        return kind.mode, kind.reason


def programs() -> list[tuple[str, str]]:
    """What each program does, and why it runs eagerly.

    Raises:
        ValueError: Where one of them has a graph by now.
    """
    rows = []
    for name, program in REFUSED.items():
        mode, reason = outcome(program)
        if mode != "eager" or reason is None:
            raise ValueError(f"{name!r} has a graph: take it out of REFUSED in docs/captured.py.")
        rows.append((name, reason))
    return rows


def pairs() -> tuple[list[list[str]], list[tuple[str, str, str]], list[str]]:
    """What the suite crosses: a scheme a row and a family a column, exceptions, and models.

    Returns:
        Rows of cells: ``graph``, ``eager``, or nothing where there is no such guide; model, guide
        and reason of what runs eagerly; the models that meet the guides crossed with all.
    """
    crossed = set(PAIRS)
    rows = []
    for scheme in SCHEMES:
        cells = [scheme]
        for family in FAMILIES:
            place = (TWO_LEVELS, cell_name(scheme, family))
            known = "graph" if place in crossed else "not tried"
            state = "eager" if place in INELIGIBLE else known
            cells.append("" if refusal(scheme, family) is not None else state)
        rows.append(cells)
    exceptions = [(model, guide, reason) for (model, guide), reason in INELIGIBLE.items()]
    models = [model for model, guide in PAIRS if guide == CORE_GUIDES[0]]
    return rows, exceptions, models


def objectives() -> list[list[str]]:
    """An objective a row and a family a column."""
    words = {
        None: "graph",
        "a density": "no density",
        "points": "cannot score points",
        "a guide of sequences": "no sequence",
    }
    return [
        [name, *(words[NO_SUCH_OBJECTIVE.get((name, family))] for family in OBJECTIVE_FAMILIES)]
        for name in OBJECTIVE_CASES
    ]

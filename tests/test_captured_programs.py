"""Programs that are captured, or refused with one line, which the documentation lists."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from docs.captured import REFUSED, Refused, outcome, programs
from guides.inference import CompiledSVI
from tests.test_compiled_svi import check_equal, data


class BayesianRegression(PyroModule):
    """The Bayesian linear layer of Pyro's tutorials."""

    def __init__(self) -> None:
        super().__init__("bayesian_regression")
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean: torch.Tensor = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def test_the_bayesian_linear_layer_is_captured() -> None:
    """Its priors are made with the module, when distributions were told to check values."""

    def build() -> tuple[Any, Any]:
        torch.set_default_dtype(torch.float64)
        model = BayesianRegression()
        return model, AutoNormal(model)

    try:
        check_equal(build, data(dtype=torch.float64), steps=100, tolerance=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)


def test_checks_of_values_are_left_as_they_were() -> None:
    """A capture switches them off for its own time: outside and before it they stand."""
    model = BayesianRegression()
    x, y = data()
    loop = CompiledSVI(
        model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), mode="graph"
    )
    loop.step(x, y)
    loop.step(x, y)
    assert loop.compiled[0].mode == "graph"
    checked = dist.Normal(0.0, 1.0, validate_args=True)
    unchecked = dist.Normal(0.0, 1.0, validate_args=False)
    nan = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="within the support"):
        checked.log_prob(nan)
    assert unchecked.log_prob(nan).isnan()
    assert "_validate_args" in vars(torch.distributions.Distribution)
    assert isinstance(torch.distributions.Distribution._validate_args, bool)


def test_every_refused_program_says_why_in_one_line() -> None:
    found = programs()
    assert [name for name, _ in found] == list(REFUSED)
    assert all(reason and "\n" not in reason for _, reason in found)


def test_a_program_with_a_graph_is_no_refused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(x: torch.Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    program = Refused(lambda: plain)
    assert outcome(program) == ("graph", None)
    monkeypatch.setitem(REFUSED, "plain", program)
    with pytest.raises(ValueError, match="'plain' has a graph: take it out of REFUSED"):
        programs()

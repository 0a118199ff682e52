"""This project and stock Pyro: each task as a Pyro program, stepped by the loop of option `by`.

    by="pyro"       pyro.infer.SVI, as it is: autoguides for eight schools and radon, and the
                    amortized guide of this project for the vae
    by="eager"      guides.inference.SVI or PredictiveCoding, the program traced in every step
    by="graph"      CompiledSVI or PredictiveCoding, captured
    by="inductor"   the same, compiled

Predictive coding has no stock Pyro loop: there "eager" is what traces Pyro. The programs of PCX
and FabricPC are written below; PCX's top latent has no prior, and momentum is none of the steps
that this project's relaxation takes, so that comparison sets PCX's option momentum to zero.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

import guides
import zoo
from benchmarks.speed.peers import programs
from benchmarks.speed.peers.problems import load
from benchmarks.speed.peers.protocol import Program, num_threads, options_of, serve
from guides.energy import LogJoint
from guides.inference import SVI, CompiledSVI, PredictiveCoding

__all__ = ["build", "main"]

_OPTIM: Any = pyro.optim  # its names are made when it is imported

Tensors = dict[str, Tensor]

_LOOPS = ("pyro", "eager", "graph", "inductor")


class _Steps:
    """A loop on one call."""

    def __init__(self, loop: Any, args: tuple[Any, ...], loss: float) -> None:
        self.loop = loop
        self.args = args
        self.loss = loss

    def check(self) -> float:
        """The loss at the given parameters and noise."""
        return self.loss

    def prepare(self, num_steps: int) -> None:
        """The first steps capture and compile, where the loop does."""
        self.advance(num_steps)

    def advance(self, num_steps: int) -> float:
        """Make steps."""
        if isinstance(self.loop, (SVI, PredictiveCoding)):
            calls: Any = (self.args, {})
            losses = self.loop.run(num_steps, calls, progress=False).losses
            return float(losses[-1])
        loss = 0.0
        for _ in range(num_steps):
            loss = self.loop.step(*self.args)
        return float(loss)


def _svi(by: str, model: Any, guide: Any, optim: Any) -> Any:
    if by == "pyro":
        return pyro.infer.SVI(model, guide, optim, Trace_ELBO())
    if by == "eager":
        return SVI(model, guide, optim, Trace_ELBO())
    return CompiledSVI(model, guide, optim, Trace_ELBO(), mode=by)


def _gaussian(task: str, given: Tensors, by: str, guide_name: str) -> _Steps:
    """Eight schools and radon: all latents in one group."""
    if task == "radon":
        model: Any = programs.radon
        args = tuple(given[k] for k in ("floor", "uranium", "county", "y"))
    else:
        model = zoo.make("eight_schools").to(given["y"].dtype)
        args = (given["y"], given["sigma"])
    own = guides.make(guide_name, model, *args, data_plate=None)
    family: Any = own.families["global"]
    tril = given["scale_tril"] if "scale_tril" in given else given["scale"].diag()
    with torch.no_grad():
        lam = family.of_gaussian(given["loc"], tril)
        own.schemes["global"].table.copy_(lam)  # type: ignore[operator]
        u, log_q = family.push(lam, given["noise"])
        rows, other = LogJoint(model, args, data_plate=None).packed({"global": u})
        loss = float(log_q - other - rows.sum())
    guide: Any = own
    if by == "pyro":
        autoguide = AutoNormal if guide_name == "normal" else AutoMultivariateNormal
        guide = autoguide(model, init_scale=0.1)
        guide(*args)
    return _Steps(_svi(by, model, guide, _OPTIM.Adam({"lr": 0.01})), args, loss)


def _decoder(given: Tensors) -> Any:
    model = zoo.make("hierarchical_vae", x_dim=784, z_dims=(32, 16), hidden=(256,))
    model = model.to(given["x"].dtype)
    state = {k.removeprefix("model."): v for k, v in given.items() if k.startswith("model.")}
    model.load_state_dict(state)
    return model


def _vae(given: Tensors, by: str) -> _Steps:
    model, x = _decoder(given), given["x"]
    guide = guides.make("amortized_normal", model, x, hidden=(256,))
    state = {k.removeprefix("guide."): v for k, v in given.items() if k.startswith("guide.")}
    guide.load_state_dict({f"schemes.data.{k}": v for k, v in state.items()})
    with torch.no_grad():
        read = guide.layout(x)
        call = guide._call((x,), {}, read)
        lam = guide.schemes["data"](read.groups[0], call)
        family: Any = guide.families["data"]
        u, log_q = family.push(lam, given["noise"])
        rows, _ = LogJoint(model, (x,)).packed({"data": u})
        loss = float((log_q - rows).sum())
    return _Steps(_svi(by, model, guide, _OPTIM.Adam({"lr": 0.001})), (x,), loss)


def _predictive_coding(
    model: Any, args: tuple[Any, ...], by: str, optim: Any, step_size: float, **options: Any
) -> _Steps:
    if by == "pyro":
        raise ValueError('Pyro has no predictive coding; by="eager" traces it at every update.')
    loop = PredictiveCoding(model, optim, num_steps=20, step_size=step_size, mode=by, **options)
    loss = loop.evaluate_loss(*args)
    return _Steps(loop, args, loss)


class _Chain(PyroModule):
    """Layers with given weights."""

    def __init__(self, name: str, given: Tensors) -> None:
        super().__init__(name)
        self.layers = nn.ModuleList()
        for number in range(3):
            weight, bias = (given[f"layers.{number}.{k}"] for k in ("weight", "bias"))
            layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.layers.append(layer)


class _PCXDecoder(_Chain):
    """PCX's decoder as a program; its top latent has no prior."""

    def forward(self, x: Tensor) -> None:
        first, second, third = self.layers
        with pyro.plate("data", len(x)):
            free = dist.ImproperUniform(dist.constraints.real, (), (64,))
            z0 = pyro.sample("z0", free)
            z1 = pyro.sample("z1", dist.Normal(F.hardtanh(first(z0)), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(F.hardtanh(second(z1)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(third(z2), 1.0).to_event(1), obs=x)

    def start(self, x: Tensor) -> None:
        """Latents at zero."""
        with pyro.plate("data", len(x)):
            for name, size in (("z0", 64), ("z1", 128), ("z2", 128)):
                pyro.sample(name, dist.Delta(x.new_zeros(len(x), size), event_dim=1))


class _FabricClassifier(_Chain):
    """FabricPC's classifier as a program, labels observed."""

    def forward(self, x: Tensor, labels: Tensor) -> None:
        first, second, third = self.layers
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(torch.sigmoid(first(x)), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(torch.sigmoid(second(z1)), 1.0).to_event(1))
            pyro.sample("y", dist.Categorical(logits=third(z2)), obs=labels)


def _normal_constant(num_rows: int, *sizes: int) -> float:
    """What the normal densities add to half the squared errors, a row's mean."""
    return 0.5 * np.log(2 * np.pi) * sum(sizes)


def _chain(task: str, given: Tensors, by: str) -> _Steps:
    x = given["x"]
    if task == "pcx_decoder":
        model: Any = _PCXDecoder("pcx_decoder", given)
        optim = _OPTIM.AdamW({"lr": 3.401383559476183e-4, "weight_decay": 1.2514685116492747e-5})
        steps = _predictive_coding(model, (x,), by, optim, 0.019849750737164974, guide=model.start)
        constant = _normal_constant(len(x), 128, 128, 784)
    else:
        model = _FabricClassifier("fabricpc_mnist", given)
        optim = _OPTIM.AdamW({"lr": 0.001, "weight_decay": 0.1})
        steps = _predictive_coding(model, (x, given["labels"]), by, optim, 0.05)
        constant = _normal_constant(len(x), 256, 64)
    steps.loss = steps.loss / len(x) - constant
    return steps


def build(task: str, seed: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: A task of :mod:`~benchmarks.speed.peers.problems`.
        seed: Seed of arrays that are not given, and of the draws.
        options: ``by`` and ``arrays``, ``guide``, ``batch``, ``data``, ``dtype``.

    Raises:
        ValueError: For an unknown option or loop.
    """
    options = options_of(
        options, by="inductor", arrays=None, guide=None, batch=None, data=None, dtype=None
    )
    by = options["by"]
    if by not in _LOOPS:
        raise ValueError(f"by must be one of {', '.join(_LOOPS)}, got {by!r}.")
    given = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in load(task, seed, options).items()
    }
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    if task in ("eight_schools", "radon"):
        return _gaussian(task, given, by, options["guide"] or "normal")
    if task == "vae":
        return _vae(given, by)
    if task == "pc":
        optim = _OPTIM.Adam({"lr": 0.001})
        return _predictive_coding(_decoder(given), (given["x"],), by, optim, 0.02)
    return _chain(task, given, by)


def main() -> None:
    """Serve standard input and output."""
    threads = num_threads()
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    serve(build, ("torch", "pyro-ppl", "numpy"), threads)

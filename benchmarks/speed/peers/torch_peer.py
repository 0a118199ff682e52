"""Hand-written eager torch: each task as one would write it without a framework.

    eight_schools, radon   option guide: "normal" | "multivariate_normal"; Adam, lr 0.01
    vae                    amortized mean field; Adam, lr 0.001
    pc                     options relax_steps, step_size; Adam, lr 0.001 on the weights
    pcx_decoder, fabricpc_mnist    the steps of PCX and FabricPC, see torch_chains
    floor                  the matrix products of the task that option `of` names, and no more

One step of `vae` and the Gaussian tasks: draw noise, minus ELBO at that draw, backward, Adam.
One step of `pc`:

    z2 <- 0, z1 <- loc(z2)
    relax_steps times:  z <- z - step_size dE/dz                  both levels at once
    E at the last z (which is reported), dE/dweights there, Adam

with E = -sum over rows of log p(x, z1, z2). Adam is torch's fused one (option adam="fused",
"foreach" or "loop"), which is its fastest on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.peers.floor import FLOORS, Products
from benchmarks.speed.peers.problems import load
from benchmarks.speed.peers.protocol import Program, num_threads, options_of, serve
from benchmarks.speed.peers.torch_chains import (
    ADAM,
    FabricClassifier,
    PCXDecoder,
    Tensors,
    linear,
    weights_of,
)

__all__ = ["build", "main"]

_LOG_2PI = math.log(2 * math.pi)


class _Gaussian:
    """A Gaussian over packed latents, for a log joint in unconstrained coordinates."""

    def __init__(
        self, log_joint: Callable[[Tensor], Tensor], given: Tensors, options: Mapping[str, Any]
    ) -> None:
        self.log_joint = log_joint
        self.noise = given["noise"]
        self.size = len(given["loc"])
        self.loc = given["loc"].clone().requires_grad_()
        self.full = "scale_tril" in given
        scale = given["scale_tril"].diagonal() if self.full else given["scale"]
        self.raw = (scale + torch.log(-torch.expm1(-scale))).requires_grad_()
        parameters = [self.loc, self.raw]
        if self.full:
            self.lower = (given["scale_tril"] / scale[:, None]).tril(-1).requires_grad_()
            self.eye = torch.eye(self.size, dtype=scale.dtype)
            parameters.append(self.lower)
        self.optim = _adam(parameters, options)

    def loss(self, noise: Tensor) -> Tensor:
        scale = F.softplus(self.raw)
        if self.full:
            u = self.loc + scale * (noise + self.lower.tril(-1) @ noise)
        else:
            u = self.loc + scale * noise
        log_q = -0.5 * (noise @ noise + self.size * _LOG_2PI) - scale.log().sum()
        return log_q - self.log_joint(u)

    def check(self) -> float:
        return self.loss(self.noise).item()

    def prepare(self, num_steps: int) -> None:
        pass

    def advance(self, num_steps: int) -> float:
        loss = self.loc
        for _ in range(num_steps):
            loss = self.loss(torch.randn_like(self.noise))
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
        return loss.item()


def _eight_schools(given: Tensors) -> Callable[[Tensor], Tensor]:
    y, sigma = given["y"], given["sigma"]
    constant = -math.log(5.0) - 4.5 * _LOG_2PI - float(sigma.log().sum()) - 4 * _LOG_2PI
    constant += math.log(2 / (5 * math.pi))

    def log_joint(u: Tensor) -> Tensor:
        mu, log_tau, theta = u[0], u[1], u[2:]
        tau = log_tau.exp()
        error = (y - mu - tau * theta) / sigma
        prior = -0.5 * (mu / 5) ** 2 - 0.5 * (theta @ theta) - torch.log1p((tau / 5) ** 2)
        return constant + prior + log_tau - 0.5 * (error @ error)

    return log_joint


def _radon(given: Tensors) -> Callable[[Tensor], Tensor]:
    floor, uranium, county, y = (given[k] for k in ("floor", "uranium", "county", "y"))
    constant = -3 * math.log(10.0) - 0.5 * (3 + 85 + len(y)) * _LOG_2PI + math.log(2 / math.pi)

    def log_joint(u: Tensor) -> Tensor:
        wide, logs, raw = torch.stack([u[0], u[3], u[4]]), u[1:3], u[5:]
        scales = logs.exp()
        alpha = u[0] + scales[0] * raw
        error = (y - alpha[county] - u[3] * uranium - u[4] * floor) / scales[1]
        prior = -0.5 * (wide @ wide / 100 + scales @ scales + raw @ raw) + logs.sum()
        return constant + prior - 0.5 * (error @ error) - len(y) * logs[1]

    return log_joint


def _log_joint(weights: Tensors, x: Tensor, z2: Tensor, z1: Tensor) -> Tensor:
    """The log joint of all rows, log p(x, z1, z2)."""
    features = F.silu(linear(z2, weights, "model.levels.0.network.0"))
    loc = linear(features, weights, "model.levels.0.loc")
    scale = 0.05 + F.softplus(linear(features, weights, "model.levels.0.raw_scale"))
    logits = _logits(weights, z1)
    log_x = -F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
    log_z1 = -0.5 * ((z1 - loc) / scale).square().sum() - scale.log().sum()
    constant = -0.5 * _LOG_2PI * (z1.numel() + z2.numel())
    return log_x + log_z1 - 0.5 * z2.square().sum() + constant


def _logits(weights: Tensors, z1: Tensor) -> Tensor:
    features = F.silu(linear(z1, weights, "model.network.0"))
    return linear(features, weights, "model.likelihood.output")


class _VAE:
    """Two levels with an amortized mean field."""

    def __init__(self, given: Tensors, options: Mapping[str, Any]) -> None:
        self.x, self.noise = given["x"], given["noise"]
        self.fixed = {k: given[f"guide.{k}"] for k in ("shift", "scale", "init")}
        self.weights = weights_of(given, ("model.", "guide.network."))
        self.optim = _adam(list(self.weights.values()), options)

    def loss(self, noise: Tensor) -> Tensor:
        inputs = (self.x - self.fixed["shift"]) / self.fixed["scale"]
        features = F.silu(linear(inputs, self.weights, "guide.network.0"))
        lam = self.fixed["init"] + linear(features, self.weights, "guide.network.2")
        loc, raw = lam.split(48, -1)
        scale = F.softplus(raw) + 1e-8
        z2, z1 = (loc + scale * noise).split([16, 32], -1)
        log_q = -0.5 * (noise.square().sum() + noise.numel() * _LOG_2PI) - scale.log().sum()
        return log_q - _log_joint(self.weights, self.x, z2, z1)

    check = _Gaussian.check
    prepare = _Gaussian.prepare

    def advance(self, num_steps: int) -> float:
        loss = self.x
        for _ in range(num_steps):
            loss = self.loss(torch.randn_like(self.noise))
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
        return loss.item()


class _PredictiveCoding:
    """Relaxation of both levels, then one step of the weights."""

    def __init__(self, given: Tensors, options: Mapping[str, Any]) -> None:
        self.x = given["x"]
        self.weights = weights_of(given, ("model.",))
        self.relax_steps = int(options["relax_steps"])
        self.step_size = float(options["step_size"])
        self.optim = _adam(list(self.weights.values()), options)

    def relaxed(self) -> tuple[Tensor, Tensor]:
        frozen = {name: weight.detach() for name, weight in self.weights.items()}
        z2 = self.x.new_zeros(len(self.x), 16)
        features = F.silu(linear(z2, frozen, "model.levels.0.network.0"))
        z1 = linear(features, frozen, "model.levels.0.loc")
        for _ in range(self.relax_steps):
            z2.requires_grad_()
            z1.requires_grad_()
            energy = -_log_joint(frozen, self.x, z2, z1)
            d2, d1 = torch.autograd.grad(energy, (z2, z1))
            z2 = z2.detach().sub_(d2, alpha=self.step_size)
            z1 = z1.detach().sub_(d1, alpha=self.step_size)
        return z2, z1

    def check(self) -> float:
        z2, z1 = self.relaxed()
        return -_log_joint(self.weights, self.x, z2, z1).item()

    prepare = _Gaussian.prepare

    def advance(self, num_steps: int) -> float:
        energy = self.x
        for _ in range(num_steps):
            z2, z1 = self.relaxed()
            energy = -_log_joint(self.weights, self.x, z2, z1)
            self.optim.zero_grad()
            energy.backward()
            self.optim.step()
        return energy.item()


class _Floor:
    """Matrix products, without a loss."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        of = options_of(options, of="vae")["of"]
        if of not in FLOORS:
            raise ValueError(f"No floor is known of {of!r}. Available: {', '.join(FLOORS)}.")
        self.products = Products(*FLOORS[of])

    def check(self) -> float:
        return 0.0

    prepare = _Gaussian.prepare

    def advance(self, num_steps: int) -> float:
        self.products(num_steps)
        return 0.0


def _adam(parameters: list[Tensor], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=options["lr"], **ADAM[options["adam"]])


def build(task: str, seed: int, options: Mapping[str, Any]) -> Program:
    """Make the program of a task.

    Args:
        task: A task of :mod:`~benchmarks.speed.peers.problems`.
        seed: Seed of arrays that are not given, and of the draws.
        options: ``arrays``, ``guide``, ``batch``, ``data``, ``dtype``, ``lr``, ``adam``,
            ``relax_steps``, ``step_size`` and ``momentum`` (of PCX's decoder); for the task
            ``"floor"`` only ``of``.
    """
    if task == "floor":
        return _Floor(options)
    options = options_of(
        options,
        arrays=None,
        guide=None,
        batch=None,
        data=None,
        dtype=None,
        lr=0.01 if task in ("eight_schools", "radon") else 0.001,
        adam="fused",
        relax_steps=20,
        step_size=0.02,
        momentum=0.15,
    )
    given = {
        name: torch.from_numpy(np.ascontiguousarray(value))
        for name, value in load(task, seed, options).items()
    }
    torch.manual_seed(seed)
    programs: dict[str, Callable[[], Program]] = {
        "eight_schools": lambda: _Gaussian(_eight_schools(given), given, options),
        "radon": lambda: _Gaussian(_radon(given), given, options),
        "vae": lambda: _VAE(given, options),
        "pc": lambda: _PredictiveCoding(given, options),
        "pcx_decoder": lambda: PCXDecoder(given, options),
        "fabricpc_mnist": lambda: FabricClassifier(given, options),
    }
    return programs[task]()


def main() -> None:
    """Serve standard input and output."""
    threads = num_threads()
    torch.set_num_threads(threads)
    serve(build, ("torch", "numpy"), threads)

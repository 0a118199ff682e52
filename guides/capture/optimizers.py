"""Updates of torch's optimizers as pure formulas, on the very state that the optimizers keep.

    parameter, *state = update(parameter, gradient, *state, *coefficients)

Numbers that change from step to step (learning rates, bias corrections) are worked out in Python,
in double precision as the optimizers do, and enter as a small table. The state tensors are those
of the optimizer itself, changed in place, so that ordinary steps can go on from them.

Adam's formulas are the operations of the optimizers in their order: some programs blow the last
bit of a parameter up to any size within a hundred steps, and then only equal bits are equal.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.optim import _load_state_dict
from torch import Tensor

__all__ = ["Rule", "optimizer_of", "rule_of"]


class Rule(abc.ABC):
    """The update of one parameter.

    Args:
        optimizer: Its optimizer, which has that parameter alone.
        parameter: The parameter.
    """

    options: tuple[str, ...] = ()

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        self.optimizer = optimizer
        self.parameter = parameter
        self.group = optimizer.param_groups[0]
        self.state = optimizer.state[parameter]
        self.fixed = tuple(self.group[name] for name in self.options)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the formula depends on: another signature needs another graph."""
        return (type(self).__name__, *(self.group[name] for name in self.options))

    @abc.abstractmethod
    def tensors(self) -> list[Tensor]:
        """The state that the update reads and writes; made where there is none yet."""

    @abc.abstractmethod
    def coefficients(self, num_steps: int) -> Tensor:
        """The numbers of the next steps ``(num_steps, C)``, in float64. Changes nothing."""

    def rates(self, num_steps: int) -> list[Any]:
        """What coefficients depend on beside the count, before each of the next steps."""
        return [self.group["lr"]] * num_steps

    def count(self) -> Any:
        """Steps made so far, and all else that coefficients of equal options depend on."""
        return float(self.state.get("step", 0.0))

    @abc.abstractmethod
    def advance(self, num_steps: int) -> None:
        """Note that steps were made."""

    @abc.abstractmethod
    def update(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], numbers: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The parameter and its state after a step; ``numbers`` are one step's coefficients."""


class _Adam(Rule):
    """``torch.optim.Adam`` and ``AdamW``."""

    options = ("betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay")

    def tensors(self) -> list[Tensor]:
        if not self.state:
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            self.state["step"] = torch.tensor(0.0, dtype=dtype)
            self.state["exp_avg"] = torch.zeros_like(self.parameter)
            self.state["exp_avg_sq"] = torch.zeros_like(self.parameter)
        return [self.state["exp_avg"], self.state["exp_avg_sq"]]

    def coefficients(self, num_steps: int) -> Tensor:
        beta1, beta2 = self.group["betas"]
        lr = float(self.group["lr"])
        decay = 1 - lr * self.group["weight_decay"]
        # Python's powers, as the optimizer's: those of torch differ in the last bit.
        rows = [
            [lr / (1 - beta1**t), (1 - beta2**t) ** 0.5, decay]
            for t in _steps(float(self.state["step"]), num_steps)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def advance(self, num_steps: int) -> None:
        self.state["step"] += num_steps

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], numbers: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (beta1, beta2), eps, decay, maximize, decoupled = self.fixed
        gradient = -gradient if maximize else gradient
        if decay and decoupled:
            parameter = parameter * numbers[2]
        elif decay:
            gradient = gradient.add(parameter, alpha=decay)
        mean, square = state
        mean = mean.lerp(gradient, 1 - beta1)
        square = (square * beta2).addcmul(gradient, gradient, value=1 - beta2)
        root = square.sqrt() / numbers[1] + eps
        return parameter - numbers[0] * mean / root, [mean, square]


class _ClippedAdam(Rule):
    """``pyro.optim.ClippedAdam``."""

    options = ("betas", "eps", "weight_decay", "clip_norm", "centered_variance")

    def tensors(self) -> list[Tensor]:
        if not self.state:
            self.state["step"] = 0
            self.state["exp_avg"] = torch.zeros_like(self.parameter)
            self.state["exp_avg_sq"] = torch.zeros_like(self.parameter)
        return [self.state["exp_avg"], self.state["exp_avg_sq"]]

    def coefficients(self, num_steps: int) -> Tensor:
        beta1, beta2 = self.group["betas"]
        steps = _steps(float(self.state["step"]), num_steps)
        rows = [
            [lr * decay * math.sqrt(1 - beta2**t) / (1 - beta1**t)]
            for t, (lr, decay) in zip(steps, self.rates(num_steps), strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def rates(self, num_steps: int) -> list[Any]:
        lr, decay, found = self.group["lr"], self.group["lrd"], []
        for _ in range(num_steps):
            found.append((lr, decay))
            lr *= decay
        return found

    def advance(self, num_steps: int) -> None:
        self.state["step"] += num_steps
        for _ in range(num_steps):
            self.group["lr"] *= self.group["lrd"]

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], numbers: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (beta1, beta2), eps, decay, clip, centered = self.fixed
        gradient = gradient.clamp(-clip, clip)
        if decay:
            gradient = gradient.add(parameter, alpha=decay)
        mean, square = state
        mean = (mean * beta1).add(gradient, alpha=1 - beta1)
        deviation = gradient - mean if centered else gradient
        square = (square * beta2).addcmul(deviation, deviation, value=1 - beta2)
        return parameter - numbers[0] * mean / (square.sqrt() + eps), [mean, square]


class _SGD(Rule):
    """``torch.optim.SGD``, with momentum or without."""

    options = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")

    def tensors(self) -> list[Tensor]:
        if not self.fixed[0]:
            return []
        if self.state.get("momentum_buffer") is None:
            self.state["momentum_buffer"] = torch.zeros_like(self.parameter)
            # torch fills the buffer with the first gradient, undampened.
            self.state["_fresh"] = True
        return [self.state["momentum_buffer"]]

    def coefficients(self, num_steps: int) -> Tensor:
        row = [float(self.group["lr"]), 1.0 - self.group["dampening"]]
        rows = torch.tensor(row, dtype=torch.float64).repeat(num_steps, 1)
        if self.state.get("_fresh", False):
            rows[0, 1] = 1.0
        return rows

    def count(self) -> Any:
        return self.state.get("_fresh", False)

    def advance(self, num_steps: int) -> None:
        self.state.pop("_fresh", None)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Sequence[Tensor], numbers: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        momentum, _, decay, nesterov, maximize = self.fixed
        gradient = -gradient if maximize else gradient
        if decay:
            gradient = gradient + decay * parameter
        if not state:
            return parameter - numbers[0] * gradient, []
        buffer = momentum * state[0] + numbers[1] * gradient
        direction = gradient + momentum * buffer if nesterov else buffer
        return parameter - numbers[0] * direction, [buffer]


def _steps(done: float, num_steps: int) -> list[float]:
    """Numbers of the next steps, from one."""
    return [done + i for i in range(1, num_steps + 1)]


_RULES: dict[type, type[Rule]] = {
    torch.optim.Adam: _Adam,
    torch.optim.AdamW: _Adam,
    ClippedAdam: _ClippedAdam,
    torch.optim.SGD: _SGD,
}


def optimizer_of(optim: PyroOptim, parameter: Tensor) -> torch.optim.Optimizer:
    """The torch optimizer that Pyro keeps for a parameter, made as Pyro makes it."""
    if parameter not in optim.optim_objs:
        # As in the optimizer's own call, without the step: that of ClippedAdam decays its rate.
        made = optim._get_optim(parameter)
        name = pyro.get_param_store().param_name(parameter)
        state = optim._state_waiting_to_be_consumed.pop(name, None)
        if state is not None:
            _load_state_dict(made, state)
        optim.optim_objs[parameter] = made
        optim.grad_clip[parameter] = optim._get_grad_clip(parameter)  # type: ignore[arg-type]
        inner = getattr(made, "optimizer", None)
        if inner is not None:
            # A scheduler warns where no step was made before its own.
            inner._opt_called = True
    return optim.optim_objs[parameter]


def rule_of(optim: PyroOptim, parameter: Tensor) -> Rule | str:
    """The formula of a parameter's optimizer, or why it has none."""
    optimizer: Any = optimizer_of(optim, parameter)
    if optim.grad_clip.get(parameter) is not None:
        return "clip_args clips gradients outside the optimizer"
    optimizer = getattr(optimizer, "optimizer", optimizer)
    found = _RULES.get(type(optimizer))
    if found is None:
        return f"optimizer {type(optimizer).__name__} has no formula here"
    if parameter.dtype not in (torch.float32, torch.float64):
        return f"parameters of {parameter.dtype} are updated in another precision"
    group = optimizer.param_groups[0]
    if group.get("amsgrad") or isinstance(group["lr"], Tensor):
        return "amsgrad, or a learning rate that is a tensor"
    return found(optimizer, parameter)

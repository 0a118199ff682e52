"""Incremental predictive coding: parameters move at every update of the latents.

    repeat num_steps times, at the latents and parameters as they are:
        dz, dtheta = dE/dz, dE/dtheta               one gradient gives both
        z     <- z - step_size * dz                 each row by its own energy, without N/B
        theta <- theta - optim(dtheta)

Latents and parameters descend one energy at the same time, which is a generalised EM whose E and M
steps are never finished. Where both gradients vanish is where they vanish for
:class:`~guides.inference.predictive_coding.PredictiveCoding`: the stationary points are the same.

The gradient of the parameters is taken at the latents *before* their update, because that is what
makes it one gradient; the update of the latents after the last gradient is what persists.

References:
    | A Stable, Fast, and Fully Automatic Learning Algorithm for Predictive Coding Networks
    | (Salvatori et al., 2024)
    | https://arxiv.org/abs/2212.00720

    | A View of the EM Algorithm that Justifies Incremental, Sparse, and Other Variants
    | (Neal & Hinton, 1998)
    | https://doi.org/10.1007/978-94-011-5014-9_12
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.relaxation import curvature
from guides.inference.solvers.heavy_ball import HeavyBall
from guides.inference.units import energy_function
from guides.probe import Program

__all__ = ["IncrementalPredictiveCoding"]

_REFRESH = 50
_SAFETY = 1.1
_GROWTH = 1.2
_REACH = 3.0


class IncrementalPredictiveCoding(PredictiveCoding):
    """Incremental predictive coding (iPC) as a loop with SVI's interface.

    A call of :meth:`step` starts the latents of its rows as ``PredictiveCoding`` does and makes
    ``num_steps`` updates of latents and parameters together: the optimizer moves ``num_steps``
    times a call. :meth:`infer`, :meth:`evaluate_loss` and :meth:`posterior` relax at fixed
    parameters.

    No update is taken back: the energy may rise because the parameters moved. It does not for
    plain gradient descent with both step sizes below the joint ``2 / lambda_max``.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the model's parameters; it moves at every update.
        guide: Where latents start, as in ``PredictiveCoding``.
        num_steps: Updates a call of :meth:`step`.
        step_size: Step of the latents. ``"auto"`` is 1 / lambda_max of the row of the batch with
            the largest curvature, renewed every 50 calls; with global latents half of that. A
            row whose energy rose halves its step, and no update is longer than three posterior
            standard deviations, 3 / lambda_max ** 0.5.
        parameterization: ``"centered"``, or ``"noncentered"``, which takes a second gradient: the
            parameters still see the one at fixed latents.
        jacobian: As in ``PredictiveCoding``.
        momentum: What the latents keep of their last displacement.
        data_plate: See :func:`guides.layout.layout`.
        global_rate: As in ``PredictiveCoding``, at every update.
        newton_steps: As in ``PredictiveCoding``.
        mode: ``"graph"`` captures one update, optimizer included, as a graph of tensor
            operations, ``"inductor"`` compiles it, ``"auto"`` compiles where that is possible.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
        >>> ipc = IncrementalPredictiveCoding(model, pyro.optim.SGD({"lr": 0.01}), num_steps=8)
        >>> first = ipc.step(torch.tensor([0.0, 2.0]))
        >>> ipc.step(torch.tensor([0.0, 2.0])) < first
        True
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Callable[..., Any] | None = None,
        num_steps: int = 20,
        step_size: float | str = "auto",
        parameterization: str = "centered",
        jacobian: bool = True,
        *,
        momentum: float = 0.0,
        data_plate: str | None = "auto",
        global_rate: float | None = None,
        newton_steps: int = 20,
        mode: str = "eager",
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
        if parameterization == "auto":
            raise ValueError(
                'parameterization must be "centered" or "noncentered": "auto" belongs to the '
                "solvers of PredictiveCoding."
            )
        super().__init__(
            model,
            optim,
            guide,
            num_steps,
            step_size,
            parameterization,
            HeavyBall(momentum) if momentum else "gradient",
            jacobian,
            data_plate=data_plate,
            global_rate=global_rate,
            newton_steps=newton_steps,
            mode=mode,
        )
        self.momentum = momentum
        self._latents: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}
        self._pace: dict[str, Tensor] = {}
        self._held: LogJoint | None = None
        self._calls = 0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Update latents and parameters ``num_steps`` times together.

        Returns:
            The energy of all N rows at the last gradient, before the last update.

        Raises:
            ValueError: Where the energy is not finite, or the data plate draws rows of its own.
        """
        log_joint = self._log_joint(args, kwargs)
        plate = log_joint.layout.data_plate
        if plate is not None and plate.random:
            raise ValueError(
                f"Plate {plate.name!r} draws other rows whenever the program runs, and the "
                "updates of one step need the same. Give the program an argument index, and "
                f"write pyro.plate({plate.name!r}, size, subsample=index)."
            )
        packed, moved = self._start_packed(log_joint)
        self._renew_curvature(log_joint, packed, moved)
        energy = math.nan
        try:
            self._held = log_joint
            self._latents = {name: value.detach() for name, value in packed.items()}
            if self.momentum:
                self._velocity = {name: torch.zeros_like(v) for name, v in packed.items()}
            if self.step_size == "auto":
                ones = torch.ones_like(next(iter(packed.values()))[..., 0]).reshape(-1)
                units = ones[:1] if "global" in packed else ones
                self._pace = {"factor": units, "energy": units * math.inf}
            for _ in range(self.num_steps):
                energy = super().step(*args, **kwargs)
                if not math.isfinite(energy):
                    raise ValueError(
                        "The energy is not finite: the updates diverged, or the data lie outside "
                        "the support of their distributions. Use a smaller step_size or learning "
                        'rate; step_size="auto" follows the curvature of the energy.'
                    )
            self._keep_globals(log_joint, self._values(log_joint, self._latents))
        finally:
            self._held, self._latents, self._velocity, self._pace = None, {}, {}, {}
        self._calls += 1
        return energy

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """One update of the latents: the energy before it, which the parameters descend, too."""
        moved = self._noncentered(log_joint.layout)
        with torch.enable_grad():
            packed = {name: v.detach().requires_grad_() for name, v in self._latents.items()}
            terms = log_joint.packed(
                packed, jacobian=self.jacobian, noncentered=moved, expose_params=True
            )
            loss = -log_joint.total(*terms)
            # The graph stays: the parameters' gradient goes back through the same run.
            grads = torch.autograd.grad(
                loss, list(packed.values()), retain_graph=True, allow_unused=True
            )
        energy = loss.detach()
        if self._pace:
            self._set_pace(energy.reshape(1) if "global" in packed else -terms[0].detach())
        if moved:
            # At fixed errors a parameter would move the latents below it, too.
            self.gradient_evaluations += max(1, log_joint.layout.num_rows)
            with torch.enable_grad():
                loss = self._loss(log_joint, self._values(log_joint, self._latents))
        for (name, value), grad in zip(packed.items(), grads, strict=True):
            slope = torch.zeros_like(value) if grad is None else grad.detach()
            change = self._step_of(log_joint, name, slope)
            if self.momentum:
                change = change + self.momentum * self._velocity[name]
                self._velocity = {**self._velocity, name: change}
            after = (value.detach() + change).to(value.dtype)
            self._latents = {**self._latents, name: after}
        return energy, loss

    def _set_pace(self, energy: Tensor) -> None:
        """Halve the step of every unit whose energy ``(U,)`` rose at its last update."""
        before, factor = self._pace["energy"], self._pace["factor"]
        slack = 8 * torch.finfo(energy.dtype).eps * (1 + energy.abs())
        factor = torch.where(
            energy <= before + slack, (factor * _GROWTH).clamp_max(1.0), factor * 0.5
        )
        self._pace = {"factor": factor, "energy": energy}

    def _step_of(self, log_joint: LogJoint, name: str, gradient: Tensor) -> Tensor:
        """The displacement of a group for the gradient of the total energy; N/B divided out."""
        scale = log_joint.layout.scale
        rate = 1.0 / scale
        if name == "global" and scale != 1.0 and self.global_rate is not None:
            rate = self.global_rate
        if self._curvature is None:
            return -rate * float(self.step_size) * gradient
        blocks = 2.0 if len(log_joint.layout.groups) > 1 else 1.0
        largest = self._curvature[name].clamp_min(1e-12)
        factor = self._pace["factor"]
        if gradient.dim() == 2:
            factor = factor.unsqueeze(-1)
        change = -rate * factor * gradient / (_SAFETY * blocks * largest)
        length = change.norm(dim=-1, keepdim=True)
        return change * (_REACH / largest.sqrt() / length.clamp_min(1e-30)).clamp_max(1.0)

    def _renew_curvature(
        self, log_joint: LogJoint, packed: dict[str, Tensor], moved: tuple[str, ...]
    ) -> None:
        if self.step_size != "auto":
            return
        if self._curvature is not None and self._calls % _REFRESH:
            return
        energy = energy_function(log_joint, jacobian=self.jacobian, noncentered=moved)
        found = curvature(energy, packed, log_joint.layout.scale)
        self.gradient_evaluations += 24 * len(packed) * max(1, log_joint.layout.num_rows)
        # Nothing catches a row that rises, so the steepest one decides.
        self._curvature = {name: c.max().reshape(1) for name, c in found.items()}

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        held = self._held
        if held is not None and _same(held.args, args) and _same(held.kwargs, kwargs):
            return held
        return super()._log_joint(args, kwargs)

    def _refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Nothing: what is renewed is renewed once a call of step."""

    def _tensors(self) -> dict[str, Tensor]:
        latents = {f"latent {name}": value for name, value in self._latents.items()}
        velocity = {f"velocity {name}": value for name, value in self._velocity.items()}
        pace = {f"pace {name}": value for name, value in self._pace.items()}
        return super()._tensors() | latents | velocity | pace

    def _put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super()._put_tensors(tensors)
        names = ("latent", "_latents"), ("velocity", "_velocity"), ("pace", "_pace")
        for word, kept in names:
            kind = f"{word} "
            found = {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
            setattr(self, kept, found)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.momentum)

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters."""
        return {**super().get_state(), "calls": self._calls}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        super().set_state(state)
        self._calls = state["calls"]


def _same(first: Any, second: Any) -> bool:
    """Whether two collections of arguments hold the same objects."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(second[k] is v for k, v in first.items())
    return len(first) == len(second) and all(map(lambda a, b: a is b, first, second))

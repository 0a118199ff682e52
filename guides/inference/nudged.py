"""Nudged predictive coding: outputs are pulled towards their data, not clamped to them.

    E_b(z)  = -log p(everything but the outputs) - b log p(outputs)
    z_b     = relaxation of E_b
    theta  <- theta - optim( (d E_b / d theta at z_b - d E_a / d theta at z_a) / (b - a) )

                 a        b
    positive     0        beta
    negative    -beta     0
    centered    -beta     beta

As beta goes to zero the update goes to the gradient of backpropagation through the free phase, for
positive and negative nudging linearly in beta, for centered nudging quadratically. The free phase
is subtracted: its own gradient is not zero where something else than the output is learned.

References:
    | Equilibrium propagation: bridging the gap between energy-based models and backpropagation
    | (Scellier & Bengio, 2017) https://arxiv.org/abs/1602.05179
    | Benchmarking predictive coding networks, made simple (Pinchetti et al., 2024)
    | https://arxiv.org/abs/2407.01163
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.optim
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from guides.arguments import did_you_mean
from guides.energy import LogJoint
from guides.inference.predictive_coding import PredictiveCoding
from guides.probe import Program

__all__ = ["NudgedPredictiveCoding"]

SIGNS = ("positive", "negative", "centered")


class _Weighed(Messenger):
    """Multiplies the log densities of some sites."""

    def __init__(self, names: frozenset[str], weight: float) -> None:
        super().__init__()
        self.names, self.weight = names, weight

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            msg["scale"] = msg["scale"] * self.weight


class NudgedPredictiveCoding(PredictiveCoding):
    """Predictive coding with outputs that are nudged towards their data.

    ``infer``, ``posterior`` and ``evaluate_loss`` are those of the program itself, with its
    outputs clamped; only learning nudges.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the model's parameters.
        nudge: The observed site that is nudged, or several.
        beta: Weight of its log density; small.
        sign: ``"positive"``, ``"negative"`` or ``"centered"``, which takes both and has the
            smallest error.
        **options: See :class:`guides.inference.PredictiveCoding`. Relax well: differences of two
            states divided by beta show what is left of each.

    Raises:
        ValueError: For an unknown sign, a beta that is not positive, a site that is not observed,
            or ``warm_start="last"``, which would start one phase from another.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y):
        ...     w = pyro.param("w", torch.tensor(0.5))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(w * x, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> loop = NudgedPredictiveCoding(
        ...     model, pyro.optim.SGD({"lr": 0.1}), nudge="y", beta=0.01, num_steps=100
        ... )
        >>> loss = loop.step(torch.ones(1), torch.ones(1))
        >>> bool((pyro.param("w") - 0.55).abs() < 1e-3)
        True
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        *,
        nudge: str | Sequence[str],
        beta: float = 0.01,
        sign: str = "centered",
        **options: Any,
    ) -> None:
        if sign not in SIGNS:
            raise ValueError(f"sign must be one of {', '.join(SIGNS)}, got {sign!r}.")
        if not beta > 0:
            raise ValueError(
                f"beta must be positive, got {beta}: sign= says in which direction it nudges."
            )
        if options.get("warm_start") == "last":
            raise ValueError(
                'warm_start="last" would start each phase from the end of another one. Leave it '
                "out, or pass a guide."
            )
        super().__init__(model, optim, **options)
        self.nudge = frozenset([nudge] if isinstance(nudge, str) else nudge)
        self.beta, self.sign = float(beta), sign

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """The energy of the phase with the larger weight, and the difference that is learned."""
        observed = log_joint.layout.observed
        for name in self.nudge:
            if name not in observed:
                raise ValueError(
                    f"nudge= names {name!r}, which this call does not observe. "
                    f"{did_you_mean(name, observed)}Observed sites: "
                    f"{', '.join(observed) or 'none'}."
                )
        low, high = {
            "positive": (0.0, self.beta),
            "negative": (-self.beta, 0.0),
            "centered": (-self.beta, self.beta),
        }[self.sign]
        losses = []
        for weight in (low, high):
            energy, loss = self._phase(log_joint, weight)
            losses.append(loss)
        return energy, (losses[1] - losses[0]) / (high - low)

    def _phase(self, log_joint: LogJoint, weight: float) -> tuple[Tensor, Tensor]:
        """Energy and loss after a relaxation with the outputs weighed."""

        def weighed(*args: Any, **kwargs: Any) -> Any:
            with _Weighed(self.nudge, weight):
                return log_joint.model(*args, **kwargs)

        joint = LogJoint(weighed, log_joint.args, log_joint.kwargs, layout=log_joint.layout)
        # Each phase has a curvature of its own, so none is kept from step to step.
        values, relaxed = self._relax(joint)
        with torch.enable_grad():
            loss = self._loss(joint, values)
        self._keep_globals(joint, values)
        return relaxed.energy.sum() * joint.layout.scale + relaxed.energy_global, loss

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.nudge, self.beta, self.sign)

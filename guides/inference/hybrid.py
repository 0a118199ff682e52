"""Hybrid predictive coding: a guide starts the relaxation, and learns where it ended.

    z_0 = f_phi(x)                            the guide's location: a fast guess
    z_T = relax(z_0)                          stops where the energy hardly falls
    theta <- theta - optim(dE/dtheta at z_T)
    phi   <- phi   - optim(dR/dphi)           R = -log q_phi(z_T | x), or 0.5 |u_T - f_phi(x)|^2

A guide with a density is regressed by its log density, a delta guide by the squared distance in
unconstrained space. As the guide learns, the start nears the end and fewer updates are needed.

References:
    | Hybrid predictive coding: inferring, fast and slow (Tschantz et al., 2023)
    | https://doi.org/10.1371/journal.pcbi.1011280
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.checks import capture
from guides.inference.guide_losses import guide_loss
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.relaxation import Relaxed
from guides.objectives.guide_alone import of_guide_alone
from guides.probe import Program

__all__ = ["HybridPredictiveCoding"]


class HybridPredictiveCoding(PredictiveCoding):
    """Hybrid predictive coding as a loop with SVI's interface.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the parameters of model and guide. It keeps one optimizer a
            parameter; give it a function of the parameter's name for rates that differ:
            ``pyro.optim.Adam(lambda name: {"lr": ...})``.
        guide: A guide of this package for the model, such as ``guides.make("amortized_normal",
            model, x)`` or ``"amortized_delta"``.
        num_steps: Updates of the latents in a relaxation, at most.
        energy_tolerance: Stop a relaxation when the energy of a row falls by less than this an
            update, in nats, on average over the rows; 0 makes all updates.
        check_every: Updates between two looks at the energy.
        **options: See :class:`~guides.inference.predictive_coding.PredictiveCoding`. With an
            ``energy_tolerance`` steps run eagerly: a graph cannot end by the values in it.

    Attributes:
        num_updates: Updates that the last relaxation made.

    Raises:
        TypeError: Where the guide is not of this package.

    Example:
        >>> import pyro, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(20)
        >>> guide = guides.make("amortized_delta", model, x)
        >>> loop = HybridPredictiveCoding(
        ...     model, pyro.optim.Adam({"lr": 0.02}), guide, num_steps=50, energy_tolerance=1e-4
        ... )
        >>> losses = [loop.step(x) for _ in range(3)]
        >>> loop.num_updates <= 50
        True
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Any,
        num_steps: int = 20,
        *,
        energy_tolerance: float = 0.0,
        check_every: int = 5,
        **options: Any,
    ) -> None:
        if not isinstance(guide, ProgramGuide):
            what = "no guide" if guide is None else type(guide).__name__
            raise TypeError(
                "HybridPredictiveCoding starts from a guide and trains it, and needs one of this "
                f'package; got {what}. Pass guides.make("amortized_normal", model, x), or use '
                "PredictiveCoding."
            )
        if energy_tolerance < 0:
            raise ValueError(f"energy_tolerance must not be negative, got {energy_tolerance}.")
        if check_every < 1:
            raise ValueError(f"check_every must be at least 1, got {check_every}.")
        super().__init__(model, optim, guide, num_steps, **options)
        self.energy_tolerance = energy_tolerance
        self.check_every = check_every
        self.num_updates = 0
        self._resumed: tuple[dict[str, Tensor], tuple[str, ...]] | None = None

    def _loss(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> Tensor:
        """The energy at the relaxed state, and the guide's distance from there."""
        return super()._loss(log_joint, values) + self._regression(log_joint, values)

    def _regression(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> Tensor:
        guide: Any = self.guide
        if guide.has_density:
            packed = log_joint.layout.pack(values)
            draws = {name: value[None, None] for name, value in packed.items()}
            return guide_loss("forward_kl", guide, log_joint, draws)
        target = log_joint.layout.pack(values)
        found = log_joint.layout.pack(guide.locations(*log_joint.args, **log_joint.kwargs))
        total = torch.zeros(())
        for name, value in found.items():
            scale = log_joint.layout.scale if value.dim() == 2 else 1.0
            total = total + 0.5 * scale * (value - target[name]).square().sum()
        return of_guide_alone(total, guide)

    def _relax(
        self, log_joint: LogJoint, learning: bool = False, hold_globals: bool = False
    ) -> tuple[dict[str, Tensor], Relaxed]:
        most = self.num_steps
        if not self.energy_tolerance or most <= self.check_every:
            values, relaxed = super()._relax(log_joint, learning, hold_globals)
            self.num_updates = relaxed.num_steps
            return values, relaxed
        rows = max(1, log_joint.layout.num_rows)
        done, before = 0, float("inf")
        try:
            while True:
                self.num_steps = min(self.check_every, most - done)
                values, relaxed = super()._relax(log_joint, learning, hold_globals)
                done += self.num_steps
                energy = float(relaxed.energy.sum() + relaxed.energy_global) / rows
                fell = (before - energy) / self.num_steps
                before = energy
                if done >= most or fell < self.energy_tolerance:
                    break
                self._resumed = relaxed.packed, self._noncentered(log_joint.layout)
        finally:
            self.num_steps, self._resumed = most, None
        self.num_updates = done
        return values, relaxed

    def _start_packed(self, log_joint: LogJoint) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        return super()._start_packed(log_joint) if self._resumed is None else self._resumed

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        log_joint = super()._log_joint(args, kwargs)
        plate = log_joint.layout.data_plate
        if plate is not None and plate.random:
            raise ValueError(
                f"Plate {plate.name!r} draws other rows whenever the program runs, and model and "
                "guide need the same. Give the program an argument index, and write "
                f"pyro.plate({plate.name!r}, size, subsample=index)."
            )
        return log_joint

    def _touched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        guide: Any = self.guide
        return {**capture(self.model, args, kwargs), **capture(guide, args, kwargs)}

    def _refusal(self) -> str | None:
        if self.energy_tolerance:
            return "energy_tolerance ends a relaxation by the values of its energy"
        return super()._refusal()

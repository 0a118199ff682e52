"""Fixed-prediction learning: errors settle while predictions stay, and are backpropagation's.

    z_l, J_l = feed-forward values, and how each prediction moves with the layer above
    e_out    = (y - loc) / scale^2                     the output's error
    repeat n times:
        e_l <- e_l - eta (e_l - J_{l+1}' e_{l+1})      all layers; J from the feed-forward pass
    d theta  = - sum_l e_l' d loc_l / d theta

The fixed point is the error of backpropagation. With ``eta = 1`` the errors of a chain of L
layers are exact after L sweeps.

References:
    | Predictive coding approximates backprop along arbitrary computation graphs (Millidge,
    | Tschantz & Buckley, 2022) https://doi.org/10.1162/neco_a_01497
    | On the relationship between predictive coding and backpropagation (Rosenbaum, 2022)
    | https://doi.org/10.1371/journal.pone.0266102
"""

from __future__ import annotations

from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.gaussian_layers import gaussian_layers
from guides.inference.predictive_coding import PredictiveCoding
from guides.location_scale import error, location
from guides.probe import Program

__all__ = ["FixedPrediction"]


class FixedPrediction(PredictiveCoding):
    """Predictive coding with predictions held at the feed-forward pass.

    Args:
        model: A Pyro program whose latents form a chain of Normals of fixed standard deviation.
        optim: A ``PyroOptim`` for the model's parameters.
        num_sweeps: Sweeps n of the errors; the number of layers by default.
        eta: Length of a sweep's step.
        **options: Of :class:`guides.inference.PredictiveCoding`, for ``infer`` and ``posterior``.

    Raises:
        ValueError: For an eta outside (0, 2), or a program that is no such chain.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y):
        ...     w = pyro.param("w", torch.tensor(0.5))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(w * x, 1.0))
        ...         pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)
        >>> loop = FixedPrediction(model, pyro.optim.SGD({"lr": 0.1}))
        >>> loss = loop.step(torch.ones(1), torch.zeros(1))
        >>> round(pyro.param("w").item(), 6)
        0.3
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        *,
        num_sweeps: int | None = None,
        eta: float = 1.0,
        **options: Any,
    ) -> None:
        if not 0 < eta < 2:
            raise ValueError(f"eta must lie between 0 and 2, where sweeps settle, got {eta}.")
        if num_sweeps is not None and num_sweeps < 0:
            raise ValueError(f"num_sweeps must not be negative, got {num_sweeps}.")
        super().__init__(model, optim, **options)
        self.num_sweeps, self.eta = num_sweeps, float(eta)

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """The energy at the feed-forward pass, and the loss whose gradient is that of errors."""
        layers = gaussian_layers(log_joint)
        output, *hidden = layers.sites
        scale = log_joint.layout.scale
        with torch.enable_grad():
            values = {n: v.requires_grad_() for n, v in log_joint.predictions().items()}
            run = log_joint.run(values, expose_params=True)
            predicted = {name: location(run.fns[name]) for name in layers.sites}
            energy = -scale * sum(term.sum() for term in run.terms.values())
        errors = {name: torch.zeros_like(values[name]) for name in hidden}
        errors[output] = error(run.fns[output], run.values[output])[0].detach()
        for _ in range(len(hidden) if self.num_sweeps is None else self.num_sweeps):
            below = [(predicted[name] * errors[name]).sum() for name in layers.sites]
            pulled = torch.autograd.grad(
                sum(below[1:], below[0]), [values[n] for n in hidden], retain_graph=True
            ) if hidden else ()  # fmt: skip
            self.gradient_evaluations += max(1, log_joint.layout.num_rows)
            for name, pull in zip(hidden, pulled, strict=True):
                errors[name] = errors[name] - self.eta * (errors[name] - pull)
        with torch.enable_grad():
            # A run of its own: its values carry no gradient, so that each layer learns locally.
            fns = log_joint.run({n: v.detach() for n, v in values.items()}, expose_params=True).fns
            loss = -scale * sum(
                ((location(fns[name]) * errors[name]).sum() for name in layers.sites),
                torch.zeros(()).to(errors[output]),
            )
        assert isinstance(energy, Tensor)
        return energy.detach(), loss

    def _refusal(self) -> str | None:
        return "the layers are read from the values of the program"

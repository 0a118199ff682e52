"""Zero-divergence learning: predictive coding that is backpropagation, exactly.

    z_l    = loc_l(z_{l-1})                          feed-forward start: hidden errors are zero
    for t = 0 .. L-1:                                from the output layer down
        theta of layer L-1-t  gathers  d E / d theta at the current z
        z_l <- z_l - gamma scale_l^2 dE/dz_l         all layers, predictions from current z

With ``gamma = 1`` the error of a layer, when its turn comes, is the error that backpropagation
gives it, so that the gradients are those of half the squared error of the network over the
variance of the output. With another gamma the gradient of the layer whose turn is t is gamma^t
of that.

References:
    | Can the brain do backpropagation? Exact implementation of backpropagation in predictive
    | coding networks (Song et al., 2020)
    | https://papers.nips.cc/paper/2020/hash/fec87a37cdeec1c6ecf8181c0aa2d3bf-Abstract.html
"""

from __future__ import annotations

from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.gaussian_layers import gaussian_layers
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.units import energy_function
from guides.probe import Program

__all__ = ["ZeroDivergence"]


class ZeroDivergence(PredictiveCoding):
    """Zero-divergence inference learning (Z-IL) on a chain of Gaussian layers.

    The layers are read from the program (:mod:`guides.inference.gaussian_layers`): what does not
    fit is refused. A parameter that several layers share gets the sum of their gradients, as in
    backpropagation. ``infer`` and ``posterior`` are those of predictive coding.

    Args:
        model: A Pyro program whose latents form a chain of Normals of fixed standard deviation.
        optim: A ``PyroOptim`` for the model's parameters.
        gamma: Length of the steps of the latents; backpropagation at 1.
        **options: Of :class:`guides.inference.PredictiveCoding`, for ``infer`` and ``posterior``.

    Raises:
        ValueError: For a gamma that is not positive, or a program that is no such chain.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x, y):
        ...     w = pyro.param("w", torch.tensor(0.5))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(w * x, 1.0))
        ...         pyro.sample("y", dist.Normal(2.0 * z, 1.0), obs=y)
        >>> loop = ZeroDivergence(model, pyro.optim.SGD({"lr": 0.1}))
        >>> loss = loop.step(torch.ones(1), torch.zeros(1))
        >>> round(pyro.param("w").item(), 6)  # d/dw (2 w)^2 / 2 = 2 at w = 1/2
        0.3
    """

    def __init__(
        self, model: Program, optim: pyro.optim.PyroOptim, *, gamma: float = 1.0, **options: Any
    ) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma must be positive, got {gamma}; 1 is backpropagation.")
        super().__init__(model, optim, **options)
        self.gamma = float(gamma)

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """The energy at the feed-forward start, and the sum of the layers' terms in turn."""
        layers = gaussian_layers(log_joint)
        layout_ = log_joint.layout
        values = log_joint.predictions()
        energy = energy_function(log_joint, jacobian=False)
        loss: Tensor | None = None
        first: Tensor | None = None
        for name in layers.sites:
            with torch.enable_grad():
                terms = log_joint.run(values, expose_params=True).terms
                own = -layout_.scale * terms[name].sum()
                loss = own if loss is None else loss + own
            if first is None:
                first = -layout_.scale * torch.stack([t.sum() for t in terms.values()]).sum()
            with torch.no_grad():
                packed = layout_.pack(values)
                grads = torch.func.grad(lambda p: energy(p)[0])(packed)
                self.gradient_evaluations += max(1, layout_.num_rows)
                moved = layout_.constrain(
                    {key: -grad / layout_.scale for key, grad in grads.items()}
                )
                values = {
                    site: value + self.gamma * layers.scales[site] ** 2 * moved[site]
                    for site, value in values.items()
                }
        assert loss is not None
        assert first is not None
        return first.detach(), loss

    def _refusal(self) -> str | None:
        return "the layers are read from the values of the program"

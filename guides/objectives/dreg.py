"""DReG: the importance-weighted bound with doubly reparameterized gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guides.objectives.iwelbo import IWELBO
from guides.objectives.objective import ExposedLogJoint, own_guide
from guides.objectives.packed_draws import draw_packed, joint_of, through_draws
from guides.objectives.weighted import check_rowwise
from guides.probe import Program

__all__ = ["DReG"]


class DReG(IWELBO):
    """The importance-weighted bound; for the guide, the doubly reparameterized gradient.

        v_k = w_k / sum_j w_j                                  normalized weights, per datum
        model:  sum_k v_k   d log p_theta(x, z_k) / d theta    as for IWELBO
        guide:  sum_k v_k^2 d log w_k / d z_k  d z_k / d phi

    The plain gradient of :class:`guides.objectives.IWELBO` for the guide drowns in its noise as K
    grows (signal-to-noise falls like 1/sqrt(K)); this one is unbiased, too, and its
    signal-to-noise grows like sqrt(K). With K = 1 it is :class:`guides.objectives.STL`.

    The value, its sign, scale and bound are those of ``IWELBO``: minus the bound for all N rows,
    above -log p(x) in expectation; weights are per datum, conditional on shared draws of the
    global latents. The q of those global latents keeps the ordinary reparameterized gradient.

    References:
        | Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives
        | (Tucker, Lawson, Gu & Maddison, 2019) https://arxiv.org/abs/1810.04152
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018)
        | https://arxiv.org/abs/1802.04537

    Args:
        num_particles: Draws K of the rows' latents for each draw of the global latents.
        num_outer: Draws of the global latents.

    Raises:
        TypeError: For a guide that is not of this package.
        ValueError: For a point mass, or rows that talk to each other.
        NotImplementedError: For a family that cannot score points that it did not draw.

    Example:
        >>> import pyro, torch, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("amortized_normal", model, x)
        >>> DReG(num_particles=16)(model, guide)(x).backward()
    """

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound for all N rows."""
        guide = own_guide(self, model, guide, args, kwargs, external=True)
        outer, inner = self.num_outer, self.num_particles
        draws = draw_packed(guide, args, kwargs, outer=outer, inner=inner)
        log_joint = ExposedLogJoint(model, args, kwargs, layout=draws.layout)
        if inner > 1 and self._is_first("rows", model, guide):
            first = {name: value[0] for name, value in draws.packed().items()}
            check_rowwise(self, log_joint, draws.layout.constrain(first))
        # The inner draws as fixed points: what remains is the model's and the outer draws' part.
        tracked = torch.is_grad_enabled()
        points = {
            group.group.name: group.value.detach().requires_grad_(tracked)
            for group in draws.within
        }
        rows, other = joint_of(draws, log_joint, jacobian=True, replaced=points)
        log_q = draws.log_q_within(points)
        scale = draws.layout.scale if draws.rowwise else 1.0
        weights = (rows - log_q).detach().softmax(1)
        bound = self.combine((rows - log_q).detach())
        value = (scale * bound.sum(-1)).mean()
        above = (other - draws.log_q_above()).mean()
        if not tracked:
            return -(value + above)
        factor = scale / outer
        direct = factor * (weights * rows).sum()
        fixed, live = [], []
        inside = {group.group.name for group in draws.within}
        for group in draws.within:
            seen = [tensor for name, tensor in group.seen.items() if name in inside]
            fixed += [points[group.group.name], *seen]
            live += [group.value, *seen]
        path = through_draws(factor * (weights.square() * (rows - log_q)).sum(), fixed, live)
        surrogate = direct + path
        return -(value + above + (surrogate - surrogate.detach()))

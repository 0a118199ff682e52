"""STL: the ELBO with the gradient that sticks the landing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guides.objectives.objective import ExposedLogJoint, Objective, own_guide
from guides.objectives.packed_draws import draw_packed, joint_of, through_draws
from guides.probe import Program

__all__ = ["STL"]


class STL(Objective):
    """The ELBO, with the path derivative as gradient of the guide.

        u(phi) ~ q_phi
        value:     log p(x, u) - log q_phi(u)
        gradient:  d/d(theta, phi) [ log p_theta(x, u(phi)) - log q_stop(phi)(u(phi)) ]

    The score term d log q_phi(u) / d phi, whose mean is zero, is left out. The gradient stays
    unbiased, and its variance goes to zero as q goes to the exact posterior, where it is zero
    for every single draw. Far from the posterior it may be noisier than the ordinary gradient.

    The loss is minus the ELBO of all N rows (lower is better): an upper bound on -log p(x) in
    expectation, equal in value to ``Trace_ELBO``'s.

    Groups that depend on draws of others (structured guides) keep the path through those draws.

    References:
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017)
        | https://arxiv.org/abs/1703.09194

    Args:
        num_particles: Number of draws.

    Raises:
        TypeError: For a guide that is not of this package.
        ValueError: For a point mass.
        NotImplementedError: For a family that cannot score points that it did not draw.

    Example:
        >>> import pyro, torch, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("normal", model, x)
        >>> elbo = STL(num_particles=4)(model, guide)
        >>> elbo(x).backward()
    """

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the ELBO of all N rows."""
        guide = own_guide(self, model, guide, args, kwargs, external=True)
        draws = draw_packed(guide, args, kwargs, outer=self.num_particles)
        log_joint = ExposedLogJoint(model, args, kwargs, layout=draws.layout)
        rows, other = joint_of(draws, log_joint, jacobian=True)
        scale = draws.layout.scale if draws.rowwise else 1.0
        log_p = (scale * rows.sum((1, 2)) + other).mean()
        log_q = (scale * draws.log_q_within().sum((1, 2)) + draws.log_q_above()).mean().detach()
        if not torch.is_grad_enabled():
            return log_q - log_p
        fixed, live = [], []
        target = log_p.new_zeros(())
        for group in draws.groups:
            point = group.value.detach().requires_grad_()
            factor = scale if group.group.plate is not None else 1.0
            target = target + factor / self.num_particles * group.log_q(point).sum()
            fixed += [point, *group.seen.values()]
            live += [group.value, *group.seen.values()]
        path = through_draws(target, fixed, live)
        return log_q + (path - path.detach()) - log_p

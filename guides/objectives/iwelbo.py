"""IWELBO: the importance-weighted bound, per datum."""

from __future__ import annotations

import math

from torch import Tensor

from guides.objectives.weighted import Weighted

__all__ = ["IWELBO"]


class IWELBO(Weighted):
    """The importance-weighted bound, **per datum even when the model has global latents**.

        g ~ q(g),   z_nk ~ q(z_n | g)                k = 1..num_particles
        bound = E[ log p(g)/q(g) + N/B sum_n log 1/K sum_k p(x_n, z_nk | g) / q(z_nk | g) ]

    The weights of a datum are conditional on one draw of the global latents that all rows share
    (``num_outer`` draws are averaged): K tightens the bound for the rows' latents, and the global
    ones keep their ELBO. With local latents only it is the bound of Burda et al., equal to Pyro's
    ``RenyiELBO(alpha=0)``; where a latent is global, Pyro's gives all rows one joint weight. With
    global latents only, the weights are joint.

    The loss is minus the bound for all N rows (lower is better): an upper bound on -log p(x) in
    expectation, tighter with K. With K = 1 it is minus the ELBO. Its gradient with respect to
    the guide gets lost in noise as K grows: see :class:`guides.objectives.DReG`.

    Any guide will do: those of this package, Pyro's, and guides written by hand, provided that
    their draws are reparameterized and inside the data plate where the latents are.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2016)
        | https://arxiv.org/abs/1509.00519

    Args:
        num_particles: Draws K of the rows' latents for each draw of the global latents.
        num_outer: Draws of the global latents.

    Example:
        >>> import pyro, torch, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("amortized_normal", model, x)
        >>> loss = IWELBO(num_particles=16)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
        >>> svi.step(x) > 0
        True
    """

    def combine(self, log_w: Tensor) -> Tensor:
        """Log of the mean weight."""
        return log_w.logsumexp(1) - math.log(log_w.shape[1])

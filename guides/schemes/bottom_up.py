"""BottomUp: levels inferred from the data upwards."""

from __future__ import annotations

from guides.schemes.conditional import Conditional

__all__ = ["BottomUp"]


class BottomUp(Conditional):
    """The latents of a row from the one nearest the data to the top.

        q(z_1, .., z_L | x) = q(z_1 | x) q(z_2 | z_1, x) ... q(z_L | z_<L, x)

    The order is that of the program, reversed: a program samples causes first, so its last latent
    is the nearest to the data. Every factor is a member of the family, and every dependence
    between levels is represented: with ``multivariate_normal`` it holds the exact posterior of
    a linear Gaussian chain.

    References:
        | Stochastic backpropagation and approximate inference in deep generative models
        | (Rezende, Mohamed & Wierstra, 2014) https://arxiv.org/abs/1401.4082

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves, of one site.
        call: The call that built the guide.
        inputs: See :class:`guides.schemes.encoder.Encoder`.
        hidden: See there; every site has networks of its own.
        features: See there.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from guides.families.normal import Normal
        >>> from guides.guide import Guide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        ...         z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        ...         pyro.sample("x", dist.Normal(z1, 1.0), obs=x)
        >>> guide = Guide(model, torch.randn(5), family=Normal, scheme=BottomUp)
        >>> list(guide(torch.randn(5)))
        ['z1', 'z2']
    """

    order = "reversed"

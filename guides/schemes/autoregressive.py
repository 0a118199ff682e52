"""Autoregressive: sites inferred in the order of the program."""

from __future__ import annotations

from guides.schemes.conditional import Conditional

__all__ = ["Autoregressive"]


class Autoregressive(Conditional):
    """The latents of a row in the order in which the program samples them.

        q(z_1, .., z_L | x) = q(z_1 | x) q(z_2 | z_1, x) ... q(z_L | z_<L, x)

    Every factor is a member of the family, given the row and all draws before. It works for any
    program with two or more latent sites in the data plate, whatever their supports: draws
    are read unconstrained.

    References:
        | Inference compilation and universal probabilistic programming (Le, Baydin & Wood, 2017)
        | https://arxiv.org/abs/1610.09900

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
        ...         rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...         z = pyro.sample("z", dist.Normal(0.0, rate))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = Guide(model, torch.randn(5), family=Normal, scheme=Autoregressive)
        >>> list(guide(torch.randn(5)))
        ['rate', 'z']
    """

    order = "program"

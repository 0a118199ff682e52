"""TopDown: the ladder, which merges what the data say with what the level above predicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from guides.draws import over_draws
from guides.energy import LogJoint, SiteTerms
from guides.families.family import inverse_positive, positive
from guides.families.normal import Normal
from guides.schemes.encoder import Encoder
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group
from guides.supports import unwrap

__all__ = ["TopDown"]


class TopDown(Scheme):
    """A bottom-up message and the model's own prediction, weighted by their precisions.

        loc_p, scale_p = p(z_l | z_>l)                  the program itself, at the draws before
        loc_x, scale_x = encoder_l(x)                   the message of the data
        1 / scale_q^2  = 1 / scale_x^2 + 1 / scale_p^2
        loc_q          = scale_q^2 (loc_x / scale_x^2 + loc_p / scale_p^2)
        q(z_l | z_>l, x) = Normal(loc_q, scale_q^2)     l = L .. 1, the order of the program

    A message that says nothing (``scale_x`` large) leaves the prior, so a level can be off, and
    what the model learns of the dependence between levels is used at once: gradients of a bound
    reach the model through q as well. The merge is exact where the likelihood of each level is
    Gaussian with independent coordinates.

    It needs latents that are Normal given those before, with independent coordinates and no
    transform, and the family ``normal``. Every level has an encoder of its own.

    References:
        | Ladder variational autoencoders (Sonderby et al., 2016)
        | https://arxiv.org/abs/1602.02282

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves, of one site.
        call: The call that built the guide.
        inputs: See :class:`guides.schemes.encoder.Encoder`.
        hidden: See there.
        features: See there.

    Raises:
        ValueError: For another family, or a site that is not Normal given those before.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from guides.guide import Guide
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        ...         z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
        ...         pyro.sample("x", dist.Normal(z1, 1.0), obs=x)
        >>> guide = Guide(model, torch.randn(5), family=Normal, scheme=TopDown)
        >>> list(guide(torch.randn(5)))
        ['z2', 'z1']
    """

    amortized = True
    reads_model = True
    order = "program"

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        hidden: Sequence[int] = (128, 128),
        features: str | Mapping[str, str] = "auto",
    ) -> None:
        super().__init__()
        if call.guide is None:
            raise ValueError("A top-down guide needs the guide in its call.")
        family = call.guide.families[group.name]
        if not isinstance(family, Normal):
            raise ValueError(
                "The top-down scheme merges two Gaussians with independent coordinates, and "
                f"{type(family).__name__} is none. Use the family normal, or the scheme bottom_up."
            )
        for site in group.sites:
            if site.family != "Normal" or site.transform is not None:
                raise ValueError(
                    "The top-down scheme merges the data's message with a Normal prior, but "
                    f"latent site {site.name!r} is {site.family}. Use bottom_up or autoregressive."
                )
        self.encoder = Encoder(init, group, call, inputs=inputs, hidden=hidden, features=features)

    def forward(self, group: Group, call: Call) -> Tensor:
        """Merged parameters ``(*S, B, 2 K)``, with the leading dimensions of the draws before."""
        message = self.encoder(group, call)  # (B, 2 K)
        loc_x, raw = message.chunk(2, -1)
        scale_x = positive(raw)
        loc_p, scale_p = _prior(group, call).to(message).chunk(2, -1)  # (*S, B, K)
        # The share of the message, 1 / scale_x^2 over the sum, without dividing by small squares.
        share = scale_p.square() / (scale_p.square() + scale_x.square())
        loc = share * loc_x + (1 - share) * loc_p
        return torch.cat([loc, inverse_positive(share.sqrt() * scale_x)], -1)


def _prior(group: Group, call: Call) -> Tensor:
    """Location and scale of the group's site given the draws before, ``(*S, B, 2 K)``."""
    site = group.sites[0]
    read = call.layout
    log_joint = LogJoint(call.model, call.args, call.kwargs, layout=read)

    def conditional(packed: dict[str, Tensor]) -> Tensor:
        values: dict[str, Tensor] = {}
        for before in read.groups:
            if before.name in packed:
                placed = before.unpack(before.batch(packed[before.name]))
                for other in before.sites:
                    values[other.name] = other.constrain(placed[other.name])[0]
        base = unwrap(_distribution(site.name, log_joint, values))
        return torch.cat([site.flatten(v.expand(site.shape)) for v in (base.loc, base.scale)], -1)

    before = {other.name: other.shape for other in read.groups if other.name in call.upstream}
    packed = {name: call.draws(name) for name in before}
    left = torch.broadcast_shapes(
        *(packed[name].shape[: -len(shape)] for name, shape in before.items())
    )
    if not left:
        return conditional(packed)
    flat = {
        name: packed[name].expand(*left, *shape).reshape(-1, *shape)
        for name, shape in before.items()
    }
    return over_draws(conditional, flat, read).unflatten(0, left)


def _distribution(name: str, log_joint: LogJoint, values: dict[str, Tensor]) -> Any:
    """The distribution of a site; what the program does after it is not run."""
    try:
        # Latents of other cells of a composite guide that are drawn later: at their predictions.
        log_joint.run(values, terms=_Until, until=name, density=False, center=True)
    except _Reached as reached:
        return reached.fn
    raise ValueError(f"This call of the model does not sample {name!r}.")


class _Reached(Exception):
    """The program has come to the site that is asked for."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn


class _Until(SiteTerms):
    """Stop the program at a site."""

    def __init__(self, *args: Any, until: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.until = until

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.until:
            raise _Reached(msg["fn"])
        super()._pyro_sample(msg)

"""Conditional: a level of latents given the data of its row and the levels drawn before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from guides.encoders.vector import perceptron
from guides.location_scale import is_location_scale, location
from guides.schemes.encoder import Encoder
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group, Site
from guides.supports import unwrap

__all__ = ["Conditional"]


class Conditional(Scheme):
    """Parameters of one site of the data plate, given the row and the sites drawn before.

        h_n   = network(standardize(x_n))
        lam_n = init + W h_n + C(h_n, standardize(u_<l))

    where u_<l are the draws of all earlier sites of the data plate, unconstrained. C is a linear
    map, after one more hidden layer where the network has any; ``hidden=()`` makes the location
    linear in data and draws, as the exact posterior of a linear Gaussian program is. Subclasses
    choose the order of the sites.

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves, of one site.
        call: The call that built the guide.
        inputs: See :class:`guides.schemes.encoder.Encoder`.
        hidden: See there; every site has networks of its own.
        features: See there.
    """

    amortized = True

    shift: Tensor
    scale: Tensor

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
        self.encoder = Encoder(init, group, call, inputs=inputs, hidden=hidden, features=features)
        before = []
        for other in call.layout.groups:
            if other.name == group.name:
                break
            if other.plate is not None:
                before.append(other)
        self.before = tuple(other.name for other in before)
        self.coupling: nn.Sequential | None = None
        if not before:
            return
        sites = [_statistics(site) for other in before for site in other.sites]
        shift = torch.cat([shift for shift, _ in sites])
        scale = torch.cat([scale for _, scale in sites])
        self.register_buffer("shift", shift.to(init))
        self.register_buffer("scale", scale.to(init))
        width = self._head.in_features + len(shift)
        layers, width = perceptron(width, tuple(hidden)[-1:], init)
        last = nn.Linear(width, len(init), dtype=init.dtype, device=init.device)
        with torch.no_grad():
            # As the encoder's own last layer: small, so that every row starts near `init`.
            last.weight.mul_(0.1)
            last.bias.zero_()
        self.coupling = nn.Sequential(*layers, last)

    @property
    def _head(self) -> nn.Linear:
        return self.encoder.network[-1]  # type: ignore[index]

    def forward(self, group: Group, call: Call) -> Tensor:
        """Parameters ``(*S, B, P)``, with the leading dimensions of the draws before.

        Raises:
            ValueError: Where the inputs are missing or have another shape than at construction.
        """
        hidden = self.encoder.hidden_of(group, call)  # (B, H)
        lam = self.encoder.init + self._head(hidden)
        if self.coupling is None:
            return lam
        draws = [call.draws(name) for name in self.before]
        left = torch.broadcast_shapes(*(value.shape[:-1] for value in draws))
        above = torch.cat([value.expand(*left, -1) for value in draws], -1)  # (*S, B, K)
        above = (above - self.shift) / self.scale
        return lam + self.coupling(torch.cat([hidden.expand(*left, -1), above], -1))

    def extra_repr(self) -> str:
        """What is drawn before."""
        return f"before: {', '.join(self.before) or 'none'}"


def _statistics(site: Site) -> tuple[Tensor, Tensor]:
    """Where the prior of a site has its values, ``(K,)``: location and scale if it has them."""
    shift = torch.zeros(site.size, dtype=site.dtype, device=site.device)
    scale = torch.ones_like(shift)
    if not is_location_scale(site.fn):
        return shift, scale
    base = unwrap(site.fn)
    spread = base.stddev if type(base).__name__ == "MultivariateNormal" else base.scale
    found = location(site.fn), spread.expand(site.shape)
    loc, spread = (site.flatten(value.detach()).mean(0) for value in found)
    usable = torch.isfinite(loc) & torch.isfinite(spread) & (spread > 0)
    return torch.where(usable, loc, shift), torch.where(usable, spread, scale)

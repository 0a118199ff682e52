"""Latents that a mask switches off: coordinates without a density, and so without curvature.

A row that lacks a step, an element of a nested plate that is padding, a row that is masked as a
whole: the latents are packed beside the others, but no term of the energy knows them. A Hessian
has zeros there, which is no sign of a direction without a mode. They get unit curvature,

    H_ii = 1,   H_ij = 0           i switched off and read by no term that counts

so that everything else is what it is without them, and their density counts zero in q as it does
in p. A latent whose own density is off but which other terms read (the data, a later step) is not
one of these: it has a flat prior, and its curvature is that of those terms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.energy import LogJoint
from guides.inference.units import energy_function
from guides.layout import Layout, mask_of
from guides.ripple import ripple
from guides.sites import Group, Site
from guides.supports import is_masked

__all__ = [
    "CountedNormal",
    "check_masks",
    "decoupled",
    "empty",
    "site_switched_off",
    "switched_off",
    "unread",
]


def switched_off(group: Group) -> Tensor | None:
    """Coordinates of a group whose own density is off.

    Args:
        group: The group.

    Returns:
        A boolean tensor of the group's shape, ``(B, K)`` or ``(K,)``; None where all are on.
    """
    if is_capturing() or not any(site.masked for site in group.sites):
        return None
    return torch.cat([site_switched_off(site) for site in group.sites], -1)


def site_switched_off(site: Site) -> Tensor:
    """Unconstrained coordinates of a site whose density is off, ``(B, k)`` or ``(k,)``.

    Args:
        site: The site.
    """
    shape = site.batch_shape + site.unconstrained_event
    mask: Any = site.mask
    if site.masked and mask is None and not is_masked(site.fn):
        mask = torch.zeros((), dtype=torch.bool, device=site.device)  # poutine.mask(mask=False)
    on = mask_of(mask, site.fn, site.shape, site.device)
    if on is None:
        off = torch.zeros(shape, dtype=torch.bool, device=site.device)
    else:
        # A support such as that of Cholesky factors has fewer event dimensions unconstrained.
        while on.dim() > len(shape):
            on = on.squeeze(-1)
        off = ~on.expand(shape)
    return site.flatten(off)


def empty(read: Layout, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Coordinates that are switched off and have no curvature, by group.

    Args:
        read: Layout of the call.
        blocks: Hessian blocks, see :func:`guides.inference.curvature.hessian`.

    Returns:
        Boolean tensors of the groups' shapes, for groups that have such coordinates.
    """
    found: dict[str, Tensor] = {}
    for group in read.groups:
        block = blocks.get("local" if group.plate is not None else "global")
        if block is None or (off := switched_off(group)) is None:
            continue
        off = off & (block == 0).all(-1)
        if (cross := blocks.get("cross")) is not None:
            zero = cross == 0  # (B, K, G)
            off = off & (zero.all(-1) if group.plate is not None else zero.all(-2).all(0))
        if bool(off.any()):
            found[group.name] = off
    return found


def unread(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    blocks: Mapping[str, Tensor],
    *,
    jacobian: bool = True,
) -> dict[str, Tensor]:
    """Coordinates that are switched off and that no term of the energy reads, by group.

    Args:
        log_joint: The log joint of the call.
        packed: Where the Hessian was taken, ``{group: (B, K) or (K,)}``.
        blocks: The Hessian there.
        jacobian: Whether the energy is that of unconstrained space.

    Returns:
        As :func:`empty`, which looks at the Hessian at one point alone; here slopes there and at
        a point beside it have to vanish, too.
    """
    found = empty(log_joint.layout, blocks)
    if not found:
        return found
    energy = energy_function(log_joint, jacobian=jacobian)
    with torch.no_grad():
        for size in (0.0, 0.1):
            point = {name: value.detach() + size * ripple(value) for name, value in packed.items()}
            slopes = torch.func.grad(lambda u: energy(u)[0])(point)
            found = {name: off & (slopes[name] == 0) for name, off in found.items()}
    return {name: off for name, off in found.items() if bool(off.any())}


def decoupled(blocks: Mapping[str, Tensor], off: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hessian blocks with unit curvature at coordinates where they have none.

    Args:
        blocks: Hessian blocks with empty rows there.
        off: The coordinates, from :func:`empty` or :func:`unread`.
    """
    result = dict(blocks)
    for name, group in (("local", "data"), ("global", "global")):
        if name in blocks and group in off:
            result[name] = blocks[name] + torch.diag_embed(off[group].to(blocks[name]))
    return result


def check_masks(read: Layout) -> None:
    """Raise where a mask switches a density off, but not the Jacobian of its support.

    A mask of handlers switches the Jacobian off as well; that of a distribution does not.

    Args:
        read: Layout of the call.

    Raises:
        ValueError: Naming the site.
    """
    for site in read.sites.values():
        if site.masked and site.transform is not None:
            if site.mask is None or is_masked(site.fn):
                raise ValueError(
                    f"Latent site {site.name!r} is masked: where its mask is off only the "
                    "Jacobian of its support is left, which has no mode. Mask the site with a "
                    "tensor, with pyro.poutine.mask around it, or pass jacobian=False."
                )


class CountedNormal(dist.MultivariateNormal):  # type: ignore[misc]
    """A Gaussian whose density leaves coordinates out that are independent of the others.

    Args:
        loc: Means ``(..., K)``.
        scale_tril: Cholesky factors ``(..., K, K)`` of the covariances.
        off: Which coordinates do not count ``(..., K)``.

    Example:
        >>> q = CountedNormal(torch.zeros(2), torch.eye(2), torch.tensor([False, True]))
        >>> point = torch.tensor([1.0, 50.0])
        >>> bool(q.log_prob(point) == dist.Normal(0.0, 1.0).log_prob(point[0]))
        True
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, off: Tensor) -> None:
        super().__init__(loc, scale_tril=scale_tril)
        self.off = off

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> CountedNormal:
        """The same with another batch shape."""
        shape = torch.Size(batch_shape) + self.event_shape
        tril = self._unbroadcasted_scale_tril
        return CountedNormal(self.loc.expand(shape), tril, self.off.expand(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of the coordinates that count."""
        counted: Tensor = super().log_prob(torch.where(self.off, self.loc, value))
        return counted + self._left_out(0.0)

    def entropy(self) -> Tensor:
        """Entropy of the coordinates that count."""
        whole: Tensor = super().entropy()
        return whole - self._left_out(0.5)

    def _left_out(self, half: float) -> Tensor:
        """What a coordinate of unit variance gives at its mean, and half a nat in the mean."""
        count = self.off.sum(-1).to(self.loc)
        return count * (0.5 * math.log(2 * math.pi) + half)

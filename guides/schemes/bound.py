"""The bound of every row as a pure function of the parameters of its q.

    L_n(lam_n) = mean_s [ log p(x_n, z_ns) + log |dz/du| - log q(u_ns; lam_n) ]
    u_ns, log q = family.push(lam_n, noise_ns)

Refinement differentiates it by ``torch.func`` alone, so it works where gradients are switched off
and inside other transforms. A row's gradient is that of its own bound: the sum over rows is
differentiated, never their mean, and the data plate's N/B is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from guides import location_scale
from guides.draws import over_draws
from guides.energy import LogJoint
from guides.families.family import Family
from guides.layout import mask_of
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group, Observed, Site

__all__ = ["Gradient", "RowBound"]


@dataclass(frozen=True)
class Gradient:
    """Gradient of the rows' bounds.

    Args:
        lam: In the parameters, ``(B, P)``.
        rows: The bounds themselves ``(B,)``.
        weights: In the family's own weights, by name; empty unless asked for.
    """

    lam: Tensor
    rows: Tensor
    weights: Mapping[str, Tensor]


class RowBound:
    """The bound of the rows of one call, for one group of latents.

    Latents of other groups are held at the centers of their q.

    Args:
        group: The group whose parameters move.
        call: The call.
        num_particles: Draws S.
        shared_noise: Use the same noise for every row, so that a row does not see the batch it
            is in.
    """

    def __init__(
        self, group: Group, call: Call, *, num_particles: int = 1, shared_noise: bool = False
    ) -> None:
        if call.guide is None:
            raise ValueError("A refined guide needs the guide in its call.")
        self.group = group
        self.family = cast(Family, call.guide.families[group.name])
        self.plain = call.guide.plain
        self.log_joint = LogJoint(call.model, call.args, call.kwargs, layout=call.layout)
        self.num_particles = num_particles
        self.shared_noise = shared_noise
        self.held = _held(group, call, self.log_joint)

    def noise(self, like: Tensor, num_particles: int | None = None) -> Tensor:
        """Fresh noise for every draw and row, ``(S, B, n)``, or ``(S, 1, n)`` if shared."""
        rows = 1 if self.shared_noise else like.shape[0]
        count = self.num_particles if num_particles is None else num_particles
        half = self.family.noise(((count + 1) // 2, rows), like)
        if count == 1 or not self.family.symmetric_noise:
            rest = count - half.shape[0]
            return torch.cat([half, self.family.noise((rest, rows), like)]) if rest else half
        # Antithetic pairs: what is linear in the noise cancels.
        return torch.cat([half, -half])[:count]

    def log_joint_rows(self, packed: Tensor) -> Tensor:
        """Log joint ``(B,)`` of packed latents ``(B, K)``."""
        latents = {**self.held, self.group.name: packed}
        return self.log_joint.packed(latents, plain=self.plain)[0]

    def draws(
        self, lam: Tensor, noise: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draws ``(S, B, K)``, their log q and their log joint, ``(S, B)``."""
        if weights:
            u, log_q = torch.func.functional_call(self.family, dict(weights), ("push", lam, noise))
        else:
            u, log_q = self.family.push(lam, noise)
        return u, log_q, self.over(self.log_joint_rows, u)

    def over(self, function: Callable[[Tensor], Any], u: Tensor) -> Any:
        """Apply a function of packed latents ``(B, K)`` to all draws."""
        if u.shape[0] == 1:
            result = function(u[0])
            return (
                {key: value.unsqueeze(0) for key, value in result.items()}
                if isinstance(result, dict)
                else result.unsqueeze(0)
            )
        return over_draws(lambda v: function(v["u"]), {"u": u}, self.log_joint.layout)

    def rows(self, lam: Tensor, noise: Tensor) -> Tensor:
        """The bounds ``(B,)`` at parameters ``(B, P)`` and noise ``(S, B, n)``."""
        _, log_q, log_p = self.draws(lam, noise)
        return (log_p - log_q).mean(0)

    def gradient(
        self, lam: Tensor, noise: Tensor, *, weights: bool = False, path: bool = False
    ) -> Gradient:
        """Gradient of every row's bound, differentiable again where gradients are on.

        Args:
            lam: Parameters ``(B, P)``.
            noise: From :meth:`noise`.
            weights: Also take the gradient in the family's own weights.
            path: Leave out the score of q, whose mean is zero (Roeder et al., 2017): where q is
                close to the posterior the gradient then hardly varies from draw to draw. Only
                for families with cheap densities; others ignore it.
        """
        own: dict[str, Tensor] = dict(self.family.named_parameters()) if weights else {}
        path = path and self.family.path_gradient

        def total(moving: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            u, log_q, log_p = self.draws(moving, noise, own)
            # The outer parameters do not move with the differentiated ones, but they carry the
            # derivatives of whatever surrounds this gradient.
            rows = (log_p - (self.family.log_prob(lam, u) if path else log_q)).mean(0)
            return rows.sum(), rows

        (d_lam, d_own), rows = torch.func.grad(total, argnums=(0, 1), has_aux=True)(lam, own)
        # A row whose draw left the range of numbers stays where it is in this step.
        d_lam = torch.where(torch.isfinite(d_lam).all(-1, keepdim=True), d_lam, 0.0)
        d_own = {name: torch.nan_to_num(value, 0.0, 0.0, 0.0) for name, value in d_own.items()}
        return Gradient(d_lam, rows, d_own)

    def errors(self, lam: Tensor, noise: Tensor) -> Tensor:
        """Prediction errors of every site of the rows, averaged over draws, ``(B, E)``.

        At the level below and at the level itself: of observed and latent sites alike. No
        backward pass is taken.
        """
        u, _ = self.family.push(lam, noise)
        found = self.over(self._errors, u)
        return torch.cat([value.mean(0) for value in found.values()], -1)

    def _errors(self, packed: Tensor) -> dict[str, Tensor]:
        values, _, _ = self.log_joint.unpack({**self.held, self.group.name: packed})
        terms = self.log_joint.run(values, density=False)
        read = self.log_joint.layout
        result = {}
        sites: dict[str, Site | Observed] = {**read.sites, **read.observed}
        for name, site in sites.items():
            if site.row_dim is None:
                continue
            fn = terms.fns[name]
            shape = fn.batch_shape + fn.event_shape
            error = location_scale.error(fn, terms.values[name].expand(shape))[0]
            mask = mask_of(terms.masks[name], fn, shape, error.device)
            if mask is not None:
                error = torch.where(mask, error, 0.0)
            rows = error.dim() - site.event_dim + site.row_dim
            error = error.movedim(rows, 0).reshape(read.num_rows, -1)
            result[name] = error.to(packed.dtype)
        return result


def _held(group: Group, call: Call, log_joint: LogJoint) -> dict[str, Tensor]:
    """Centers of the other groups, where they are before any refinement of their own."""
    guide = call.guide
    others = [other for other in call.layout.groups if other.name != group.name]
    if not others or guide is None:
        return {}
    if any(other.name not in guide.schemes for other in call.layout.groups):
        # While the guide is being built.
        packed = call.layout.pack(log_joint.predictions())
        return {other.name: packed[other.name] for other in others}
    located: dict[str, Tensor] = {}
    for other in call.layout.groups:
        upstream = {
            name: call.layout.group(name).batch(value)  # type: ignore[union-attr]
            for name, value in located.items()
        }
        scheme = cast(Scheme, guide.schemes[other.name])
        lam = scheme.start(other, replace(call, upstream=upstream))
        located[other.name] = cast(Family, guide.families[other.name]).location(lam).detach()
    return {other.name: located[other.name] for other in others}

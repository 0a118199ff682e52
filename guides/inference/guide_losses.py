"""How a guide learns beside a sampler: from its own draws, from the sampler's, or from both.

    reverse_kl   E_q[E(u) + log q(u)]            the negative ELBO; the model stands still
    forward_kl   -mean over the chains' draws of log q(u)
    jeffreys     the sum

The model's parameters get no gradient from these: they learn at the draws of the chains.

References:
    | Sample as you infer: predictive coding with Langevin dynamics
    | (Zahid, Guo & Fountas, 2023) https://arxiv.org/abs/2311.13664
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guides.arguments import did_you_mean
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.relaxation import energy_function
from guides.objectives.guide_alone import of_guide_alone

__all__ = ["GUIDE_LOSSES", "check_guide", "guide_loss"]

GUIDE_LOSSES = ("reverse_kl", "forward_kl", "jeffreys")


def check_guide(kind: Any, guide: Any) -> None:
    """Raise unless a guide can learn by a loss of that name.

    Raises:
        ValueError: For another name, or a guide without a density.
        TypeError: For a guide that is not of this package.
    """
    if kind not in GUIDE_LOSSES:
        raise ValueError(
            f"guide_loss must be one of {', '.join(GUIDE_LOSSES)}, or None; got {kind!r}. "
            f"{did_you_mean(str(kind), GUIDE_LOSSES)}".rstrip()
        )
    if not isinstance(guide, ProgramGuide):
        what = "no guide" if guide is None else type(guide).__name__
        raise TypeError(
            f"guide_loss={kind!r} trains a guide of this package, got {what}. Pass "
            'guide=guides.make("amortized_normal", model, ...), or guide_loss=None.'
        )
    if not guide.has_density:
        raise ValueError(
            f"guide_loss={kind!r} needs a density, and a delta guide is a point mass. Take "
            "another family, such as normal, or guide_loss=None."
        )


def guide_loss(kind: str, guide: Any, log_joint: LogJoint, draws: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient in the guide's parameters is that of the loss.

    Args:
        kind: One of :data:`GUIDE_LOSSES`.
        guide: The guide.
        log_joint: The log joint of the call.
        draws: Packed draws of the chains by group, (S, C, B, K) or (S, C, G).

    Returns:
        A scalar with that gradient, and none in the model's parameters; its value is not the
        loss.
    """
    loss = torch.zeros(())
    if kind in ("reverse_kl", "jeffreys"):
        loss = loss + _reverse(guide, log_joint)
    if kind in ("forward_kl", "jeffreys"):
        loss = loss + _forward(guide, log_joint, draws)
    return of_guide_alone(loss, guide)


def _reverse(guide: ProgramGuide, log_joint: LogJoint) -> Tensor:
    args, kwargs = log_joint.args, log_joint.kwargs
    drawn, log_q, read = guide.rsample_packed(1, args, kwargs, log_joint.layout.indices)
    # A guide may have groups of its own, one a level.
    own = LogJoint(log_joint.model, args, kwargs, layout=read)
    energy = energy_function(own, jacobian=True)
    point = {name: value[0].detach() for name, value in drawn.items()}
    with torch.no_grad():
        gradient = torch.func.grad(lambda u: energy(u)[0])(point)
    total = torch.zeros(())
    for group in read.groups:
        scale = 1.0 if group.plate is None else read.scale
        # What reaches the encoder is the prediction error of its draw.
        total = total + (gradient[group.name].detach() * drawn[group.name][0]).sum()
        total = total + scale * log_q[group.name].sum()
    return total


def _forward(guide: ProgramGuide, log_joint: LogJoint, draws: Mapping[str, Tensor]) -> Tensor:
    read = guide._layout(log_joint.args, log_joint.kwargs, log_joint.layout.indices)
    call = guide._call(log_joint.args, log_joint.kwargs, read)
    ones = (1,) * (0 if read.data_plate is None else -read.data_plate.dim)
    upstream: dict[str, Tensor] = {}
    total = torch.zeros(())
    packed = {name: value.flatten(0, 1).detach() for name, value in draws.items()}
    if [group.name for group in read.groups] != list(packed):
        packed = torch.func.vmap(lambda u: read.pack(log_joint.layout.constrain(u)))(packed)
    with guide._pyro_context:
        for group in read.groups:
            value = packed[group.name]  # (T, B, K) or (T, G)
            placed = value if group.plate is None else group.batch(value)
            q = guide.group_distribution(group, call, upstream)
            log_q = q.log_prob(placed)
            if (mask := guide.group_mask(group)) is not None:
                log_q = torch.where(mask, log_q, torch.zeros_like(log_q))
            log_q = log_q.reshape(value.shape[:-1])
            scale = 1.0 if group.plate is None else read.scale
            total = total - scale * log_q.sum() / len(value)
            upstream[group.name] = (
                value.reshape(len(value), *ones, group.size) if group.plate is None else placed
            )
    return total

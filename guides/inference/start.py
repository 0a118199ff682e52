"""Where a relaxation starts, and how standardized values are packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.layout import Layout

__all__ = ["insert", "off_center"]


def off_center(log_joint: LogJoint) -> dict[str, Tensor]:
    """Global latents near their predictions, off the symmetric point that they may not leave."""
    group = log_joint.layout.group("global")
    if group is None:
        return {}
    generator = torch.Generator().manual_seed(0)
    packed = group.pack(log_joint.predictions())
    step = 0.1 * torch.randn(group.size, generator=generator, dtype=torch.float64)
    placed = group.unpack(packed + step.to(packed))
    return {site.name: site.constrain(placed[site.name])[0] for site in group.sites}


def insert(
    packed: dict[str, Tensor], errors: Mapping[str, Tensor], read: Layout
) -> dict[str, Tensor]:
    """Standardized values in the slots of their sites."""
    result = {}
    for group in read.groups:
        parts = [
            site.flatten(errors[site.name].expand(site.shape))
            if site.name in errors
            else packed[group.name][..., part]
            for site, part in group.slices()
        ]
        result[group.name] = torch.cat(parts, -1)
    return result

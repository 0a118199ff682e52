"""Warm starts: a datum's relaxation goes on where its last one ended."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.row_memory import RowMemory
from guides.inference.same_data import CallData

__all__ = ["keep_last", "recall_last"]


def recall_last(
    memory: RowMemory,
    log_joint: LogJoint,
    values: Mapping[str, Tensor],
    data: CallData | None = None,
) -> dict[str, Tensor]:
    """A start whose rows are where they were left; rows that are new stay as they are.

    Args:
        memory: What :func:`keep_last` wrote.
        log_joint: The log joint of the call.
        values: The start of rows that are new, constrained values of all latents by site.
        data: See :meth:`guides.inference.row_memory.RowMemory.read`.
    """
    read = log_joint.layout
    group = read.group("data")
    if read.data_plate is None or group is None:
        return dict(values)
    found, known = memory.read(read.data_plate, data)
    if "data" not in found or found["data"].shape[-1] != group.size:
        return dict(values)
    packed = read.pack(values)
    old = found["data"].to(packed["data"])
    packed["data"] = torch.where(known.unsqueeze(-1), old, packed["data"])
    constrained = read.constrain(packed)
    # Only what was replaced: packing and unpacking rounds the others.
    local = {site.name for site in group.sites}
    return {name: constrained[name] if name in local else value for name, value in values.items()}


def keep_last(
    memory: RowMemory,
    log_joint: LogJoint,
    values: Mapping[str, Tensor],
    data: CallData | None = None,
) -> None:
    """Remember where the rows of a call were left, unconstrained."""
    read = log_joint.layout
    if read.data_plate is not None and read.group("data") is not None:
        memory.write(read.data_plate, {"data": read.pack(values)["data"]}, data)

"""FilteredPosterior: Gaussians of every state given the data up to it, side by side.

    q(u_1 .. u_T) = prod_t Normal(u_t; m_t, P_t)                  p(u_t | x_1 .. x_t) by itself

The beliefs of a filter are marginals: what later data say, and how states of neighboring steps go
together, is in none of them. For the posterior of whole sequences relax the whole window, with
:class:`guides.inference.PredictiveCoding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guides.inference.laplace_guide import Laplace
from guides.layout import Layout
from guides.probe import Program
from guides.sequences.steps import Step, step_rows
from guides.sites import Group

__all__ = ["FilteredPosterior"]


class FilteredPosterior(Laplace):
    """The beliefs of a filter as a guide; fixed numbers, no parameters.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        read: The layout of the call.
        steps: Its steps.
        mean: Means ``(B, T, K)``, unconstrained.
        covariance: Covariances ``(B, T, K, K)``.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        read: Layout,
        steps: tuple[Step, ...],
        mean: Tensor,
        covariance: Tensor,
    ) -> None:
        plate = read.data_plate
        assert plate is not None
        super().__init__(model, args, kwargs, data_plate=plate.name)
        self._split({f"step_{t + 1}": step.sites for t, step in enumerate(steps)})
        self.plate = plate
        for t in range(len(steps)):
            self.register_buffer(f"loc_step_{t + 1}", mean[:, t].contiguous())
            tril = torch.linalg.cholesky(covariance[:, t])
            self.register_buffer(f"tril_step_{t + 1}", tril.contiguous())

    def group_mask(self, group: Group) -> Tensor | None:
        """Rows that have the step of the group."""
        return step_rows(group)

    def __repr__(self) -> str:
        """How many beliefs there are."""
        groups = self._example.groups
        return f"FilteredPosterior({len(groups)} steps of {groups[0].size} coordinates)"

"""The contract of an objective: Pyro's ``ELBO``, evaluated in one pass over all draws."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.elbo import ELBO
from pyro.util import warn_if_nan
from torch import Tensor

from guides.draws import check_same_program
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide
from guides.pairs import check_follows, check_order
from guides.probe import Program

__all__ = ["ExposedLogJoint", "Objective", "check_count", "check_has_density", "own_guide"]


_KEPT = 15


class Objective(ELBO, abc.ABC):
    """A loss of a model and a guide.

    Subclasses write :meth:`differentiable_loss`; its value is the loss, and its gradient is the
    estimate that the objective stands for. Stock ``SVI`` then works, and so does
    ``objective(model, guide)``, a module whose ``forward(*args, **kwargs)`` is that loss: for
    ``torch.optim``, Lightning and ``DistributedDataParallel``.

    Args:
        num_particles: Number of draws.
    """

    def __init__(self, num_particles: int = 1) -> None:
        check_count("num_particles", num_particles)
        super().__init__(num_particles=num_particles)
        self._checked: list[tuple[str, Program, Callable[..., Any]]] = []

    @abc.abstractmethod
    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, a scalar to call ``backward`` on."""

    def loss(self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        return float(warn_if_nan(loss, "loss"))

    def loss_and_grads(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> float:
        """The loss as a number; adds its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(warn_if_nan(loss.detach(), "loss"))

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} evaluates all draws in one pass and has no traces; call "
            "differentiable_loss, loss or loss_and_grads."
        )

    def _is_first(self, check: str, model: Program, guide: Callable[..., Any]) -> bool:
        """Whether a check of this pair was not made yet: those that cost a pass are made once."""
        if any(c == check and m is model and g is guide for c, m, g in self._checked):
            return False
        # Held, because the identity of an object that is gone passes to another one.
        self._checked = [*self._checked[-_KEPT:], (check, model, guide)]
        return True

    def __getstate__(self) -> dict[str, Any]:
        # What was checked holds models and guides; a copy checks anew.
        return {**self.__dict__, "_checked": []}

    def __repr__(self) -> str:
        """Name and number of draws."""
        return f"{type(self).__name__}(num_particles={self.num_particles})"


class ExposedLogJoint(LogJoint):
    """The log joint of a program, whose parameters handlers outside see (SVI's optimizer)."""

    def run(
        self,
        values: Mapping[str, Tensor] | None = None,
        *,
        validate: bool = False,
        expose_params: bool = True,
        **options: Any,
    ) -> SiteTerms:
        """Run the program with values substituted; see :class:`guides.energy.LogJoint`."""
        return super().run(values, validate=validate, expose_params=expose_params, **options)


def own_guide(
    objective: Objective,
    model: Program,
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    density: bool = True,
    external: bool = False,
) -> ProgramGuide:
    """The guide, after checking that it is what an objective needs.

    Args:
        objective: The objective, for messages.
        model: The program.
        guide: The guide given.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        density: Whether the objective needs a density.
        external: Whether it scores points other than live draws.

    Raises:
        TypeError: Where the guide is not one of this package.
        ValueError: Where it is a point mass, or covers another program.
        NotImplementedError: Where a family cannot score points that it did not draw.
    """
    name = type(objective).__name__
    check_order(f"{name}.loss(model, guide, *args)", model, guide)
    if not isinstance(guide, ProgramGuide):
        raise TypeError(
            f"{name} needs q of each group of latents as a distribution, which only guides of "
            f"this package state (guides.make); got {type(guide).__name__}. IWELBO and Renyi "
            "take any guide."
        )
    if density:
        check_has_density(objective, guide)
    families = getattr(guide, "families", {}).items()
    refusing = [(g, f) for g, f in families if not f.scores_external_points]
    if external and refusing:
        group, family = refusing[0]
        raise NotImplementedError(
            f"{name} scores draws as fixed points, but the family of the {group} latents, "
            f"{type(family).__name__}, cannot score points that it did not draw itself. Use "
            "IWELBO or AnalyticELBO, or a family that scores external points."
        )
    if guide.model is not model and objective._is_first("program", model, guide):
        check_same_program(guide, model, args, kwargs)
        check_follows(guide, model, args, kwargs)
    return guide


def check_has_density(objective: Objective, guide: ProgramGuide) -> None:
    """Raise for a point mass."""
    if not guide.has_density:
        raise ValueError(
            f"{type(objective).__name__} needs a guide with a density, and the delta family is a "
            "point mass. Fit it with AnalyticELBO or Trace_ELBO (its loss is then an energy), or "
            "choose another family."
        )


def check_count(name: str, value: int) -> None:
    """Raise unless a number of draws is one."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")

"""SVI: Pyro's, with the checks of the first step and ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.infer
import pyro.optim

from guides.inference.checks import capture, check_ownership, warn_frozen
from guides.inference.running import Run, Stop, run

__all__ = ["SVI"]


class SVI(pyro.infer.SVI):
    """Stochastic variational inference, ``pyro.infer.SVI`` with two things added.

    The first step checks that model and guide own their parameters (Pyro's store is global and
    shared by name), and :meth:`run` makes many steps. Everything else is Pyro's.

    ``step`` and ``evaluate_loss`` return what the objective returns: for ``Trace_ELBO`` minus the
    ELBO of all N rows, an upper bound on -log p(x) in expectation; lower is better.

    Args:
        model: Any Pyro program.
        guide: Any guide for it.
        optim: A ``PyroOptim``.
        loss: An objective, such as ``pyro.infer.Trace_ELBO()``.
        **options: Passed on to ``pyro.infer.SVI``.

    Attributes:
        frozen: Trainable parameters that got no gradient at the first step.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, guides
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("normal", model, x)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
        >>> result = svi.run(5, ((x,), {}))
        >>> len(result.losses), result.stop_reason
        (5, 'num_steps')
    """

    def __init__(
        self, model: Any, guide: Any, optim: pyro.optim.PyroOptim, loss: Any, **options: Any
    ) -> None:
        super().__init__(model, guide, optim, loss, **options)
        self.frozen: list[str] = []
        self._checked = False

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update; returns the loss before it."""
        if self._checked:
            return super().step(*args, **kwargs)
        programs = {"guide": self.guide, "model": self.model}
        used = {role: capture(p, args, kwargs) for role, p in programs.items()}
        check_ownership(programs, used)
        loss = super().step(*args, **kwargs)
        self._checked = True
        touched = {tensor for tensors in used.values() for tensor in tensors.values()}
        learning = {tensor for tensor in touched if tensor.grad is not None}
        for program in programs.values():
            self.frozen += warn_frozen(program, learning)
        return loss

    def run(  # type: ignore[override]
        self,
        num_steps: int,
        batches: Any,
        *,
        stop: Stop | None = None,
        progress: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make many steps; see :func:`guides.inference.running.run`."""
        return run(self, num_steps, batches, stop=stop, progress=progress, state=state)

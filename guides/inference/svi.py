"""SVI: Pyro's, with the checks of the first step and ``run``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.infer
import pyro.optim
from torch import Tensor

from guides.inference.checks import capture, check_ownership, warn_frozen
from guides.inference.running import Runs
from guides.pairs import check_follows, check_order

__all__ = ["SVI"]


class SVI(Runs, pyro.infer.SVI):  # type: ignore[misc]
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
        check_order("SVI(model, guide, optim, loss)", model, guide)
        if not isinstance(optim, pyro.optim.PyroOptim):
            got = optim.__name__ if isinstance(optim, type) else type(optim).__name__
            raise TypeError(
                f"SVI(model, guide, optim, loss) needs a PyroOptim as optim, got {got}. Use for "
                'example pyro.optim.Adam({"lr": 1e-3}), which makes a torch optimizer for every '
                "parameter as it appears."
            )
        if isinstance(loss, type) or not (callable(loss) or hasattr(loss, "loss_and_grads")):
            kind = loss.__name__ if isinstance(loss, type) else None
            raise TypeError(
                "SVI(model, guide, optim, loss) needs an objective as loss, got "
                + (f"the class {kind}: pass an instance, {kind}()." if kind else f"{loss!r}.")
            )
        super().__init__(model, guide, optim, loss, **options)
        self.frozen: list[str] = []
        self._checked = False

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update; returns the loss before it."""
        if self._checked:
            return super().step(*args, **kwargs)
        programs = {"guide": self.guide, "model": self.model}
        used = self._check(programs, args, kwargs)
        loss = super().step(*args, **kwargs)
        touched = {tensor for tensors in used.values() for tensor in tensors.values()}
        learning = {tensor for tensor in touched if tensor.grad is not None}
        for program in programs.values():
            self.frozen += warn_frozen(program, learning)
        return loss

    def _check(
        self, programs: dict[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, dict[str, Tensor]]:
        """Check the pair on its first call; returns the parameters that each of them touches."""
        check_follows(self.guide, self.model, args, kwargs, learning=True)
        used = {role: capture(program, args, kwargs) for role, program in programs.items()}
        check_ownership(programs, used)
        self._checked = True
        return used

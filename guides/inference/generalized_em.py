"""Generalized expectation maximization: neither the E step nor the M step is finished.

    E: z     <- z - step_size * dE/dz             num_steps times, from where the row was left
    M: theta <- theta - optim(dE/dtheta at z)     weight_steps times, at the same z

Both halves descend one energy, so their order and their lengths are free. One weight step from a
fresh start is :class:`~guides.inference.predictive_coding.PredictiveCoding`; one step of each in
turn is near :class:`~guides.inference.incremental.IncrementalPredictiveCoding`, which takes both
from one gradient. Finished steps are classical EM with point estimates in place of a posterior: on
a linear Gaussian program alternating least squares. All have the same stationary points.

References:
    | A View of the EM Algorithm that Justifies Incremental, Sparse, and Other Variants
    | (Neal & Hinton, 1998)
    | https://doi.org/10.1007/978-94-011-5014-9_12

    | A theoretical framework for inference and learning in predictive coding networks
    | (Millidge et al., 2023) https://openreview.net/forum?id=ZCTvSF_uVM4
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.arguments import check_number
from guides.energy import LogJoint
from guides.inference.predictive_coding import PredictiveCoding
from guides.probe import Program

__all__ = ["GeneralizedEM"]


class GeneralizedEM(PredictiveCoding):
    """Generalized EM at relaxed latents as a loop with SVI's interface.

    ``infer``, ``evaluate_loss`` and ``posterior`` are those of ``PredictiveCoding``, and start
    from where the rows were left, too.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the model's parameters; it moves ``weight_steps`` times a call
            of :meth:`step`.
        guide: Where latents start, as in ``PredictiveCoding``.
        num_steps: Updates of the latents, the E step.
        weight_steps: Updates of the parameters at the latents where the E step ended, the M step.
        warm_start: ``"last"``: a row goes on where its last E step left it, minibatches in any
            order. ``"guide"`` and None start it anew, as in ``PredictiveCoding``.
        **options: See :class:`~guides.inference.predictive_coding.PredictiveCoding`. Steps run
            eagerly.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
        >>> x = torch.tensor([2.0, -2.0])
        >>> optim = pyro.optim.SGD({"lr": 0.2})
        >>> em = GeneralizedEM(model, optim, num_steps=100, weight_steps=100)
        >>> loss = em.step(x)  # z = x / 2, and then w = 2
        >>> round(pyro.param("w").item(), 3)
        2.0
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Callable[..., Any] | None = None,
        num_steps: int = 5,
        *,
        weight_steps: int = 5,
        warm_start: str | None = "last",
        **options: Any,
    ) -> None:
        check_number("weight_steps", weight_steps, integer=True, least=1)
        super().__init__(model, optim, guide, num_steps, warm_start=warm_start, **options)
        self.weight_steps = weight_steps
        self._final: tuple[LogJoint, Mapping[str, Tensor]] | None = None

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Relax, then update the parameters ``weight_steps`` times at the relaxed state.

        Returns:
            The energy of all N rows between the two, as ``PredictiveCoding`` returns it. With
            all rows in a call it falls from call to call as long as no update of the parameters
            raises it.
        """
        try:
            energy = super().step(*args, **kwargs)
            for _ in range(self.weight_steps - 1):
                if self._final is not None:
                    log_joint, values = self._final
                    self._learn(log_joint, partial(self._again, log_joint, values))
        finally:
            self._final = None
        return energy

    def _again(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss at the same latents, with the parameters as they are now."""
        with torch.enable_grad():
            loss = self._loss(log_joint, values)
        return loss.detach(), loss

    def _loss(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> Tensor:
        """The energy at the relaxed state, which is kept for the rest of the M step."""
        self._final = log_joint, values
        return super()._loss(log_joint, values)

    def _settings(self) -> tuple[Any, ...]:
        return (*super()._settings(), self.weight_steps)

    def _refusal(self) -> str | None:
        if self.weight_steps > 1:
            return "the parameters move several times a step"
        return super()._refusal()

"""RefinementELBO: the two gradients that a refined guide learns from."""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from guides.objectives.forward_kl import ForwardKL
from guides.schemes.recording import Refined, recording

__all__ = ["RefinementELBO"]


class RefinementELBO(ELBO):
    """An objective whose guide learns from all iterations, and whose model from the last.

        model:  gradient of -L_T                          L_t: the bound after t updates
        guide:  gradient of -mean_t L_t                   t = 0 .. T where the start is learned

    For guides that stop the gradient through their refinement (``backprop="none"``, Laplace
    refinement) the mean is L_0 alone: the encoder learns from its own bound, the model from the
    refined one. Guides without refinement learn as under the objective inside. The bounds before
    the last reuse the gradients that refinement took anyway, so nothing is computed twice.

    The loss is that of the objective inside: minus the refined ELBO of all N rows, an upper
    bound on -log p(x) in expectation.

    References:
        | Iterative amortized inference (Marino, Yue & Mandt, 2018)
        | https://arxiv.org/abs/1807.09356

    Args:
        objective: The objective of the last iteration: anything with ``differentiable_loss``.
            By default ``Trace_ELBO``.
        num_particles: Draws of the default objective.
        vectorize_particles: Whether they are one batch: then a row is refined once for all, and
            the program must take a further batch dimension on the left.

    Example:
        >>> import pyro, pyro.distributions as dist, guides
        >>> from guides.inference import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("iterative_normal", model, x, network=(16,))
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), RefinementELBO())
        >>> isinstance(svi.step(x), float)
        True
    """

    def __init__(
        self,
        objective: Any = None,
        *,
        num_particles: int = 1,
        vectorize_particles: bool = False,
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        if objective is None:
            vectorized = vectorize_particles and num_particles > 1
            objective = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorized)
        if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
            kind = objective.__name__ if isinstance(objective, type) else None
            raise TypeError(
                "objective must have differentiable_loss, as Trace_ELBO and guides.objectives "
                + (
                    f"have; got the class {kind}: pass an instance, {kind}()."
                    if kind
                    else "have; "
                )
                + ("" if kind else f"got {type(objective).__name__}.")
            )
        if isinstance(objective, (ForwardKL, RefinementELBO)):
            fix = (
                "Pass ForwardKL itself to SVI, which trains the refined q on simulations, or an "
                "ELBO here: RefinementELBO(Trace_ELBO())."
                if isinstance(objective, ForwardKL)
                else "Pass the objective inside it."
            )
            raise TypeError(
                "RefinementELBO adds the bounds of the earlier iterations to an ELBO of the last "
                f"one, and {type(objective).__name__} is none. {fix}"
            )
        self.objective = objective

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss of the objective inside, after the last iteration."""
        return float(self.objective.loss(model, guide, *args, **kwargs))

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the last iteration, with both gradients on one backward pass."""
        with recording() as record:
            loss: Tensor = self.objective.differentiable_loss(model, guide, *args, **kwargs)
        runs: dict[str, int] = {}
        for refined in record:
            runs[refined.group] = runs.get(refined.group, 0) + 1
        for refined in record:
            # A guide that is run once a particle is refined once a particle.
            loss = loss - _earlier(refined) / runs[refined.group]
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; adds both gradients to the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def _earlier(refined: Refined) -> Tensor:
    """Zero, with the gradient of the bounds before the last iteration."""
    weights = dict(refined.family.named_parameters())
    total = torch.zeros(())
    for iterate in refined.iterates:
        term = (iterate.gradient * (iterate.lam - iterate.lam.detach())).sum()
        for name, gradient in iterate.weights.items():
            term = term + (gradient * (weights[name] - weights[name].detach())).sum()
        total = total.to(term) + term
    return refined.scale * refined.fraction * total

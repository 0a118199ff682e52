"""The loss of an objective as a tensor, with its gradients: what a graph is captured from.

Pyro's objectives turn losses into Python numbers on the way, which a capture cannot do; what they
compute is written here without that, for programs whose draws are all reparameterized. Their
gradient is then the derivative of the loss itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import JitTrace_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from guides.capture.graph import CaptureError
from guides.objectives.objective import Objective
from guides.objectives.refinement import RefinementELBO

__all__ = ["differentiable_loss", "loss_and_grads", "refuse"]

Program = Callable[..., Any]


def refuse(objective: Any) -> str | None:
    """Why an objective has no graph, None where it has one."""
    if isinstance(objective, RefinementELBO):
        return refuse(objective.objective)
    if isinstance(objective, Objective):
        return None
    if type(objective) in (Trace_ELBO, JitTrace_ELBO, TraceMeanField_ELBO):
        return None
    return (
        f"objective {type(objective).__name__} is not one that is captured (Trace_ELBO, "
        "TraceMeanField_ELBO and those of guides.objectives are)"
    )


def differentiable_loss(
    objective: Any, model: Program, guide: Program, args: Any, kwargs: Mapping[str, Any]
) -> Tensor:
    """The loss of an objective, a scalar tensor whose derivative is its gradient."""
    if isinstance(objective, RefinementELBO):
        inner = objective.objective

        class Tensors:
            """The objective inside, whose loss stays a tensor."""

            @staticmethod
            def differentiable_loss(m: Program, g: Program, *a: Any, **k: Any) -> Tensor:
                return differentiable_loss(inner, m, g, a, k)

        return RefinementELBO(Tensors()).differentiable_loss(model, guide, *args, **kwargs)
    if isinstance(objective, Objective):
        return objective.differentiable_loss(model, guide, *args, **kwargs)
    particle = _mean_field if isinstance(objective, TraceMeanField_ELBO) else _single
    total: Any = 0.0
    for model_trace, guide_trace in objective._get_traces(model, guide, args, dict(kwargs)):
        _check_reparameterized(guide_trace)
        total = total + particle(model_trace, guide_trace)
    if not isinstance(total, Tensor):
        raise CaptureError("model and guide have no site with a density")
    return -total / objective.num_particles


def loss_and_grads(
    objective: Any,
    model: Program,
    guide: Program,
    args: Any,
    kwargs: Mapping[str, Any],
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, detached, and its gradients; None for parameters that it does not reach."""
    with torch.enable_grad():
        loss = differentiable_loss(objective, model, guide, args, kwargs)
        if not loss.requires_grad:
            return loss.detach(), [None] * len(parameters)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), list(grads)


def _check_reparameterized(trace: Trace) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        fn: Any = site["fn"]
        parts: Any = site["score_parts"]
        # Some that are reparameterized in part, or given a value, have a score term as well.
        scored = not is_identically_zero(parts.score_function)
        if scored or not (site["is_observed"] or fn.has_rsample):
            raise CaptureError(
                f"site {name!r} of the guide is not reparameterized ({type(fn).__name__})"
            )


def _single(model_trace: Trace, guide_trace: Trace) -> Tensor:
    log_p: Any = model_trace.log_prob_sum()
    elbo: Tensor = log_p - guide_trace.log_prob_sum()
    return elbo


def _mean_field(model_trace: Trace, guide_trace: Trace) -> Tensor:
    """As ``TraceMeanField_ELBO`` does: a KL divergence where torch knows one."""
    from pyro.distributions.util import scale_and_mask

    elbo: Any = 0.0
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        own: Any = guide_trace.nodes[name]
        prior: Any = site["fn"]
        try:
            divergence = kl_divergence(own["fn"], prior)
        except NotImplementedError:
            elbo = elbo + site["log_prob_sum"] - own["score_parts"].entropy_term.sum()
            continue
        elbo = elbo - scale_and_mask(divergence, scale=own["scale"], mask=own["mask"]).sum()
    for name, own in guide_trace.nodes.items():
        if own["type"] == "sample" and name not in model_trace.nodes:
            elbo = elbo - own["score_parts"].entropy_term.sum()
    return elbo

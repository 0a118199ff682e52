"""Predictive coding that descends minus the Laplace evidence instead of the energy of a point.

    z*(theta) = argmin_z E(theta, z)                          Lambda = d2E/dz2
    loss      = E(theta, z*) - d/2 log 2 pi + 1/2 log det Lambda(theta, z*(theta))

    dloss/dtheta = dE/dtheta                                  the envelope: z* moves for nothing
                 + 1/2 dlogdet/dtheta
                 + 1/2 dlogdet/dz . dz*/dtheta                dz*/dtheta = -Lambda^-1 d2E/dz dtheta

The last term is that of the implicit function theorem, zero on linear Gaussian programs alone. It
comes from one differentiable Newton step at the mode, ``z* - Lambda^-1 dE/dz(theta, z*)``, whose
value is z* and whose derivative is dz*/dtheta.

Learning at the energy of a point is biased to weights that explain the data by ever smaller
latents, and may diverge; the determinant takes that away. On linear Gaussian programs the loss is
minus the log evidence, and learning is maximum likelihood.

References:
    | Approximate inference for the Bayesian method: Laplace's method in latent variable models
    | (Tierney & Kadane, 1986) https://doi.org/10.1080/01621459.1986.10478240
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.optim
import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.laplace_guide import IndefiniteHessianError
from guides.inference.newton import newton
from guides.inference.predictive_coding import PredictiveCoding
from guides.probe import Program

__all__ = ["LaplaceCorrected"]


class LaplaceCorrected(PredictiveCoding):
    """Laplace-corrected predictive coding as a loop with SVI's interface.

    A step relaxes, goes on to the mode by Newton steps, and takes the exact Hessian there: one
    Hessian product per coordinate of a row, so it is for latents of moderate size. Steps run
    eagerly.

    Args:
        model: Any Pyro program with continuous latents, either all in the data plate or all
            outside of it.
        optim: A ``PyroOptim`` for the model's parameters.
        guide: Where latents start, as in ``PredictiveCoding``.
        num_steps: Updates of the latents before the Newton steps.
        newton_steps: Newton steps at most, at least one.
        **options: See :class:`~guides.inference.predictive_coding.PredictiveCoding`; the energy
            is that of unconstrained space.

    Raises:
        IndefiniteHessianError: From a step, where the state is no mode.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     w = pyro.param("w", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
        >>> x = torch.tensor([2.0, -2.0])
        >>> loop = LaplaceCorrected(model, pyro.optim.Adam({"lr": 0.1}))
        >>> evidence = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum()  # at w = 1
        >>> bool(abs(loop.step(x) + evidence) < 1e-4)
        True
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Callable[..., Any] | None = None,
        num_steps: int = 20,
        *,
        newton_steps: int = 20,
        **options: Any,
    ) -> None:
        if newton_steps < 1:
            raise ValueError(
                f"newton_steps must be at least 1, got {newton_steps}: the Laplace evidence is "
                "that of a mode, which a relaxation only nears."
            )
        if not options.get("jacobian", True):
            raise ValueError(
                "LaplaceCorrected needs jacobian=True: the evidence is an integral over "
                "unconstrained space, whose density has the log-determinants."
            )
        super().__init__(model, optim, guide, num_steps, newton_steps=newton_steps, **options)

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """Minus the Laplace evidence, differentiable in the parameters."""
        _check_one_group(log_joint)
        values, _ = self._relax(log_joint, learning=True)
        loss, mode = self._laplace_loss(log_joint, values)
        self._keep_globals(log_joint, log_joint.layout.constrain(mode))
        return loss.detach(), loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the Laplace evidence of all N rows, as :meth:`step` returns it."""
        log_joint = self._log_joint(args, kwargs)
        _check_one_group(log_joint)
        values, _ = self._relax(log_joint)
        return float(self._laplace_loss(log_joint, values)[0].detach())

    def _laplace_loss(
        self, log_joint: LogJoint, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        start = log_joint.layout.pack(values)
        mode, count = newton(log_joint, start, num_steps=self.newton_steps, jacobian=True)
        ((name, point),) = mode.items()  # (B, K) or (K,)
        size = point.shape[-1]
        self.gradient_evaluations += (count + 4 * size) * max(1, log_joint.layout.num_rows)
        scale = log_joint.layout.scale if point.dim() == 2 else 1.0

        def blocks(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows, other = log_joint.packed({name: u}, expose_params=True)
            energy = -log_joint.total(rows, other)
            (slope,) = torch.autograd.grad(energy / scale, u, create_graph=True)
            columns = [
                torch.autograd.grad(
                    slope[..., k].sum(), u, create_graph=True, materialize_grads=True
                )[0]
                for k in range(size)
            ]
            return energy, slope, torch.stack(columns, -1)

        with torch.enable_grad():
            _, slope, curvature = blocks(point.detach().requires_grad_())
            self._check_definite(log_joint, curvature.detach())
            step = torch.linalg.solve(curvature.detach(), slope.unsqueeze(-1)).squeeze(-1)
            energy, _, curvature = blocks(point.detach() - step)
            # Symmetric up to rounding, which the factorization does not look at.
            log_det = torch.linalg.cholesky(curvature).diagonal(dim1=-2, dim2=-1).log().sum(-1)
            normalizer = log_det - 0.5 * size * math.log(2 * math.pi)  # (B,) or ()
            return energy + scale * normalizer.sum(), mode

    def _check_definite(self, log_joint: LogJoint, curvature: Tensor) -> None:
        _, info = torch.linalg.cholesky_ex(curvature)
        if bool((info == 0).all()) and bool(torch.isfinite(curvature).all()):
            return
        (group,) = log_joint.layout.groups
        order = int(info.max()) - 1
        site = next((s.name for s, part in group.slices() if part.start <= order < part.stop), "")
        raise IndefiniteHessianError(
            f"The Hessian of the energy is not positive definite at site {site!r}, so the state "
            "is no mode and there is no Laplace evidence to learn from. Relax further (num_steps, "
            "newton_steps), start from a guide, or fit a guide with a density by SVI."
        )

    def _refusal(self) -> str | None:
        return "Newton steps end by the values of their gradients"


def _check_one_group(log_joint: LogJoint) -> None:
    groups = log_joint.layout.groups
    if len(groups) > 1:
        outside = ", ".join(site.name for site in groups[0].sites)
        raise NotImplementedError(
            f"LaplaceCorrected takes latents that are all in the data plate, or all outside; "
            f"{outside} are outside of it and others inside. Make them parameters (pyro.param), "
            "pass data_plate=None, which takes all latents as one group, or use "
            "PredictiveCoding."
        )

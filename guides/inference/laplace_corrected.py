"""Predictive coding that descends minus the Laplace evidence instead of the energy of a point.

    z*(theta) = argmin_z E(theta, z)                          Lambda = d2E/dz2
    loss      = E(theta, z*) - d/2 log 2 pi + 1/2 log det Lambda(theta, z*(theta))

    dloss/dtheta = dE/dtheta                                  the envelope: z* moves for nothing
                 + 1/2 dlogdet/dtheta
                 + 1/2 dlogdet/dz . dz*/dtheta                dz*/dtheta = -Lambda^-1 d2E/dz dtheta

The last term is that of the implicit function theorem, zero on linear Gaussian programs alone. It
comes from one differentiable Newton step at the mode, ``z* - Lambda^-1 dE/dz(theta, z*)``, whose
value is z* and whose derivative is dz*/dtheta.

With global beside local latents Lambda has arrow form (:mod:`guides.inference.arrow`), and its
determinant is that of the rows times that of what they leave of the globals. That part is no sum
over rows, so a minibatch gives neither an unbiased estimate of it nor the mode of the globals, and
is refused.

With ``hessian="gauss_newton"`` Lambda in the determinant is the Gauss-Newton matrix, which is
positive definite and defined at kinks. The mode still moves by the exact Hessian where that is
positive definite, else by the same matrix; a coordinate whose slope does not vanish sits on a kink
and stays there. The loss is then another approximation of minus the log evidence, equal where the
program is linear Gaussian.

Latents that a mask switches off, of steps that a row lacks, count in no term.

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
from guides.gauss_newton import gauss_newton
from guides.inference.arrow import Arrow, Cholesky
from guides.inference.curvature import check_kinks
from guides.inference.laplace_guide import Laplace, check_definite
from guides.inference.newton import newton
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.switched_off import decoupled, unread
from guides.probe import Program

__all__ = ["LaplaceCorrected"]

Packed = dict[str, Tensor]
# In standard deviations: a coordinate that a Newton step would move further sits on a kink.
_SETTLED = 1e-2


class LaplaceCorrected(PredictiveCoding):
    """Laplace-corrected predictive coding as a loop with SVI's interface.

    A step relaxes, goes on to the mode by Newton steps, and takes the exact Hessian there: one
    Hessian product per coordinate of a row, so it is for latents of moderate size. Steps run
    eagerly.

    Args:
        model: Any Pyro program with continuous latents. Where some are global, calls hold all
            rows.
        optim: A ``PyroOptim`` for the model's parameters.
        guide: Where latents start, as in ``PredictiveCoding``.
        num_steps: Updates of the latents before the Newton steps.
        newton_steps: Newton steps at most, at least one.
        hessian: ``"exact"``, or ``"gauss_newton"``, the way on where a density has a kink or the
            exact one is not positive definite; Newton steps and :meth:`posterior` take the same.
        **options: See :class:`~guides.inference.predictive_coding.PredictiveCoding`; the energy
            is that of unconstrained space.

    Raises:
        IndefiniteHessianError: From a step, where the state is no mode.
        KinkError: From a step, where a site's density has a kink there.
        NotImplementedError: From a step, for a minibatch of a program with global latents.

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
        hessian: str = "exact",
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
        if hessian not in ("exact", "gauss_newton"):
            raise ValueError(
                f'hessian must be "exact" or "gauss_newton", got {hessian!r}: the evidence takes '
                "the determinant of a whole matrix."
            )
        super().__init__(model, optim, guide, num_steps, newton_steps=newton_steps, **options)
        self.hessian = hessian

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """Minus the Laplace evidence, differentiable in the parameters."""
        _check_whole(log_joint)
        values, _ = self._relax(log_joint, learning=True)
        loss, mode = self._laplace_loss(log_joint, values)
        self._keep_globals(log_joint, log_joint.layout.constrain(mode))
        return loss.detach(), loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the Laplace evidence of all N rows, as :meth:`step` returns it."""
        log_joint = self._log_joint(args, kwargs)
        _check_whole(log_joint)
        values, _ = self._relax(log_joint)
        return float(self._laplace_loss(log_joint, values)[0].detach())

    def posterior(self, *args: Any, hessian: str | None = None, **kwargs: Any) -> Laplace:
        """See :meth:`guides.inference.PredictiveCoding.posterior`; the loop's own Hessian."""
        return super().posterior(*args, hessian=hessian or self.hessian, **kwargs)

    def _laplace_loss(
        self, log_joint: LogJoint, values: Mapping[str, Tensor]
    ) -> tuple[Tensor, Packed]:
        read = log_joint.layout
        exact, scale = self.hessian == "exact", read.scale
        mode, spent = newton(
            log_joint, read.pack(values), num_steps=self.newton_steps, kind=self.hessian
        )
        size = sum(value.shape[-1] for value in mode.values())
        self.gradient_evaluations += (spent + (4 if exact else 6) * size) * max(1, read.num_rows)

        def energy(u: Packed) -> Tensor:
            return -log_joint.total(*log_joint.packed(u, expose_params=True))

        def curved(u: Packed) -> Callable[[Packed], Tensor]:
            """The energy whose Hessian at a point is Lambda."""
            if exact:
                return energy
            surrogate = gauss_newton(log_joint, u, differentiable=True)
            return lambda point: surrogate(point)[0]

        def factor(matrix: Tensor) -> Cholesky:
            matrices = matrix.detach() if matrix.dim() == 3 else matrix.detach().unsqueeze(0)
            group = next(g for g in read.groups if (g.plate is None) == (matrix.dim() == 2))
            check_definite(matrices, group, self.hessian)
            return Cholesky(matrix)

        with torch.enable_grad():
            slope, found = _derivatives(energy, mode, scale)
            blocks = {name: block.detach() for name, block in found.items()}
            absent = unread(log_joint, mode, blocks)
            blocks = decoupled(blocks, absent)
            if exact:
                check_kinks(log_joint, mode, blocks)
            else:
                fisher = decoupled(_derivatives(curved(mode), mode, scale)[1], absent)
                slope, blocks = _settled(slope, _definite(blocks, fisher, scale))
            step = Arrow(blocks, scale, factor).solve(slope)
            point = {k: v - (step[k] - step[k].detach()) for k, v in mode.items()}
            blocks = decoupled(_derivatives(curved(point), point, scale)[1], absent)
            sizes = {k: v.numel() for k, v in mode.items()}
            for k, off in absent.items():
                sizes[k] -= int(off.sum())
            count = sum(size * (scale if k == "data" else 1.0) for k, size in sizes.items())
            log_det = Arrow(blocks, scale, factor).log_det()
            return energy(point) + 0.5 * (log_det - count * math.log(2 * math.pi)), mode

    def _refusal(self) -> str | None:
        return "Newton steps end by the values of their gradients"


def _derivatives(
    energy: Callable[[Packed], Tensor], point: Packed, scale: float
) -> tuple[Packed, Packed]:
    """Slopes and Hessian blocks, differentiable; those of rows without N/B."""
    moved = {name: torch.zeros_like(value).requires_grad_() for name, value in point.items()}
    total = energy({name: value + moved[name] for name, value in point.items()})
    # Where an energy is linear, its slope still has a graph.
    total = total + sum(0.0 * value.square().sum() for value in moved.values())
    leaves = list(moved.values())
    slopes = dict(zip(moved, torch.autograd.grad(total, leaves, create_graph=True), strict=True))
    blocks: Packed = {}
    for name, slope in slopes.items():
        columns: dict[str, list[Tensor]] = {other: [] for other in moved}
        for k in range(slope.shape[-1]):
            # The energy of a row knows no other row, so one product is that of every row.
            column = torch.autograd.grad(slope[..., k].sum(), leaves, create_graph=True)
            for other, part in zip(moved, column, strict=True):
                columns[other].append(part)
        if name == "data":
            blocks["local"] = torch.stack(columns["data"], -1) / scale  # (B, K, K)
        else:
            blocks["global"] = torch.stack(columns["global"], -1)  # (G, G)
            if "data" in moved:
                blocks["cross"] = torch.stack(columns["data"], -1) / scale  # (B, K, G)
    return {k: v / scale if k == "data" else v for k, v in slopes.items()}, blocks


def _definite(exact: Packed, fisher: Packed, scale: float) -> Packed:
    """The exact blocks of the rows where they are positive definite, those of Fisher elsewhere."""
    fisher = {name: block.detach() for name, block in fisher.items()}
    chosen = dict(exact)
    if "local" in exact:
        finite = torch.isfinite(exact["local"]).all(-1).all(-1)
        known = torch.where(finite[:, None, None], exact["local"], fisher["local"])
        rows = (finite & (torch.linalg.cholesky_ex(known)[1] == 0))[:, None, None]
        for name in ("local", "cross"):
            if name in exact:
                chosen[name] = torch.where(rows, exact[name], fisher[name])
    try:
        finite = torch.stack([torch.isfinite(block).all() for block in chosen.values()]).all()
        return chosen if bool(finite) and Arrow(chosen, scale) else fisher
    except RuntimeError:  # LinAlgError
        return fisher


def _settled(slopes: Packed, blocks: Packed) -> tuple[Packed, Packed]:
    """Take coordinates whose slope does not vanish out of a linear system, for good."""
    kept = {}
    for name, slope in slopes.items():
        deviation = blocks["local" if name == "data" else "global"].diagonal(dim1=-2, dim2=-1)
        kept[name] = slope.detach().abs() <= _SETTLED * deviation.sqrt()
    result = dict(blocks)
    for name, key in (("local", "data"), ("global", "global")):
        if name in blocks:
            both = kept[key].unsqueeze(-1) & kept[key].unsqueeze(-2)
            eye = torch.eye(both.shape[-1], dtype=blocks[name].dtype, device=both.device)
            result[name] = torch.where(both, blocks[name], eye.expand(both.shape))
    if "cross" in blocks:
        result["cross"] = blocks["cross"] * kept["data"].unsqueeze(-1) * kept["global"]
    return {name: slope * kept[name] for name, slope in slopes.items()}, result


def _check_whole(log_joint: LogJoint) -> None:
    read = log_joint.layout
    group, plate = read.group("global"), read.data_plate
    if group is not None and plate is not None and read.scale != 1.0:
        names = ", ".join(site.name for site in group.sites)
        raise NotImplementedError(
            f"LaplaceCorrected needs all rows in a call where latents are global: {names} lie "
            f"outside of the data plate, and {plate.num_rows} of {plate.size} rows know "
            "neither their mode nor their log determinant, which is no sum over rows. Call with "
            "all rows, make them parameters (pyro.param), or use PredictiveCoding."
        )

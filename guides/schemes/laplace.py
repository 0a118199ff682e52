"""LaplaceRefinement: Newton steps to the mode of a row, then the covariance there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from guides import location_scale
from guides.energy import SiteTerms
from guides.schemes.bound import RowBound
from guides.schemes.recording import Iterate, Refined, active
from guides.schemes.refinement import Refinement, State
from guides.schemes.scheme import Call
from guides.sites import Group
from guides.supports import unwrap

__all__ = ["LaplaceRefinement", "row_hessian"]

_FACTORS = (1.0, 0.5, 0.25, 0.0625, 0.0)


class LaplaceRefinement(Refinement):
    """An encoder, then Newton steps to the mode; q is the Gaussian with the curvature there.

        u_0     = location of encoder(x)
        H_t     = curvature of -log p(x, z(u)) |dz/du| at u_t
        u_{t+1} = u_t + f H_t^-1 g_t         f in {1, 1/2, 1/4, 1/16, 0}, the best for the row
        q(u)    = Normal(u_T, H_T^-1)        or its best mean-field member, or its mode

    With the Gauss-Newton curvature an observed site contributes the Fisher information of its
    distribution and a Normal latent the square of its standardized error's Jacobian, which is
    positive semidefinite whatever the networks between; other latent sites contribute their
    exact Hessian. For a linear Gaussian program one step is exact.

    The refined parameters are numbers: no gradient reaches the encoder through them. It learns
    from its own bound, with :class:`guides.objectives.RefinementELBO`.

    References:
        | Variational Laplace autoencoders (Park, Kim & Kim, 2019)
        | https://proceedings.mlr.press/v97/park19a.html

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        num_iterations: Newton steps T.
        curvature: ``"gauss_newton"`` or ``"exact"``; an exact Hessian that is indefinite has its
            eigenvalues replaced by their absolute values.
        hidden: Widths of the encoder.
        **options: See :class:`guides.schemes.refinement.Refinement`.
    """

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        num_iterations: int = 4,
        curvature: str = "gauss_newton",
        eval_iterations: int | None = None,
        tolerance: float = 0.0,
        start: str = "encoder",
        data_args: Mapping[str, int] | None = None,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        features: str | Mapping[str, str] = "auto",
    ) -> None:
        super().__init__(
            init,
            group,
            call,
            num_iterations=num_iterations,
            eval_iterations=eval_iterations,
            tolerance=tolerance,
            start=start,
            data_args=data_args,
            inputs=inputs,
            encoder=encoder,
            hidden=hidden,
            features=features,
        )
        if curvature not in ("gauss_newton", "exact"):
            raise ValueError(f'curvature must be "gauss_newton" or "exact", got {curvature!r}.')
        self.curvature = curvature

    def refine(self, lam: Tensor, group: Group, call: Call) -> Tensor:
        """Newton steps, then the parameters of the Gaussian there."""
        bound = self.bound(group, call)
        record = active()
        with torch.no_grad():
            fixed = lam.detach()
            if record is not None:
                own = bound.gradient(fixed, bound.noise(fixed))
                iterates = (Iterate(lam, own.lam),)
                record.append(Refined(group.name, bound.family, call.layout.scale, iterates, 1.0))
            state = {"lam": bound.family.location(fixed)}
            loc = self.iterate(state, self._step, group, call, bound)["lam"]
            precision = self.precision(bound, loc)
            return bound.family.of_gaussian(loc, _scale_tril(precision))

    def _step(self, t: int, state: State, bound: RowBound, rows: Tensor | None) -> State:
        u = state["lam"]
        gradient = torch.func.grad(lambda u: bound.log_joint_rows(u).sum())(u)
        precision = self.precision(bound, u)
        step = torch.linalg.solve(precision, gradient.unsqueeze(-1)).squeeze(-1)
        trials = torch.stack([u + factor * step for factor in _FACTORS])  # (F, B, K)
        values = bound.over(bound.log_joint_rows, trials)
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        best = values.argmax(0)
        return {"lam": trials[best, torch.arange(len(u), device=u.device)]}

    def precision(self, bound: RowBound, u: Tensor) -> Tensor:
        """Curvature of the rows' energies at packed latents, ``(B, K, K)``, positive definite."""
        if self.curvature == "exact":
            matrix = row_hessian(lambda v: -bound.log_joint_rows(v), u)
        else:
            matrix = row_hessian(_gauss_newton(bound, u), u)
        matrix = 0.5 * (matrix + matrix.mT)
        values, vectors = torch.linalg.eigh(matrix)
        largest = values.abs().amax(-1, keepdim=True)
        floor = 10 * torch.finfo(u.dtype).eps * largest
        values = torch.maximum(values.abs(), floor)
        return (vectors * values.unsqueeze(-2)) @ vectors.mT

    def extra_repr(self) -> str:
        """Steps and curvature."""
        return f"num_iterations={self.num_iterations}, curvature={self.curvature!r}"


def row_hessian(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Hessians ``(B, K, K)`` of a function ``(B, K) -> (B,)`` whose rows are independent."""

    def gradient(v: Tensor) -> Tensor:
        return torch.func.grad(lambda w: function(w).sum())(v)

    product = torch.func.vjp(gradient, u)[1]
    size = u.shape[-1]
    # The value of a row knows no other row, so one vector probes all rows at once.
    basis = torch.eye(size, dtype=u.dtype, device=u.device).unsqueeze(1).expand(size, *u.shape)
    try:
        columns = torch.func.vmap(lambda v: product(v)[0])(basis)
    except RuntimeError:
        # Operations without a batching rule still have single products.
        columns = torch.stack([product(v)[0] for v in basis])
    return columns.movedim(0, -1)


class _Curvature(SiteTerms):
    """Site terms whose Hessian at a reference point is the Gauss-Newton curvature."""

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        name, fn, value = site["name"], site["fn"], site["value"]
        if self.reference is None or name not in self.reference.fns:
            raise ValueError(f"Site {name!r} appeared while the curvature was taken.")
        before = self.reference.fns[name]
        if site["is_observed"] and name not in self.given:
            try:
                return kl_divergence(before, fn)
            except NotImplementedError:
                return -fn.log_prob(value)
        if type(unwrap(fn)).__name__ not in ("Normal", "MultivariateNormal"):
            return -fn.log_prob(value)
        old = location_scale.inverse(before, self.reference.values[name])
        change = location_scale.inverse(fn, value) - old
        half = 0.5 * change.square()
        return half.flatten(-site["fn"].event_dim).sum(-1) if site["fn"].event_dim else half


def _gauss_newton(bound: RowBound, u: Tensor) -> Callable[[Tensor], Tensor]:
    log_joint = bound.log_joint
    read = log_joint.layout

    def values(v: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        constrained, _, log_dets = log_joint.unpack({**bound.held, bound.group.name: v})
        return constrained, log_dets

    reference = log_joint.run(values(u)[0], density=False)

    def function(v: Tensor) -> Tensor:
        constrained, log_dets = values(v)
        terms = log_joint.run(constrained, terms=_Curvature, reference=reference)
        rows, _ = terms.total()
        for name, log_det in log_dets.items():
            gaussian = type(unwrap(terms.fns[name])).__name__ in ("Normal", "MultivariateNormal")
            if read.sites[name].row_dim is not None and name not in bound.plain and not gaussian:
                rows = rows - log_det
        return rows

    return function


def _scale_tril(precision: Tensor) -> Tensor:
    """Cholesky factor of the inverse, without forming the inverse."""
    flipped = torch.linalg.cholesky(precision.flip(-2, -1))
    upper = flipped.flip(-2, -1).mT  # precision = upper^T upper with upper lower-triangular
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper, identity.expand_as(precision), upper=False)

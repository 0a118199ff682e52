"""LaplaceRefinement: Newton steps to the mode of a row, then the covariance there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from guides.gauss_newton import gauss_newton
from guides.schemes.bound import RowBound
from guides.schemes.recording import Iterate, Refined, active
from guides.schemes.refinement import Refinement, State
from guides.schemes.scheme import Call
from guides.sites import Group

__all__ = ["LaplaceRefinement", "row_hessian"]

# Steps that are tried, besides none and the full one: a longer one, for energies that grow faster
# than their quadratic model, and steps limited to these multiples of the row's trust radius.
_LONGER = 4.0
_RADII = (4.0, 2.0, 1.0, 0.5, 0.25)
# The first radius, in standard deviations of the Gaussian with the curvature, and what it shrinks
# by where no step was good: below the smallest radius that was tried.
_RADIUS = 4.0
_SHRINK = 256.0


class LaplaceRefinement(Refinement):
    """An encoder, then Newton steps to the mode; q is the Gaussian with the curvature there.

        u_0     = location of encoder(x)
        H_t     = curvature of -log p(x, z(u)) |dz/du| at u_t,  C_t C_t' = H_t^-1
        w       = C_t' g_t                                   the Newton step, in units of C_t
        u_{t+1} = u_t + C_t limit(w)                         the best of a few limits for the row
        q(u)    = Normal(u_T, H_T^-1)         or its best mean-field member, or its mode

    A full step is taken wherever it is best: for a linear Gaussian program one step is exact.
    Where the quadratic model misleads, as for counts with an exponential rate, every coordinate
    of ``w`` is limited on its own to a trust radius, in standard deviations of the Gaussian with
    the curvature. Every row has its own radius, which follows the steps that were good and
    shrinks where none was, so every row goes up until it is at a mode. Poisson counts of up to
    some thousands arrive there from the prior's center in four to eight steps.

    The Gauss-Newton curvature (:mod:`guides.gauss_newton`) is positive semidefinite whatever the
    networks between: an observed site contributes the Fisher information of its distribution, a
    location-scale latent the square of its standardized error's Jacobian, other latents the
    positive part of their own Hessian.

    A row whose gradient or curvature leaves the range of numbers is held at its last point within,
    with the curvature there; if there never was one it keeps the q that it started with.

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
            eigenvalues, in units of its diagonal, replaced by their absolute values.
        hidden: Widths of the encoder.
        **options: See :class:`guides.schemes.refinement.Refinement`.
    """

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        num_iterations: int = 8,
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
            u = bound.family.location(fixed)
            start = _start(u)
            state = self.iterate(start, self._step, group, call, bound)
            spread, finite = self.spread(bound, state["lam"])
            arrived = finite & torch.isfinite(state["value"])
            loc = torch.where(arrived.unsqueeze(-1), state["lam"], state["held"])
            spread = torch.where(arrived[:, None, None], spread, state["spread"])
            found = bound.family.of_gaussian(loc, _scale_tril(spread))
            return torch.where((arrived | state["known"]).unsqueeze(-1), found, fixed)

    def _step(self, t: int, state: State, bound: RowBound, rows: Tensor | None) -> State:
        u, radius = state["lam"], state["radius"]
        gradient = torch.func.grad(lambda u: bound.log_joint_rows(u).sum())(u)
        spread, finite = self.spread(bound, u)
        finite = finite & torch.isfinite(gradient).all(-1)
        gradient = torch.where(finite.unsqueeze(-1), gradient, 0.0)
        whitened = (spread.mT @ gradient.unsqueeze(-1)).squeeze(-1)
        limits = [(radius * multiple).unsqueeze(-1) for multiple in _RADII]
        steps = [torch.zeros_like(whitened), whitened, _LONGER * whitened]
        steps += [whitened.clamp(-limit, limit) for limit in limits]
        trials = u + (spread @ torch.stack(steps).unsqueeze(-1)).squeeze(-1)  # (F, B, K)
        values = bound.over(bound.log_joint_rows, trials)
        values = torch.where(torch.isfinite(values), values, -torch.inf)
        highest, best = values.max(0)
        # What rounding hides, the full step still knows: near the mode it is the better one.
        slack = 8 * torch.finfo(values.dtype).eps * (1 + highest.abs())
        full = torch.isfinite(values[1]) & (values[1] >= highest - slack)
        best = torch.where(full, 1, torch.where(torch.isfinite(highest), best, 0))
        refused = finite & (best == 0)
        # Neither the full step nor a longer one says anything about the radius.
        multiples = radius.new_tensor([1.0 / _SHRINK, 1.0, 1.0, *_RADII])
        known = finite & torch.isfinite(values[0])
        position = best.unsqueeze(0)
        return {
            "lam": trials.gather(0, position.unsqueeze(-1).expand(1, *u.shape)).squeeze(0),
            "value": values.gather(0, position).squeeze(0),
            "radius": radius * torch.where(finite, multiples[best], 1.0),
            "refused": refused,
            "known": state["known"] | known,
            "held": torch.where(known.unsqueeze(-1), u, state["held"]),
            "spread": torch.where(known[:, None, None], spread, state["spread"]),
        }

    def spread(self, bound: RowBound, u: Tensor) -> tuple[Tensor, Tensor]:
        """A root C of the inverse curvature of the rows' energies, ``C C' = H^-1``.

        Args:
            bound: The bound.
            u: Packed latents ``(B, K)``.

        Returns:
            The roots ``(B, K, K)``, not triangular, and the rows whose curvature is finite
            ``(B,)``; the others get an identity.
        """
        matrix = self.hessian(bound, u)
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        matrix = torch.where(finite[:, None, None], matrix, eye)
        # In units of its diagonal: then latents of far different scales cost no digits.
        eps = torch.finfo(u.dtype).eps
        size = torch.maximum(
            matrix.diagonal(dim1=-2, dim2=-1).abs(), eps**0.5 * matrix.abs().amax(-1)
        )
        unit = torch.where(size > 0, size, 1.0).sqrt()
        values, vectors = torch.linalg.eigh(matrix / unit.unsqueeze(-1) / unit.unsqueeze(-2))
        largest = values.abs().amax(-1, keepdim=True)
        floor = 10 * eps * torch.where(largest > 0, largest, 1.0)
        values = torch.maximum(values.abs(), floor)
        return vectors * values.rsqrt().unsqueeze(-2) / unit.unsqueeze(-1), finite

    def hessian(self, bound: RowBound, u: Tensor) -> Tensor:
        """Curvature of the rows' energies at latents ``(B, K)``: symmetric, ``(B, K, K)``."""
        if self.curvature == "exact":
            matrix = row_hessian(lambda v: -bound.log_joint_rows(v), u)
        else:
            matrix = row_hessian(_gauss_newton(bound, u), u)
        return 0.5 * (matrix + matrix.mT)

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


def _gauss_newton(bound: RowBound, u: Tensor) -> Callable[[Tensor], Tensor]:
    name = bound.group.name
    energy = gauss_newton(bound.log_joint, {**bound.held, name: u}, plain=bound.plain)
    return lambda v: energy({**bound.held, name: v})[1][0]


def _start(u: Tensor) -> State:
    """The state of rows before any step."""
    num_rows, size = u.shape
    no = torch.zeros(num_rows, dtype=torch.bool, device=u.device)
    return {
        "lam": u,
        "value": torch.full_like(u[:, 0], -torch.inf),
        "radius": torch.full_like(u[:, 0], _RADIUS),
        "refused": no,
        # The last point where everything was finite, if there was one.
        "known": no,
        "held": u,
        "spread": torch.eye(size, dtype=u.dtype, device=u.device).repeat(num_rows, 1, 1),
    }


def _scale_tril(spread: Tensor) -> Tensor:
    """Cholesky factor of ``C C'``, without forming the product."""
    upper = torch.linalg.qr(spread.mT).R
    sign = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (sign.unsqueeze(-1) * upper).mT

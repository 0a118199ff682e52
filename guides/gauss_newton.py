"""The Gauss-Newton curvature of any program, as the Hessian of a surrogate energy.

    E(u) = sum_s f_s(v_s(u), eta_s(u))        a site: minus its log density in its value v and the
                                              parameters eta of its distribution
    H_GN = sum_s J_s^T F_s J_s                J_s: Jacobian of (v_s, eta_s),  F_s: semidefinite

The curvature that the program's own bends would add, f_s' times the second derivative of v_s and
eta_s, is left out, so no network between the sites can make the matrix indefinite. F_s is

    observed sites         Fisher information of the distribution's parameters
    location-scale latents c J_e^T J_e with the standardized error e; c is the Fisher information
                           of the location: 1 (Normal, Laplace), 1/2 (Cauchy), (df+1)/(df+3)
                           (StudentT)
    other latents          Hessian in the unconstrained value, Jacobian included, and the
                           unconstrained parameters, negative eigenvalues set to zero

A site whose distribution cannot be built again from its parameters contributes its exact Hessian.

The surrogate has that matrix as its Hessian *at the reference point*, so that everything that
differentiates an energy (Hessian products, conjugate gradients, dense blocks) works on it.

References:
    | Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent (Schraudolph, 2002)
    | https://doi.org/10.1162/08997660260028683

    | New insights and perspectives on the natural gradient method (Martens, 2014)
    | https://arxiv.org/abs/1412.1193
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from guides import location_scale
from guides.capturing import is_capturing
from guides.energy import LogJoint, SiteTerms
from guides.ripple import ripple
from guides.supports import unwrap

__all__ = ["gauss_newton"]

Surrogate = Callable[[Any, Tensor], Tensor]
# Families whose log density is linear in a sufficient statistic times logits: the Hessian in the
# logits is the Fisher information, whatever the value. Their divergences in torch assign in place.
_LOGITS = ("Bernoulli", "Binomial", "Categorical", "ContinuousBernoulli", "OneHotCategorical")
_MOVING_SUPPORT = ("Uniform", "Pareto")
# Terms that the program computed itself have no parameters whose curvature could be kept alone.
_COMPUTED = ("Delta", "Unit")


def gauss_newton(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    *,
    jacobian: bool = True,
    plain: Collection[str] = (),
    noncentered: Collection[str] = (),
    differentiable: bool = False,
) -> Callable[[dict[str, Tensor]], tuple[Tensor, tuple[Tensor, Tensor]]]:
    """The surrogate energy whose Hessian at ``packed`` is the Gauss-Newton matrix.

    Args:
        log_joint: The log joint of the call.
        packed: The reference point, ``{group: (B, K) or (K,)}``.
        jacobian: Whether the energy is that of unconstrained space.
        plain: Sites whose log-determinants are left out all the same.
        noncentered: Location-scale sites whose slots hold standardized values.
        differentiable: Let the matrix have derivatives in the reference point and in the
            parameters of the program; by default it is a constant.

    Returns:
        A function like that of :func:`guides.inference.units.energy_function`: packed
        latents to ``(total, (rows, other))``. Its value and its gradient mean nothing.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z**2, 0.5), obs=x)
        >>> u = {"data": torch.tensor([[3.0]])}
        >>> energy = gauss_newton(LogJoint(model, (torch.zeros(1),)), u)
        >>> def total(v):
        ...     return energy({"data": v})[0]
        >>> torch.autograd.functional.hessian(total, u["data"]).item()  # 1 + (2 z / scale)**2
        145.0
    """
    fixed = dict(packed) if differentiable else {k: v.detach() for k, v in packed.items()}
    off = frozenset(log_joint.layout.sites if not jacobian else plain)

    def run(point: Mapping[str, Tensor], **options: Any) -> SiteTerms:
        values, errors, _ = log_joint.unpack(point, noncentered)
        return log_joint.run(values, errors=errors, **options)

    surrogates: dict[str, Surrogate] = {}
    with torch.no_grad():
        moved = run(
            {name: value + 0.1 * ripple(value) for name, value in fixed.items()}, density=False
        )
    # Without gradients what the surrogates keep of this run is constant.
    with torch.set_grad_enabled(differentiable):
        run(fixed, terms=_Building, surrogates=surrogates, plain=off, reference=moved)

    def energy(point: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, other = run(point, terms=_Surrogates, surrogates=surrogates).total()
        return log_joint.total(rows, other), (rows, other)

    return energy


class _Surrogates(SiteTerms):
    """Terms of the surrogate."""

    def __init__(self, *args: Any, surrogates: dict[str, Surrogate], **options: Any) -> None:
        super().__init__(*args, **options)
        self.surrogates = surrogates

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        if site["name"] not in self.surrogates:
            raise ValueError(
                f"Site {site['name']!r} appeared while the curvature was taken. The structure of "
                "a program must not depend on its latents: sample every variable on every run."
            )
        return self.surrogates[site["name"]](site["fn"], site["value"])


class _Building(_Surrogates):
    """The run at the reference point, which writes the surrogates down."""

    def __init__(self, *args: Any, plain: frozenset[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self.plain = plain

    def density_of(self, site: Mapping[str, Any]) -> Tensor:
        name, fn, value = site["name"], site["fn"], site["value"]
        latent = name in self.layout.sites
        # The log-determinant joins the density of its site, though scales of handlers act on the
        # density alone.
        scale, plate = site["scale"], self.layout.data_plate
        frames = [frame.name for frame in site["cond_indep_stack"]]
        if plate is not None and plate.name in frames:
            scale = scale / plate.scale
        weight = 1.0 / scale if latent and name not in self.plain else None
        moved = fn if self.reference is None else self.reference.fns.get(name, fn)
        self.surrogates[name] = _site(fn, value, moved, latent, weight)
        return super().density_of(site)


def _site(fn: Any, value: Tensor, moved: Any, latent: bool, weight: Any) -> Surrogate:
    """The surrogate of a distribution and its value; wrappers act as they act on densities.

    ``moved`` is the distribution at other latents, which tells what depends on them.
    """
    kind = type(fn).__name__
    if kind == "Independent":
        count = fn.reinterpreted_batch_ndims
        inner = _site(fn.base_dist, value, moved.base_dist, latent, _event(weight, count))
        return lambda f, v: _sum_last(inner(f.base_dist, v), f.base_dist.batch_shape, count)
    if kind == "ExpandedDistribution":
        inner = _site(fn.base_dist, value, moved.base_dist, latent, weight)
        return lambda f, v: inner(f.base_dist, v).expand(f.batch_shape)
    if kind == "MaskedDistribution":
        inner = _site(fn.base_dist, value, moved.base_dist, latent, weight)
        return lambda f, v: scale_and_mask(inner(f.base_dist, v), mask=f._mask)
    return _latent(fn, value, moved, weight) if latent else _observed(fn, value, moved)


def _event(weight: Any, count: int) -> Any:
    return weight.reshape(weight.shape + (1,) * count) if isinstance(weight, Tensor) else weight


def _sum_last(term: Tensor, batch_shape: torch.Size, count: int) -> Tensor:
    term = term.expand(torch.broadcast_shapes(term.shape, batch_shape))
    return term.flatten(-count).sum(-1) if count else term


def _observed(fn: Any, value: Tensor, moved: Any) -> Surrogate:
    family = type(fn).__name__
    if family in ("Laplace", "Cauchy", "StudentT"):
        # Torch's divergence of two Laplace distributions has a kink where they agree.
        loc, scale = fn.loc, fn.scale
        of_loc = _location_information(fn) / scale**2
        df = fn.df if family == "StudentT" else torch.ones_like(scale)
        of_scale = torch.ones_like(scale) if family == "Laplace" else 2 * df / (df + 3)
        return lambda f, v: (
            0.5 * (of_loc * (f.loc - loc).square() + of_scale * (f.scale / scale).log().square())
            + torch.zeros_like(v)
        )
    if family == "TransformedDistribution":
        return _transformed(fn, value)
    if family not in _LOGITS and family not in _MOVING_SUPPORT:
        try:
            kl_divergence(fn, fn)
        except NotImplementedError:
            pass
        else:
            shape = torch.Size(value.shape[: value.dim() - fn.event_dim])
            return lambda f, v: kl_divergence(fn, f).expand(
                torch.broadcast_shapes(shape, f.batch_shape)
            )
    return _clipped(fn, value, moved, None) or (lambda f, v: -f.log_prob(v))


def _transformed(fn: Any, value: Tensor) -> Surrogate:
    """A value pushed back to its base: the squares of what is left there, where it is standard.

    Torch's divergence asks for one and the same transforms, which follow the latents here.
    """
    if not location_scale.is_location_scale(fn.base_dist):
        return lambda f, v: -f.log_prob(v)

    def left(f: Any, v: Tensor) -> Tensor:
        for transform in reversed(f.transforms):
            v = transform.inv(v)
        return location_scale.inverse(f.base_dist, v)

    before = left(fn, value)
    information = _location_information(unwrap(fn.base_dist))

    def square(f: Any, v: Tensor) -> Tensor:
        term = 0.5 * information * (left(f, v) - before).square()
        # Counted at the base: transforms may have reshaped the event.
        count = f.base_dist.event_dim
        return term.flatten(-count).sum(-1) if count else term

    return square


def _latent(fn: Any, value: Tensor, moved: Any, weight: Any) -> Surrogate:
    if location_scale.is_location_scale(fn) or type(fn).__name__ == "LogNormal":
        before = _standardized(fn, value)
        information = _location_information(fn)

        def square(f: Any, v: Tensor) -> Tensor:
            term = 0.5 * (_standardized(f, v) - before).square()
            return information * (term.sum(-1) if f.event_dim else term)

        return square
    transform = biject_to(fn.support)
    found = _clipped(fn, value, moved, transform, weight)

    def exact(f: Any, v: Tensor) -> Tensor:
        term = -f.log_prob(v)
        return term if weight is None else term - weight * _log_det(transform, v, f.event_dim)

    return found or exact


def _standardized(fn: Any, value: Tensor) -> Tensor:
    if type(fn).__name__ == "LogNormal":
        return (value.log() - fn.loc) / fn.scale
    return location_scale.inverse(fn, value)


def _location_information(fn: Any) -> Any:
    """Fisher information of the location of the standardized distribution."""
    family = type(fn).__name__
    if family == "Cauchy":
        return 0.5
    return (fn.df + 1) / (fn.df + 3) if family == "StudentT" else 1.0


def _log_det(transform: Any, value: Tensor, event_dim: int) -> Tensor:
    u = transform.inv(value)
    log_det = transform.log_abs_det_jacobian(u, value)
    extra = log_det.dim() - (value.dim() - event_dim)
    return log_det.flatten(-extra).sum(-1) if extra else log_det


def _clipped(
    fn: Any, value: Tensor, moved: Any, transform: Any, weight: Any = None
) -> Surrogate | None:
    """A quadratic with the positive part of the Hessian in unconstrained value and parameters.

    None where the distribution is not built again from its parameters.
    """
    if type(fn).__name__ in _COMPUTED:
        return None
    names = [name for name, constraint in fn.arg_constraints.items() if not _discrete(constraint)]
    if "logits" in names and "probs" in names:
        names.remove("probs")
    if not is_capturing():
        # What does not depend on the latents must not take part in the clipping.
        names = [
            name for name in names if not torch.equal(getattr(fn, name), getattr(moved, name))
        ]
    if not names and transform is None:
        return None  # nothing moves, so the density is a constant
    double = "logits" in fn.arg_constraints and "probs" in fn.arg_constraints
    held = [name for name in fn.arg_constraints if name not in names]
    others = {name: getattr(fn, name) for name in held if not (double and name == "probs")}
    batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])

    def flatten(f: Any, v: Tensor) -> tuple[Tensor, list[tuple[torch.Size, Any]]]:
        """Coordinates ``batch + (P,)`` of value and parameters, and how to go back."""
        parts, shapes = [], []
        if transform is not None:
            u = transform.inv(v)
            event = u.shape[v.dim() - f.event_dim :]
            parts.append(u.expand(batch + event).reshape(*batch, event.numel()))
            shapes.append((event, transform))
        for name in names:
            constraint = f.arg_constraints[name]
            to = biject_to(constraint)
            given = getattr(f, name)
            raw = to.inv(given)
            event = raw.shape[given.dim() - constraint.event_dim :]
            parts.append(raw.expand(batch + event).reshape(*batch, event.numel()))
            shapes.append((event, to))
        return torch.cat(parts, -1), shapes

    try:
        point, shapes = flatten(fn, value)

        def term(x: Tensor) -> Tensor:
            parts = x.split([event.numel() for event, _ in shapes], -1)
            built = [
                to(part.reshape(batch + event))
                for part, (event, to) in zip(parts, shapes, strict=True)
            ]
            own = built.pop(0) if transform is not None else value
            again = type(fn)(**dict(zip(names, built, strict=True)), **others, validate_args=False)
            result = -again.log_prob(own)
            if transform is not None and weight is not None:
                result = result - weight * _log_det(transform, own, fn.event_dim)
            return result

        expected = -fn.log_prob(value)
        if weight is not None and transform is not None:
            expected = expected - weight * _log_det(transform, value, fn.event_dim)
        same = is_capturing() or torch.allclose(term(point), expected, rtol=1e-3, atol=1e-4)
        if not same:
            return None
        matrix = _positive_part(_hessian(term, point))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None

    def quadratic(f: Any, v: Tensor) -> Tensor:
        change = flatten(f, v)[0] - point
        return 0.5 * (change.unsqueeze(-2) @ matrix @ change.unsqueeze(-1)).squeeze((-1, -2))

    return quadratic


def _discrete(constraint: Any) -> bool:
    return bool(getattr(constraint, "is_discrete", False))


def _hessian(term: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Hessians ``batch + (P, P)`` of a function of the last dimension, elements independent."""

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: term(y).sum())(x)

    product = torch.func.vjp(gradient, point)[1]
    columns = [
        product(direction.expand(point.shape))[0]
        for direction in torch.eye(point.shape[-1], dtype=point.dtype, device=point.device)
    ]
    return torch.stack(columns, -1)


def _positive_part(matrix: Tensor) -> Tensor:
    if matrix.shape[-1] == 1:
        return matrix.clamp_min(0.0)
    symmetric = 0.5 * (matrix + matrix.mT)
    values, vectors = torch.linalg.eigh(symmetric.detach())
    kept = values.clamp_min(0.0)
    positive = (vectors * kept.unsqueeze(-2)) @ vectors.mT
    if not matrix.requires_grad:
        return positive
    # Daleckii and Krein: finite where eigenvalues agree, unlike the derivatives of vectors.
    gap = values.unsqueeze(-1) - values.unsqueeze(-2)
    close = gap.abs() <= 1e-6 * values.abs().amax(-1)[..., None, None]
    rise = (kept.unsqueeze(-1) - kept.unsqueeze(-2)) / torch.where(close, 1.0, gap)
    rise = torch.where(close, (values > 0).to(rise).unsqueeze(-1), rise)
    change = vectors.mT @ (symmetric - symmetric.detach()) @ vectors
    return positive + vectors @ (rise * change) @ vectors.mT

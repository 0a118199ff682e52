"""Learned covariances of prediction errors, with a floor; and a guard against collapse.

    eps_n  = v_n - loc_n                                   errors of a Gaussian site
    Sigma <- (1 - rate) Sigma + rate E_n[eps eps^T]        its covariance, or the diagonal of it
    Sigma <- its eigenvalues raised to the floor

    E_n[eps eps^T] = eps eps^T at the relaxed state        alone this collapses: latents move to
                   + J_n C_n J_n^T  with the Laplace       zero errors, errors shrink the
                     covariance C_n of the latents         covariance, without end

minimizes ``0.5 eps^T Sigma^-1 eps + 0.5 log |Sigma|``; with the second term it is the M-step of
expectation maximization, exact for linear Gaussian programs. The program is not touched.

References:
    | Recurrent predictive coding models for associative memory (Tang et al., 2023)
    | https://doi.org/10.1371/journal.pcbi.1010719
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from guides import location_scale
from guides.capturing import is_capturing
from guides.energy import LogJoint, SiteTerms
from guides.probe import Program
from guides.supports import is_masked, unwrap

if TYPE_CHECKING:
    from guides.inference.predictive_coding import PredictiveCoding

__all__ = ["CollapseGuard", "LearnedPrecision"]

_KINDS = ("diagonal", "full")
_COLLAPSED = 1e-3


class LearnedPrecision:
    """A program whose Gaussian sites have learned covariances.

    Args:
        model: Any Pyro program.
        sites: ``"diagonal"`` or ``"full"`` by name of a Normal or MultivariateNormal site with at
            most one event dimension, and without a mask.
        floor: Smallest variance, and smallest eigenvalue of a full covariance.
        rate: Weight of the newest batch; one takes its errors alone.

    Example:
        >>> from guides.inference import PredictiveCoding
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
        >>> program = LearnedPrecision(model, {"x": "full"}, floor=1e-3)
        >>> pc = PredictiveCoding(program, pyro.optim.SGD({"lr": 0.1}), num_steps=5)
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> program.update(pc, x)
        >>> program.covariance["x"]
        tensor([[1.0000, 0.5000],
                [0.5000, 0.5000]])
    """

    def __init__(
        self,
        model: Program,
        sites: Mapping[str, str],
        *,
        floor: float | None = None,
        rate: float = 1.0,
    ) -> None:
        if floor is None or not floor > 0:
            raise ValueError(
                f"Learned precision needs a floor, got floor={floor}: where latents are free, "
                "errors and their covariance shrink each other to zero. Pass floor=, the smallest "
                "variance that the data can have, for example 1e-3 times theirs."
            )
        for name, kind in sites.items():
            if kind not in _KINDS:
                raise ValueError(
                    f'The covariance of site {name!r} must be "diagonal" or "full", got {kind!r}.'
                )
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}.")
        self.model = model
        self.sites = dict(sites)
        self.floor = floor
        self.rate = rate
        self.covariance: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the learned covariances."""
        handler = _Covariances(self)
        with handler:
            result = self.model(*args, **kwargs)
        absent = [name for name in self.sites if name not in handler.seen]
        if absent:
            raise ValueError(
                f"The program has no site {absent[0]!r} to learn a covariance of. Its sites: "
                f"{', '.join(handler.seen)}."
            )
        return result

    def update(
        self, pc: PredictiveCoding, *args: Any, laplace: bool = False, **kwargs: Any
    ) -> None:
        """Learn the covariances from the errors of a batch, where a loop relaxes to.

        Args:
            pc: A loop on this program.
            *args: Positional arguments of the model.
            laplace: Add the part of the errors' second moment that the latents' Laplace
                covariance implies: expectation maximization, which does not collapse.
            **kwargs: Keyword arguments of the model.
        """
        log_joint = LogJoint(self, args, kwargs, data_plate=pc.data_plate)
        read = log_joint.layout

        def errors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            terms = log_joint.run(values, density=False)
            return {name: _rows(terms, name) for name in self.sites}

        with torch.no_grad():
            if not laplace:
                moments = {k: _moment(e) for k, e in errors(pc.infer(*args, **kwargs)).items()}
            elif read.group("global") is not None:
                raise NotImplementedError(
                    "The Laplace term of learned precision is for programs whose latents are all "
                    "in the data plate. Pass laplace=False and a floor that means something, or "
                    "move the global latents to parameters."
                )
            else:
                posterior = pc.posterior(*args, **kwargs)
                loc, tril = posterior.loc_data, posterior.tril_data
                # Points of a cubature rule: exact where errors are linear in the latents.
                size = loc.shape[-1]
                points = [
                    errors(read.constrain({"data": loc + sign * math.sqrt(size) * tril[..., k]}))
                    for k in range(size)
                    for sign in (1.0, -1.0)
                ]
                moments = {
                    name: torch.stack([_moment(point[name]) for point in points]).mean(0)
                    for name in self.sites
                }
            for name, moment in moments.items():
                self._learn(name, moment)

    def _learn(self, name: str, moment: Tensor) -> None:
        mixed = torch.lerp(self.covariance[name], moment, self.rate)
        if self.sites[name] == "diagonal":
            mixed = mixed.diagonal().clamp_min(self.floor).diag()
        else:
            values, vectors = torch.linalg.eigh(mixed)
            mixed = (vectors * values.clamp_min(self.floor)) @ vectors.mT
        # In place: programs that were captured hold this tensor.
        self.covariance[name].copy_(mixed)


class _Covariances(Messenger):
    def __init__(self, learned: LearnedPrecision) -> None:
        super().__init__()
        self.learned = learned
        self.seen: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        self.seen.append(name)
        kind = self.learned.sites.get(name)
        if kind is None:
            return
        base = unwrap(fn)
        if type(base).__name__ not in ("Normal", "MultivariateNormal") or fn.event_dim > 1:
            raise NotImplementedError(
                f"Site {name!r} ({type(base).__name__}, {fn.event_dim} event dimensions) has no "
                "covariance to learn: only Normal and MultivariateNormal sites with at most one "
                "event dimension do."
            )
        if isinstance(msg["mask"], Tensor) or msg["mask"] is False or is_masked(fn):
            raise NotImplementedError(
                f"Site {name!r} is masked, and errors that its mask leaves out would count in the "
                "covariance. Call the model with the rows that are there, or take the site out of "
                "sites=."
            )
        size = fn.event_shape[0] if fn.event_dim else 1
        known = self.learned.covariance
        if name not in known:
            variance = fn.variance.detach().reshape(-1, size).mean(0)
            known[name] = variance.clamp_min(self.learned.floor).diag()
        loc = base.loc.expand(fn.batch_shape + fn.event_shape)
        if not fn.event_dim:
            msg["fn"] = dist.Normal(loc, known[name].reshape(()).sqrt())
        elif kind == "diagonal":
            msg["fn"] = dist.Normal(loc, known[name].diagonal().sqrt()).to_event(1)
        else:
            msg["fn"] = dist.MultivariateNormal(loc, known[name])


def _rows(terms: SiteTerms, name: str) -> Tensor:
    fn = terms.fns[name]
    error = terms.values[name] - location_scale.location(fn)
    return error.reshape(-1, fn.event_shape[0] if fn.event_dim else 1)


def _moment(error: Tensor) -> Tensor:
    return error.mT @ error / len(error)


class CollapseGuard:
    """Warns once where a scale that is learned with point estimates runs to zero.

    With free latents the joint density has no maximum in the scale: errors and scale shrink each
    other, and the energy goes to minus infinity.
    """

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.warned: set[str] = set()

    def check(self, terms: SiteTerms) -> None:
        """Compare the scales of a learning step with those of the first one.

        Args:
            terms: The run whose energy the parameters descend.
        """
        if is_capturing():
            return
        for name in terms.terms:
            fn = terms.fns[name]
            if not location_scale.is_location_scale(fn) or name in self.warned:
                continue
            base = unwrap(fn)
            scale = base.scale_tril if hasattr(base, "scale_tril") else base.scale
            if not scale.requires_grad:
                continue
            scale = scale.diagonal(dim1=-2, dim2=-1) if hasattr(base, "scale_tril") else scale
            smallest = float(scale.detach().min())
            if smallest >= _COLLAPSED * self.first.setdefault(name, smallest):
                continue
            self.warned.add(name)
            warnings.warn(
                f"The scale of site {name!r} collapses: {smallest:.3g}, from "
                f"{self.first[name]:.3g} at the first step{_parameters(scale)}. Learned with "
                "point estimates of the latents it has no optimum above zero. Give it a floor "
                "(floor + softplus(raw), or LearnedPrecision(..., floor=)), or learn with the "
                "posterior's spread: a Laplace-corrected or a Langevin loop.",
                UserWarning,
                stacklevel=3,
            )


def _parameters(scale: Tensor) -> str:
    """The parameters that a scale comes from."""
    known = dict(pyro.get_param_store().named_parameters())
    leaves = {name: value for name, value in known.items() if value.requires_grad}
    if not leaves:
        return ""
    found = torch.autograd.grad(
        scale.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
    )
    names = [name for name, grad in zip(leaves, found, strict=True) if grad is not None]
    return f" (parameter {', '.join(names)})" if names else ""

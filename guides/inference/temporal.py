"""Predictive coding over time: a state relaxes to its prediction and its data, step after step.

    for t = 1 .. T:
        m_t = F(u_{t-1}, 0)                       what the program predicts from the last point
        u_t = argmin_u E_t(u)                     E_t = -log p(x_t | u) - log p(u | prediction)
    theta <- theta - optim(d sum_t E_t / dtheta at the final u)

The precision of the prediction makes the filter:

    "fixed"    the program's own p(z_t | z_{t-1}): the point is taken for the truth     plain
    "learned"  one covariance S for all steps, a parameter
    "riccati"  S_t = A P_{t-1} A' + G G',  P_t = (S_t^-1 + H_t)^-1,  H_t at the prediction
    "steady"   the limit of that recursion, for programs that are linear and do not change
    "laplace"  S_t as before,  P_t^-1 = the curvature of E_t at its minimum            extended

A = dF/du_{t-1} and G = dF/de at the last point, H_t the Gauss-Newton curvature of the data. On
linear Gaussian programs ``"riccati"`` and ``"laplace"`` are the Kalman filter, ``"steady"`` is its
steady state; with ``hessian="gauss_newton"`` ``"laplace"`` is the iterated extended Kalman filter.
All but ``"fixed"`` need programs of one lag, ``p(z_t | z_{t-1})`` and ``p(x_t | z_t)``, either
given earlier data as well; others, ``zoo.VRNN`` among them, are refused.

The step before enters as a point, and its data with it: learning is local in time. For the
posterior of the whole window, p(z_1 .. z_T | x_1 .. x_T), relax all states at once, with
:class:`guides.inference.PredictiveCoding` on the same program: on linear Gaussian programs that is
the Rauch-Tung-Striebel smoother.

References:
    | Predictive coding networks for temporal prediction (Millidge, Tang, Osanlouy, Harper &
    | Bogacz, 2024) https://doi.org/10.1371/journal.pcbi.1011183

    | The iterated Kalman filter update as a Gauss-Newton method (Bell & Cathey, 1993)
    | https://doi.org/10.1109/9.250476
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.optim
import pyro.poutine as poutine
import torch
from pyro.infer.util import zero_grads
from torch import Tensor
from torch.distributions import constraints

from guides.energy import LogJoint
from guides.inference import solvers
from guides.inference.checks import capture, check_ownership, check_program, warn_frozen
from guides.inference.curvature import check_kinks, hessian
from guides.inference.filtered import FilteredPosterior
from guides.inference.newton import newton
from guides.inference.precision import CollapseGuard
from guides.inference.relaxation import relax
from guides.inference.running import Runs
from guides.inference.solvers.solver import Solver, check_solver
from guides.inference.temporal_evidence import curvature_factor, laplace_evidence
from guides.inference.temporal_riccati import stationary
from guides.inference.temporal_step import (
    Carried,
    Sequential,
    StepJoint,
    check_lags,
    linearize,
    predict,
)
from guides.layout import layout
from guides.probe import Program, probe
from guides.sequences.steps import read_steps
from guides.sequences.window import Structure, check_windows, step_terms, structure

__all__ = ["PRECISIONS", "Beliefs", "TemporalPredictiveCoding"]

PRECISIONS = ("fixed", "learned", "riccati", "steady", "laplace")

_COUNTER = itertools.count()


@dataclass(frozen=True)
class Beliefs:
    """What a filter believes at every step, in packed, unconstrained latents.

    At steps that a mask takes from a row it goes on predicting: with ``precision="fixed"`` the
    covariance there is that of the program's own noise, ``G G'``; the identity for latents that
    are not Gaussian, whose noise has no covariance in unconstrained space.

    Args:
        mean: Of u_t given the data up to and with step t, ``(B, T, K)``.
        covariance: ``(B, T, K, K)``.
        predicted_mean: Of u_t given the data before step t, ``(B, T, K)``.
        predicted_covariance: ``(B, T, K, K)``; None where the program's own density predicts.
    """

    mean: Tensor
    covariance: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor | None


@dataclass(frozen=True)
class _Settled:
    """One step after its relaxation."""

    u: Tensor
    joint: StepJoint
    covariance: Tensor | None
    loss: Tensor | None  # (B,)


class TemporalPredictiveCoding(Runs):
    """Predictive coding over time, as a loop with SVI's interface.

    Args:
        model: Any Pyro program whose steps :mod:`guides.sequences.steps` can read: continuous
            latents in the data plate, none outside of it. One row of the plate is one sequence.
            Latents that read those of more than one step, and data that read latents of another
            step than their own, need ``precision="fixed"``.
        optim: A ``PyroOptim`` for the model's parameters.
        precision: Of the predictions, one of those above; or a matrix ``(K, K)``, which holds
            from the second step on. With the inverse of the *predicted* covariance that is the
            steady Kalman filter (of a random walk with unit noise 1/1.618, not 1).
        num_steps: Updates of the latents of a step; Newton's method ends before where it can.
        step_size: See :class:`~guides.inference.PredictiveCoding`.
        solver: ``"newton"`` relaxes to the minimum; a key of
            :data:`guides.inference.solvers.SOLVERS`, or a solver, makes ``num_steps`` updates
            from the prediction.
        hessian: ``"exact"`` or ``"gauss_newton"``: curvature at the minimum, which is the
            precision of a belief, and what ``"laplace"`` carries. ``"riccati"`` and ``"steady"``
            carry Gauss-Newton matrices whichever it is.
        evidence: Learn from the Laplace evidence of each step, ``E_t + 1/2 log det`` of its
            curvature, in place of the energy ``E_t`` alone, which drives covariances that are
            learned to zero. By default wherever the precision is not ``"fixed"`` or a matrix.
        jacobian: Relax in unconstrained space with the log-determinants of the maps to the
            supports.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the learned covariance in Pyro's store; unique by default.

    Attributes:
        gradient_evaluations: Gradients of one row's step so far, Hessian products counted twice.
        frozen: Trainable parameters of the model that got no gradient at the first step.

    Example:
        >>> import pyro.distributions as dist
        >>> def walk(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = torch.zeros(len(x))
        ...         for t in pyro.markov(range(x.shape[1])):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> x = torch.tensor([[0.0, 1.0]])
        >>> plain = TemporalPredictiveCoding(walk, pyro.optim.SGD({"lr": 0.1}))
        >>> plain.infer(x)["z_1"]  # 1 / (1 + 1)
        tensor([0.5000])
        >>> optim = pyro.optim.SGD({"lr": 0.1})
        >>> kalman = TemporalPredictiveCoding(walk, optim, precision="riccati")
        >>> kalman.infer(x)["z_1"]  # 1.5 / (1.5 + 1)
        tensor([0.6000])
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        *,
        precision: str | Tensor = "fixed",
        num_steps: int = 20,
        step_size: float | str = "auto",
        solver: str | Solver = "newton",
        hessian: str = "exact",
        evidence: bool | None = None,
        jacobian: bool = True,
        data_plate: str | None = "auto",
        name: str | None = None,
    ) -> None:
        check_program("TemporalPredictiveCoding(model, optim)", model, optim)
        if num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {num_steps}.")
        if hessian not in ("exact", "gauss_newton"):
            raise ValueError(f'hessian must be "exact" or "gauss_newton", got {hessian!r}.')
        if solver != "newton":
            check_solver(solver, step_size)
        elif step_size != "auto":
            raise ValueError(
                f"Newton's method finds its steps itself, got step_size={step_size!r}. Leave it "
                'out, or pass solver="gradient", which makes steps of that size.'
            )
        self.fixed_covariance = _inverse(precision) if isinstance(precision, Tensor) else None
        self.precision = precision if isinstance(precision, str) else "matrix"
        if self.fixed_covariance is None and self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be a matrix or one of {', '.join(PRECISIONS)}, got {precision!r}."
            )
        if evidence is None:
            evidence = self.precision not in ("fixed", "matrix")
        if evidence and not jacobian:
            raise ValueError(
                "evidence=True needs jacobian=True: an evidence is an integral over unconstrained "
                "space, whose density has the log-determinants."
            )
        if self.precision == "learned" and not evidence:
            raise ValueError(
                'precision="learned" needs evidence=True: relaxed errors and their covariance '
                "shrink each other, and the energy alone has no minimum above zero."
            )
        self.model = model
        self.optim = optim
        self.num_steps = num_steps
        self.step_size = step_size
        self.solver = solver
        self.hessian = hessian
        self.evidence = evidence
        self.jacobian = jacobian
        self.data_plate = data_plate
        self.name = f"temporal_{next(_COUNTER)}" if name is None else name
        # What a resumed run calls, beside the model, so that all its parameters are there.
        self.guide = self._register if self.precision == "learned" else None
        self.gradient_evaluations = 0
        self.frozen: list[str] = []
        self._steps = 0
        self._checked = False
        self._structures: set[Structure] = set()
        self._guard = CollapseGuard()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Filter, then update the parameters at the final states.

        Returns:
            The loss before the update, of all N rows, in nats; lower is better. Without
            ``evidence`` it is the sum of the energies of all steps, with ``precision="fixed"``
            -log p(x, z) at the filtered states: no bound on -log p(x). With it, it approximates
            -log p(x): exactly, on linear Gaussian programs with ``"riccati"`` or ``"laplace"``.

        Raises:
            IndefiniteHessianError: With it, where the energy of a step is not convex.
            KinkError: With it, where the energy of a step has a kink at its minimum.
        """
        with poutine.trace(param_only=True) as trace:
            loss = self._loss(self._read(args, kwargs))
        sites: list[Any] = list(trace.trace.nodes.values())
        params = {site["value"].unconstrained() for site in sites}
        params = {parameter for parameter in params if parameter.requires_grad}
        learning: set[Tensor] = set()
        if params and loss.requires_grad:
            loss.backward()
            learning = {parameter for parameter in params if parameter.grad is not None}
        if self._steps == 0:
            self.frozen = warn_frozen(self.model, learning)
        if learning:
            self.optim(list(learning))
            zero_grads(learning)
        self._steps += 1
        return float(loss.detach())

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss after a pass of the filter, as :meth:`step` returns it; changes nothing."""
        return float(self._loss(self._read(args, kwargs)).detach())

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Filter the sequences of a call.

        Returns:
            Constrained values by site, detached: each given the data up to its step.
        """
        call = self._read(args, kwargs)
        settled = self._sweep(call)
        return call.values({t: step.u for t, step in enumerate(settled)})

    def filter(self, *args: Any, **kwargs: Any) -> Beliefs:
        """Filter the sequences of a call, with the covariances of all beliefs.

        Raises:
            IndefiniteHessianError: Where the energy of a step is not convex at its minimum.
            KinkError: Where it has a kink there, and the Hessian is not Gauss-Newton.
        """
        return self._beliefs(self._read(args, kwargs))

    def log_evidence(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log evidence of the rows by prediction errors, ``(B,)``; detached.

            sum_t log p(x_t | x_<t),  each by Laplace's method from the carried prediction

        Exact on linear Gaussian programs with ``"riccati"`` or ``"laplace"``, an approximation
        elsewhere; with ``"fixed"``, where points stand for what came before, no good one.

        Raises:
            ValueError: With ``jacobian=False``.
            IndefiniteHessianError: Where the energy of a step is not convex at its minimum.
            KinkError: Where it has a kink there.
        """
        if not self.jacobian:
            raise ValueError(
                "log_evidence needs jacobian=True: an evidence is an integral over unconstrained "
                "space, whose density has the log-determinants."
            )
        settled = self._sweep(self._read(args, kwargs), learning=True, evidence=True)
        return (
            -torch.stack([step.loss for step in settled if step.loss is not None]).sum(0).detach()
        )

    def posterior(self, *args: Any, **kwargs: Any) -> FilteredPosterior:
        """The beliefs as a guide for the rows of this call, side by side: no smoother."""
        call = self._read(args, kwargs)
        beliefs = self._beliefs(call)
        return FilteredPosterior(
            self.model, args, kwargs, call.read, call.steps, beliefs.mean, beliefs.covariance
        )

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters."""
        return {"steps": self._steps, "gradient_evaluations": self.gradient_evaluations}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        self._steps = state["steps"]
        self.gradient_evaluations = state["gradient_evaluations"]

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequential:
        first = not self._checked
        read = layout(self.model, args, kwargs, data_plate=self.data_plate, check=first)
        if fresh := read.fresh_indices():
            read = layout(self.model, args, kwargs, data_plate=self.data_plate, indices=fresh)
        above = read.group("global")
        if above is not None:
            raise NotImplementedError(
                f"A filter carries states of rows, but site {above.sites[0].name!r} is outside "
                "the data plate. Make it a parameter (pyro.param), clamp it "
                "(guides.inference.given.Given), or relax the whole window with PredictiveCoding."
            )
        steps = tuple(read_steps(read))
        terms = step_terms(self.model, args, kwargs, read, steps)
        call = Sequential(self.model, args, kwargs, read, steps, tuple(terms))
        if first:
            self._check(call)
            self._checked = True
        shape = structure(steps)
        if shape not in self._structures:
            check_windows(self.model, args, kwargs, read, steps, terms)
            if self.precision != "fixed":
                check_lags(call)
            self._structures.add(shape)
        return call

    def _check(self, call: Sequential) -> None:
        used = {"model": capture(self.model, call.args, call.kwargs)}
        check_ownership({"model": self.model}, used)
        log_joint = LogJoint(self.model, call.args, call.kwargs, layout=call.read)
        values = log_joint.predictions()
        with torch.no_grad():
            log_joint.run(values, validate=True)
        log_joint.check_rows(call.read.pack(values), jacobian=self.jacobian)
        self._check_latents(call)

    def _check_latents(self, call: Sequential) -> None:
        """Raise for what a carried prediction, or a step as a whole, would lose silently."""
        plate = call.read.data_plate
        assert plate is not None
        sites = probe(self.model, call.args, call.kwargs, call.read.indices, None).sites
        for name in call.read.sites:
            scale = torch.as_tensor(sites[name]["scale"]) / plate.scale
            if self.precision != "fixed" and not torch.allclose(scale, torch.ones_like(scale)):
                raise NotImplementedError(
                    f"Site {name!r} is scaled (pyro.poutine.scale), and a carried prediction "
                    'takes the place of its density. Pass precision="fixed", or take the scale '
                    "away."
                )

    def _loss(self, call: Sequential) -> Tensor:
        """The loss of all rows, differentiable in the parameters."""
        scale = call.read.scale
        if self.precision == "fixed" and not self.evidence:
            states = {t: step.u for t, step in enumerate(self._sweep(call))}
            log_joint = LogJoint(call.model, call.args, call.kwargs, layout=call.read)
            # A fresh run at the final states, for all steps at once.
            terms = log_joint.run(call.values(states), expose_params=True)
            self._guard.check(terms)
            rows, other = terms.total()
            if self.jacobian:
                for t, u in states.items():
                    rows = rows + _log_dets(call, t, u)
            return -log_joint.total(rows, other)
        settled = self._sweep(call, learning=True, evidence=self.evidence)
        rows = torch.stack([step.loss for step in settled if step.loss is not None]).sum(0)
        return scale * rows.sum()

    def _beliefs(self, call: Sequential) -> Beliefs:
        settled = self._sweep(call, covariances=True)
        carried = [step.joint.carried for step in settled]
        return Beliefs(
            torch.stack([step.u for step in settled], 1),
            torch.stack([step.covariance for step in settled if step.covariance is not None], 1),
            torch.stack([step.joint.start for step in settled], 1),
            torch.stack([c.covariance for c in carried if c is not None], 1)
            if all(c is not None for c in carried)
            else None,
        )

    def _sweep(
        self,
        call: Sequential,
        *,
        learning: bool = False,
        evidence: bool = False,
        covariances: bool = False,
    ) -> list[_Settled]:
        """Relax one step after the other.

        Args:
            call: The call.
            learning: Also take the loss of every step, differentiable in the parameters.
            evidence: Whether that is the Laplace evidence.
            covariances: Also take the covariances of beliefs that are not carried.
        """
        carries = self.precision in ("riccati", "steady", "laplace")
        states: dict[int, Tensor] = {}
        settled: list[_Settled] = []
        covariance = None
        limit = stationary(call) if self.precision == "steady" and len(call.steps) > 1 else None
        for t in range(len(call.steps)):
            with torch.set_grad_enabled(learning):
                carried = self._carried(call, t, states, covariance if limit is None else limit)
            fixed = None if carried is None else _detached(carried)
            joint = call.joint(t, states, fixed)
            u = self._relax(joint)
            if carries or covariances:
                covariance = self._covariance(joint, u)
                if joint.carried is None:
                    covariance = _predicted_where_missing(call, t, states, covariance)
            loss = None
            if learning:
                with torch.enable_grad():
                    joint.carried = carried
                    if evidence:
                        loss = -laplace_evidence(joint, u)
                        self.gradient_evaluations += 4 * u.shape[-1] * joint.layout.num_rows
                    else:
                        point = {"data": u}
                        found = joint.packed(point, jacobian=self.jacobian, expose_params=True)
                        loss = -found[0]
                joint.carried = fixed
            settled.append(_Settled(u, joint, covariance, loss))
            states[t] = u
        return settled

    def _carried(
        self, call: Sequential, t: int, states: Mapping[int, Tensor], covariance: Tensor | None
    ) -> Carried | None:
        """The prediction of a step, from the belief about the step before."""
        if self.precision == "fixed":
            return None
        if t and self.precision in ("learned", "matrix"):
            shared = self._shared(call)
            mean = predict(call, t, states)
            if shared.shape[-1] != mean.shape[-1]:
                raise ValueError(
                    f"precision must be a matrix of the {mean.shape[-1]} latent coordinates of a "
                    f"step, got one of {shared.shape[-1]}."
                )
            return Carried(mean, shared.to(mean).expand(*mean.shape, -1))
        mean, slope, noise = linearize(call, t, states)
        total = noise @ noise.mT
        if slope is not None and covariance is not None:
            total = total + slope @ covariance.detach().to(slope) @ slope.mT
        return Carried(mean, total)

    def _shared(self, call: Sequential) -> Tensor:
        """The covariance of all predictions after the first."""
        if self.fixed_covariance is not None:
            return self.fixed_covariance
        key = f"{self.name}.prediction_scale_tril"
        if key in pyro.get_param_store():
            tril = pyro.param(key)
        else:
            # The program's own noise, where learning begins at the plain filter.
            with torch.no_grad():
                start = {0: predict(call, 0, {})}
                _, _, noise = linearize(call, 1, start)
                first = torch.linalg.cholesky((noise @ noise.mT).mean(0))
            tril = pyro.param(key, first, constraint=constraints.lower_cholesky)
        return tril @ tril.mT

    def _register(self, *args: Any, **kwargs: Any) -> None:
        """Put the learned covariance into the store."""
        call = self._read(args, kwargs)
        if len(call.steps) > 1:
            self._shared(call)

    def _relax(self, joint: StepJoint) -> Tensor:
        start = {"data": joint.start}
        if self.solver == "newton":
            packed, count = newton(joint, start, num_steps=self.num_steps, jacobian=self.jacobian)
            self.gradient_evaluations += count * joint.layout.num_rows
            return packed["data"]
        relaxed = relax(
            joint,
            start,
            num_steps=self.num_steps,
            step_size=self.step_size,
            jacobian=self.jacobian,
            solver=solvers.make(self.solver),
        )
        self.gradient_evaluations += relaxed.row_gradients
        return relaxed.packed["data"]

    def _covariance(self, joint: StepJoint, u: Tensor) -> Tensor:
        """The covariance of the belief about a step, ``(B, K, K)``."""
        kind = self.hessian if self.precision not in ("riccati", "steady") else "gauss_newton"
        point = joint.start if self.precision in ("riccati", "steady") else u
        plain = LogJoint(joint.model, joint.args, joint.kwargs, layout=joint.layout)
        packed = {"data": point}
        blocks = hessian(plain, packed, jacobian=self.jacobian, kind=kind)
        if kind == "exact":
            check_kinks(plain, packed, blocks)
        self.gradient_evaluations += 2 * u.shape[-1] * joint.layout.num_rows
        found = blocks["local"]
        if joint.carried is not None:
            found = found + torch.cholesky_inverse(torch.linalg.cholesky(joint.carried.covariance))
        elif joint.on is not None:
            eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
            found = torch.where(joint.on[:, None, None], found, eye)
        way = 'hessian="gauss_newton", which is positive definite'
        factor = curvature_factor(joint, found, way)
        return torch.cholesky_inverse(factor)

    def __repr__(self) -> str:
        """The filter, and what it learns from."""
        solver = self.solver if isinstance(self.solver, str) else repr(self.solver)
        loss = "evidence" if self.evidence else "energy"
        return (
            f"TemporalPredictiveCoding(precision={self.precision}, {solver}, "
            f"num_steps={self.num_steps}, hessian={self.hessian}, loss: {loss})"
        )


def _inverse(precision: Tensor) -> Tensor:
    if precision.dim() != 2 or precision.shape[0] != precision.shape[1]:
        raise ValueError(
            "A precision of predictions must be a square matrix over the latent coordinates of a "
            f"step, got shape {tuple(precision.shape)}. For a number pass it as [[number]]."
        )
    matrix = precision.detach()
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not torch.allclose(matrix, matrix.mT):
        raise ValueError(
            "A precision of predictions must be symmetric and positive definite. It is the "
            "inverse of the covariance with which states are predicted."
        )
    return torch.cholesky_inverse(factor)


def _predicted_where_missing(
    call: Sequential, t: int, states: Mapping[int, Tensor], covariance: Tensor
) -> Tensor:
    """Covariances of beliefs, that of the program's own noise in rows without the step."""
    mask = call.steps[t].mask
    if mask is None or bool(mask.all()) or not call.gaussian(t):
        return covariance
    _, _, noise = linearize(call, t, states)
    return torch.where(mask[:, None, None], covariance, (noise @ noise.mT).detach())


def _detached(carried: Carried) -> Carried:
    return replace(carried, mean=carried.mean.detach(), covariance=carried.covariance.detach())


def _log_dets(call: Sequential, t: int, u: Tensor) -> Tensor:
    """Log-determinants of a step's latents, zero in rows without it, ``(B,)``."""
    own = call.layout(t)
    (group,) = own.groups
    total = u.new_zeros(len(u))
    for name, value in group.unpack(group.batch(u)).items():
        log_det = own.sites[name].constrain(value)[1]
        if log_det is not None:
            total = total + own.sites[name].rows(log_det)
    return total

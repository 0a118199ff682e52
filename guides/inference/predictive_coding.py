"""Predictive coding on any Pyro program: relax the latents, then learn at the relaxed state.

    E(z) = -log p(x, z)                              the energy: no bound, no ELBO
    infer:  z <- argmin_z E by local gradient steps  (guides.inference.relaxation)
    learn:  theta <- theta - optim(dE/dtheta at the final z)

On a Gaussian chain the gradient is the textbook message passing of predictive coding: with
errors e = (z - loc) / scale**2, a latent moves by minus its own error plus the errors below it
pulled back through the prediction. Pyro's trace supplies the energy of everything else.

References:
    | Predictive coding in the visual cortex (Rao & Ballard, 1999)
    | https://doi.org/10.1038/4580

    | Predictive Coding, Variational Autoencoders, and Biological Connections (Marino, 2022)
    | https://arxiv.org/abs/2011.07464
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import pyro.optim
import pyro.poutine as poutine
import torch
from pyro.infer.util import zero_grads
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from guides.energy import LogJoint
from guides.inference.checks import check_arguments, warn_frozen
from guides.inference.given import Given
from guides.inference.laplace_guide import Laplace, laplace
from guides.inference.newton import newton
from guides.inference.precision import CollapseGuard
from guides.inference.regime import Regime, measure, warn_regime
from guides.inference.relaxing_step import RelaxingStep, holds_globals
from guides.inference.row_memory import RowMemory
from guides.inference.running import Runs
from guides.inference.site_state import SiteState, site_state
from guides.inference.solvers.auto import Choice
from guides.inference.solvers.solver import Solver
from guides.inference.units import Units
from guides.probe import Program

__all__ = ["PredictiveCoding"]


class PredictiveCoding(Runs, RelaxingStep):
    """Predictive coding as a loop with SVI's interface.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the model's parameters.
        guide: Any guide for the model; its center starts the relaxation (a guide that is not of
            this package starts it from one draw). By default latents start at what their
            parents predict.
        num_steps: Updates of the latents in a relaxation.
        step_size: Step of the latents; ``"auto"`` takes it from the curvature of each row, with
            backtracking; a number is plain gradient descent and must be below 2 / lambda_max.
        parameterization: ``"centered"`` moves the latents, the default of every solver but
            ``"auto"``; ``"noncentered"`` moves standardized errors of location-scale sites
            (``z = loc + scale * e``), which carries a change down the hierarchy in one step.
            Only the path differs, the fixed point is the same.
        solver: How latents move: a key of :data:`guides.inference.solvers.SOLVERS`, a solver with
            settings of its own, or ``"auto"``, which chooses solver and parameterization from
            the program (:mod:`guides.inference.solvers.auto`; ``repr`` says what and why).
        jacobian: Relax in unconstrained space with the log-determinants of the maps to the
            supports. Without, the energy of constrained sites is that of AutoDelta.
        data_plate: See :func:`guides.layout.layout`.
        tolerance: A row stops when its gradient is nowhere larger; the relaxation ends with the
            last one. Rows that have stopped leave the batch where the call can be sliced.
        data_args: Which arguments of the model hold rows, and their axis
            (:func:`guides.rows.data_args_of`); by default known or inferred.
        warm_start: ``"guide"`` starts at the center of ``guide``, as a guide does by itself;
            ``"last"`` starts a row where its last learning step left it, a new row by default.
            Rows are known by their numbers (``index=`` of the call); without numbers only while
            calls bring the same tensors, unchanged.
        rows_by_position: Without ``index=``, take rows as 0 to B - 1 of one data set, whatever
            tensors a call brings.
        global_rate: With a minibatch, step of the persistent global latents relative to that of
            their curvature; by default B/N, which makes an epoch one full step.
        mode: How :meth:`step` runs after the first one: ``"eager"`` traces the program at every
            update of the latents; ``"graph"`` captures the whole step, relaxation, gradients and
            optimizer, as one graph of tensor operations; ``"inductor"`` compiles that graph;
            ``"auto"`` compiles where there is a C++ compiler. What cannot be captured runs
            eagerly, and :attr:`compiled` says why.
        newton_steps: Newton steps at most that :meth:`posterior` takes from the relaxed state to
            the mode; 0 for none.

    Attributes:
        gradient_evaluations: Gradients of one row's log joint so far, Hessian products counted
            twice.
        num_products: Gradients and Hessian products of relaxations so far, each counted once for
            all rows of a call.
        frozen: Trainable parameters of the model that got no gradient at the first step.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> pc = PredictiveCoding(model, pyro.optim.Adam({"lr": 0.01}), num_steps=50)
        >>> pc.infer(torch.tensor([0.0, 2.0]))["z"].round(decimals=4)
        tensor([0., 1.])
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Callable[..., Any] | None = None,
        num_steps: int = 20,
        step_size: float | str = "auto",
        parameterization: str = "auto",
        solver: str | Solver = "gradient",
        jacobian: bool = True,
        *,
        data_plate: str | None = "auto",
        tolerance: float = 0.0,
        data_args: Mapping[str, int] | None = None,
        warm_start: str | None = None,
        rows_by_position: bool = False,
        global_rate: float | None = None,
        newton_steps: int = 20,
        mode: str = "eager",
    ) -> None:
        check_arguments(
            model,
            optim,
            guide,
            num_steps,
            step_size,
            parameterization,
            solver,
            warm_start,
            newton_steps,
            global_rate,
        )
        self.model = model
        self.optim = optim
        self.guide = guide
        self.num_steps = num_steps
        self.step_size = step_size
        self.solver = solver
        if parameterization == "auto" and solver != "auto":
            parameterization = "centered"
        self.parameterization = parameterization
        self.jacobian = jacobian
        self.data_plate = data_plate
        self.tolerance = tolerance
        self.data_args = data_args
        self.warm_start = warm_start
        self.rows_by_position = rows_by_position
        self.num_products = 0
        self.global_rate = global_rate
        self.newton_steps = newton_steps
        self.gradient_evaluations = 0
        self.frozen: list[str] = []
        self._globals: dict[str, Tensor] | None = None
        self._curvature: dict[str, Tensor] | None = None
        self._steps = 0
        self._checked: set[tuple[str, ...]] = set()
        self._chosen: Choice | None = None
        self._memory = RowMemory()
        self._regime: Regime | None = None
        self._guard = CollapseGuard()
        self._set_mode(mode)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Relax, then update the model's parameters at the relaxed state.

        Global latents keep their relaxed values for the next step. With a minibatch they are held
        while the rows relax, and then take one gradient step: relaxing them to every minibatch
        would lead to an average of minibatch modes, which is not the mode of all rows.

        Returns:
            The energy at the relaxed state before the update, of all N rows, in nats; lower is
            better: -log p(x, z), minus log|dz/du| of constrained sites with ``jacobian=True``. It
            is no bound on -log p(x) and cannot be compared with an ELBO.
        """
        if self.mode != "eager" and self._steps and not _PYRO_STACK:
            found = self._compiled_step(args, kwargs)
            if found is not None:
                return found
        log_joint = self._log_joint(args, kwargs)
        energy, learning = self._learn(log_joint, lambda: self._outcome(log_joint))
        if self._steps == 0:
            self.frozen = self._frozen(learning)
        self._steps += 1
        return float(energy)

    def _frozen(self, learning: set[Tensor]) -> list[str]:
        """Names of trainable parameters that got no gradient; warns where there are any."""
        return warn_frozen(self.model, learning)

    def _learn(
        self, log_joint: LogJoint, outcome: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, set[Tensor]]:
        """One update of the parameters by a loss: what stands beside it, and what moved."""
        with poutine.trace(param_only=True) as trace:
            beside, loss = outcome()
        nodes: Any = trace.trace.nodes
        params = {site["value"].unconstrained() for site in nodes.values()}
        params = {parameter for parameter in params if parameter.requires_grad}
        learning: set[Tensor] = set()
        if params and loss.requires_grad:
            loss.backward()
            self.gradient_evaluations += max(1, log_joint.layout.num_rows)
            learning = {parameter for parameter in params if parameter.grad is not None}
        if learning:
            self.optim(list(learning))
            zero_grads(learning)
        return beside, learning

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """Relax and keep the globals: the energy there, and the loss to learn from."""
        hold = holds_globals(log_joint)
        values, relaxed = self._relax(log_joint, learning=True, hold_globals=hold)
        with torch.enable_grad():
            loss = self._loss(log_joint, values)
        self._keep_globals(log_joint, self._moved_globals(log_joint, relaxed) if hold else values)
        return relaxed.energy.sum() * log_joint.layout.scale + relaxed.energy_global, loss

    def _loss(self, log_joint: LogJoint, values: Mapping[str, Tensor]) -> Tensor:
        """The energy of the final values, which the parameters descend.

        A fresh run of the program: the last gradient of the relaxation is that of the state
        before its last update.
        """
        terms = log_joint.run(values, expose_params=True)
        self._guard.check(terms)
        rows, other = terms.total()
        return -log_joint.total(rows, other)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The energy after a relaxation, as :meth:`step` returns it; changes nothing."""
        log_joint = self._log_joint(args, kwargs)
        _, relaxed = self._relax(log_joint, hold_globals=holds_globals(log_joint))
        return float(relaxed.energy.sum() * log_joint.layout.scale + relaxed.energy_global)

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Relax the latents of a call.

        Returns:
            Constrained values by site, detached. Global latents start from their persistent
            values, which are not changed.
        """
        log_joint = self._log_joint(args, kwargs)
        values = self._relax(log_joint)[0]
        if isinstance(self.model, Given) and (names := self.model.completed(values)):
            with torch.no_grad():
                terms = log_joint.run(values, density=False)
            values |= {name: terms.values[name].detach() for name in names}
        return values

    def given(
        self,
        *,
        clamp: Mapping[str, Tensor] | None = None,
        release: Collection[str] = (),
        missing: Collection[str] = (),
        gain: Mapping[str, Tensor | float] | None = None,
    ) -> Self:
        """The same loop on the same program with other sites known.

        It shares the parameters, not the state: its gradient evaluations are its own. Its guide,
        which was made for the latents of the program, does not start its relaxations.

        Args:
            clamp: Values of latents that are known, by site.
            release: Observed sites that are latent now: to generate, or to classify.
            missing: Observed sites whose NaN entries are inferred; :meth:`infer` returns the
                completed site beside its latents.
            gain: Factors of the precision of a site's errors: attention.

        Returns:
            A loop for ``infer``, ``posterior``, ``inspect`` and ``step``.
        """
        program = Given(self.model, clamp=clamp, release=release, missing=missing, gain=gain)
        loop = copy.copy(self)
        loop.model, loop.guide = program, None
        loop._globals, loop._curvature, loop._steps = None, None, 0
        loop._checked, loop._kinds, loop._cost = set(), {}, {}
        loop._guard, loop._memory = CollapseGuard(), RowMemory()
        loop.gradient_evaluations, loop.num_products, loop.frozen = 0, 0, []
        loop._chosen, loop._regime = None, None
        return loop

    def posterior(self, *args: Any, hessian: str = "exact", **kwargs: Any) -> Laplace:
        """Relax, go on to the mode, and take the Laplace posterior with the Hessian there.

        A Laplace posterior is one of the mode, which a relaxation of a few steps only nears:
        Newton steps (:mod:`guides.inference.newton`) take the latents there.

        Args:
            *args: Positional arguments of the model.
            hessian: ``"exact"``, ``"gauss_newton"`` (positive definite with proper priors, and
                defined at kinks) or ``"diagonal"``; the Newton steps take the same one.
            **kwargs: Keyword arguments of the model.

        Returns:
            A guide for the rows of this call. With global latents its precision has arrow form;
            from a minibatch the globals' part is an estimate, and flagged as one. Latents that a
            mask switches off count nowhere in it (:mod:`guides.inference.switched_off`); it is for
            calls with the same masks.

        Raises:
            IndefiniteHessianError: Where the relaxed state is no mode.
            KinkError: Where a site's density has a kink at the mode.
        """
        log_joint = self._log_joint(args, kwargs)
        values, _ = self._relax(log_joint)
        layout_ = log_joint.layout
        if self.newton_steps:
            packed, count = newton(
                log_joint,
                layout_.pack(values),
                num_steps=self.newton_steps,
                jacobian=self.jacobian,
                kind="gauss_newton" if hessian == "gauss_newton" else "exact",
            )
            values = layout_.constrain(packed)
            self.gradient_evaluations += count * max(1, layout_.num_rows)
        size = sum(group.size for group in layout_.groups)
        self.gradient_evaluations += 2 * size * max(1, layout_.num_rows)
        plate = None if layout_.data_plate is None else layout_.data_plate.name
        return laplace(
            self.model,
            values,
            args,
            kwargs,
            data_plate=plate,
            jacobian=self.jacobian,
            hessian=hessian,
            indices=layout_.indices,
        )

    def regime(self, *args: Any, **kwargs: Any) -> Regime:
        """How far the relaxation of a call goes, and whether its steps are stable.

        Relaxes the call once and measures; ``repr`` shows what was found last.

        Warns:
            UserWarning: Where the step is unstable, or where the relaxation hardly leaves the
                feed-forward state, so that learning there is backpropagation.
        """
        log_joint = self._log_joint(args, kwargs)
        start, moved = self._start_packed(log_joint)
        _, relaxed = self._relax(log_joint)
        units = Units(log_joint, start, jacobian=self.jacobian, noncentered=moved)
        found = measure(
            units,
            start,
            relaxed,
            None if isinstance(self.step_size, str) else float(self.step_size),
            feed_forward=self._feeds_forward(moved),
            solver=self._solver(log_joint.layout),
        )
        self.gradient_evaluations += units.counts.rows
        self._regime = found
        warn_regime(found.verdict)
        return found

    def inspect(
        self, *args: Any, values: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, SiteState]:
        """Predictions, errors and energies of every site, latent and observed.

        Args:
            *args: Positional arguments of the model.
            values: Constrained values of the latents; relaxed ones by default.
            **kwargs: Keyword arguments of the model.
        """
        log_joint = self._log_joint(args, kwargs)
        if values is None:
            values, _ = self._relax(log_joint)
        with torch.no_grad():
            terms = log_joint.run(values)
            return {name: site_state(terms, name) for name in terms.terms}

    def __repr__(self) -> str:
        """The regime of the relaxation, and which latents persist."""
        kept = "none" if self._globals is None else ", ".join(self._globals)
        solver = self.solver if isinstance(self.solver, str) else repr(self.solver)
        if self.solver == "auto" and self._chosen is not None:
            chosen = self._chosen
            solver = f"auto: {chosen.solver}, {chosen.parameterization} ({chosen.reason})"
        return (
            f"{type(self).__name__}({self.parameterization}, {solver}, "
            f"num_steps={self.num_steps}, step_size={self.step_size!r}, "
            f"jacobian={self.jacobian}, persistent latents: {kept}"
            f"{'' if self._regime is None else f'; {self._regime}'})"
        )

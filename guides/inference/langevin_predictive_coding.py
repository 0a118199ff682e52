"""Monte Carlo predictive coding: Langevin states in place of one relaxed state.

    start:  z <- argmin_z E, or z ~ q(z | x) from a guide, or where the row's chain was left
    mix:    z <- z - eta M dE/dz + sqrt(2 eta M) xi         num_mixing times, discarded
    sample: the same                                        num_samples times, kept
    learn:  theta <- theta - optim(mean over the kept states of dE/dtheta)

Learning at one point ignores how wide the posterior is: on x ~ N(w z, 1) it drives w to infinity.
At draws of the posterior the same gradient is that of the evidence, Fisher's identity. With
``sampler="ula"`` the draws are a little too wide and w lands a little too low, by a known amount;
``"mala"`` has no such bias.

References:
    | Learning probability distributions of sensory inputs with Monte Carlo predictive coding
    | (Oliviers, Bogacz & Meulemans, 2024) https://doi.org/10.1371/journal.pcbi.1012532

    | Particle algorithms for maximum likelihood training of latent variable models
    | (Kuntz, Lim & Johansen, 2023) https://arxiv.org/abs/2204.12965

    | Sample as you infer: predictive coding with Langevin dynamics
    | (Zahid, Guo & Fountas, 2023) https://arxiv.org/abs/2311.13664
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pyro.optim
import torch
from torch import Tensor

from guides.arguments import check_number
from guides.capture.steps import rng_devices
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.chain_gaussian import ChainGaussian
from guides.inference.checks import capture
from guides.inference.guide_losses import check_guide, guide_loss
from guides.inference.langevin import Chain, Metric, RunningMoment, State, langevin
from guides.inference.langevin_kernel import (
    check_finite,
    check_layout,
    check_settings,
    evaluate_chains,
    hessian_metric,
    own_metric,
)
from guides.inference.predictive_coding import PredictiveCoding
from guides.inference.relaxation import curvature, energy_function, relax
from guides.inference.row_memory import RowMemory
from guides.layout import Layout
from guides.probe import Program

__all__ = ["LangevinPredictiveCoding", "Samples"]

Packed = dict[str, Tensor]
_RELAX_STEPS = 20
_POSTERIOR_CHAINS = 8
_MOST_ADAPTED = 100  # discarded updates of a persistent chain after which MALA's step is final
_ULA_STEP = 0.1  # of 1 / lambda_max: 5 percent too wide where the posterior is narrowest


@dataclass(frozen=True)
class Samples:
    """Chains of draws.

    Args:
        values: Constrained values by site, ``(chains, draws) + site shape``, as
            ``arviz.from_dict`` takes them.
        log_p: Log joint of all rows at the draws, ``(chains, draws)``.
        acceptance: Fraction of accepted proposals, ``(chains, B)``, or ``(chains, 1)`` with
            global latents; one for the unadjusted sampler.
    """

    values: dict[str, Tensor]
    log_p: Tensor
    acceptance: Tensor


class LangevinPredictiveCoding(PredictiveCoding):
    """Predictive coding that learns at Langevin draws of the latents.

    Global latents are sampled with the rows and keep their chains from step to step. From a
    minibatch their gradient is an estimate, and their dynamics stochastic gradient Langevin, whose
    draws are wider than the posterior by the noise of that estimate; the rows never see N/B.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the parameters of the model, and of a guide that learns.
        guide: Any guide for the model. Chains start at draws from one of this package, at the
            one draw of another.
        num_steps: Updates towards the mode before a new chain starts; by default 20, and none
            with a guide. Without any, rows mix from what their parents predict, and pull global
            latents there meanwhile.
        sampler: ``"ula"``, unadjusted with a known bias
            (:func:`guides.inference.langevin.stationary_covariance`), or ``"mala"``, which
            accepts or rejects row by row and has none; its steps adapt in the first hundred
            discarded updates of a chain. For densities with kinks (Laplace) take ``"mala"``.
        step_size: eta; ``"auto"`` is 0.1 / lambda_max of each row for ``"ula"``.
        num_mixing: Updates that are discarded in every step.
        num_samples: States of a chain that a step learns at.
        num_chains: Chains of every row.
        momentum: m of underdamped dynamics, with noise scaled by 1 - m; for ``"ula"``.
        preconditioner: M of the dynamics. ``"hessian"`` is the inverse Hessian at the start;
            ``"second_moment"`` a diagonal from squared gradients of the discarded updates;
            ``"running"`` one that goes on adapting, as published, with a bias of its own; or
            tensors by group: ``(K,)`` or ``(B, K)`` for a diagonal, ``(B, K, K)`` or ``(1, K, K)``
            in the data plate and ``(K, K)`` outside it for a full matrix.
        persistent: Go on with every row's chains where the last visit left them, minibatches in
            any order; then ``num_mixing=0`` makes sense (particle gradient descent). Rows are
            known as those of ``warm_start="last"`` are.
        rows_by_position: See :class:`guides.inference.PredictiveCoding`.
        guide_loss: How the guide learns: ``"reverse_kl"`` (the negative ELBO at its own draws),
            ``"forward_kl"`` (its log density at the chains' draws), ``"jeffreys"`` (both), or
            None, not at all.
        posterior_samples: Draws of a chain that :meth:`posterior` takes the moments of.
        data_plate: See :func:`guides.layout.layout`.
        global_rate: With a minibatch, step of global latents relative to that of their
            curvature; by default B/N.
        mode: See :class:`guides.inference.PredictiveCoding`.

    Raises:
        ValueError: For settings that do not sample the posterior: momentum with ``"mala"``, a
            masked latent, ``"mala"`` for global latents of a minibatch, an optimizer in place
            of a sampler.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> _ = torch.manual_seed(0)
        >>> pc = LangevinPredictiveCoding(model, pyro.optim.Adam({"lr": 0.01}), sampler="mala")
        >>> draws = pc.samples(torch.tensor([0.0, 2.0]), num_samples=2000, num_chains=4)
        >>> draws.values["z"].shape
        torch.Size([4, 2000, 2])
        >>> draws.values["z"].mean((0, 1)).round(decimals=1).abs()  # N(x / 2, 1 / 2)
        tensor([0., 1.])
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        guide: Callable[..., Any] | None = None,
        num_steps: int | None = None,
        *,
        sampler: str = "ula",
        step_size: float | str = "auto",
        num_mixing: int = 20,
        num_samples: int = 10,
        num_chains: int = 1,
        momentum: float = 0.0,
        preconditioner: str | Mapping[str, Tensor] | None = None,
        persistent: bool = False,
        rows_by_position: bool = False,
        guide_loss: str | None = None,
        posterior_samples: int = 200,
        data_plate: str | None = "auto",
        global_rate: float | None = None,
        mode: str = "eager",
    ) -> None:
        if num_steps is None:
            num_steps = _RELAX_STEPS if guide is None else 0
        super().__init__(
            model,
            optim,
            guide,
            num_steps,
            data_plate=data_plate,
            rows_by_position=rows_by_position,
            global_rate=global_rate,
            mode=mode,
        )
        check_settings(sampler, step_size, momentum, preconditioner, num_mixing)
        check_number("num_mixing", num_mixing, integer=True, least=0)
        check_number("num_samples", num_samples, integer=True, least=1)
        check_number("num_chains", num_chains, integer=True, least=1)
        check_number("posterior_samples", posterior_samples, integer=True, least=2)
        if guide_loss is not None:
            check_guide(guide_loss, guide)
        self.sampler = sampler
        self.langevin_step = step_size
        self.num_mixing = num_mixing
        self.num_samples = num_samples
        self.num_chains = num_chains
        self.momentum = momentum
        self.preconditioner = preconditioner
        self.persistent = persistent
        self.guide_loss = guide_loss
        self.posterior_samples = posterior_samples
        self.memory = RowMemory()
        self._chains: Packed = {}
        self._rows: Packed | None = None

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        log_joint = super()._log_joint(args, kwargs)
        check_layout(log_joint.layout, self.sampler)
        return log_joint

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """Sample, and keep where the chains are: the mean energy, and the loss to learn from."""
        loaded = self._rows is not None  # by a captured step, which stores them itself
        chain = self._sample(log_joint, self._begin(log_joint, learning=True), learning=True)
        self._remember(log_joint, chain)
        if not loaded:
            self._store(log_joint)
        energy = log_joint.layout.scale * chain.rows.sum(-1) + chain.other
        with torch.enable_grad():
            loss = self._mean_loss(log_joint, chain)
            if self.guide_loss is not None:
                loss = loss + guide_loss(self.guide_loss, self.guide, log_joint, chain.draws)
        return energy.mean(), loss

    def _mean_loss(self, log_joint: LogJoint, chain: Chain) -> Tensor:
        draws = {name: value.flatten(0, 1).detach() for name, value in chain.draws.items()}
        count = self.num_samples * self.num_chains
        total = torch.zeros(())
        for i in range(count):
            values = log_joint.layout.constrain({k: v[i] for k, v in draws.items()})
            total = total + self._loss(log_joint, values)
        return total / count

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The mean energy of draws, as :meth:`step` returns it; changes nothing."""
        log_joint = self._log_joint(args, kwargs)
        chain = self._sample(log_joint, self._begin(log_joint))
        return float((log_joint.layout.scale * chain.rows.sum(-1) + chain.other).mean())

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The means of the draws in unconstrained space, mapped to the supports, by site."""
        log_joint = self._log_joint(args, kwargs)
        chain = self._sample(log_joint, self._begin(log_joint))
        means = {name: value.mean((0, 1)) for name, value in chain.draws.items()}
        return {k: v.detach() for k, v in log_joint.layout.constrain(means).items()}

    def given(self, **known: Any) -> Self:
        """See :meth:`guides.inference.PredictiveCoding.given`; the chains are new, too."""
        loop = super().given(**known)
        loop.memory, loop._chains, loop._rows = RowMemory(), {}, None
        loop.guide_loss = None
        return loop

    def samples(
        self,
        *args: Any,
        num_samples: int = 1000,
        num_chains: int = 4,
        num_mixing: int | None = None,
        **kwargs: Any,
    ) -> Samples:
        """Chains of draws from the posterior of a call, from starts far apart.

        Chains of persistent rows are not used: R-hat compares chains that knew nothing of each
        other. The unadjusted sampler's chains agree with each other at its bias, which R-hat
        cannot see; ``sampler="mala"`` has none.

        Args:
            *args: Positional arguments of the model.
            num_samples: Draws of a chain.
            num_chains: Number of chains.
            num_mixing: Updates that are discarded; by default half of ``num_samples``, and at
                least those of the loop.
            **kwargs: Keyword arguments of the model.
        """
        check_number("num_samples", num_samples, integer=True, least=1)
        check_number("num_chains", num_chains, integer=True, least=1)
        if num_mixing is None:
            num_mixing = max(self.num_mixing, num_samples // 2)
        log_joint = self._log_joint(args, kwargs)
        start = self._fresh(log_joint, num_chains, kept=False)
        chain = self._sample(log_joint, (start, {}), num_mixing, num_samples)
        read = log_joint.layout
        flat = {name: value.transpose(0, 1).flatten(0, 1) for name, value in chain.draws.items()}
        with torch.no_grad():
            values = torch.func.vmap(read.constrain)(flat)
        values = {k: v.unflatten(0, (num_chains, num_samples)) for k, v in values.items()}
        log_p = -(read.scale * chain.rows.sum(-1) + chain.other)
        return Samples(values, log_p.transpose(0, 1), chain.acceptance)

    def posterior(self, *args: Any, **kwargs: Any) -> ChainGaussian:
        """The Gaussian with the moments of new chains, eight or more, of ``posterior_samples``.

        A guide with a density, to be scored like every other; the draws themselves, which also
        know where the posterior bends, are those of :meth:`samples`.

        Raises:
            ValueError: Where a chain never moved.
        """
        log_joint = self._log_joint(args, kwargs)
        start = self._fresh(log_joint, max(self.num_chains, _POSTERIOR_CHAINS), kept=False)
        mixing = max(self.num_mixing, self.posterior_samples // 2)
        chain = self._sample(log_joint, (start, {}), mixing, self.posterior_samples)
        plate = log_joint.layout.data_plate
        name = None if plate is None else plate.name
        guide = ChainGaussian(self.model, args, kwargs, data_plate=name)
        guide.fit(chain.draws, log_joint.layout)
        return guide

    def _sample(
        self,
        log_joint: LogJoint,
        start: tuple[Packed, Packed],
        num_mixing: int | None = None,
        num_samples: int | None = None,
        *,
        learning: bool = False,
    ) -> Chain:
        """Run chains from packed latents (C, ...), with what their kernels were left with."""
        packed, left = start
        read = log_joint.layout
        evaluate = evaluate_chains(log_joint)
        with torch.no_grad():
            state = State.at(evaluate, packed, momentum=self.momentum > 0)
            check_finite(log_joint, state, "at the start of the chains")
            velocity = {k: left[f"velocity {k}"] for k in packed if f"velocity {k}" in left}
            if velocity:
                state = state._replace(velocity=velocity)
            step, metric = self._kernel(log_joint, packed, learning)
            chain = langevin(
                evaluate,
                state,
                step=step,
                num_mixing=self.num_mixing if num_mixing is None else num_mixing,
                num_samples=self.num_samples if num_samples is None else num_samples,
                sampler=self.sampler,
                momentum=self.momentum,
                metric=metric,
                factor=left.get("factor"),
                adapted=left.get("adapted"),
                most_adapted=_MOST_ADAPTED if learning else float("inf"),
                scale=read.scale,
            )
            check_finite(log_joint, chain.state, "after the last update")
        num_chains = next(iter(packed.values())).shape[0]
        self.gradient_evaluations += (1 + chain.num_gradients) * num_chains * max(1, read.num_rows)
        return chain

    def _kernel(
        self, log_joint: LogJoint, packed: Packed, learning: bool
    ) -> tuple[Packed, Mapping[str, Metric] | RunningMoment | None]:
        """Steps by group before adaptation, and the preconditioner."""
        read = log_joint.layout
        first = {name: value[0] for name, value in packed.items()}
        one = next(iter(first.values())).new_ones(1)
        found = {name: one for name in first}
        moment = self.preconditioner in ("second_moment", "running")
        if moment or (self.preconditioner is None and self.langevin_step == "auto"):
            found = self._curvatures(log_joint, first, learning)
        metric: Mapping[str, Metric] | RunningMoment | None = None
        if moment:
            metric = RunningMoment(found, moving=self.preconditioner == "running")
        elif self.preconditioner == "hessian":
            metric = hessian_metric(log_joint, first)
            self.gradient_evaluations += 2 * _size(read) * max(1, read.num_rows)
        elif isinstance(self.preconditioner, Mapping):
            metric = own_metric(self.preconditioner, read)
        if self.langevin_step == "auto":
            part = _ULA_STEP if self.sampler == "ula" else _size(read) ** (-1 / 3)
            # Two blocks of one unit can at most double each other's curvature.
            step = {name: part / (len(first) * value) for name, value in found.items()}
        else:
            step = {name: float(self.langevin_step) * one for name in first}
        if read.scale != 1.0 and "global" in step:
            rate = 1.0 / read.scale if self.global_rate is None else self.global_rate
            step["global"] = rate * step["global"]
        return step, metric

    def _curvatures(self, log_joint: LogJoint, first: Packed, learning: bool) -> Packed:
        read = log_joint.layout
        if learning:
            found = self._cached_curvature(log_joint, first, ())
        else:
            found = curvature(energy_function(log_joint, jacobian=True), first, read.scale)
            self.gradient_evaluations += 24 * len(first) * max(1, read.num_rows)
        return {name: value.clamp_min(1e-12) for name, value in found.items()}

    def _fresh(
        self, log_joint: LogJoint, num_chains: int, *, kept: bool = True, learning: bool = False
    ) -> Packed:
        """New chains: draws of a guide, or starts around one point, moved towards the mode."""
        read = log_joint.layout
        if isinstance(self.guide, ProgramGuide) and self.guide.has_density:
            with torch.no_grad():
                drawn, _, own = self.guide.rsample_packed(
                    num_chains, log_joint.args, log_joint.kwargs, read.indices
                )
                # A guide may have groups of its own, one a level.
                starts = [
                    read.pack(own.constrain({k: v[c] for k, v in drawn.items()}))
                    for c in range(num_chains)
                ]
        else:
            first = read.pack(self._start(log_joint))
            # Within 2 in every unconstrained coordinate: chains that start far apart.
            starts = [first] + [
                {k: v + 4 * (torch.rand_like(v) - 0.5) for k, v in first.items()}
                for _ in range(num_chains - 1)
            ]
        chains = self._chains.get("global") if kept else None
        if chains is not None and chains.shape[0] == num_chains:
            starts = [{**start, "global": chains[c]} for c, start in enumerate(starts)]
        elif chains is not None:
            chains = None
        if self.num_steps:
            step: Any = "auto"
            if learning:
                step = self._cached_curvature(log_joint, starts[0], ())
            hold = "global" in starts[0] and (read.scale != 1.0 or chains is not None)
            for c, start in enumerate(starts):
                relaxed = relax(
                    log_joint, start, num_steps=self.num_steps, step_size=step, hold_globals=hold
                )
                self.gradient_evaluations += relaxed.row_gradients
                starts[c] = relaxed.packed
        return {g.name: torch.stack([start[g.name] for start in starts]) for g in read.groups}

    def _begin(self, log_joint: LogJoint, *, learning: bool = False) -> tuple[Packed, Packed]:
        """Where the chains of a call go on, and what their kernels were left with."""
        read = log_joint.layout
        left = {k: v for k, v in self._chains.items() if k != "global"}
        rows = self._rows
        if rows is None and self.persistent and read.group("data") is not None:
            rows = self._gather(log_joint, learning=learning)
        if rows is not None:
            packed = {"data": rows["data"].movedim(0, 1)}
            left |= {k: v.movedim(0, 1) for k, v in rows.items() if k not in ("data", "global")}
            if "global" in self._chains:
                packed["global"] = self._chains["global"]
            elif "global" in rows:
                packed["global"] = rows["global"]
        elif read.group("data") is None and "global" in self._chains:
            packed = {"global": self._chains["global"]}
        else:
            packed = self._fresh(log_joint, self.num_chains, learning=learning)
        return {group.name: packed[group.name] for group in read.groups}, left

    def _gather(self, log_joint: LogJoint, *, learning: bool = False) -> Packed:
        """What is remembered of the rows of a call, rows first; new chains for new rows."""
        plate = log_joint.layout.data_plate
        found, known = self.memory.read(plate, self._data_of(log_joint))  # type: ignore[arg-type]
        if found and bool(known.all()):
            return found
        # A stream of their own: then a captured step draws what this one does.
        with torch.random.fork_rng(rng_devices()):
            torch.manual_seed(int(torch.randint(2**31, ())))
            fresh = self._fresh(log_joint, self.num_chains, learning=learning)
        new = {"data": fresh["data"].movedim(0, 1)}  # (B, C, K)
        rows = {}
        for name, value in {**new, **found}.items():
            first = new["data"] if name == "data" else value.new_full((), name == "factor")
            shape = (-1,) + (1,) * (value.dim() - 1)
            rows[name] = torch.where(known.reshape(shape), value, first)
        if "global" in fresh:
            rows["global"] = fresh["global"]
        return rows

    def _remember(self, log_joint: LogJoint, chain: Chain) -> None:
        """Where the chains are left: those of global latents, and of rows if they persist."""
        read, state = log_joint.layout, chain.state
        left = {"factor": chain.factor, "adapted": chain.adapted}
        left = {} if self.sampler == "ula" else left
        velocity = state.velocity or {}
        if "global" in state.packed:
            self._chains = {"global": state.packed["global"], **left}
            if velocity:
                self._chains["velocity global"] = velocity["global"]
        if self.persistent and read.group("data") is not None:
            rows = {"data": state.packed["data"]}
            if not state.joint:
                rows |= left
            if velocity:
                rows["velocity data"] = velocity["data"]
            self._rows = {k: v.movedim(0, 1) for k, v in rows.items()}

    def _store(self, log_joint: LogJoint) -> None:
        """Put the rows of a step back into the memory."""
        if self._rows is not None:
            rows = {k: v for k, v in self._rows.items() if k != "global"}
            plate: Any = log_joint.layout.data_plate
            self.memory.write(plate, rows, self._data_of(log_joint))
            self._rows = None

    def _compiled_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The step by a graph, which takes the remembered rows of the batch and returns them."""
        if not self.persistent:
            return super()._compiled_step(args, kwargs)
        with torch.random.fork_rng(rng_devices()):
            log_joint = self._log_joint(args, kwargs)
            plate = log_joint.layout.data_plate
            if plate is not None and plate.random:
                return None  # the program draws its rows inside the step
            if log_joint.layout.group("data") is not None:
                self._rows = self._gather(log_joint, learning=True)
        try:
            return super()._compiled_step(args, kwargs)
        finally:
            self._store(log_joint)

    def _touched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = super()._touched(args, kwargs)
        if self.guide is not None and self.guide_loss is not None:
            found = found | capture(self.guide, args, kwargs)
        return found

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters: chains, curvatures."""
        return super().get_state() | {
            "chains": {k: v.clone() for k, v in self._chains.items()},
            "memory": self.memory.state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        super().set_state(state)
        self._chains = {k: v.clone() for k, v in state["chains"].items()}
        self.memory.set_state(state["memory"])

    def _tensors(self) -> dict[str, Tensor]:
        rows = {} if self._rows is None else self._rows
        return (
            super()._tensors()
            | {f"chain {name}": value for name, value in self._chains.items()}
            | {f"row {name}": value for name, value in rows.items()}
        )

    def _put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        super()._put_tensors(tensors)

        def named(kind: str) -> Packed:
            return {k[len(kind) :]: v for k, v in tensors.items() if k.startswith(kind)}

        self._chains, self._rows = named("chain "), named("row ") or None

    def _settings(self) -> tuple[Any, ...]:
        own = self.preconditioner
        return (
            *super()._settings(),
            self.sampler,
            self.langevin_step,
            self.num_mixing,
            self.num_samples,
            self.num_chains,
            self.momentum,
            own if own is None or isinstance(own, str) else id(own),
            self.persistent,
            self.guide_loss,
        )

    def __repr__(self) -> str:
        """The sampler, and what persists."""
        kept = [name for name in ("global",) if name in self._chains]
        kept += ["rows"] if self.persistent else []
        return (
            f"LangevinPredictiveCoding({self.sampler}, step_size={self.langevin_step!r}, "
            f"num_mixing={self.num_mixing}, num_samples={self.num_samples}, "
            f"num_chains={self.num_chains}, persistent chains: {', '.join(kept) or 'none'})"
        )


def _size(read: Layout) -> int:
    return sum(group.size for group in read.groups)

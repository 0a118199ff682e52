"""Langevin dynamics on packed latents: samplers of exp(-E), row by row, all chains at once.

    ULA       u' = u - eta M dE/du + sqrt(2 eta) L xi                    M = L L^T, xi ~ N(0, I)
    MALA      the same proposal, accepted with probability
              min(1, exp(E(u) - E(u')) q(u | u') / q(u' | u))            exact; no bias
    momentum  v' = m v - eta M dE/du + sqrt(2 (1 - m) eta) L xi          u' = u + v'

The unadjusted samplers have a known bias. On a quadratic energy with Hessian Lambda they settle at

    covariance = [Lambda (I - eta M Lambda / (2 (1 + m)))]^-1            (stationary_covariance)

so that M = Lambda^-1 gives Lambda^-1 / (1 - eta / 2), and the step must stay below
2 (1 + m) / lambda_max(M Lambda). The factor (1 - m) of the noise is what optimizers with momentum
lack: with theirs, the covariance is 1 / (1 - m) times too wide.

Rows are independent given the global latents, so each row accepts and adapts by itself. Where
global latents move as well, everything is one unit: one energy, one decision.

References:
    | Exponential convergence of Langevin distributions (Roberts & Tweedie, 1996)
    | https://doi.org/10.2307/3318418

    | Bayesian learning via stochastic gradient Langevin dynamics (Welling & Teh, 2011)
    | https://www.stats.ox.ac.uk/~teh/research/compstats/WelTeh2011a.pdf

    | Optimal preconditioning and Fisher adaptive Langevin sampling (Titsias, 2023)
    | https://arxiv.org/abs/2305.14442
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Chain",
    "Metric",
    "RunningMoment",
    "State",
    "langevin",
    "mala",
    "stationary_covariance",
    "ula",
]

Packed = dict[str, Tensor]
Evaluate = Callable[[Packed], tuple[Packed, Tensor, Tensor]]

TARGET_ACCEPTANCE = 0.574
"""Acceptance rate at which MALA moves fastest in many dimensions (Roberts & Rosenthal, 1998)."""
_MOST_STRETCH = 10.0


class Metric(NamedTuple):
    """A preconditioner M of one group by its root, M = L L^T.

    Args:
        root: L: ``(..., K)`` for a diagonal, ``(..., K, K)`` for a full matrix.
        full: Whether it is a full matrix.
    """

    root: Tensor
    full: bool

    def scale(self, vector: Tensor) -> Tensor:
        """L times a vector ``(..., K)``."""
        if not self.full:
            return self.root * vector
        return (self.root @ vector.unsqueeze(-1)).squeeze(-1)

    def pull(self, vector: Tensor) -> Tensor:
        """The transpose of L times a vector ``(..., K)``."""
        if not self.full:
            return self.root * vector
        return (self.root.mT @ vector.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class RunningMoment:
    """A diagonal preconditioner from squared gradients: M = 1 / running mean of (dE/du)**2.

    Where a chain has settled, E[(dE/du) (dE/du)^T] is the Hessian of a quadratic energy, so this
    is the inverse of its diagonal. The mean starts at the curvature that the step was taken from,
    and M is at most ten times the start: no step outgrows stability.

    Args:
        curvature: Largest curvature of the rows by group, ``(B,)`` or ``(1,)``.
        moving: Keep adapting while draws are kept, as published for Langevin predictive coding.
            The term that a moving M needs is left out, which biases the draws. Otherwise M
            stands still after the discarded updates, and brings no bias of its own.
        decay: Weight of the past.
    """

    curvature: Packed
    moving: bool = False
    decay: float = 0.9

    def start(self, packed: Packed) -> Packed:
        """The moments before the first gradient."""
        return {k: torch.ones_like(v) * _spread(self.curvature[k], k) for k, v in packed.items()}

    def update(self, moments: Packed, gradient: Packed, count: int) -> Packed:
        """The moments after one more gradient: a moving mean, or the mean of all so far."""
        rate = 1.0 - self.decay if self.moving else 1.0 / (count + 10.0)
        return {k: (1 - rate) * moments[k] + rate * g**2 for k, g in gradient.items()}


class State(NamedTuple):
    """Where a chain is.

    Args:
        packed: Latents by group: ``"data"`` (..., B, K), ``"global"`` (..., K).
        gradient: Gradient of the energy there; that of the rows without the N/B of a minibatch.
        rows: Energy of the rows (..., B), without N/B.
        other: Energy of everything outside the data plate (...,).
        velocity: Velocity by group, with momentum.
    """

    packed: Packed
    gradient: Packed
    rows: Tensor
    other: Tensor
    velocity: Packed | None = None

    @classmethod
    def at(cls, evaluate: Evaluate, packed: Mapping[str, Tensor], momentum: bool = False) -> State:
        """The state at given latents, at rest."""
        packed = dict(packed)
        gradient, rows, other = evaluate(packed)
        rest = {k: torch.zeros_like(v) for k, v in packed.items()} if momentum else None
        return cls(packed, gradient, rows, other, rest)

    @property
    def joint(self) -> bool:
        """Whether everything is one unit, because global latents move."""
        return "global" in self.packed

    def energy(self, scale: float = 1.0) -> Tensor:
        """Energy by unit: (..., B), or (..., 1) for one joint unit."""
        if self.joint:
            return (scale * self.rows.sum(-1) + self.other).unsqueeze(-1)
        return self.rows


@dataclass(frozen=True)
class Chain:
    """What a run leaves behind.

    Args:
        draws: Kept states by group, draws first: (S, ..., B, K) or (S, ..., K).
        rows: Energies of the rows at the draws, (S, ..., B).
        other: Energies of the rest, (S, ...).
        state: The last state.
        factor: What the steps of the units were multiplied by, after adaptation.
        adapted: How many updates adapted each unit's factor, all runs together.
        acceptance: Fraction of accepted proposals by unit, while draws were kept.
        num_gradients: Gradients that were taken.
    """

    draws: Packed
    rows: Tensor
    other: Tensor
    state: State
    factor: Tensor
    adapted: Tensor
    acceptance: Tensor
    num_gradients: int


def ula(
    evaluate: Evaluate,
    state: State,
    step: Mapping[str, Tensor],
    metric: Mapping[str, Metric] | None = None,
    momentum: float = 0.0,
) -> State:
    """One unadjusted update; see the module.

    Args:
        evaluate: Latents to gradients, energies of rows, and the energy of the rest; see
            :class:`State`.
        state: Where the chain is.
        step: eta by group: shaped like the batch of the group's latents, or broadcastable.
        metric: Preconditioners by group.
        momentum: m, in [0, 1).

    Example:
        >>> def evaluate(packed):  # a standard normal a row
        ...     u = packed["data"]
        ...     return packed, 0.5 * u.square().sum(-1), u.new_zeros(())
        >>> _ = torch.manual_seed(0)
        >>> state = State.at(evaluate, {"data": torch.zeros(20000, 1)})
        >>> for _ in range(50):
        ...     state = ula(evaluate, state, {"data": torch.tensor(0.5)})
        >>> round(float(state.packed["data"].var()), 1)  # 1 / (1 - 0.5 / 2) = 1.33
        1.3
    """
    packed, velocity = {}, {}
    for name, value in state.packed.items():
        eta = _spread(step[name], name)
        noise = torch.randn_like(value)
        drift = state.gradient[name]
        if metric is not None:
            noise = metric[name].scale(noise)
            drift = metric[name].scale(metric[name].pull(drift))
        move = (2 * (1 - momentum) * eta).sqrt() * noise - eta * drift
        if state.velocity is not None:
            move = move + momentum * state.velocity[name]
            velocity[name] = move
        packed[name] = value + move
    gradient, rows, other = evaluate(packed)
    return State(packed, gradient, rows, other, None if state.velocity is None else velocity)


def mala(
    evaluate: Evaluate,
    state: State,
    step: Mapping[str, Tensor],
    metric: Mapping[str, Metric] | None = None,
    scale: float = 1.0,
) -> tuple[State, Tensor]:
    """One Metropolis-adjusted update: every unit accepts or rejects by itself.

    With xi the noise of the proposal, the noise that leads back is
    ``sqrt(eta / 2) L^T (g + g') - xi``, so that

        log ratio = E(u) - E(u') + |xi|**2 / 2 - |sqrt(eta / 2) L^T (g + g') - xi|**2 / 2

    A proposal whose energy is not finite is rejected.

    Args:
        evaluate: See :func:`ula`.
        state: Where the chain is.
        step: eta by group.
        metric: Preconditioners by group, the same at every state.
        scale: N/B of the data plate in the joint energy.

    Returns:
        The next state, and the acceptance probability of every unit.
    """
    packed, noises = {}, {}
    for name, value in state.packed.items():
        eta = _spread(step[name], name)
        noise = torch.randn_like(value)
        drift, kick = state.gradient[name], noise
        if metric is not None:
            kick = metric[name].scale(noise)
            drift = metric[name].scale(metric[name].pull(drift))
        noises[name] = noise
        packed[name] = value - eta * drift + (2 * eta).sqrt() * kick
    gradient, rows, other = evaluate(packed)
    proposal = State(packed, gradient, rows, other)
    log_ratio = state.energy(scale) - proposal.energy(scale)
    for name, noise in noises.items():
        both = state.gradient[name] + gradient[name]
        if metric is not None:
            both = metric[name].pull(both)
        back = (_spread(step[name], name) / 2).sqrt() * both - noise
        term = (0.5 * noise.square() - 0.5 * back.square()).sum(-1)  # (..., B) or (...,)
        if name == "global":
            term = term.unsqueeze(-1)
        elif state.joint:
            term = term.sum(-1, keepdim=True)
        log_ratio = log_ratio + term
    log_ratio = torch.where(torch.isfinite(log_ratio), log_ratio, -torch.inf)
    chance = log_ratio.clamp_max(0.0).exp()
    accepted = torch.rand_like(chance) < chance
    return _choose(accepted, proposal, state), chance


def langevin(
    evaluate: Evaluate,
    start: State,
    *,
    step: Mapping[str, Tensor],
    num_mixing: int,
    num_samples: int,
    sampler: str = "ula",
    momentum: float = 0.0,
    metric: Mapping[str, Metric] | RunningMoment | None = None,
    factor: Tensor | None = None,
    adapted: Tensor | None = None,
    most_adapted: float = float("inf"),
    scale: float = 1.0,
) -> Chain:
    """Discard ``num_mixing`` updates, then keep ``num_samples`` states.

    The steps of MALA are adapted to an acceptance of 0.574 while updates are discarded, and stand
    still while draws are kept: only then is the chain that of one kernel.

    Args:
        evaluate: See :func:`ula`.
        start: First state.
        step: eta by group before adaptation.
        num_mixing: Updates that are discarded.
        num_samples: States that are kept.
        sampler: ``"ula"`` or ``"mala"``.
        momentum: m, for ``"ula"``.
        metric: Preconditioners by group, fixed or running.
        factor: Factors of the steps that an earlier run ended with.
        adapted: How many updates have adapted them.
        most_adapted: Where adaptation ends for good. A chain that goes on from run to run needs
            an end: a step that follows every decision biases the draws.
        scale: N/B of the data plate.

    Returns:
        The chain.
    """
    state = start
    units = start.energy(scale)
    factor = torch.ones_like(units) if factor is None else factor
    adapted = torch.zeros_like(units) if adapted is None else adapted
    running = metric if isinstance(metric, RunningMoment) else None
    fixed = None if running is not None else metric
    moments = {} if running is None else running.start(start.packed)
    first = moments
    accepted = torch.zeros_like(units)
    draws: dict[str, list[Tensor]] = {name: [] for name in start.packed}
    rows, other = [], []
    for count in range(num_mixing + num_samples):
        mixing = count < num_mixing
        if running is not None and (mixing or running.moving):
            moments = running.update(moments, state.gradient, count)
            fixed = {k: _moment_metric(m, first[k]) for k, m in moments.items()}
        steps = {k: step[k] * factor for k in state.packed}
        if sampler == "mala":
            state, chance = mala(evaluate, state, steps, fixed, scale)  # type: ignore[arg-type]
            if mixing:
                rate = (adapted + 1) ** -0.6 * (adapted < most_adapted)
                factor = factor * torch.exp(rate * (chance - TARGET_ACCEPTANCE))
                adapted = adapted + 1
            else:
                accepted = accepted + chance / num_samples
        else:
            state = ula(evaluate, state, steps, fixed, momentum)  # type: ignore[arg-type]
        if not mixing:
            for name, value in state.packed.items():
                draws[name].append(value)
            rows.append(state.rows)
            other.append(state.other)
    return Chain(
        draws={name: torch.stack(values) for name, values in draws.items()},
        rows=torch.stack(rows),
        other=torch.stack(other),
        state=state,
        factor=factor,
        adapted=adapted,
        acceptance=accepted if sampler == "mala" else torch.ones_like(units),
        num_gradients=num_mixing + num_samples,
    )


def stationary_covariance(
    precision: Tensor,
    step: float,
    *,
    momentum: float = 0.0,
    preconditioner: Tensor | None = None,
) -> Tensor:
    """The covariance at which the unadjusted sampler settles on a quadratic energy.

    Args:
        precision: Hessian Lambda of the energy, (..., K, K).
        step: eta.
        momentum: m.
        preconditioner: M, (..., K, K); the identity by default.

    Returns:
        ``[Lambda (I - eta M Lambda / (2 (1 + m)))]^-1``; the exact covariance for eta to zero.

    Raises:
        ValueError: Where the sampler has no stationary law: the step is too large.

    Example:
        >>> float(stationary_covariance(torch.tensor([[2.0]]), 0.1))
        0.5555555820465088
    """
    size = precision.shape[-1]
    eye = torch.eye(size, dtype=precision.dtype, device=precision.device)
    metric = eye if preconditioner is None else preconditioner
    root = torch.linalg.cholesky(metric.expand(precision.shape))
    values, vectors = torch.linalg.eigh(root.mT @ precision @ root)
    largest = float(values.max())
    if not float(values.min()) > 0 or not 0 < step * largest < 2 * (1 + momentum):
        raise ValueError(
            "The unadjusted sampler has no stationary law here: the precision must be positive "
            f"definite and the step below 2 (1 + momentum) / lambda_max = "
            f"{2 * (1 + momentum) / largest:.4g}, got {step:g}. Take a smaller step."
        )
    spread = 1.0 / (values * (1 - step * values / (2 * (1 + momentum))))
    basis = root @ vectors
    return (basis * spread.unsqueeze(-2)) @ basis.mT


def _moment_metric(moment: Tensor, start: Tensor) -> Metric:
    # In units of the step, which was taken from the curvature: M is one where nothing is known.
    ratio = (start / moment.clamp_min(1e-30)).clamp_max(_MOST_STRETCH)
    return Metric(ratio.sqrt(), full=False)


def _spread(step: Tensor, name: str) -> Tensor:
    """A step by unit, shaped to multiply packed latents."""
    return step if name == "global" or step.dim() == 0 else step.unsqueeze(-1)


def _choose(accepted: Tensor, new: State, old: State) -> State:
    """Every unit from the state it chose."""
    joint = old.joint

    def pick(a: Packed, b: Packed) -> Packed:
        return {
            k: torch.where(accepted if k == "global" else accepted.unsqueeze(-1), a[k], b[k])
            for k in b
        }

    rows = torch.where(accepted, new.rows, old.rows)
    other = torch.where(accepted[..., 0], new.other, old.other) if joint else old.other
    return State(
        pick(new.packed, old.packed), pick(new.gradient, old.gradient), rows, other, old.velocity
    )

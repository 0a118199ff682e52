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
from guides.energy import LogJoint
from guides.inference.chain_gaussian import ChainGaussian
from guides.inference.chain_step import ChainStep
from guides.inference.checks import capture
from guides.inference.guide_losses import check_guide, guide_loss
from guides.inference.langevin import Chain
from guides.inference.langevin_kernel import (
    check_settings,
)
from guides.probe import Program

__all__ = ["LangevinPredictiveCoding", "Samples"]

Packed = dict[str, Tensor]
_RELAX_STEPS = 20
_POSTERIOR_CHAINS = 8


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


class LangevinPredictiveCoding(ChainStep):
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
        self._chains: Packed = {}
        self._rows: Packed | None = None

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
        loop._chains, loop._rows = {}, None
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

    def _touched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = super()._touched(args, kwargs)
        if self.guide is not None and self.guide_loss is not None:
            found = found | capture(self.guide, args, kwargs)
        return found

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

"""FIVO: the bound of a particle filter, whose particles are resampled as a sequence goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.draws import over_draws
from guides.inference.resampling import effective_fraction, systematic
from guides.layout import Layout
from guides.objectives.objective import ExposedLogJoint, Objective, own_guide
from guides.objectives.packed_draws import random_rows
from guides.objectives.weighted import check_rowwise
from guides.probe import Program
from guides.sequences.guide import SequenceCall, SequenceGuide
from guides.sequences.window import Window, check_windows, step_terms, structure

__all__ = ["FIVO"]


class FIVO(Objective):
    """The filtering variational objective: minus the log of a particle filter's evidence.

        w_k = 1
        for t = 1 .. T:
            z_tk ~ q(z_t | z_{t-1,k}, x)                             k = 1 .. num_particles
            w_k  = w_k p(x_t, z_tk | z_<t,k, x_<t) / q(z_tk | ..)
            if ESS(w) < threshold K, or t = T:
                p_hat = p_hat mean_k w_k
                histories = systematic(w);  w_k = 1
        bound = E[log p_hat]

    ``E[p_hat] = p(x)``, so that the bound lies below the log evidence. Importance weights of whole
    sequences (``IWELBO``) spread exponentially with T, and K draws buy little; resampling spends
    them where they count. Every row of the data plate is a filter of its own. With
    ``threshold=0`` nothing is resampled, which is ``IWELBO``.

    The gradient is that of log p_hat with the chosen ancestors held: the dependence of the choice
    on the parameters is left out, which makes it a little biased, and far less noisy (Maddison et
    al., section 3; Le et al.). The loss itself is exact: minus the bound for all N rows, lower is
    better. A guide that refines (``iterative_filtering_``) learns from its last iteration.

    Global latents are drawn once for all particles, and keep their ELBO. The program is run again
    up to each step, as :mod:`guides.sequences.window` says.

    References:
        | Filtering variational objectives (Maddison et al., 2017) https://arxiv.org/abs/1705.09279
        | Variational sequential Monte Carlo (Naesseth et al., 2018)
        | https://arxiv.org/abs/1705.11140
        | Auto-encoding sequential Monte Carlo (Le et al., 2018) https://arxiv.org/abs/1705.10306

    Args:
        num_particles: Particles K of each row.
        threshold: Effective sample size below which a row is resampled, as a fraction of K: one
            resamples at every step, zero never.

    Raises:
        ValueError: For a threshold outside of [0, 1]; from a call, for a guide that is not one of
            sequences, or rows that talk to each other.
        NotImplementedError: From a call, for data of a step that depend on later latents, or count
            in rows whose latents of that step are masked.

    Example:
        >>> import pyro, pyro.distributions as dist, guides
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = torch.zeros(len(x))
        ...         for t in pyro.markov(range(x.shape[1])):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> x = torch.randn(5, 3)
        >>> guide = guides.make("filtering_normal", model, x, recurrent=8, hidden=8)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), FIVO(8))
        >>> svi.step(x) > 0
        True
    """

    def __init__(self, num_particles: int = 4, *, threshold: float = 0.5) -> None:
        super().__init__(num_particles)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold!r}.")
        self.threshold = threshold

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the bound for all N rows."""
        rows, above, scale = self._filter(model, guide, args, kwargs)
        return -(scale * rows.sum() + above)

    def rows(self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Log p_hat of every row ``(B,)``, given the draw of global latents; no gradients."""
        with torch.no_grad():
            return self._filter(model, guide, args, kwargs)[0]

    def ancestors(self, log_weights: Tensor) -> Tensor:
        """Which particle each one continues, ``(K, B)``, from log weights ``(K, B)``."""
        uniform = torch.rand_like(log_weights[0])
        return systematic(log_weights, uniform)

    def _filter(
        self,
        model: Program,
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor, float]:
        """Terms of the rows ``(B,)``, that of the global latents, and the scale N/B."""
        if not isinstance(guide, SequenceGuide):
            raise ValueError(
                "FIVO resamples step by step, and needs a guide of sequences: "
                f'guides.make("filtering_normal", model, ...); got {type(guide).__name__}.'
            )
        own_guide(self, model, guide, args, kwargs)
        read = random_rows(guide._layout(args, kwargs, None), guide, args, kwargs)
        call = guide._call(args, kwargs, read)
        run = _Run(model, guide, args, kwargs, call, self.num_particles)
        if not is_capturing() and self._is_first(str(structure(call.steps)), model, guide):
            check_windows(model, args, kwargs, read, call.steps, run.terms)
        above = run.globals()
        log_w = run.zeros()  # (K, B)
        bound = torch.zeros_like(log_w[0])
        number = len(call.steps)
        for t in range(number):
            log_w = log_w + run.step(t)
            if t == number - 1 or self.threshold == 0:
                continue
            weak = effective_fraction(log_w.detach()) < self.threshold  # (B,)
            if not bool(weak.any()):
                continue
            chosen = self.ancestors(log_w.detach())
            kept = torch.arange(len(log_w), device=chosen.device).unsqueeze(-1)
            run.select(torch.where(weak, chosen, kept))
            bound = bound + torch.where(weak, _log_mean(log_w), torch.zeros_like(bound))
            log_w = torch.where(weak, torch.zeros_like(log_w), log_w)
        if self.num_particles > 1 and self._is_first("rows", model, guide):
            check_rowwise(self, ExposedLogJoint(model, args, kwargs, layout=read), run.first())
        return bound + _log_mean(log_w), above, read.scale

    def __repr__(self) -> str:
        """Number of particles, and when they are resampled."""
        return f"FIVO(num_particles={self.num_particles}, threshold={self.threshold})"


@dataclass
class _Run:
    """The particles of one call."""

    model: Program
    guide: SequenceGuide
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    call: SequenceCall
    num: int

    def __post_init__(self) -> None:
        read = self.read
        self.terms = step_terms(self.model, self.args, self.kwargs, read, self.call.steps)
        # Draws at the plates' dimensions, as a guide takes them: (K, B, 1, .., 1, size).
        self.upstream: dict[str, Tensor] = {}

    @property
    def read(self) -> Layout:
        return self.call.layout

    def zeros(self) -> Tensor:
        rows = self.read.num_rows
        return torch.zeros(
            self.num, rows, dtype=self.guide.init.dtype, device=self.guide.init.device
        )

    def globals(self) -> Tensor:
        """Draw the global latents; log p - log q of the draw."""
        group = self.read.group("global")
        if group is None:
            return self.guide.init.new_zeros(())
        plate = self.read.data_plate
        assert plate is not None
        with self.guide._pyro_context:
            q = self.guide.group_distribution(group, self.call, {})
            u = q.rsample()
        names = tuple(site.name for site in group.sites)
        window = Window(self.model, {}, names)
        own = replace(self.read, groups=(group,))
        joint = ExposedLogJoint(window, self.args, self.kwargs, layout=own)
        _, log_p = joint.packed({"global": u})
        wide = u.reshape((1,) * -plate.dim + u.shape)
        self.upstream["global"] = wide.expand(self.num, *wide.shape).reshape(
            self.num, *(1,) * -plate.dim, group.size
        )
        return log_p - q.log_prob(u)

    def step(self, t: int) -> Tensor:
        """Draw a step of every particle; its log weights ``(K, B)``."""
        group = self.read.group(f"step_{t + 1}")
        assert group is not None
        assert group.plate is not None
        with self.guide._pyro_context:
            q = self.guide.group_distribution(group, self.call, self.upstream)
            batched = len(q.batch_shape) > -group.plate.dim
            value = q.rsample() if batched else q.rsample((self.num,))
        log_q = q.log_prob(value).reshape(self.num, -1)
        self.upstream[group.name] = value
        packed = {}
        for name, u in self.upstream.items():
            own = self.read.group(name)
            assert own is not None
            packed[name] = u.reshape(self.num, *own.shape)
        step = self.call.steps[t]
        before = replace(
            self.read,
            groups=tuple(g for g in self.read.groups if g.name in packed and g is not group),
        )
        alone = replace(self.read, groups=(group,))

        def log_p(draw: Mapping[str, Tensor]) -> Tensor:
            window = Window(self.model, before.constrain(draw), step.sites, self.terms[t])
            joint = ExposedLogJoint(window, self.args, self.kwargs, layout=alone)
            return joint.packed({group.name: draw[group.name]})[0]

        found: Tensor = over_draws(log_p, packed, self.read)
        weights = found - log_q
        return (
            weights
            if step.mask is None
            else torch.where(step.mask, weights, torch.zeros_like(weights))
        )

    def first(self) -> dict[str, Tensor]:
        """Constrained values of the first particle."""
        groups = {g.name: g for g in self.read.groups}
        return self.read.constrain(
            {name: u[0].reshape(groups[name].shape) for name, u in self.upstream.items()}
        )

    def select(self, chosen: Tensor) -> None:
        """Let every particle continue another one's history, ``(K, B)``."""
        for name, value in self.upstream.items():
            if name == "global":
                continue
            index = chosen.reshape(*chosen.shape, *(1,) * (value.dim() - 2)).expand_as(value)
            self.upstream[name] = value.gather(0, index)


def _log_mean(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - math.log(len(log_w))

"""SemiAmortized: an encoder, then gradient steps on each row's own bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from guides.families.family import Family
from guides.schemes.bound import RowBound
from guides.schemes.recording import Iterate, Refined, active
from guides.schemes.refinement import Refinement, State
from guides.schemes.scheme import Call
from guides.sites import Group

__all__ = ["SemiAmortized"]


class SemiAmortized(Refinement):
    """An encoder, then K gradient steps on the bound of the row.

        lam_0     = encoder(x)
        g_k       = d L_n / d lam_k                              of the row's own bound
        lam_{k+1} = lam_k + a_k F(lam_k)^-1 g_k, limited          optimizer="natural"
        lam_{k+1} = lam_k + a_k (momentum v_k + clip(g_k))       optimizer="momentum"
        lam_{k+1} = lam_k + a_k m_k / sqrt(s_k)                  optimizer="adam"
        a_k       = step_size (1 - k / K)                        or step_size, with decay=False

        w_m       = softmax_m(log p(x, z_m) - log q(z_m))        method="importance"
        loc_{k+1} = loc_k + a_k (sum_m w_m u_m - mean_m u_m)

    Natural steps are scaled by the Fisher information F of q, so that one step size serves
    latents of any unit. Gradients of Gaussian families are path gradients, which hardly vary from
    draw to draw near the optimum.

    The encoder learns through the steps. Differentiating a step takes Hessian products
    (``backprop="full"``: the semi-amortized VAE), with the very noise of the forward pass, since
    it is the same computation. ``backprop=k`` keeps them for the last k steps, and lets the
    gradient pass the others unchanged (``"first_order"`` is k = 0). ``backprop="none"`` stops
    the gradient altogether: then the encoder learns from its own bound, and the model from the
    refined one, which needs :class:`guides.objectives.RefinementELBO`.

    References:
        | Semi-amortized variational autoencoders (Kim et al., 2018)
        | https://arxiv.org/abs/1802.02550
        | On the challenges of learning with inference networks on sparse, high-dimensional data
        | (Krishnan, Liang & Hoffman, 2018) https://arxiv.org/abs/1710.06085 (backprop="none")
        | Iterative refinement of the approximate posterior for directed belief networks
        | (Hjelm et al., 2016) https://arxiv.org/abs/1511.06382 (method="importance")

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        num_iterations: Gradient steps K.
        step_size: Step size a; by default 0.5 for natural steps and importance updates, of which
            at most 1 makes sense, 0.05 for Adam and 0.001 for momentum.
        optimizer: ``"natural"``, ``"momentum"``, ``"adam"`` (fresh state for every call), or
            ``"auto"``: natural steps where the family has a scale, Adam otherwise.
        momentum: Momentum.
        decay: Let the step size fall linearly to zero, however many steps there are.
        clip: Largest norm of a row's gradient, None for no limit. Of natural steps: the largest
            absolute value of a coordinate of the whitened gradient ``F^-1/2 g``, by default 2,
            a trust region of so many standard deviations of q.
        backprop: ``"full"``, a number of last steps, ``"first_order"``, ``"none"``, or
            ``"auto"``: full where the family's draws have right second derivatives, first-order
            otherwise.
        method: ``"gradient"`` or ``"importance"``.
        num_particles: Draws of the inner bound.
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
        step_size: float | None = None,
        optimizer: str = "auto",
        momentum: float = 0.5,
        decay: bool = True,
        clip: float | str | None = "auto",
        backprop: str | int = "auto",
        method: str = "gradient",
        eval_iterations: int | None = None,
        num_particles: int = 1,
        shared_noise: bool = False,
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
            num_particles=num_particles,
            shared_noise=shared_noise,
            tolerance=tolerance,
            start=start,
            data_args=data_args,
            inputs=inputs,
            encoder=encoder,
            hidden=hidden,
            features=features,
        )
        if optimizer not in ("auto", "natural", "momentum", "adam"):
            raise ValueError(
                f'optimizer must be "auto", "natural", "momentum" or "adam", got {optimizer!r}.'
            )
        family = None if call.guide is None else cast(Family, call.guide.families[group.name])
        if optimizer == "auto":
            # Without a scale of q nothing says how far a step should go.
            optimizer = "natural" if family is None or family.has_scale else "adam"
        if step_size is None:
            step_size = {"natural": 0.5, "momentum": 1e-3, "adam": 0.05}[optimizer]
            step_size = 0.5 if method == "importance" else step_size
        if isinstance(clip, str):
            if clip != "auto":
                raise ValueError(f'clip must be a positive number, None or "auto", got {clip!r}.')
            clip = 2.0 if optimizer == "natural" else None
        if method not in ("gradient", "importance"):
            raise ValueError(f'method must be "gradient" or "importance", got {method!r}.')
        if step_size <= 0 or not 0 <= momentum < 1 or (clip is not None and clip <= 0):
            raise ValueError(
                "step_size and clip must be positive and momentum in [0, 1), got "
                f"{step_size}, {clip} and {momentum}."
            )
        if method == "importance":
            if family is not None and not family.has_density:
                raise ValueError(
                    "Importance refinement weighs draws by log p - log q, and a point mass has "
                    'no density. Use method="gradient", or a family with a density.'
                )
            if num_particles < 2:
                raise ValueError(
                    "Importance refinement averages weighted draws, so it needs num_particles of "
                    f"at least 2, got {num_particles}."
                )
        self.step_size = step_size
        self.optimizer = optimizer
        self.momentum = momentum
        self.decay = decay
        self.clip = clip
        self.method = method
        twice = family is None or family.twice_differentiable
        self.backprop = _depth(backprop, num_iterations, twice, method)

    def refine(self, lam: Tensor, group: Group, call: Call) -> Tensor:
        """K steps; returns the last parameters."""
        record = active()
        bound = self.bound(group, call)
        iterations = self.iterations
        stops = self.backprop is None
        # Steps beyond the trained number are backpropagated through as the last ones are.
        first = iterations - (self.backprop or 0)
        zeros = torch.zeros_like(lam)
        state = {"lam": lam}
        if self.method == "gradient" and self.optimizer != "natural":
            state |= {"velocity": zeros} | ({"square": zeros} if self.optimizer == "adam" else {})
        if stops:
            if record is not None:
                with torch.no_grad():
                    fixed = lam.detach()
                    own = bound.gradient(fixed, bound.noise(fixed), weights=False)
                iterates = (Iterate(lam, own.lam),)
                record.append(Refined(group.name, bound.family, call.layout.scale, iterates, 1.0))
            state = {key: value.detach() for key, value in state.items()}

        def update(t: int, state: State, bound: RowBound, rows: Tensor | None) -> State:
            if t >= first and not stops:
                return self._step(t, state, bound)
            with torch.no_grad():
                moved = self._step(t, {k: v.detach() for k, v in state.items()}, bound)
            # The parameters themselves pass straight through; only the step is a constant.
            moved["lam"] = state["lam"] + (moved["lam"] - state["lam"].detach())
            return moved

        return self.iterate(state, update, group, call, bound)["lam"]

    def _step(self, t: int, state: State, bound: RowBound) -> State:
        lam = state["lam"]
        noise = bound.noise(lam)
        rate = self.step_size * (1 - t / self.iterations if self.decay else 1.0)
        if self.method == "importance":
            u, log_q, log_p = bound.draws(lam, noise)
            weights = torch.softmax(log_p - log_q, 0).unsqueeze(-1)  # (M, B, 1)
            # From the mean of the draws, which need not be the location of a bent family.
            step = (weights * u).sum(0) - u.mean(0)
            return {"lam": bound.family.moved(lam, bound.family.location(lam) + rate * step)}
        gradient = bound.gradient(lam, noise, path=True).lam
        if self.optimizer == "natural":
            return {"lam": lam + rate * bound.family.natural(lam, gradient, self.clip)[0]}
        if self.clip is not None:
            norm = gradient.square().sum(-1, keepdim=True).clamp_min(1e-24).sqrt()
            gradient = gradient * (self.clip / norm).clamp_max(1.0)
        if self.optimizer == "momentum":
            velocity = self.momentum * state["velocity"] + gradient
            return {"lam": lam + rate * velocity, "velocity": velocity}
        velocity = 0.9 * state["velocity"] + 0.1 * gradient
        square = 0.999 * state["square"] + 0.001 * gradient.square()
        mean = velocity / (1 - 0.9 ** (t + 1))
        # Under the root, so that the derivative at a zero gradient exists.
        spread = (square / (1 - 0.999 ** (t + 1)) + 1e-16).sqrt()
        return {"lam": lam + rate * mean / spread, "velocity": velocity, "square": square}

    def extra_repr(self) -> str:
        """Steps, optimizer and backpropagation."""
        depth = "none" if self.backprop is None else self.backprop
        return (
            f"num_iterations={self.num_iterations}, method={self.method!r}, "
            f"optimizer={self.optimizer!r}, step_size={self.step_size}, backprop={depth}"
        )


def _depth(backprop: str | int, num_iterations: int, twice: bool, method: str) -> int | None:
    """Through how many last steps the curvature is kept; None to stop the gradient."""
    if backprop == "none":
        return None
    if backprop == "first_order" or (backprop == "auto" and (not twice or method != "gradient")):
        return 0
    if backprop in ("auto", "full"):
        depth: float = math.inf if backprop == "full" else num_iterations
    elif isinstance(backprop, int) and not isinstance(backprop, bool) and backprop >= 0:
        depth = backprop
    else:
        raise ValueError(
            'backprop must be "auto", "full", "first_order", "none" or a number of steps, got '
            f"{backprop!r}."
        )
    if depth and (not twice or method != "gradient"):
        reason = (
            "the draws of this family have no second derivatives"
            if not twice
            else "importance refinement is differentiated to first order only"
        )
        raise ValueError(f'backprop={backprop!r}: {reason}. Use "first_order" or "none".')
    return int(min(depth, num_iterations))

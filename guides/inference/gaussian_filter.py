"""The hierarchical Gaussian filter: beliefs updated in closed form, weighted by their precisions.

    x_L ~ Normal(x_L', exp(omega_L))                                 '  at the step before
    x_i ~ Normal(x_i', exp(kappa_i x_{i+1} + omega_i))               i = L-1 .. 1
    u   ~ Normal(x_1, 1 / input_precision)                           continuous inputs
    u   ~ Bernoulli(logits=x_1)                                      binary inputs

One sweep a step, from the input up; means m and precisions p, predictions with a hat:

    v_i    = exp(kappa_i m_{i+1}' + omega_i),   ^m_i = m_i',   ^p_i = 1 / (1/p_i' + v_i)

    continuous   p_1 = ^p_1 + input_precision   m_1 = ^m_1 + (u - ^m_1) input_precision / p_1
    binary       p_1 = ^p_1 + s (1 - s)         m_1 = ^m_1 + (u - s) / p_1,   s = sigmoid(^m_1)

    volatility   w = v_i ^p_i,   d = (1/p_i + (m_i - ^m_i)^2) ^p_i - 1
                 p_{i+1} = ^p_{i+1} + 1/2 kappa^2 w (w + (2 w - 1) d)
                 m_{i+1} = ^m_{i+1} + 1/2 kappa w d / p_{i+1}

The volatility update is one Newton step, taken at the prediction, on the variational energy

    I(x) = -1/2 log(1/p_i' + e) - 1/2 (1/p_i + (m_i - ^m_i)^2) / (1/p_i' + e)
           - 1/2 ^p_{i+1} (x - ^m_{i+1})^2,                   e = exp(kappa_i x + omega_i)

of q(x_1) .. q(x_L) with the belief about the step before integrated out.

References:
    | A Bayesian foundation for individual learning under uncertainty (Mathys, Daunizeau, Friston &
    | Stephan, 2011) https://doi.org/10.3389/fnhum.2011.00039

    | Uncertainty in perception and the hierarchical Gaussian filter (Mathys et al., 2014)
    | https://doi.org/10.3389/fnhum.2014.00825
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Belief",
    "HierarchicalGaussianFilter",
    "Trajectory",
    "predict",
    "value_update",
    "volatility_update",
]

_UPDATES = ("quadratic", "enhanced")


@dataclass(frozen=True)
class Belief:
    """A Gaussian belief about one state of each row.

    Args:
        mean: ``(B,)``.
        precision: ``(B,)``.
    """

    mean: Tensor
    precision: Tensor


@dataclass(frozen=True)
class Trajectory:
    """Beliefs of all levels at all steps, lowest level first.

    Args:
        mean: ``(B, T, L)``.
        precision: ``(B, T, L)``.
        predicted_mean: Before the input of the step, ``(B, T, L)``.
        predicted_precision: ``(B, T, L)``.
        log_evidence: Log density of every input given those before, under the predicted beliefs;
            zero where an input is missing, ``(B, T)``.
    """

    mean: Tensor
    precision: Tensor
    predicted_mean: Tensor
    predicted_precision: Tensor
    log_evidence: Tensor


def predict(belief: Belief, variance: Tensor) -> Belief:
    """The belief about a random walk one step later.

    Args:
        belief: The belief.
        variance: Of the step, ``(B,)``.

    Example:
        >>> now = Belief(torch.zeros(1), torch.ones(1))
        >>> later = predict(now, torch.tensor(-4.0).exp())
        >>> round(later.precision.item(), 6)
        0.982014
    """
    return Belief(belief.mean, 1 / (1 / belief.precision + variance))


def value_update(
    predicted: Belief, error: Tensor, precision: Tensor, coupling: Tensor | float = 1.0
) -> Belief:
    """The belief after the error of a child that it predicts by ``coupling * x``: Kalman's update.

        p = ^p + coupling^2 precision,   m = ^m + coupling precision / p error

    Children add up: update by one after the other, each error at the mean by then.

    Args:
        predicted: The belief before.
        error: What the child is beyond its prediction, ``(B,)``.
        precision: Of the child given its parent, ``(B,)``.
        coupling: What the mean is multiplied by in the prediction of the child.

    Example:
        >>> later = predict(Belief(torch.zeros(1), torch.ones(1)), torch.tensor(-4.0).exp())
        >>> after = value_update(later, torch.tensor([0.2]), torch.ones(1))
        >>> round(after.precision.item(), 6), round(after.mean.item(), 6)
        (1.982014, 0.100907)
    """
    total = predicted.precision + coupling**2 * precision
    return Belief(predicted.mean + coupling * precision / total * error, total)


def volatility_update(
    predicted: Belief,
    before: Belief,
    child_predicted: Belief,
    child: Belief,
    coupling: Tensor,
    tonic: Tensor,
    update: str = "quadratic",
) -> Belief:
    """The belief about the log variance of a child's steps, after the child's own update.

    ``"quadratic"`` is the update above. Far from its prediction the energy may be curved the other
    way, and the precision comes out negative. ``"enhanced"`` moves the mean by the predicted
    precision, takes the curvature there, and lets it only add to that precision.

    Args:
        predicted: The belief before, about this level.
        before: The belief about the child at the step before.
        child_predicted: That about the child before its input.
        child: That about the child after its input.
        coupling: kappa, ``()`` or ``(B,)``.
        tonic: omega, ``()`` or ``(B,)``.
        update: ``"quadratic"`` or ``"enhanced"``.
    """
    squared = 1 / child.precision + (child.mean - child_predicted.mean).square()

    def terms(mean: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature of the child's part of minus the energy, at a mean."""
        variance = torch.exp(coupling * mean + tonic)
        precision = 1 / (1 / before.precision + variance)
        weight = variance * precision
        delta = squared * precision - 1
        slope = 0.5 * coupling * weight * delta
        return slope, 0.5 * coupling**2 * weight * (weight + (2 * weight - 1) * delta)

    slope, curvature = terms(predicted.mean)
    if update == "enhanced":
        mean = predicted.mean + slope / predicted.precision
        return Belief(mean, predicted.precision + terms(mean)[1].clamp_min(0.0))
    precision = predicted.precision + curvature
    return Belief(predicted.mean + slope / precision, precision)


class HierarchicalGaussianFilter:
    """The filter over sequences of inputs; see above for what it computes.

    Args may be tensors that require gradients: everything is differentiable in them. With one
    continuous level it is the Kalman filter of a random walk.

    Args:
        inputs: ``"continuous"`` or ``"binary"``.
        tonic: omega of the L levels, lowest first, ``(L,)`` or a row each ``(B, L)``. The
            literature counts the binary input as a level of its own: its three-level filter has
            two here.
        coupling: kappa of the levels but the highest, ``(L - 1,)`` or ``(B, L - 1)``; ones by
            default.
        mean: Of the beliefs before the first step, ``(L,)`` or ``(B, L)``; zeros by default.
        precision: Of those, ``(L,)`` or ``(B, L)``; ones by default.
        input_precision: Of continuous inputs given the lowest level, ``()`` or ``(B,)``.
        update: Of volatilities, ``"quadratic"`` (as published) or ``"enhanced"``, which keeps
            precisions positive; see :func:`volatility_update`.

    Raises:
        ValueError: For shapes that do not fit, precisions that are not positive, an unknown
            option.

    Example:
        >>> hgf = HierarchicalGaussianFilter("continuous", tonic=torch.tensor([-4.0, -4.0]))
        >>> found = hgf(torch.tensor([[0.2]]))
        >>> [round(v, 6) for v in found.mean[0, 0].tolist()]
        [0.100907, -0.004508]
    """

    def __init__(
        self,
        inputs: str,
        *,
        tonic: Tensor | Sequence[float],
        coupling: Tensor | Sequence[float] | None = None,
        mean: Tensor | Sequence[float] | None = None,
        precision: Tensor | Sequence[float] | None = None,
        input_precision: Tensor | float = 1.0,
        update: str = "quadratic",
    ) -> None:
        if inputs not in ("continuous", "binary"):
            raise ValueError(f'inputs must be "continuous" or "binary", got {inputs!r}.')
        if update not in _UPDATES:
            raise ValueError(f"update must be one of {', '.join(_UPDATES)}, got {update!r}.")
        tonic = torch.as_tensor(tonic)
        if not tonic.is_floating_point():
            tonic = tonic.to(torch.get_default_dtype())
        if tonic.dim() not in (1, 2) or tonic.shape[-1] < 1:
            raise ValueError(
                "tonic must hold one omega a level, of shape (levels,) or (rows, levels), got "
                f"{tuple(tonic.shape)}."
            )
        levels = tonic.shape[-1]
        like = tonic.detach()
        self.inputs, self.update, self.levels = inputs, update, levels
        self.tonic = tonic
        self.coupling = (
            like.new_ones(levels - 1) if coupling is None else torch.as_tensor(coupling).to(like)
        )
        self.mean = like.new_zeros(levels) if mean is None else torch.as_tensor(mean).to(like)
        self.precision = (
            like.new_ones(levels) if precision is None else torch.as_tensor(precision).to(like)
        )
        self.input_precision = torch.as_tensor(input_precision).to(like)
        for name, value, size in (
            ("coupling", self.coupling, levels - 1),
            ("mean", self.mean, levels),
            ("precision", self.precision, levels),
        ):
            if value.dim() not in (1, 2) or value.shape[-1] != size:
                raise ValueError(
                    f"{name} must have shape ({size},) or (rows, {size}) with {levels} levels, "
                    f"got {tuple(value.shape)}."
                )
        for name, value in (
            ("precision", self.precision),
            ("input_precision", self.input_precision),
        ):
            if not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive, got {value.min().item():g}.")

    def __call__(
        self, u: Tensor, *, observed: Tensor | None = None, interval: Tensor | None = None
    ) -> Trajectory:
        """Filter sequences of inputs.

        Args:
            u: Inputs ``(B, T)``; binary ones are 0 or 1.
            observed: Which inputs are there, boolean ``(B, T)``; all by default. Beliefs go on
                predicting where none is.
            interval: Time since the input before, ``(T,)`` or ``(B, T)``, which multiplies the
                variance of steps; ones by default.

        Raises:
            ValueError: For inputs of another shape or range; where a precision comes out negative.
        """
        seen, time = self._check(u, observed, interval)
        # What is missing may be NaN, which a gradient would remember.
        u = torch.where(seen, u, torch.zeros_like(u))
        rows = u.shape[0]

        def split(value: Tensor) -> list[Tensor]:
            return list(value.expand(rows, value.shape[-1]).unbind(-1))

        tonic, coupling = split(self.tonic), split(self.coupling)
        beliefs = [
            Belief(mean, precision)
            for mean, precision in zip(split(self.mean), split(self.precision), strict=True)
        ]
        kept: list[list[list[Belief]]] = [[], []]
        evidence = []
        for k in range(u.shape[1]):
            before = beliefs
            variances = [
                time[:, k]
                * torch.exp(
                    tonic[i] + (coupling[i] * before[i + 1].mean if i + 1 < self.levels else 0.0)
                )
                for i in range(self.levels)
            ]
            predicted = [predict(b, v) for b, v in zip(before, variances, strict=True)]
            first, term = self._input(predicted[0], u[:, k])
            beliefs = [first]
            for i in range(self.levels - 1):
                beliefs.append(
                    volatility_update(
                        predicted[i + 1],
                        before[i],
                        predicted[i],
                        beliefs[i],
                        coupling[i],
                        tonic[i] + time[:, k].log(),
                        self.update,
                    )
                )
            on = seen[:, k]
            beliefs = [
                Belief(torch.where(on, b.mean, p.mean), torch.where(on, b.precision, p.precision))
                for b, p in zip(beliefs, predicted, strict=True)
            ]
            self._check_precisions(beliefs, k)
            evidence.append(torch.where(on, term, torch.zeros_like(term)))
            kept[0].append(beliefs)
            kept[1].append(predicted)
        after, ahead = kept
        return Trajectory(
            _stack([[b.mean for b in step] for step in after]),
            _stack([[b.precision for b in step] for step in after]),
            _stack([[b.mean for b in step] for step in ahead]),
            _stack([[b.precision for b in step] for step in ahead]),
            torch.stack(evidence, 1),
        )

    def _input(self, predicted: Belief, u: Tensor) -> tuple[Belief, Tensor]:
        """The lowest belief after an input, and the log density of that input."""
        if self.inputs == "binary":
            mean = torch.sigmoid(predicted.mean)
            precision = predicted.precision + mean * (1 - mean)
            belief = Belief(predicted.mean + (u - mean) / precision, precision)
            sign = 2 * u - 1
            return belief, torch.nn.functional.logsigmoid(sign * predicted.mean)
        error = u - predicted.mean
        variance = 1 / predicted.precision + 1 / self.input_precision
        term = -0.5 * (error.square() / variance + variance.log() + math.log(2 * math.pi))
        return value_update(predicted, error, self.input_precision), term

    def _check(
        self, u: Tensor, observed: Tensor | None, interval: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if u.dim() != 2 or u.shape[1] < 1 or not u.is_floating_point():
            raise ValueError(
                "Inputs must be floating point sequences of shape (rows, steps), got "
                f"{u.dtype} of shape {tuple(u.shape)}. For a single sequence pass u[None]."
            )
        seen = torch.ones_like(u, dtype=torch.bool) if observed is None else observed
        if seen.shape != u.shape or seen.dtype != torch.bool:
            raise ValueError(
                f"observed must be boolean with the shape of the inputs, {tuple(u.shape)}, got "
                f"{seen.dtype} of shape {tuple(seen.shape)}."
            )
        if not bool(torch.isfinite(u[seen]).all()):
            raise ValueError(
                "Inputs that are observed must be finite. Pass observed= with False where one is "
                "missing, and any number there."
            )
        if self.inputs == "binary" and not bool(((u == 0) | (u == 1))[seen].all()):
            raise ValueError(
                f"Binary inputs are 0 or 1, got numbers from {u[seen].min().item():g} to "
                f"{u[seen].max().item():g}."
            )
        time = u.new_ones(()) if interval is None else interval
        try:
            time = time.expand(u.shape)
        except RuntimeError:
            raise ValueError(
                f"interval must have shape (steps,) or (rows, steps), here {tuple(u.shape)}, got "
                f"{tuple(time.shape)}."
            ) from None
        if not bool((time > 0).all()):
            raise ValueError(f"interval must be positive, got {time.min().item():g}.")
        for name in ("tonic", "coupling", "mean", "precision"):
            value: Tensor = getattr(self, name)
            if value.dim() == 2 and value.shape[0] != u.shape[0]:
                raise ValueError(
                    f"{name} has {value.shape[0]} rows, but the inputs have {u.shape[0]}."
                )
        # What is missing may be NaN, which a gradient would remember.
        return seen, time

    def _check_precisions(self, beliefs: list[Belief], k: int) -> None:
        for level, belief in enumerate(beliefs):
            bad = ~(belief.precision > 0)
            bad = bad | ~belief.precision.isfinite() | ~belief.mean.isfinite()
            if not bool(bad.any()):
                continue
            where = f"at step {k + 1} (row {int(bad.nonzero()[0])})"
            if bool((belief.precision[bad].isfinite() & belief.mean[bad].isfinite()).all()):
                raise ValueError(
                    f"The precision of level {level + 1} came out as "
                    f"{belief.precision[bad][0].item():.3g} {where}: the quadratic update does "
                    "not hold so far from the prediction. Pass "
                    'update="enhanced", or lower omega of that level.'
                )
            raise ValueError(
                f"The belief of level {level + 1} left the range of numbers {where}: a step of "
                "the input is too many standard deviations wide. Divide the inputs by the size "
                "of their usual steps, raise omega of the lowest level, or lower coupling."
            )

    def __repr__(self) -> str:
        """Inputs and levels."""
        return (
            f"HierarchicalGaussianFilter({self.inputs}, {self.levels} levels, "
            f"{self.update} update)"
        )


def _stack(steps: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(levels, -1) for levels in steps], 1)

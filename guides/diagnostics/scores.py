"""Scores of guides and models from importance weights: ELBO, evidence, Pareto k-hat.

    log w_s = log p(x, z_s) - log q(z_s),  z_s ~ q                   s = 1..S
    elbo         = mean_s log w_s                          a lower bound on log p(x); scores guides
    log_evidence = log mean_s w_s                          tighter with S; scores models
    k_hat        = tail index of w                         below 0.7: weights can be trusted

Each is per datum where the guide draws every latent of a row inside the data plate and there are
no global latents; otherwise the weight is one joint number and the score says so.

References:
    | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2016)
    | https://arxiv.org/abs/1509.00519

    | Yes, but Did It Work?: Evaluating Variational Inference (Yao et al., 2018)
    | https://arxiv.org/abs/1802.02538
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guides.arguments import check_number
from guides.draws import Draws, draw
from guides.probe import Program

__all__ = ["Khat", "LogWeights", "Score", "elbo", "log_evidence", "log_weights", "pareto_khat"]


@dataclass(frozen=True)
class LogWeights:
    """Log importance weights of S draws.

    Args:
        rows: Per-datum terms ``(S, B)``; None where rows have no terms of their own.
        total: Joint log weights ``(S,)``: rows times the data plate's N/B plus global terms.
        global_term: The part outside the data plate, ``(S,)``.
        joint: Whether rows cannot be weighted alone.
        num_samples: Number of draws S.
    """

    rows: Tensor | None
    total: Tensor
    global_term: Tensor
    joint: bool
    num_samples: int


@dataclass(frozen=True)
class Score:
    """A score with its Monte Carlo standard error.

    Args:
        rows: Per-datum scores ``(B,)``; None where the score is joint.
        rows_error: Their standard errors ``(B,)``.
        total: The score of the whole call: sum over rows (times N/B), plus global terms.
        standard_error: Monte Carlo standard error of the total.
        joint: Whether one weight covers all rows.
        num_samples: Number of draws S.
        estimator: Name of the estimator, with its number of draws.
        effective_sample_size: ``(sum w)^2 / sum w^2`` of the weights, ``(B,)`` or a scalar; None
            for a score that weights no draws.
    """

    rows: Tensor | None
    rows_error: Tensor | None
    total: float
    standard_error: float
    joint: bool
    num_samples: int
    estimator: str
    effective_sample_size: Tensor | None = None

    def __repr__(self) -> str:
        """The total with its error; the rows are too many to print."""
        rows = "joint" if self.rows is None else f"{len(self.rows)} rows"
        return (
            f"Score({self.total:.2f} ± {self.standard_error:.2f} nats, {self.estimator}, {rows})"
        )


@dataclass(frozen=True)
class Khat:
    """Pareto tail indices of importance weights.

    Args:
        rows: Per datum ``(B,)``; None where the weights are joint.
        total: The index of the joint weights, nan where weights are per datum.
        threshold: ``min(1 - 1/log10(S), 0.7)``: above it the weights cannot be trusted at S.
        joint: Whether the weights are joint.
        num_samples: Number of draws S.
    """

    rows: Tensor | None
    total: float
    threshold: float
    joint: bool
    num_samples: int


def log_weights(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    data_plate: str | None = "auto",
) -> LogWeights:
    """Log importance weights of draws from a guide.

    Args:
        model: The program.
        guide: Any guide for it.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws S.
        data_plate: See :func:`guides.layout.layout`.

    Returns:
        The weights, per datum where that is possible.

    Raises:
        ValueError: Where the guide has no density, or leaves out a latent.
    """
    draws = draw(model, guide, args, model_kwargs, num_samples=num_samples, data_plate=data_plate)
    return _weights(draws)


def _weights(draws: Draws) -> LogWeights:
    rows = draws.log_p_rows - draws.log_q_rows
    other = draws.log_p_global - draws.log_q_global
    return LogWeights(
        rows=rows if draws.rows_complete else None,
        total=draws.layout.scale * rows.sum(-1) + other,
        global_term=other,
        # A term outside the plate that moves with the draws couples the rows.
        joint=draws.joint or bool((other - other[0]).abs().max() > 1e-6 * (1 + other[0].abs())),
        num_samples=draws.num_samples,
    )


def elbo(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    data_plate: str | None = "auto",
) -> Score:
    """Evidence lower bound, E_q[log p(x, z) - log q(z)], in nats; higher is better.

    With global latents the rows are the per-datum terms, and the total adds the global term
    (minus the KL divergence of the global latents from their prior); the rows alone are no bound.

    Args:
        model: The program.
        guide: Any guide for it with a density.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws S.
        data_plate: See :func:`guides.layout.layout`.

    Returns:
        The score with its Monte Carlo standard error.
    """
    weights = log_weights(
        model,
        guide,
        *args,
        model_kwargs=model_kwargs,
        num_samples=num_samples,
        data_plate=data_plate,
    )
    rows = weights.rows
    return Score(
        rows=None if rows is None else rows.mean(0),
        rows_error=None if rows is None else _error(rows),
        total=float(weights.total.mean()),
        standard_error=float(_error(weights.total)),
        joint=weights.joint,
        num_samples=num_samples,
        estimator=f"ELBO, {num_samples} draws",
    )


def log_evidence(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    chunk_size: int = 200,
    data_plate: str | None = "auto",
) -> Score:
    """Importance-weighted evidence, log mean_s p(x, z_s) / q(z_s), in nats.

    A lower bound on log p(x) in expectation, tighter with more draws. It scores *models*: with
    many draws it forgets the guide.

    Args:
        model: The program.
        guide: Any guide for it with a density: the proposal.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws K.
        chunk_size: Draws held in memory at a time.
        data_plate: See :func:`guides.layout.layout`.

    Returns:
        The score; its standard error is that of the log of the mean (delta method).
    """
    check_number("num_samples", num_samples, integer=True, least=1)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}.")
    parts: list[tuple[Tensor, Tensor]] = []
    joint, scale, constant = False, 1.0, 0.0
    indices: Mapping[str, Tensor] | None = None
    for start in range(0, num_samples, chunk_size):
        draws = draw(
            model,
            guide,
            args,
            model_kwargs,
            num_samples=min(chunk_size, num_samples - start),
            data_plate=data_plate,
            indices=indices,
        )
        weights = _weights(draws)
        # All chunks score the same rows, whatever subsample the program would draw.
        indices = draws.layout.indices
        joint, scale = weights.joint, draws.layout.scale
        constant = 0.0 if joint else float(weights.global_term[0])
        kept = weights.total.unsqueeze(-1) if joint else weights.rows
        if kept is None:
            raise ValueError("Weights of rows are needed, but the guide draws rows jointly.")
        # Two moments of the weights are all that the estimate and its error need.
        parts.append((torch.logsumexp(kept, 0), torch.logsumexp(2 * kept, 0)))
    first = torch.logsumexp(torch.stack([part[0] for part in parts]), 0)
    second = torch.logsumexp(torch.stack([part[1] for part in parts]), 0)
    estimate = first - math.log(num_samples)
    inverse = torch.exp(second - 2 * first)  # of the effective sample size
    error = (inverse - 1 / num_samples).clamp_min(0).sqrt()
    return Score(
        rows=None if joint else estimate,
        rows_error=None if joint else error,
        total=float(estimate.sum()) * (1.0 if joint else scale) + constant,
        standard_error=float(error.square().sum().sqrt()) * (1.0 if joint else scale),
        joint=joint,
        num_samples=num_samples,
        estimator=f"{'joint ' if joint else ''}importance-weighted evidence, K={num_samples}",
        effective_sample_size=1 / inverse,
    )


def pareto_khat(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    data_plate: str | None = "auto",
) -> Khat:
    """Pareto k-hat of the importance weights, by ArviZ's PSIS; per datum where possible.

    Args:
        model: The program.
        guide: Any guide for it with a density.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws S; at least 25, so that a tail can be fitted.
        data_plate: See :func:`guides.layout.layout`.

    Returns:
        The indices. Weights that do not vary (an exact guide) have index -inf.
    """
    check_number("num_samples", num_samples, integer=True)
    if num_samples < 25:
        raise ValueError(f"num_samples must be at least 25 to fit a tail, got {num_samples}.")
    weights = log_weights(
        model,
        guide,
        *args,
        model_kwargs=model_kwargs,
        num_samples=num_samples,
        data_plate=data_plate,
    )
    threshold = min(1 - 1 / math.log10(num_samples), 0.7)
    if weights.joint or weights.rows is None:
        khat = _khat(weights.total.unsqueeze(0))
        return Khat(None, float(khat[0]), threshold, True, num_samples)
    return Khat(_khat(weights.rows.T), math.nan, threshold, False, num_samples)


def _khat(log_weights: Tensor) -> Tensor:
    """Indices of ``(n, S)`` log weights."""
    array = log_weights.detach().cpu().double().numpy()
    result = np.full(len(array), -np.inf)
    for i, row in enumerate(array):
        if not np.isfinite(row).all():
            # -inf is a weight of zero; nan and +inf are no weights at all.
            finite = row[np.isfinite(row)]
            usable = bool((row < np.inf).all()) and len(finite) >= 25
            result[i] = (
                _psis(np.maximum(row, finite.min() - 700) - finite.max()) if usable else np.inf
            )
            continue
        # Rounding noise of constant weights has no tail to fit.
        if np.ptp(row) > 1e-8 * max(1.0, float(np.abs(row).max())):
            result[i] = _psis(row - row.max())
    return torch.as_tensor(result)


def _psis(row: np.ndarray) -> float:
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        from arviz import psislw

        return float(psislw(row)[1])
    return float(array_stats.psislw(row)[1])


def _error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension; nan for one draw."""
    if values.shape[0] == 1:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / values.shape[0] ** 0.5

"""Scores: the ELBO and k-hat of a guide, the evidence of a model, row by row where rows exist.

* ELBO: a lower bound on log p(x), the mean of log p(x, z) - log q(z) over draws of q. Its gap to
  the evidence is KL(q, posterior): on one and the same model a higher ELBO is a better guide.
* Evidence: log-mean-exp of the same differences over K draws. It is a lower bound too, but with
  many draws it forgets the guide, and so it scores the model.
* Pareto k-hat: how heavy the tail of the weights is; above 0.7 the draws of q cannot be reweighted
  into draws of the posterior.

Where latents are shared by all rows the weights are one a draw and not one a row; such scores are
joint scores, of the whole data set, and are labelled so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.budget import Budget
from benchmarks.records import rounded

__all__ = ["KHAT_THRESHOLD", "elbo_estimate", "exact_evidence", "score"]

KHAT_THRESHOLD = 0.7


def _array(values: Tensor | None) -> np.ndarray | None:
    return None if values is None else values.detach().double().cpu().numpy()


def _summary(result: Any, num_samples: int, estimator: str) -> dict[str, Any]:
    """Mean over rows with its error over rows, or the total with its Monte Carlo error."""
    # Under global latents rows still have terms, but these alone bound nothing.
    rows = None if result.joint else _array(result.rows)
    total = {
        "total": _number(result.total),
        "total_error": _number(result.standard_error),
    }
    if rows is None:
        return {
            "value": total["total"],
            "standard_error": total["total_error"],
            **total,
            "joint": True,
            "num_rows": None,
            "num_samples": num_samples,
            "estimator": estimator,
        }
    return {
        "value": _number(rows.mean()),
        "standard_error": _number(rows.std(ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else 0),
        **total,
        "joint": False,
        "num_rows": len(rows),
        "num_samples": num_samples,
        "estimator": estimator,
    }


def _number(value: float) -> float | None:
    value = float(value)
    return round(value, 6) if math.isfinite(value) else None


def elbo_estimate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    data_plate: str | None = "auto",
) -> tuple[float, float, int | None]:
    """Return one point of a learning curve.

    Returns:
        The ELBO per row, its error, and the number of rows; of a joint ELBO the total, its error,
        and None.
    """
    from guides.diagnostics import elbo

    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = elbo(
            model,
            guide,
            *args,
            model_kwargs=dict(kwargs),
            num_samples=num_samples,
            data_plate=data_plate,
        )
    rows = None if result.joint else _array(result.rows)
    # The Monte Carlo error: the spread between rows is the same for all points of a curve.
    error = float(result.standard_error)
    if rows is None:
        return float(result.total), error, None
    return float(rows.mean()), error / len(rows), len(rows)


def exact_evidence(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> np.ndarray | None:
    """Return log p(x) where a model knows it (`model.log_evidence`), else None.

    Returns:
        One value a row `(B,)`, or one of all rows `()` where they share latents.
    """
    closed_form = getattr(model, "log_evidence", None)
    if closed_form is None:
        return None
    with torch.no_grad():
        values = closed_form(*args, **kwargs)
    return _array(values) if values.dim() <= 1 else None


def score(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    budget: Budget,
    *,
    data_plate: str | None = "auto",
    evidence_guide: Callable[..., Any] | None = None,
    evidence_name: str = "the method's own draws",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score one guide on one model.

    Args:
        model: The program, its parameters fixed.
        guide: A guide with a density; None scores the model alone, by its evidence.
        args: Positional arguments: the rows to be scored.
        kwargs: Keyword arguments.
        budget: Numbers of draws.
        data_plate: Name of the plate whose rows are data.
        evidence_guide: Proposes the draws behind the evidence; the guide itself by default.
        evidence_name: What these draws are called beside the figure.

    Returns:
        Scores by name, and per-row values by name (absent where scores are joint).
    """
    from guides.diagnostics import elbo, log_evidence, pareto_khat

    call: dict[str, Any] = {"model_kwargs": dict(kwargs), "data_plate": data_plate}
    rows: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    proposal = guide if evidence_guide is None else evidence_guide
    if proposal is None:
        raise ValueError("The evidence needs draws: pass guide= or evidence_guide=.")

    def add(name: str, result: Any, num_samples: int, estimator: str) -> None:
        scores[name] = _summary(result, num_samples, estimator)
        if not result.joint:
            rows[name] = rounded(_array(result.rows))

    with torch.no_grad():
        if guide is not None:
            num = budget.num_samples
            bound = elbo(model, guide, *args, num_samples=num, **call)
            add("elbo", bound, num, "mean of log p(x, z) - log q(z)")
        num = budget.num_evidence_samples
        evidence = log_evidence(model, proposal, *args, num_samples=num, **call)
        words = f"log-mean-exp of {num} importance weights, {evidence_name}"
        add("log_evidence", evidence, num, words)
        if guide is None:
            return scores, rows
        khat = pareto_khat(model, guide, *args, num_samples=budget.num_khat_samples, **call)
    khats = None if khat.joint else _array(khat.rows)
    values = np.atleast_1d(float(khat.total)) if khats is None else khats
    # Weights that do not vary have index -inf, which JSON lacks; below -1 nothing is told apart.
    values = np.maximum(values, -1.0)
    if khats is not None:
        rows["khat"] = rounded(values, 3)
    scores["khat"] = {
        "median": _number(np.median(values)),
        "above": _number(np.mean(~(values <= KHAT_THRESHOLD))),
        "threshold": KHAT_THRESHOLD,
        "joint": khats is None,
        "num_samples": budget.num_khat_samples,
    }
    return scores, rows

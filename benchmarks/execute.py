"""Execute: one run, fenced off from every other by its own seed, parameter store and model.

    joint     model and guide are trained together on the training rows
    frozen    the model is trained first and fixed; only the guide is fitted

A guide whose parameters belong to its rows (scheme Local) says nothing of other rows: it is
fitted afresh to the held-out ones, the model fixed. An encoder is fitted to the training rows and
meets the held-out ones unprepared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import torch

from benchmarks.autoguides import is_autoguide
from benchmarks.fit import Meter, frozen
from benchmarks.images import pictures
from benchmarks.methods import Method, as_method
from benchmarks.records import rounded
from benchmarks.scores import exact_evidence, score
from benchmarks.shared_model import State, fingerprint, load_state, state_of
from benchmarks.task import Task
from benchmarks.workbench import Call, Tick, Workbench, silent
from guides.inference import IndefiniteHessianError

__all__ = ["execute", "has_parameters", "regimes_of", "train_shared_model"]

# Scores draw from a seed of their own, the same for every method.
SCORING_SEED = 20_260_101

Program = Callable[..., Any]


def has_parameters(task: Task) -> bool:
    """Whether a task's model has anything to learn."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        model = task.build_model()
        if isinstance(model, torch.nn.Module):
            return any(value.requires_grad for value in model.parameters())
        return bool(state_of(model, task.args, dict(task.kwargs)))


def regimes_of(task: Task) -> tuple[str, ...]:
    """The regimes of a task: those it names, else joint, or frozen if nothing can be learned."""
    return task.regimes or (("joint",) if has_parameters(task) else ("frozen",))


def train_shared_model(
    task: Task, seed: int, tick: Tick = silent, mode: str = "auto"
) -> tuple[State, dict[str, Any]]:
    """Train a task's model with its `decoder_guide`, to be frozen for every guide alike.

    Returns:
        Its parameters, and what the training cost.
    """
    if not has_parameters(task):
        return {}, {"guide": None, "gradient_evaluations": 0, "seconds": 0.0}
    pyro.set_rng_seed(seed)
    with pyro.get_param_store().scope():
        bench = Workbench(task, tick, mode)
        options = task.guide_options.get(task.decoder_guide, {})
        method = as_method(task.decoder_guide, options={task.decoder_guide: options})
        guide = bench.guide(method, bench.model, bench.train)
        _, meter = bench.run_fit(
            method, bench.model, guide, bench.train, "shared model", watch=None
        )
        return state_of(bench.model, *bench.train), {
            "guide": task.decoder_guide,
            "gradient_evaluations": meter.gradient_evaluations,
            "seconds": round(meter.seconds, 3),
            "computed": bench.computed["shared model"],
        }


def execute(
    task: Task,
    method: Method,
    regime: str,
    seed: int,
    *,
    state: State | None = None,
    tick: Tick = silent,
    images: bool = True,
    mode: str = "auto",
) -> dict[str, Any]:
    """Fit one method on one task with one seed, and score it.

    Args:
        task: The task.
        method: The method.
        regime: `"joint"` or `"frozen"`.
        seed: Seeds torch, NumPy and Python before anything is built.
        state: Parameters of the shared model, for the frozen regime.
        tick: Told the phase, in a word, and the fraction of it done.
        images: Whether to keep images, where the task has them.
        mode: How updates are computed; see `benchmarks.modes`.

    Returns:
        What a record says beyond who was run: scores, rows, cost, curve, images, and under
        `computed` the mode of every phase.
    """
    pyro.set_rng_seed(seed)
    with pyro.get_param_store().scope():
        bench = Workbench(task, tick, mode)
        if regime == "frozen" and state:
            load_state(bench.model, state, *bench.train)
        posterior, cost = _fit(bench, method, regime)
        no_elbo = cost.pop("no_elbo", None)
        pyro.set_rng_seed(SCORING_SEED)
        tick("score", 0.0)
        program = frozen(bench.model)
        proposal, proposal_name = _proposal(bench, method, regime, program)
        scores, rows = score(
            program,
            posterior,
            *bench.scored,
            task.budget,
            data_plate=task.data_plate,
            evidence_guide=proposal,
            evidence_name=proposal_name,
        )
        tick("score", 1.0)
        outcome = {
            "scores": scores,
            "rows": rows,
            "scored": task.scored_rows,
            "tier": task.tier or "bounds",
            **({} if no_elbo is None else {"no_elbo": no_elbo}),
            **cost,
            "computed": bench.computed,
            "model_digest": fingerprint(state_of(bench.model, *bench.train)),
            "dtype": _dtype(bench.scored),
        }
        exact = exact_evidence(bench.model, *bench.scored)
        if exact is not None:
            outcome["tier"] = task.tier or "exact"
            scores["exact_log_evidence"] = {"total": float(exact.sum()), "total_error": 0.0}
            if exact.ndim == 1:
                rows["exact_log_evidence"] = rounded(exact)
        if images and task.image_shape is not None and posterior is not None:
            outcome["images"] = pictures(program, posterior, *bench.scored, task.image_shape)
        return outcome


def _fit(bench: Workbench, method: Method, regime: str) -> tuple[Program | None, dict[str, Any]]:
    """Return the guide to be scored on the scored rows, and what it cost.

    A point that is no mode has no posterior. A model that was trained jointly is scored by a
    guide of another kind all the same: then there is no guide to be scored, and the reason.
    """
    task = bench.task
    program = frozen(bench.model) if regime == "frozen" else bench.model
    trained, fitted = Meter(), Meter()
    watched = "training rows" if regime == "joint" else task.scored_rows
    guide: Program | None = None
    if method.refit is None and not method.relaxes:
        guide = bench.guide(method, program, bench.train)
        method = replace(method, refit=_belongs_to_its_rows(guide))
    refit = bool(method.refit) and task.held_out is not None
    posterior: Program | None = None
    no_elbo = None
    if regime == "joint" or not (refit or method.relaxes):
        watch = bench.train if regime == "joint" else bench.scored
        if guide is None and not method.relaxes:
            guide = bench.guide(method, program, bench.train)
        loop, trained = bench.run_fit(method, program, guide, bench.train, "fit", watch=watch)
    try:
        if method.relaxes:
            posterior, fitted = bench.relax(bench.scored)
        elif refit:
            fixed = frozen(bench.model)
            guide = bench.guide(method, fixed, bench.scored)
            loop, fitted = bench.run_fit(
                method, fixed, guide, bench.scored, "refit", watch=bench.scored
            )
            posterior = _scored(bench, method, guide, loop, fitted)
        else:
            posterior = _scored(bench, method, guide, loop, trained)
    except IndefiniteHessianError as error:
        if regime != "joint" or task.evidence_guide is None:
            raise
        no_elbo = str(error)
    return posterior, {
        "gradient_evaluations": {
            "training": trained.gradient_evaluations,
            "held_out": fitted.gradient_evaluations,
        },
        "wall_seconds": {
            "training": round(trained.seconds, 3),
            "held_out": round(fitted.seconds, 3),
        },
        "curve": (trained if trained.curve else fitted).curve,
        "curve_rows": watched,
        "refitted": refit,
        **({} if no_elbo is None else {"no_elbo": no_elbo}),
        **_shared_weights(guide),
    }


def _shared_weights(guide: Any) -> dict[str, int]:
    """The weights of a grid guide's families, which all rows share even where q is Local."""
    families = getattr(guide, "families", None)
    if not isinstance(families, torch.nn.ModuleDict):
        return {}
    # Global latents are there once: their family has no rows to share its weights.
    own = [family for group, family in families.items() if not group.startswith("global")]
    return {
        "family_weights": sum(value.numel() for family in own for value in family.parameters())
    }


def _scored(
    bench: Workbench, method: Method, guide: Program | None, loop: Any, meter: Meter
) -> Program:
    """Return the guide to be scored; free points go the last steps to their mode first."""
    program = frozen(bench.model)
    if method.point and method.refit and guide is not None:
        return bench.at_mode(program, guide, bench.scored, meter)
    return bench.posterior(method, program, guide, loop, bench.scored)


def _belongs_to_its_rows(guide: Program) -> bool:
    """Whether a guide's parameters are those of the rows it was fitted to."""
    amortized = getattr(guide, "amortized", None)
    return is_autoguide(guide) if amortized is None else not amortized


def _proposal(
    bench: Workbench, method: Method, regime: str, program: Program
) -> tuple[Program | None, str]:
    """Fit the evidence guide of a trained model, the same kind for every method."""
    name = bench.task.evidence_guide
    if regime != "joint" or name is None:
        return None, "the method's own draws"
    proposer = as_method(name, options=bench.task.guide_options)
    guide = bench.guide(proposer, program, bench.scored)
    # A proposal need not be as good as a posterior: K draws make up for half the updates.
    steps = max(1, bench.budget.num_steps // 2)
    bench.run_fit(proposer, program, guide, bench.scored, "evidence", watch=None, num_steps=steps)
    return guide, f"draws of a {name} guide fitted to each model"


def _dtype(call: Call) -> str:
    args, kwargs = call
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return str(value.dtype).removeprefix("torch.")
    return str(torch.get_default_dtype()).removeprefix("torch.")

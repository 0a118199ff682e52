"""Sections: the parts of a report that are words: what was compared, what came out, failures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from benchmarks.charts import glyph, signed
from benchmarks.differences import paired
from benchmarks.progress import duration
from benchmarks.standings import Standings
from benchmarks.svg import TIMES, compact
from benchmarks.words import GLOSSARY, REGIMES, describe

__all__ = [
    "failures",
    "finding",
    "glossary",
    "methods",
    "refusals",
    "regime_heading",
    "task_facts",
]

Record = Mapping[str, Any]

_NUMBERS = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


def methods(runs: Sequence[Record]) -> str:
    """Return every method in plain words."""
    seen = {run["method"]: run for run in runs}
    items = "".join(
        f"<div>{glyph(run)}<dt>{escape(name)}</dt><dd>{escape(describe(run))}"
        + (f" ({escape(run['note'])})" if run.get("note") else "")
        + "</dd></div>"
        for name, run in seen.items()
    )
    return f'<div class="card"><dl class="methods">{items}</dl></div>'


def glossary() -> str:
    """Return how to read the figures."""
    items = "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in GLOSSARY)
    return f'<div class="card"><dl class="glossary">{items}</dl></div>'


def finding(table: Standings, name: str) -> str:
    """Return what a table says, in a sentence or two."""
    places = [p for p in table.places if p.difference is not None and p.difference.finite]
    how = "shared model" if table.regime == "frozen" else "trained jointly"
    where = f"<b>{escape(name)}, {how}.</b>"
    if not places:
        return f"<li>{where} No method finished; see <a href='#failures'>failures</a>.</li>"
    best = places[0]
    word = "evidence of held-out rows" if table.score == "log_evidence" else "ELBO"
    if table.joint_score:
        word = "evidence" if table.score == "log_evidence" else "ELBO"
    text = f"{where} <code>{escape(best.method)}</code> has the highest {word}"
    if best.method == table.baseline:
        text += ", and is the baseline"
    elif best.difference is not None:
        gain = f"{signed(best.difference.value)} ± {2 * best.difference.standard_error:.3f}"
        text += f": {gain} {table.unit} over the baseline <code>{escape(table.baseline)}</code>"
    near = []
    for place in places[1:]:
        ahead = paired(best.runs, place.runs, table.score, joint=table.joint_score)
        if ahead is not None and ahead.low <= 0:
            near.append(place.method)
    if near:
        names = ", ".join(f"<code>{escape(item)}</code>" for item in near)
        text += f". Not told apart from it (within two standard errors): {names}"
    if not best.converged:
        text += ", but its learning curve was still rising: the order is that of this budget"
    failed = sum(len(place.failures) for place in table.places)
    if failed:
        text += f". <a href='#failures'>{failed} {'run' if failed == 1 else 'runs'} failed</a>"
    wrong = [p.method for p in table.places if p.trouble == "wrong on minibatches"]
    if wrong:
        names = ", ".join(f"<code>{escape(item)}</code>" for item in wrong)
        text += f". Not ranked, since <a href='#refusals'>wrong on minibatches</a>: {names}"
    large = sum(p.trouble == "too many latents" for p in table.places)
    if large:
        text += f". <a href='#refusals'>{large} refused</a>: the target has too many latents"
    return f"<li>{text}.</li>"


def task_facts(about: Record, runs: Sequence[Record]) -> str:
    """Return what a task is: model, data, binarization, budget."""
    budget = about.get("budget", {})
    seeds = sorted({run["seed"] for run in runs})
    facts = {
        "Model": about.get("description") or about.get("model", ""),
        "Data": about.get("about_data", ""),
        "Binarization": about.get("binarization", ""),
        "Training shape": _shapes(about.get("training_shapes", [])),
        "Held-out shape": _shapes(about.get("held_out_shapes", [])),
        "Scores are of": about.get("scored", ""),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})",
        "Updates": _updates(budget),
        "Draws of scores": f"ELBO {budget.get('num_samples')}, evidence K = "
        f"{budget.get('num_evidence_samples')}, k̂ {budget.get('num_khat_samples')}",
        "Computed": _computed(runs),
        "Truth": _tiers(runs),
    }
    items = "".join(
        f"<dt>{key}</dt><dd>{escape(str(text))}</dd>" for key, text in facts.items() if text
    )
    return f'<dl class="about">{items}</dl>'


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(f" {TIMES} ".join(map(str, shape)) or "scalar" for shape in shapes)


def _updates(budget: Record) -> str:
    draws = budget.get("num_particles", 1)
    rows = f"{budget['batch_size']} training rows" if budget.get("batch_size") else "all rows"
    return (
        f"{budget.get('num_steps', '?')} for every method, each on {rows} with "
        f"{draws} {'draw' if draws == 1 else 'draws'} of the guide"
    )


def _computed(runs: Sequence[Record]) -> str:
    """Return in which mode updates were computed, and the methods where another one was asked for.

    Records made before there were modes say nothing, and are left out.
    """
    modes: dict[str, None] = {}
    fallbacks: dict[str, dict[str, None]] = {}
    for run in runs:
        for phase in run.get("computed", {}).values():
            modes[phase["mode"]] = None
            if phase["asked"] not in ("auto", phase["mode"]) or "capture_seconds" in phase:
                if "reason" not in phase or phase["mode"] == phase["asked"]:
                    continue
                text = f"asked for {phase['asked']}, ran {phase['mode']}: {phase['reason']}"
                fallbacks.setdefault(text, {})[run["method"]] = None
    parts = [", ".join(modes)] if modes else []
    parts += [f"{', '.join(names)} {text}" for text, names in fallbacks.items()]
    return "; ".join(parts)


def _tiers(runs: Sequence[Record]) -> str:
    words = {
        "exact": "exact: the model knows its own log p(x)",
        "bounds": "none: the evidence is estimated from below, never known exactly",
    }
    tiers = dict.fromkeys(run["tier"] for run in runs if "tier" in run)
    return "; ".join(words.get(tier, tier) for tier in tiers)


def regime_heading(table: Standings) -> tuple[str, str]:
    """Return the heading of a regime, and what it means."""
    heading, text = REGIMES[table.regime]
    points = [p for p in table.places if p.example["family"] == "delta"]
    if table.regime == "joint" and points:
        text += (
            " Methods that learn at a single point (delta, predictive coding) lack the entropy "
            "that keeps a posterior wide: their models tend to be overconfident, or to degenerate."
        )
    run = next((place.runs[0] for place in table.places if place.runs), None)
    shared = run.get("shared_model") if run else None
    if table.regime == "frozen" and shared and shared.get("guide"):
        text += (
            f" The model was trained with <code>{escape(shared['guide'])}</code> "
            f"({compact(shared['gradient_evaluations'])} gradient evaluations, "
            f"{duration(shared['seconds'])}), which no method is charged for."
        )
    # A shared model that no guide trained has nothing to train.
    untrained = run is not None and (
        run["model_digest"] == "no parameters"
        or (shared is not None and shared.get("guide") is None)
    )
    if table.regime == "frozen" and untrained:
        heading = "One model with nothing to learn, only the guide differs"
        text = (
            "The model has nothing to learn, so every method approximates the same posterior. "
            "They are ordered by their ELBO."
        )
    return heading, text


def failures(runs: Sequence[Record]) -> str:
    """Return what failed and why; messages that differ in numbers alone are shown once."""
    failed: dict[tuple[str, str, str], list[Record]] = {}
    pointless: dict[tuple[str, str, str], list[Record]] = {}
    for run in runs:
        if run["status"] == "failed":
            error = run["error"]
            key = (run["method"], error["type"], _NUMBERS.sub("#", error["message"]))
            failed.setdefault(key, []).append(run)
        elif "no_elbo" in run:
            key = (run["method"], "no ELBO", _NUMBERS.sub("#", run["no_elbo"]))
            pointless.setdefault(key, []).append(run)
    parts = []
    if failed:
        parts.append(
            "<p>A method that fails is a result. It keeps its row in the leaderboard, without a "
            f"score.</p>{''.join(_failure(*key, members) for key, members in failed.items())}"
        )
    if pointless:
        parts.append(
            "<p>These runs trained a model, whose evidence is scored, but ended without a "
            "posterior to score.</p>"
            + "".join(_failure(*key, members) for key, members in pointless.items())
        )
    return "".join(parts) or '<p class="muted">None: every run finished.</p>'


def refusals(runs: Sequence[Record]) -> str:
    """Return what was refused and why; empty where nothing was."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for run in runs:
        if run["status"] == "refused":
            refusal = run["refusal"]
            text = _NUMBERS.sub("#", refusal["message"])
            key = (run["task"], run["regime"], refusal["why"], text)
            groups.setdefault(key, []).append(run)
    if not groups:
        return ""
    items = []
    for (task, regime, why, _), members in groups.items():
        names = ", ".join(
            f"<b>{escape(name)}</b>" for name in dict.fromkeys(run["method"] for run in members)
        )
        kind = {"minibatches": "wrong on minibatches", "latents": "too many latents"}
        texts = {run["method"]: run["refusal"]["message"] for run in members}
        if len(set(texts.values())) == 1:
            lines = list(texts.values())[:1]
        else:
            lines = [f"{name}: {text}" for name, text in texts.items()]
        shown = "".join(f"<pre>{escape(text)}</pre>" for text in lines)
        items.append(
            f'<div class="refused">{names} on {escape(task)}, {escape(regime)}: '
            f"{kind.get(why, 'declined')}{shown}</div>"
        )
    return (
        '<h2 id="refusals">Not ranked</h2><p>These methods were not run, because their numbers '
        "would mean nothing or they are not made for such a target. It was found by looking at "
        f"each of them on this very task.</p>{''.join(items)}"
    )


def _failure(method: str, kind: str, _: str, members: Sequence[Record]) -> str:
    places: dict[str, list[str]] = {}
    for run in members:
        places.setdefault(f"{run['task']}, {run['regime']}", []).append(str(run["seed"]))
    where = "; ".join(
        f"{place}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
        for place, seeds in places.items()
    )
    first = members[0]
    error = first.get("error", {"message": first.get("no_elbo", ""), "where": ""})
    line = error.get("where", "")
    more = f" (the first of {len(members)} such messages)" if len(members) > 1 else ""
    return (
        f'<div class="fail"><b>{escape(method)}</b>: {escape(where)}'
        f"<pre>{escape(kind)}: {escape(error['message'])}</pre>"
        f'<span class="note">{escape(line)}{more}</span></div>'
    )

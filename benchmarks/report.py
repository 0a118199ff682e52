"""Report: one self-contained HTML file from a folder of records.

It loads nothing, neither scripts nor fonts, follows the light or dark preference of the reader,
prints, and is written from the records alone: nothing is run or drawn at random here.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.digest import code_digest
from benchmarks.figures import costs, gap_figure, legend, paired_figure, shots, theory
from benchmarks.gaps import gaps_figure
from benchmarks.leaderboard import standing
from benchmarks.page import page
from benchmarks.progress import duration
from benchmarks.records import Records, read_records
from benchmarks.sections import (
    failures,
    finding,
    glossary,
    methods,
    refusals,
    regime_heading,
    task_facts,
)
from benchmarks.standings import Standings, standings
from benchmarks.study_table import study_section
from benchmarks.words import title

__all__ = ["changed_digests", "render", "write_report"]


def changed_digests(records: Records) -> set[str]:
    """Return the digests of records whose code is no longer the code of this installation.

    Task files of the user's own are looked for in the current folder only; where they are not
    there, the project's modules alone cannot tell, and nothing is marked.
    """
    changed = set()
    sessions = [session for study in records.studies.values() for session in study.sessions]
    for command in (*records.commands, *sessions):
        for digest, names in command.get("digests", {}).items():
            files = [
                Path(name.removeprefix("file:")) for name in names if name.startswith("file:")
            ]
            modules = [name for name in names if not name.startswith("file:")]
            if all(file.is_file() for file in files) and code_digest(modules, files) != digest:
                changed.add(digest)
    return changed


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a folder of records.

    Args:
        folder: Folder with `*.jsonl` records.
        path: Where to write; `report.html` in the folder by default.

    Returns:
        Where it was written.

    Raises:
        FileNotFoundError: If there are no records.
    """
    place = Path(folder)
    target = (
        (place.parent if place.is_file() else place) / "report.html"
        if path is None
        else Path(path)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(read_records(place)), encoding="utf-8")
    return target


def render(records: Records) -> str:
    """Return the report of records as HTML.

    Raises:
        ValueError: If no run and no study is recorded.
    """
    runs = records.latest()
    if not runs and not records.studies:
        raise ValueError("A report needs at least one run or study; these records hold none.")
    if not runs:
        return _studies_alone(records)
    tables = standings(runs, records.tasks)
    changed = changed_digests(records)
    every = all(run["digest"] in changed for run in runs)
    # A mark on every row says less than one sentence.
    stale = set() if every else changed
    names = {name: _label(name, records) for name in dict.fromkeys(t.task for t in tables)}
    heading = _heading(records, names)
    body = [_top(heading, records, runs, tables, names)]
    body.append('<h2 id="short">In short</h2><div class="card"><ul class="findings">')
    body += [finding(table, names[table.task]) for table in tables]
    body.append("</ul></div>")
    body.append('<h2 id="methods">What was compared</h2>' + methods(runs))
    body.append('<h2 id="reading">How to read it</h2>' + glossary())
    for task, label in names.items():
        mine = [run for run in runs if run["task"] == task]
        body.append(f'<h2 id="{escape(task)}">{escape(label)}</h2>')
        body.append(task_facts(records.tasks.get(task, {}), mine))
        for table in (table for table in tables if table.task == task):
            body.append(_regime(table, stale))
    body += [study_section(study, changed) for study in records.studies.values()]
    body.append('<h2 id="failures">Failures</h2>' + failures(runs) + refusals(runs))
    body.append(_provenance(records, runs, changed))
    return page(heading, "\n".join(body))


def _studies_alone(records: Records) -> str:
    """A page of studies, without any comparison."""
    titles = {name: study.about.get("title", name) for name, study in records.studies.items()}
    heading = "; ".join(titles.values())
    nav = "".join(
        f'<a href="#study-{escape(name)}">{escape(text)}</a>' for name, text in titles.items()
    )
    changed = changed_digests(records)
    one = len(titles) == 1
    sections = [
        study_section(study, changed, titled=not one) for study in records.studies.values()
    ]
    contents = "" if one else f'<nav aria-label="Contents">{nav}</nav>'
    return page(
        heading,
        '<header class="top"><p class="eyebrow">pyro-zoo study</p>'
        f"<h1>{escape(heading)}</h1>{contents}</header>" + "\n".join(sections),
    )


def _label(task: str, records: Records) -> str:
    about = records.tasks.get(task, {})
    return title(about.get("model") or task)


def _heading(records: Records, names: dict[str, str]) -> str:
    if len(names) > 3:
        return f"Posteriors compared on {len(names)} models"
    return f"Posteriors compared: {', '.join(names.values())}"


def _top(
    heading: str,
    records: Records,
    runs: Sequence[dict[str, Any]],
    tables: Sequence[Standings],
    names: dict[str, str],
) -> str:
    failed = sum(run["status"] == "failed" for run in runs)
    refused = sum(run["status"] == "refused" for run in runs)
    methods = {run["method"] for run in runs}
    seeds = {run["seed"] for run in runs}
    done = [run for run in runs if run["status"] == "ok"]
    spent = sum(sum(run["wall_seconds"].values()) for run in done)
    budgets = dict.fromkeys(command["budget"] for command in records.commands)
    facts = {
        "models": len(names),
        "methods": len(methods),
        "seeds": len(seeds),
        "runs": len(runs),
        "failed": failed,
        **({"refused": refused} if refused else {}),
        "fitting time": duration(spent),
    }
    items = "".join(f"<div><dt>{key}</dt><dd>{text}</dd></div>" for key, text in facts.items())
    links = [
        ("short", "In short"),
        ("methods", "What was compared"),
        ("reading", "How to read it"),
        *((task, label) for task, label in names.items()),
        *((f"study-{n}", study.about.get("title", n)) for n, study in records.studies.items()),
        ("failures", "Failures"),
        ("origin", "Where the numbers come from"),
    ]
    nav = "".join(f'<a href="#{escape(key)}">{escape(text)}</a>' for key, text in links)
    warning = ""
    if set(budgets) - {"full"}:
        words = {
            "demo": "This is a demonstration with a shortened budget: the picture is right in "
            "outline, the numbers are not final.",
            "smoke": "This run only shows that everything works: its numbers mean nothing.",
        }
        texts = [words[budget] for budget in budgets if budget in words]
        warning = "".join(f'<p class="fail">{text}</p>' for text in texts)
    regimes = {table.regime for table in tables}
    how = (
        "each trained jointly with its model, and each on one shared model that was trained first"
        if len(regimes) > 1
        else "each trained jointly with its model"
        if "joint" in regimes
        else "all on one shared model"
    )
    return (
        '<header class="top"><p class="eyebrow">pyro-zoo benchmark</p>'
        f"<h1>{escape(heading)}</h1>"
        f'<p class="lead">A model with hidden variables can be fitted and queried only through an '
        f"approximate posterior. This report compares {len(methods)} ways to get one, {how}: how "
        f"close they come, and what they cost.</p>{warning}"
        f'<dl class="facts">{items}</dl><nav aria-label="Contents">{nav}</nav></header>'
    )


def _regime(table: Standings, stale: set[str]) -> str:
    name = f"{table.task}-{table.regime}".replace("_", "-")
    heading, text = regime_heading(table)
    figures = [
        paired_figure(table),
        gap_figure(table),
        gaps_figure(table),
        theory(table),
        *costs(table),
    ]
    return (
        f'<h3 id="{escape(name)}">{heading}</h3><p>{text}</p>'
        f"{standing(table, f't-{name}', stale)}{legend(table)}"
        f'<div class="pair">{"".join(figures)}</div>'
        f'<div class="pair below">{"".join(costs(table))}</div>{shots(table)}'
    )


def _provenance(records: Records, runs: Sequence[dict[str, Any]], changed: set[str]) -> str:
    commands = dict.fromkeys(item["command"] for item in records.commands if item["command"])
    texts = "".join(f'<pre class="cmd">{escape(command)}</pre>' for command in commands)
    versions = dict.fromkeys(
        ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        for run in runs
        if "versions" in run
    )
    machines = dict.fromkeys(
        f"{m['processor']}, {m['cores']} cores, {m['threads']} torch thread a run, "
        f"{m['jobs']} run{'s' if m['jobs'] > 1 else ''} at a time ({m['system']})"
        for m in (run["machine"] for run in runs if "machine" in run)
    )
    dtypes = dict.fromkeys(run["dtype"] for run in runs if "dtype" in run)
    old = sum(run["digest"] in changed for run in runs)
    dates = sorted(run["finished"][:10] for run in runs if "finished" in run)
    facts = {
        "Versions": " / ".join(versions),
        "Machine": " / ".join(machines),
        "Numbers": ", ".join(dtypes),
        "Dates": dates[0]
        if dates and dates[0] == dates[-1]
        else " to ".join(dates[:1] + dates[-1:]),
        "Code digests": ", ".join(dict.fromkeys(run["digest"] for run in runs)),
        "Code changed since": f"{old} of {len(runs)} runs"
        + (" (marked in the leaderboards)" if 0 < old < len(runs) else ""),
    }
    if records.unreadable:
        facts["Lines cut short"] = f"{records.unreadable}, left out"
    items = "".join(
        f"<dt>{key}</dt><dd>{escape(text)}</dd>" for key, text in facts.items() if text
    )
    return (
        '<h2 id="origin">Where the numbers come from</h2>'
        f"<p>The command that made them; given again, it only makes what is missing.</p>{texts}"
        f'<dl class="about">{items}</dl>'
        "<footer>Seconds depend on the machine and on what else it does; gradient evaluations do "
        "not. An energy of predictive coding is not a bound on the evidence and is never ranked; "
        "points are scored through their Laplace covariance.</footer>"
    )

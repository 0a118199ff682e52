"""Write the generated tables again, of the README and of pages in docs/.

    python docs/tables.py            write the pages
    python docs/tables.py --check    exit with 1 where a page is not what this would write

Models and guides come from the registries, results from the committed records, and what has a
graph from the capture suite and from programs that are run here (``docs/captured.py``), numbers
of the correspondences from their record (``docs/correspondences.py``).

A table stands between the marks ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records" / "quick"

# `python docs/tables.py` puts docs/, not the repository, on the path.
sys.path.insert(0, str(ROOT))

from docs.correspondences import numbers  # noqa: E402


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "") -> str:
    """A Markdown table.

    Args:
        header: Titles of the columns.
        rows: Cells, as many a row as there are titles.
        align: A letter a column, ``r`` for right; left by default.
    """
    rules = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    lines = [header, rules, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def summary(thing: Any) -> str:
    """The first sentence of a docstring, in Markdown."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0]
    return " ".join(text.split()).removesuffix(".").replace("``", "`")


def process(thing: Any) -> str:
    """The generative process of a docstring, its first indented block, one line a row."""
    block = re.search(r"\n\n((?: {4}.*\n?)+)", inspect.getdoc(thing) or "")
    if block is None:
        return ""
    # what stands far to the right of a line is a remark: the range of an index, a place to look
    lines = [re.sub(r"([~=].*?)\s{4,}.*", r"\1", line) for line in block[1].splitlines()]
    return "<br>".join(f"`{' '.join(line.split())}`" for line in lines if line.strip())


def references(thing: Any) -> str:
    """The ``References:`` of a docstring, of a class or else of its module, as links.

    A reference is ``Title (Authors, Year) address``, over as many lines as it takes.
    """
    for text in (inspect.getdoc(thing), inspect.getdoc(inspect.getmodule(thing))):
        part = re.search(r"^References:\n((?:[ \t]+.*\n?)+)", text or "", flags=re.MULTILINE)
        if part is None:
            continue
        lines = " ".join(line.strip().removeprefix("| ") for line in part[1].splitlines())
        found = re.findall(r"\(([^()]+, \d{4})\) (\w+:\S+)", lines)
        return "<br>".join(f"[{who}]({address})" for who, address in found)
    return ""


def resolve(path: Any) -> Any:
    """The object that ``"module:attribute"`` names."""
    if not isinstance(path, str):
        return path
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def models() -> str:
    """One line a model of ``zoo.MODELS``."""
    import zoo

    rows = []
    for name, entry in zoo.MODELS.items():
        model = resolve(entry)
        rows.append([f"`{name}`", summary(model), process(model), references(model)])
    return table(["Model", "What it is", "Process", "Reference"], rows)


def grid() -> str:
    """The families and the schemes of ``guides``, with what each can do."""
    from guides.families import FAMILIES
    from guides.grid import cell_name, refusal
    from guides.schemes import SCHEMES

    rows = []
    for name, path in FAMILIES.items():
        family = resolve(path)
        member = family(3)
        cited = references(family)
        rows.append(
            [
                f"`{name}`",
                summary(family) + (f" ({cited})" if cited else ""),
                _flag(member.has_density),
                _flag(member.has_density and member.scores_external_points),
                _flag(_has_entropy(member)),
                ", ".join(
                    f"`{scheme}_`" for scheme in SCHEMES if refusal(scheme, name) is not None
                ),
            ]
        )
    header = ["Family", "q(u) over unconstrained latents", "Density", "Scores any point"]
    header += ["Entropy in closed form", "Not under"]
    families = table(header, rows)
    rows = []
    for name, path in SCHEMES.items():
        scheme = resolve(path)
        cited = references(scheme)
        rows.append(
            [
                f"`{cell_name(name, 'normal')}`",
                summary(scheme) + (f" ({cited})" if cited else ""),
                _flag(scheme.amortized),
                "yes" if scheme.amortized else "yes, with the rows' numbers",
            ]
        )
    schemes = table(["For example", "Scheme", "Amortized", "Minibatches"], rows)
    return f"{families}\n\n{schemes}"


def _flag(value: bool) -> str:
    return "yes" if value else "no"


def _has_entropy(family: Any) -> bool:
    import torch

    return family.entropy(family.init(torch.zeros(2, family.size))) is not None


def results() -> str:
    """The committed records as one table: a method a row, a task and regime a column.

    On a frozen, shared model the ELBO scores guides; jointly trained, the evidence scores models.
    """
    from benchmarks.records import read_records
    from benchmarks.standings import standings

    if not RECORDS.is_dir():
        return "No records are committed yet: the table appears with the first of them."
    records = read_records(RECORDS)
    boards = standings(records.latest(), records.tasks)
    names = {"elbo": "ELBO", "log_evidence": "log evidence"}
    header = ["Method", *(f"{b.task}, {b.regime}: {names[b.score]}" for b in boards)]
    rows = []
    for method in dict.fromkeys(place.method for board in boards for place in board.places):
        cells = [_cell(board, method) for board in boards]
        rows.append([f"`{method}`", *cells])
    return "\n".join([table(header, rows, "l" + "r" * len(boards)), "", _caption(records, boards)])


def _cell(board: Any, method: str) -> str:
    """The score of the baseline, and of every other method its paired difference to it."""
    place = next((place for place in board.places if place.method == method), None)
    if place is None:
        return ""
    value, difference = place.score(board.score), place.difference
    if value is None or difference is None or not difference.finite:
        return "failed" if place.failures else "not finite"
    failed = f" ({len(place.failures)} failed)" if place.failures else ""
    if method == board.baseline:
        return f"{value.value:.2f}{failed}"
    return f"{difference.value:+.3f} ± {2 * difference.standard_error:.3f}{failed}"


def _caption(records: Any, boards: Sequence[Any]) -> str:
    """What the figures are: unit, rows, draws, seeds, command, versions."""
    run = next(run for run in records.latest() if run["status"] == "ok")
    scores, used = run["scores"], run["versions"]
    seeds = len({run["seed"] for run in records.runs})
    versions = ", ".join(f"{name} {used[name]}" for name in ("python", "torch", "pyro"))
    word = "seed" if seeds == 1 else "seeds"
    return (
        f"In nats per row, {run['scored']}, {seeds} {word}: the score of `{boards[0].baseline}`, "
        f"and the paired differences to it ± 2 standard errors. ELBO: "
        f"{scores['elbo']['num_samples']} draws a row. Log evidence: "
        f"{scores['log_evidence']['estimator']}. Made by `{records.commands[-1]['command']}` "
        f"with {versions}, on {run['finished'][:10]}."
    )


def studies() -> str:
    """The committed studies: one table each, with its question and the command that made it."""
    parts = []
    for name, rows in (
        ("mnist_gaps", _gaps),
        ("mnist_little_data", _little),
        ("sbibm", _sbibm),
        ("pc_chains", _chains),
        ("pc_decoder", _decoder),
        ("pc_classifier", _classifier),
        ("mnist_dlgm", _dlgm),
        ("jsb_chorales", _chorales),
        ("moving_digits", _digits),
        ("speed", _speed),
    ):
        file = RECORDS.parent / name / "study.jsonl"
        if not file.is_file():
            continue
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        about = [line for line in lines if line["kind"] == "study"][-1]
        found = {
            tuple(line["key"].values()): line["values"]
            for line in lines
            if line["kind"] == "result"
        }
        if not found:
            continue
        parts.append(f"**{about['title']}.** {about['question']}\n\n{rows(found)}")
        parts.append(f"{about['protocol']} Made by `{about['command']}`.")
    return "\n\n".join(parts)


Found = dict[tuple[Any, ...], dict[str, Any]]


def _gaps(found: Found) -> str:
    names = {
        ("encoder", ""): "encoder",
        ("refined, 1x iterations", "encoder"): "refined, 5 iterations of 4 draws",
        ("refined, 4x iterations", "encoder"): "refined, 20 iterations of 4 draws",
        ("normal", "better of both"): "best diagonal Gaussian of the image",
        ("sylvester", "better of both"): "best Sylvester flow of the image",
        ("multivariate_normal", "better of both"): "best full covariance of the image",
    }
    encoder = found["encoder", ""]["elbo"]
    rows = []
    for key, name in names.items():
        values = found[key]
        mean = statistics.mean(values["elbo"])
        gain = "" if name == "encoder" else _paired(values["elbo"], encoder)
        rows.append([name, f"{mean:.2f}", gain, str(values["draw_gradients"])])
    evidence = found["log_evidence", "multivariate_normal"]["log_evidence"]
    rows.append(["evidence, 5000 importance samples", f"{statistics.mean(evidence):.2f}"])
    rows[-1] += [_paired(evidence, encoder), ""]
    header = ["q", "ELBO, nats an image", "To the encoder", "Draw-gradients an image"]
    return table(header, rows, "lrrr")


def _chains(found: Found) -> str:
    names = {
        "gradient, centered": "gradient descent in the latents, 1 / lambda_max",
        "conjugate_gradient": "conjugate gradients, standardized",
        "auto": '`solver="auto"`',
    }
    depths = sorted({key[2] for key in found})
    rows = []
    for outputs in sorted({key[1] for key in found}):
        for solver, name in names.items():
            medians = [
                statistics.median(
                    values["products"]
                    for key, values in found.items()
                    if key[:3] == (solver, outputs, depth)
                )
                for depth in depths
            ]
            rows.append([name, str(outputs), *(f"{int(m):,}" for m in medians)])
    return table(
        ["Solver", "Outputs", *(f"Depth {d}" for d in depths)], rows, "lr" + "r" * len(depths)
    )


def _little(found: Found) -> str:
    rows = []
    seeds = sorted({seed for _, seed in found})
    for method in dict.fromkeys(method for method, _ in found):
        scores = [found[method, seed]["log_evidence"] for seed in seeds]
        cells = [
            "" if method == "direct" else _paired(score, found["direct", seed]["log_evidence"])
            for score, seed in zip(scores, seeds, strict=True)
        ]
        mean = statistics.mean(statistics.mean(score) for score in scores)
        rows.append([method.replace("_", "-"), f"{mean:.2f}", *cells])
    header = ["Guide in training", "Evidence, nats an image"]
    header += [f"To direct, seed {seed}" for seed in seeds]
    return table(header, rows, "lr" + "r" * len(seeds))


def _sbibm(found: Found) -> str:
    rows = []
    for task in ("two_moons", "slcp", "gaussian_mixture"):
        cells = [f"`{task}`"]
        for objective in ("forward", "reverse"):
            values = found[task, objective, 0]
            mean = statistics.mean(values["c2st"])
            cells.append(f"{mean:.3f} ({values['simulations'] / 1e6:.2f} M)")
        rows.append([*cells, f"{found[task, 'forward', 0]['npe']:.3f} (0.10 M)"])
    header = ["Task", "C2ST, forward KL (simulations)", "Reverse KL", "NPE, published"]
    return table(header, rows, "lrrr")


def _decoder(found: Found) -> str:
    """Errors of the decoder's predictions by method, and its evidence under a prior."""
    published = {"predictive coding": "9.24e-3", "incremental": "9.09e-3"}
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        runs = [values for (name, _), values in found.items() if name == method]
        if "mse" in runs[0]:
            errors = [run["mse"] * 1e3 for run in runs]
            each = ", ".join(f"{error:.3f}" for error in errors)
            mean = f"{statistics.mean(errors):.3f}e-3"
            minutes = f"{max(run['cpu_seconds'] for run in runs) / 60:.1f}"
            rows.append([method, mean, each, published[method], minutes])
            continue
        means = [statistics.mean(run["annealed"]) for run in runs]
        scores = [score for run in runs for score in run["log_evidence"]]
        tight = (
            f"{statistics.mean(means):.1f} nats (importance samples {statistics.mean(scores):.1f})"
        )
        rows.append([method, tight, ", ".join(f"{mean:.1f}" for mean in means), "", ""])
    header = ["Learned by", "Squared error a pixel, or evidence", "Seeds (errors: 1e-3)"]
    return table([*header, "Published", "Minutes of one core"], rows, "lrrrr")


def _by_seed(found: Found, value: str) -> dict[str, list[dict[str, Any]]]:
    """Runs of every method that have this value."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for (method, *_), values in found.items():
        if value in values:
            runs.setdefault(method, []).append(values)
    return runs


def _dlgm(found: Found) -> str:
    """Evidence by method, by both estimators on the images that both score."""
    rows: list[tuple[float, list[str]]] = []
    for method, runs in _by_seed(found, "annealed").items():
        annealed = [statistics.mean(run["annealed"]) for run in runs]
        number = len(runs[0]["annealed"])
        weighted = [statistics.mean(run["log_evidence"][:number]) for run in runs]
        everywhere = [statistics.mean(run["log_evidence"]) for run in runs]
        cells = [
            f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
            for values in (annealed, weighted, everywhere)
        ]
        minutes = f"{max(run['train_seconds'] for run in runs) / 60:.1f}"
        best = max(statistics.mean(annealed), statistics.mean(weighted))
        rows.append((best, [method, *cells, f"{runs[0]['updates']:,}", minutes]))
    header = [
        "Learned by",
        "Annealing, 100 images",
        "Importance sampling, the same 100",
        "Importance sampling, 1000 images",
        "Updates",
        "Minutes of training, at most",
    ]
    ordered = [row for _, row in sorted(rows, key=lambda item: -item[0])]
    return table(header, ordered, "lrrrrr")


def _chorales(found: Found) -> str:
    """Bounds a time step by method, beside those of the count models."""
    rows = []
    for method, runs in _by_seed(found, "nats").items():
        nats = [run["nats"] for run in runs]
        rows.append(
            [
                method,
                f"{statistics.mean(nats):.3f}",
                ", ".join(f"{value:.3f}" for value in nats),
                f"{statistics.mean(run['validation'] for run in runs):.3f}",
                f"{max(run['train_cpu_seconds'] for run in runs) / 60:.0f}",
                f"{runs[0]['independent_notes']:.2f} / {runs[0]['markov_notes']:.2f}",
            ]
        )
    header = ["q", "Nats a step, test", "Seeds", "Validation", "Minutes of one core"]
    return table([*header, "Independent / Markov notes"], rows, "lrrrrr")


def _digits(found: Found) -> str:
    """Bounds a pixel with and without a flow."""
    rows = []
    for method, runs in _by_seed(found, "nats_per_pixel").items():
        nats = [run["nats_per_pixel"] for run in runs]
        each = ", ".join(f"{value:.3f}" for value in nats)
        minutes = f"{max(run['train_cpu_seconds'] for run in runs) / 60:.1f}"
        parameters = f"{runs[0]['parameters']:,}"
        rows.append([method, f"{statistics.mean(nats):.3f}", each, parameters, minutes])
        plain = f"{runs[0]['gaussian_pixels']:.3f}"
    rows.append(["one Gaussian a pixel", plain, "", "", ""])
    header = ["Model", "Nats a pixel, test", "Seeds", "Parameters", "Minutes of one core"]
    return table(header, rows, "lrrrr")


def _classifier(found: Found) -> str:
    """Accuracy beside backpropagation's, and the regime."""
    rows = []
    for method in dict.fromkeys(method for method, _ in found):
        runs = {seed: values for (name, seed), values in found.items() if name == method}
        accuracies = [run["accuracy"] for run in runs.values()]
        gaps = [
            run["accuracy"] - found["backpropagation", seed]["accuracy"]
            for seed, run in runs.items()
            if ("backpropagation", seed) in found
        ]
        cells = [f"{statistics.mean(accuracies):.2f}", ", ".join(f"{a:.2f}" for a in accuracies)]
        cells.append("" if method == "backpropagation" else f"{statistics.mean(gaps):+.2f}")
        for name in ("step_times_curvature", "fraction_relaxed"):
            values = [run[name] for run in runs.values() if name in run]
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
        rows.append([method, *cells])
    header = ["Learned by", "Accuracy, %", "Seeds", "To backpropagation", "Step x lambda_max"]
    return table([*header, "Fraction relaxed"], rows, "lrrrrr")


_PEERS = {
    "Pyro": ("Pyro SVI", "Pyro traced at each update"),
    "Hand-written torch": ("hand-written torch",),
    "NumPyro, jitted update": ("NumPyro, jitted update",),
    "One JAX scan": ("NumPyro, svi.run as one scan", "hand-written JAX, one scan"),
    "PCX, FabricPC": ("PCX", "FabricPC"),
    "Products alone": ("matrix products alone",),
}


def _speed(found: Found) -> str:
    """Milliseconds a step of the compiled program, and what the others take of that time."""
    rows = []
    for task in dict.fromkeys(key[0] for key in found if key[1] == "compiled"):
        cells = [task, f"{found[task, 'compiled']['ms']:.3g}"]
        for names in _PEERS.values():
            ratios = [found[task, name]["ratio"] for name in names if (task, name) in found]
            cells.append(f"{ratios[0]:.3g}" if ratios else "")
        rows.append(cells)
    header = ["Task", "Compiled, ms a step", *(f"{name}, times" for name in _PEERS)]
    return table(header, rows, "l" + "r" * (len(header) - 1))


def captured() -> str:
    """What the capture suite holds to have a graph, and programs that have none."""
    from docs.captured import objectives, pairs, programs
    from guides.families import FAMILIES
    from tests.captured_cases import OBJECTIVE_FAMILIES
    from tests.cases import CORE_GUIDES, TWO_LEVELS

    rows, exceptions, others = pairs()
    models = ", ".join(f"`{name}`" for name in others)
    core = ", ".join(f"`{name}`" for name in CORE_GUIDES)
    parts = [
        f"Families (rows) and schemes (columns) on `{TWO_LEVELS}`; an empty cell is no guide:",
        _turned(["Family", *(row[0] for row in rows)], rows, list(FAMILIES)),
        f"Every one of {models} with every one of {core} is tried, too.",
        "Of these pairs, none runs eagerly."
        if not exceptions
        else table(["Model", "Guide", "Runs eagerly because"], exceptions),
        "Objectives (columns), with a point, two Gaussians, a mixture, an auxiliary-variable flow "
        "and a flow under an encoder. What an objective refuses itself is told by its eager step, "
        "too:",
        _turned(
            ["Family", *(row[0] for row in objectives())], objectives(), list(OBJECTIVE_FAMILIES)
        ),
        "Programs that run eagerly, and what `compiled` says of them:",
        table(["What the program does", "Reason"], programs()),
    ]
    return "\n\n".join(parts)


def _turned(header: Sequence[str], rows: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """A table whose columns are these rows."""
    cells = [[f"`{name}`", *(row[i + 1] for row in rows)] for i, name in enumerate(names)]
    return table([header[0], *(f"`{name}`" for name in header[1:])], cells)


def _paired(high: Sequence[float], low: Sequence[float]) -> str:
    differences = [a - b for a, b in zip(high, low, strict=True)]
    error = 2 * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {error:.2f}"


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"models": models, "guides": grid, "results": results, "studies": studies},
    "docs/compiled.md": {"captured": captured},
    "docs/correspondences.md": {"numbers": numbers},
}


def rewritten(page: str, text: str) -> str:
    """A page with its tables made again.

    Args:
        page: Its path from the root of the repository.
        text: What it holds.

    Raises:
        ValueError: If the marks of a table are not there, once each.
    """
    for name, make in TABLES[page].items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have {begin} and {end}, once each.")
        head, rest = text.split(begin)
        tail = rest.split(end)[1]
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; the exit code is 1 where a check finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, show what differs")
    options = parser.parse_args(arguments)
    differs = False
    for page in TABLES:
        before = (ROOT / page).read_text(encoding="utf-8")
        after = rewritten(page, before)
        if not options.check:
            (ROOT / page).write_text(after, encoding="utf-8")
            continue
        old, new = before.splitlines(), after.splitlines()
        for line in difflib.unified_diff(old, new, page, "generated", lineterm="", n=0):
            print(line)
        if before != after:
            print(f"{page} is not what docs/tables.py writes. The fix: make tables")
            differs = True
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())

"""The report: one file that loads nothing, with the numbers of the records and no others."""

import base64
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import read_records, study_table, write_report
from benchmarks.charts import cost_chart, interval, signed, span
from benchmarks.convergence import Rise
from benchmarks.differences import Estimate, paired
from benchmarks.digest import closure, code_digest
from benchmarks.gaps import gap_bars
from benchmarks.images import decoded, encoded
from benchmarks.leaderboard import value
from benchmarks.png import data_uri, strip
from benchmarks.records import append, rounded
from benchmarks.report import changed_digests, render
from benchmarks.standings import standings
from benchmarks.study import StudyLog
from benchmarks.study_table import cells
from benchmarks.svg import Axis, compact
from benchmarks.table import text_table
from benchmarks.words import describe

RECORDS = Path(__file__).resolve().parents[1] / "benchmarks" / "records"
MODULES = closure(["benchmarks.records"])
DIGEST = code_digest(MODULES)
METHODS = {  # method -> (family, scheme, gain over the baseline)
    "amortized_normal": ("normal", "Encoder", 0.0),
    "normal": ("normal", "Local", 0.4),
    "multivariate_normal": ("multivariate_normal", "Local", 0.7),
    "AutoNormal": ("Normal", "Local", 0.4),
}


def run(method, seed, regime, rows, *, digest=DIGEST, model_digest="m"):
    family, scheme, _ = METHODS[method]
    evidence = rows + 0.1 + (0.3 if regime == "joint" else 0.9 - METHODS[method][2])
    images = np.linspace(0, 1, 4 * 64).reshape(4, 8, 8)
    return {
        "kind": "run", "key": f"{method}{seed}{regime}{digest}", "task": "tiny", "model": "vae",
        "regime": regime, "method": method, "family": family, "scheme": scheme, "loop": "svi",
        "seed": seed, "status": "ok", "digest": digest, "tier": "bounds", "dtype": "float32",
        "scored": "held-out rows", "refitted": scheme == "Local",
        "scores": {
            "elbo": summary(rows, 400, "mean of log p(x, z) - log q(z)"),
            "log_evidence": summary(evidence, 5000, "log-mean-exp of 5000 importance weights"),
            "khat": {"median": 0.4, "above": 0.123, "threshold": 0.7, "joint": False},
        },
        "rows": {
            "elbo": rounded(rows), "log_evidence": rounded(evidence),
            "khat": rounded(np.full(len(rows), 0.4)),
        },
        "gradient_evaluations": {"training": 12_000, "held_out": 345},
        "wall_seconds": {"training": 3.25, "held_out": 1.5},
        "curve_rows": "held-out rows",
        "curve": [
            {"step": s, "gradient_evaluations": 100 * s, "seconds": 0.1 * s,
             "elbo": float(rows.mean()) - 5.0 / s}
            for s in (10, 30, 100)
        ],
        "model_digest": f"{model_digest}{seed}" if regime == "frozen" else method,
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "machine": {"system": "Linux", "processor": "a processor", "cores": 2, "threads": 1,
                    "jobs": 2},
        "finished": "2026-01-02T03:04:05+00:00",
        **({"images": {k: encoded(images) for k in ("originals", "reconstructions", "samples")}}
           if seed == 0 else {}),
    }  # fmt: skip


def summary(rows, num_samples, estimator):
    return {
        "value": float(rows.mean()), "standard_error": float(rows.std(ddof=1)) / len(rows) ** 0.5,
        "total": float(rows.sum()), "total_error": 0.5, "joint": False, "num_rows": len(rows),
        "num_samples": num_samples, "estimator": estimator,
    }  # fmt: skip


def failed(method, regime="joint", message="the Hessian of <site> is indefinite"):
    record = run(method, 0, regime, np.zeros(5))
    for name in ("scores", "rows", "curve", "tier", "model_digest", "images", "dtype"):
        record.pop(name, None)
    error = {"type": "ValueError", "message": message, "where": "guides/x.py:3 in f"}
    return {**record, "status": "failed", "error": error}


def headers(digests=None, budget="full"):
    return [
        {
            "kind": "command", "command": "python -m benchmarks run tiny.py --seeds 2",
            "budget": budget, "digests": digests or {DIGEST: MODULES},
        },
        {
            "kind": "task", "name": "tiny", "model": "vae", "description": "A model of few words.",
            "about_data": "Made-up rows.", "binarization": "threshold at 0.5",
            "training_shapes": [[40, 64]], "held_out_shapes": [[30, 64]],
            "scored": "held-out rows", "baseline": "amortized_normal",
            "expected_order": ["amortized_normal", "normal", "multivariate_normal"],
            "budget": {"num_steps": 123, "num_particles": 1, "batch_size": None,
                       "num_samples": 400, "num_evidence_samples": 5000, "num_khat_samples": 1000},
            "image_shape": [8, 8],
        },
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    records = headers()
    for seed in (0, 1):
        ground = -20 + generator.normal(size=30)
        for regime in ("joint", "frozen"):
            for method, (_, _, gain) in METHODS.items():
                noise = 0.05 * generator.normal(size=30)
                records.append(run(method, seed, regime, ground + gain + noise))
    records.append({**failed("normal"), "method": "amortized_delta", "family": "delta"})
    append(tmp_path / "runs.jsonl", records)
    return tmp_path


@pytest.fixture
def html(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


class Balanced(HTMLParser):
    """Checks that every element is closed where it should be, and collects text and attributes."""

    VOID = frozenset({"meta", "img", "br", "input"})
    DRAWN = frozenset({"circle", "line", "polyline", "polygon"})

    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        assert tag in self.DRAWN

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


def test_it_loads_nothing(html):
    for pattern in (
        r"https?://",
        r"<script",
        r"<link",
        r"@import",
        r"url\(",
        r"<iframe",
        r"srcset",
    ):
        assert not re.search(pattern, html, flags=re.IGNORECASE), pattern
    for tag, name, content in parsed(html).attributes:
        if name in ("src", "href", "data", "action"):
            assert content.startswith(("data:image/png;base64,", "#")), (tag, content)


def test_links_within_it_lead_somewhere(html):
    attributes = parsed(html).attributes
    ids = [content for _, name, content in attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    for _, name, content in attributes:
        if name == "href":
            assert content[1:] in ids


def test_numbers_are_those_of_the_records(html, folder):
    runs = [item for item in read_records(folder).runs if item["status"] == "ok"]
    text = "".join(parsed(html).text)
    for regime, score in (("frozen", "elbo"), ("joint", "log_evidence")):
        mine = {
            name: [item for item in runs if (item["method"], item["regime"]) == (name, regime)]
            for name in METHODS
        }
        for name in ("normal", "multivariate_normal", "AutoNormal"):
            tables = [
                np.stack([item["rows"][score] for item in mine[which]])
                for which in (name, "amortized_normal")
            ]
            table = tables[0] - tables[1]
            error = math.sqrt(table.mean(0).var(ddof=1) / 30 + table.mean(1).var(ddof=1) / 2)
            found = paired(mine[name], mine["amortized_normal"], score)
            assert found.value == pytest.approx(table.mean(), abs=1e-12)
            assert found.standard_error == pytest.approx(error, abs=1e-12)
            # once in the leaderboard, once in the figure
            assert text.count(f"{signed(table.mean())} ± {2 * error:.3f}") >= 2
    for shown in (
        "12.3k",
        "4.75",
        "12%",
        "5000 importance weights",
        "400 draws",
        "30 held-out rows",
    ):
        assert shown in text, shown


def test_it_can_be_read_without_the_docs(html):
    text = "".join(parsed(html).text)
    for words in (
        "A model of few words.", "Made-up rows.", "threshold at 0.5", "How to read it",
        "What was compared", "Kullback-Leibler", "Gradient evaluations", "Paired difference",
        "python -m benchmarks run tiny.py --seeds 2", "torch 2.13.0", "2 cores",
        "a Gaussian with a full covariance; free parameters for every row",
        "Reconstructions", "Samples", "What theory demands",
    ):  # fmt: skip
        assert words in text, words


def test_expected_order_is_checked(folder, html):
    text = "".join(parsed(html).text)
    assert text.count("✓") == 3
    assert "ELBO of multivariate_normal" in text
    (table,) = [t for t in standings(read_records(folder).latest(), {}) if t.regime == "frozen"]
    assert table.checks == ()


def test_losses_by_shape_and_by_encoder(folder, html):
    """Approximation gap and amortization gap of a family add up to what its encoder misses."""
    records = read_records(folder)
    (table,) = [t for t in standings(records.latest(), records.tasks) if t.regime == "frozen"]
    losses = {item.family: item for item in table.losses}
    assert set(losses) == {"normal", "multivariate_normal", "Normal"}
    places = {place.method: place for place in table.places}
    # log p(x) is one bound for all: that of the method whose bound is highest
    best = max(table.places, key=lambda place: place.evidence.low)
    assert best.method in table.truth
    assert "K = 5000" in table.truth
    mean_field = losses["normal"]
    assert mean_field.method == "amortized_normal"
    # against numbers worked out here, from the rows of the records
    rows = {
        name: np.stack([run["rows"]["elbo"] for run in places[name].runs])
        for name in ("normal", "amortized_normal")
    }
    truth = np.stack([run["rows"]["log_evidence"] for run in best.runs])
    for found, values in (
        (mean_field.approximation, truth - rows["normal"]),
        (mean_field.amortization, rows["normal"] - rows["amortized_normal"]),
        (mean_field.total, truth - rows["amortized_normal"]),
    ):
        error = math.sqrt(values.mean(0).var(ddof=1) / 30 + values.mean(1).var(ddof=1) / 2)
        assert found.value == pytest.approx(values.mean(), abs=1e-12)
        assert found.standard_error == pytest.approx(error, abs=1e-12)
    both = mean_field.approximation.value + mean_field.amortization.value
    assert both == pytest.approx(mean_field.total.value, abs=1e-12)
    assert losses["multivariate_normal"].amortization is None
    assert "Where the nats go" in html


def test_stacked_bars_are_as_long_as_the_gaps(folder):
    """Pixels of the two parts are to each other as the gaps are, one bar a family."""
    records = read_records(folder)
    (table,) = [t for t in standings(records.latest(), records.tasks) if t.regime == "frozen"]
    (losses,) = [item for item in table.losses if item.amortization is not None]
    drawn = ElementTree.fromstring(gap_bars(table))
    bars = [e for e in drawn.iter() if e.tag == "rect"]
    assert len(bars) == len(table.losses) + 1
    (pale,) = [e for e in bars if "pale" in e.get("class")]
    solid = bars[bars.index(pale) - 1]
    assert "pale" not in solid.get("class")
    ratio = float(pale.get("width")) / float(solid.get("width"))
    expected = losses.amortization.value / losses.approximation.value
    assert ratio == pytest.approx(expected, rel=0.01)
    assert float(pale.get("x")) == pytest.approx(
        float(solid.get("x")) + float(solid.get("width")), abs=0.11
    )


def test_an_exact_evidence_stands_for_log_p_and_flows_are_labelled(folder):
    records = read_records(folder)
    for item in records.runs:
        if item["status"] == "ok" and item["regime"] == "frozen":
            # shared weights of the flow are seen in the record
            item["family_weights"] = 17 if item["method"] == "normal" else 0
            item["rows"]["exact_log_evidence"] = [v + 9.0 for v in item["rows"]["elbo"]]
    (table,) = [t for t in standings(records.latest(), records.tasks) if t.regime == "frozen"]
    assert table.truth == "exact"
    drawn = gap_bars(table)
    assert drawn.count("(shared flow)</text>") == 1
    assert "amortized_normal (shared flow)" in drawn
    assert "Shared flow" in render(records)


def test_an_encoder_that_comes_out_ahead_is_outlined(tmp_path):
    rows = np.random.default_rng(0).normal(size=30)
    gains = {"amortized_normal": 0.5, "normal": 0.4}
    records = [run(name, 0, "frozen", rows + gain) for name, gain in gains.items()]
    append(tmp_path / "runs.jsonl", [*headers(), *records])
    read = read_records(tmp_path)
    (table,) = standings(read.latest(), read.tasks)
    drawn = gap_bars(table)
    assert "outline" in drawn
    assert "pale" not in drawn
    assert f"{signed(-0.1)} ± " in render(read)


def test_a_violated_order_is_said(tmp_path):
    worse = {"amortized_normal": 1.0, "normal": 0.4, "multivariate_normal": 0.7}
    rows = np.random.default_rng(0).normal(size=30)
    records = [run(name, 0, "frozen", rows + gain) for name, gain in worse.items()]
    append(tmp_path / "runs.jsonl", [*headers(), *records])
    html = render(read_records(tmp_path))
    assert "violates the order" in html
    assert "✗" in html


def test_failures_are_shown_and_escaped(html):
    assert "the Hessian of &lt;site&gt; is indefinite" in html
    assert "<site>" not in html
    text = "".join(parsed(html).text)
    assert "amortized_delta" in text
    assert "guides/x.py:3 in f" in text


def test_messages_that_differ_in_numbers_are_shown_once(tmp_path):
    text = "the Hessian has {} bad rows, smallest eigenvalue {}"
    records = [
        failed("normal", regime, text.format(n, value))
        for regime, n, value in (("joint", 3, -1.5), ("frozen", 17, -2e-3))
    ]
    append(tmp_path / "runs.jsonl", [*headers(), *records, failed("AutoNormal", message="other")])
    html = render(read_records(tmp_path))
    assert html.count('<div class="fail"') == 2
    assert "tiny, joint, seed 0; tiny, frozen, seed 0" in html
    assert "the Hessian has 3 bad rows" in html
    assert "the first of 2 such messages" in html


def test_a_model_without_a_posterior_still_has_its_evidence(tmp_path):
    """Jointly trained, a point that is no mode has no ELBO; its model is ranked all the same."""
    rows = np.random.default_rng(0).normal(size=30)
    records = [run(name, 0, "joint", rows + gain) for name, (_, _, gain) in METHODS.items()]
    point = run("normal", 0, "joint", rows + 5.0)
    for name in ("elbo", "khat"):
        del point["scores"][name], point["rows"][name]
    point |= {"method": "amortized_delta", "family": "delta", "no_elbo": "the point is no mode"}
    append(tmp_path / "runs.jsonl", [*headers(), *records, point])
    found = read_records(tmp_path)
    (table,) = standings(found.latest(), found.tasks)
    first = table.places[0]
    assert first.method == "amortized_delta"
    assert first.elbo is None
    assert first.gap is None
    assert first.difference.value > 4
    html = render(found)
    assert "the point is no mode" in html
    assert "ended without a posterior" in html
    assert "amortized_delta" in text_table(found)


def refused(method, why, message):
    record = failed(method, "frozen")
    del record["error"]
    return {**record, "status": "refused", "refusal": {"why": why, "message": message}}


def test_what_is_refused_is_not_ranked_and_no_failure(folder):
    message = "Wrong: built on <4> rows it has {} parameters. More."
    append(
        folder / "runs.jsonl",
        [
            {**refused("normal", "minibatches", message.format(8)), "method": "AutoA"},
            {**refused("normal", "minibatches", message.format(9)), "method": "AutoB"},
            {**refused("normal", "latents", "There are 250."), "method": "AutoC"},
        ],
    )
    records = read_records(folder)
    (table,) = [t for t in standings(records.latest(), records.tasks) if t.regime == "frozen"]
    last = {place.method: place for place in table.places[-3:]}
    assert {name: place.trouble for name, place in last.items()} == {
        "AutoA": "wrong on minibatches",
        "AutoB": "wrong on minibatches",
        "AutoC": "too many latents",
    }
    html = render(records)
    text = "".join(parsed(html).text)
    # those with one reason stand together, each with its own numbers
    assert html.count('<div class="refused"') == 2
    assert "AutoA: Wrong: built on <4> rows it has 8 parameters. More." in text
    assert "AutoB: Wrong: built on <4> rows it has 9 parameters. More." in text
    assert "Not ranked, since wrong on minibatches: AutoA, AutoB" in text
    assert "1 refused: the target has too many latents" in text
    shown = text_table(records)
    assert "Not ranked, too many latents: AutoC. There are 250." in shown


def test_a_curve_that_still_rises_is_marked(folder):
    records = read_records(folder)
    for item in records.runs:
        if item["method"] == "AutoNormal":
            # half of the whole climb in the last part of the updates
            base = item["curve"][-1]["elbo"]
            for point, elbo in zip(item["curve"], (base - 1.0, base - 0.5, base), strict=True):
                point["elbo"] = elbo
        elif item["status"] == "ok":
            for point in item["curve"]:
                point["elbo"] = item["curve"][-1]["elbo"]
    for table in standings(records.latest(), records.tasks):
        rising = [place for place in table.places if not place.converged]
        assert [place.method for place in rising] == ["AutoNormal"]
        assert rising[0].rise.value == pytest.approx(0.5)
    html = render(records)
    assert html.count("not converged</span>") == 2
    assert "AutoNormal</code> +0.500 nats per row" in html
    assert "AutoNormal +0.500" in text_table(records)


def test_noise_is_no_rise():
    assert not Rise(0.1, 1.0, 0.06).going_on
    assert Rise(0.1, 1.0, 0.04).going_on
    assert not Rise(-0.4, 1.0, 0.0).going_on


def test_cells_left_out_are_told(tmp_path):
    about = headers()
    about[1]["left_out"] = {"amortized_delta": "It has no rows <at all>. Use another."}
    rows = np.full(30, -20.0)
    append(tmp_path / "runs.jsonl", [*about, run("normal", 0, "frozen", rows)])
    read = read_records(tmp_path)
    assert "<code>amortized_delta</code> (It has no rows &lt;at all&gt;.)" in render(read)
    assert "amortized_delta: It has no rows <at all>." in text_table(read)


# ---------------------------------------------------------------------------- studies


def a_study(path, **fields):
    about = {
        "title": "Gaps of <one> decoder",
        "question": "How much does refinement recover?",
        "protocol": "A hundred rows.",
        "command": "python -m benchmarks.studies.tiny",
        **fields,
    }
    return StudyLog(path, **about)


def test_a_study_is_a_table_with_its_notes(tmp_path):
    with a_study(tmp_path / "gaps.jsonl", columns={"nats": "per image"}) as log:
        log.add(key={"method": "encoder"}, values={"nats": [1.0, 2.0, 6.0], "kept": True})
        log.add(key={"method": "refined"}, values={"nats": -0.25, "kept": None})
        log.note("Refinement <helps>.")
    html = write_report(tmp_path).read_text()
    text = "".join(parsed(html).text)
    error = np.array([1.0, 2.0, 6.0]).std(ddof=1) / 3**0.5
    for words in (
        "Gaps of <one> decoder", "How much does refinement recover?", "A hundred rows.",
        "python -m benchmarks.studies.tiny", "Refinement <helps>.", "per image",
        f"3.000 ± {2 * error:.3f}", "\u22120.250", "yes",
    ):  # fmt: skip
        assert words in text, words
    assert "python" in text
    assert "<one>" not in html
    assert "encoder" in text_table(read_records(tmp_path))


def test_a_study_is_averaged_over_what_it_says(tmp_path):
    with a_study(tmp_path / "gaps.jsonl", over=("seed",)) as log:
        for seed, value in enumerate((1.0, 2.0, 4.0)):
            log.add(key={"task": "a", "seed": seed}, values={"c2st": value, "rows": 7})
        log.add(key={"task": "b", "seed": 0}, values={"c2st": 5.0, "rows": 7})
    (study,) = read_records(tmp_path).studies.values()
    heads, rows = cells(study)
    assert heads == ["task", "c2st", "rows", "results (seed)", "seconds"]
    error = np.array([1.0, 2.0, 4.0]).std(ddof=1) / 3**0.5
    assert rows[0][:4] == ["a", f"2.333 ± {2 * error:.3f}", "7", "3"]
    assert rows[1][:4] == ["b", "5", "7", "1"]


def test_rows_that_are_measured_again_are_no_new_rows(tmp_path):
    """The error is over rows and over repetitions, as in the leaderboards."""
    table = np.random.default_rng(0).normal(size=(3, 20)) + 5 * np.arange(20)
    with a_study(tmp_path / "gaps.jsonl", over=("seed",)) as log:
        for seed, row in enumerate(table):
            log.add(key={"task": "a", "seed": seed}, values={"nats": row})
    (study,) = read_records(tmp_path).studies.values()
    _, (row,) = cells(study)
    error = math.sqrt(table.mean(0).var(ddof=1) / 20 + table.mean(1).var(ddof=1) / 3)
    assert row[1] == f"{table.mean():.3f} ± {2 * error:.3f}"


def test_studies_stand_beside_runs_and_say_when_code_has_changed(folder):
    with a_study(folder / "gaps.jsonl", modules=["benchmarks.records"]) as log:
        log.add(key={"n": 1}, values={"nats": 1.0})
        assert not changed_digests(read_records(folder))
    append(
        folder / "old.jsonl",
        [
            {"kind": "study", "title": "Old", "digests": {"0123456789abcdef": MODULES}},
            # columns side by side, written by hand
            {"kind": "result", "digest": "0123456789abcdef", "n": 1, "nats": 2.5},
            {"kind": "result", "digest": "0123456789abcdef", "n": 2, "nats": 3.5},
        ],
    )
    html = render(read_records(folder))
    text = "".join(parsed(html).text)
    assert "Leaderboard" in text
    assert 'href="#study-gaps"' in html
    assert 'id="study-old"' in html
    assert "2 of 2 results" in text
    assert "3.500" in text


def test_a_folder_of_folders_is_one_report(folder, tmp_path_factory):
    above = tmp_path_factory.mktemp("all")
    for name in ("one", "two"):
        with a_study(above / name / "study.jsonl", title=f"Study {name}") as log:
            log.add(key={"n": 1}, values={"nats": 1.0})
    assert set(read_records(above).studies) == {"one-study", "two-study"}
    html = render(read_records(above))
    assert "Study one" in html
    assert "Study two" in html


@pytest.mark.parametrize(
    "place", sorted({file.parent for file in RECORDS.glob("*/*.jsonl")}), ids=lambda p: p.name
)
def test_committed_records_make_a_report(place):
    parsed(render(read_records(place)))


def test_only_failures_make_a_report_too(tmp_path):
    append(tmp_path / "runs.jsonl", [*headers(), failed("normal", message="<script>no</script>")])
    html = render(read_records(tmp_path))
    assert "No method finished" in html
    assert "<script" not in html
    assert "failed: ValueError" in text_table(read_records(tmp_path))


def test_changed_code_is_marked(folder, html):
    assert "code changed since" not in html
    old = {**run("normal", 0, "frozen", np.full(30, -20.0)), "digest": "0123456789abcdef"}
    append(folder / "runs.jsonl", [*headers({"0123456789abcdef": MODULES})[:1], old])
    records = read_records(folder)
    assert changed_digests(records) == {"0123456789abcdef"}
    assert render(records).count("code changed since</span>") == 1


def test_a_shortened_budget_is_said(tmp_path):
    rows = np.full(30, -20.0)
    append(tmp_path / "runs.jsonl", [*headers(budget="demo"), run("normal", 0, "frozen", rows)])
    assert "shortened budget" in render(read_records(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    append(tmp_path / "runs.jsonl", headers())
    with pytest.raises(ValueError, match="at least one run or study"):
        write_report(tmp_path)


def test_tables_sort_without_a_script(html):
    """Every sortable heading is a radio button with a rule, and every row knows its place."""
    for name in ("t-tiny-joint", "t-tiny-frozen"):
        rules = set(
            re.findall(rf"#{name}:has\(\.(k\d):checked\) tbody tr{{order:var\(--k\d\)}}", html)
        )
        table = re.search(rf'<table class="t" id="{name}".*?</table>', html, flags=re.DOTALL)[0]
        buttons = set(re.findall(r'type="radio" name="[\w-]+" class="(k\d)"', table))
        assert rules == buttons
        assert len(rules) >= 6
        assert len(re.findall(" checked", table)) == 1
        rows = re.findall(r'<tr role="row" class="(?:base)?" style="([^"]*)"', table)
        for key in rules:
            ranks = [int(re.search(rf"--{key}:(\d+)", row)[1]) for row in rows]
            assert sorted(ranks) == list(range(len(rows)))


def test_drawings_are_well_formed(html):
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("aria-label") or root.get("aria-hidden")
        assert "nan" not in drawing.lower()


def test_pictures_are_png_files_of_the_pixels():
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    raw = base64.b64decode(data_uri(strip(images)).partition(",")[2])
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(raw):
        (length,) = struct.unpack(">I", raw[place : place + 4])
        kind, content = raw[place + 4 : place + 8], raw[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", raw[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + content)
        chunks[kind] = content
        place += 12 + length
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (width, height, depth, color) == (4 + 1 + 4, 3, 8, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(3, 1 + 9)
    assert (lines[:, 0] == 0).all()
    # ink is dark: a pixel of one is black
    assert (255 - lines[:, 1:5] == images[0]).all()
    assert (255 - lines[:, 6:] == images[1]).all()


def test_images_survive_a_record():
    images = np.random.default_rng(0).uniform(size=(3, 5, 4))
    back = decoded(json.loads(json.dumps(encoded(images))))
    assert back.shape == (3, 5, 4)
    assert np.abs(back / 255 - images).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("shape", [(3,), (3, 3, 1)])
def test_other_shapes_are_no_pictures(shape):
    with pytest.raises(ValueError, match="A picture is uint8"):
        data_uri(np.zeros(shape, dtype=np.uint8))


def test_axes_have_round_ticks():
    assert Axis(0.0, 10.0, 0, 1).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Axis(1.0, 100.0, 0, 1, log=True).ticks() == [1, 2, 5, 10, 20, 50, 100]
    assert Axis(1.0, 1e4, 0, 1, log=True).ticks() == [1, 10, 100, 1000, 10_000]
    assert Axis(0.0, 1.0, 10.0, 20.0)(5.0) == 20.0
    assert compact(math.nan) == compact(math.inf) == "\u2013"


def test_outliers_do_not_squeeze_the_rest():
    near = [Estimate(v, 0.01, (v,), 10) for v in (0.0, 0.1, 0.2)]
    far = Estimate(-40.0, 0.01, (-40.0,), 10)
    low, high = span([*near, far])
    assert -2 < low < 0 < high < 1
    assert "polyline" in interval(far, low, high, "c1", "circle")


def test_values_that_are_not_finite_are_said():
    nothing = Estimate(math.nan, math.nan, (math.nan,), 3)
    assert value(nothing) == signed(math.nan) == "not finite"
    assert "failed" in value(None)


def test_cost_is_drawn_against_the_exact_evidence_where_it_is_known(folder):
    records = read_records(folder)
    for item in records.runs:
        if item["status"] == "ok":
            item["rows"]["exact_log_evidence"] = [v + 9.0 for v in item["rows"]["elbo"]]
    (table,) = [t for t in standings(records.latest(), records.tasks) if t.regime == "frozen"]
    # the best ELBO is 9 nats below the truth, and curves end there
    drawn = cost_chart(table, "seconds", "a chart")
    gaps = [float(g) for g in re.findall(r": (\d+\.\d+) after", drawn)]
    assert min(gaps) == pytest.approx(9.05, abs=0.02)


def test_text_table_has_the_same_numbers(folder):
    text = text_table(read_records(folder))
    assert "tiny, shared model" in text
    assert "tiny, trained jointly" in text
    for line in text.splitlines():
        if line.startswith("amortized_normal"):
            assert "baseline" in line
    assert text.index("multivariate_normal", text.index("shared model")) < text.index(
        "amortized_normal", text.index("shared model")
    )


def test_every_guide_of_the_grid_is_described():
    import guides
    from benchmarks.methods import as_method

    for name in guides.GUIDES:
        method = as_method(name)
        text = describe(
            {"method": name, "family": method.family, "scheme": method.scheme, "loop": "svi"}
        )
        assert not text.startswith("Pyro"), f"no words for {method.family!r}"
        assert method.scheme not in text, f"no words for {method.scheme!r}"


def test_a_curve_is_told_by_its_ends():
    """Lists of losses, or of pairs of step and loss, of one seed or of several."""
    assert study_table._curve([[3.0, 2.0, 1.0]]) == "from 3 to 1 in 3 points"
    pairs = [[[5, 4.0], [10, 2.0]], [[5, 2.0], [10, 1.0], [15, 0.0], [20, 0.0]]]
    assert study_table._curve(pairs) == "from 3 to 1 in 3 points"
    assert study_table._curve([None]) == study_table.DASH

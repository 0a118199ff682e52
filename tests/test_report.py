"""The report: one file that loads nothing, with the numbers of the records and no others."""

import base64
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import read_records, write_report
from benchmarks.charts import cost_chart, interval, signed, span
from benchmarks.differences import Estimate, paired
from benchmarks.digest import closure, code_digest
from benchmarks.images import decoded, encoded
from benchmarks.leaderboard import value
from benchmarks.png import data_uri, strip
from benchmarks.records import append, rounded
from benchmarks.report import changed_digests, render
from benchmarks.standings import standings
from benchmarks.svg import Axis, compact
from benchmarks.table import text_table
from benchmarks.words import describe

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
    mean_field = losses["normal"]
    assert mean_field.approximation.value == pytest.approx(places["normal"].gap.value)
    assert mean_field.amortization.value == pytest.approx(
        places["normal"].elbo.value - places["amortized_normal"].elbo.value
    )
    assert losses["multivariate_normal"].amortization is None
    assert "Where the nats go" in html


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
    with pytest.raises(ValueError, match="at least one run"):
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
        assert not text.startswith("Pyro"), f"benchmarks/words.py has no words for {name!r}"
        assert method.scheme not in text, f"benchmarks/words.py has no words for {method.scheme!r}"

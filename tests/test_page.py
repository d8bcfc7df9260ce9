"""The parity page: well-formed, escaped, loading nothing, and right in a real browser."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser

import pytest

from cla_export.compare.cases import make_cases
from cla_export.compare.files import write_report
from cla_export.compare.metrics import LogitMetrics
from cla_export.compare.report import (
    Divergence,
    GreedyResult,
    ParityReport,
    PerplexityResult,
    TensorResult,
)
from cla_export.compare.thresholds import THRESHOLDS
from cla_export.layout import KVLayout
from cla_export.views.page import to_html

LAYOUT = KVLayout.create([0, 0, 2, 2, 4], 2, 64, [None, None, 96, 96, None])
HOSTILE = "/ci/\"><script src=https://evil.example/x.js></script><img src=x onerror='boom()'>&amp;"
CASES = [case.name for case in make_cases(160, [0])]
BATCHED_LOGITS = ("batched-prefill", "logits")  # of each prompt's last token: fewer positions
VOID = {"meta", "br", "img", "link", "input", "hr"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def tensor(case, output, factor=0.02, count=48, **changes):
    """A result whose stretches rise evenly to `factor` times the tolerance."""
    profile = [factor * 1e-4 * (i + 1) / count for i in range(count)]
    result = TensorResult(
        case=case,
        output=output,
        group=None if output == "logits" else int(output.split(".")[1]),
        passed=factor <= 1,
        max_error=profile[-1],
        mean_error=profile[0],
        rms=1.0,
        tolerance=1e-4,
        row=0,
        position=7,
        cosine=1.0,
        max_relative=profile[-1],
        profile=profile,
        logits=LogitMetrics(1e-9, 1e-10, 1.0, 0.995) if output == "logits" else None,
    )
    return replace(result, **changes)


def passing():
    names = [f"cache.{g}.{kind}" for g in range(LAYOUT.num_groups) for kind in ("key", "value")]
    tensors = [
        tensor(case, name, count=36 if (case, name) == BATCHED_LOGITS else 37)
        for case in CASES
        for name in (*names, "logits")
    ]
    return ParityReport(
        bundle="/ci/my-bundle",
        reference="/models/mine",
        target="onnxruntime",
        dtype="float16",
        backend="onnxruntime",
        tokens="heldout.txt",
        length=160,
        kv_layout=LAYOUT.to_json(),
        tensors=tensors,
        greedy=[GreedyResult(i, 64, 64, 0, None, None, True) for i in range(3)],
        perplexity=PerplexityResult("heldout.txt", 1674, 19.6669, 19.6671, 1e-5, 1e-2, True),
        tools={"torch": "2.13.0", "onnxruntime": "1.32.0"},
    )


def failing():
    """A broken export, from layer 3 on, whose logits are not even finite."""
    report = passing()
    report.bundle = HOSTILE
    report.notes = ["rows of 160 tokens do not reach past the <window> of 4096"]
    lost = {"max_error": math.inf, "mean_error": math.nan, "cosine": math.nan, "passed": False}
    for index, result in enumerate(report.tensors):
        if result.group == 2:
            report.tensors[index] = tensor(result.case, result.output, 700.0, 37)
        if result.output == "logits":
            profile = [math.inf, *result.profile[1:]]
            nothing = LogitMetrics(math.inf, math.inf, 0.0, 0.0)
            report.tensors[index] = replace(result, **lost, profile=profile, logits=nothing)
    report.greedy[1] = GreedyResult(1, 64, 61, 1, 9, 0.31, False)
    report.perplexity = replace(report.perplexity, bundle=math.nan, difference=math.nan)
    report.perplexity = replace(report.perplexity, passed=False)
    report.divergence = Divergence(
        case="prefill",
        call=0,
        layer=3,
        group=1,
        role="attention",
        row=0,
        position=59,
        channel=142,
        got=math.nan,
        expected=-1.26267,
        error=math.inf,
        tolerance=5.1e-5,
    )
    return report


class Page(HTMLParser):
    """Checks that elements close in order; keeps tags, attributes and the text outside <style>."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def cells(report):
    return sum(len(result.profile) for result in report.tensors)


@pytest.mark.parametrize("make", [passing, failing])
def test_is_well_formed_and_loads_nothing(make):
    report = make()
    source = to_html(report, LAYOUT)
    page = Page(source)
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"} == set()
    for _, attributes in page.tags:
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    style = source[source.index("<style>") : source.index("</style>")]
    assert not re.search(r"//|url\(|@import", style)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in page.tags if "href" in a} == set(ids)
    assert all("aria-label" in a for tag, a in page.tags if tag == "svg" and a.get("role") == "img")


def test_says_what_passed():
    page = Page(to_html(passing(), LAYOUT))
    assert "✓ PASSED" in page.words
    assert "FAIL" not in page.words
    assert "First divergence" not in page.words
    for said in ("my-bundle", "5 layers in 3 groups", "96 tokens", "99.50%", "64 of 64", "0.020"):
        assert said in page.words
    for threshold in THRESHOLDS.values():
        assert threshold.reason in page.words
    assert "float16 (this bundle)" in page.words
    assert "torch 2.13.0" in page.words


def test_says_where_it_failed_first():
    page = Page(to_html(failing(), LAYOUT))
    assert "✗ FAILED" in page.words
    first = page.words.index("layer 3, group 1, attention output at row 0, position 59")
    assert page.words.index("FAILED") < first < page.words.index("KV layout")
    for said in ("nan instead of -1.26267", "token 9", "0.31", "not finite", "<window> of 4096"):
        assert said in page.words
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert "group 1: owner layer 2, sharers 3; first divergence in layer 3" in labels


def test_cells_name_rows_and_positions():
    report = passing()
    page = Page(to_html(report, LAYOUT))
    titles = [text for text in page.text if " of the tolerance (error " in text]
    assert len(titles) == cells(report)
    ragged = make_cases(160, [0])[4]
    assert ragged.feed["prompts"].tolist() == [13, 124, 41, 62]
    start = sum(len(r.profile) for r in report.tensors if r.case in CASES[:4])
    here = [title.partition(": ")[2] for title in titles[start : start + 37]]
    # 384 positions in 37 stretches, the first 14 of them one longer; row 0 ends at position 48
    assert here[0] == "row 0, position 0 to 10"
    assert here[4] == "row 0, position 44 to row 1, position 5"
    assert here[-1] == "row 3, position 88 to 97"
    assert "logits: 36 positions compared." in page.words


def test_hostile_names_stay_text():
    source = to_html(failing(), LAYOUT)
    assert "<script" not in source
    assert "<img" not in source
    assert escape(HOSTILE) in source


def test_a_bare_report_still_makes_a_page():
    report = passing()
    report.tensors, report.greedy, report.perplexity, report.tools = [], [], None, {}
    page = Page(to_html(report, LAYOUT))
    assert "FAILED" in page.words
    unknown = tensor("a case of tomorrow", "cache.0.key", count=5, tolerance=0.0)
    page = Page(to_html(replace(passing(), tensors=[unknown]), LAYOUT))
    assert "stretch 5 of 5" in page.words


def test_write_report_writes_the_page(tmp_path):
    written = write_report(failing(), tmp_path / "report")
    assert {path.name for path in written} == {
        "parity.json", "parity.xml", "parity.md", "parity.html",
    }  # fmt: skip
    page = (tmp_path / "report" / "parity.html").read_text(encoding="utf-8")
    assert page == to_html(failing(), LAYOUT)


def open_in_browser(path, profile):
    """The DOM after loading, and what the console said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.fail(
            "no Chromium to open the page in; install one, such as `sudo apt-get install chromium`"
            " (Debian, Ubuntu), and see that `chromium` is on PATH"
        )
    flags = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
        --disable-background-networking --disable-component-update --disable-sync
        --disable-dev-shm-usage --enable-logging=stderr --dump-dom"""
    done = subprocess.run(
        [browser, *flags.split(), f"--user-data-dir={profile}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Runs in a page around the ones under test, which allow no scripts themselves.
MEASURE = """
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    return {
      verdict: page.querySelector(".verdict").textContent,
      cells: page.querySelectorAll(".map rect title").length,
      painted: [...page.querySelectorAll(".map rect")].filter(
        cell => cell.getBoundingClientRect().width > 0).length,
      fills: new Set([...page.querySelectorAll(".legend rect")].map(
        rect => frame.contentWindow.getComputedStyle(rect).fill)).size,
      here: [...page.querySelectorAll("tr.here")].map(row => row.cells[0].textContent),
      overflow: root.scrollWidth - root.clientWidth,
      outside: [...page.querySelectorAll("header *, figure *, p")].filter(
        part => part.getBoundingClientRect().right > root.clientWidth + 1).length,
      fetched: frame.contentWindow.performance.getEntriesByType("resource").length,
    };
  });
  document.body.innerHTML = "";
  document.body.appendChild(document.createElement("pre")).textContent = JSON.stringify(found);
});
"""


def test_in_a_browser(tmp_path):
    reports = [passing(), failing()]
    frames = [
        f'<iframe style="width:{width}px;height:900px" srcdoc="{escape(to_html(r, LAYOUT))}">'
        "</iframe>"
        for r in reports
        for width in (420, 1280)
    ]
    around = tmp_path / "around.html"
    around.write_text(
        f'<meta charset="utf-8"><body>{"".join(frames)}<script>{MEASURE}</script>', encoding="utf-8"
    )
    dom, console = open_in_browser(around, tmp_path / "profile")
    assert console == []
    found = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", dom, re.DOTALL)[1]))
    assert [page["verdict"] for page in found] == ["✓ PASSED"] * 2 + ["✗ FAILED"] * 2
    for page, report in zip(found, [reports[0]] * 2 + [reports[1]] * 2, strict=True):
        assert page["cells"] == page["painted"] == cells(report)
        assert page["fills"] == 13  # every class of the legend has its own colour
        assert page["overflow"] <= 0
        assert page["outside"] == 0
        assert page["fetched"] == 0
    assert found[0]["here"] == ["float16 (this bundle)"]
    assert found[2]["here"] == ["1", "float16 (this bundle)"]


def test_opens_as_a_file(tmp_path):
    *_, path = write_report(failing(), tmp_path / "report")
    dom, console = open_in_browser(path, tmp_path / "profile")
    assert console == []
    assert "✗ FAILED" in Page(dom.partition("<body>")[2].partition("</body>")[0]).words

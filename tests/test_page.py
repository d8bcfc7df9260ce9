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

from cla_export.compare.cases import far_case, make_cases, shape_of
from cla_export.compare.files import write_report
from cla_export.compare.metrics import LogitMetrics
from cla_export.compare.report import (
    DebugFiles,
    Divergence,
    GreedyResult,
    LayerErrors,
    LayerMap,
    ParityReport,
    PerplexityResult,
    Regression,
    TensorResult,
)
from cla_export.compare.thresholds import THRESHOLDS
from cla_export.layout import KVLayout
from cla_export.views.page import to_html

LAYOUT = KVLayout.create([0, 0, 2, 2, 4], 2, 64, [None, None, 96, 96, None])
HOSTILE = "/ci/\"><script src=https://evil.example/x.js></script><img src=x onerror='boom()'>&amp;"
SEED = 7
NEAR = make_cases(160, [0], SEED)
CASES = [case.name for case in NEAR]
FAR_CASE = far_case(2048, [0])
FAR = FAR_CASE.name
SLOT_REUSE = 31  # positions of a short case
FEWER = {("batched-prefill", "logits"): 27, ("prefix-reuse", "logits"): 31}  # positions compared
CALLS = ["prefill 0-123", *(f"decode {position}" for position in range(124, 160))]
VOID = {"meta", "br", "img", "link", "input", "hr"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def tensor(case, output, factor=0.02, count=37, **changes):
    """A result whose stretches rise evenly to `factor` times the tolerance."""
    profile = [factor * 1e-4 * (i + 1) / count for i in range(count)]
    result = TensorResult(
        case=case,
        output=output,
        group=int(output.split(".")[1]) if output.startswith("cache.") else None,
        passed=factor <= 1,
        max_error=profile[-1],
        mean_error=profile[0],
        rms=1.0,
        tolerance=1e-4,
        row=0,
        position=7,
        cosine=1.0,
        max_relative=profile[-1],
        mean_relative=profile[0],
        mean_tolerance=4e-5,
        profile=profile,
        logits=LogitMetrics(1e-9, 1e-10, 1.0, 0.995) if output == "logits" else None,
    )
    return replace(result, **changes)


def layer_map(broken=()):
    """Rounding everywhere but in some layers from call 2 on, where attention is far off."""
    rows = []
    for layer in range(LAYOUT.num_layers):
        late = 700.0 if layer in broken else 0.2
        shares, roles = [0.2, 0.2, *[late] * 35], ["mlp", "mlp", *["attention"] * 35]
        rows.append(LayerErrors(layer, shares, roles))
    return LayerMap("decode", CALLS, rows)


def passing():
    names = [f"cache.{g}.{kind}" for g in range(LAYOUT.num_groups) for kind in ("key", "value")]
    outputs = (*names, "logits")
    tensors = [
        tensor(
            case, name, count=FEWER.get((case, name), SLOT_REUSE if case == "slot-reuse" else 37)
        )
        for case in CASES
        for name in outputs
    ]
    tensors += [tensor(FAR, name, count=8, position=2047) for name in outputs]
    return ParityReport(
        bundle="/ci/my-bundle",
        reference="/models/mine",
        target="onnxruntime",
        dtype="float32",
        arithmetic="int4 weights",
        backend="onnxruntime",
        tokens="heldout.txt",
        seed=SEED,
        length=160,
        kv_layout=LAYOUT.to_json(),
        cases=[shape_of(case) for case in (*NEAR, FAR_CASE)],
        tensors=tensors,
        greedy=[GreedyResult(i, 64, 64, 0, None, None, True) for i in range(3)],
        perplexity=PerplexityResult("heldout.txt", 1674, 19.8, 19.8001, 1e-5, 1e-2, True, 19.5),
        layer_map=layer_map(),
        baseline="/ci/main/parity.json",
        tools={"torch": "2.13.0", "onnxruntime": "1.32.0"},
        machine={"processor": "A processor", "threads": "4"},
        seconds=12.34,
    )


def failing():
    """A broken export, from layer 3 on, whose logits are not even finite."""
    report = passing()
    report.bundle = HOSTILE
    report.notes = ["rows of 160 tokens do not reach past the <window> of 4096"]
    lost = {"max_error": math.inf, "mean_error": math.inf, "cosine": math.nan, "passed": False}
    for index, result in enumerate(report.tensors):
        if result.group == 2:
            count = len(result.profile)
            report.tensors[index] = tensor(result.case, result.output, 700.0, count, position=2047)
        if result.output == "logits":
            profile = [math.inf, *result.profile[1:]]
            nothing = LogitMetrics(math.inf, math.inf, 0.0, 0.0)
            first = {"profile": profile, "position": 2040, "logits": nothing}
            report.tensors[index] = replace(result, **lost, **first)
    report.greedy[1] = GreedyResult(1, 64, 61, 1, 9, 0.31, False)
    report.perplexity = replace(report.perplexity, bundle=math.nan, difference=math.nan)
    report.perplexity = replace(report.perplexity, passed=False)
    report.layer_map = layer_map(broken=(3, 4))
    report.layer_map.layers[4].shares[-1] = math.inf
    report.divergence = Divergence(
        case="decode",
        call=2,
        layer=3,
        group=1,
        role="attention",
        row=0,
        position=125,
        channel=142,
        got=math.nan,
        expected=-1.26267,
        error=math.inf,
        tolerance=5.1e-5,
    )
    report.faults = ["layer 3 reads group 0's cache, where the layout says group 1"]
    report.regressions = [Regression("prefill, logits: largest error", "5.44e-06", "1.32e-01")]
    commands = ["polygraphy run dbg/model.onnx --onnxrt", "sh dbg/replay.sh"]
    report.debug = DebugFiles("/ci/dbg", "decode, decode 125", commands)
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

    @property
    def titles(self):
        """What hovering shows, each a text of its own."""
        return [text for text in self.text if " of the tolerance" in text]


def cells(report):
    return sum(len(result.profile) for result in report.tensors)


def layer_cells(report):
    return sum(len(errors.shares) for errors in report.layer_map.layers)


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
    assert "int4 weights (this bundle)" in page.words
    assert "float32, int4 weights" in page.words
    assert "PyTorch in float64" in page.words
    for said in ("torch 2.13.0", "processor A processor", "took 12.3 s", f"seed {SEED}"):
        assert said in page.words
    assert "19.5 +1.54%" in page.words  # what quantisation costs: 19.8 / 19.5 - 1
    assert "against the baseline nothing worse parity.json" in page.words
    assert "Nothing is worse than in /ci/main/parity.json" in page.words
    assert "Run it again" not in page.words


def test_says_nothing_of_what_was_not_done():
    report = passing()
    report.baseline, report.layer_map = None, None
    report.perplexity = replace(report.perplexity, unquantized=None)
    page = Page(to_html(report, LAYOUT))
    for absent in ("aseline", "quantisation", "Error by layer", "Run it again", "Faults"):
        assert absent not in page.words


def test_a_mean_error_beyond_its_tolerance_shows():
    report = passing()
    report.tensors[3] = replace(report.tensors[3], mean_error=6e-5, passed=False)
    page = Page(to_html(report, LAYOUT))
    assert report.tensors[3].share == pytest.approx(1.5)
    assert "worst error / tolerance ✗ 1.500 prefill, group 1 value, by its mean error" in page.words
    assert "values 27 outputs" in page.words
    assert "✗ 1.500 times what is allowed" in page.words
    looks = [attributes.get("class") for _, attributes in page.tags]
    assert looks.count("tick bad") == 1
    assert "beyond" not in looks  # the largest error of every stretch is within its tolerance
    assert "keys 27 outputs" in page.words
    assert "at most 0.020 50.0 times as much is allowed" in page.words


def test_says_where_it_failed_first():
    page = Page(to_html(failing(), LAYOUT))
    assert "✗ FAILED" in page.words
    first = page.words.index("layer 3, group 1, attention output at row 0, position 125")
    fault = page.words.index("Faults in the graph layer 3 reads group 0's cache")
    assert page.words.index("FAILED") < fault < first < page.words.index("KV layout")
    for said in ("nan instead of -1.26267", "token 9", "0.31", "not finite", "<window> of 4096"):
        assert said in page.words
    assert "call 2 (decode 125)" in page.words
    assert "against the baseline ✗ 1 worse" in page.words
    assert "prefill, logits: largest error 5.44e-06 1.32e-01" in page.words
    assert "One call (decode, decode 125) is in /ci/dbg :" in page.words
    assert "polygraphy run dbg/model.onnx --onnxrt\nsh dbg/replay.sh" in page.text  # to be copied
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert "group 1: owner layer 2, sharers 3; first divergence in layer 3" in labels


def test_layer_map_names_layers_calls_and_tensors():
    report = failing()
    page = Page(to_html(report, LAYOUT))
    titles = [title for title in page.titles if " of the tolerance in call " in title]
    assert len(titles) == layer_cells(report)
    assert titles[1] == (
        "layer 0, owner of group 0: MLP output takes 0.200 of the tolerance in call 1, decode 124"
    )
    assert [title for title in titles if "first value that differs" in title] == [
        "layer 3, sharer of group 1: attention output takes 700 of the tolerance in call 2, "
        "decode 125; the first value that differs is here"
    ]
    assert titles[-1].startswith("layer 4, owner of group 2: attention output takes not finite")
    marks = [a for _, a in page.tags if a.get("class", "").startswith("first")]
    assert {mark["x"] for mark in marks} == {"2"}
    assert [text for text in page.text if re.fullmatch(r"group \d [●○] \d", text)] == [
        "group 0 ● 0", "group 0 ○ 1", "group 1 ● 2", "group 1 ○ 3", "group 2 ● 4",
    ]  # fmt: skip
    assert "Call 0: prefill 0-123; calls 1 to 36: decode 124 … decode 159." in "".join(page.text)
    assert "Case decode (a prompt, then single tokens)" in page.words
    assert "Outlined, layer 3 in call 2" in page.words


def test_marks_no_cell_of_another_case():
    report = failing()
    report.divergence = replace(report.divergence, case="prefill")
    page = Page(to_html(report, LAYOUT))
    assert not [a for _, a in page.tags if a.get("class", "").startswith("first")]
    assert "Outlined" not in page.words


def test_cells_name_rows_and_positions():
    report = passing()
    page = Page(to_html(report, LAYOUT))
    titles = [title for title in page.titles if " of the tolerance (error " in title]
    assert len(titles) == cells(report)
    *_, ragged, batched, _, prefix = NEAR
    assert ragged.feed["prompts"].tolist() == [17, 124, 53, 100]

    at, named = 0, {}
    for result in report.tensors:
        here = titles[at : at + len(result.profile)]
        named[result.case, result.output] = [title.partition(": ")[2] for title in here]
        at += len(result.profile)

    def places(case, output="cache.0.key"):
        return named[case, output]

    # 438 positions in 37 stretches, the first 31 of them one longer; row 0 ends at position 52
    assert places(ragged.name)[0] == "row 0, position 0 to 11"
    assert places(ragged.name)[4] == "row 0, position 48 to row 1, position 6"
    assert places(ragged.name)[-1] == "row 3, position 125 to 135"
    assert batched.feed["logits_from"].tolist() == [52, 123, 0]
    assert places(batched.name, "logits")[0] == "row 0, position 52"
    assert "logits: 27 positions compared." in page.words
    assert prefix.feed["logits_from"].tolist() == [68]
    assert places(prefix.name, "logits")[0] == "row 0, position 68"
    assert FAR_CASE.held[0] == 124
    assert places(FAR)[0].startswith("row 0, position 124 to ")
    last = len(FAR_CASE.held) - 1
    assert places(FAR, "logits")[-1].endswith(f"row {last}, position 2047")


def test_prints_no_position_that_it_does_not_know():
    report = passing()
    report.cases = [case for case in report.cases if case.name != FAR]
    page = Page(to_html(report, LAYOUT))
    assert "stretch 8 of 8" in page.words
    assert f"row {len(FAR_CASE.held) - 1}, position" not in page.words


def test_hostile_names_stay_text():
    report = failing()
    places = iter(range(100))

    def hostile():
        return f"{next(places)}: {HOSTILE}"

    for name in ("bundle", "reference", "target", "dtype", "arithmetic", "backend", "tokens"):
        setattr(report, name, hostile())
    report.faults, report.notes, report.baseline = [hostile()], [hostile()], hostile()
    report.regressions = [Regression(hostile(), hostile(), hostile())]
    report.debug = DebugFiles(hostile(), hostile(), [hostile(), hostile()])
    report.tools, report.machine = {hostile(): hostile()}, {hostile(): hostile()}
    report.perplexity = replace(report.perplexity, text=hostile())
    report.tensors.append(tensor(hostile(), hostile(), group=None, count=8))
    case, call, role = hostile(), hostile(), hostile()
    report.layer_map = LayerMap(case, [call], [LayerErrors(3, [0.5], [role])])
    report.divergence = replace(report.divergence, case=case, call=0, role=role)
    source = to_html(report, LAYOUT)
    page = Page(source)
    assert "<script" not in source
    assert "<img" not in source
    assert {tag for tag, _ in page.tags} & {"script", "img"} == set()
    for place in range(next(places)):
        assert escape(f"{place}: {HOSTILE}") in source, place


def test_a_bare_report_still_makes_a_page():
    report = passing()
    report.tensors, report.greedy, report.perplexity, report.layer_map = [], [], None, None
    report.tools, report.machine, report.seconds, report.baseline = {}, {}, 0.0, None
    report.faults = ["the runtime refuses the graph"]
    page = Page(to_html(report, LAYOUT))
    assert "FAILED" in page.words
    assert "the runtime refuses the graph" in page.words
    for absent in ("Error distributions", "Error by", "All outputs", "Perplexity", "Baseline"):
        assert absent not in page.words
    assert "Environment" not in page.words
    unknown = tensor("a case of tomorrow", "cache.0.key", count=5, tolerance=0.0)
    page = Page(to_html(replace(passing(), tensors=[unknown]), LAYOUT))
    assert "stretch 5 of 5" in page.words
    empty = LayerMap("decode", [], [])
    page = Page(to_html(replace(passing(), layer_map=empty), LAYOUT))
    assert "Error by layer" not in page.words


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
    const all = what => [...page.querySelectorAll(what)];
    const left = part => part.getBoundingClientRect().left;
    const style = part => frame.contentWindow.getComputedStyle(part);
    const fills = what => new Set(all(what).map(part => style(part).fill)).size;
    const painted = what => all(what).filter(part => style(part).fill !== "none"
      && part.getBoundingClientRect().width > 0 && part.getBoundingClientRect().height > 0).length;
    const lines = all(".layers > svg"), first = page.querySelector(".layers .first");
    const cell = (line, call) => lines[line].querySelectorAll("rect")[call];
    return {
      verdict: page.querySelector(".verdict").textContent,
      cells: all(".maps rect title").length,
      painted: painted(".maps rect"),
      layers: painted(".layers rect"),
      layerFills: fills(".layers rect:not(.first)"),
      first: first && {
        line: lines.indexOf(first.parentNode),
        off: left(first) - left(cell(lines.indexOf(first.parentNode), 2)),
        drawn: style(first).stroke !== "none",
      },
      tickOff: left(all(".layers .rows i")[1]) - left(cell(0, 5)),
      bars: painted(".spread rect"),
      barFills: fills(".spread rect"),
      limitsOff: all(".limit").map(line => left(line) - left(page.querySelector(".rows .bad"))),
      fills: fills(".legend rect"),
      here: all("tr.here").map(row => row.cells[0].textContent),
      title: style(page.querySelector("h1")).fontSize,
      numbers: style(page.querySelector("table.n2 td")).textAlign,
      overflow: root.scrollWidth - root.clientWidth,
      outside: all("header *, figure *, p, pre, li, .layers *, .spread > *").filter(
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
        assert page["layers"] == layer_cells(report)
        assert page["bars"] > 3
        assert page["tickOff"] == pytest.approx(0, abs=1)
        assert page["limitsOff"] == pytest.approx([0, 0, 0], abs=2)
        assert page["numbers"] == "right"
        assert page["fills"] == 13  # every class of the legend has its own colour
        assert page["overflow"] <= 0
        assert page["outside"] == 0
        assert page["fetched"] == 0
    assert [page["title"] for page in found] == ["24px", "30px"] * 2
    assert [page["barFills"] for page in found] == [1, 1, 2, 2]
    assert [page["layerFills"] for page in found] == [1, 1, 3, 3]  # rounding, far off, not finite
    assert found[0]["first"] is found[1]["first"] is None
    for page in found[2:]:
        assert page["first"]["line"] == 3
        assert page["first"]["drawn"]
        assert page["first"]["off"] == pytest.approx(0, abs=1)
    assert found[0]["here"] == ["int4 weights (this bundle)"]
    assert found[2]["here"] == ["1", "int4 weights (this bundle)"]


def test_opens_as_a_file(tmp_path):
    *_, path = write_report(failing(), tmp_path / "report")
    dom, console = open_in_browser(path, tmp_path / "profile")
    assert console == []
    assert "✗ FAILED" in Page(dom.partition("<body>")[2].partition("</body>")[0]).words

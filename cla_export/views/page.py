"""The gate's report as one HTML page that needs nothing else: no network, no scripts, no fonts.

Everything is built with `markup.tag`, which escapes; the stylesheet is data/parity_page.css.
"""

import math
from importlib import resources
from pathlib import Path

from cla_export.compare.files import arithmetic, divergence_sentence
from cla_export.compare.report import (
    ROLES,
    Divergence,
    GreedyResult,
    ParityReport,
    PerplexityResult,
    TensorResult,
)
from cla_export.compare.thresholds import THRESHOLDS
from cla_export.layout import KVLayout
from cla_export.views.distribution import distributions
from cla_export.views.heat_map import (
    by_case,
    cases_of,
    heat_maps,
    label,
    worst_of,
)
from cla_export.views.layer_map import kv_layout, layer_map
from cla_export.views.markup import (
    Html,
    facts,
    join,
    judged,
    number,
    ratio_of,
    row,
    svg,
    table,
    tag,
    times,
)


def to_html(report: ParityReport, layout: KVLayout) -> str:
    """The report of a bundle with this KV layout, as a page."""
    style = (resources.files("cla_export") / "data" / "parity_page.css").read_text("utf-8")
    verdict = "PASSED" if report.passed else "FAILED"
    cases = cases_of(report)
    mapped = None if report.layer_map is None else cases.get(report.layer_map.case)
    sections = {
        "KV layout": kv_layout(report, layout),
        "Error distributions": distributions(report),
        "Error by layer and step": layer_map(report, layout, mapped),
        "Error by case and position": heat_maps(report, cases),
        "Next-token distributions": _logits(report),
        "Greedy generation": _greedy(report.greedy),
        "Perplexity": _perplexity(report),
        "Baseline": _baseline(report),
        "All outputs": _outputs(report),
        "Thresholds": _thresholds(report),
        "Environment": _environment(report),
    }
    shown = {title: content for title, content in sections.items() if content}
    links = (tag("a", title, href=f"#s{index}") for index, title in enumerate(shown))
    body = tag(
        "main",
        _verdict(report, verdict),
        _list("Faults in the graph", report.faults, "divergence"),
        _divergence(report),
        _debug(report),
        _list("Notes", report.notes, "notes"),
        tag("nav", *links, aria_label="Sections"),
        *(
            tag("section", tag("h2", title), content, id=f"s{index}")
            for index, (title, content) in enumerate(shown.items())
        ),
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"{tag('title', f'Parity {verdict}: {_name(report)}')}\n<style>{style}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{tag("body", body)}</html>\n'
    )


def _name(report: ParityReport) -> str:
    return Path(report.bundle).name or report.bundle


def _count(count: int, of: int) -> str:
    return f"{count:,} of {of:,}"


# Sections, in the order of the page


def _verdict(report: ParityReport, verdict: str) -> Html:
    within = sum(result.passed for result in report.tensors)
    total = len(report.tensors)
    tiles = [("comparisons within tolerance", within == total > 0, _count(within, total), "")]
    if (worst := worst_of(report.tensors)) is not None:
        tiles.insert(0, _worst_tile(worst, all(result.passed for result in report.tensors)))
    if report.greedy:
        tokens = sum(result.tokens for result in report.greedy)
        ties = sum(result.near_ties for result in report.greedy)
        note = f"of {tokens:,}" + (f", {ties} near-ties" if ties else "")
        agreed = all(result.passed for result in report.greedy)
        tiles.append(("greedy tokens agreeing", agreed, f"{report.greedy_agreement:.1%}", note))
    if (score := report.perplexity) is not None:
        note = f"{score.bundle:.4f}, reference {score.reference:.4f}"
        difference = number(score.difference, ".1e")
        tiles.append(("perplexity, relative difference", score.passed, difference, note))
    if score is not None and score.unquantized is not None:
        note = f"reference {score.reference:.4f}, before quantisation {score.unquantized:.4f}"
        tiles.append(("perplexity, cost of quantisation", True, _cost(score), note))
    if report.baseline is not None:
        worse = len(report.regressions)
        said = f"{worse} worse" if worse else "nothing worse"
        tiles.append(("against the baseline", not worse, said, Path(report.baseline).name))
    boxes = (
        tag(
            "div",
            tag("dt", name),
            tag("dd", value if good else f"✗ {value}", class_=None if good else "bad"),
            tag("dd", note, class_="note"),
        )
        for name, good, value, note in tiles
    )
    mark = tag("span", f"{'✓' if report.passed else '✗'} {verdict}", class_="verdict")
    details = {
        "bundle": report.bundle,
        "against": f"{report.reference}, PyTorch in float64",
        "target": f"{report.target}, run by {report.backend}",
        "arithmetic": arithmetic(report),
        "tokens": f"{report.tokens}, rows of {report.length:,}, seed {report.seed}",
    }
    return tag(
        "header",
        tag("p", "cla-export parity", class_="kicker"),
        tag("h1", mark, " ", tag("span", _name(report), class_="name")),
        tag("dl", *boxes, class_="tiles"),
        facts(details),
        class_="passed" if report.passed else "failed",
    )


def _worst_tile(worst: TensorResult, good: bool) -> tuple[str, bool, str, str]:
    """The mean error has no place; the largest has."""
    where = f"{worst.case}, {label(worst)}, "
    if worst.share > ratio_of(worst.max_error, worst.tolerance):
        where += "by its mean error"
    else:
        where += f"row {worst.row}, position {worst.position}"
    return "worst error / tolerance", good, times(worst.share), where


def _list(title: str, items: list[str], look: str) -> str:
    if not items:
        return ""
    return tag("section", tag("h2", title), tag("ul", *(tag("li", i) for i in items)), class_=look)


def _divergence(report: ParityReport) -> str:
    if (sentence := divergence_sentence(report)) is None:
        return ""
    parts: list[str] = [
        tag("h2", "First divergence"),
        tag("p", sentence.removeprefix("first divergence: "), class_="lead"),
    ]
    if (first := report.divergence) is not None:
        details = {
            "layer": f"{first.layer}",
            "group": f"{first.group}",
            "role": ROLES.get(first.role, first.role),
            "row": f"{first.row}",
            "position": f"{first.position}",
            "channel": f"{first.channel}",
            "got": f"{first.got:.6g}",
            "expected": f"{first.expected:.6g}",
            "error": number(first.error),
            "allowed": number(first.tolerance),
            "error / allowed": times(ratio_of(first.error, first.tolerance)),
            "case": first.case,
            "call": _call(report, first),
        }
        if first.error <= first.tolerance:
            details["beyond what is allowed"] = "the mean error of this tensor"
        parts += [facts(details)]
    return tag("section", *parts, class_="divergence")


def _call(report: ParityReport, first: Divergence) -> str:
    """The call's number, and what it was where the map of layers says so."""
    shown = report.layer_map
    if shown is None or shown.case != first.case or first.call >= len(shown.calls):
        return f"{first.call}"
    return f"{first.call} ({shown.calls[first.call]})"


def _debug(report: ParityReport) -> str:
    if (debug := report.debug) is None:
        return ""
    return tag(
        "section",
        tag("h2", "Run it again"),
        tag(
            "p",
            "One call (",
            debug.call,
            ") is in ",
            tag("code", debug.folder),
            ": what went in, what PyTorch gives, what the bundle gave. To run it again:",
        ),
        tag("pre", "\n".join(debug.commands)),
        class_="notes",
    )


def _outputs(report: ParityReport) -> str:
    bodies = [
        [
            judged(
                result.passed,
                name,
                result.output,
                times(result.share),
                number(result.max_error),
                number(result.tolerance),
                number(result.mean_error),
                number(result.mean_tolerance) if math.isfinite(result.mean_tolerance) else "any",
                number(result.max_relative),
                number(result.mean_relative),
                number(result.rms, ".3g"),
                number(result.cosine, ".8f"),
                f"{result.row}",
                f"{result.position}",
            )
            for result in results
        ]
        for name, results in by_case(report).items()
    ]
    text = (
        "Error / tolerance is the larger of largest error over what it may be, and mean error over "
        "what that may be. Rms is of the reference; row and position are of the largest error."
    )
    titles = (
        "case, output, error / tolerance#, max error#, allowed#, mean error#, allowed#, "
        "max / rms#, mean / rms#, rms#, cosine#, row#, position#, verdict"
    )
    return join([tag("p", text), table("All outputs", titles, *bodies)]) if bodies else ""


def _logits(report: ParityReport) -> str:
    rows = [
        row(
            result.case,
            number(metrics.kl_max),
            number(metrics.kl_mean),
            f"{metrics.top1:.2%}",
            f"{metrics.top5:.2%}",
        )
        for result in report.tensors
        if (metrics := result.logits) is not None
    ]
    text = "KL(reference ‖ bundle) in nats; top-1 and top-5 as shares of the positions."
    titles = "case, KL at most#, KL on average#, top-1 agrees#, top-5 agrees as a set#"
    return join([tag("p", text), table("Logits", titles, rows)]) if rows else ""


def _greedy(results: list[GreedyResult]) -> str:
    rows = [
        judged(
            result.passed,
            f"{result.prompt}",
            _bar(result),
            _count(result.agreeing, result.tokens),
            "none" if result.first_divergence is None else f"token {result.first_divergence}",
            "" if result.gap is None else number(result.gap, ".3g"),
            f"{result.near_ties}",
        )
        for result in results
    ]
    text = (
        "The bundle continues each prompt freely. The gap is how far the reference prefers its own "
        "token, in logits; a near-tie is a gap that rounding can close, and is no failure."
    )
    titles = (
        "prompt#, agreement, tokens agreeing#, first divergence#, gap there#, near-ties#, verdict"
    )
    return join([tag("p", text), table("Greedy generation", titles, rows)]) if rows else ""


def _bar(result: GreedyResult) -> Html:
    width = 160
    full = width * result.agreeing / result.tokens if result.tokens else 0
    parts = [
        tag("rect", width=width, height=12, class_="rest"),
        tag("rect", width=round(full, 2), height=12, class_="agree"),
    ]
    return svg(f"{_count(result.agreeing, result.tokens)} tokens agree", width, 12, parts)


def _perplexity(report: ParityReport) -> str:
    if (score := report.perplexity) is None:
        return ""
    titles = "text, tokens#, bundle#, reference#, relative difference#, allowed#, "
    cells = [
        f"{score.tokens:,}",
        f"{score.bundle:.6g}",
        f"{score.reference:.6g}",
        number(score.difference, ".1e"),
        number(score.tolerance, ".1e"),
    ]
    if score.unquantized is not None:
        titles += "before quantisation#, cost of it#, "
        cells += [f"{score.unquantized:.6g}", _cost(score)]
    return table("Perplexity", titles + "verdict", [judged(score.passed, score.text, *cells)])


def _cost(score: PerplexityResult) -> str:
    """What quantisation costs, relative: both sides are PyTorch."""
    return f"{score.reference / (score.unquantized or math.nan) - 1:+.2%}"


def _baseline(report: ParityReport) -> str:
    if report.baseline is None and not report.regressions:
        return ""
    name = tag("code", report.baseline or "")
    if not report.regressions:
        return tag("p", "✓ Nothing is worse than in ", name, ".")
    rows = [row(worse.what, worse.before, worse.now) for worse in report.regressions]
    text = tag("p", "What was better in ", name, " fails, even within its tolerance.")
    return join([text, table("Baseline", "what, before#, now#", rows)])


def _thresholds(report: ParityReport) -> Html:
    rows = [
        row(
            f"{name} (this bundle)" if name == report.arithmetic else name,
            f"2^{math.log2(threshold.unit):g}",
            f"{threshold.largest:g}",
            f"{threshold.units:g}",
            f"{threshold.mean:g}",
            f"{threshold.perplexity:g}",
            tag("div", threshold.reason, class_="why"),
            class_="here" if name == report.arithmetic else None,
        )
        for name, threshold in THRESHOLDS.items()
    ]
    text = (
        "An output passes if its largest error is at most the largest factor times the one that "
        "PyTorch itself makes in the bundle's arithmetic, plus so many unit roundoffs of its "
        "largest value, and its mean error at most the mean factor times PyTorch's own, plus one "
        "roundoff of its mean magnitude. Errors are distances from PyTorch in float64; perplexity "
        "may differ by the share in its column."
    )
    titles = (
        "arithmetic, unit roundoff#, largest factor#, units#, mean factor#, perplexity#, reason"
    )
    return join([tag("p", text), table("Thresholds", titles, rows)])


def _environment(report: ParityReport) -> str:
    took = {"took": f"{report.seconds:,.1f} s"} if report.seconds else {}
    known = {**report.tools, **report.machine, **took}
    return facts(known) if known else ""

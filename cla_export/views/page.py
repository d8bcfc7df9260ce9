"""The gate's report as one HTML page that needs nothing else: no network, no scripts, no fonts.

Everything is built with `markup.tag`, which escapes; the stylesheet is data/parity_page.css.
"""

from importlib import resources
from pathlib import Path

from cla_export.compare.files import divergence_sentence
from cla_export.compare.report import GreedyResult, ParityReport
from cla_export.compare.thresholds import THRESHOLDS
from cla_export.layout import Group, KVLayout
from cla_export.views.heat_map import by_case, heat_maps, label, share_of, worst_of
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

_ROLES = {
    "q": "query",
    "k": "new key",
    "v": "new value",
    "attention": "attention output",
    "output": "layer output",
}


def to_html(report: ParityReport, layout: KVLayout) -> str:
    """The report of a bundle with this KV layout, as a page."""
    style = (resources.files("cla_export") / "data" / "parity_page.css").read_text("utf-8")
    verdict = "PASSED" if report.passed else "FAILED"
    sections = {
        "KV layout": _layout(report, layout),
        "Error over tolerance": heat_maps(report),
        "Next-token distributions": _logits(report),
        "Greedy generation": _greedy(report.greedy),
        "Perplexity": _perplexity(report),
        "All outputs": _outputs(report),
        "Thresholds": _thresholds(report),
        "Environment": _environment(report),
    }
    shown = {title: content for title, content in sections.items() if content}
    links = (tag("a", title, href=f"#s{index}") for index, title in enumerate(shown))
    body = tag(
        "main",
        _verdict(report, verdict),
        _divergence(report),
        _notes(report),
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
    tiles = [("comparisons within tolerance", _count(within, len(report.tensors)), "")]
    if (worst := worst_of(report.tensors)) is not None:
        where = f"{worst.case}, {label(worst)}, row {worst.row}, position {worst.position}"
        tiles.insert(0, ("worst error / tolerance", times(share_of(worst)), where))
    if report.greedy:
        tokens = sum(result.tokens for result in report.greedy)
        ties = sum(result.near_ties for result in report.greedy)
        note = f"of {tokens:,}" + (f", {ties} near-ties" if ties else "")
        tiles.append(("greedy tokens agreeing", f"{report.greedy_agreement:.1%}", note))
    if (score := report.perplexity) is not None:
        note = f"{score.bundle:.4f}, reference {score.reference:.4f}"
        tiles.append(("perplexity, relative difference", number(score.difference, ".1e"), note))
    boxes = (
        tag("div", tag("dt", name), tag("dd", value), tag("dd", note, class_="note"))
        for name, value, note in tiles
    )
    mark = tag("span", f"{'✓' if report.passed else '✗'} {verdict}", class_="verdict")
    details = {
        "bundle": report.bundle,
        "against": f"{report.reference}, PyTorch in float32",
        "target": f"{report.target}, run by {report.backend}",
        "dtype": report.dtype,
        "tokens": f"{report.tokens}, rows of {report.length:,}",
    }
    return tag(
        "header",
        tag("p", "cla-export parity", class_="kicker"),
        tag("h1", mark, " ", tag("span", _name(report), class_="name")),
        tag("dl", *boxes, class_="tiles"),
        facts(details),
        class_="passed" if report.passed else "failed",
    )


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
            "role": _ROLES.get(first.role, first.role),
            "row": f"{first.row}",
            "position": f"{first.position}",
            "channel": f"{first.channel}",
            "got": f"{first.got:.6g}",
            "expected": f"{first.expected:.6g}",
            "error": number(first.error),
            "allowed": number(first.tolerance),
            "error / allowed": times(ratio_of(first.error, first.tolerance)),
            "case": f"{first.case}, call {first.call}",
        }
        parts += [facts(details)]
    return tag("section", *parts, class_="divergence")


def _notes(report: ParityReport) -> str:
    if not report.notes:
        return ""
    notes = tag("ul", *(tag("li", note) for note in report.notes))
    return tag("section", tag("h2", "Notes"), notes, class_="notes")


def _layout(report: ParityReport, layout: KVLayout) -> Html:
    marked = report.divergence.layer if report.divergence is not None else None
    cell = 30 if layout.num_layers <= 16 else 20 if layout.num_layers <= 32 else 13
    rows = []
    for group in layout.groups:
        worst = worst_of(result for result in report.tensors if result.group == group.index)
        rows.append(
            row(
                f"{group.index}",
                _group_map(group, layout.num_layers, cell, marked),
                f"{group.owner}",
                ", ".join(map(str, group.sharers)) or "none",
                "full" if group.window is None else f"{group.window:,} tokens",
                f"{group.kv_heads} x {group.head_dim}",
                times(share_of(worst)) if worst else "",
                class_="here" if marked in group.layers else None,
            )
        )
    titles = (
        "group#, layers, owner#, sharers, window, kv heads x dim#, worst cache error / tolerance#"
    )
    head = row("", _layer_axis(layout.num_layers, cell, marked), *[""] * 5, class_="axis")
    drawn = table("KV layout", titles, [head, *rows])
    key = "● owner, writes the group's cache; ○ sharer, reads it."
    if marked is not None:
        key += f" Layer {marked}, marked, is where the first value differs."
    return join([tag("p", layout.describe(), ". ", key), drawn])


def _group_map(group: Group, layers: int, cell: int, marked: int | None) -> Html:
    """One line of the map: a place for each layer."""

    def middle(layer: int) -> float:
        return (layer + 0.5) * cell

    size, radius = 24, min(cell * 0.32, 8)
    parts = [_column(marked, cell, size)] if marked is not None else []
    y = size / 2
    parts += [
        tag("circle", cx=middle(i), cy=y, r=1, class_="other")
        for i in range(layers)
        if i not in group.layers
    ]
    if group.sharers:
        ends = {"x1": middle(group.owner), "x2": middle(group.layers[-1])}
        parts.append(tag("line", **ends, y1=y, y2=y, class_="link"))
    for layer in group.layers:
        role = "owner" if layer == group.owner else "sharer"
        title = tag("title", f"layer {layer}: {role} of group {group.index}")
        look = role + (" hit" if layer == marked else "")
        parts.append(tag("circle", title, cx=middle(layer), cy=y, r=radius, class_=look))
    said = f"group {group.index}: owner layer {group.owner}"
    if group.sharers:
        said += f", sharers {', '.join(map(str, group.sharers))}"
    if marked in group.layers:
        said += f"; first divergence in layer {marked}"
    return svg(said, layers * cell, size, parts)


def _layer_axis(layers: int, cell: int, marked: int | None) -> Html:
    every = 1 if cell >= 20 else 5
    parts = [_column(marked, cell, 16)] if marked is not None else []
    parts += [
        tag("text", str(i), x=(i + 0.5) * cell, y=12, class_="hit" if i == marked else None)
        for i in range(layers)
        if i == marked or (i % every == 0 and (every == 1 or abs(i - (marked or i)) != 1))
    ]
    return svg(f"layers 0 to {layers - 1}", layers * cell, 16, parts)


def _column(layer: int, cell: int, height: int) -> Html:
    return tag("rect", x=layer * cell, y=0, width=cell, height=height, class_="column")


def _outputs(report: ParityReport) -> str:
    bodies = [
        [
            judged(
                result.passed,
                name,
                result.output,
                number(result.max_error),
                number(result.mean_error),
                number(result.tolerance),
                times(share_of(result)),
                number(result.rms, ".3g"),
                number(result.cosine, ".8f"),
                f"row {result.row}, position {result.position}",
            )
            for result in results
        ]
        for name, results in by_case(report).items()
    ]
    titles = (
        "case, output, max error#, mean error#, tolerance#, error / tolerance#, reference rms#, "
        "cosine#, largest error at, verdict"
    )
    return table("All outputs", titles, *bodies) if bodies else ""


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
    only = judged(
        score.passed,
        score.text,
        f"{score.tokens:,}",
        f"{score.bundle:.6g}",
        f"{score.reference:.6g}",
        number(score.difference, ".1e"),
        number(score.tolerance, ".1e"),
    )
    titles = "text, tokens#, bundle#, reference#, relative difference#, allowed#, verdict"
    return table("Perplexity", titles, [only])


def _thresholds(report: ParityReport) -> Html:
    rows = [
        row(
            f"{dtype} (this bundle)" if dtype == report.dtype else dtype,
            f"{threshold.scale:g}",
            f"{threshold.factor:g}",
            f"{threshold.perplexity:g}",
            threshold.reason,
            class_="here" if dtype == report.dtype else None,
        )
        for dtype, threshold in THRESHOLDS.items()
    ]
    text = (
        "An element may be off by scale * rms of the reference + factor * the largest error that "
        "PyTorch itself makes on that output in the bundle's dtype; perplexity by a relative "
        "difference."
    )
    drawn = table("Thresholds", "dtype, scale#, factor#, perplexity#, why", rows)
    return join([tag("p", text), drawn])


def _environment(report: ParityReport) -> str:
    return facts(report.tools) if report.tools else ""

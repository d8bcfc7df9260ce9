"""The gate's report as files: JSON for machines, JUnit XML for CI, Markdown and HTML for people."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

from cla_export.compare.report import ROLES, ParityReport, PerplexityResult, TensorResult
from cla_export.layout import KVLayout

_LISTED = 3  # of many faults or regressions; the JSON and the page have all


def write_report(report: ParityReport, folder: Path) -> list[Path]:
    """Write parity.json, .xml, .md and .html into a folder, made if missing."""
    from cla_export.views.page import to_html  # which takes its sentences from here

    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "parity.json": json.dumps(report.to_json(), indent=2) + "\n",
        "parity.xml": to_junit(report),
        "parity.md": to_markdown(report),
        "parity.html": to_html(report, KVLayout.from_json(report.kv_layout)),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in contents]


def to_junit(report: ParityReport) -> str:
    """One test case per case and layer group, and one per case for its logits.

    Then one for the steps inside the layers, one for reading the graph, one a prompt of
    generation, one each for perplexity and, where there is a baseline, for regressions.
    """
    layout = KVLayout.from_json(report.kv_layout)
    where = divergence_sentence(report)
    rows: list[tuple[str, str, list[str]]] = []  # class, name, what is wrong
    for case, group in dict.fromkeys((result.case, result.group) for result in report.tensors):
        results = [r for r in report.tensors if (r.case, r.group) == (case, group)]
        name = "logits"
        if group is not None:
            layers = ", ".join(map(str, layout.groups[group].layers))
            name = f"group {group} (layers {layers})"
        wrong = [f"{r.output}: {_sentence(r)}" for r in results if not r.passed]
        rows.append((f"parity.{case}", name, wrong))
    if report.layer_map is not None:
        wrong = [where] if where is not None and report.divergence is not None else []
        rows.append(("parity.layers", f"case {report.layer_map.case}, step by step", wrong))
    rows.append(("parity.graph", "read and run", list(report.faults)))
    for greedy in report.greedy:
        text = f"{greedy.agreeing} of {greedy.tokens} tokens agree, {greedy.near_ties} near-ties"
        rows.append(("parity.greedy", f"prompt {greedy.prompt}", [] if greedy.passed else [text]))
    if (score := report.perplexity) is not None:
        rows.append(("parity.perplexity", score.text, [] if score.passed else [_scored(score)]))
    if report.baseline is not None:
        worse = [f"{r.what}: {r.now}, {r.before} then" for r in report.regressions]
        rows.append(("parity.baseline", report.baseline, worse))
    suite = ET.Element(
        "testsuite",
        name="cla-export parity",
        tests=str(len(rows)),
        failures=str(sum(bool(wrong) for _, _, wrong in rows)),
        errors="0",
        time=f"{report.seconds:.3f}",
    )
    for classname, name, wrong in rows:
        case_element = ET.SubElement(suite, "testcase", classname=classname, name=name)
        if wrong:
            text = "\n".join([*wrong, where] if where else wrong)
            ET.SubElement(case_element, "failure", message=wrong[0]).text = text
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(report: ParityReport) -> str:
    verdict = "passed" if report.passed else "FAILED"
    lines = [
        f"### Parity {verdict}: `{Path(report.bundle).name}`",
        "",
        f"{report.target} · {arithmetic(report)} · against PyTorch in float64 · {report.tokens} · "
        f"rows of {report.length} tokens · {report.seconds:.0f} s",
        "",
    ]
    if report.tensors:
        lines += [
            "| case | logits: max error | allowed | caches: max error | allowed | |",
            "|---|---|---|---|---|---|",
        ]
    for case in dict.fromkeys(result.case for result in report.tensors):
        rows = [result for result in report.tensors if result.case == case]
        logits = next(result for result in rows if result.output == "logits")
        cache = worst_cache(rows)
        ok = "pass" if all(result.passed for result in rows) else "**FAIL**"
        lines.append(
            f"| {case} | {logits.max_error:.2e} | {logits.tolerance:.1e} | "
            + (f"{cache.max_error:.2e} ({cache.output}) | {cache.tolerance:.1e}" if cache else "|")
            + f" | {ok} |"
        )
    lines += ["", *(f"- {summary}" for summary in summaries(report))]
    tools = ", ".join(f"{name} {version}" for name, version in report.tools.items())
    return "\n".join([*lines, "", tools, ""])


def worst_cache(rows: list[TensorResult]) -> TensorResult | None:
    """The cache result closest to, or furthest beyond, its tolerance; None: none was compared."""
    caches = [result for result in rows if result.group is not None]
    return max(caches, key=lambda result: result.share, default=None)


def arithmetic(report: ParityReport) -> str:
    """The dtype, and what weights are quantised to."""
    if report.arithmetic == report.dtype:
        return report.dtype
    return f"{report.dtype}, {report.arithmetic}"


def _scored(score: PerplexityResult) -> str:
    return (
        f"{score.bundle:.6g}, reference {score.reference:.6g} (relative difference "
        f"{score.difference:.2g}, allowed {score.tolerance:.2g})"
    )


def summaries(report: ParityReport) -> list[str]:
    """The rest of the verdict, a sentence each; where it went wrong first."""
    where = divergence_sentence(report)
    lines = [] if where is None else [where]
    if where is None and report.inside is not None:
        lines.append(
            f"inside the layers: the largest error of any step is {report.inside:.0%} of what is "
            "allowed"
        )
    if report.greedy:
        tokens = sum(result.tokens for result in report.greedy)
        ties = sum(result.near_ties for result in report.greedy)
        tie_note = f", {ties} near-ties" if ties else ""
        lines.append(
            f"greedy, free-running: {report.greedy_agreement:.1%} of {tokens} tokens agree"
            f"{tie_note}"
        )
    lines += [
        f"greedy prompt {result.prompt}: first differs at token {result.first_divergence}, where "
        f"the reference prefers its own by {result.gap:.3g}"
        for result in report.greedy
        if not result.passed
    ]
    if (score := report.perplexity) is not None:
        lines.append(
            f"perplexity on {score.text} ({score.tokens} tokens): {score.bundle:.4f}, reference "
            f"{score.reference:.4f} (relative difference {score.difference:.1e}, allowed "
            f"{score.tolerance:.1e})"
        )
        if score.unquantized is not None:
            cost = score.reference / score.unquantized - 1
            lines.append(
                f"before quantisation the perplexity was {score.unquantized:.4f}: its cost is "
                f"{cost:+.2%}"
            )
    lines += [
        f"case {result.case}, {result.output}: the mean error is {result.mean_error:.3g}, allowed "
        f"{result.mean_tolerance:.3g}"
        for result in report.tensors
        if not result.passed and result.max_error <= result.tolerance
    ]
    lines += [f"graph: {fault}" for fault in report.faults[:_LISTED]]
    if len(report.faults) > _LISTED:
        lines.append(f"graph: {len(report.faults) - _LISTED} more faults")
    if report.baseline is not None:
        worse = [f"{r.what} {r.now}, {r.before} then" for r in report.regressions]
        lines += [f"worse than the baseline: {what}" for what in worse[:_LISTED]]
        if len(worse) > _LISTED:
            lines.append(f"and {len(worse) - _LISTED} more things that the baseline did better")
        if not worse:
            lines.append(f"nothing is worse than in {Path(report.baseline).name}")
    if report.debug is not None:
        lines += [f"to run it again: {command}" for command in report.debug.commands]
    return lines + report.notes


def divergence_sentence(report: ParityReport) -> str | None:
    """Where it went wrong first, or which output did though no layer's values differ."""
    if (first := report.divergence) is not None:
        what = ROLES.get(first.role, first.role)
        return (
            f"first divergence: layer {first.layer}, group {first.group}, {what} at row "
            f"{first.row}, position {first.position}: {first.got:.6g} instead of "
            f"{first.expected:.6g}, allowed {first.tolerance:.2g} (case {first.case}, call "
            f"{first.call})"
        )
    failed = next((result for result in report.tensors if not result.passed), None)
    if failed is None:
        return None
    where = "the logits" if failed.group is None else f"group {failed.group}'s cache"
    sentence = (
        f"first divergence: {where} in case {failed.case}, row {failed.row}, position "
        f"{failed.position}; "
    )
    if report.inside is None:
        return sentence + "no layer was looked into"
    return sentence + (
        "no layer's values differ there, so look at the final norm, the head, which positions' "
        "logits are returned, or the lengths and slots that the executor gives"
    )


def failure(report: ParityReport) -> str:
    """In one sentence, why a report that did not pass did not."""
    if (where := divergence_sentence(report)) is not None:
        return f"not equal to its PyTorch model; {where}"
    if report.faults:
        return f"not equal to its PyTorch model; {report.faults[0]}"
    if any(not result.passed for result in report.greedy):
        return "not equal to its PyTorch model; it chooses other tokens"
    if report.perplexity is not None and not report.perplexity.passed:
        return f"not equal to its PyTorch model; perplexity {_scored(report.perplexity)}"
    worse = report.regressions[0]
    return f"worse than the baseline; {worse.what} {worse.now}, {worse.before} then"


def _sentence(result: TensorResult) -> str:
    verdict = "within" if result.max_error <= result.tolerance else "beyond"
    return (
        f"max error {result.max_error:.3g} at row {result.row}, position {result.position}, "
        f"{verdict} the allowed {result.tolerance:.3g}; mean {result.mean_error:.2g}, allowed "
        f"{result.mean_tolerance:.2g}; rms {result.rms:.3g}"
    )

"""The gate's report as files: JSON for machines, JUnit XML for CI, Markdown and HTML for people."""

import json
from pathlib import Path
from xml.etree import ElementTree as ET

from cla_export.compare.report import ParityReport, TensorResult
from cla_export.layout import KVLayout

_ROLES = {"attention": "attention output", "output": "layer output"}


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
    """One test case per case and output, one per generation, one for perplexity."""
    rows: list[tuple[str, str, bool, str]] = [
        (f"parity.{r.case}", r.output, r.passed, _sentence(r)) for r in report.tensors
    ]
    rows += [("parity.graph", f"fault {i}", False, f) for i, f in enumerate(report.graph_faults)]
    for greedy in report.greedy:
        text = f"{greedy.agreeing} of {greedy.tokens} tokens agree, {greedy.near_ties} near-ties"
        rows.append(("parity.greedy", f"prompt {greedy.prompt}", greedy.passed, text))
    if (score := report.perplexity) is not None:
        text = (
            f"{score.bundle:.6g}, reference {score.reference:.6g} "
            f"(relative difference {score.difference:.2g}, allowed {score.tolerance:.2g})"
        )
        rows.append(("parity.perplexity", score.text, score.passed, text))
    failures = sum(not passed for _, _, passed, _ in rows)
    suite = ET.Element(
        "testsuite",
        name="cla-export parity",
        tests=str(len(rows)),
        failures=str(failures),
        errors="0",
    )
    for classname, name, passed, text in rows:
        case = ET.SubElement(suite, "testcase", classname=classname, name=name)
        if not passed:
            ET.SubElement(case, "failure", message=text).text = divergence_sentence(report) or text
    ET.indent(suite)
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(report: ParityReport) -> str:
    verdict = "passed" if report.passed else "FAILED"
    lines = [
        f"### Parity {verdict}: `{Path(report.bundle).name}`",
        "",
        f"{report.target} · {report.dtype} · against PyTorch in float32 · {report.tokens} · rows "
        f"of {report.length} tokens",
        "",
        "| case | logits: max error | allowed | caches: max error | allowed | |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(result.case for result in report.tensors):
        rows = [result for result in report.tensors if result.case == case]
        logits = next(result for result in rows if result.output == "logits")
        cache = worst_cache(rows)
        ok = "pass" if all(result.passed for result in rows) else "**FAIL**"
        lines.append(
            f"| {case} | {logits.max_error:.2e} | {logits.tolerance:.1e} | {cache.max_error:.2e} "
            f"({cache.output}) | {cache.tolerance:.1e} | {ok} |"
        )
    lines += ["", *(f"- {summary}" for summary in summaries(report))]
    tools = ", ".join(f"{name} {version}" for name, version in report.tools.items())
    return "\n".join([*lines, "", tools, ""])


def worst_cache(rows: list[TensorResult]) -> TensorResult:
    """The cache result closest to, or furthest beyond, its tolerance."""
    caches = [result for result in rows if result.group is not None]
    return max(caches, key=lambda result: result.max_error / result.tolerance)


def summaries(report: ParityReport) -> list[str]:
    """The rest of the verdict, a sentence each."""
    lines = []
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
    lines += [
        f"case {result.case}, {result.output}: the mean error is {result.mean_error:.3g}, allowed "
        f"{result.mean_tolerance:.3g}"
        for result in report.tensors
        if not result.passed and result.max_error <= result.tolerance
    ]
    lines += [f"by reading the graph: {fault}" for fault in report.graph_faults]
    if sentence := divergence_sentence(report):
        lines.append(sentence)
    return lines + report.notes


def divergence_sentence(report: ParityReport) -> str | None:
    """Where it went wrong first, or that no layer's output differs on a plain prompt."""
    if report.passed:
        return None
    if (first := report.divergence) is not None:
        what = _ROLES.get(first.role, first.role)
        return (
            f"first divergence: layer {first.layer}, group {first.group}, {what} at row "
            f"{first.row}, position {first.position}: {first.got:.6g} instead of "
            f"{first.expected:.6g}, allowed {first.tolerance:.2g} (case {first.case}, call "
            f"{first.call})"
        )
    failed = next((result for result in report.tensors if not result.passed), None)
    if failed is None:
        return "no tensor differs beyond its tolerance"
    where = "the logits" if failed.group is None else f"group {failed.group}'s cache"
    return (
        f"first divergence: {where} in case {failed.case}, row {failed.row}, position "
        f"{failed.position}; no layer's values differ there, so look at the final norm, the head, "
        "which positions' logits are returned, or what is written to the cache"
    )


def _sentence(result: TensorResult) -> str:
    verdict = "within" if result.max_error <= result.tolerance else "beyond"
    return (
        f"max error {result.max_error:.3g} at row {result.row}, position {result.position}, "
        f"{verdict} the allowed {result.tolerance:.3g}; mean {result.mean_error:.2g}, allowed "
        f"{result.mean_tolerance:.2g}; rms {result.rms:.3g}"
    )

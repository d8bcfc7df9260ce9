"""A stored run as a baseline: what was better then fails now, even within its tolerance."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cla_export.compare.report import SCHEMA, ParityReport, Regression
from cla_export.errors import BadInput

_WORSE = 2.0  # times the baseline's error: another machine's summation order stays below
_FLOOR = 0.2  # of what is allowed: below that, errors are rounding and come and go
_SAME = ("target", "dtype", "arithmetic", "kv_layout", "length", "tokens", "seed")


def read_baseline(path: Path) -> dict[str, Any]:
    """A stored parity.json; BadInput for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: no such file; expected the parity.json of an earlier run, as `cla-export "
            "parity BUNDLE --report DIR` writes it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: not a stored parity report ({error!r})") from error
    if schema != SCHEMA:
        raise BadInput(
            f"{path}: schema {schema!r}; this version of cla-export compares with {SCHEMA}. Run "
            "parity again and store its parity.json"
        )
    return dict(content)


def regressions(report: ParityReport, baseline: Mapping[str, Any], path: Path) -> list[Regression]:
    """What the baseline did better.

    1. A case, or an output of one, that is no longer compared.
    2. An output's largest or mean error: more than twice as large, and more than a fifth of what
       is allowed.
    3. Greedy agreement, prompt by prompt; near-ties count as disagreement here.
    4. The perplexity's distance from the reference's, like 2.

    Raises BadInput where the two runs cannot be compared.
    """
    now = report.to_json()
    for key in _SAME:
        if now[key] != baseline.get(key):
            raise BadInput(
                f"{path}: {key} is {baseline.get(key)!r} there and {now[key]!r} in this run; a "
                "baseline is of the same model, target and text. Store a new one"
            )
    found = []
    results = {(result.case, result.output): result for result in report.tensors}
    for old in baseline["tensors"]:
        name = f"{old['case']}, {old['output']}"
        new = results.get((old["case"], old["output"]))
        if new is None:  # 1
            found.append(Regression(name, "compared", "not compared"))
            continue
        found += [  # 2
            Regression(f"{name}: {what} error", f"{_number(before):.2e}", f"{after:.2e}")
            for what, before, after, allowed in (
                ("largest", old["max_error"], new.max_error, new.tolerance),
                ("mean", old["mean_error"], new.mean_error, new.mean_tolerance),
            )
            if _is_worse(_number(before), after, allowed)
        ]
    for old, result in zip(baseline["greedy"], report.greedy, strict=False):  # 3
        if result.agreeing < old["agreeing"]:
            found.append(
                Regression(
                    f"greedy prompt {result.prompt}: tokens agreeing",
                    f"{old['agreeing']} of {old['tokens']}",
                    f"{result.agreeing} of {result.tokens}",
                )
            )
    old, score = baseline["perplexity"], report.perplexity
    if old is not None and score is not None:  # 4
        before, after = _number(old["difference"]), score.difference
        if _is_worse(before, after, score.tolerance):
            found.append(
                Regression("perplexity: relative difference", f"{before:.1e}", f"{after:.1e}")
            )
    return found


def _is_worse(before: float, after: float, allowed: float) -> bool:
    return not (after <= _WORSE * before or after <= _FLOOR * allowed)


def _number(stored: float | None) -> float:
    return math.inf if stored is None else stored

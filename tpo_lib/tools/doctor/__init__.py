"""`python -m tpo_lib doctor LOG`: what is normal in a run's numbers and what is not, in plain words."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from textwrap import fill

from tpo_lib.tools.doctor.logs import Log, read_log
from tpo_lib.tools.doctor.rules import SEVERITIES, Finding, examine

HEADS = {"wrong": "WRONG", "look": "LOOK AT", "normal": "NORMAL"}


def run(options) -> None:
    """The command: prints, and leaves with status 1 where something is wrong."""
    if options.model is None and (options.ref or options.pairs or options.max_length):
        raise ValueError("--ref, --pairs and --max-length are for the direct checks: add --model")
    if options.model and options.pairs is None:
        raise ValueError("--model checks a model on pairs: add --pairs, best those that the log's eval_* are of")
    log = read_log(options.log, loss_type=options.loss_type, beta=options.beta)
    found, unseen = examine(log)
    if options.model:
        from tpo_lib.tools.doctor.direct import examine_pairs

        more = {name: getattr(options, name) for name in ("ref", "split", "config", "max_length")}
        found += examine_pairs(options.model, options.pairs, log=log, **more)
    if options.objective:
        from tpo_lib.tools.doctor.objective import examine_objective

        found.append(examine_objective(options.objective, log))
    found.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    print(as_json(log, found, unseen) if options.json else as_text(log, found, unseen))
    if any(finding.severity == "wrong" for finding in found):
        sys.exit(1)


def as_json(log: Log, found: Sequence[Finding], unseen: Mapping[str, str]) -> str:
    """The findings for a machine."""
    head = {"source": log.source, "loss_type": log.loss_type, "guessed": log.guessed, "last_step": log.last_step()}
    tail = {"findings": [asdict(finding) for finding in found], "not_checked": unseen}
    return json.dumps(head | {"notes": log.notes} | tail, indent=1)


def as_text(log: Log, found: Sequence[Finding], unseen: Mapping[str, str]) -> str:
    """The findings for a person, the worst first."""
    how = ", guessed from the numbers (--loss-type names another)" if log.guessed else ""
    metrics = f"{len(log.values)} metrics up to step {log.last_step()}"
    lines = [f"{log.source}: {metrics}; objective {log.loss_type}{how}", *log.notes]
    for finding in found:
        lines += ["", f"{HEADS[finding.severity]}: {finding.title}", _indented("", finding.evidence)]
        words = {"why": finding.why, "read": finding.chapter and f"notebooks/{finding.chapter}", "try": finding.advice}
        lines += [_indented(f"{name}: ", text) for name, text in words.items() if text]
    wrong, look = (sum(finding.severity == severity for finding in found) for severity in SEVERITIES[:2])
    lines += ["", f"{wrong} wrong, {look} to look at"]
    if unseen:
        lines += ["", "What could not be checked, and what to log for it:"]
        lines += [_indented("- ", f"“{title}” needs {what}") for title, what in unseen.items()]
    return "\n".join(lines)


def _indented(head: str, text: str) -> str:
    return fill(head + text, 110, initial_indent="  ", subsequent_indent="    ")

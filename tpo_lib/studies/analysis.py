"""What a study's result says: tables with intervals, comparisons, verdicts. Nothing is computed from runs, all from the result.

The rules are those of studies/PLAN.md: a claim names pairs of methods (a, b) and an endpoint, the primary one unless it says
another; a shall be above b. All comparisons of the same endpoint in a study are one family for Holm's correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tpo_lib.runs.seeds import SHARES, holm
from tpo_lib.studies import tables
from tpo_lib.studies.spec import Study
from tpo_lib.studies.study import keys

LEVEL = 0.05  # of a corrected p
MATTERS = 0.01  # the smallest difference that does, in units of a reward or a share, where a claim says no other
SEED = 0  # of the bootstrap
SCORERS = ("reward", "judge", "second_judge")
HOLDS, NOT, PARTLY, OPEN = "holds", "does not hold here", "partly", "not decided"
REVERSED, SMALL = f"{NOT}: the reverse does", f"{NOT}: no gain that matters"
NO_WORSE = f"{OPEN}: no worse"  # of a claim that two do the same: whether better, is not told


def table(result: Mapping, label: str, key: str) -> np.ndarray | None:
    """(S, n) numbers of one endpoint, a row a seed; None where a seed has none."""
    rows = [run["endpoints"][key] for run in result["runs"][label]]
    return None if any(row is None for row in rows) else np.array(rows)


def summaries(result: Mapping, key: str) -> dict[str, dict]:
    """{label: mean with interval, seeds, ...} of one endpoint, see `tables.summary`; a share's ends in 0 to 1, as in `seeds`."""
    found = {label: tables.summary(table(result, label, key), seed=SEED) for label in result["runs"]}
    name, *how = key.removeprefix("area ").split()
    for metric in found.values():
        if name in {*SHARES, *SCORERS} and "drop" not in how and metric["mean"] is not None:
            metric["low"], metric["high"] = min(metric["mean"], max(0.0, metric["low"])), min(1.0, metric["high"])
    return found


def comparisons(study: Study, result: Mapping) -> dict[str, list[dict]]:
    """{endpoint: [a row a comparison]} of all that the study's claims compare, each endpoint with Holm's correction for itself.

    A claim on the primary endpoint is read with the judges' scores too, where the result has them. Rows of endpoints that decide
    have "whole", p with Holm's correction for all such of the study together, which decides nothing.
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for claim in study.hypotheses:
        for key in read(study, result, claim):
            known = pairs.setdefault(key, [])
            known += [pair for pair in named(result, claim) if pair not in known]
    found = {key: _family(result, key, family) for key, family in pairs.items()}
    deciding = [row for key in read_first(study) for row in found[key]]
    for row, p in zip(deciding, holm([row["p"] for row in deciding]), strict=True):
        row["whole"] = p
    return found


def secondary(study: Study, result: Mapping) -> dict[str, list[dict]]:
    """The same of all else that the result has of the methods that a claim compares, where both come; it decides nothing.

    Two with other data are left out: held-out pairs of other lengths, say, are of other prompts.
    """
    first, data = comparisons(study, result), {method.name: method.data for method in study.methods}
    data = {label: data[name] for label, (name, _) in result["chosen"].items()}
    pairs = dict.fromkeys(pair for claim in study.hypotheses for pair in named(result, claim))
    pairs |= dict.fromkeys(tuple(pair) for claim in study.claims for pair in claim.get("beside", ()))
    family, found = [(a, b) for a, b in pairs if b in result["runs"] and data[a] == data[b]], {}
    for key, *_ in keys(study):
        known = {(row["a"], row["b"]) for row in first.get(key, ())}
        rows = _family(result, key, [pair for pair in family if pair not in known])
        if there := [row for row in rows if row["mean"] is not None]:
            found[key] = there
    return found


def _family(result: Mapping, key: str, family: Sequence[tuple[str, str]]) -> list[dict]:
    values = {a: table(result, a, key) for a, _ in family}
    values |= {b: other(result, a, b, key) for a, b in family}
    return tables.paired(values, family, seed=SEED)


def other(result: Mapping, a: str, b: str, key: str) -> np.ndarray | None:
    """What a method is compared with: another one, or a number, "0.1" say, as large for every seed and prompt."""
    if b in result["runs"]:
        return table(result, b, key)
    mine = table(result, a, key)
    return None if mine is None else np.full_like(mine, float(b))


def named(result: Mapping, claim: Mapping) -> list[tuple[str, str]]:
    """The pairs of labels of a claim; a method that is tuned stands for its best label."""
    return [(result["best"].get(a, a), result["best"].get(b, b)) for a, b in claim["pairs"]]


def read(study: Study, result: Mapping, claim: Mapping) -> list[str]:
    """The endpoints that a claim is judged by: the first decides, the others (judges) confirm."""
    key = claim.get("endpoint", study.primary)
    has = next(iter(result["runs"].values()))[0]["endpoints"]
    others = [key.replace("reward", judge, 1) for judge in SCORERS[1:]] if "reward" in key else []
    return [key, *(each for each in others if each in has)]


def read_first(study: Study) -> set[str]:
    """The endpoints that decide a claim."""
    return {claim.get("endpoint", study.primary) for claim in study.hypotheses}


def verdict(
    study: Study, result: Mapping, claim: Mapping, compared: Mapping[str, Sequence[Mapping]]
) -> tuple[str, list]:
    """What became of a claim, and its comparisons on the deciding endpoint."""
    key, *confirming = read(study, result, claim)
    matters, sign = claim.get("matters", MATTERS), -1 if claim.get("below") else 1
    pairs, said = named(result, claim), []
    for pair in pairs:
        rows = [_row(compared[each], pair) for each in (key, *confirming)]
        said.append(_same(rows[0], sign, matters, key) if claim.get("equal") else _one(rows, sign, matters))
    against = all(each.startswith(NOT) for each in said)
    words = said[0] if len(set(said)) == 1 else NOT if against else PARTLY if {HOLDS, PARTLY} & {*said} else OPEN
    return words, [_row(compared[key], pair) for pair in pairs]


def _same(row: Mapping, sign: int, matters: float, key: str) -> str:
    """The verdict of one comparison of a claim that the two do not differ by more than matters: the interval alone decides."""
    if row["mean"] is None:
        return OPEN
    low, high = sorted((sign * row["low"], sign * row["high"]))
    if low > matters or high < -matters:
        return NOT
    if low <= -matters or high >= matters:
        return NO_WORSE if low > -matters and {*SCORERS} & {*key.split()} else OPEN
    return HOLDS


def _one(rows: Sequence[Mapping], sign: int, matters: float) -> str:
    """The verdict of one comparison; the first row is the deciding one's, the others are the judges'."""
    first, *judges = rows
    if first["mean"] is None:
        return OPEN
    high = max(sign * first["low"], sign * first["high"])

    def told(way: int) -> bool:
        """Whether the difference goes this way, told from 0, and a judge agrees, where there is one."""
        every = [row["holm"] < LEVEL and way * row["mean"] > 0 for row in rows]
        return every[0] and (not judges or any(every[1:]))

    if told(-sign):
        return REVERSED
    if high < matters:
        return SMALL
    return HOLDS if told(sign) else PARTLY if first["holm"] < LEVEL and sign * first["mean"] > 0 else OPEN


def _row(rows: Sequence[Mapping], pair: tuple[str, str]) -> Mapping:
    return next(row for row in rows if (row["a"], row["b"]) == pair)

"""Whether a reward was over-optimised: it rises while a judge that labelled no pair falls (Gao et al. 2022, arXiv 2210.10760).

A reward above its judge is no sign of it: their scales differ. What counts is a run's way from the evaluation at which the judge
was highest to its end, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tpo_lib.runs import plots, seeds

JUDGES = ("judge", "second_judge")


class Finding(NamedTuple):
    """What a run says of one judge."""

    verdict: str  # seen, not seen, open
    step: int  # the evaluation before the end at which the judge was highest
    reward: dict  # its change from there to the end, {"mean", "low", "high", "n", "p"}
    judge: dict


def finding(points: Sequence[Mapping], judge: str, *, seed: int) -> Finding | None:
    """Seen: the judge fell while the reward rose. Open: the reward rose, the judge's change is not told from 0. Else not seen.

    The highest of several evaluations is chosen with its noise, from which the end then seems to fall: so the judge's fall has to
    stand after Bonferroni's correction for the evaluations it was chosen from. The reward of the chosen one was measured on the
    same samples and is too high with it, its rise too small: this errs towards "not seen".

    Args:
        points: a curve as in `report`, the start first; None is returned where it kept no number a prompt, or has one point.
    """
    before = points[:-1]
    tables = {name: [seeds.table_of(point, name) for point in points] for name in ("reward", judge)}
    if not before or any(table is None for column in tables.values() for table in column):
        return None
    peak = max(range(len(before)), key=lambda i: plots.mean(before[i], judge))
    reward, judged = (
        seeds.paired_over_seeds({"end": column[-1], "peak": column[peak]}, seed=seed)[0] for column in tables.values()
    )
    verdict = "not seen"
    if reward["low"] > 0 and judged["high"] < 0 and len(before) * judged["p"] < 0.05:
        verdict = "seen"
    elif reward["low"] > 0 and judged["low"] <= 0:
        verdict = "open"
    return Finding(verdict, before[peak]["step"], reward, judged)


def sentences(curves: Mapping[str, Sequence[Mapping]], judge: str, *, seed: int) -> list[str]:
    """One a curve that can say it, with both changes and their 95% intervals."""
    said = []
    for name, points in curves.items():
        if (found := finding(points, judge, seed=seed)) is None:
            continue
        changes = ", ".join(
            f"{which} {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
            for which, change in (("reward", found.reward), (judge.replace("_", " "), found.judge))
        )
        said.append(f"{plots.style_of(name).label}: {found.verdict}. From update {found.step} to the end {changes}.")
    return said

"""The limits that this library sets itself, and whether a set of results holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks import contestants, measure


class Goal(NamedTuple):
    """One limit."""

    number: int  # one goal may have several limits
    text: str  # what is compared
    limit: float  # largest value allowed
    read: Callable[[Mapping], float]  # sections -> the measured value; raises KeyError where it was not measured


def evaluate(sections: Mapping[str, Mapping]) -> list[dict]:
    """[{number, text, limit, measured (None: not measured here), holds}], in the order of GOALS."""
    rows = []
    for goal in GOALS:
        try:
            measured = goal.read(sections)
        except KeyError:
            measured = None
        holds = None if measured is None else measured <= goal.limit
        told = {"number": goal.number, "text": goal.text, "limit": goal.limit}
        rows.append(told | {"measured": measured, "holds": holds})
    return rows


def _time(section: str, against: str, label: str = "fused") -> Callable[[Mapping], float]:
    return lambda sections: measure.ratio(sections[section]["times"], label, against)["median"]


def _memory(section: str, against: str, label: str = "fused") -> Callable[[Mapping], float]:
    return lambda sections: sections[section]["memory_mib"][label] / sections[section]["memory_mib"][against]


def _loop(section: str, label: str, against: str) -> Callable[[Mapping], float]:
    """Whole loops are compared by the clock on the wall, which is what is waited for."""
    return lambda sections: measure.ratio(sections[f"loop-{section}"]["times"], label, against, "wall_s")["median"]


def _loop_memory(section: str, label: str, against: str) -> Callable[[Mapping], float]:
    return _memory(f"loop-{section}", against, label)


def _loops(section: str, words: str) -> list[Goal]:
    """Of one epoch of IMDb-like pairs on SmolLM2-135M."""
    what = f"SmolLM2-135M, {words}, "
    return [
        Goal(7, f"{what}DPO: time of the loop over TRL's", 0.60, _loop(section, "dpo/fit", "dpo/trl")),
        Goal(7, f"{what}DPO: time over the authors' loop", 0.65, _loop(section, "dpo/fit", "dpo/authors")),
        Goal(7, f"{what}TDPO2: time over the authors' loop", 0.75, _loop(section, "tdpo2/fit", "tdpo2/authors")),
        Goal(7, f"{what}TDPO2, cached: time over the authors' loop", 0.60,
             _loop(section, "tdpo2/fit-cached", "tdpo2/authors")),
        Goal(7, f"{what}DPO: memory over TRL's", 0.5, _loop_memory(section, "dpo/fit", "dpo/trl")),
        Goal(7, f"{what}DPO: memory over the authors'", 0.5, _loop_memory(section, "dpo/fit", "dpo/authors")),
        Goal(7, f"{what}TDPO2: memory over the authors'", 0.5, _loop_memory(section, "tdpo2/fit", "tdpo2/authors")),
    ]  # fmt: skip


def _slowest(sections: Mapping) -> float:
    """V = 8192, every objective: ours over the fastest other contestant, the worst of them."""
    worst = []
    for name in ("tdpo2", "dpo", "tdpo1", "tgdpo"):
        times = sections[f"{name}-8192"]["times"]
        peers = [label for label in times if label in ("textbook", "trl", "trl-packed", "liger")]
        worst += [measure.ratio(times, "fused", peer)["median"] for peer in peers]
    return max(worst)


def _slowest_run(sections: Mapping) -> float:
    times, names = sections["pocket"]["times"], sections["pocket"]["gaps"]
    return max(measure.ratio(times, f"{name}/default", f"{name}/textbook")["median"] for name in names)


def _not_finite(sections: Mapping) -> float:
    return sum(not sections["finite"]["finite"][label] for label in contestants.OURS)


GOALS = (
    Goal(1, "TDPO2, V = 50257: time over the textbook's", 0.40, _time("tdpo2-50257", "textbook")),
    Goal(1, "TDPO2, V = 50257: peak memory over the textbook's", 0.12, _memory("tdpo2-50257", "textbook")),
    Goal(1, "TDPO2, V = 50257: time over TRL's kernels composed", 0.20, _time("tdpo2-50257", "trl")),
    Goal(1, "TDPO2, V = 50257, unpadded: time over the textbook's", 0.65, _time("tdpo2-unpadded", "textbook")),
    Goal(2, "TDPO1, V = 50257: time over the textbook's", 0.30, _time("tdpo1-50257", "textbook")),
    Goal(3, "DPO, V = 50257: time over the textbook's", 0.60, _time("dpo-50257", "textbook")),
    Goal(3, "DPO, V = 50257: time over TRL's", 0.35, _time("dpo-50257", "trl")),
    Goal(3, "DPO, V = 50257: time over Liger's", 0.65, _time("dpo-50257", "liger")),
    Goal(3, "DPO, V = 50257: peak memory over TRL's", 0.15, _memory("dpo-50257", "trl")),
    Goal(4, "TGDPO, V = 50257, cached: time over a textbook step", 0.40, _time("tgdpo-50257", "textbook", "cached")),
    Goal(5, "V = 8192, worst of all objectives: time over any peer's", 1.0, _slowest),
    Goal(5, "pocket model, worst of all objectives: time of a run over the textbook's", 1.0, _slowest_run),
    Goal(6, "paths of ours that are not finite where the textbook gives NaN", 0, _not_finite),
    *_loops("smollm2-135m-imdb", "every pair of another prompt"),
    *_loops("smollm2-135m-imdb-prompts", "six pairs of a prompt together"),
    Goal(
        8,
        "SmolLM2-135M, six pairs of a prompt together, TDPO2: time over the authors' loop",
        0.45,
        _loop("smollm2-135m-imdb-prompts", "tdpo2/fit", "tdpo2/authors"),
    ),
)

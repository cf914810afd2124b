"""What the studies, over several seeds, say of the objectives of a run of the bundled model: beside what its one seed says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tpo_lib.files import store
from tpo_lib.files.load import POCKET
from tpo_lib.runs.plots import style_of

VERDICTS = POCKET.parent / "verdicts.json"  # as `tpo_lib.studies.claims.verdicts` makes it
KINDS = {"area": "by the area", "equal_area": "at equal KL"}  # what the study of frontiers compares by
COLUMNS = ("claim of the paper", "difference [95%]", "verdict", "study")


def of(model: str, objectives: Iterable[str]) -> list[tuple[str, ...]]:
    """Rows of COLUMNS: the claims that compare no others than these objectives; none of another model than the bundled one."""
    known = set(objectives)
    return [
        (each["claim"], each["here"], each["verdict"], each["study"])
        for each in _read(model).get("claims", ())
        if known >= {*each["objectives"]}
    ]


def frontier(config: Mapping) -> dict:
    """What `studies.claims.verdicts` has of the study that ranks the objectives; {} of another model than the bundled one."""
    return _read(config.get("model")).get("frontier") or {}


def beside(config: Mapping, metric: str, above: str, below: str, *, told: bool) -> str:
    """What that study says of a finding on two objectives, to be put behind it; "" where it did not compare them by this metric.

    An objective with an alpha is the study's of the same alpha, where it has the pair with that, else the one that it chose.

    Args:
        config: of the comparison, as in its summary.
        above, below: its labels; the difference is above - below. A label with a setting is none that the study knows.
        told: whether the finding says that `above` lies above `below`.

    Example:
        >>> beside({"model": str(POCKET)}, "reward", "tdpo1", "dpo", told=True)
        '; study 1 (5 seeds): -0.010 [-0.018, -0.001] by the area, -0.003 [-0.015, 0.009] at equal KL, not told apart'
    """
    study = frontier(config)
    alphas = {each["loss_type"]: each["alpha"] for each in config.get("objectives", ()) if "alpha" in each}
    pairs = {(row["a"], row["b"]) for row in study.get("pairs", ())}
    for a in _labels(above, study, alphas):
        for b in _labels(below, study, alphas):
            if {(a, b), (b, a)} & pairs:
                names = ", ".join(style_of(each).label for each in (a, b) if " " in each)
                who = f"study {study['number']} ({study['seeds']} seeds{names and f', {names}'})"
                rows = [row for row in study["pairs"] if row["metric"] == metric and {row["a"], row["b"]} == {a, b}]
                return f"; {who}: {_words(rows, a, told)}" if rows else ""
    return ""


def _labels(name: str, study: Mapping, alphas: Mapping) -> list[str]:
    """What the study calls an objective: with the run's alpha, and with that which it chose."""
    own = [f"{name} α{alphas[name]:g}"] if name in alphas else []
    return [*own, study["chosen"][name]] if name in study.get("chosen", ()) else []


def _words(rows: Iterable[Mapping], a: str, told: bool) -> str:
    said: dict[str, list[str]] = {}  # what became of it -> by what
    for row in rows:
        sign = 1 if row["a"] == a else -1
        low, high = sorted((sign * row["low"], sign * row["high"]))
        way = ("confirmed" if sign * row["mean"] > 0 else "the reverse") if told else "told apart"
        figures = f"{sign * row['mean']:z.3f} [{low:z.3f}, {high:z.3f}] {KINDS[row['kind']]}"
        said.setdefault(way if row["told"] else "not told apart", []).append(figures)
    return "; ".join(f"{', '.join(figures)}, {verdict}" for verdict, figures in said.items())


def _read(model: str | None) -> dict:
    return store.read_json(VERDICTS, "restore it from the repository") if model == str(POCKET) else {}

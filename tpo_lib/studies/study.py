"""A study from its file to its result: tune, choose, report. It goes on where it was, since every run is kept.

A result is {"study", "digest", "versions", "core_seconds", "grid": [[method, setting, area on validation prompts]],
"chosen": {label: [method, setting]}, "best": {method: label}, "best_of_n": [{"n", "kl", scorer: mean}], "runs": {label: [a run
of every seed]}}; such a run is {"seed", "points": [{"step", metric: mean}], "endpoints": {key: [a number a prompt] or None},
"training": {name in LOGGED: [a number a row]}}. What is said of a study (`analysis`, `page`) is computed from this file alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from tpo_lib.files import store
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import runs as training
from tpo_lib.studies import endpoints, execute
from tpo_lib.studies.pool import make_all
from tpo_lib.studies.spec import Method, Study

AREA = 1.0, 20.0  # nats, what settings are chosen by
LOGGED = ("step", "loss", "tokens", "seconds")  # of training; the last two of online runs
DIGITS = 4  # significant ones kept of a figure in a result
NAMES = {"kl": "{level:g} nats", "reward": "reward {level:g}"}  # of a level
SPENT = {"steps_to": "updates", "tokens_to": "sampled tokens", "seconds_to": "seconds"}  # until a level is reached


def run(path: Path, *, runs: Path, **how) -> dict:
    """Make the runs of a study that are missing, write results/NAME.json beside its file NAME.toml, and return it.

    Args:
        path: of its file.
        runs: where runs are kept.
        how: of `pool.make_all`: engine, workers, num_gpus, progress.

    Raises:
        FileNotFoundError, ValueError: as `Study.read`, and where a run fails.
    """
    study, results = Study.read(path), path.parent / "results"
    tuning = study.tuning()
    make_all([spec for *_, spec in tuning], runs, **how)
    grid = [(method.name, setting, score(execute.read(spec, runs))) for method, setting, spec in tuning]
    chosen, best = choose(study, grid, results)
    reporting = study.reporting(chosen)
    best_of = study.best_of()
    make_all([*([best_of] if best_of else []), *(spec for *_, spec in reporting)], runs, **how)
    seconds, reported = 0.0, {label: [] for label in chosen}
    for *_, spec in tuning:
        seconds += execute.read(spec, runs)["seconds"]["in all"]
    for label, seed, spec in reporting:
        record = execute.read(spec, runs)
        seconds += record["seconds"]["in all"]
        reported[label].append({"seed": seed} | summarised(study, record))
    result = {
        "study": study.name,
        "digest": study.digest,
        "versions": training.versions(),
        "core_seconds": round(seconds),
    }
    result |= {"grid": grid, "chosen": chosen, "best": best, "runs": reported}
    if best_of:
        scores = execute.read(best_of, runs)["scores"]
        result["best_of_n"] = [best_of_n(scores, 2**i) for i in range(best_of["best_of"].bit_length())]
    result = json.loads(json.dumps(store.rounded(result, DIGITS)))
    write(results / f"{study.name}.json", result)
    return result


def best_of_n(scores: Mapping, n: int) -> dict:
    """The start's best of n samples, by the reward: what it scores, at a KL of at most log n - (n - 1) / n nats."""
    means = {name: float(endpoints.best_of_n(each, n, by=scores["reward"]).mean()) for name, each in scores.items()}
    return {"n": n, "kl": endpoints.best_of_n_kl(n)} | means


def score(record: Mapping) -> float:
    """The area under a run's curve of rewards, by which settings are chosen."""
    return float(endpoints.area(record, "reward", *AREA).mean())


def choose(study: Study, grid: list[tuple[str, dict, float]], results: Path) -> tuple[dict, dict]:
    """{label: (method, setting)} of all that is reported, and {method: the label that stands for it}."""
    chosen: dict[str, tuple[str, dict]] = {}
    best: dict[str, str] = {}
    for method in study.methods:
        mine = [(points, setting) for name, setting, points in grid if name == method.name]
        if not mine:  # nothing was tuned
            several = method.settings() if method.each else [_settled(method, chosen, best, results)]
            mine = [(0.0, setting) for setting in several]
        groups: dict[str, list] = {}
        for points, setting in mine:
            groups.setdefault(_label(method, setting), []).append((points, setting))
        winners = {label: max(several, key=lambda each: each[0]) for label, several in groups.items()}
        chosen |= {label: (method.name, setting) for label, (_, setting) in winners.items()}
        if study.tune or len(winners) == 1:
            best[method.name] = max(winners, key=lambda label: winners[label][0])
    return chosen, best


def _settled(method: Method, chosen: Mapping, best: Mapping, results: Path) -> dict:
    """The setting of a method that has no grid."""
    if method.like:
        return chosen[best[method.like]][1] | method.fixed
    if method.tuned:
        other, _, label = method.tuned.partition(": ")
        known = read(results.parent, other)
        label = known["best"].get(label, label)
        if label not in known["chosen"]:
            raise ValueError(f"study {other} has chosen nothing for {label!r}; it has {', '.join(known['chosen'])}")
        return known["chosen"][label][1] | method.fixed
    (setting,) = method.settings()
    return setting


def _label(method: Method, setting: Mapping) -> str:
    """The method's name, and where every value of a setting is reported, that value: "tdpo2 α0.5"."""
    if not method.each:
        return method.name
    known = OBJECTIVES[method.loss_type].hyperparameters
    symbol = known[method.each].symbol if method.each in known else f"{method.each}="
    return f"{method.name} {symbol}{setting[method.each]:g}"


def keys(study: Study) -> Iterator[tuple[str, str, tuple]]:
    """(key, name of the endpoint, its arguments) of all that is read off a run."""
    for each in study.endpoints:
        kind, x = each["kind"], each.get("x", "kl")
        for metric in each.get("metrics", ["reward"]):
            if kind == "area":
                yield f"area {metric}", kind, (metric, *each["between"])
            elif kind == "equal_area":
                low, high = each["between"]
                yield f"{metric} over {low:g} to {high:g} nats", kind, (metric, low, high)
            elif kind in ("at_level", "budget"):
                within = "within" if kind == "budget" else "at"
                for level in each["levels"]:
                    yield (
                        f"{metric} {within} {NAMES[x].format(level=level)}",
                        kind,
                        (metric, level, *([x] if kind == "at_level" else [])),
                    )
            elif kind in SPENT:
                for level in each["levels"]:
                    yield f"{SPENT[kind]} to {metric} {level:g}", kind, (level, metric)
            elif kind == "at_best":
                yield f"kl at best {metric}", kind, (metric,)
            elif kind == "converged":
                yield "updates to convergence", kind, (each["over"],)
            elif kind == "floored":
                yield "floor share", kind, ()
            else:
                over = [each["over"]] if "over" in each else []
                yield f"{metric} {kind.replace('_', ' ')}", kind, (metric, *over)


def summarised(study: Study, record: Mapping) -> dict:
    """What a result keeps of a run."""
    found = {key: endpoints.ENDPOINTS[kind](record, *given) for key, kind, given in keys(study)}
    found = {key: None if values is None else values.tolist() for key, values in found.items()}
    points = [
        {"step": point["step"]} | {name: metric["mean"] for name, metric in point["metrics"].items()}
        for point in record["points"]
    ]
    return {
        "points": points,
        "endpoints": found,
        "training": {name: [row.get(name) for row in record["training"]] for name in LOGGED},
    }


def read(folder: Path, name: str) -> dict:
    """The result of a study in the folder of studies; FileNotFoundError where there is none yet."""
    path = folder / "results" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there yet; run `python -m tpo_lib study {name}` first")
    result = json.loads(path.read_text(encoding="utf-8"))
    for each in itertools.chain(*result["runs"].values()):
        columns = each["points"]
        rows = zip(*columns.values(), strict=True)
        each["points"] = [{name: x for name, x in zip(columns, row, strict=True) if x is not None} for row in rows]
    return result


def write(path: Path, result: Mapping) -> None:
    """Write a result with a line a run, so that a change is seen where it is; of its points a list a metric, for brevity."""

    def line(run: Mapping) -> str:
        names = dict.fromkeys(name for point in run["points"] for name in point)
        columns = {name: [point.get(name) for point in run["points"]] for name in names}
        return json.dumps({**run, "points": columns})

    runs = ",\n".join(
        f"  {json.dumps(label)}: [\n   " + ",\n   ".join(map(line, several)) + "\n  ]"
        for label, several in result["runs"].items()
    )
    rest = json.dumps({name: value for name, value in result.items() if name != "runs"})
    store.write_file(path, f'{rest[:-1]},\n "runs": {{\n{runs}\n }}}}\n')

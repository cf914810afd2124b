"""The stored results of chapter 6b and docs/smollm2: finished comparisons, cut to their numbers. No text is kept.

python -m tpo_data.smollm2 runs/smollm2-135m runs/pocket     # folders that `run` wrote; of every model the last stays
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpo_lib.cli import call
from tpo_lib.files import store
from tpo_lib.parser import Parser

STORED = Path(__file__).parent / "smollm2" / "summary.json"
FIX = "make it anew with `python -m tpo_data.smollm2 RUN`"
DIGITS = 5  # significant ones kept of a figure
TRAINING = ("step", "loss", "rewards/margins", "rewards/accuracies")  # kept of a training row
SIZES = ("train_prompts", "held_out_prompts", "held_out_prompts_seen", "pairs", "held_out_pairs", "max_new_tokens")
STAGE = (*SIZES, "samples_per_prompt", "min_gap", "evaluations", "prompts")
SETTINGS = ("lr", "batch_size", "accumulation", "schedule", "warmup_steps", "precision")
HYPER = ("beta", "alpha", "gamma")
SFT = ("reviews", "updates", "perplexity_before", "perplexity_after")


def load(path: Path = STORED) -> dict[str, dict]:
    """What is stored, by model: {"curves", "training", "stage", "train", "objectives", "sft", "costs", "seed", "versions"}.

    `curves` is {objective: points}, the start first, as `plots.frontier` takes them; a point also has "characters", the mean
    length of a sample, and "by_prompt" {metric: one number a prompt}. Prompts have one order in all points of a model.
    """
    return store.read_json(path, FIX)["models"]


def compact(folder: Path) -> tuple[str, dict]:
    """The model's name, and the numbers of the finished comparison in `folder`.

    Raises:
        FileNotFoundError: the comparison is not finished.
        ValueError: a text would be kept.
    """
    if not (folder / "summary.json").exists():
        raise FileNotFoundError(f"{folder} has no summary.json: let the comparison end first (`run` goes on with it)")
    summary = json.loads((folder / "summary.json").read_text())
    config, start = summary["config"], _points(folder / "start")
    kept = {
        "curves": {name: start + _points(folder / name) for name in summary["objectives"]},
        "training": _training(folder / "metrics.jsonl"),
        "stage": {name: config[name] for name in STAGE},
        "train": {name: config["objectives"][0][name] for name in SETTINGS},
        "objectives": {run["loss_type"]: {k: run[k] for k in HYPER if k in run} for run in config["objectives"]},
        "sft": {name: config[f"sft {name}"] for name in SFT} if config.get("sft") else None,
        **{name: summary[name] for name in ("costs", "seed", "versions", "wall_time_s")},
    }
    kept["stage"]["prompts"] = Path(kept["stage"]["prompts"]).name
    if texts := [text for text in _strings(kept) if " " in text.strip() and text not in summary["costs"]]:
        raise ValueError(f"{folder}: {texts[0][:40]!r} is text, and none is kept; look at what is stored of a run")
    return Path(config["model"]).name.lower().removesuffix("-instruct"), _short(kept)


def write(folders: Sequence[Path], path: Path = STORED) -> dict[str, dict]:
    """Store these comparisons in place of earlier ones of their models; returns all that is stored."""
    models = (load(path) if path.exists() else {}) | dict(map(compact, folders))
    path.parent.mkdir(exist_ok=True)
    store.write_json(path, {"models": models})
    return models


def _points(folder: Path) -> list[dict]:
    points = []
    for path in sorted((folder / "evaluations").glob("*.json")):
        row = store.read_json(path, "the comparison is damaged")
        numbers = {name: value for name, value in row.items() if isinstance(value, dict) and "mean" in value}
        point = {name: row[name] for name in ("step", "pairs_seen")} | numbers
        point["characters"] = statistics.fmean(len(sample["text"]) for sample in row["samples"])
        points.append(point | {"by_prompt": row["by_prompt"]})
    return points


def _training(path: Path) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if row["kind"] == "train":
            rows.setdefault(row["objective"], []).append({name: row[name] for name in TRAINING if name in row})
    return rows


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(part)


def _short(value):
    """The same nest of values with every float cut to DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tpo_data.smollm2", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of finished comparisons")
    parser.set_defaults(function=lambda options: print(", ".join(write(options.folders)), "in", STORED))
    call(parser, arguments)


if __name__ == "__main__":
    main()

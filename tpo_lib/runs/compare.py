"""The comparison: every objective from one start, on one set of pairs, evaluated on one set of held-out prompts.

An interrupted comparison continues where it was: pairs are cached, every training run resumes from its checkpoint, and an
evaluation that was written down is not made again.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from tpo_lib.config import TrainConfig
from tpo_lib.files import store
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import fingerprint
from tpo_lib.runs import costs, plots, report, runs
from tpo_lib.runs.stage import StageConfig, build_stage
from tpo_lib.runs.trackers import check_tracker
from tpo_lib.train import planned_steps

FIX = "restore it, or pass --fresh to make the comparison anew"
OTHER = "pass --fresh to replace the comparison there, or another --name"
LATEST = "latest"  # the link to the last comparison
FILES = re.compile(  # names of all files of a comparison that stand in no manifest
    r"(identity|wall_time|summary|costs|\d{8})\.json|metrics\.jsonl|report\.(md|html)|"
    r"(gaps|training|frontier|frontier_judge|seqkl|diversity)\.png"
)
EVALUATION_COST = 4.0  # one evaluation in units of one update, for the bar's estimate alone


@dataclass(frozen=True)
class CompareConfig:
    """One comparison."""

    stage: StageConfig
    objectives: tuple[TrainConfig, ...]  # in order; a tgdpo run is guided by the dpo run before it
    evaluations: int  # how often each run is evaluated, evenly spaced, the end included


def run(config: CompareConfig, folder: Path, *, fresh: bool = False, progress: bool = True) -> dict:
    """Run (or continue) a comparison, write all of it below `folder`, and point the link `latest` beside it there.

    Args:
        fresh: throw away what an earlier comparison left in the folder; without it another comparison is refused.

    Returns:
        The summary, as in summary.json.

    Raises:
        FileExistsError: there is something in the folder that no comparison wrote; nothing was removed.
        RuntimeError: it holds another comparison, or another process is at work in it.
    """
    check_tracker(replace(config.objectives[0], output_dir=str(folder)))
    with store.exclusive(folder, "comparison"):
        if fresh:
            store.clear(folder, FILES)
        comparison = _Comparison(config, folder, progress)
        for train in config.objectives:
            comparison.train(train)
        comparison.bar.close()
        summary, curves, samples = comparison.collect()
        report.write_report(folder, summary, curves, samples, training=comparison.training)
        lines = "".join(json.dumps(row) + "\n" for row in comparison.rows(curves))
        store.write_file(folder / "metrics.jsonl", lines)
        store.write_file(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        _link_latest(folder)
    return summary


class _Comparison:
    """A comparison under way: its stage, the evaluation of the start, the bar and the clock."""

    def __init__(self, config: CompareConfig, folder: Path, progress: bool):
        self.config, self.folder = config, folder
        self.training: dict[str, list[dict]] = {}  # objective -> its metrics rows
        self.costs, self.evaluation_s = folder / "costs.json", 0.0
        before = folder / "wall_time.json"  # seconds of work that was kept, over all interruptions
        self.clock = (store.read_json(before, FIX)["seconds"] if before.exists() else 0.0) - time.time()
        identity = partial(store.settle, folder / "identity.json", fix=OTHER)
        identity({"config": asdict(config)})  # before the work, and once more with what was loaded
        with self.costing("start, prompts and pairs"):
            self.stage = build_stage(config.stage, cache_dir=folder / "pairs")
        reward = self.stage.reward and getattr(self.stage.reward, "fingerprint", None)
        identity({"model": fingerprint(self.stage.start), "reward": reward})
        if self.stage.report:
            store.write_file(folder / "gaps.png", partial(plots.score_gaps(self.stage.report).savefig, dpi=110))
        first = config.objectives[0]
        self.updates = planned_steps(first, len(self.stage.pairs), first.batch_size * first.accumulation)
        self.every = max(1, self.updates // config.evaluations)
        each = self.updates + EVALUATION_COST * len(range(0, self.updates, self.every))
        total = round(EVALUATION_COST + each * len(config.objectives))
        self.bar = tqdm(total=total, desc="comparison", disable=not progress, unit="update")
        self.start_evaluation = self.evaluated(folder / "start", 0, self.stage.start, None)

    @contextmanager
    def costing(self, name: str) -> Iterator[dict]:
        """Add what the block costs, and what it puts into the dict, to what `name` has cost before."""
        with costs.measured() as cost:
            yield cost
        known = store.read_json(self.costs, FIX)["costs"] if self.costs.exists() else {}
        store.write_json(self.costs, {"costs": known | {name: costs.total(known.get(name), cost)}})

    def evaluated(self, folder: Path, step: int, policy, train: TrainConfig | None, guide=None) -> dict:
        """The evaluation of `policy` at `step`: read back if it was made before, else made and written down."""
        path = _evaluation(folder, step)
        if path.exists():
            return store.read_json(path, FIX)
        clock = time.monotonic()
        result = self.stage.evaluate(policy, train, guide=guide)
        self.evaluation_s += time.monotonic() - clock
        said = result.record()
        row = {"step": step, "pairs_seen": step * train.batch_size * train.accumulation if train else 0} | said[
            "metrics"
        ]
        row["samples"] = said["samples"]
        row["by_prompt"] = {name: list(map(float, values)) for name, values in result.by_prompt.items()}
        store.write_json(path, row)
        self.clock += time.time()
        store.write_json(self.folder / "wall_time.json", {"seconds": self.clock})
        self.clock -= time.time()
        self.bar.update(EVALUATION_COST)
        return row

    def train(self, train: TrainConfig) -> None:
        """Train and evaluate one objective, continuing where an interrupted run left it."""
        stage, folder, seen = self.stage, self.folder / train.loss_type, 0
        guide = self.guide(train) if "guide_logps" in OBJECTIVES[train.loss_type].needs else None
        self.bar.set_description(train.loss_type)

        def callback(step: int, policy) -> None:
            nonlocal seen
            self.bar.update(step - seen)
            seen = step
            if step:
                self.evaluated(folder, step, policy, train, guide)

        settings = replace(train, output_dir=str(folder), eval_every=self.every, save_every=self.every)
        more = {"guide": guide, "tokenizer": stage.tokenizer, "callbacks": [callback]}
        with self.costing(train.loss_type) as cost:
            evaluated = self.evaluation_s
            run = runs.train(settings, *stage.fresh(train), **more)
            each = sum(pair.size for pair in stage.pairs) / len(stage.pairs)
            cost["tokens"] = each * run.updates * train.batch_size * train.accumulation
            cost["seconds"] = self.evaluation_s - evaluated  # not of training
        self.training[train.loss_type] = run.rows
        for step in [*range(self.every, run.updates, self.every), run.updates]:
            if not (path := _evaluation(folder, step)).exists():
                raise RuntimeError(f"{path} is missing, and the run has gone on since; {FIX}")

    def guide(self, train: TrainConfig):
        """The dpo run of this comparison if it was made with the beta that is asked for, else one for this alone."""
        stage, folder = self.stage, self.folder / "dpo"
        fitting = runs.guide_settings(train).to_dict() in [other.to_dict() for other in self.config.objectives]
        if not (fitting and folder.name in self.training):
            folder = self.folder / "guide"
            settings = replace(train, output_dir=str(folder))
            runs.train_guide(settings, *stage.fresh(settings), tokenizer=stage.tokenizer)
        return runs.load_guide(folder, stage.start)

    def collect(self) -> tuple[dict, dict, dict]:
        """Return (summary, curves, samples) in the schemas of report.write_report."""
        start, curves, samples = self.start_evaluation, {}, {}
        for name in self.training:
            paths = sorted(_evaluation(self.folder / name, 0).parent.glob("*.json"))
            rows = [start, *(store.read_json(path, FIX) for path in paths)]
            curves[name] = [{key: value for key, value in row.items() if key != "samples"} for row in rows]
            samples[name] = []
            for a, b in zip(start["samples"], rows[-1]["samples"], strict=True):
                sample = {"prompt": a["prompt"], "before": a["text"], "after": b["text"]}
                scores = ("reward", "judge")
                sample |= {f"before_{kind}": a[kind] for kind in scores} | {f"after_{kind}": b[kind] for kind in scores}
                samples[name].append(sample)
        config = asdict(self.config) | {"objectives": [train.to_dict() for train in self.config.objectives]}
        config = config.pop("stage") | config | {"pairs": len(self.stage.pairs)}
        config |= {"held_out_pairs": len(self.stage.held_out_pairs), "held_out_prompts_seen": self.stage.seen_prompts}
        if self.stage.sft:
            config |= {f"sft {name}": value for name, value in self.stage.sft.items()}
        summary = {
            "objectives": {name: _metrics(curve[-1]) for name, curve in curves.items()},
            "start": _metrics(start),
            "config": config,
            "seed": self.config.stage.seed,
            "versions": runs.versions(),
            "costs": store.read_json(self.costs, FIX)["costs"],
            "wall_time_s": store.read_json(self.folder / "wall_time.json", FIX)["seconds"],
        }
        return summary, curves, samples

    def rows(self, curves: dict) -> Iterator[dict]:
        """Everything that was logged: training rows and evaluations of all objectives."""
        for name, curve in curves.items():
            for row in self.training[name]:
                yield {"objective": name, "kind": "train"} | row
            for row in curve:
                shown = {key: value for key, value in row.items() if key != "by_prompt"}
                yield {"objective": name, "kind": "evaluation"} | shown


def _evaluation(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"{step:08d}.json"


def _metrics(row: dict) -> dict:
    return {name: value for name, value in row.items() if isinstance(value, dict) and "mean" in value}


def run_folder(runs: str | Path, name: str) -> Path:
    """The folder of the comparison `name`; ValueError if that names no single folder below `runs`, or is the link's."""
    if name in ("", ".", "..", LATEST) or "/" in name or "\\" in name:
        raise ValueError(
            f"--name {name!r} must be a name of one folder below {runs}, and not {LATEST!r}; move with --runs"
        )
    return Path(runs) / name


def _link_latest(folder: Path) -> None:
    """Point the link `latest` here; where it cannot be, or is not a link of ours, all is done but the link."""
    link, new = folder.parent / LATEST, folder.parent / f".{LATEST}.new"
    try:
        if os.path.lexists(link) and not (link.is_symlink() and os.path.dirname(os.readlink(link)) == ""):
            raise FileExistsError("it is not a link of ours")
        new.unlink(missing_ok=True)
        new.symlink_to(folder.name, target_is_directory=True)
        new.replace(link)
    except OSError as error:
        print(f"{link} is left as it is ({error}); the comparison is in {folder}", file=sys.stderr)

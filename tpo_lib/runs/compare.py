"""The comparison: every setting and seed from one start, on one set of pairs, evaluated on one set of held-out prompts.

An interrupted comparison continues where it was: pairs are cached, every training run resumes from its checkpoint, and an
evaluation that was written down is not made again.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tpo_lib.config import TrainConfig, run_settings
from tpo_lib.data import column
from tpo_lib.fast import FastPath
from tpo_lib.files import store
from tpo_lib.models import fingerprint
from tpo_lib.runs import configs, costs, heatmap, plots, report, runs, seeds, work
from tpo_lib.runs.advice import OutOfMemory, ran_out
from tpo_lib.runs.settings import CompareConfig, Run, schedule
from tpo_lib.runs.stage import Stage, build_stage, prompts_of
from tpo_lib.runs.trackers import check_tracker
from tpo_lib.train import planned_steps

FIX = "restore it, or pass --fresh to make the comparison anew"
OTHER = "pass --fresh to replace the comparison there, or name another folder (run: --name; compare: --output-dir)"
LATEST = "latest"  # the link to the last comparison
EVALUATION = (
    "an evaluation does not fit; it takes less with --set stage.sampled_together=N or stage.max_new_tokens=N (run)"
)
FORMAT = 2  # of a folder: before, evaluations were evenly spaced, on prompts of which training had seen some
ROWS = 20  # of training metrics in a run, at least, where nothing is said of log_every: one makes no curve
SAVED = 4  # checkpoints of a run: a kill costs a quarter of its updates at most
FILES = re.compile(  # names of all files of a comparison that stand in no manifest
    r"(identity|wall_time|summary|costs|tokens|\d{8})\.json|metrics\.jsonl|report\.(md|html)|config\.yaml|"
    r"(gaps|training|frontier|frontier_judge|frontier_second_judge|seqkl|diversity|tokens_logratio|tokens_kl)\.png"
)


def run(
    config: CompareConfig,
    folder: Path,
    *,
    fast: FastPath | None = None,
    fresh: bool = False,
    progress: bool = True,
    latest: bool = True,
) -> dict:
    """Run (or continue) a comparison and write all of it below `folder`.

    Args:
        fast: how runs read their models; no part of the comparison, so that an interrupted one may go on with another.
        fresh: throw away what an earlier comparison left in the folder; without it another comparison is refused.
        latest: point the link `latest` beside the folder there.

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
        comparison = _Comparison(config, folder, fast, progress)
        with closing(comparison.bar):
            comparison.begin()
            for each in comparison.runs:
                comparison.train(each)
        summary, curves, samples = comparison.collect()
        several = len(config.seeds) > 1
        training = {label: [comparison.rows[run.name] for run in each] for label, each in comparison.settings.items()}
        training = training if several else {label: rows for label, (rows,) in training.items()}
        report.write_report(folder, summary, curves, samples, training=training, tokens=comparison.tokens)
        lines = "".join(json.dumps(row) + "\n" for row in comparison.logged())
        store.write_file(folder / "metrics.jsonl", lines)
        store.write_file(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        if latest:
            _link_latest(folder)
    return summary


class _Comparison:
    """A comparison under way: its stage, the evaluation of the start, the bar and the clock."""

    def __init__(self, config: CompareConfig, folder: Path, fast: FastPath | None, progress: bool):
        self.config, self.folder, self.fast = config, folder, fast
        self.runs, self.guides = config.runs(), config.guides()
        self.settings: dict[str, list[Run]] = {}  # label -> its runs, a seed each
        for each in self.runs:
            self.settings.setdefault(each.label, []).append(each)
        self.rows: dict[str, list[dict]] = {}  # run -> its metrics rows, once it has ended
        self.tokens: dict[str, list[dict]] = {}  # label -> `heatmap.token_map` of its first seed
        self.costs, self.evaluation_s = folder / "costs.json", 0.0
        before = folder / "wall_time.json"  # seconds of work that was kept, over all interruptions
        self.clock = (store.read_json(before, FIX)["seconds"] if before.exists() else 0.0) - time.time()
        self.identity = partial(store.settle, folder / "identity.json", fix=OTHER)
        self.identity(self._recorded())  # before the work, and once more with what was loaded
        store.write_file(folder / "config.yaml", configs.written(config))
        self.bar = work.Bar(self._parts(), shown=progress)

    def begin(self) -> None:
        """Build the stage and evaluate its start."""
        folder, config = self.folder, self.config.stage
        self.bar.at("fine-tuning", _made(folder / "pairs" / "sft") / work.reviewed(self.config), before=True)
        with self.costing("start, prompts and pairs"):
            self.stage = build_stage(config, cache_dir=folder / "pairs", fast=self.fast, progress=self.bar.at)
        for part in ("fine-tuning", "pairs"):
            self.bar.at(part, 1.0, before=True)  # what was not told was there
        reward = self.stage.reward and getattr(self.stage.reward, "fingerprint", None)
        self.identity({"model": fingerprint(self.stage.start), "reward": reward})
        if self.stage.report:
            store.write_file(folder / "gaps.png", partial(plots.score_gaps(self.stage.report).savefig, dpi=110))
        self.bar.weigh(self._parts(len(self.stage.pairs)))
        self.start = self.evaluated(folder / "start", 0, self.stage.start, None)
        self.bar.at("start", 1.0)

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
        try:
            result = self.stage.evaluate(policy, train, guide=guide)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise OutOfMemory(f"{text}; {EVALUATION}") from error
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
        return row

    def train(self, run: Run) -> None:
        """Train one run, its guide first, and evaluate it on the way; an interrupted one continues where it was."""
        if run.name in self.rows:
            return
        guide = self.guide(run)
        reported, folder, train = run in self.runs, self.folder / run.folder, run.config
        updates = planned_steps(train, len(self.stage.pairs), train.batch_size * train.accumulation)
        steps = schedule(updates, self.config.evaluations) if reported else []
        evaluated = work.share_of_evaluations(self.config, train, updates) if reported else 0.0
        self.bar.name(run.name)

        def tell(step: int, *, before: bool = False) -> None:
            done = len(list(folder.glob("evaluations/*.json"))) / max(1, len(steps))
            self.bar.at(run.name, (1 - evaluated) * step / updates + evaluated * done, before=before)

        def callback(step: int, policy) -> None:
            if step in steps:
                self.evaluated(folder, step, policy, train, guide)

        tell(_made(folder), before=True)
        settings = replace(train, output_dir=str(folder))
        if train.log_every == run_settings()["log_every"].default:
            settings = replace(settings, log_every=min(train.log_every, max(1, updates // ROWS)))
        if reported:
            settings = replace(settings, eval_every=1, save_every=max(1, updates // SAVED))
        more = {"guide": guide, "tokenizer": self.stage.tokenizer, "fast": self.fast}
        more["callbacks"] = [callback] * reported
        with self.costing(run.name) as cost:
            clock = self.evaluation_s
            made = runs.train(settings, *self.stage.fresh(train), **more, on_log=lambda made: tell(made.updates))
            each = int(column(self.stage.pairs, "size").sum()) / len(self.stage.pairs)
            cost["tokens"] = each * made.updates * train.batch_size * train.accumulation
            cost["seconds"] = self.evaluation_s - clock  # not of training
        self.rows[run.name] = made.rows
        if reported and run is self.settings[run.label][0]:
            self.tokens[run.label] = self.token_map(folder / "tokens.json", made.policy)
        self.bar.at(run.name, 1.0, before=not made.updates)
        for step in steps:
            if not (path := _evaluation(folder, step)).exists():
                raise RuntimeError(f"{path} is missing, and the run has gone on since; {FIX}")

    def token_map(self, path: Path, policy) -> list[dict]:
        """What a policy did to the tokens of held-out pairs: read back if it was looked at before."""
        if not path.exists():
            store.write_json(path, {"pairs": heatmap.token_map(policy, self.stage)})
        return store.read_json(path, FIX)["pairs"]

    def guide(self, run: Run):
        """The model that guides a run, trained by now; None where it needs none."""
        if run.name not in self.guides:
            return None
        made = self.guides[run.name]
        self.train(made)
        return runs.load_guide(self.folder / made.folder, self.stage.start)

    def collect(self) -> tuple[dict, dict, dict]:
        """Return (summary, curves, samples) in the schemas of report.write_report."""
        seed, curves, samples = self.config.stage.seed, {}, {}
        for label, each in self.settings.items():
            found = [[self.start, *self._evaluations(run)] for run in each]
            points = [
                [{key: value for key, value in row.items() if key != "samples"} for row in rows] for rows in found
            ]
            curves[label] = [seeds.merged(at, seed=seed) for at in zip(*points, strict=True)]
            one = len(self.stage.held_out_prompts)  # sample of every prompt
            samples[label] = _beside(self.start["samples"][:one], found[0][-1]["samples"][:one])
        config = asdict(self.config) | {"objectives": [train.to_dict() for train in self.config.objectives]}
        config = config.pop("stage") | config | {"seeds": self.config.seeds or None, "pairs": len(self.stage.pairs)}
        config |= {"pairs_from": self.config.stage.pairs, "held_out_pairs": len(self.stage.held_out_pairs)}
        config |= {"held_out_prompts_seen": self.stage.seen_prompts}
        if self.stage.sft:
            config |= {f"sft {name}": value for name, value in self.stage.sft.items()}
        summary = {
            "objectives": {name: _metrics(curve[-1]) for name, curve in curves.items()},
            "start": _metrics(self.start),
            "config": config,
            "data": _data(self.stage),
            "seed": seed,
            "versions": runs.versions(),
            "costs": store.read_json(self.costs, FIX)["costs"],
            "wall_time_s": store.read_json(self.folder / "wall_time.json", FIX)["seconds"],
        }
        return summary, curves, samples

    def logged(self) -> Iterator[dict]:
        """Everything that was logged: training rows and evaluations of all runs."""
        for run in self.runs:
            who = {"objective": run.label} | ({"seed": run.config.seed} if len(self.config.seeds) > 1 else {})
            for row in self.rows[run.name]:
                yield who | {"kind": "train"} | row
            for row in (self.start, *self._evaluations(run)):
                yield who | {"kind": "evaluation"} | {k: v for k, v in row.items() if k not in ("samples", "by_prompt")}

    def _evaluations(self, run: Run) -> list[dict]:
        paths = sorted((self.folder / run.folder / "evaluations").glob("*.json"))
        return [store.read_json(path, FIX) for path in paths]

    def _parts(self, pairs: int | None = None) -> list[work.Part]:
        return [work.Part("start", "", *work.evaluation(self.config)), *work.parts(self.config, pairs)]

    def _recorded(self) -> dict:
        """Format and configuration, as it stands in the folder if it comes to the same: what was not said had its default."""
        path, now = self.folder / "identity.json", asdict(self.config)
        found = store.read_json(path, FIX) if path.exists() else {"format": FORMAT}
        if found.get("format") != FORMAT:
            raise RuntimeError(
                f"{self.folder} is by an older version, which evaluated after other updates and on other prompts; {OTHER}"
            )
        before = found.get("config")
        known = before and configs.recorded(before)
        same = known and configs.written(known) == configs.written(self.config)
        return {"format": FORMAT, "config": before if same else now}


def _made(folder: Path) -> int:
    """Updates of a run that are in its last checkpoint."""
    return max((int(path.name.removeprefix(store.PREFIX)) for path in folder.glob("checkpoints/step-*")), default=0)


def _evaluation(folder: Path, step: int) -> Path:
    return folder / "evaluations" / f"{step:08d}.json"


def _data(stage: Stage) -> dict:
    """What the report says of prompts and pairs: how many of how many were kept, and tokens of a prompt (least, mean, most)."""
    trained = prompts_of(stage.table, stage.tokenizer) or [""]  # pairs may have none
    texts, lengths = {"training": trained, "held-out": stage.held_out_prompts}, {}
    for name, each in texts.items():
        sizes = list(map(len, stage.tokenizer(each, add_special_tokens=False)["input_ids"]))
        lengths[name] = min(sizes), statistics.fmean(sizes), max(sizes)
    pairs, made = None, stage.report
    if made:
        left_out = ", ".join(f"{count:,} {why}" for why, count in made.dropped.items() if count)
        pairs = {"candidates": made.kept + sum(made.dropped.values()), "kept": made.kept, "left_out": left_out}
        pairs |= {"min_gap": stage.config.min_gap, "trained": len(stage.pairs)}
    return {
        "pairs": pairs,
        "prompt_tokens": lengths,
        "seen": stage.seen_prompts,
        "held_out_prompts": len(stage.held_out_prompts),
        "samples": stage.config.evaluation_samples,
    }


def _metrics(row: Mapping) -> dict:
    return {name: value for name, value in row.items() if isinstance(value, dict) and "mean" in value}


def _beside(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[dict]:
    """Continuations of the held-out prompts before and after training."""
    found = []
    for a, b in zip(before, after, strict=True):
        sample = {"prompt": a["prompt"], "before": a["text"], "after": b["text"]}
        scores = ("reward", "judge")
        sample |= {f"before_{kind}": a[kind] for kind in scores} | {f"after_{kind}": b[kind] for kind in scores}
        found.append(sample)
    return found


def run_folder(runs: str | Path, name: str) -> Path:
    """The folder of the comparison `name`; ValueError if that names no single folder below `runs`, or is the link's."""
    if name.lower() in ("", ".", "..", LATEST) or "/" in name or "\\" in name:
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

"""The comparison: every objective from one start, on one set of pairs, evaluated on one set of held-out prompts.

    python -m tpo_lib run

An interrupted comparison continues where it was: pairs are cached, every training run resumes from its checkpoint, and an
evaluation that was written down is not made again.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tpo_lib import checkpoint, report
from tpo_lib.config import TrainConfig
from tpo_lib.data import encode_pairs
from tpo_lib.evaluate import Evaluation, evaluate
from tpo_lib.models import POCKET, choose_device, fingerprint, frozen_copy, load_model, load_tokenizer
from tpo_lib.pairing import build_pairs
from tpo_lib.rewards import load_reward
from tpo_lib.sampling import sample_prompts
from tpo_lib.train import fit, planned_steps

EVALUATION_COST = 4.0  # one evaluation in units of one update, for the bar's estimate alone


@dataclass(frozen=True)
class CompareConfig:
    """One comparison.

    Attributes:
        model, reward, judge: folders or hub names; judge None means no judge.
        objectives: the training runs, in order; a tgdpo run is guided by the dpo run before it.
        train_prompts, held_out_prompts: prompts for the pairs, and for everything that is reported.
        samples_per_prompt: completions of a training prompt; all their pairs are used (4 give the papers' 6).
        held_out_samples: completions of a held-out prompt for the held-out pairs.
        max_new_tokens: longest completion.
        min_gap: smallest difference of scores in a pair.
        max_pairs, max_held_out_pairs: training and held-out pairs used (the first ones; the rest is counted as unused).
        evaluations: how often each run is evaluated, evenly spaced, the end included.
        seed: of prompts, samples, training and bootstrap.
    """

    model: str
    reward: str
    judge: str | None
    objectives: tuple[TrainConfig, ...]
    train_prompts: int
    held_out_prompts: int
    samples_per_prompt: int
    held_out_samples: int
    max_new_tokens: int
    min_gap: float
    max_pairs: int
    max_held_out_pairs: int
    evaluations: int
    seed: int = 0


def pocket_objectives(common: TrainConfig) -> tuple[TrainConfig, ...]:
    """The five objectives on the pocket model: one learning rate, one schedule, the papers' default beta of 0.1.

    TDPO2's alpha decides where it comes to rest. The paper's 0.5 holds it at a reward of about 0.74 and a KL of 4 here, so
    that there is little to compare; 0.2 lies in the range the paper sweeps (0.1 to 0.7). TGDPO's alpha is the paper's 0.5.
    SimPO's beta multiplies a mean over tokens, the others' a sum, so its value is of another scale.
    """
    return (
        replace(common, loss_type="dpo", beta=0.1),
        replace(common, loss_type="tdpo1", beta=0.1),
        replace(common, loss_type="tdpo2", beta=0.1, alpha=0.2),
        replace(common, loss_type="tgdpo", beta=0.1, alpha=0.5, guide_beta=0.1),
        replace(common, loss_type="simpo", beta=2.0, gamma=0.5),
    )


def pocket_comparison(*, quick: bool = False, seed: int = 0) -> CompareConfig:
    """The comparison of `make run` (at most ten minutes on two cores), or a small one of about a minute."""
    common = TrainConfig(
        lr=3e-4, batch_size=32, warmup_steps=5, max_length=128, epochs=1, seed=seed, log_every=2, keep=1
    )
    sizes = {
        "train_prompts": 800,
        "held_out_prompts": 160,
        "samples_per_prompt": 4,
        "held_out_samples": 4,
        "max_pairs": 1280,
        "max_held_out_pairs": 128,
        "evaluations": 5,
    }
    if quick:
        sizes |= {
            "train_prompts": 128,
            "held_out_prompts": 48,
            "max_pairs": 320,
            "max_held_out_pairs": 48,
            "evaluations": 1,
        }
    return CompareConfig(
        model=str(POCKET),
        reward=str(POCKET),
        judge=str(POCKET / "judge"),
        objectives=pocket_objectives(common),
        max_new_tokens=40,
        min_gap=0.4,
        seed=seed,
        **sizes,
    )


def run(config: CompareConfig, folder: Path, *, fresh: bool = False, progress: bool = True) -> dict:
    """Run (or continue) a comparison and write everything below `folder`.

    Writes summary.json, metrics.jsonl, frontier.png, seqkl.png, diversity.png, gaps.png, report.md and report.html, and
    points the link `latest` beside `folder` to it.

    Args:
        config: what is compared.
        folder: where; a folder that holds another comparison is refused unless `fresh`.
        fresh: throw away what the folder holds.
        progress: show one overall progress bar.

    Returns:
        The summary, as in summary.json.
    """
    with checkpoint.exclusive(folder):
        if fresh:
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        stage = _Stage(config, folder, progress)
        for train in config.objectives:
            _train_one(train, stage)
        stage.bar.close()
        summary, curves, samples = _collect(stage)
        report.write_report(folder, summary, curves, samples, training=_training_rows(stage))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _metrics_rows(stage, curves)))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        _link_latest(folder)
    return summary


class _Stage:
    """What all runs of a comparison share: models, prompts, pairs, the evaluation of the start, the bar."""

    def __init__(self, config: CompareConfig, folder: Path, progress: bool):
        self.config, self.folder = config, folder
        before = folder / "wall_time.json"  # seconds of work that was kept, over all interruptions
        self.clock = (json.loads(before.read_text()) if before.exists() else 0.0) - time.time()
        device = choose_device(config.objectives[0].device)
        self.start = load_model(config.model, device=device)
        self.tokenizer = load_tokenizer(config.model)
        self.reward = load_reward(config.reward, device=device)
        self.judge = load_reward(config.judge, device=device) if config.judge else None
        self.reference = frozen_copy(self.start)
        _check_identity(folder, config, self.start, self.reward)
        prompts = sample_prompts(
            self.start, self.tokenizer, config.train_prompts + config.held_out_prompts, seed=config.seed + 1
        )
        train, self.held_out = prompts[: config.train_prompts], prompts[config.train_prompts :]
        self.pairs, self.pair_report = self._pairs(train, config.samples_per_prompt, config.seed + 2, config.max_pairs)
        self.held_out_pairs, _ = self._pairs(
            self.held_out, config.held_out_samples, config.seed + 3, config.max_held_out_pairs
        )
        self.pair_report.figure().savefig(folder / "gaps.png", dpi=110)
        self.updates = planned_steps(config.objectives[0], len(self.pairs), config.objectives[0].batch_size)
        self.every = max(1, self.updates // config.evaluations)
        each = self.updates + EVALUATION_COST * len(range(0, self.updates, self.every))
        self.bar = tqdm(
            total=round(EVALUATION_COST + each * len(config.objectives)),
            desc="comparison",
            disable=not progress,
            unit="update",
        )
        self.cache: dict = {}
        self.start_evaluation = self.evaluated(folder / "start", 0, self.start, None)

    def _pairs(self, prompts: list[str], samples: int, seed: int, most: int):
        config = self.config
        table, pair_report = build_pairs(
            self.start,
            self.tokenizer,
            self.reward,
            prompts=prompts,
            samples_per_prompt=samples,
            max_new_tokens=config.max_new_tokens,
            min_gap=config.min_gap,
            seed=seed,
            cache_dir=self.folder / "pairs",
        )
        table = table.shuffle(seed=seed).select(range(min(most, len(table))))
        encoded, _ = encode_pairs(table, self.tokenizer, max_length=config.objectives[0].max_length, on_bad_rows="skip")
        return encoded, pair_report

    def evaluated(self, folder: Path, step: int, policy, train: TrainConfig | None, guide=None) -> dict:
        """The evaluation of `policy` at `step`: read back if it was made before, else made and written down."""
        path = folder / "evaluations" / f"{step:08d}.json"
        if path.exists():
            return json.loads(path.read_text())
        result: Evaluation = evaluate(
            policy,
            self.reference,
            self.tokenizer,
            self.held_out,
            self.reward,
            judge=self.judge,
            pairs=self.held_out_pairs,
            objective=train and train.loss_type,
            hyperparameters=train and train.hyperparameters(),
            guide=guide,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.seed + 4,
            reference_cache=self.cache,
        )
        row = {"step": step, "pairs_seen": step * train.batch_size if train else 0}
        row |= {name: metric.as_dict() for name, metric in result.metrics.items()}
        row["samples"] = [asdict(sample) for sample in result.samples]
        row["by_prompt"] = {name: [float(v) for v in values] for name, values in result.by_prompt.items()}
        _write_json(path, row)
        self.clock += time.time()
        _write_json(self.folder / "wall_time.json", self.clock)
        self.clock -= time.time()
        self.bar.update(EVALUATION_COST)
        return row


def _train_one(train: TrainConfig, stage: _Stage) -> None:
    """Train and evaluate one objective, continuing where an interrupted run left it."""
    folder = stage.folder / train.loss_type
    guide = None
    if train.loss_type == "tgdpo":
        guide = frozen_copy(load_model(stage.folder / "dpo" / "final", device=stage.start.device))
    settings = replace(train, output_dir=str(folder), eval_every=stage.every, save_every=stage.every)
    stage.bar.set_description(train.loss_type)
    seen = [0]

    def callback(step: int, policy) -> None:
        stage.bar.update(step - seen[0])
        seen[0] = step
        if step:
            stage.evaluated(folder, step, policy, train, guide)

    policy = frozen_copy(stage.start).requires_grad_(True)
    fit(
        settings,
        policy,
        stage.reference,
        stage.pairs,
        guide=guide,
        tokenizer=stage.tokenizer,
        callbacks=[callback],
        resume=True,
        progress=False,
    )


def _collect(stage: _Stage) -> tuple[dict, dict, dict]:
    """Return (summary, curves, samples) in the schemas of report.write_report."""
    start, curves, samples, final = stage.start_evaluation, {}, {}, {}
    for train in stage.config.objectives:
        rows = [start, *_evaluations(stage.folder / train.loss_type)]
        curves[train.loss_type] = [_without_samples(row) for row in rows]
        final[train.loss_type] = {name: value for name, value in rows[-1].items() if _is_metric(value)}
        samples[train.loss_type] = [
            {"prompt": a["prompt"], "before": a["text"], "after": b["text"]}
            | {f"{when}_{name}": s[name] for when, s in (("before", a), ("after", b)) for name in ("reward", "judge")}
            for a, b in zip(start["samples"], rows[-1]["samples"], strict=True)
        ]
    summary = {
        "objectives": final,
        "start": {name: value for name, value in start.items() if _is_metric(value)},
        "config": asdict(stage.config) | {"pairs": len(stage.pairs), "held_out_pairs": len(stage.held_out_pairs)},
        "seed": stage.config.seed,
        "versions": versions(),
        "wall_time_s": json.loads((stage.folder / "wall_time.json").read_text()),
    }
    return summary, curves, samples


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result, and the machine."""
    names = ("tpo-lib", "torch", "transformers", "accelerate", "datasets", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    } | found


def _check_identity(folder: Path, config: CompareConfig, model, reward) -> None:
    """Refuse to mix two comparisons in one folder."""
    identity = json.loads(
        json.dumps({"config": asdict(config), "model": fingerprint(model), "reward": reward.fingerprint})
    )
    path = folder / "identity.json"
    if path.exists() and json.loads(path.read_text()) != identity:
        raise RuntimeError(
            f"{folder} holds another comparison (settings or weights differ); pass --fresh to replace it, or another --name"
        )
    path.write_text(json.dumps(identity, indent=1))


def _write_json(path: Path, value) -> None:
    """Write a JSON file that is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


def _evaluations(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))]


def _metrics_rows(stage: _Stage, curves: dict) -> list[dict]:
    """Everything that was logged, one row a line: training rows and evaluations of all objectives."""
    rows, training = [], _training_rows(stage)
    for name, curve in curves.items():
        rows += [{"objective": name, "kind": "train"} | row for row in training[name]]
        rows += [
            {"objective": name, "kind": "evaluation"} | {k: v for k, v in row.items() if k != "by_prompt"}
            for row in curve
        ]
    return rows


def _training_rows(stage: _Stage) -> dict[str, list[dict]]:
    names = [train.loss_type for train in stage.config.objectives]
    lines = {name: (stage.folder / name / "metrics.jsonl").read_text().splitlines() for name in names}
    return {name: [json.loads(line) for line in some] for name, some in lines.items()}


def _without_samples(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "samples"}


def _is_metric(value) -> bool:
    return isinstance(value, dict) and "mean" in value


def _link_latest(folder: Path) -> None:
    link = folder.parent / "latest"
    new = folder.parent / ".latest.new"
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name, target_is_directory=True)
    new.replace(link)

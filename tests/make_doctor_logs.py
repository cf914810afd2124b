"""Make fixtures/doctor_logs.json.gz, the logs that the rules of `doctor` are tested on: python tests/make_doctor_logs.py

Healthy runs of every objective by the library's own loop; the bugs of chapter 7 by its own recipes (`tpo_course.bugs`), in a loop
that logs what their broken code reports; and runs that go wrong in other ways. Healthy ones and bugs have 30 runs each, of a
model of one layer that has sampled its own pairs (seeds, learning rates and betas differ), and 2 of the pocket model; the others
have 10. The rules were developed on the runs with an even seed; those with an odd one measure them. A row is the mean of two
updates, but for the first. It takes some ten minutes of one core; SEEDS MODEL FILE behind it make a part of it, to look at.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import tiny
import torch

from tpo_course import bugs
from tpo_lib import losses, stats, train
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, bucketed_batches, collate
from tpo_lib.models import frozen_copy
from tpo_lib.types import LossOutput

FILE = Path(__file__).parent / "fixtures" / "doctor_logs.json.gz"
SEEDS, FEW, UPDATES, BATCH, PAIRS, HELD_OUT = 30, 10, 32, 16, 512, 64
LR = (2e-3, 4e-3, 8e-3)  # of the small model
BETAS = {"simpo": (2.0, 1.0, 4.0), "sft": (0.1,)}
LEFT_OUT = (
    "rewards/margins",
    "kl/margin",
    "padding",
    "pairs_seen",
    "lr",
)  # follow from the others, or no rule reads them


@cache
def world(seed: int, model: str = "small"):
    """Start model, training pairs and held-out pairs: its own samples, the better by a credit of every token is chosen."""
    if model == "pocket":
        from tpo_lib.runs.stage import pocket_stage

        stage = pocket_stage()
        draw = torch.Generator().manual_seed(seed)
        rows = [stage.pairs[i] for i in torch.randperm(len(stage.pairs), generator=draw)[: 12 * 8 + 24].tolist()]
        lengths = torch.randint(6, 25, (len(rows), 2), generator=draw).tolist()
        cut = [
            (p.row, p.prompt_ids, p.chosen_ids[:a], p.rejected_ids[:b]) for p, (a, b) in zip(rows, lengths, strict=True)
        ]

        def credit(ids):
            return float(stage.reward.token_credit(torch.tensor(ids)).sum())

        pairs = [EncodedPair(row, prompt, *sorted(both, key=credit, reverse=True)) for row, prompt, *both in cut]
        return stage.start, pairs[:-24], pairs[-24:]
    start, draw = tiny.llama(seed), torch.Generator().manual_seed(1000 + seed)
    credit = start.get_input_embeddings().weight.detach() @ torch.randn(16, generator=draw)  # a direction it can learn
    ids = torch.randint(1, tiny.VOCAB, (PAIRS + HELD_OUT, 3), generator=draw).repeat_interleave(2, 0)  # prompts
    with torch.no_grad():
        for _ in range(24):
            said = start(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(said, 1, generator=draw)], 1)
    lengths = torch.randint(6, 25, (len(ids),), generator=draw).tolist()
    rows = [row[3 : 3 + length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    pairs = []
    for i in range(PAIRS + HELD_OUT):
        both = rows[2 * i], rows[2 * i + 1]
        gap = float(credit[both[0]].sum() - credit[both[1]].sum())
        first = float(torch.rand(1, generator=draw)) < 1 / (1 + math.exp(-2 * gap))  # annotators err
        pairs.append(EncodedPair(i, ids[2 * i, :3].tolist(), *(both if first else both[::-1])))
    return start, pairs[:PAIRS], pairs[PAIRS:]


def settings(seed: int, objective: str, model: str) -> TrainConfig:
    beta = BETAS.get(objective, (0.1, 0.05, 0.3))
    rate = 3e-4 * (1, 2)[seed % 2] if model == "pocket" else LR[(seed // 2) % 3]
    rate /= 4 if objective == "ipo" else 1  # its square pulls harder
    batch, updates = (8, 16) if model == "pocket" else (BATCH, UPDATES)
    given = {"loss_type": objective, "lr": rate, "batch_size": batch, "epochs": 9, "max_steps": updates, "seed": seed}
    given |= {"beta": beta[(seed // 6) % len(beta)]} if objective != "sft" else {}
    given |= {"guide_beta": 0.1} if objective == "tgdpo" else {}
    return TrainConfig(**given, warmup_steps=4, log_every=1, eval_every=updates // 4, device="cpu")


def healthy(config: TrainConfig, start, pairs, held_out) -> list[dict]:
    guide = None
    if config.loss_type == "tgdpo":
        first = settings(config.seed, "dpo", "pocket" if config.batch_size == 8 else "small")
        guide = frozen_copy(start).requires_grad_(True)
        train.fit(replace(first, beta=0.1, eval_every=0), guide, start, pairs, progress=False)
        guide = frozen_copy(guide)
    policy, rows = frozen_copy(start).requires_grad_(True), []
    there = train.Progress(config).accelerator
    started = {"step": 0} | train.evaluate_pairs(config, *scorer(config, policy, start, guide), held_out, there)

    def keep(row: dict) -> bool:
        rows.append(row)
        return False

    try:
        result = train.fit(config, policy, start, pairs, eval_pairs=held_out, guide=guide, on_log=keep, progress=False)
    except train.NonFiniteLoss:
        return [started, *rows]
    return [started, *result.metrics]


def scorer(config: TrainConfig, policy, start, guide):
    models = {"ref": start, "guide": guide}
    frozen = {name: train.ResponseReader(model) for name, model in models.items() if model is not None}
    return train.PairScorer(config, train.ResponseReader(policy)), frozen


def broken(config: TrainConfig, start, pairs, held_out, recipe: bugs.Recipe) -> list[dict]:
    """A plain loop around the seams of a recipe, its metrics by the library's names and from the recipe's own code."""
    torch.manual_seed(config.seed)
    policy = frozen_copy(start).requires_grad_(True)
    reference, guide = recipe.reference(policy, start), None
    if recipe.objective == "tgdpo":
        guide = guide_of(config, start, pairs)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=0.0)

    def measured(batch):
        logits = bugs.forward(policy, batch)
        with torch.no_grad():
            others = [bugs.forward(model, batch) if model is not None else None for model in (reference, guide)]
        tokens = recipe.statistics(logits, batch, *others)
        output = recipe.loss(*stats.split(tokens))
        sums = train.Sums()
        sums.add(train.batch_metrics(config, output, tokens))
        return output, sums.means(None)

    lengths, rows = [pair.length for pair in pairs], []
    order = (
        b for epoch in range(9) for b in bucketed_batches(lengths, config.batch_size, seed=config.seed, epoch=epoch)
    )
    ahead = collate(held_out)

    def held(step: int) -> None:
        with torch.no_grad():
            rows.append({"step": step} | {f"eval_{name}": value for name, value in measured(ahead)[1].items()})

    held(0)
    for step, batch in enumerate(itertools.islice(order, config.max_steps), 1):
        train.set_learning_rate(optimizer, train.learning_rate(config, step - 1, config.max_steps))
        output, means = measured(collate([pairs[i] for i in batch]))
        optimizer.zero_grad()
        output.loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip).item()
        optimizer.step()
        rows.append({"step": step, "grad_norm": norm} | means)
        if step % config.eval_every == 0:
            held(step)
    return rows


@cache
def _guides() -> dict:
    return {}


def guide_of(config: TrainConfig, start, pairs):
    """The recipes' guide, trained with their GUIDE_BETA."""
    key = config.seed, config.batch_size
    if key not in _guides():
        guide = frozen_copy(start).requires_grad_(True)
        first = replace(settings(config.seed, "dpo", "small"), lr=config.lr, batch_size=config.batch_size, eval_every=0)
        first = replace(first, beta=bugs.GUIDE_BETA, max_steps=config.max_steps)
        train.fit(first, guide, start, pairs, progress=False)
        _guides()[key] = frozen_copy(guide)
    return _guides()[key]


def outside(chosen, rejected) -> LossOutput:
    """Bug 8 in its other form: beta stands outside the sigmoid."""
    output = losses.dpo(chosen, rejected, beta=1.0)
    return replace(output, loss=bugs.BETA * output.loss)


def swapped(pairs):
    return [EncodedPair(p.row, p.prompt_ids, p.rejected_ids, p.chosen_ids) for p in pairs]


def shuffled(pairs, seed: int):
    draw = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < 0.5
    return [each if keep else swapped([each])[0] for each, keep in zip(pairs, draw.tolist(), strict=True)]


OBJECTIVES = ("sft", "dpo", "tdpo1", "tdpo2", "tgdpo", "simpo", "ipo")
WRONG = (
    "rate too high",
    "rate too low",
    "labels random",
    "labels swapped",
    "held-out labels swapped",
    "overfit",
    "floor",
)


def rows_of(kind: str, seed: int, model: str) -> tuple[TrainConfig, list[dict]]:
    start, pairs, held_out = world(seed, model)
    if kind in OBJECTIVES:
        config = settings(seed, kind, model)
        return config, healthy(config, start, pairs, held_out)
    if kind in WRONG:
        config = settings(seed, "tgdpo" if kind == "floor" else "dpo", model)
        if kind == "floor":
            config = replace(config, alpha=4.0, guide_beta=2.0)
        config = replace(config, lr=config.lr * {"rate too high": 50, "rate too low": 1e-4, "overfit": 3}.get(kind, 1))
        pairs = shuffled(pairs, seed) if kind == "labels random" else pairs[:32] if kind == "overfit" else pairs
        held_out = shuffled(held_out, seed) if kind == "labels random" else held_out
        pairs = swapped(pairs) if kind == "labels swapped" else pairs
        held_out = swapped(held_out) if "swapped" in kind else held_out
        if kind == "overfit":
            config = replace(config, epochs=32)
        return config, healthy(config, start, pairs, held_out)
    recipe = bugs.Recipe(8, loss=outside) if kind == "B outside" else bugs.RECIPES[kind]
    config = replace(settings(seed, recipe.objective, model), beta=bugs.BETA)
    if recipe.objective in ("tdpo2", "tgdpo"):
        config = replace(config, alpha=bugs.ALPHA)
    return config, broken(config, start, pairs, held_out, recipe)


def compact(config: TrainConfig, rows: list[dict], kind: str, seed: int, model: str) -> dict:
    """A run by columns: the first update, then means of two; four digits."""

    def digits(value: float) -> float | str:
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)

    logged = [row for row in rows if "loss" in row]
    groups = [logged[:1], *(logged[i : i + 2] for i in range(1, len(logged), 2))]
    found: dict = {"train": {"step": [g[-1]["step"] for g in groups if g]}, "eval": {}}
    for name in dict.fromkeys(name for row in logged for name in row):
        if name not in (*LEFT_OUT, "step"):
            both = [[row[name] for row in g if row.get(name) is not None] for g in groups if g]
            found["train"][name] = [digits(sum(v) / len(v)) if v else "nan" for v in both]
    ahead = [row for row in rows if "eval_loss" in row]
    for name in ahead[0] if ahead else ():
        if name.removeprefix("eval_") not in LEFT_OUT:
            found["eval"][name] = [row["step"] if name == "step" else digits(row[name]) for row in ahead]
    told = {"loss_type": config.loss_type, "lr": config.lr, **config.hyperparameters()}
    return {"kind": kind, "seed": seed, "model": model, "settings": told} | found


def main() -> None:
    torch.set_num_threads(1)
    kinds, others = (*OBJECTIVES, *bugs.CASES), ("unknown", "B outside", *WRONG)
    plan = [(kind, seed, "small") for seed in range(SEEDS) for kind in kinds]
    plan += [(kind, seed, "small") for seed in range(FEW) for kind in others]
    plan += [(kind, seed, "pocket") for seed in range(2) for kind in kinds]
    if sys.argv[1:]:  # SEEDS MODEL FILE: a few of them, to look at
        plan = [each for each in plan if each[1] < int(sys.argv[1]) and each[2] == sys.argv[2]]
    runs = []
    for kind, seed, model in plan:
        runs.append(compact(*rows_of(kind, seed, model), kind, seed, model))
        print(kind, seed, model, [runs[-1]["train"]["loss"][i] for i in (0, -1)], file=sys.stderr)
    content = json.dumps({"runs": runs}, separators=(",", ":")).encode()
    path = Path(sys.argv[3]) if sys.argv[1:] else FILE
    path.write_bytes(gzip.compress(content, 9, mtime=0))
    print(f"{len(runs)} runs, {len(content):,} bytes, {path.stat().st_size:,} compressed")


if __name__ == "__main__":
    main()

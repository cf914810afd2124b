"""Part 3 of `make gpu`: the controlled-sentiment experiment of the papers on a real small Llama.

    reviews --SFT--> start --samples, scored by the additive reward--> pairs --every objective, two seeds--> frontier

Start: a folder of weights (SmolLM2-135M is meant), or the bundled pocket model where none is given. Reviews: a folder with
train.parquet and test.parquet (columns text, label); without it there is no SFT, and the pocket model writes the prompts.
No text of a review is kept in what is yielded: prompts are beginnings of reviews, so samples stand without them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu_device import autocast, synchronise
from benchmarks.gpu_numerics import error, objective_of, row
from tpo_course import ladder
from tpo_lib import losses
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate, encode_pairs
from tpo_lib.evaluation import evaluate
from tpo_lib.fast import fused
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.pairing import build_pairs
from tpo_lib.rewards import load_reward
from tpo_lib.runs.compare import pocket_objectives
from tpo_lib.runs.prompts import imdb_prompts, sample_prompts
from tpo_lib.runs.run import fit, shared_prompts
from tpo_lib.runs.stage import Stage, StageConfig
from tpo_lib.types import Reading


@dataclass(frozen=True)
class Size:
    """How much of everything; the papers take 25,000 prompts and gpt2-large.

    Attributes:
        reviews, review_tokens: for SFT; a review is cut there.
        prompts, held_out: prompts for pairs, and for everything reported.
        new_tokens: longest completion.
        pairs, held_out_pairs: at most.
        batch: pairs of an update, and reviews of one of SFT.
        updates: of every run, at most; fewer where the time would not do for all runs.
        evaluations: of every run, evenly spaced.
        seeds: each a replication of the whole recipe.
        lr, sft_lr: peak learning rates.
    """

    reviews: int = 6_000
    review_tokens: int = 96
    prompts: int = 2_000
    held_out: int = 256
    new_tokens: int = 48
    pairs: int = 12_800
    held_out_pairs: int = 256
    batch: int = 64
    updates: int = 200
    evaluations: int = 3
    seeds: tuple[int, ...] = (0, 1)
    lr: float = 7e-5
    sft_lr: float = 1e-4
    sampled_together: int = 2048


SMALL = Size(reviews=16, review_tokens=24, prompts=12, held_out=6, new_tokens=8, pairs=32, held_out_pairs=4, batch=8,
             updates=2, evaluations=1, seeds=(0,), sampled_together=64)  # fmt: skip
SAMPLES = 4  # completions of the first held-out prompts that are kept


def run(
    *,
    device: str,
    small: bool,
    left: Callable[[], float],
    model: str | None = None,
    imdb: str | None = None,
    seeds: Sequence[int] | None = None,
) -> Iterator[dict]:
    """Rows of every seed: sft, pairs, start, plan, one of every run, agreement; stops where no time is left."""
    size = SMALL if small else Size()
    seeds = seeds or size.seeds
    plan = None
    for number, seed in enumerate(seeds):
        later = left() * (len(seeds) - number - 1) / (len(seeds) - number)
        for found in replication(size, seed, device, lambda later=later: left() - later, model, imdb, plan):
            yield found | {"seed": seed}
            plan = found if found["kind"] == "plan" else plan  # later seeds make as many updates as the first


def replication(
    size: Size,
    seed: int,
    device: str,
    left: Callable[[], float],
    model: str | None,
    imdb: str | None,
    plan: dict | None = None,
) -> Iterator[dict]:
    """The whole recipe once: the seed orders the reviews, samples prompts and completions, and orders the pairs."""
    clock = time.perf_counter()
    start, tokenizer = load_model(model or POCKET, device=device), load_tokenizer(model or POCKET)
    texts = read_reviews(imdb) if imdb else None
    if texts:
        yield sft(start, tokenizer, texts, size, seed, device)
    stage = build(start, tokenizer, texts, size, seed, "SmolLM2-135M" if model else "pocket")
    yield {"kind": "pairs", "seconds": time.perf_counter() - clock, "report": str(stage.report),
           "pairs": len(stage.pairs), "held_out_pairs": len(stage.held_out_pairs), "seen_prompts": stage.seen_prompts,
           "size": dict(vars(size)), "model": stage.config.model, "reviews": bool(texts),
           "score_mean": stage.report.score_mean, "score_std": stage.report.score_std}  # fmt: skip
    common = TrainConfig(lr=size.lr, batch_size=size.batch, warmup_steps=5, max_length=128, log_every=5, device=device)
    common = replace(common, seed=seed)
    clock = time.perf_counter()
    before = evaluation(stage, stage.start, 0, None)
    yield {"kind": "start"} | before
    plan = plan or planned(stage, size, common, time.perf_counter() - clock, left)
    yield {"kind": "plan"} | plan
    guide = None
    for config in objectives(replace(common, max_steps=plan["updates"])):
        if left() <= 0:
            return
        made, policy = one_run(stage, config, plan["every"], guide)
        if config.loss_type == "dpo":
            guide = frozen_copy(policy)
        yield made
    if left() > 0:
        yield {"kind": "agreement", "rows": list(agreement(stage, device))}


def objectives(common: TrainConfig) -> tuple[TrainConfig, ...]:
    """Every objective of pairs, TDPO2 with its paper's alpha of 0.5."""
    return tuple(replace(c, alpha=0.5) if c.loss_type == "tdpo2" else c for c in pocket_objectives(common))


def read_reviews(folder: str) -> dict[str, list[str]]:
    """{"train": texts, "test": texts}, line breaks as spaces."""
    import pandas

    tables = {
        name: pandas.read_parquet(Path(folder) / f"{name}.parquet", columns=["text"]) for name in ("train", "test")
    }
    return {name: [" ".join(t.replace("<br />", " ").split()) for t in table["text"]] for name, table in tables.items()}


# ---- supervised fine-tuning


def review_rows(texts: list[str], tokenizer, most: int) -> list[EncodedPair]:
    """A review's first token as the prompt, the rest as the response; EOS where it was not cut."""
    encoded = tokenizer([t[: 12 * most] for t in texts], add_special_tokens=False)["input_ids"]
    rows = []
    for ids in encoded:
        whole = [*ids, tokenizer.eos_token_id][:most]
        if len(whole) > 2:
            rows.append(EncodedPair(len(rows), whole[:1], whole[1:]))
    return rows


def sft(model, tokenizer, texts: dict[str, list[str]], size: Size, seed: int, device: str) -> dict:
    """One epoch on reviews, in place; perplexity of held-out reviews before and after."""
    rows = review_rows(texts["train"][: size.reviews], tokenizer, size.review_tokens)
    held_out = review_rows(texts["test"][-min(500, size.reviews) :], tokenizer, size.review_tokens)
    before, clock = perplexity(model, held_out), time.perf_counter()
    config = TrainConfig(loss_type="sft", lr=size.sft_lr, batch_size=size.batch if len(rows) >= size.batch else 4,
                         warmup_steps=10, max_length=size.review_tokens, log_every=10, seed=seed, device=device)  # fmt: skip
    result = fit(config, model, None, rows, progress=False)
    synchronise(device)
    seconds = time.perf_counter() - clock
    model.requires_grad_(False).zero_grad(set_to_none=True)
    return {"kind": "sft", "reviews": len(rows), "tokens": sum(r.length for r in rows), "updates": result.steps,
            "seconds": seconds, "perplexity_before": before, "perplexity_after": perplexity(model, held_out)}  # fmt: skip


@torch.no_grad()
def perplexity(model, rows: list[EncodedPair]) -> float:
    """exp of the mean negative log-probability of a token."""
    reader, total, count = ResponseReader(model), 0.0, 0
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64], 0).to(model.device)
        read = reader(batch)
        tokens = ladder.token_stats(read, batch.labels, None)
        total, count = total + tokens.logps.double().sum().item(), count + int(tokens.mask.sum())
    return float(torch.tensor(-total / count).exp())


# ---- prompts and pairs


def build(start, tokenizer, texts: dict[str, list[str]] | None, size: Size, seed: int, name: str) -> Stage:
    """Prompts, completions, scores and pairs, as a stage that every run shares."""
    start, device = frozen_copy(start), start.device
    count = size.prompts + size.held_out
    if texts:
        prompts = imdb_prompts(texts["test"], tokenizer, count, seed=1)
    else:
        pocket = load_model(POCKET, device=device)
        prompts = sample_prompts(pocket, load_tokenizer(POCKET), count, seed=1)
    train, held_out = prompts[: size.prompts], prompts[size.prompts :]
    reward, judge = load_reward(POCKET), load_reward(POCKET / "judge", device=device)

    def make(prompts: list[str], seed: int, most: int):
        table, report = build_pairs(
            start, tokenizer, reward, prompts=prompts, max_new_tokens=size.new_tokens, min_gap=0.2 if most > 64 else 0.0,
            seed=seed, cache_dir=None, batch_size=size.sampled_together,
        )  # fmt: skip
        table = table.shuffle(seed=seed).select(range(min(most, len(table))))
        return table, encode_pairs(table, tokenizer, max_length=128, on_bad_rows="skip")[0], report

    table, pairs, report = make(train, 10 * seed + 2, size.pairs)
    _, held_out_pairs, _ = make(held_out, 10 * seed + 3, size.held_out_pairs)
    config = StageConfig(
        model=name, reward="pocket", judge="pocket judge", train_prompts=size.prompts, held_out_prompts=size.held_out,
        samples_per_prompt=4, held_out_samples=4, max_new_tokens=size.new_tokens, min_gap=0.2, max_pairs=size.pairs,
        max_held_out_pairs=size.held_out_pairs, max_length=128,
    )  # fmt: skip
    seen = len(shared_prompts(train, held_out))
    return Stage(config, start, tokenizer, reward, judge, table, pairs, held_out_pairs, held_out, report, seen)


def agreement(stage: Stage, device: str) -> Iterator[dict]:
    """On the real weights and real pairs: loss and gradient of ours against all logits at once, in the same type."""
    batch = collate(stage.pairs[:8], 0).to(torch.device(device))
    policy = stage.policy()
    reader, ref = ResponseReader(policy), ResponseReader(stage.start)

    def measured(objective: str, precision: str, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy.zero_grad(set_to_none=True)
        with autocast(device, precision):
            with torch.no_grad():
                said = ref(batch)
                said = replace(said, states=said.states + 0.01 * said.states.std())  # else every KL is 0
            read = reader(batch)
            if whole:
                read, said = Reading(read.logits(), None), Reading(said.logits(), None)
            loss = fused.pair_loss(objective_of(objective), read, batch.labels, said, guide=said,
                                   with_kl="kl" in losses.OBJECTIVES[objective].needs)[0].loss  # fmt: skip
        loss.mean().backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    for precision in ("float32", "bf16"):
        for objective in losses.OBJECTIVES:
            found, expected = (measured(objective, precision, whole) for whole in (False, True))
            for what, a, b in zip(("loss", "gradient"), found, expected, strict=True):
                tolerance = {"float32": 1e-4, "bf16": 3e-2}[precision]
                yield row(
                    f"{objective}: {what}", f"{stage.config.model}, 8 real pairs", precision, error(a, b), tolerance
                )


# ---- runs


def evaluation(stage: Stage, policy, step: int, config: TrainConfig | None, guide=None) -> dict:
    """One point of a curve: metrics with intervals, and a few completions without their prompts."""
    clock = time.perf_counter()
    found = evaluate(
        policy,
        stage.start,
        stage.tokenizer,
        stage.held_out_prompts,
        stage.reward,
        judge=stage.judge,
        pairs=stage.held_out_pairs,
        objective=config and config.loss_type,
        hyperparameters=config and config.hyperparameters(),
        guide=guide,
        max_new_tokens=stage.config.max_new_tokens,
        sampled_together=1024,
        seed=4,
        reference_cache=stage.reference_cache,
    )
    point = {"step": step, "pairs_seen": step * config.batch_size if config else 0}
    point |= {name: metric.as_dict() for name, metric in found.metrics.items()}
    point["samples"] = [{"text": s.text, "reward": s.reward, "judge": s.judge} for s in found.samples[:SAMPLES]]
    return point | {"seconds": time.perf_counter() - clock}


def planned(stage: Stage, size: Size, common: TrainConfig, evaluation_s: float, left: Callable[[], float]) -> dict:
    """As many updates as the time allows for all runs, from the time of a few of DPO; the same number for every run."""
    times: list[float] = []

    def callback(step: int, policy) -> None:
        synchronise(common.device)
        times.append(time.perf_counter())

    few = max(1, min(6, len(stage.pairs) // common.batch_size))
    probe = replace(common, loss_type="dpo", max_steps=few, log_every=few, eval_every=1, warmup_steps=1)
    fit(probe, stage.policy(), stage.start, stage.pairs, progress=False, callbacks=[callback])
    gaps = sorted(b - a for a, b in itertools.pairwise(times[1:])) or [1.0]
    update_s, runs = gaps[len(gaps) // 2], len(objectives(common))
    room = (left() / runs - size.evaluations * evaluation_s) / (1.1 * update_s)
    every = max(1, int(min(size.updates, len(stage.pairs) // common.batch_size, room) / size.evaluations))
    return {"updates": every * size.evaluations, "every": every, "update_s": update_s, "evaluation_s": evaluation_s}


def one_run(stage: Stage, config: TrainConfig, every: int, guide) -> tuple[dict, torch.nn.Module]:
    """Train and evaluate one objective with one seed."""
    points, spent = [], [0.0]
    guide = guide if "guide_logps" in losses.OBJECTIVES[config.loss_type].needs else None

    def callback(step: int, policy) -> None:
        if step:
            points.append(evaluation(stage, policy, step, config, guide))
            spent[0] += points[-1]["seconds"]

    clock = time.perf_counter()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = fit(
        replace(config, eval_every=every), stage.policy(), stage.start, stage.pairs, guide=guide, callbacks=[callback],
        progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - clock - spent[0]
    kept = ("step", "loss", "rewards/margins", "rewards/accuracies", "padding", "grad_norm")
    return {
        "kind": "run",
        "objective": config.loss_type,
        "seed": config.seed,
        "hyperparameters": config.hyperparameters(),
        "points": points,
        "training": [{k: r[k] for k in kept if k in r} for r in result.metrics],
        "training_s": seconds,
        "updates": result.steps,
        "pairs_a_second": result.steps * config.batch_size / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }, result.policy

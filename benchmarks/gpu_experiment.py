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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import contestants, measure
from benchmarks.cases import Case, Shape
from benchmarks.gpu_numerics import row
from tpo_lib.config import TrainConfig
from tpo_lib.data import collate
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs import runs
from tpo_lib.runs.presets import objectives as objectives_of
from tpo_lib.runs.prompts import imdb_prompts, sample_prompts
from tpo_lib.runs.sft import SftConfig, fine_tune
from tpo_lib.runs.stage import Stage, StageConfig, build_stage


@dataclass(frozen=True)
class Size:
    """How much of everything; the papers take 25,000 prompts and gpt2-large."""

    reviews: int = 6_000  # for SFT
    review_tokens: int = 96  # a review is cut there
    prompts: int = 2_000  # for pairs
    held_out: int = 256  # prompts for everything reported
    new_tokens: int = 48  # longest completion
    pairs: int = 12_800  # at most
    held_out_pairs: int = 256  # at most
    min_gap: float = 0.2  # smallest difference of scores in a pair
    batch: int = 64  # pairs of an update, and reviews of one of SFT
    updates: int = 200  # of every run, at most; fewer where the time would not do for all runs
    evaluations: int = 3  # of every run, evenly spaced
    seeds: tuple[int, ...] = (0, 1)  # each a replication of the whole recipe
    lr: float = 7e-5  # peak
    sft_lr: float = 1e-4  # peak
    sampled_together: int = 2048  # completions


SMALL = Size(reviews=16, review_tokens=24, prompts=12, held_out=6, new_tokens=8, pairs=32, held_out_pairs=4, min_gap=0.0,
             batch=8, updates=2, evaluations=1, seeds=(0,), sampled_together=64)  # fmt: skip
SAMPLES = 4  # completions of the first held-out prompts that are kept
LENGTH = 128  # longest prompt and response together


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
    """The whole recipe once: the seed orders the reviews, samples completions, and orders the pairs."""
    clock = time.perf_counter()
    start, tokenizer = load_model(model or POCKET, device=device), load_tokenizer(model or POCKET)
    texts = read_reviews(imdb) if imdb else None
    if texts:
        yield sft(start, tokenizer, texts, size, seed, device)
    stage = make_stage(size, str(model or POCKET), start, texts, seed, device)
    name = "SmolLM2-135M" if model else "pocket"
    yield {"kind": "pairs", "seconds": time.perf_counter() - clock, "report": str(stage.report),
           "pairs": len(stage.pairs), "held_out_pairs": len(stage.held_out_pairs), "seen_prompts": stage.seen_prompts,
           "size": asdict(size), "model": name, "reviews": bool(texts),
           "score_mean": stage.report.score_mean, "score_std": stage.report.score_std}  # fmt: skip
    common = TrainConfig(lr=size.lr, batch_size=size.batch, warmup_steps=5, max_length=LENGTH, log_every=5,
                         seed=seed, device=device)  # fmt: skip
    before = evaluation(stage, stage.start, 0, None)
    yield {"kind": "start"} | before
    plan = plan or planned(stage, size, common, before["seconds"], left)
    yield {"kind": "plan"} | plan
    guide = None
    for config in objectives(replace(common, max_steps=plan["updates"], eval_every=plan["every"])):
        if left() <= 0:
            return
        made, policy = one_run(stage, config, guide)
        guide = frozen_copy(policy) if config.loss_type == "dpo" else guide
        yield made
    if left() > 0:
        yield {"kind": "agreement", "rows": list(agreement(stage, guide, f"{name}, 8 real pairs"))}


def objectives(common: TrainConfig) -> tuple[TrainConfig, ...]:
    """Every objective of pairs, TDPO2 with its paper's alpha of 0.5."""
    return objectives_of(common, {"tdpo2": {"alpha": 0.5}})


def read_reviews(folder: str) -> dict[str, list[str]]:
    """{"train": texts, "test": texts}, line breaks as spaces."""
    import pandas

    def texts(path: Path) -> list[str]:
        return [" ".join(t.replace("<br />", " ").split()) for t in pandas.read_parquet(path, columns=["text"])["text"]]

    return {name: texts(Path(folder) / f"{name}.parquet") for name in ("train", "test")}


def sft(model, tokenizer, texts: dict[str, list[str]], size: Size, seed: int, device: str) -> dict:
    """One epoch on reviews, in place; perplexity of held-out reviews before and after."""
    clock, batch = time.perf_counter(), min(size.batch, size.reviews // 4)
    config = SftConfig(reviews=size.reviews, tokens=size.review_tokens, lr=size.sft_lr, batch_size=batch)
    said = fine_tune(model, tokenizer, config, {k: {"text": v} for k, v in texts.items()}, seed=seed, folder=None)
    measure.synchronise(device)
    return {"kind": "sft", "seconds": time.perf_counter() - clock} | said


# ---- prompts, pairs, runs


def make_stage(size: Size, folder: str, start, texts: dict[str, list[str]] | None, seed: int, device: str) -> Stage:
    """What every run shares; replications share the prompts, and every tenth seed is one's own for all the rest."""
    if texts:
        draw = partial(imdb_prompts, texts["test"], load_tokenizer(folder))
    else:
        draw = partial(sample_prompts, load_model(POCKET, device=device), load_tokenizer(POCKET))
    more = draw(2 * size.held_out, seed=2)  # for those of the first that begin or continue a training prompt
    prompts = list(dict.fromkeys([*draw(size.prompts + size.held_out, seed=1), *more]))
    config = StageConfig(
        model=folder, reward=str(POCKET), judge=str(POCKET / "judge"), train_prompts=size.prompts,
        held_out_prompts=size.held_out, samples_per_prompt=4, held_out_samples=4, max_new_tokens=size.new_tokens,
        min_gap=size.min_gap, max_pairs=size.pairs, max_held_out_pairs=size.held_out_pairs, max_length=LENGTH,
        seed=10 * seed, device=device, sampled_together=size.sampled_together,
    )  # fmt: skip
    return build_stage(config, cache_dir=None, start=start, prompts=prompts)


def evaluation(stage: Stage, policy, step: int, config: TrainConfig | None, guide=None) -> dict:
    """One point of a curve: metrics with intervals, and a few completions without their prompts."""
    clock = time.perf_counter()
    found = stage.evaluate(policy, config, guide=guide).record(SAMPLES)
    samples = [{name: s[name] for name in ("text", "reward", "judge")} for s in found["samples"]]
    point = {"step": step, "pairs_seen": step * config.batch_size if config else 0} | found["metrics"]
    return point | {"samples": samples, "seconds": time.perf_counter() - clock}


def planned(stage: Stage, size: Size, common: TrainConfig, evaluation_s: float, left: Callable[[], float]) -> dict:
    """As many updates as the time allows for all runs, from the time of a few of DPO; the same number for every run."""
    times: list[float] = []

    def callback(step: int, policy) -> None:
        measure.synchronise(common.device)
        times.append(time.perf_counter())

    most = len(stage.pairs) // common.batch_size
    few = max(1, min(6, most))
    probe = replace(common, loss_type="dpo", max_steps=few, log_every=few, eval_every=1, warmup_steps=1)
    runs.train(probe, stage.policy(), stage.start, stage.pairs, callbacks=[callback])
    gaps = sorted(b - a for a, b in itertools.pairwise(times[1:])) or [1.0]
    update_s = gaps[len(gaps) // 2]
    room = (left() / len(objectives(common)) - size.evaluations * evaluation_s) / (1.1 * update_s)
    every = max(1, int(min(size.updates, most, room) / size.evaluations))
    return {"updates": every * size.evaluations, "every": every, "update_s": update_s, "evaluation_s": evaluation_s}


def one_run(stage: Stage, config: TrainConfig, guide) -> tuple[dict, torch.nn.Module]:
    """Train and evaluate one objective with one seed."""
    points = []
    guide = guide if "guide_logps" in OBJECTIVES[config.loss_type].needs else None

    def callback(step: int, policy) -> None:
        if step:
            points.append(evaluation(stage, policy, step, config, guide))

    clock, cuda = time.perf_counter(), torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    made = runs.train(config, stage.policy(), stage.start, stage.pairs, guide=guide, callbacks=[callback])
    seconds = time.perf_counter() - clock - sum(point["seconds"] for point in points)
    kept = ("step", "loss", "rewards/margins", "rewards/accuracies", "padding", "grad_norm")
    return {
        "kind": "run",
        "objective": config.loss_type,
        "hyperparameters": config.hyperparameters(),
        "points": points,
        "training": [{k: r[k] for k in kept if k in r} for r in made.rows],
        "training_s": seconds,
        "updates": made.updates,
        "pairs_a_second": made.updates * config.batch_size / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }, made.policy


def agreement(stage: Stage, trained, where: str) -> Iterator[dict]:
    """On trained weights and real pairs: loss and gradient of ours against all logits at once, in the same type."""
    batch = collate(stage.pairs[:8], 0).to(trained.device)
    models = {"policy": frozen_copy(trained).requires_grad_(True), "ref": stage.start, "guide": trained}
    shape = Shape(models["policy"].config.vocab_size, len(stage.pairs[:8]), device=trained.device.type)
    case = Case(shape, {name: ResponseReader(model) for name, model in models.items()}, batch)
    for precision, objective in itertools.product(("float32", "bf16"), OBJECTIVES):
        entries = {way: partial(getattr(contestants, way), objective) for way in ("textbook", "ours")}
        said = measure.check_agreement(entries, case, precision, catch=measure.Disagreement)["ours"]
        for what in ("loss", "gradient"):
            yield row(f"{objective}: {what}", where, precision, said[what], {"float32": 1e-4, "bf16": 3e-2}[precision])

"""What the runs of a comparison share: start, reward, judge, pairs and held-out prompts.

stage = pocket_stage()
policy = stage.policy()
fit(config, policy, stage.start, stage.pairs)
stage.evaluate(policy, config).metrics["reward"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, encode_pairs
from tpo_lib.evaluation import Evaluation
from tpo_lib.fast.evaluation import evaluate
from tpo_lib.files import store
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.models import choose_device, frozen_copy
from tpo_lib.pairing import PairReport, build_pairs
from tpo_lib.rewards import load_reward
from tpo_lib.runs.prompts import sample_prompts
from tpo_lib.runs.run import shared_prompts


@dataclass(frozen=True)
class StageConfig:
    """What a stage is built from."""

    model: str  # folders or hub names
    reward: str
    judge: str | None
    train_prompts: int  # for the pairs
    held_out_prompts: int  # for everything that is reported
    samples_per_prompt: int  # all their pairs are used (4 give the papers' 6)
    held_out_samples: int
    max_new_tokens: int
    min_gap: float  # smallest difference of scores in a pair
    max_pairs: int
    max_held_out_pairs: int
    max_length: int = 128  # prompt and response together, tokens
    seed: int = 0  # of prompts, samples and bootstrap
    device: str | None = None  # as in models.choose_device


@dataclass(frozen=True)
class Stage:
    """A configuration carried out."""

    config: StageConfig
    start: torch.nn.Module  # every run starts from it, frozen: it is the reference too
    tokenizer: object
    reward: Callable
    judge: Callable | None
    table: Dataset  # the training pairs as text, with scores (columns as in `pairing.pairs_from_scores`)
    pairs: list[EncodedPair]
    held_out_pairs: list[EncodedPair]
    held_out_prompts: list[str]
    report: PairReport  # how the training pairs came about
    seen_prompts: int  # held-out prompts that begin or continue a training prompt (none is equal to one)
    reference_cache: dict = field(default_factory=dict, repr=False)  # filled by the first evaluation

    def policy(self) -> torch.nn.Module:
        """A copy of the start that can be trained."""
        return frozen_copy(self.start).requires_grad_(True)

    def fresh(self) -> tuple:
        """A new policy, its reference and the pairs: what `runs.train` begins with."""
        return self.policy(), self.start, self.pairs

    def evaluate(self, policy, config: TrainConfig | None = None, *, guide=None) -> Evaluation:
        """`evaluation.evaluate` of a policy, trained as `config` says if at all, on the held-out prompts and pairs."""
        return evaluate(
            policy,
            self.start,
            self.tokenizer,
            self.held_out_prompts,
            self.reward,
            judge=self.judge,
            pairs=self.held_out_pairs,
            objective=config and config.loss_type,
            hyperparameters=config and config.hyperparameters(),
            guide=guide,
            max_new_tokens=self.config.max_new_tokens,
            seed=self.config.seed + 4,
            reference_cache=self.reference_cache,
        )


def build_stage(
    config: StageConfig,
    *,
    cache_dir: Path | None,
    start: torch.nn.Module | None = None,
    prompts: list[str] | None = None,
    sampled_together: int = 256,
) -> Stage:
    """Load the models, sample prompts and build the pairs (read from `cache_dir` if they were built before).

    Args:
        start: the model, where it is not the one that config.model names; its tokenizer is.
        prompts: train_prompts + held_out_prompts of them; None samples them from the start.
        sampled_together: completions at a time; they depend on it.
    """
    device = choose_device(config.device)
    start = frozen_copy(start or load_model(config.model, device=device))
    tokenizer = load_tokenizer(config.model)
    reward = load_reward(config.reward, device=device)
    judge = load_reward(config.judge, device=device) if config.judge else None
    count = config.train_prompts + config.held_out_prompts
    prompts = prompts or sample_prompts(start, tokenizer, count, seed=config.seed + 1)

    def make(prompts: list[str], samples: int, seed: int, most: int) -> tuple[Dataset, list[EncodedPair], PairReport]:
        settings = {"max_new_tokens": config.max_new_tokens, "min_gap": config.min_gap, "cache_dir": cache_dir}
        settings |= {"prompts": prompts, "samples_per_prompt": samples, "seed": seed, "batch_size": sampled_together}
        table, report = build_pairs(start, tokenizer, reward, **settings)
        table = table.shuffle(seed=seed).select(range(min(most, len(table))))
        encoded, _ = encode_pairs(table, tokenizer, max_length=config.max_length, on_bad_rows="skip")
        return table, encoded, report

    train, held_out = prompts[: config.train_prompts], prompts[config.train_prompts :]
    table, pairs, report = make(train, config.samples_per_prompt, config.seed + 2, config.max_pairs)
    _, held_out_pairs, _ = make(held_out, config.held_out_samples, config.seed + 3, config.max_held_out_pairs)
    seen = len(shared_prompts(train, held_out))
    return Stage(config, start, tokenizer, reward, judge, table, pairs, held_out_pairs, held_out, report, seen)


def pocket_stage_config(*, quick: bool = False, seed: int = 0) -> StageConfig:
    """The stage of `make run`, or (quick) the small one of `make run --quick` and of the notebooks."""
    small = {"train_prompts": 128, "held_out_prompts": 48, "max_pairs": 320, "max_held_out_pairs": 48}
    whole = {"train_prompts": 800, "held_out_prompts": 160, "max_pairs": 1280, "max_held_out_pairs": 128}
    models = {"model": str(POCKET), "reward": str(POCKET), "judge": str(POCKET / "judge")}
    sampled = {"samples_per_prompt": 4, "held_out_samples": 4, "max_new_tokens": 40, "min_gap": 0.4}
    return StageConfig(**models, **sampled, seed=seed, **(small if quick else whole))


def pocket_stage(**changes) -> Stage:
    """The small stage on the bundled model, about half a minute on two cores, with `changes` such as min_gap=0.0.

    Its pairs are kept in `store.cache_folder()`.
    """
    return build_stage(replace(pocket_stage_config(quick=True), **changes), cache_dir=store.cache_folder() / "pairs")

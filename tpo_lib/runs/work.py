"""The work of a comparison, part by part, and the bar that shows how much of it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tqdm.auto import tqdm

from tpo_lib.config import TrainConfig
from tpo_lib.runs.settings import CompareConfig, schedule

PROMPT = 6  # tokens of a prompt, on average
SAMPLED = 0.3  # time of a sampled sequence in pairs that are trained on, for the bar alone: a plan measures both


class Part(NamedTuple):
    """A part of a comparison, in sequences that are sampled and pairs that are trained on (or as many tokens read)."""

    name: str
    words: str
    sampled: float
    trained: float

    @property
    def weight(self) -> float:
        """What it is to the bar."""
        return SAMPLED * self.sampled + self.trained


def parts(config: CompareConfig, pairs: int | None = None) -> list[Part]:
    """All that a comparison does, in order; `pairs` for training, where it is known by now how many there are."""
    stage, found = config.stage, []
    pair = 2 * (PROMPT + stage.max_new_tokens)  # tokens
    if stage.sft:
        tokens = stage.sft.reviews * stage.sft.tokens * stage.sft.epochs
        found.append(
            Part("fine-tuning", f"{stage.sft.reviews:,} reviews of {stage.sft.tokens} tokens", 0, tokens / pair)
        )
    pairs, sampled = pairs or most_pairs(config), sequences(config)
    drawn = f"{sampled[0]:,} + {sampled[1]:,} completions -> at most {pairs:,} pairs"
    found.append(Part("pairs", f"at most {pairs:,} of {stage.pairs}" if stage.pairs else drawn, sum(sampled), 0))
    runs, guides = config.runs(), config.guides()
    made = {run.name: run for run in guides.values() if run.name not in [each.name for each in runs]}
    for run in [*made.values(), *runs]:
        updates = planned(run.config, pairs)
        evaluations = 0 if run.name in made else len(schedule(updates, config.evaluations))
        per_update = run.config.batch_size * run.config.accumulation
        words = f"{updates:,} updates of {per_update} pairs" + (f", {evaluations} evaluations" if evaluations else "")
        sampled, read = evaluation(config)
        found.append(Part(run.name, words, evaluations * sampled, updates * per_update + evaluations * read))
    return found


def evaluation(config: CompareConfig) -> tuple[float, float]:
    """One evaluation, in sequences sampled and pairs trained on: held-out pairs are read, and nothing is learnt from them."""
    stage = config.stage
    sampled = stage.held_out_prompts * stage.evaluation_samples
    return sampled, stage.max_held_out_pairs * stage.max_new_tokens / (PROMPT + stage.max_new_tokens)


def share_of_evaluations(config: CompareConfig, train: TrainConfig, updates: int) -> float:
    """Of a run's work."""
    evaluated = len(schedule(updates, config.evaluations)) * Part("", "", *evaluation(config)).weight
    return evaluated / (evaluated + updates * train.batch_size * train.accumulation)


def reviewed(config: CompareConfig) -> int:
    """Updates of the fine-tuning, at least one."""
    sft = config.stage.sft
    return max(1, sft.epochs * (sft.reviews // sft.batch_size)) if sft else 1


def sequences(config: CompareConfig) -> tuple[int, int]:
    """Completions that are sampled for the pairs: to be trained on, and held out."""
    stage = config.stage
    if stage.pairs:
        return 0, 0
    return stage.train_prompts * stage.samples_per_prompt, stage.held_out_prompts * stage.held_out_samples


def most_pairs(config: CompareConfig) -> int:
    """Pairs for training, at most, before they are there."""
    stage = config.stage
    each = stage.samples_per_prompt * (stage.samples_per_prompt - 1) // 2
    return min(stage.max_pairs, stage.max_pairs if stage.pairs else each * stage.train_prompts)


def planned(config: TrainConfig, pairs: int) -> int:
    """Updates of a run on so many pairs, at least one."""
    updates = max(1, config.epochs * (pairs // (config.batch_size * config.accumulation)))
    return min(updates, config.max_steps or updates)


class Bar:
    """One bar for all parts, by their weights; what an earlier process did counts as done, and says nothing of the speed."""

    def __init__(self, parts: Sequence[Part], *, shown: bool) -> None:
        self.weights, self.done = {}, {}
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go"
        self.shown = tqdm(total=1, desc="comparison", smoothing=0, bar_format=form, disable=not shown)
        self.weigh(parts)

    def weigh(self, parts: Sequence[Part]) -> None:
        """Take the weights of the parts that are not over, by what is known now."""
        self.weights = {part.name: self.done.get(part.name) or part.weight for part in parts}
        self.shown.total = sum(self.weights.values())

    def name(self, words: str) -> None:
        """What is going on."""
        self.shown.set_description_str(words)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.shown.close()

    def at(self, part: str, share: float, *, before: bool = False) -> None:
        """`share` of a part is done, by this process or (`before`) an earlier one; it never goes back."""
        more = self.weights.get(part, 0.0) * min(share, 1.0) - self.done.get(part, 0.0)
        if more <= 0:
            return
        self.done[part] = self.done.get(part, 0.0) + more
        if before and not self.shown.disable:
            self.shown.initial += more
        self.shown.update(min(more, self.shown.total - self.shown.n))  # many small shares round up

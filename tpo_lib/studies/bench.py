"""What the runs of a study share: a start, its scorers, prompts in three parts of which none begins another's, a seed's pairs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from tpo_lib.files.load import load_model, load_tokenizer
from tpo_lib.models import choose_device, frozen_copy
from tpo_lib.runs import own
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.prompts import held_out_prompts, stream
from tpo_lib.runs.stage import Stage, StageConfig, sampled_pairs
from tpo_lib.studies import labels

TEST, VALIDATION = 128, 64  # held-out prompts: to report on, and to choose settings by
HELD_OUT_PAIRS = 128  # of the test prompts
HELD_OUT = 7  # seed of what all seeds of a study have in common
KEPT = 2  # benches in memory
PROMPT = 16  # tokens that a prompt may have, of what is read


@dataclass(frozen=True)
class Data:
    """What a run trains on, see `StageConfig`; `seed` draws prompts, completions and pairs anew."""

    seed: int
    preset: str = "pocket"
    model: str | None = None  # folder of another start model than the preset's, which the preset's scorers can read
    train_prompts: int = 900
    max_pairs: int = 1280
    min_gap: float = 0.4
    max_new_tokens: int = 40
    writer: int = 0  # updates of a DPO policy of the same seed that writes the pairs; 0: the start does
    labels: dict = field(default_factory=dict, hash=False)  # what becomes of the pairs, as in `labels.labelled`

    def config(self) -> StageConfig:
        """The stage of the preset with these settings; its seed is that of the evaluation."""
        preset = PRESETS[self.preset]
        sizes = {"train_prompts": self.train_prompts, "held_out_prompts": TEST, "max_pairs": self.max_pairs}
        sizes |= {"max_held_out_pairs": HELD_OUT_PAIRS, "min_gap": self.min_gap, "max_new_tokens": self.max_new_tokens}
        sizes["max_length"] = max(preset.stage.max_length, PROMPT + self.max_new_tokens)
        return replace(preset.stage, model=self.model or str(preset.model), **sizes, seed=self.seed)


@dataclass(frozen=True)
class Bench:
    """A stage with test prompts, and what is not in a stage."""

    stage: Stage
    validation: list[str]  # prompts
    training: list[str]  # prompts of the pairs, for what trains online
    note: dict = field(default_factory=dict)  # what became of the pairs

    def by(self, data: Data, writer, cache_dir: Path) -> Bench:
        """With pairs that another model wrote, where there is one, and that have the labels of `data`."""
        stage, note, seed = self.stage, {}, stream(data.seed, "study: labels") % 2**31
        if writer is not None:
            table, pairs, note = labels.off_policy(stage, writer, self.training, seed=seed, cache_dir=cache_dir)
            stage = replace(stage, table=table, pairs=pairs)
        if data.labels:
            made = labels.labelled(data.labels, stage, seed=seed)
            stage, note = replace(stage, pairs=made.pairs), note | made.note
        return replace(self, stage=stage, note=note)

    def on(self, part: str, samples: int) -> Stage:
        """The stage that evaluates on "test", or on "validation" prompts and no pairs, with so many samples a prompt."""
        stage = replace(self.stage, config=replace(self.stage.config, evaluation_samples=samples))
        return stage if part == "test" else replace(stage, held_out_prompts=self.validation, held_out_pairs=[])


@lru_cache(maxsize=1)
def _models(model: str, scorers: tuple[str | None, ...], device: str | None) -> tuple:
    place = choose_device(device)
    found = [name and own.scorer(name, place) for name in scorers]
    return frozen_copy(load_model(model, device=place)), load_tokenizer(model), found


@lru_cache(maxsize=1)
def _held_out(model: str, source: str, device: str | None, scorers: tuple) -> tuple[list[str], list[str]]:
    start, tokenizer, _ = _models(model, scorers, device)
    test = held_out_prompts(source, TEST, start, tokenizer, seed=stream(HELD_OUT, "study: test")).texts
    seed = stream(HELD_OUT, "study: validation")
    return test, held_out_prompts(source, VALIDATION, start, tokenizer, seed=seed, seen=test).texts


@lru_cache(maxsize=KEPT)
def build(data: Data, cache_dir: Path) -> Bench:
    """Load the models, draw the prompts, sample the pairs or read them from the cache.

    Test prompts are drawn first, as the start writes them; validation prompts share no beginning with those, and a seed's
    training prompts with neither.
    """
    config = data.config()
    scorers = (config.reward, config.judge, config.second_judge)
    start, tokenizer, (reward, *judges) = _models(config.model, scorers, config.device)
    test, validation = _held_out(config.model, config.prompts, config.device, scorers)
    seed = stream(data.seed, "study: training")
    seen = [*test, *validation]
    # prompts to train on, drawn as held-out ones are: none begins one of the others or goes on where it ends
    training = held_out_prompts(config.prompts, data.train_prompts, start, tokenizer, seed=seed, seen=seen).texts

    def sample(prompts: list[str], seed: int, most: int):
        how = (config, start, tokenizer, reward, cache_dir, prompts, config.samples_per_prompt, seed, most)
        table, report = sampled_pairs(*how, lambda done, total: None)
        return table, report, labels.encoded(table, tokenizer, config)

    table, report, pairs = sample(training, stream(data.seed, "study: pairs") % 2**31, config.max_pairs)
    _, _, held_out = sample(test, HELD_OUT, HELD_OUT_PAIRS)
    stage = Stage(config, start, tokenizer, reward, *judges, table, pairs, held_out, test, report, None, 0)
    return Bench(stage, validation, training)

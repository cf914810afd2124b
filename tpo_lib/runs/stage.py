"""What the runs of a comparison share: start, reward, judge, pairs and held-out prompts.

stage = pocket_stage()
policy = stage.policy()
fit(config, policy, stage.start, stage.pairs)
stage.evaluate(policy, config).metrics["reward"]

`own_stage` builds one of your own model, pairs and reward.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from datasets import Dataset

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.evaluation import Evaluation
from tpo_lib.fast import FastPath
from tpo_lib.fast.encode import encode_table
from tpo_lib.fast.evaluation import evaluate
from tpo_lib.files import chat, store
from tpo_lib.files.imdb import load_imdb
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.pairs import load_pairs, table_of
from tpo_lib.models import choose_device, choose_precision, frozen_copy
from tpo_lib.pairing import PairReport, build_pairs
from tpo_lib.runs import drawn, given, own, runs
from tpo_lib.runs.prompts import SOURCES, held_out_prompts, overlap, prompt_roots, read_prompts, training_prompts
from tpo_lib.runs.run import shared_prompts
from tpo_lib.runs.sft import SftConfig, fine_tune

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class StageConfig:
    """What a stage is built from."""

    model: str  # folders or hub names
    reward: str | None  # without one, runs are compared on held-out pairs and KL alone
    judge: str | None
    train_prompts: int  # for the pairs
    held_out_prompts: int  # for everything that is reported
    samples_per_prompt: int  # all their pairs are used (4 give the papers' 6)
    held_out_samples: int
    max_new_tokens: int
    min_gap: float  # smallest difference of scores in a pair
    max_pairs: int
    max_held_out_pairs: int
    second_judge: str | None = None  # reported beside the judge
    max_length: int = 128  # prompt and response together, tokens
    evaluation_samples: int = 1  # of every held-out prompt, in every evaluation: equal numbers use equal random numbers
    # It writes them itself; "pocket": the bundled model does; "imdb"; or a file. Beside `pairs` the held-out ones alone, which
    # are those of the held-out pairs where this is "model".
    prompts: str = "model"
    imdb: str | None = None  # folder of the reviews; None: the hub's
    pairs: str | None = None  # file, folder or hub name: these are taken, and none sampled
    split: str | None = None  # of `pairs`
    eval_pairs: str | None = None  # held-out ones; None: `eval_split` of `pairs`, or where that is None a tenth of them
    eval_split: str | None = None
    sft: SftConfig | None = None  # the start is fine-tuned on reviews first
    precision: str | None = "no"  # of sampling, as in models.choose_precision
    sampled_together: int = 256  # sequences at a time; what is sampled depends on it
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
    second_judge: Callable | None
    table: Dataset  # the training pairs as text, with scores (columns as in `pairing.pairs_from_scores`)
    pairs: Sequence[EncodedPair]
    held_out_pairs: Sequence[EncodedPair]
    held_out_prompts: list[str]
    report: PairReport | None  # how the training pairs came about; None of pairs that were there
    sft: dict | None  # what `sft.fine_tune` said
    # Held-out prompts that training has seen (`run.shared_prompts`). 0 wherever they are drawn or cut off here; held-out pairs,
    # and prompts of a file beside pairs, are taken as they are.
    seen_prompts: int
    reference_cache: dict = field(default_factory=dict, repr=False)  # filled by the first evaluation

    def policy(self, config: TrainConfig | None = None) -> torch.nn.Module:
        """A copy of the start that can be trained, or adapters on the start's own tensors, where `config` has a rank."""
        return runs.new_policy(config, self.start)

    def fresh(self, config: TrainConfig | None = None) -> tuple:
        """A new policy, its reference and the pairs: what `runs.train` begins with."""
        return self.policy(config), self.start, self.pairs

    def evaluate(self, policy, config: TrainConfig | None = None, *, guide=None) -> Evaluation:
        """`evaluation.evaluate` of a policy, trained as `config` says if at all, on the held-out prompts and pairs."""
        return evaluate(
            policy,
            self.start,
            self.tokenizer,
            self.held_out_prompts,
            self.reward,
            judge=self.judge,
            second_judge=self.second_judge,
            pairs=self.held_out_pairs,
            objective=config and config.loss_type,
            hyperparameters=config and config.hyperparameters(),
            guide=guide,
            max_new_tokens=self.config.max_new_tokens,
            samples_per_prompt=self.config.evaluation_samples,
            sampled_together=self.config.sampled_together,
            precision=choose_precision(self.start.device, self.config.precision),
            seed=self.config.seed + 4,
            reference_cache=self.reference_cache,
        )


def build_stage(
    config: StageConfig,
    *,
    cache_dir: Path | None,
    start: torch.nn.Module | None = None,
    prompts: list[str] | None = None,
    reward: Callable | None = None,
    judge: Callable | None = None,
    second_judge: Callable | None = None,
    tables: tuple[Dataset, Dataset] | None = None,
    fast: FastPath | None = None,
    progress: Progress = lambda part, share: None,
) -> Stage:
    """Load the models, fine-tune the start where that is asked for, and sample the pairs or load them.

    Args:
        cache_dir: sampled pairs and the fine-tuned start are kept there, and read the next time.
        start: the model, where it is not the one that config.model names; its tokenizer is.
        prompts: train_prompts and then held-out ones, or beside pairs the latter; None takes them from config.prompts.
        reward, judge, second_judge: instead of those that config names.
        tables: pairs for training and held out, instead of those that config names.
        fast: how the fine-tuning reads its model; a review has no second response to share a prompt with.
        progress: called with "fine-tuning" or "pairs" and the share of it that is done.
    """
    device = choose_device(config.device)
    start, tokenizer = start or load_model(config.model, device=device), load_tokenizer(config.model)
    said = None
    if config.sft:
        folder = cache_dir and cache_dir / "sft"
        reviews = load_imdb(config.imdb)
        tell = partial(progress, "fine-tuning")
        more = {"fast": fast and replace(fast, share_prefix=False), "progress": tell}
        said = fine_tune(start, tokenizer, config.sft, reviews, seed=config.seed, folder=folder, **more)
    start = frozen_copy(start)
    given = {"reward": reward, "judge": judge, "second_judge": second_judge}
    named = {name: getattr(config, name) for name in given}
    scorers = {name: given[name] or (named[name] and own.scorer(named[name], device)) for name in given}
    if tables or config.pairs:
        table, held_out_table = tables or given_pairs(config)
        train, report = prompts_of(table, tokenizer), None
        held_out = prompts or beside_pairs(config, start, tokenizer, train, held_out_table)
    else:
        if prompts is None and cache_dir and (kept := drawn.prompts(config)):
            (train, held_out), cache_dir = kept, drawn.lay_out(cache_dir)
        else:
            train, held_out = stage_prompts(config, start, tokenizer, prompts)
        counts = len(train) * config.samples_per_prompt, len(held_out) * config.held_out_samples
        sample = partial(sampled_pairs, config, start, tokenizer, scorers["reward"], cache_dir)

        def told(before: int) -> Callable[[int, int], None]:
            return lambda done, _: progress("pairs", (before + done) / sum(counts))

        table, report = sample(train, config.samples_per_prompt, config.seed + 2, config.max_pairs, told(0))
        held_out_table, _ = sample(
            held_out, config.held_out_samples, config.seed + 3, config.max_held_out_pairs, told(counts[0])
        )
    how = {"max_length": config.max_length, "on_bad_rows": "skip", "cache_dir": cache_dir}
    encode = partial(encode_table, tokenizer=tokenizer, **how)
    (pairs, one), (held_out_pairs, other) = encode(table), encode(held_out_table)
    seen = len(shared_prompts(train, held_out))
    if not report:
        print(f"pairs: {one}\nheld-out pairs: {other}\nheld-out prompts: {overlap(seen)}", file=sys.stderr)
    made = (table, pairs, held_out_pairs, held_out, report, said, seen)
    return Stage(config, start, tokenizer, *scorers.values(), *made)


def beside_pairs(config: StageConfig, start, tokenizer, train: list[str], held_out: Dataset) -> list[str]:
    """Held-out prompts where there are pairs: theirs, or those of config.prompts (a file is taken as it is)."""
    if config.prompts == "model":
        return prompts_of(held_out, tokenizer)[: config.held_out_prompts]
    most = config.held_out_prompts if config.prompts in SOURCES else None
    source = {"imdb": config.imdb, "seed": config.seed + 1}
    found = held_out_prompts(config.prompts, most, start, tokenizer, seen=train, **source)
    return found.texts[: config.held_out_prompts]


def stage_prompts(config: StageConfig, start, tokenizer, given: list[str] | None) -> tuple[list[str], list[str]]:
    """Prompts for the pairs, and held-out ones, none of which equals, begins or continues one for the pairs."""
    if given is None and config.prompts not in SOURCES:
        given, _ = read_prompts(config.prompts)
    if given is not None:
        return _cut(config, list(dict.fromkeys(given)))
    source = {"imdb": config.imdb, "seed": config.seed + 1}
    count = config.train_prompts
    drawn = count + (config.held_out_prompts if config.prompts == "model" else 0)  # how many decides which
    train = training_prompts(config.prompts, drawn, start, tokenizer, **source).texts[:count]
    held_out = held_out_prompts(config.prompts, config.held_out_prompts, start, tokenizer, seen=train, **source).texts
    return train, held_out


def _cut(config: StageConfig, given: list[str]) -> tuple[list[str], list[str]]:
    """One list cut in two; what training has seen of the second part is left out, and said."""
    train, rest = given[: config.train_prompts], given[config.train_prompts :]
    seen = set(shared_prompts(train, rest))
    held_out = [text for i, text in enumerate(rest) if i not in seen][: config.held_out_prompts]
    said = f"{len(seen)} of the {len(rest)} prompts behind the first {len(train)} begin or continue one of these"
    if len(held_out) < config.held_out_prompts:
        place = "" if config.prompts in SOURCES else f" in {config.prompts}"
        raise ValueError(
            f"there are {len(given)} distinct prompts{place}, {config.train_prompts} + {config.held_out_prompts} are needed, and "
            f"{said}: take fewer for training (run: --set stage.train_prompts=N; compare: --num-prompts N)"
        )
    if seen:
        print(f"held-out prompts: {said}, and are left out", file=sys.stderr)
    return train, held_out


def sampled_pairs(
    config: StageConfig,
    start,
    tokenizer,
    reward,
    cache_dir: Path | None,
    prompts: list[str],
    samples: int,
    seed: int,
    most: int,
    progress: Callable[[int, int], None],
) -> tuple[Dataset, PairReport]:
    """The pairs of several completions of every prompt, in random order, and how they came about."""
    precision = choose_precision(start.device, config.precision)
    settings = {"max_new_tokens": config.max_new_tokens, "min_gap": config.min_gap, "cache_dir": cache_dir}
    settings |= {
        "samples_per_prompt": samples,
        "seed": seed,
        "batch_size": config.sampled_together,
        "precision": precision,
        "progress": progress,
    }
    table, report = build_pairs(start, tokenizer, reward, prompts=prompts, **settings)
    return table.shuffle(seed=seed).select(range(min(most, len(table)))), report


def given_pairs(
    config: StageConfig, rows: Mapping[str, Sequence[dict]] = MappingProxyType({})
) -> tuple[Dataset, Dataset]:
    """Pairs that were there, in random order: for training, and held out; `rows` are those of "pairs" or "eval_pairs".

    Where none are named as held out, about a tenth is: all pairs of some prompts, and of those that begin or continue them.

    Raises:
        BadRowsError, FileNotFoundError, ConnectionError, ValueError: as `load_pairs`, or there are too few to hold any out.
    """

    def load(kind: str, split: str | None, most: int) -> Dataset:
        if kind in rows:
            table, bad = table_of(rows[kind], kind), ()
        else:
            table, bad = load_pairs(getattr(config, kind), split=split, on_bad_rows="skip")
        for row in bad:
            print(f"skipped {row}", file=sys.stderr)
        if idle := [words for name, words in given.KINDS.items() if given.has(table, name)]:
            print(
                f"{kind}: {' and '.join(idle)} are not used: a comparison compares objectives; train takes them",
                file=sys.stderr,
            )
        return table.shuffle(seed=config.seed + 2).select(range(min(most, len(table))))

    if apart := "eval_pairs" if config.eval_pairs or "eval_pairs" in rows else "pairs" if config.eval_split else None:
        held_out = load(apart, config.eval_split, config.max_held_out_pairs)
        return load("pairs", config.split, config.max_pairs), held_out
    table = load("pairs", config.split, config.max_pairs + config.max_held_out_pairs)
    wanted, taken, held_out = min(config.max_held_out_pairs, len(table) // 10), 0, set()
    # of messages without the bracket that ends them: a conversation that goes on begins with the shorter one
    roots = prompt_roots([text if isinstance(text, str) else json.dumps(text)[:-1] for text in table["prompt"]])
    # a prompt of more pairs than are wanted comes last: one such could take half of all
    for root, count in sorted(Counter(roots).items(), key=lambda each: max(each[1], wanted)):
        if taken < wanted and taken + count <= len(table) // 2:  # what most pairs share stays in training
            taken, held_out = taken + count, held_out | {root}
    if not held_out:
        few = f"{config.pairs or 'the table'} has {len(table)} pairs of {len(set(roots))} prompts that do not begin each other"
        raise ValueError(f"{few}, too few to hold a tenth out; name --eval-pairs")
    parts = [[i for i, root in enumerate(roots) if (root in held_out) == held] for held in (False, True)]
    return table.select(parts[0][: config.max_pairs]), table.select(parts[1][: config.max_held_out_pairs])


def prompts_of(table: Dataset, tokenizer) -> list[str]:
    """The distinct prompts of pairs as text; messages as the chat template has them before a reply."""
    as_text = all(isinstance(prompt, str) for prompt in table["prompt"])
    texts = table["prompt"] if as_text else chat.render(table, tokenizer)[0]["prompt"]
    return list(dict.fromkeys(text for text in texts if text))


# Of a stage of one's own, and of `compare`, where nothing else is said.
OWN = {"reward": None, "judge": None, "train_prompts": 512, "held_out_prompts": 128, "samples_per_prompt": 4}
OWN |= {"held_out_samples": 4, "max_new_tokens": 40, "min_gap": 0.0, "max_pairs": 10**6, "max_held_out_pairs": 512}
OWN |= {"precision": None}


def own_stage(
    model: str | Path,
    pairs: str | Path | Sequence[dict] | None = None,
    *,
    reward: str | Callable | None = None,
    judge: str | Callable | None = None,
    second_judge: str | Callable | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    eval_pairs: str | Path | Sequence[dict] | None = None,
    cache_dir: str | Path | None = None,
    **changes,
) -> Stage:
    """A stage of your own model and data, for `Laboratory`, the widgets, or `fit`.

    stage = own_stage("HuggingFaceTB/SmolLM2-135M", "pairs.jsonl", reward=lambda texts: [len(text) for text in texts])

    Args:
        model: folder or hub name of the start.
        pairs: a file, folder or hub name, or rows {"prompt", "chosen", "rejected"}; None samples them and needs a reward.
        reward, judge, second_judge: name of a classifier, FILE.py:NAME, or a function texts -> scores.
        prompts: texts, or a file of them: beside pairs the held-out ones, as they are, else those to sample from and, after
            `train_prompts`, the held-out ones, without those that begin or continue a training prompt; None takes those of
            the held-out pairs, or samples them.
        eval_pairs: held-out ones; None holds a tenth of the pairs out, with their prompts.
        cache_dir: where sampled pairs are kept, if anywhere.
        changes: further fields of StageConfig.

    Raises:
        ValueError: there are neither pairs nor a reward, or as `build_stage`.
    """
    if pairs is None and reward is None:
        raise ValueError("reward is missing: without pairs, completions are sampled, and a reward says which is chosen")
    given = {"pairs": pairs, "eval_pairs": eval_pairs, "prompts": prompts}
    given |= {"reward": reward, "judge": judge, "second_judge": second_judge}
    names = {name: str(value) for name, value in given.items() if isinstance(value, str | Path)}
    config = StageConfig(**OWN | {"model": str(model)} | names | changes)
    inside = {name: value for name, value in given.items() if name not in names and value is not None}
    rows = {name: inside.pop(name) for name in ("pairs", "eval_pairs") if name in inside}
    if rows:
        inside["tables"] = given_pairs(config, rows)
    return build_stage(config, cache_dir=cache_dir and Path(cache_dir), **inside)


SECOND_JUDGE = str(POCKET / "second_judge")  # words instead of tokens, and no body that was the model's
QUICK = {"train_prompts": 128, "held_out_prompts": 48, "max_pairs": 320, "max_held_out_pairs": 48}


def pocket_stage_config(*, quick: bool = False, seed: int = 0) -> StageConfig:
    """The stage of `make run`, or (quick) the small one of `make run --quick` and of the notebooks."""
    sizes = {"train_prompts": 800, "held_out_prompts": 160, "max_pairs": 1280, "max_held_out_pairs": 128}
    models = {"model": str(POCKET), "reward": str(POCKET), "judge": str(POCKET / "judge"), "second_judge": SECOND_JUDGE}
    sampled = {"samples_per_prompt": 4, "held_out_samples": 4, "max_new_tokens": 40, "min_gap": 0.4}
    sampled |= {"evaluation_samples": 2}
    return StageConfig(**models, **sampled, seed=seed, **(QUICK if quick else sizes))


def pocket_stage(**changes) -> Stage:
    """The small stage on the bundled model, with `changes` such as min_gap=0.0.

    Its samples were drawn once and come with the model (`drawn`); where a change asks for others, that takes about half a minute
    on two cores. Its pairs are kept in `store.cache_folder()`.
    """
    return build_stage(replace(pocket_stage_config(quick=True), **changes), cache_dir=store.cache_folder() / "pairs")

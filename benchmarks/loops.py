"""Whole training loops on real bodies: `fit`, TRL's DPOTrainer and a loop around the authors' step, each in a process of its own.

All train the same model on the same pairs, in the same updates, with the same AdamW; what is counted begins before the first
update and ends after the last. What is read beforehand (caches of the reference) is counted apart, as `ready_s`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import contestants, measure
from benchmarks.cases import Case
from tpo_lib import train
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import FastPath
from tpo_lib.files import smollm2
from tpo_lib.files.load import load_model
from tpo_lib.runs.run import fit
from tpo_lib.types import PairBatch

LENGTHS = {  # tokens of a prompt, of a response, and the share of responses that are as long as may be
    "imdb": ((2, 8), (8, 48), 0.8),
    "chat": ((20, 200), (20, 200), 0.0),
}
COMPLETIONS = 4  # of a prompt; six pairs
TOLERANCE = 1e-4  # of losses: rounding moves weights, and weights losses
BETA = contestants.HYPERPARAMETERS["beta"]


@dataclass(frozen=True)
class Loop:
    """What is trained on what."""

    body: str = "smollm2-135m"  # or gpt2: GPT-2 small; tiny: for tests
    lengths: str = "imdb"
    together: bool = (
        False  # the six pairs of a prompt stand in one update, else all pairs of an update have their own prompts
    )
    pairs: int = 8  # in an update
    updates: int = 5
    folder: str | None = None  # the weights of SmolLM2-135M; None: where `tpo_lib get` left them, else random ones

    @property
    def weights(self) -> str | None:
        """Where the body's weights lie; None: they are random."""
        if self.body != smollm2.NAME:
            return None
        return self.folder or (str(smollm2.folder()) if (smollm2.folder() / "origin.json").is_file() else None)

    def describe(self) -> str:
        """One line for people."""
        prompt, response, full = LENGTHS[self.lengths]
        size = {"gpt2": "GPT-2 small (12 layers, d = 768, V = 50257)", "tiny": "one layer"}
        size |= {smollm2.NAME: "SmolLM2-135M (30 layers, d = 576, V = 49152)"}
        most = f", {full:.0%} of them the full {response[1]}" if full else ""
        return (
            f"{size[self.body]}, {'its own' if self.weights else 'random'} weights, float32; prompts of {prompt[0]} to "
            f"{prompt[1]} tokens, responses of {response[0]} to {response[1]}{most}; {self.updates} updates of {self.pairs} "
            f"pairs, {'six of every prompt together' if self.together else 'every pair of another prompt'}"
        )

    def config(self, objective: str) -> TrainConfig:
        """The run that all contestants make; logged as often as by default, if there are so many updates."""
        return TrainConfig(
            loss_type=objective, beta=BETA, lr=2e-6, schedule="constant", warmup_steps=0, batch_size=self.pairs,
            group_prompts=self.together, device="cpu", log_every=min(5, self.updates),
        )  # fmt: skip


def make_body(loop: Loop) -> nn.Module:
    """The model to start from, in eval mode."""
    import transformers

    torch.manual_seed(0)
    if loop.body == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    if loop.weights:
        return load_model(loop.weights)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    if loop.body == "tiny":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=2048)
    return transformers.LlamaForCausalLM(config).eval()


def make_pairs(loop: Loop, vocab: int) -> list[EncodedPair]:
    """Pairs of random tokens, as many as the updates take."""
    draw = torch.Generator().manual_seed(0)
    (low, high), (short, long), full = LENGTHS[loop.lengths]

    def ids(least: int, most: int) -> list[int]:
        count = int(torch.randint(least, most + 1, (1,), generator=draw))
        return torch.randint(3, vocab, (count,), generator=draw).tolist()  # 0 to 2 may be special

    pairs: list[EncodedPair] = []
    while len(pairs) < loop.pairs * loop.updates:
        prompt = ids(low, high)
        fills = (torch.rand(COMPLETIONS, generator=draw) < full).tolist()
        said = [ids(long if fill else short, long) for fill in fills]
        every = [(i, k) for i in range(COMPLETIONS) for k in range(i + 1, COMPLETIONS)]
        for i, k in every if loop.together else every[:1]:
            pairs.append(EncodedPair(len(pairs), prompt, said[i], said[k]))
    return pairs[: loop.pairs * loop.updates]


def windows(loop: Loop, pairs: Sequence[EncodedPair]) -> list[list[EncodedPair]]:
    """The pairs of every update, as `fit` takes them."""
    rows = train.updates(loop.config("dpo"), pairs, loop.pairs, 0, loop.updates)
    return [[pairs[i] for i in window] for window in rows]


# --- the loops --------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds and peak memory between `start` and `stop`."""

    def __init__(self) -> None:
        self.made, self.found = time.perf_counter(), {}

    def start(self, policy: nn.Module) -> None:
        gc.collect()
        self.state = 3 * sum(p.numel() * p.element_size() for p in policy.parameters())  # gradients, two moments
        self.before = measure.start_of_peak()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.found["ready_s"] = self.wall - self.made

    def stop(self) -> None:
        self.found["wall_s"], self.found["cpu_s"] = time.perf_counter() - self.wall, time.process_time() - self.cpu
        peak = measure.peak_since(self.before)
        self.found["memory_mib"] = None if peak is None else peak - self.state / 2**20


def by_fit(loop: Loop, objective: str, clock: Clock, *, cached: bool) -> list[float]:
    """`tpo_lib.fit` as it is by default, or with `cache_dir`."""
    policy = make_body(loop)
    pairs, config = make_pairs(loop, policy.config.vocab_size), loop.config(objective)

    def callback(step: int, policy: nn.Module) -> None:
        clock.start(policy) if step == 0 else clock.stop()

    with tempfile.TemporaryDirectory() as folder:
        how = {"fast": FastPath(cache_dir=folder if cached else None), "callbacks": [callback], "progress": False}
        clock.made = time.perf_counter()
        rows = fit(config, policy, partial(make_reference, loop), pairs, **how).metrics
    return [row["loss"] for row in rows]


def make_reference(loop: Loop) -> nn.Module:
    """The start, frozen."""
    return make_body(loop).requires_grad_(False)


class Known(nn.Module):
    """A reference whose hidden states are kept: its head alone runs anew."""

    def __init__(self, reference: nn.Module, batches: Sequence[PairBatch]) -> None:
        super().__init__()
        self.head = reference.get_output_embeddings()
        with torch.no_grad():
            read = (
                reference.base_model(b.input_ids, attention_mask=b.attention_mask, use_cache=False)[0] for b in batches
            )
            self.states = dict(zip((tuple(b.input_ids.flatten().tolist()) for b in batches), read, strict=True))

    def forward(self, input_ids, **_) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.states[tuple(input_ids.flatten().tolist())]))


def by_authors(loop: Loop, objective: str, clock: Clock, *, cached: bool) -> list[float]:
    """The loop of the authors' repositories around their step: all logits of all positions of both models."""
    policy = make_body(loop)
    reference, config = make_reference(loop), loop.config(objective)
    batches = [collate(window) for window in windows(loop, make_pairs(loop, policy.config.vocab_size))]
    optimizer, found = train.build_optimizer(config, policy), []
    clock.made = time.perf_counter()
    reference = Known(reference, batches) if cached else reference
    step = contestants.CONTESTANTS[objective]["textbook"]
    clock.start(policy)
    for batch in batches:
        readers = {"policy": SimpleNamespace(model=policy), "ref": SimpleNamespace(model=reference)}
        loss = step(Case(None, readers, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    clock.stop()
    return by_rows(found, config.log_every)


def by_rows(losses: list[float], every: int) -> list[float]:
    """Means of so many updates each, as they are logged."""
    return [sum(part) / len(part) for i in range(0, len(losses), every) if (part := losses[i : i + every])]


def by_trl(loop: Loop, objective: str, clock: Clock, *, cached: bool) -> list[float]:
    """TRL's DPOTrainer with its own defaults but float32; given the token ids, so that both read the same."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    datasets.disable_caching()  # else log-probabilities of an earlier round are found again
    policy, losses, config = make_body(loop), [], loop.config(objective)
    rows = [pair for window in windows(loop, make_pairs(loop, policy.config.vocab_size)) for pair in window]
    columns = {name: [getattr(pair, name) for pair in rows] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    columns |= {name: ["-"] * len(rows) for name in ("prompt", "chosen", "rejected")}
    known = {"[PAD]": 0, "[EOS]": 1}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(known, "[PAD]")), pad_token="[PAD]", eos_token="[EOS]"
    )

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def compute_loss(self, *given, **more):
            loss = super().compute_loss(*given, **more)
            losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
            return loss

    class Timed(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.start(policy)

        def on_train_end(self, *_, **__):
            clock.stop()

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, beta=BETA, per_device_train_batch_size=loop.pairs, num_train_epochs=1,
            learning_rate=config.lr, lr_scheduler_type="constant", max_grad_norm=config.clip, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no", train_sampling_strategy="sequential",
            precompute_ref_log_probs=cached,
        )  # fmt: skip
        reference = make_reference(loop)
        clock.made = time.perf_counter()
        table = datasets.Dataset.from_dict(columns)
        trainer = Encoded(policy, reference, settings, train_dataset=table, processing_class=words, callbacks=[Timed()])
        del reference
        trainer.train()
    return by_rows(losses, config.log_every)


LOOPS: dict[str, Callable[[Loop, Clock], list[float]]] = {
    f"{objective}/{name}{'-cached' if cached else ''}": partial(by, objective=objective, cached=cached)
    for objective, names in (("dpo", ("authors", "trl", "fit")), ("tdpo2", ("authors", "fit")))
    for name, by in (("authors", by_authors), ("trl", by_trl), ("fit", by_fit))
    if name in names
    for cached in (False, True)
}


def alone(loop: Loop, label: str, threads: int) -> dict:
    """One loop, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_here, loop, label, threads).result()


def _here(loop: Loop, label: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    clock = Clock()
    losses = LOOPS[label](loop, clock=clock)
    return clock.found | {"losses": losses}


def whole_loops(
    loop: Loop, repetitions: int, labels: Sequence[str] = (), *, threads: int | None = None, run: Callable = alone
) -> dict:
    """Every contestant's loop, `repetitions` rounds of them; seconds are those of a pair.

    Args:
        labels: keys of LOOPS to run beside the authors'; empty means all that can run here.
        threads: of every process; None takes all cores.
        run: makes one loop.

    Raises:
        measure.Disagreement: the losses of the first round are not the same.
    """
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    missing = {label: why for label in LOOPS if (why := contestants.MISSING.get(label.split("/")[1].split("-")[0]))}
    here = [label for label in LOOPS if label not in missing]
    names = [label for label in here if not labels or label in labels or label.endswith("/authors")]
    found: dict[str, list[dict]] = {label: [] for label in names}
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for label in names[shift:] + names[:shift]:
            found[label].append(run(loop, label, threads))
        if repetition == 0:
            gaps = check_losses({label: runs[0]["losses"] for label, runs in found.items()})
    pairs = loop.pairs * loop.updates

    def every(label: str, name: str, share: int = 1) -> list:
        return [run[name] and run[name] / share for run in found[label]]

    times = {label: {clock: every(label, clock, pairs) for clock in ("cpu_s", "wall_s", "ready_s")} for label in names}
    memory = {label: min((x for x in every(label, "memory_mib") if x is not None), default=None) for label in names}
    about = {"loop": asdict(loop) | {"text": loop.describe()}, "threads": threads, "missing": missing, "gaps": gaps}
    return {"kind": "loop"} | about | {"times": times, "memory_mib": memory}


def check_losses(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Largest relative difference of every loop's losses from those of the first of its objective.

    Raises:
        measure.Disagreement: it is more than TOLERANCE.
    """
    gaps, first = {}, {}
    for label, values in losses.items():
        objective = label.split("/")[0]
        expected = first.setdefault(objective, values)
        gaps[label] = max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))
        if not gaps[label] <= TOLERANCE:
            raise measure.Disagreement(
                f"{label}: its losses {values} are not those of the first loop, {expected}; nothing was kept"
            )
    return gaps


def every(folder: str | None = None) -> dict[str, Loop]:
    """{section: loop}."""
    base = Loop(folder=folder)
    chat = {"lengths": "chat", "pairs": 4}
    return {
        "loop-smollm2-135m-imdb": base,
        "loop-smollm2-135m-imdb-prompts": replace(base, together=True, pairs=12),
        "loop-smollm2-135m-chat": replace(base, **chat),
        "loop-gpt2-imdb": replace(base, body="gpt2"),
        "loop-gpt2-imdb-prompts": replace(base, body="gpt2", together=True, pairs=12),
        "loop-gpt2-chat": replace(base, body="gpt2", **chat),
    }

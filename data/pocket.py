"""Build the bundled pocket model: tokenizer and language model, from IMDb reviews, on a laptop.

    python -m tpo_lib pocket --imdb DIR --output-dir data/pocket

Every stage keeps what it made below `--work-dir`, so a run that is killed at any moment continues where it was. The
reward and the judges that go with the model are trained in `sentiment.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from argparse import BooleanOptionalAction
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from tpo_data import report
from tpo_data.progress import load_progress, save_progress
from tpo_data.sentiment import (
    SentimentConfig,
    agreement,
    halves,
    held_out_windows,
    quality,
    train_additive,
    train_judge,
)
from tpo_lib.files import store
from tpo_lib.files.imdb import SPLITS, load_imdb
from tpo_lib.files.load import POCKET, load_model, load_tokenizer
from tpo_lib.files.words import HashedWords
from tpo_lib.pairing import score
from tpo_lib.parser import COUNT, Parser
from tpo_lib.rewards import AdditiveReward, ClassifierReward
from tpo_lib.runs.prompts import sample_prompts
from tpo_lib.sampling import generate

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class PocketConfig:
    """Everything that decides what the pocket model becomes (all of it is written into its README)."""

    vocab_size: int = 4096
    hidden_size: int = 224
    num_layers: int = 4
    num_heads: int = 7
    intermediate_size: int = 608
    context: int = 256  # tokens per training window
    batch_size: int = 32  # windows per step
    cycles: tuple[int, ...] = (2030, 1800)  # steps of every cycle of the learning rate, see learning_rate_factor
    warmup_steps: int = 100
    cooldown: float = 0.45  # final share of a cycle in which the learning rate falls linearly to 0
    lr: float = 3e-3  # AdamW: embeddings and norms
    muon_lr: float = 6e-3  # Muon: the matrices of attention and MLP, updates scaled to AdamW's root mean square
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all cycles together."""
        return sum(self.cycles)

    def of_width(self, width: int) -> PocketConfig:
        """The same with another hidden size: heads stay 32 wide, the MLP keeps its ratio, in multiples of 32."""
        if width % 32:
            raise ValueError(f"--width {width} must be a multiple of 32, the width of a head")
        mlp = round(width * self.intermediate_size / self.hidden_size / 32) * 32
        return replace(self, hidden_size=width, num_heads=width // 32, intermediate_size=mlp)


def language_model_reviews(imdb: dict[str, dict[str, list]]) -> list[str]:
    """Reviews of train and unsupervised, each once, none that also stands in test."""
    held_out = set(imdb["test"]["text"])
    reviews = dict.fromkeys(imdb["train"]["text"] + imdb["unsupervised"]["text"])
    return [text for text in reviews if text not in held_out]


def train_tokenizer(reviews: Iterable[str], vocab_size: int, folder: Path):
    """Train a byte-level BPE tokenizer, token 0 = <|endoftext|> = BOS = EOS = pad, and save it in the hub's format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(reviews, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)
    fast.save_pretrained(str(folder))
    return fast


def encode_stream(tokenizer, reviews: list[str]) -> np.ndarray:
    """Encode reviews into one stream of uint16 tokens, every review led by <|endoftext|>."""
    pieces = []
    for start in tqdm(range(0, len(reviews), 1000), desc="tokenize", unit="k reviews", mininterval=5):
        pieces.extend(tokenizer(reviews[start : start + 1000])["input_ids"])
    return np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])


def windows(stream: np.ndarray, config: PocketConfig, first_step: int) -> Iterator[torch.Tensor]:
    """Yield the batches of steps `first_step`, ...: (batch_size, context + 1) int64, a pure function of seed and step."""
    per_epoch = (len(stream) - 1 - config.context) // config.context
    for step in range(first_step, config.steps):
        rows = []
        for number in range(step * config.batch_size, (step + 1) * config.batch_size):
            epoch, place = divmod(number, per_epoch)
            generator = np.random.default_rng([config.seed, epoch])
            if not rows or place == 0:
                offset, order = generator.integers(config.context), generator.permutation(per_epoch)
            start = offset + order[place] * config.context
            rows.append(stream[start : start + config.context + 1])
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate_factor(step: int, config: PocketConfig) -> float:
    """A trapezoid for every cycle: linear warm-up, a plateau, a linear fall to 0 over the last `cooldown` of its steps.

    A model that has come to rest can be trained further by another cycle (WSD-S, arXiv 2410.05192).
    """
    for length in config.cycles:
        if step < length:
            break
        step -= length
    return min(1.0, (step + 1) / config.warmup_steps, max(0.0, (length - step) / (length * config.cooldown)))


def begin_cycle(model, config: PocketConfig) -> list[torch.optim.Optimizer]:
    """Start a cycle where released weights would: weights rounded to bfloat16, optimizers without memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return build_optimizers(model, config)


def build_model(config: PocketConfig):
    """A freshly initialised Llama of the configured size (tied embeddings)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, num_key_value_heads=config.num_heads,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(shape)


def build_optimizers(model, config: PocketConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms (no decay on either)."""
    inner = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
    matrices, rest = ([p for name, p in model.named_parameters() if inner[name] is kind] for kind in (True, False))
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def nats_per_token(model, stream: np.ndarray, *, context: int, count: int) -> tuple[float, int]:
    """Mean cross-entropy in nats over a stream, and the number of tokens scored.

    `count` windows of `context` predictions are spread evenly over the stream; the second half of each is scored, so
    that every scored token has at least context / 2 tokens before it (perplexity with a stride, as is usual).
    """
    total, half = 0.0, context // 2
    starts = np.linspace(0, len(stream) - context - 1, count, dtype=np.int64)
    with torch.inference_mode():
        for some in np.array_split(starts, max(1, count // 32)):
            batch = torch.from_numpy(np.stack([stream[i : i + context + 1] for i in some]).astype(np.int64))
            hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[:, half:]
            logits = model.lm_head(hidden).flatten(0, 1).float()
            total += F.cross_entropy(logits, batch[:, half + 1 :].flatten(), reduction="sum").item()
    return total / (count * (context - half)), count * (context - half)


def pretrain(
    stream: np.ndarray,
    valid: np.ndarray,
    config: PocketConfig,
    work: Path,
    *,
    compile: bool,
    bf16: bool = False,
    every: int = 100,
):
    """Train the language model; checkpoints below `work`, one in `every` steps, let a killed run continue."""
    model = build_model(config)
    optimizers = build_optimizers(model, config)
    state = load_progress(work, model, optimizers)
    step, log = state.get("step", 0), state.get("log", [])

    def loss_of(inputs, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())

    run = torch.compile(loss_of) if compile else loss_of
    total = 0.0
    starts = set(itertools.accumulate(config.cycles[:-1]))
    bar = tqdm(windows(stream, config, step), total=config.steps, initial=step, desc="pocket model", mininterval=10)
    for batch in bar:
        if step in starts:
            optimizers = begin_cycle(model, config)
        factor = learning_rate_factor(step, config)
        for optimizer, rate in zip(optimizers, (config.muon_lr, config.lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = run(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        total += loss.item()
        if step % 20 == 0 or step == config.steps:
            log.append({"step": step, "loss": total / ((step - 1) % 20 + 1)})
            bar.set_postfix(loss=f"{log[-1]['loss']:.3f}")
            total = 0.0
        if step % every == 0 or step == config.steps:
            if step % (5 * every) == 0 or step == config.steps:  # slow
                log[-1]["valid_loss"] = nats_per_token(model, valid, context=config.context, count=256)[0]
                bar.write(f"step {step}: {log[-1]}")
            save_progress(work, model, optimizers, step=step, log=log)
    return model, log


def build(
    imdb_source: str | None,
    output: Path,
    work: Path,
    config: PocketConfig,
    sentiment: SentimentConfig,
    *,
    compile: bool,
    bf16: bool = False,
) -> None:
    """Build everything in data/pocket: tokenizer, language model, reward, judges, and the README that says how.

    `imdb_source` is as in load_imdb; `work` keeps what a killed build continues from; `compile` makes the step about 1.3 times as
    fast on a CPU and needs a C++ compiler; `bf16` multiplies its matrices in bfloat16.

    Raises:
        FileExistsError: `output` or `work` holds something that no build wrote.
        RuntimeError: `work` holds a build with other settings or data.
    """
    with store.exclusive(work, "build"):
        store.prove(output)  # now, not hours later
        imdb = load_imdb(imdb_source)
        texts = {split: hashlib.sha256("\0".join(imdb[split]["text"]).encode()).hexdigest() for split in SPLITS}
        labels = {split: hashlib.sha256(bytes(x & 255 for x in imdb[split]["label"])).hexdigest() for split in SPLITS}
        settings = {"config": asdict(config), "sentiment": asdict(sentiment), "texts": texts, "labels": labels}
        store.settle(work / "identity.json", settings, "remove the folder, or choose another --work-dir")
        reviews = language_model_reviews(imdb)
        if not (work / "corpus").exists():
            store.write_atomically(work / "corpus", lambda folder: _encode_corpus(folder, reviews, imdb, config))
        store.verify(work / "corpus")
        train, test = np.load(work / "corpus" / "train.npy"), np.load(work / "corpus" / "test.npy")
        model, log = pretrain(train, test, config, work / "checkpoints", compile=compile, bf16=bf16)
        facts = {"tokens": {"train": len(train), "test": len(test)}, "reviews": len(reviews), "data": texts}

        def write(folder: Path) -> None:
            _write_models(folder, model, imdb, sentiment, work)
            report.write(folder, measure(folder, imdb, test, log, config, sentiment) | facts)

        store.write_atomically(output, write)


def add_flags(command: Parser) -> None:
    """The flags of `python -m tpo_lib pocket`."""
    flag = command.add_argument
    flag("--imdb", help="folder of train/test/unsupervised.parquet (default: the hub's stanfordnlp/imdb)")
    flag("--output-dir", default=str(POCKET), help="where model, reward and judges go")
    flag("--work-dir", default="runs/pocket-model", help="checkpoints; a killed build continues from here")
    flag("--steps", type=COUNT, nargs="+", help="training steps of the language model, a number for every cycle")
    flag(
        "--width", type=COUNT, help="hidden size, a multiple of 32; 128 makes 1.3 M parameters, 320 6 M (default: 224)"
    )
    flag("--compile", action=BooleanOptionalAction, default=True, help="torch.compile the step")
    flag("--bf16", action="store_true", help="train in bfloat16 autocast: sooner where the CPU has it")


def from_flags(options) -> None:
    """Build what the flags ask for."""
    config = PocketConfig(cycles=tuple(options.steps)) if options.steps else PocketConfig()
    config = config.of_width(options.width) if options.width else config
    output, work = Path(options.output_dir), Path(options.work_dir)
    build(options.imdb, output, work, config, SentimentConfig(), compile=options.compile, bf16=options.bf16)


def _write_models(folder: Path, model, imdb: dict, sentiment: SentimentConfig, work: Path) -> None:
    """Save the language model, then train and save the three that score it."""
    tokenizer = load_tokenizer(work / "corpus")
    model.to(torch.bfloat16).save_pretrained(str(folder))  # half the size; all figures are those of these weights
    tokenizer.save_pretrained(str(folder))
    reward_half, judge_half = halves(imdb["train"], sentiment.seed)
    train_additive(tokenizer, reward_half, sentiment).save(folder)
    judge = train_judge(folder, tokenizer, judge_half, sentiment, work / "judge")
    judge.to(torch.bfloat16).save_pretrained(str(folder / "judge"))
    tokenizer.save_pretrained(str(folder / "judge"))
    store.write_manifest(folder / "judge")  # it is loaded by itself
    write_second_judge(folder / "second_judge", judge_half, sentiment)


def write_second_judge(folder: Path, labelled: dict[str, list], sentiment: SentimentConfig) -> None:
    """Train the scorer that reads words on the judge's half, and write it into a folder of its own."""
    folder.mkdir()
    words = HashedWords()
    words.save_pretrained(folder)
    train_additive(words, labelled, replace(sentiment, window=sentiment.words)).save(folder)
    store.write_manifest(folder)


def _encode_corpus(folder: Path, reviews: list[str], imdb: dict, config: PocketConfig) -> None:
    tokenizer = train_tokenizer(reviews, config.vocab_size, folder)
    np.save(folder / "train.npy", encode_stream(tokenizer, reviews))
    np.save(folder / "test.npy", encode_stream(tokenizer, imdb["test"]["text"]))


def measure(
    output: Path, imdb: dict, test: np.ndarray, log: list[dict], config: PocketConfig, sentiment: SentimentConfig
) -> dict:
    """Every figure of the pocket README, measured on IMDb's test reviews with the files that were written."""
    model, tokenizer = load_model(output), load_tokenizer(output)
    nats, scored = nats_per_token(model, test, context=config.context, count=4096)
    facts = {"config": asdict(config), "sentiment": asdict(sentiment)}
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "nats_per_token": nats}
    facts |= {"perplexity": math.exp(nats), "scored_tokens": scored, "log": log}
    return facts | scorer_facts(output, model, tokenizer, imdb["test"], config.context, sentiment)


def scorer_facts(output: Path, model, tokenizer, reviews: dict, context: int, sentiment: SentimentConfig) -> dict:
    """What reward and judges are worth on reviews with labels, what they say of the model's own samples, how far they agree.

    Args:
        context: tokens of a review that the judge reads; `judge_whole_long` is with twice as many.
    """
    scorers = {"reward": AdditiveReward.load(output), "judge": ClassifierReward(output / "judge", max_length=context)}
    scorers["second_judge"] = AdditiveReward.load(output / "second_judge")
    texts, labels = held_out_windows(tokenizer, reviews, sentiment.window, seed=1)
    tenth = slice(None, None, 10)  # the judge reads a whole review slowly
    whole, whole_labels = reviews["text"][tenth], torch.tensor(reviews["label"][tenth], dtype=torch.float32)
    on_windows = {name: scorer(texts) for name, scorer in scorers.items()}
    facts = {f"{name}_windows": quality(scores, labels) for name, scores in on_windows.items()}
    facts |= {f"{name}_whole": quality(scorer(whole), whole_labels) for name, scorer in scorers.items()}
    longer = ClassifierReward(output / "judge", max_length=2 * context)
    facts["judge_whole_long"] = quality(longer(whole), whole_labels)
    lengths = torch.tensor([len(ids) for ids in tokenizer(whole)["input_ids"]])
    facts["cut"] = {str(n): (lengths > n).float().mean().item() for n in (context, 2 * context)}  # share of the reviews

    def texts_of(prompts: list[str], **more) -> list[list[str]]:
        several = generate(model, tokenizer, prompts, max_new_tokens=sentiment.window, **more)
        return [[completion.text for completion in one] for one in several]

    prompts, shown = sample_prompts(model, tokenizer, 512, seed=1), ["The acting", "I watched this", "This movie was"]
    own = texts_of(prompts, seed=1)
    scores = {name: score(scorer, prompts, own).flatten() for name, scorer in scorers.items()}
    facts["start"] = {name: {"mean": s.mean().item(), "std": s.std().item()} for name, s in scores.items()}
    facts["agreement"] = {"windows": agreement(on_windows, labels), "samples": agreement(scores)}
    facts["samples"] = dict(zip(shown, texts_of(shown, samples_per_prompt=3, seed=2), strict=True))
    return facts

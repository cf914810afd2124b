"""Train the three scorers that come with the pocket model: the additive reward and two judges.

The labelled IMDb training reviews are cut into two halves by a fixed shuffle. The first half trains the reward that labels
preference pairs, the second half the judges, which never label one. Neither judge is wholly independent: the first shares
body, tokenizer and corpus with the language model that it judges; the second, which reads words, no body and no tokenizer,
is linear like the reward. All know IMDb's reviews alone. They are tested on IMDb's test reviews.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from tpo_data.progress import load_progress, save_progress
from tpo_lib.rewards import AdditiveReward, hash_bigrams


@dataclass(frozen=True)
class SentimentConfig:
    """How reward and judges are trained."""

    window: int = 40  # tokens: the length of the responses that are scored
    words: int = 28  # the second judge's window: about as much text
    bigrams: int = 2**17  # size of the hashed table
    reward_epochs: int = 8
    reward_lr: float = 0.02
    reward_decay: float = 2e-6  # L2 on the tables, per token of the window
    judge_steps: int = 700
    judge_batch: int = 32
    judge_lr: float = 1e-3
    judge_tokens: tuple[int, int] = (16, 96)  # shortest and longest window the judge is trained on
    seed: int = 0


def halves(labelled: dict[str, list], seed: int) -> tuple[dict[str, list], dict[str, list]]:
    """Cut labelled reviews into (for the reward, for the judge) by a seeded shuffle."""
    order = np.random.default_rng(seed).permutation(len(labelled["text"]))
    parts = order[: len(order) // 2], order[len(order) // 2 :]
    return tuple({key: [values[i] for i in part] for key, values in labelled.items()} for part in parts)


def cut_windows(ids: list[list[int]], labels: list[int], width: int, offset: int) -> tuple[Tensor, Tensor]:
    """Cut token sequences into windows of `width`, from `offset` on: (W, width) int64 and (W,) float32 labels."""
    rows, targets = [], []
    for tokens, label in zip(ids, labels, strict=True):
        for start in range(offset, len(tokens) - width + 1, width):
            rows.append(tokens[start : start + width])
            targets.append(label)
    return torch.from_numpy(np.array(rows, dtype=np.int64)), torch.tensor(targets, dtype=torch.float32)


def train_additive(tokenizer, labelled: dict[str, list], config: SentimentConfig) -> AdditiveReward:
    """Logistic regression over tokens, or words, and hashed bigrams of short windows.

    Short on purpose: a reward trained on whole reviews is flat on 40 tokens, since each of its weights is small.
    """
    torch.manual_seed(config.seed)
    ids = tokenizer(labelled["text"], add_special_tokens=False)["input_ids"]
    unigram, bigram, bias = (torch.zeros(n, requires_grad=True) for n in (len(tokenizer), config.bigrams, ()))
    optimizer = torch.optim.Adam([unigram, bigram, bias], lr=config.reward_lr)
    generator = torch.Generator().manual_seed(config.seed)
    for epoch in tqdm(range(config.reward_epochs), desc="additive reward"):
        windows, targets = cut_windows(ids, labelled["label"], config.window, offset=epoch * 7 % config.window)
        optimizer.param_groups[0]["lr"] = config.reward_lr * (1 - epoch / config.reward_epochs)
        for rows in torch.randperm(len(windows), generator=generator).split(1024):
            current = windows[rows]  # (rows, window)
            previous = F.pad(current, (1, -1))  # token 0 stands before the first
            weights = unigram[current] + bigram[hash_bigrams(previous, current, config.bigrams)]
            loss = F.binary_cross_entropy_with_logits(bias + weights.sum(-1), targets[rows])
            penalty = config.reward_decay * config.window * (unigram.square().sum() + bigram.square().sum())
            optimizer.zero_grad()
            (loss + penalty).backward()
            optimizer.step()
    # stored as float16: round now, so that the reward in memory is the reward on disk
    return AdditiveReward(tokenizer, unigram.detach().half(), bigram.detach().half(), bias.item())


def judge_batches(
    ids: list[list[int]], labels: list[int], config: SentimentConfig, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of steps `first`, ...: random windows, one length a batch, a pure function of seed and step."""
    for step in range(first, config.judge_steps):
        rng = np.random.default_rng([config.seed, step])
        width = int(rng.integers(config.judge_tokens[0], config.judge_tokens[1] + 1))
        rows, targets = [], []
        while len(rows) < config.judge_batch:
            review = int(rng.integers(len(ids)))
            if len(ids[review]) >= width:
                start = int(rng.integers(len(ids[review]) - width + 1))
                rows.append([0, *ids[review][start : start + width]])  # led by BOS, as the tokenizer leads every text
                targets.append(labels[review])
        yield torch.tensor(rows), torch.tensor(targets)


def train_judge(folder: Path, tokenizer, labelled: dict[str, list], config: SentimentConfig, work: Path):
    """Fine-tune the pocket body with a classification head on the judge's half; resumes from `work`."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=2, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
        dtype=torch.float32, use_safetensors=True, trust_remote_code=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.judge_lr, weight_decay=0.01)
    step = load_progress(work, model, [optimizer]).get("step", 0)
    ids = tokenizer(labelled["text"], add_special_tokens=False)["input_ids"]
    batches, running = judge_batches(ids, labelled["label"], config, step), 0.7
    bar = tqdm(batches, total=config.judge_steps, initial=step, desc="judge", mininterval=5)
    for batch, targets in bar:
        rise, fall = (step + 1) / 50, 1.5 * (1 - step / config.judge_steps)
        optimizer.param_groups[0]["lr"] = config.judge_lr * min(1.0, rise, fall)
        loss = F.cross_entropy(model(input_ids=batch, use_cache=False).logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        running = 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
        if step % 100 == 0 or step == config.judge_steps:
            save_progress(work, model, [optimizer], step=step)
    return model.eval()


def quality(scores: Tensor, labels: Tensor, bins: int = 10) -> dict[str, float]:
    """Accuracy, Brier score, expected calibration error (equal-width bins) and spread of scores in [0, 1].

    Raises:
        ValueError: a score is no probability.
    """
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores from {scores.min()} to {scores.max()} are no probabilities: nothing to calibrate")
    place = (scores * bins).long().clamp(max=bins - 1)
    # of a bin: its share times the distance of its means, which is the distance of its sums over n
    gap = torch.bincount(place, (scores - labels).double()).abs().sum().item() / len(scores)
    return {
        "accuracy": ((scores > 0.5).float() == labels).float().mean().item(),
        "brier": (scores - labels).square().mean().item(),
        "ece": gap,
        "std": scores.std().item(),
        "n": len(scores),
    }


def agreement(scores: dict[str, Tensor], labels: Tensor | None = None) -> dict[str, float]:
    """Pearson's correlation of every two scorers of the same n texts; with labels, of what differs within a label.

    Raises:
        ValueError: a scorer gives all texts of a label the same score.
    """
    names, rows = list(scores), torch.stack(list(scores.values())).double()  # (scorers, n)
    for label in () if labels is None else labels.unique():
        rows[:, labels == label] -= rows[:, labels == label].mean(1, keepdim=True)
    found = torch.corrcoef(rows)
    if not found.isfinite().all():
        raise ValueError(f"one of {', '.join(names)} scores all texts alike: nothing to correlate")
    return {f"{a}, {b}": found[i, j].item() for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)}


def held_out_windows(tokenizer, labelled: dict[str, list], width: int, seed: int) -> tuple[list[str], Tensor]:
    """A random window of every test review that has one, as texts, with their labels (n,) float32."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    ids = tokenizer(labelled["text"], add_special_tokens=False)["input_ids"]
    for tokens, label in zip(ids, labelled["label"], strict=True):
        if len(tokens) >= width:
            start = int(rng.integers(len(tokens) - width + 1))
            texts.append(tokenizer.decode(tokens[start : start + width]))
            labels.append(label)
    return texts, torch.tensor(labels, dtype=torch.float32)

"""Sentiment rewards behind one interface: texts in, the probability of a positive review out.

A reward has a `name`, a `fingerprint` (it changes whenever its scores may), and a `scope`: "response" if it reads the
response alone, "full" if it reads prompt and response as one text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpo_lib.models import explain_missing, fingerprint, load_tokenizer


class Reward(Protocol):
    """What samples are scored with."""

    name: str
    scope: str
    fingerprint: str

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (len(texts),) float32 scores in [0, 1]."""
        ...


class AdditiveReward:
    """Sentiment as a sum over tokens, so that the true credit of every token is known.

    score = sigma(b + sum_t w(y^{t-1}, y^t)),  w(a, z) = unigram[z] + bigram[hash(a, z)];
    the first token's predecessor is token 0, the beginning of a text.

    Args:
        tokenizer: the tokenizer whose ids the tables are indexed with.
        unigram: (V,) float32, in nats of log-odds.
        bigram: (H,) float32, the same for hashed pairs of tokens.
        bias: log-odds of an empty text.
    """

    scope = "response"

    def __init__(self, tokenizer, unigram: Tensor, bigram: Tensor, bias: float):
        self.name = "additive sentiment"
        self.tokenizer, self.unigram, self.bigram, self.bias = tokenizer, unigram.float(), bigram.float(), float(bias)
        tables = torch.cat([self.unigram, self.bigram, torch.tensor([self.bias])])
        self.fingerprint = hashlib.sha256(tables.numpy()).hexdigest()

    @classmethod
    def load(cls, folder: str | Path) -> AdditiveReward:
        """Load what `save` wrote: `reward.safetensors` beside the tokenizer's files.

        Raises:
            OSError: the folder has no reward.
        """
        path = Path(folder) / "reward.safetensors"
        if not path.is_file():
            raise OSError(
                f"{path} not found; build it with `python -m tpo_lib pocket`, or name a classifier with --reward"
            )
        tables = load_file(str(path))
        return cls(load_tokenizer(folder), tables["unigram"], tables["bigram"], tables["bias"].item())

    def save(self, folder: str | Path) -> None:
        """Write the tables as float16 (bias float32)."""
        tables = {"unigram": self.unigram.half(), "bigram": self.bigram.half(), "bias": torch.tensor([self.bias])}
        save_file(tables, str(Path(folder) / "reward.safetensors"))

    def token_credit(self, ids: Tensor) -> Tensor:
        """Return w(y^{t-1}, y^t) of every token, in nats of log-odds.

        Args:
            ids: (..., T) int64 response tokens; the first one's predecessor is token 0.

        Returns:
            (..., T) float32.
        """
        previous = torch.cat([torch.zeros_like(ids[..., :1]), ids[..., :-1]], dim=-1)
        return self.unigram[ids] + self.bigram[hash_bigrams(previous, ids, len(self.bigram))]

    def score_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return (n,) scores in [0, 1] of n token sequences."""
        logits = [
            self.bias + self.token_credit(torch.tensor(row, dtype=torch.long)).sum() if len(row) else self.bias
            for row in ids
        ]
        return torch.sigmoid(torch.tensor(logits))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (n,) scores in [0, 1] of n texts."""
        if not len(texts):
            return torch.zeros(0)
        return self.score_ids(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def hash_bigrams(previous: Tensor, current: Tensor, size: int) -> Tensor:
    """Map pairs of token ids to [0, size): a fixed multiply-and-shift hash on 32 bits, the same on every machine."""
    mixed = (previous * 2_654_435_761 + current * 739_982_445) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 739_982_445) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) % size


class ClassifierReward:
    """Any sequence classifier in the hub's format: the probability it gives to its positive class.

    Args:
        name: folder or hub name, e.g. siebert/sentiment-roberta-large-english or lvwerra/distilbert-imdb.
        device: where it runs.
        batch_size: texts a forward pass.
        max_length: tokens read of each text at most; the rest, or what the model has no positions for, is cut at the end.

    Raises:
        OSError: it cannot be loaded.
        ValueError: its labels do not say which class is the positive one.
    """

    scope = "full"

    def __init__(
        self, name: str | Path, *, device: torch.device | str = "cpu", batch_size: int = 64, max_length: int = 512
    ):
        from transformers import AutoModelForSequenceClassification

        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                str(name), use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise explain_missing("classifier", name, error) from error
        self.name, self.model = Path(name).name, model.to(device).eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(name)
        positions = getattr(model.config, "max_position_embeddings", max_length)
        self.batch_size, self.max_length = batch_size, min(max_length, positions, self.tokenizer.model_max_length)
        self.positive = _positive_class(model.config, str(name))
        self.fingerprint = fingerprint(model)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (n,) probabilities of the positive class."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: less padding
        scores = torch.zeros(len(texts))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            one_logit = logits.shape[-1] == 1
            scores[rows] = (logits[:, 0].sigmoid() if one_logit else logits.softmax(-1)[:, self.positive]).cpu()
        return scores


def _positive_class(config, name: str) -> int:
    """Index of the class that means "positive"."""
    if config.num_labels == 1:
        return 0
    labels = {str(label).lower(): int(index) for index, label in config.id2label.items()}
    for known in ("positive", "pos", "label_1", "1"):
        if known in labels and (known != "label_1" or config.num_labels == 2):
            return labels[known]
    raise ValueError(
        f"classifier {name!r} has the labels {json.dumps(sorted(labels))}; none says which class is positive"
    )


def load_reward(name: str | Path, *, device: torch.device | str = "cpu") -> Reward:
    """Load a reward by folder or hub name: a folder with reward.safetensors is additive, all else a classifier."""
    if (Path(name) / "reward.safetensors").is_file():
        return AdditiveReward.load(name)
    return ClassifierReward(name, device=device)

"""Rewards behind one interface: texts in, one finite score a text out; those here say how probably a review is positive.

Any callable, texts -> scores, is a reward. It may have a `name`, a `scope` ("response", the default, or "full": prompt and
response as one text), and a `fingerprint` that changes whenever its scores may: without one, nothing that it scored is cached.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpo_lib.files import classifiers, store
from tpo_lib.files.load import load_classifier, load_tokenizer
from tpo_lib.models import fingerprint, tokenizer_content


class Reward(Protocol):
    """What samples are scored with."""

    name: str
    scope: str
    fingerprint: str

    def __call__(self, texts: Sequence[str]) -> Tensor: ...  # or an array, or a list


# What every reward is tried on before anything is sampled: two lengths, so that padding shows, and all that is read.
PROBE = ("good", "a film like this one " * 200)


def name_of(reward) -> str:
    """What messages call a reward: its name, or that of the function."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


def scores_of(reward, texts: Sequence[str]) -> Tensor:
    """Score texts: (n,) on the CPU, float64 where the reward computes in it, else float32.

    Raises:
        ValueError: its scope is unknown, or what it returned is not one finite number a text.
    """
    name, scope = f"reward {name_of(reward)!r}", getattr(reward, "scope", "response")
    if scope not in ("response", "full"):
        raise ValueError(f'{name} has scope {scope!r}; it must be "response" or "full"')
    found, fix = reward(texts), "it must give one number a text"
    try:
        scores = found if isinstance(found, Tensor) else torch.from_numpy(np.asarray(found, dtype=np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        returned = f"{type(found).__name__} that is no list of numbers ({error})"
        raise ValueError(f"{name} returned {returned}; {fix}") from error
    if scores.shape != (len(texts),):
        raise ValueError(f"{name} returned shape {tuple(scores.shape)} for {len(texts)} texts; {fix}")
    scores = (scores if scores.dtype == torch.float64 else scores.float()).detach().cpu()
    if not scores.isfinite().all():
        i = scores.isfinite().tolist().index(False)
        raise ValueError(
            f"{name} gave text {i} of {len(texts)} the score {scores[i]}: {texts[i][:80]!r}; every score must be finite"
        )
    return scores


def in_unit_interval(scores) -> bool:
    """Whether all scores lie in [0, 1], as a probability's do: what axes and histograms then span."""
    return all(0 <= score <= 1 for score in map(float, scores))


def probe(*rewards) -> None:
    """Score two texts with each reward but None: what cannot score fails as in `scores_of`, before anything is sampled."""
    for reward in rewards:
        if reward is not None:
            scores_of(reward, list(PROBE))


class AdditiveReward:
    """Sentiment as a sum over tokens, so that the true credit of every token is known.

    score = sigma(b + sum_t w(y^{t-1}, y^t)),  w(a, z) = unigram[z] + bigram[hash(a, z)],  y^0 = token 0, the beginning of a text.

    Args:
        tokenizer: the tokenizer whose ids the tables are indexed with: a model's, or `HashedWords`, which reads words.
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
            ValueError: the reward is another tokenizer's.
        """
        path = Path(folder) / "reward.safetensors"
        tokenizer = load_tokenizer(folder)  # first: it sees whether the folder is as it was written
        if not path.is_file():
            fix = "build it with `python -m tpo_lib pocket`, or name a classifier with --reward"
            raise OSError(f"{path} is no file; {fix}")
        tables = load_file(str(path))
        if len(tokenizer) > (known := len(tables["unigram"])):
            counts = f"weights for {known} tokens, the tokenizer beside it {len(tokenizer)}"
            raise ValueError(f"{path} has {counts}: they do not belong together")
        return cls(tokenizer, tables["unigram"], tables["bigram"], tables["bias"].item())

    def save(self, folder: str | Path) -> None:
        """Write the tables as float16 (bias float32)."""
        tables = {"unigram": self.unigram.half(), "bigram": self.bigram.half(), "bias": torch.tensor([self.bias])}
        save_file(tables, str(Path(folder) / "reward.safetensors"))

    def token_credit(self, ids: Tensor) -> Tensor:
        """Return w(y^{t-1}, y^t) of response tokens in nats of log-odds: (..., T) int64 -> (..., T) float32."""
        previous = torch.cat([torch.zeros_like(ids[..., :1]), ids[..., :-1]], dim=-1)
        return self.unigram[ids] + self.bigram[hash_bigrams(previous, ids, len(self.bigram))]

    def score_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return (n,) scores in [0, 1] of n token sequences."""
        logits = [self.bias + self.token_credit(torch.tensor(row, dtype=torch.long)).sum() for row in ids]
        return torch.sigmoid(torch.tensor(logits))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (n,) scores in [0, 1] of n texts."""
        return self.score_ids(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if len(texts) else [])


def hash_bigrams(previous: Tensor, current: Tensor, size: int) -> Tensor:
    """Map pairs of token ids to [0, size): a fixed multiply-and-shift hash on 32 bits, the same on every machine."""
    mixed = (previous * 2_654_435_761 + current * 739_982_445) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 739_982_445) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 13)) % size


class ClassifierReward:
    """Any sequence classifier in the hub's format.

    The score is the probability of the positive class, in [0, 1]. A model with a single output that is a regression, or has
    no label of its own (a reward model), gives that output itself: unbounded, in its own units.

    Args:
        name: folder or hub name, e.g. siebert/sentiment-roberta-large-english or lvwerra/distilbert-imdb.
        device: where it runs.
        batch_size: texts a forward pass; a model that does not mask its padding reads one text at a time (said on stderr).
        max_length: tokens read of each text at most; the rest, or what the model has no positions for, is cut at the end.

    Raises:
        OSError: it cannot be loaded.
        ValueError: its labels do not say which class is the positive one, or it cannot score a text.
    """

    scope = "full"

    def __init__(
        self, name: str | Path, *, device: torch.device | str = "cpu", batch_size: int = 64, max_length: int = 512
    ):
        self.name, self.batch_size = Path(name).name, batch_size
        self.model, self.tokenizer = load_classifier(name, device=device), load_tokenizer(name)
        self.model.requires_grad_(False)
        self.tokenizer.padding_side = "right"  # so that positions, which start at 0, are those of the text alone
        if self.tokenizer.pad_token_id is None:
            raise ValueError(f"classifier {str(name)!r} has neither a pad nor an EOS token in its tokenizer; give one")
        # decoders score the last token that is no padding
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.max_length = int(min(max_length, classifiers.positions(self.model), self.tokenizer.model_max_length))
        self.activation, self.positive = classifiers.reading(self.model.config, str(name))
        content = [fingerprint(self.model), self.activation, self.positive, self.max_length]
        self.fingerprint = store.content_key([*content, tokenizer_content(self.tokenizer)])
        self._try(str(name))

    def _try(self, name: str) -> None:
        try:  # what breaks here would break after all sampling is done
            together, alone = scores_of(self, list(PROBE))[:1], scores_of(self, list(PROBE[:1]))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"classifier {name!r} cannot score a text: {type(error).__name__}: {error}") from error
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4):
            print(f"classifier {name!r} does not mask its padding and reads one text at a time", file=sys.stderr)
            self.batch_size = 1

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (n,) scores, float32."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths together: less padding
        scores = torch.zeros(len(texts))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows], truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            scores[rows] = ACTIVATIONS[self.activation](logits)[:, self.positive].cpu()
        return scores


ACTIVATIONS = {"none": lambda logits: logits, "sigmoid": torch.sigmoid, "softmax": lambda logits: logits.softmax(-1)}


def load_reward(name: str | Path, *, device: torch.device | str = "cpu") -> Reward:
    """Load a reward by folder or hub name: a folder with reward.safetensors is additive, all else a classifier."""
    if os.path.lexists(Path(name) / "reward.safetensors"):  # whatever it is: it must not make the folder another reward
        return AdditiveReward.load(name)
    return ClassifierReward(name, device=device)

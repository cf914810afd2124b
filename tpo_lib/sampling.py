"""Completions of prompts, sampled from the model at its own distribution."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, TopPLogitsWarper

from tpo_lib import stats
from tpo_lib.files.tokens import prompt_token_ids, response_texts
from tpo_lib.models import autocast, check_sequences
from tpo_lib.types import PAD

NOISE = 1e-3  # of the largest logit: thirty layers round otherwise with a mask; padding that is read moves far more
NOT_FINITE = "the model's logits are not finite, so nothing can be sampled; check its weights"
Progress = Callable[[int, int], None]  # called with (sequences done, sequences in all)
Sampled = tuple[list[int], int | None]  # new ids without the token that ended them, and that token, if any did


@dataclass(frozen=True)
class Completion:
    """One sampled continuation.

    Attributes:
        text: what follows the prompt, without EOS.
        token_ids: the same as sampled tokens, without EOS.
        end: the token that ended it, EOS or another one of the model's; None where it was cut at max_new_tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    end: int | None

    @property
    def complete(self) -> bool:
        """It ended by itself."""
        return self.end is not None

    @property
    def steps(self) -> list[int]:
        """Every token that was sampled: choosing to end is a step like any other."""
        return [*self.token_ids, self.end] if self.complete else list(self.token_ids)


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn: the model's distribution at a temperature, cut to its top_p most likely mass.

    Temperature 0 takes the most likely token. Nothing else acts on the logits, whatever the model's own settings say.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def draw(self, logits: Tensor) -> Tensor:
        """Draw one token a row: (n, V) logits -> (n,) int64; ValueError where logits are not finite."""
        logits = logits.float() / self.temperature
        if self.top_p < 1:
            logits = TopPLogitsWarper(self.top_p)(None, logits)
        if logits.device.type == "mps":  # has no float64
            logits = logits.cpu()
        # By inverting the cumulative distribution, at one uniform number a row: `torch.multinomial` draws one for every
        # token of the vocabulary, which took 40% of all sampling time on a CPU.
        cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (n, V)
        total = cumulative[:, -1:]  # (n, 1), 1 up to rounding
        if not total.isfinite().all():
            raise ValueError(NOT_FINITE)
        uniform = torch.rand(len(total), 1, dtype=torch.float64, device=total.device) * total
        return torch.searchsorted(cumulative, uniform, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Serve `model.generate` as its logits processor: only the token drawn stays possible."""
        if self.temperature == 0:
            if not logits.amax(-1).isfinite().all():  # a NaN would count as the most likely token
                raise ValueError(NOT_FINITE)
            return logits
        chosen = self.draw(logits).to(logits.device)[:, None]
        return torch.full_like(logits, -math.inf).scatter_(1, chosen, 0.0)


def generate(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int,
    batch_size: int = 256,
    precision: str = "no",
    progress: Progress | None = None,
) -> list[list[Completion]]:
    """Sample `samples_per_prompt` completions of every prompt; result[i][k] is the k-th one of prompts[i].

    The model runs in eval mode; its own generation settings (top_k and the like) do not act. The global random state is
    left as it was. The samples depend on the seed, on batch_size and on the precision.

    Args:
        temperature: 1 is the model's own distribution, 0 the most likely token.
        top_p: in (0, 1], 1 cuts nothing.
        batch_size: sequences a forward pass.
        precision: "no" (the type of the weights), "bf16" or "fp16", as in `models.autocast`.
        progress: called with (sequences done, sequences in all) after every batch.

    Raises:
        ValueError: a setting is out of range, a prompt has no tokens, or `models.check_sequences` refuses it.
    """
    if samples_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"samples_per_prompt and batch_size must be at least 1, got {samples_per_prompt} and {batch_size}"
        )
    sampler = Sampler(max_new_tokens, temperature, top_p)
    encoded = prompt_token_ids(tokenizer, list(prompts))
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {i} has no tokens, so nothing predicts the first one; give it text")
    check_sequences(model, ((f"prompt {i}", ids) for i, ids in enumerate(encoded)), room=max_new_tokens)
    rows = [ids for ids in encoded for _ in range(samples_per_prompt)]
    with seeded(seed, model.device), autocast(model.device, precision):
        sampled = sample_ids(model, tokenizer, rows, sampler, batch_size, progress)
    texts = response_texts(tokenizer, rows, [ids for ids, _ in sampled])
    done = [Completion(text, tuple(ids), end) for text, (ids, end) in zip(texts, sampled, strict=True)]
    return [done[i : i + samples_per_prompt] for i in range(0, len(done), samples_per_prompt)]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for this block only."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _prepared(model) -> Iterator[Any]:
    """Lend the model for sampling: in eval mode, and with no generation settings of its own to fall back on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT adapters live inside it
    training, own = inner.training, inner.generation_config
    inner.generation_config = GenerationConfig()
    inner.eval()
    try:
        with torch.inference_mode():
            yield inner
    finally:
        inner.generation_config = own
        inner.train(training)


def sample_ids(
    model, tokenizer, rows: list[list[int]], sampler: Sampler, batch_size: int, progress: Progress | None = None
) -> list[Sampled]:
    """Continue rows of token ids; the rows come back in their order."""
    stops = stop_ids(model, tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike lengths together: less padding
    result: list[Sampled] = [([], None)] * len(rows)
    with _prepared(model) as lent:
        if len(set(map(len, rows))) > 1:
            _check_padding(lent)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(rows[batch[-1]])
            settings = {"max_new_tokens": sampler.max_new_tokens, "eos_token_id": stops, "use_cache": True}
            new = _continue(lent, [rows[i] for i in batch], width, [sampler], **settings)  # (n, width + new)
            for i, ids in zip(batch, new[:, width:].tolist(), strict=True):
                end = next((t for t, token in enumerate(ids) if token in stops), None)
                result[i] = (ids[:end], None if end is None else ids[end])
            if progress is not None:
                progress(start + len(batch), len(order))
    return result


def _continue(model, rows: list[list[int]], width: int, sampler: list[Sampler], **settings):
    """What `model.generate` gives for rows padded on the left, so that all of them end in the same column."""
    ids = [[PAD] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return model.generate(
        input_ids=torch.tensor(ids, device=model.device),  # (n, width)
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(do_sample=False, pad_token_id=PAD, **settings),  # the sampler draws
        logits_processor=LogitsProcessorList(sampler),
    )


def _check_padding(model) -> None:
    """Refuse a model that reads the padding left of a prompt (RWKV does): it would write what it is not scored on."""
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    padded, alone = (_continue(model, [[1, 2]], width, [], **settings).logits[0].float() for width in (5, 2))
    kind = model.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    if not stats.close(padded, alone, max(64 * torch.finfo(dtype).eps, NOISE)):
        raise ValueError(
            f"{type(model).__name__} reads the padding before a prompt, so prompts of several lengths cannot be sampled "
            "together; give prompts of one length, or another model"
        )


def stop_ids(model, tokenizer) -> list[int]:
    """Every token that ends a text: the tokenizer's EOS first, then those the model names besides.

    Raises:
        ValueError: there is none.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    named = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    if named == [None, None]:
        raise ValueError(
            "neither tokenizer nor model has an EOS token, so no text would end; set the tokenizer's eos_token"
        )
    return list(dict.fromkeys(token for token in named if token is not None))

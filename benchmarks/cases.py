"""Random models and preference pairs of a given shape: everything a contestant may read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from tpo_lib import stats
from tpo_lib.fast.tiles import response_logps
from tpo_lib.models import ResponseReader
from tpo_lib.types import IGNORE, PairBatch, Reading

PROMPT = 5  # tokens, as IMDb prefixes have


@dataclass(frozen=True)
class Shape:
    """The size of a step.

    Attributes:
        vocab: V.
        pairs: B; there are 2B sequences.
        length: T, the longest sequence in tokens.
        ragged: lengths spread evenly from 28% of T to T (60% response positions, 36% padding at T = 128); else all are T.
        layers, width: of the model.
        family: "gpt2" or "llama".
        spread: standard deviation of the embeddings; 0.06 gives logits of about 1, a large one makes softmax underflow.
        device: "cpu" or "cuda"; on CUDA a step runs under bfloat16 autocast.
        inner, kv_heads: a Llama's width between its two projections and its heads for keys; None is 4 d and d / 256.
    """

    vocab: int
    pairs: int = 8
    length: int = 128
    ragged: bool = True
    layers: int = 4
    width: int = 256
    family: str = "gpt2"
    spread: float = 0.06
    device: str = "cpu"
    inner: int | None = None
    kv_heads: int | None = None

    def describe(self) -> str:
        """One line for people."""
        rows = "ragged" if self.ragged else "unpadded"
        return (
            f"{self.family}, {self.layers} layers, d = {self.width}, V = {self.vocab}, "
            f"{self.pairs} pairs, T = {self.length}, {rows}, {'bf16 autocast' if self.device == 'cuda' else 'fp32'}"
        )


@dataclass
class Case:
    """A shape made real: models, batch, and what a cache would hold.

    Attributes:
        policy: trained; ref, guide: frozen, of the same shape with other weights.
        readers: the three of them as ResponseReader, which our paths read.
    """

    shape: Shape
    policy: nn.Module
    ref: nn.Module
    guide: nn.Module | None
    batch: PairBatch
    readers: dict[str, ResponseReader] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What every body takes."""
        return {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask, "use_cache": False}

    @cached_property
    def mask(self) -> Tensor:
        """(N, T-1) bool: response positions."""
        return stats.response_mask(self.batch.labels)

    def read(self, name: str) -> Reading:
        """Hidden states of "policy", "ref" or "guide" at the response positions; frozen models leave no graph."""
        reader = self.readers[name]
        with torch.set_grad_enabled(name == "policy" and torch.is_grad_enabled()):
            return reader(self.batch)

    @cached_property
    def known_states(self) -> Reading:
        """The reference's hidden states, as a cache holds them from the second epoch on."""
        return self.read("ref")

    @cached_property
    def known_logps(self) -> dict[str, Tensor]:
        """(R,) log-probabilities of the response tokens under the frozen models, as a cache holds them."""
        with torch.no_grad():
            return {
                name: response_logps(self.read(name), self.batch.labels) for name in self.readers if name != "policy"
            }

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return dict(self.policy.named_parameters())

    def on(self, batch: PairBatch) -> Case:
        """The same models on another batch."""
        return Case(self.shape, self.policy, self.ref, self.guide, batch, self.readers)


def build(shape: Shape, *, guide: bool = False) -> Case:
    """Make models and batch; the same shape gives the same numbers in every process."""
    device = torch.device(shape.device)
    with device:  # a billion random numbers take a CPU half a minute
        models = [_model(shape, seed) for seed in range(3 if guide else 2)]
    for frozen in models[1:]:
        frozen.requires_grad_(False)
    names = ("policy", "ref", "guide")
    readers = {name: ResponseReader(model) for name, model in zip(names, models, strict=False)}
    return Case(shape, models[0], models[1], models[2] if guide else None, make_batch(shape).to(device), readers)


def make_batch(shape: Shape) -> PairBatch:
    """2B right-padded sequences of random tokens; their lengths are spread evenly, then shuffled."""
    draw = torch.Generator().manual_seed(0)
    n, t = 2 * shape.pairs, shape.length
    lengths = torch.linspace(0.28 * t, t, n) if shape.ragged else torch.full((n,), float(t))
    lengths = lengths.round().long().clamp(min=PROMPT + 1)[torch.randperm(n, generator=draw)]  # (N,)
    ids = torch.randint(0, shape.vocab, (n, t), generator=draw)
    place = torch.arange(t)
    attention = (place < lengths[:, None]).long()  # (N, T)
    labels = torch.where((place >= PROMPT) & attention.bool(), ids, IGNORE)
    return PairBatch(ids * attention, attention, labels, torch.arange(shape.pairs))


def _model(shape: Shape, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocab,
            n_positions=max(shape.length, 16),
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=max(1, shape.width // 64),
            initializer_range=shape.spread,
            bos_token_id=0,
            eos_token_id=0,
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner or 4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.width // 64),
        num_key_value_heads=shape.kv_heads or max(1, shape.width // 256),
        max_position_embeddings=max(shape.length, 16),
        initializer_range=shape.spread / 2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()

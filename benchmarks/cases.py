"""Random models and preference pairs of a given shape: everything a contestant may read."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """The size of a step; on CUDA it runs under bfloat16 autocast."""

    vocab: int  # V
    pairs: int = 8  # B; there are 2B sequences
    length: int = 128  # T, the longest sequence in tokens
    # lengths spread evenly from 28% of T to T (60% response positions, 36% padding at T = 128); else all are T
    ragged: bool = True
    layers: int = 4
    width: int = 256
    family: str = "gpt2"  # or "llama"
    spread: float = 0.06  # of the embeddings: logits of about 1; a large one makes softmax underflow
    device: str = "cpu"  # or "cuda"
    inner: int | None = None  # a Llama's width between its two projections; None is 4 d
    kv_heads: int | None = None  # a Llama's heads for keys; None is d / 256

    @property
    def precision(self) -> str:
        """What a step computes in; the weights are float32."""
        return "bf16" if self.device == "cuda" else "float32"

    def describe(self) -> str:
        """One line for people."""
        rows = "ragged" if self.ragged else "unpadded"
        return (
            f"{self.family}, {self.layers} layers, d = {self.width}, V = {self.vocab}, "
            f"{self.pairs} pairs, T = {self.length}, {rows}, {'bf16 autocast' if self.device == 'cuda' else 'fp32'}"
        )


@dataclass
class Case:
    """A shape made real."""

    shape: Shape
    readers: dict[str, ResponseReader]  # of "policy", which is trained, "ref" and perhaps "guide", frozen
    batch: PairBatch

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models as they are."""
        return {name: reader.model for name, reader in self.readers.items()}

    @property
    def policy(self) -> nn.Module:
        """What is trained."""
        return self.models["policy"]

    @property
    def frozen(self) -> list[str]:
        """Names of the other models."""
        return [name for name in self.readers if name != "policy"]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What every body takes."""
        return {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask, "use_cache": False}

    @cached_property
    def mask(self) -> Tensor:
        """(N, T-1) bool: response positions."""
        return stats.response_mask(self.batch.labels)

    def read(self, name: str) -> Reading:
        """Hidden states of one model at the response positions; frozen models leave no graph."""
        with torch.set_grad_enabled(name == "policy" and torch.is_grad_enabled()):
            return self.readers[name](self.batch)

    @cached_property
    def known_states(self) -> Reading:
        """The reference's hidden states, as a cache holds them from the second epoch on."""
        return self.read("ref")

    @cached_property
    def known_logps(self) -> dict[str, Tensor]:
        """(R,) log-probabilities of the response tokens under the frozen models, as a cache holds them."""
        with torch.no_grad():
            return {name: response_logps(self.read(name), self.batch.labels) for name in self.frozen}

    def gradients(self) -> dict[str, Tensor]:
        """What the last step left in the policy, by parameter."""
        return {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}

    def resized(self, **sizes: int) -> Case:
        """The same models on a batch of another size (pairs, length)."""
        shape = replace(self.shape, **sizes)
        return Case(shape, self.readers, make_batch(shape))


def build(shape: Shape, *, guide: bool = False) -> Case:
    """Make models and batch; the same shape gives the same numbers in every process."""
    with torch.device(shape.device):  # a billion random numbers take a CPU half a minute
        models = {name: make_model(shape, seed) for seed, name in enumerate(("policy", "ref", "guide")[: 2 + guide])}
    case = Case(shape, {name: ResponseReader(model) for name, model in models.items()}, make_batch(shape))
    for name in case.frozen:
        models[name].requires_grad_(False)
    return case


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
    return PairBatch(ids * attention, attention, labels, torch.arange(shape.pairs)).to(torch.device(shape.device))


def make_model(shape: Shape, seed: int) -> nn.Module:
    """A random model in eval mode, on the default device."""
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": shape.vocab, "bos_token_id": 0, "eos_token_id": 0}
    positions, heads = max(shape.length, 16), max(1, shape.width // 64)
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            n_positions=positions, n_embd=shape.width, n_layer=shape.layers, n_head=heads,
            initializer_range=shape.spread, **common,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner or 4 * shape.width, num_hidden_layers=shape.layers,
        num_attention_heads=heads, num_key_value_heads=shape.kv_heads or max(1, shape.width // 256),
        max_position_embeddings=positions, initializer_range=shape.spread / 2, tie_word_embeddings=True, **common,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()

"""Where the memory of an update goes: bytes of every part, from the shapes alone.

Symbols: P parameters, L layers, d hidden size, f size of the MLP, V vocabulary, N = 2B sequences of T tokens, R response
positions, r rank of adapters. Everything is what `train.fit` keeps: weights, gradients and optimizer state in float32,
whatever the precision; "bf16" and "fp16" are autocast, which shortens activations and adds a 16-bit copy of every matrix.
`tests/fast/test_memory.py` holds the numbers against what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpo_lib.fast.tiles import TILE_BYTES
from tpo_lib.losses import OBJECTIVES

FULL, HALF = 4, 2  # bytes of a number
GPUS = {f"{size} GB": size * 10**9 for size in (16, 24, 40, 80)}  # common sizes of a GPU's memory
STATES = {"adamw": 2, "rmsprop": 1}  # numbers a parameter that the optimizer keeps

# What autograd keeps of one layer for backward: bytes a token for each unit of hidden size and of MLP size, where a batch is
# padded. Counted from the tensors that transformers' layers save: (per d, per f), by precision; with adapters on all linear
# layers, whose weights and norms are frozen, also per r.
SAVED = {
    "gpt2": {"no": (8 * FULL, 5 * FULL), "half": (2 * FULL + 6 * HALF, 5 * HALF)},
    "llama": {"no": (10 * FULL, 4 * FULL), "half": (4 * FULL + 9 * HALF, 4 * HALF)},
}
ADAPTED = {
    "gpt2": {"no": (8 * FULL, 5 * FULL, 4 * FULL), "half": (2 * FULL + 7 * HALF, 5 * HALF, 4 * HALF)},
    "llama": {"no": (8 * FULL, 4 * FULL, 7 * FULL), "half": (2 * FULL + 10 * HALF, 4 * HALF, 7 * HALF)},
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model."""

    family: str  # "gpt2" (learned positions, biases, an MLP of two matrices) or "llama" (no biases, an MLP of three)
    layers: int  # L
    hidden: int  # d
    mlp: int  # f
    key_values: int  # width of the keys, and of the values: heads of them times their size (d unless heads share them)
    vocab: int  # V
    positions: int = 0  # rows of GPT-2's table of positions; 0 where there is none
    tied: bool = True  # the head is the embedding

    @property
    def matrices(self) -> int:
        """Numbers in the matrices that autocast copies: those of all layers, and the head."""
        attention = 2 * self.hidden * (self.hidden + self.key_values)
        mlp = (2 if self.family == "gpt2" else 3) * self.hidden * self.mlp
        return self.layers * (attention + mlp) + self.head

    @property
    def head(self) -> int:
        """Numbers in the head: V d."""
        return self.vocab * self.hidden

    def adapters(self, rank: int) -> int:
        """Numbers in low-rank adapters of all linear layers but the head: r (in + out) each."""
        d, kv, f = self.hidden, self.key_values, self.mlp
        attention = 6 * d if self.family == "gpt2" else 6 * d + 2 * kv  # its queries, keys and values are one layer
        return rank * self.layers * (attention + (2 if self.family == "gpt2" else 3) * (d + f))

    @property
    def root(self) -> int:
        """Numbers outside the layers: embeddings, head, last norm."""
        small = 2 * self.hidden + self.positions * self.hidden if self.family == "gpt2" else self.hidden
        return small + self.head * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """P."""
        small = norms = (self.layers * 2 + 1) * self.hidden
        if self.family == "gpt2":  # a norm has two vectors; biases of attention (4 d) and MLP (f + d)
            small = 2 * norms + self.layers * (5 * self.hidden + self.mlp) + self.positions * self.hidden
        return self.matrices + small + (0 if self.tied else self.head)


def from_config(config) -> ModelShape:
    """The shape of a model from its transformers config.

    Raises:
        ValueError: its architecture is neither GPT-2's nor Llama's.
    """
    if config.model_type == "gpt2":
        d = config.n_embd
        return ModelShape("gpt2", config.n_layer, d, config.n_inner or 4 * d, d, config.vocab_size, config.n_positions)
    if config.model_type == "llama":
        width = config.num_key_value_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, width, config.vocab_size)
        return ModelShape("llama", *sizes, tied=config.tie_word_embeddings)
    raise ValueError(f"the memory of a {config.model_type!r} model is not known here; gpt2 and llama are")


SHAPES = {  # from the models' published configs
    "pocket": ModelShape("llama", 4, 224, 608, 224, 4096),
    "GPT-2 small": ModelShape("gpt2", 12, 768, 3072, 768, 50257, positions=1024),
    "GPT-2 large": ModelShape("gpt2", 36, 1280, 5120, 1280, 50257, positions=1024),
    "Llama-3.2-1B": ModelShape("llama", 16, 2048, 8192, 512, 128256),
    "Llama-3.1-8B": ModelShape("llama", 32, 4096, 14336, 1024, 128256, tied=False),
}


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one update, part by part."""

    parts: dict[str, int]  # {part: bytes}, in the order in which they are drawn
    disk: int  # of the caches, for each pair; 0 without caches

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def fits(self) -> dict[str, bool]:
        """{size of a GPU: whether all parts together are at most that}."""
        return {name: self.total <= size for name, size in GPUS.items()}


def step_memory(
    shape: ModelShape,
    *,
    length: int,
    pairs: int,
    objective: str,
    precision: str = "no",
    fused: bool = True,
    cached: bool = False,
    scored: float = 1.0,
    optimizer: str = "adamw",
    lora_rank: int = 0,
    checkpointing: bool = False,
    tile_bytes: int = TILE_BYTES,
    shards: int = 1,
) -> StepMemory:
    """Bytes at the loss of the second of two accumulated passes, where every part is there at once.

    Without accumulation the gradients come as the activations go, and the peak is lower by up to a part. What an allocator
    holds back, a GPU's context and the optimizer's scratch space come on top.

    Args:
        length, pairs: T, prompt and response together, padded; B of one forward pass.
        objective, optimizer: keys of losses.OBJECTIVES and of STATES.
        precision: "no" (float32), "bf16" or "fp16" (autocast).
        fused: tile by tile (`fused.pair_loss`), in tiles of `tile_bytes`; False is the textbook (`ladder.textbook`).
        cached: what the frozen models say comes from disk.
        scored: share of the N T positions that are response tokens, 0 to 1.
        lora_rank: of adapters on all linear layers, beside which the body is read as the reference too; 0 trains all weights.
        checkpointing: layers are computed again in backward, one at a time, when the tiles are gone.
        shards: processes that share weights, gradients, optimizer state and frozen models (FSDP2, `runs/processes.py`); what is
            returned is of one of them.

    Raises:
        ValueError: objective, precision or optimizer is unknown, or a size is out of range.

    Example:
        >>> small = SHAPES["GPT-2 small"]
        >>> plain = step_memory(small, length=512, pairs=8, objective="tdpo2", fused=False)
        >>> plain.parts["vocabulary"] == 7 * 16 * 512 * 50257 * 4
        True
    """
    _check(objective, precision, optimizer, length, pairs, scored)
    rows = 2 * pairs * length  # N T
    read = round(scored * rows)  # R
    frozen = sum(name in OBJECTIVES[objective].needs for name in ("ref_logps", "guide_logps"))
    trained = shape.adapters(lora_rank) if lora_rank else shape.parameters
    parts = {
        "weights": FULL * (shape.parameters + (trained if lora_rank else 0)),
        "16-bit copies": HALF * copied(shape, lora_rank, checkpointing) if precision != "no" else 0,
        "gradients": FULL * trained,
        "optimizer": FULL * STATES[optimizer] * trained,
        "frozen models": FULL * frozen_numbers(shape, objective, cached, lora_rank),
        "activations": rows * activation_bytes(shape, length, precision, lora_rank, checkpointing),
    }
    if fused:
        logits = FULL * shape.vocab * read
        tile = min(logits, max(tile_bytes, logits // pairs))  # a pair is never cut
        with_kl = "kl" in OBJECTIVES[objective].needs
        states = 2 + (frozen if with_kl or not cached else 0)  # the policy's, their gradient, the frozen models'
        parts["hidden states"] = FULL * read * shape.hidden * states
        parts["head's gradient"] = 0 if lora_rank else FULL * shape.head
        copy = tile // 2 if precision != "no" else 0  # of the logits' gradient, for its products
        parts["vocabulary"] = tiles(objective) * tile + copy
    else:
        parts["vocabulary"] = textbook_tensors(objective) * rows * shape.vocab * FULL
    if shards > 1:
        if lora_rank:  # cut, the body that policy and reference share is one for each
            parts["frozen models"] += (
                FULL * shape.parameters * ("ref_logps" in OBJECTIVES[objective].needs and not cached)
            )
        for name in ("weights", "gradients", "optimizer", "frozen models"):
            parts[name] = -(-parts[name] // shards)
        parts["16-bit copies"] = 0  # they are what is gathered
        parts["gathered"] = gathered_bytes(shape, 0 if cached else frozen, precision, trains_root=not lora_rank)
    if checkpointing:  # one layer's come again in backward, when the logits are gone, and gradients of some of them
        flowing = 2 * FULL * (shape.hidden + shape.mlp)
        again = rows * (layer_bytes(shape, length, precision, lora_rank) + flowing)
        parts["activations"] += max(0, again - parts["vocabulary"])
    return StepMemory(parts, disk=cache_bytes(shape, objective) * read // pairs if cached else 0)


def gathered_bytes(shape: ModelShape, frozen: int, precision: str, *, trains_root: bool = True) -> int:
    """Bytes of weights that are whole for a while in every process, and of gradients before they are cut.

    Embeddings, last norm and head of all models (`root`) for the whole update, with a gradient; two layers, for the next one
    comes while one computes, and the gradient of one. Gradients wait in the weights' type, and travel as float32.
    """
    size, layer = FULL if precision == "no" else HALF, (shape.parameters - shape.root) // shape.layers
    root = size * shape.root * (1 + frozen) + (size + FULL) * shape.root * trains_root
    return root + size * 2 * layer + (size + FULL) * layer


def frozen_numbers(shape: ModelShape, objective: str, cached: bool, lora_rank: int) -> int:
    """Numbers that the frozen models have beside the policy's own."""
    needs = OBJECTIVES[objective].needs
    if lora_rank:  # the reference is the body, and the guide adapters on it
        return shape.adapters(lora_rank) if "guide_logps" in needs and not cached else 0
    if cached:
        return shape.head if "kl" in needs else 0
    return shape.parameters * sum(name in needs for name in ("ref_logps", "guide_logps"))


def copied(shape: ModelShape, lora_rank: int, checkpointing: bool) -> int:
    """Numbers of the matrices that autocast has a 16-bit copy of."""
    if lora_rank and checkpointing:  # of a frozen matrix it is kept for backward alone
        return shape.head + (shape.matrices - shape.head) // shape.layers
    return shape.matrices


def textbook_tensors(objective: str) -> int:
    """How many (N, T, V) tensors in float32 are alive at once in `ladder.textbook`.

    Without a KL 3, in backward: log pi, the gradient that comes from the gather, and the one that log_softmax makes of it. With
    it 7, where the KL is formed: both models' logits and log-probabilities, q, log q - log p, and its product with q.
    Autocast does not make them fewer or smaller: softmax and logarithm are taken in float32.
    """
    return 7 if "kl" in OBJECTIVES[objective].needs else 3


def tiles(objective: str) -> int:
    """How many tiles of logits `fused.pair_loss` has: the policy's, and where the KL is read the reference's beside it.

    (A step that is logged reads the KL for every objective that has a reference, and has two.)
    """
    return 2 if "kl" in OBJECTIVES[objective].needs else 1


def activation_bytes(
    shape: ModelShape, length: int, precision: str = "no", lora_rank: int = 0, checkpointing: bool = False
) -> int:
    """Bytes a token that the body keeps for backward, in a padded batch with torch's scaled_dot_product_attention.

    With checkpointing what goes into every layer, and the mask once, a byte a place.
    """
    norm = (1 if lora_rank else 2) * FULL * shape.hidden  # the last one
    if checkpointing:
        return shape.layers * FULL * shape.hidden + norm + length
    return shape.layers * layer_bytes(shape, length, precision, lora_rank) + norm


def layer_bytes(shape: ModelShape, length: int, precision: str, lora_rank: int) -> int:
    """The same of one layer: linear in d, f and r (see SAVED and ADAPTED); the mask, written out, adds T numbers a token."""
    half = "no" if precision == "no" else "half"
    mask = (FULL if precision == "no" else HALF) * length
    per_d, per_f, per_r = ADAPTED[shape.family][half] if lora_rank else (*SAVED[shape.family][half], 0)
    return per_d * shape.hidden + per_f * shape.mlp + per_r * lora_rank + mask


def cache_bytes(shape: ModelShape, objective: str) -> int:
    """Bytes on disk for each response token: one log-probability a frozen model, or for a KL the reference's hidden state.

    A log-probability is one number; the KL needs the whole distribution, V numbers, but it is made from d by the frozen head.
    """
    needs = OBJECTIVES[objective].needs
    if "kl" in needs:
        return FULL * shape.hidden
    return FULL * sum(name in needs for name in ("ref_logps", "guide_logps"))


def _check(objective: str, precision: str, optimizer: str, length: int, pairs: int, scored: float) -> None:
    known = {"objective": (objective, OBJECTIVES), "precision": (precision, ("no", "bf16", "fp16"))}
    for name, (value, allowed) in {**known, "optimizer": (optimizer, STATES)}.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
    if length < 2 or pairs < 1 or not 0 < scored <= 1:
        raise ValueError(f"{length=}, {pairs=}, {scored=}: needed are at least 2 tokens, 1 pair, and a share in (0, 1]")

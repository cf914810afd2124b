"""Where the memory of an update goes: bytes of every part, from the shapes alone.

Symbols: P parameters, L layers, d hidden size, f size of the MLP, V vocabulary, N = 2B sequences of T tokens, R response
positions. Everything is what `train.fit` keeps: weights, gradients and optimizer state in float32, whatever the precision;
"bf16" and "fp16" are autocast, which shortens activations and adds a 16-bit copy of every matrix. `tests/course/test_memory.py`
holds the numbers against what was measured.
"""

from dataclasses import dataclass

from tpo_lib.fast.tiles import TILE_BYTES
from tpo_lib.losses import OBJECTIVES

FULL, HALF = 4, 2  # bytes of a number
GPUS = {f"{size} GB": size * 10**9 for size in (16, 24, 40, 80)}  # common sizes of a GPU's memory
STATES = {"adamw": 2, "rmsprop": 1}  # numbers a parameter that the optimizer keeps

# What autograd keeps of one layer for backward: bytes a token for each unit of hidden size and of MLP size, where a batch is
# padded. Counted from the tensors that transformers' layers save: (per d, per f), by precision.
SAVED = {
    "gpt2": {"no": (8 * FULL, 5 * FULL), "half": (2 * FULL + 6 * HALF, 5 * HALF)},
    "llama": {"no": (10 * FULL, 4 * FULL), "half": (4 * FULL + 9 * HALF, 4 * HALF)},
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
    tile_bytes: int = TILE_BYTES,
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
    needs = OBJECTIVES[objective].needs
    frozen = sum(name in needs for name in ("ref_logps", "guide_logps"))
    kept = shape.parameters if not cached else shape.head if "kl" in needs else 0  # of each frozen model
    autocast = precision != "no"
    parts = {
        "weights": FULL * shape.parameters,
        "16-bit copies": HALF * shape.matrices if autocast else 0,
        "gradients": FULL * shape.parameters,
        "optimizer": FULL * STATES[optimizer] * shape.parameters,
        "frozen models": FULL * kept * frozen,
        "activations": rows * activation_bytes(shape, length, precision),
    }
    if fused:
        logits = FULL * shape.vocab * read
        tile = min(logits, max(tile_bytes, logits // pairs))  # a pair is never cut
        states = 2 + (frozen if not cached or "kl" in needs else 0)  # the policy's, their gradient, the frozen models'
        parts["hidden states"] = FULL * read * shape.hidden * states
        parts["head's gradient"] = FULL * shape.head
        copy = tile // 2 if autocast else 0  # of the logits' gradient, for its products
        parts["vocabulary"] = tiles(objective) * tile + copy
    else:
        parts["vocabulary"] = textbook_tensors(objective) * rows * shape.vocab * FULL
    return StepMemory(parts, disk=cache_bytes(shape, objective) * read // pairs if cached else 0)


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


def activation_bytes(shape: ModelShape, length: int, precision: str = "no") -> int:
    """Bytes a token that the body keeps for backward, in a padded batch with torch's scaled_dot_product_attention.

    Linear in d and f (see SAVED); the mask, written out for every layer, adds T numbers a token.
    """
    per_d, per_f = SAVED[shape.family]["no" if precision == "no" else "half"]
    mask = (FULL if precision == "no" else HALF) * length
    return shape.layers * (per_d * shape.hidden + per_f * shape.mlp + mask) + 2 * FULL * shape.hidden


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

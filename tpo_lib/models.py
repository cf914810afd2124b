"""Policies, references and guides: freezing them, and reading them at response positions only (`files.load` loads them).

Dropout is off everywhere: a policy with dropout would differ from its reference before the first step.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import timeit
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tpo_lib import stats
from tpo_lib.files import adapters
from tpo_lib.types import Head, PairBatch, Reading

NO_MATHS = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def choose_device(name: str | None = None) -> torch.device:
    """Return the named device, or CUDA where it is, else the CPU. MPS is taken by name alone: nothing here was tried on it.

    Raises:
        ValueError: it is not here.
    """
    here = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    if name is not None:
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:  # torch's own words are a page
            raise ValueError(f"device {name!r} is not here; choose {' or '.join(here[::-1])}") from error
    return torch.device(name or here[0])


def choose_precision(device: torch.device, name: str | None = None) -> str:
    """Return "no", "bf16" or "fp16" for accelerate: bf16 on GPUs that have it, fp16 on older ones, float32 elsewhere.

    "auto" takes bf16 on a CPU, too, where a matrix product of a small model's size is measured to be half as fast again in it;
    most CPUs only imitate it, and are slower.

    Raises:
        ValueError: fp16 is asked for on a device other than CUDA (gradients would need a loss scaler that exists there only).
    """
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, this run is on {device}; use bf16 or no")
    if name == "auto" and device.type == "cpu":
        return "bf16" if _cpu_speedup() > 1.5 else "no"
    if name not in (None, "auto") or device.type != "cuda":
        return "no" if name in (None, "auto") else name
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@functools.cache
def _cpu_speedup() -> float:
    """How many times as fast as float32 this CPU multiplies in bf16."""

    def best(dtype: torch.dtype) -> float:
        a, b = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)  # a layer of SmolLM2-135M
        return min(timeit.repeat(lambda: a @ b, number=5, repeat=9))

    return best(torch.float32) / best(torch.bfloat16)


def autocast(device: torch.device, precision: str):
    """The context in which a model computes in "bf16" or "fp16"; for "no" one that does nothing."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def frozen_copy(model):
    """Return a copy that no gradient reaches: the reference of a policy, or the guide after its training."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def fingerprint(model: nn.Module | dict[str, Tensor]) -> str:
    """SHA-256 over all weights (names, shapes, types, bytes) and what the configuration says beside its defaults.

    Equal if and only if the models compute the same; where a model came from, its type on disk and the ids of its special
    tokens, which belong to the tokenizer, are left out. An adapter that is not merged counts with its scale.
    """
    digest = hashlib.sha256()
    if hasattr(model, "config"):
        said = json.loads(model.config.to_json_string()).items()
        said = {name: value for name, value in said if name not in NO_MATHS and not name.endswith("_token_id")}
        said |= {name: adapters.meaning(config.to_dict()) for name, config in getattr(model, "peft_config", {}).items()}
        as_json = json.dumps(said, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        digest.update(as_json.encode())
    for name, tensor in sorted((model if isinstance(model, dict) else model.state_dict()).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_content(tokenizer) -> Any:
    """What decides how a tokenizer encodes, as JSON takes it; padding and truncation, which calls set, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
    content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return [content, tokenizer.special_tokens_map]


# ---- what a model takes


def most_tokens(config) -> float:
    """The longest sequence that a model of this configuration was made to read: its positions; infinite without any."""
    config = config.get_text_config()
    # rope computes beyond its positions too, but nobody trained it there
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "context_length")]
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):  # one, or one a type of layer
        if rope.get("rope_type") == "longrope":
            # beyond, it turns all positions of a batch otherwise: a sequence's values would depend on its neighbours
            limits.append(rope.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit and limit > 0), default=math.inf)


def vocabulary(model) -> int:
    """Number of ids that a model has both an embedding and a logit for."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(len(layer.weight) for layer in layers if layer is not None)


def check_sequences(
    model, sequences: Iterable[tuple[str, Sequence[int]]], *, name: str = "model", room: int = 0
) -> None:
    """Refuse ids and lengths that a model has no embedding, logit or position for, before it reads them.

    Args:
        sequences: what each is called, and its token ids.
        name: what the model is called in the message.
        room: tokens that will be sampled behind every sequence.

    Raises:
        ValueError: names the first such sequence and what it takes.
    """
    vocab, most = vocabulary(model), most_tokens(model.config)
    for place, ids in sequences:
        if len(ids) + room > most:
            sampled = f" and {room} to be sampled" if room else ""
            fix = "max_new_tokens or shorten the prompt" if room else "max_length"
            raise ValueError(
                f"{place} has {len(ids)} tokens{sampled}, but the {name} has {most} positions; lower {fix}, or take a model "
                "with more positions"
            )
        if ids and not 0 <= min(ids) <= max(ids) < vocab:
            column = next(i for i, token in enumerate(ids) if not 0 <= token < vocab)
            raise ValueError(
                f"{place}, column {column} holds token id {ids[column]}, but the {name} has the ids 0 to {vocab - 1}: "
                "tokenizer and model do not belong together"
            )


def check_pairs(model, *tables: Iterable, name: str = "model", policy=None) -> None:
    """`check_sequences` for tables of encoded pairs; with a policy, also that both have equally many logits."""
    if policy is not None and vocabulary(model) != vocabulary(policy):
        raise ValueError(
            f"the {name} has a vocabulary of {vocabulary(model)}, the policy of {vocabulary(policy)}; there is no KL between "
            f"them, nor one tokenizer; take the {name} that belongs to the policy (see resize_token_embeddings)"
        )
    most = most_tokens(model.config), vocabulary(model)  # what lies beyond, `fast.table` knows without making its pairs
    pairs = chain.from_iterable(table.beyond(*most) if hasattr(table, "beyond") else table for table in tables)
    sides = ((pair, side) for pair in pairs for side in ("chosen", "rejected"))
    rows = ((f"row {pair.row} ({side})", [*pair.prompt_ids, *getattr(pair, f"{side}_ids")]) for pair, side in sides)
    check_sequences(model, rows, name=name)


class ResponseReader(nn.Module):
    """A causal language model whose forward reads response positions only: their hidden states, and the head for them.

    Most positions of a padded batch are prompt or padding; skipping the head there is exact and saves its largest matrix
    product. It is one module with one forward, so wrappers such as DistributedDataParallel see everything that runs.

    What a model does to its logits after the head is read from its config (Gemma 2 caps them, Cohere and Granite scale
    them) and then tried on four tokens. Where that does not give the model's own logits, `understood` is False and the
    model's full forward is used.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT adapters live inside it
        self._parts = inner.base_model, inner.get_output_embeddings()  # a tuple: no weight is registered twice
        config = inner.config
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self.vocab, self.most_tokens = vocabulary(inner), most_tokens(config)
        self.mostly_full = 0.9  # reading by quarters saves less than a tenth of the positions: not worth four calls
        self.understood = self._probe()

    @property
    def head(self) -> Head:
        """The head as it is now."""
        layer = self._parts[1]
        return Head(layer.weight, layer.bias, self._scale, self._softcap)

    @torch.no_grad()
    def _probe(self) -> bool:
        """Whether the head gives the model's own logits; ValueError where these are none of a causal model."""
        body, layer = self._parts
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=self.model.device)
        expected = self.model(input_ids=ids, use_cache=False)["logits"].float()
        tolerance = 16 * torch.finfo(self.model.dtype).eps
        close = partial(stats.close, tolerance=tolerance, rtol=tolerance)
        name, positions = type(self.model).__name__, expected.shape[1]
        if positions != 4:
            raise ValueError(f"{name} gives logits at {positions} positions for 4 tokens: it reads a prompt of its own")
        if not close(*expected[:, :3]):
            raise ValueError(
                f"{name} looks ahead: its logits depend on the tokens that follow, so it gives no probability of a text; take "
                "a causal language model"
            )
        if body is self.model or type(layer) is not nn.Linear:
            return False
        return close(self.head.logits(body(input_ids=ids, use_cache=False)[0]).float(), expected)

    def forward(self, batch: PairBatch) -> Reading:
        """Read the R positions of `stats.response_mask(batch.labels)`, in its order; ids where attention_mask is 0 are not read.

        Raises:
            ValueError: as `check_sequences` and `stats.response_mask`.
        """
        mask = stats.response_mask(batch.labels)  # (N, T-1)
        # padding may be an id that the model does not have
        input_ids = batch.input_ids.masked_fill(batch.attention_mask == 0, 0)
        low, high = torch.stack(input_ids.aminmax()).tolist()
        if low < 0 or high >= self.vocab or input_ids.shape[1] > self.most_tokens:
            check_sequences(self.model, ((f"sequence {i}", ids) for i, ids in enumerate(input_ids.tolist())))
        if not self.understood:
            output = self.model(input_ids=input_ids, attention_mask=batch.attention_mask, use_cache=False)
            return Reading(output["logits"][:, :-1][mask], None)
        states = self.states(replace(batch, input_ids=input_ids))
        return Reading(states[:, :-1][mask], self.head)

    def states(self, batch: PairBatch) -> Tensor:
        """(N, T, d) hidden states; on a CPU, much padded batches are read in quarters of similar length."""
        input_ids, attention_mask = batch.input_ids, batch.attention_mask
        body, (n, t) = partial(self._parts[0], use_cache=False), input_ids.shape
        lengths = attention_mask.sum(1)
        order = lengths.argsort()
        groups = order.split(-(-n // 4)) if input_ids.device.type == "cpu" else (order,)
        if len(groups) == 1 or sum(len(g) * lengths[g].max() for g in groups) > self.mostly_full * n * t:
            return body(input_ids=input_ids, attention_mask=attention_mask)[0]
        parts = []
        for rows in groups:
            longest = int(lengths[rows].max())
            states = body(input_ids=input_ids[rows, :longest], attention_mask=attention_mask[rows, :longest])[0]
            parts.append(nn.functional.pad(states, (0, 0, 0, t - longest)))  # (group, T, d)
        return torch.cat(parts)[order.argsort()]

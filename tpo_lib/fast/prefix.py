"""Read once what a batch holds several times: a sequence that stands in several pairs, and the prompt of several responses.

Of a prompt with four completions come six pairs, twelve sequences of which four are different: `DistinctReader` reads these.

The responses of a prompt as sequences of their own read it each. As one sequence [prompt, response, response, ...] it is read
once, if

- every token of a response has the position that it has in its own sequence (Lp, Lp + 1, ...), and
- attention lets it see the prompt and its own response up to itself, not the other ones; in layers with a window (Mistral,
  Gemma 2 and 3, Phi-3, Qwen) as much of them as the window shows in its own sequence.

Then every hidden state is what it was. The state that predicts the first token of a response is the prompt's last one, for all
of them. It pays where prompts are long beside their responses (chat data). Prompts that are short share a row, as strangers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpo_lib.models import ResponseReader
from tpo_lib.stats import response_mask
from tpo_lib.types import IGNORE, PairBatch, Reading

# Families whose bodies take positions and masks from outside, and whose windows their configuration tells; each is tested.
# Not among them: GPT-Neo (its window counts places, not positions), ALiBi (so do its biases), layers that recur (Mamba, RWKV).
# fmt: off
FAMILIES = {
    "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj",
    "granite", "llama", "ministral", "mistral", "mixtral", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
}
# fmt: on


REFUSED = "share_prefix does not work with {} ({}); train without it"


class DistinctReader(ResponseReader):
    """A ResponseReader that reads each different sequence of a batch once."""

    def forward(self, batch: PairBatch) -> Reading:
        """As of a ResponseReader; `rows` says which positions have the same state."""
        ids = batch.input_ids.masked_fill(batch.attention_mask == 0, -1)
        seen: dict[tuple, int] = {}
        twin = [
            seen.setdefault(tuple(row), len(seen)) for row in torch.cat([ids, batch.labels], 1).tolist()
        ]  # N numbers
        if len(seen) == len(twin):
            return super().forward(batch)
        first = [twin.index(i) for i in range(len(seen))]
        few = PairBatch(batch.input_ids[first], batch.attention_mask[first], batch.labels[first], batch.rows)
        reading = super().forward(few)
        mask = response_mask(few.labels)  # (distinct, T-1)
        number = torch.zeros_like(mask, dtype=torch.long)
        number[mask] = torch.arange(len(reading.states), device=mask.device)
        return Reading(reading.states, reading.head, number[twin][mask[twin]])


class SharedReader(DistinctReader):
    """A DistinctReader that reads the responses to a prompt behind one prompt; errors are those of `layer_windows`."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self._windows = layer_windows(model.config)
        self._check()

    def states(self, batch: PairBatch) -> Tensor:
        """(N, T, d) hidden states."""
        return shared_states(self._parts[0], self._windows, batch)

    @torch.no_grad()
    def _check(self) -> None:
        """Five tokens, against what a version of transformers might change: windows are taken from the configuration."""
        ids = torch.tensor([[1, 2, 3, 4, 0], [1, 2, 5, 6, 7]], device=self.model.device)
        mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], device=self.model.device)
        labels = ids.masked_fill(mask == 0, IGNORE).index_fill(1, torch.tensor([0, 1], device=ids.device), IGNORE)
        batch = PairBatch(ids, mask, labels, ids[:1, 0])
        plain = super().states(batch)[mask == 1]
        try:
            same = self.understood and torch.allclose(plain, self.states(batch)[mask == 1], rtol=1e-3, atol=1e-3)
            reason = "its hidden states come out different"
        except (TypeError, ValueError, RuntimeError) as error:
            same, reason = False, f"{type(error).__name__}: {error}"
        if not same:
            raise ValueError(REFUSED.format(type(self.model).__name__, reason))


@dataclass(frozen=True)
class SharedBatch:
    """N sequences as S rows of L tokens: a prompt and its responses, and behind them, where there is room, other ones."""

    input_ids: Tensor  # (S, L) int64
    position_ids: Tensor  # (S, L) int64: positions in the token's own sequence
    visible: Tensor  # (S, 1, L, L) bool: which position may look at which
    row: Tensor  # (N,) int64: the row of every sequence
    where: Tensor  # (N, T) int64: the place in its row of every position of a sequence; -1 for padding


def share(batch: PairBatch) -> SharedBatch:
    """Lay N sequences out with one prompt for all that begin with it; rows are as long as the longest prompt with its own."""
    device, (n, t) = batch.labels.device, batch.labels.shape
    ids, lengths = batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist()
    prompts = (
        response_mask(batch.labels).int().argmax(1) + 1
    ).tolist()  # a response's first place is the prompt's length
    groups: dict[tuple, list[int]] = {}
    for i in range(n):
        groups.setdefault(tuple(ids[i][: prompts[i]]), []).append(i)
    sizes = {prompt: len(prompt) + sum(lengths[i] - len(prompt) for i in own) for prompt, own in groups.items()}
    room, rows = max(sizes.values()), []  # of (token, position, prompt's number, response's number or -1 in the prompt)
    row, where = [0] * n, torch.full((n, t), -1)
    for prompt in sorted(groups, key=sizes.get, reverse=True):  # the longest first, each into the first row with room
        at = next((k for k, row_ in enumerate(rows) if len(row_) + sizes[prompt] <= room), len(rows))
        rows += [[]] if at == len(rows) else []
        start, own = len(rows[at]), groups[prompt]
        rows[at] += [(token, place, own[0], -1) for place, token in enumerate(prompt)]
        for i in own:
            row[i], end = at, len(rows[at])
            where[i, : len(prompt)] = torch.arange(start, start + len(prompt))
            where[i, len(prompt) : lengths[i]] = torch.arange(end, end + lengths[i] - len(prompt))
            rows[at] += [(ids[i][place], place, own[0], i) for place in range(len(prompt), lengths[i])]
    length = max(map(len, rows))
    laid = torch.tensor([row_ + [(0, 0, -1, -1)] * (length - len(row_)) for row_ in rows], device=device)  # (S, L, 4)
    tokens, own, group, response = laid.unbind(-1)  # (S, L)
    place = torch.arange(length, device=device)
    same = (response[:, None] == response[..., None]) | (response[:, None] == -1)  # (S, L, L), of what may be looked at
    visible = (place[:, None] >= place) & (group[:, None] == group[..., None]) & same
    return SharedBatch(tokens, own, visible[:, None], torch.tensor(row, device=device), where.to(device))


def layer_windows(config) -> dict[str | None, int | None]:
    """How far each type of layer looks back, from a model's configuration: {type: positions, or None for all of them}.

    The type None stands for all layers of a model that does not tell its layers apart.

    Raises:
        ValueError: prompts cannot be shared in this architecture; the message says why.
    """
    kinds, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    attention = getattr(config, "_attn_implementation", None) or "eager"
    if config.model_type not in FAMILIES or getattr(config, "use_bidirectional_attention", False):
        reason = f"its attention is not known to be causal and free of its tokens' places; it is in {', '.join(sorted(FAMILIES))}"
    elif kinds - {"full_attention", "sliding_attention"}:
        reason = f"it has layers of {', '.join(sorted(kinds))}"
    elif attention not in ("eager", "sdpa"):
        reason = f"{attention} takes no mask of ours; load it with attn_implementation='sdpa'"
    else:
        return {"full_attention": None, "sliding_attention": window} if kinds else {None: window}
    raise ValueError(REFUSED.format(config.model_type, reason))


def shared_states(body, windows: dict, pairs: PairBatch) -> Tensor:
    """(N, T, d) hidden states of a body with these `layer_windows`, prompts read once; padding gets another position's."""
    batch, kind = share(pairs), next(body.parameters()).dtype
    place, masks = batch.position_ids, {}
    back = place[:, None, :, None] - place[:, None, None, :]  # (S, 1, L, L), in the own sequence
    for layer, window in windows.items():
        hidden = ~batch.visible if window is None else ~(batch.visible & (back < window))
        masks[layer] = torch.zeros_like(back, dtype=kind).masked_fill_(hidden, torch.finfo(kind).min)
    mask = masks.get(None, masks)
    states = body(input_ids=batch.input_ids, attention_mask=mask, position_ids=place, use_cache=False)[0]  # (S, L, d)
    return states[batch.row[:, None], batch.where.clamp(min=0)]  # (N, T, d)

"""Read the prompt of a pair once: [prompt, chosen, rejected] as one sequence in which the responses do not see each other.

A pair as two sequences reads its prompt twice. As one sequence of Lp + Lc + Lr tokens it is read once, if

- every token of the rejected response has the position that it has in its own sequence (Lp, Lp + 1, ...), and
- attention lets it see the prompt and the rejected response up to itself, not the chosen one; in layers with a window
  (Mistral, Gemma 2 and 3, Phi-3, Qwen) as much of them as the window shows in its own sequence.

Then every hidden state is what it was. The state that predicts the first token of a response is the prompt's last one,
for both. It pays where prompts are long beside their responses (chat data): positions drop from 2 Lp + Lc + Lr to Lp + Lc + Lr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpo_lib.models import ResponseReader
from tpo_lib.stats import response_mask
from tpo_lib.types import IGNORE, PairBatch

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


class SharedReader(ResponseReader):
    """A ResponseReader that reads the two responses of a pair behind one prompt; errors are those of `layer_windows`."""

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
    """B pairs as B sequences of S tokens."""

    input_ids: Tensor  # (B, S) int64: prompt, chosen, rejected, padding
    position_ids: Tensor  # (B, S) int64: positions in the pair's own two sequences
    visible: Tensor  # (B, 1, S, S) bool: which position may look at which
    where: Tensor  # (N, T) int64: the place in its row of every position of the two-sequence layout; -1 for padding


def share(batch: PairBatch) -> SharedBatch:
    """Lay B pairs out with one prompt each; ValueError names a pair that begins with two."""
    input_ids, attention_mask, labels = batch.input_ids, batch.attention_mask, batch.labels
    b, device = len(labels) // 2, labels.device
    lengths = attention_mask.sum(1)  # (N,)
    prompts = response_mask(labels).int().argmax(1) + 1  # (N,) the first response token's place is the prompt's length
    column = torch.arange(labels.shape[1], device=device)  # (T,)
    prompt = torch.minimum(prompts[:b], prompts[b:])[:, None]  # (B, 1)
    same = (input_ids[:b] == input_ids[b:]) | (column >= prompt)
    bad = ((prompts[:b] != prompts[b:]) | ~same.all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"pair {bad[0]} of the batch has two prompts, not one to share; train without share_prefix")
    chosen_end = lengths[:b, None]  # (B, 1), where the rejected response begins
    ends = chosen_end + lengths[b:, None] - prompt  # (B, 1)
    where = column.expand(len(labels), -1).clone()  # (N, T)
    where[b:] += torch.where(column >= prompt, chosen_end - prompt, 0)
    where[attention_mask == 0] = -1
    place = torch.arange(int(ends.max()), device=device)  # (S,)
    rejected = place >= chosen_end  # (B, S)
    own = torch.where(rejected, place - chosen_end + prompt, place)  # (B, S) positions in the own sequence
    own = own.clamp(max=labels.shape[1] - 1)  # past the end: padding, which nobody looks at
    tokens = torch.where(rejected, input_ids[b:].gather(1, own), input_ids[:b].gather(1, own))
    hidden = rejected[:, :, None] & ~rejected[:, None, :] & (place >= prompt)[:, None, :]  # rejected -> chosen response
    visible = (place[:, None] >= place) & ~hidden  # (B, S, S)
    return SharedBatch(tokens, own, visible[:, None], where)


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
    back = place[:, None, :, None] - place[:, None, None, :]  # (B, 1, S, S), in the own sequence
    for layer, window in windows.items():
        hidden = ~batch.visible if window is None else ~(batch.visible & (back < window))
        masks[layer] = torch.zeros_like(back, dtype=kind).masked_fill_(hidden, torch.finfo(kind).min)
    mask = masks.get(None, masks)
    states = body(input_ids=batch.input_ids, attention_mask=mask, position_ids=place, use_cache=False)[0]  # (B, S, d)
    row = torch.arange(len(pairs.rows), device=back.device).repeat(2)[:, None]  # (N, 1)
    return states[row, batch.where.clamp(min=0)]  # (N, T, d)

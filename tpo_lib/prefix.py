"""Read the prompt of a pair once: [prompt, chosen, rejected] as one sequence in which the responses do not see each other.

A pair as two sequences reads its prompt twice. As one sequence of Lp + Lc + Lr tokens it is read once, if

- every token of the rejected response has the position that it has in its own sequence (Lp, Lp + 1, ...), and
- attention lets it see the prompt and the rejected response up to itself, not the chosen one.

Then every hidden state is what it was. The state that predicts the first token of a response is the prompt's last one,
for both. It pays where prompts are long beside their responses (chat data): positions drop from 2 Lp + Lc + Lr to Lp + Lc + Lr.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpo_lib.stats import response_mask


@dataclass(frozen=True)
class SharedBatch:
    """B pairs as B sequences of S tokens.

    Attributes:
        input_ids: (B, S) int64, prompt, chosen, rejected, padding.
        position_ids: (B, S) int64, positions in the pair's own two sequences.
        visible: (B, 1, S, S) bool, which position may look at which.
        where: (N, T) int64, the place in its row of every position of the two-sequence layout; -1 for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    where: Tensor


def share(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SharedBatch:
    """Lay B pairs out with one prompt each.

    Args:
        input_ids, attention_mask, labels: (N, T) int64 as in PairBatch, right-padded, all chosen first.

    Raises:
        ValueError: the two sequences of a pair begin with different prompts; the message names the pair.
    """
    b, device = len(labels) // 2, labels.device
    lengths = attention_mask.sum(1)  # (N,)
    prompts = response_mask(labels).int().argmax(1) + 1  # (N,) the first response token's place is the prompt's length
    column = torch.arange(labels.shape[1], device=device)  # (T,)
    prompt = torch.minimum(prompts[:b], prompts[b:])[:, None]  # (B, 1)
    same = (input_ids[:b] == input_ids[b:]) | (column >= prompt)
    bad = ((prompts[:b] != prompts[b:]) | ~same.all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"pair {bad[0]} of the batch has two prompts, so they cannot be shared; train without share_prefix"
        )
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


def shared_states(body, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """(N, T, d) hidden states of a transformers body, every prompt read once; padding gets those of some other position.

    The body must take a 4-D attention mask and position ids, as the decoders of transformers do.
    """
    batch = share(input_ids, attention_mask, labels)
    kind = next(body.parameters()).dtype
    mask = torch.zeros(batch.visible.shape, dtype=kind, device=labels.device).masked_fill_(
        ~batch.visible, torch.finfo(kind).min
    )
    states = body(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)[
        0
    ]  # (B, S, d)
    b = len(labels) // 2
    row = torch.arange(b, device=labels.device).repeat(2)[:, None]  # (N, 1)
    return states[row, batch.where.clamp(min=0)]  # (N, T, d)

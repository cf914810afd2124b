"""The records that flow through the library: PairBatch -> Reading -> TokenStats -> LossOutput.

Shapes: B pairs, N = 2B sequences (all chosen first, then all rejected), T tokens, V vocabulary entries, R response tokens of
all sequences together. Where there is no rejected side (SFT can do without), N = B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # label of every position that is not scored: prompt and padding
PAD = 0  # id of padding where none is asked for: any will do, for nothing reads it


@dataclass(frozen=True)
class PairBatch:
    """B tokenized preference pairs as 2B right-padded sequences, chosen first."""

    input_ids: Tensor  # (N, T) int64 token ids, prompt followed by response
    attention_mask: Tensor  # (N, T) int64, 1 on tokens, 0 on padding
    labels: Tensor  # (N, T) int64, the token id on response positions, -100 elsewhere; not shifted
    rows: Tensor  # (B,) int64, the row of each pair in its table

    @property
    def paired(self) -> bool:
        """Whether it has a rejected side."""
        return len(self.labels) > len(self.rows)

    def to(self, device) -> PairBatch:
        """The same batch on another device."""
        return PairBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Head:
    """The last layer of a language model: logits = cap * tanh(x / cap) of x = scale * (h W^T + b)."""

    weight: Tensor  # (V, d)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0  # Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`
    softcap: float | None = None  # Gemma 2's `final_logit_softcapping`; None caps nothing

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) hidden states -> (..., V)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Reading:
    """What a model says at R response positions, in the order of `stats.response_mask`."""

    states: Tensor  # (R, d) hidden states after the last norm; (R, V) logits where head is None
    head: Head | None  # what turns them into logits
    rows: Tensor | None = None  # (R,) int64, the row of `states` that each position has, where several have the same

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return self.states.shape[-1] if self.head is None else len(self.head.weight)

    def logits(self) -> Tensor:
        """(R, V) logits, all of them at once."""
        states = self.states if self.rows is None else self.states[self.rows]
        return states if self.head is None else self.head.logits(states)


@dataclass(frozen=True)
class TokenStats:
    """What the objectives need to know about every response token, in nats.

    Column t scores token t+1 of the sequence and is exactly 0 where `mask` is False. None is what was not asked for.
    """

    logps: Tensor  # (N, T-1) log pi_theta(y^t | s_t)
    ref_logps: Tensor | None  # (N, T-1) log pi_ref(y^t | s_t); SFT and SimPO need none
    mask: Tensor  # (N, T-1) bool, True on response tokens
    kl: Tensor | None = None  # (N, T-1) KL(pi_ref(.|s_t) || pi_theta(.|s_t)) over the vocabulary, >= 0 up to rounding
    guide_logps: Tensor | None = None  # (N, T-1) log pi_hat(y^t | s_t) of the frozen DPO model that guides TGDPO
    rewards: Tensor | None = None  # (N, T-1) a reward of every token as data, in the place of a guide
    weights: Tensor | None = None  # (N, T-1) a weight of every token as data

    def map(self, fn: Callable[..., Tensor], *others: TokenStats) -> TokenStats:
        """Apply `fn` to every field that is there, with the same field of `others` behind it.

        Example:
            >>> stats = TokenStats(torch.zeros(4, 2), None, torch.ones(4, 2, dtype=torch.bool))
            >>> stats.map(lambda field: field[:2]).mask.shape
            torch.Size([2, 2])
            >>> stats.map(lambda *fields: torch.cat(fields), stats).logps.shape
            torch.Size([8, 2])
        """
        fields = {name: [getattr(each, name) for each in (self, *others)] for name in self.__dataclass_fields__}
        return TokenStats(**{name: None if values[0] is None else fn(*values) for name, values in fields.items()})


@dataclass(frozen=True)
class LossOutput:
    """An objective's value on B pairs."""

    loss: Tensor  # (B,) nats, differentiable; the loop takes the mean over pairs
    chosen_reward: Tensor  # (B,) implicit reward of the chosen response under this very objective, detached
    rejected_reward: Tensor | None  # (B,) the same of the rejected response; None where there is none
    token_weights: Tensor | None = None  # (N, T-1) TGDPO's f(r_hat) on response tokens (chosen first), 0 off-mask

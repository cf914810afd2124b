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
    """B tokenized preference pairs as 2B right-padded sequences, chosen first.

    Attributes:
        input_ids: (N, T) int64 token ids, prompt followed by response.
        attention_mask: (N, T) int64, 1 on tokens, 0 on padding.
        labels: (N, T) int64, the token id on response positions, -100 elsewhere. Not shifted.
        rows: (B,) int64, the row of each pair in its table.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor

    @property
    def paired(self) -> bool:
        """Whether it has a rejected side."""
        return len(self.labels) > len(self.rows)

    def to(self, device) -> PairBatch:
        """Return the same batch on another device."""
        return PairBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Head:
    """The last layer of a language model: logits = cap * tanh(x / cap) of x = scale * (h W^T + b).

    Attributes:
        weight: (V, d).
        bias: (V,) or None.
        scale: Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`.
        softcap: Gemma 2's `final_logit_softcapping`; None caps nothing.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) hidden states -> (..., V)."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class Reading:
    """What a model says at R response positions, in the order of `stats.response_mask`.

    Attributes:
        states: (R, d) hidden states after the last norm; (R, V) logits where head is None.
        head: what turns them into logits.
    """

    states: Tensor
    head: Head | None

    @property
    def vocab(self) -> int:
        """Number of logits."""
        return self.states.shape[-1] if self.head is None else len(self.head.weight)

    def logits(self) -> Tensor:
        """(R, V) logits, all of them at once."""
        return self.states if self.head is None else self.head.logits(self.states)


@dataclass(frozen=True)
class TokenStats:
    """What the objectives need to know about every response token, in nats.

    Column t of every field scores token t+1 of the sequence and is exactly 0 where `mask` is False.

    Attributes:
        logps: (N, T-1) log pi_theta(y^t | s_t).
        ref_logps: (N, T-1) log pi_ref(y^t | s_t); None where no reference was given (SFT and SimPO need none).
        mask: (N, T-1) bool, True on response tokens.
        kl: (N, T-1) KL(pi_ref(.|s_t) || pi_theta(.|s_t)) over the whole vocabulary, >= 0 up to rounding; None if
            not asked for.
        guide_logps: (N, T-1) log pi_hat(y^t | s_t) of the frozen DPO model that guides TGDPO; None if not given.
    """

    logps: Tensor
    ref_logps: Tensor | None
    mask: Tensor
    kl: Tensor | None = None
    guide_logps: Tensor | None = None

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
    """An objective's value on B pairs.

    Attributes:
        loss: (B,) nats, differentiable. The loop takes the mean over pairs.
        chosen_reward: (B,) implicit reward of the chosen response under this very objective, detached.
        rejected_reward: (B,) the same for the rejected response, detached; None where there is none.
        token_weights: (N, T-1) TGDPO's f(r_hat) on every response token (chosen first), 0 off-mask; else None.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor | None
    token_weights: Tensor | None = None

"""Exercises of 08_scale.ipynb: bytes, the logits' gradient from two numbers, a softmax in tiles, batches by tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from tpo_course.exercise import Case, Chapter

NOTEBOOK = "08_scale.ipynb"
chapter = Chapter(__file__)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 1. how many bytes


def _bytes_cases() -> tuple[Case, ...]:
    return (
        Case({"pairs": 8, "length": 128, "vocab": 50257, "with_kl": True}, "TDPO on GPT-2's vocabulary"),
        Case({"pairs": 32, "length": 512, "vocab": 128256, "with_kl": False}, "DPO on Llama 3's vocabulary"),
        Case({"pairs": 1, "length": 2, "vocab": 3, "with_kl": True}, "a tiny batch"),
    )


def _bytes(pairs: int, length: int, vocab: int, with_kl: bool) -> int:
    return (7 if with_kl else 3) * 2 * pairs * length * vocab * 4


vocabulary_bytes = chapter.exercise(
    "vocabulary_bytes",
    right=_bytes,
    cases=_bytes_cases,
    mistakes={
        "half": lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, with_kl) // 2,
        "one_tensor": lambda pairs, length, vocab, with_kl: 2 * pairs * length * vocab * 4,
        "numbers_not_bytes": lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, with_kl) // 4,
        "counts_swapped": lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, not with_kl),
        "always_with_kl": lambda pairs, length, vocab, with_kl: _bytes(pairs, length, vocab, True),
    },
)


# ---- 2. dL/dz from g and k


def _gradient_cases() -> tuple[Case, ...]:
    def case(rows: int, vocab: int, seed: int, words: str = "", with_kl: bool = True) -> Case:
        given = {"logits": _normal(rows, vocab, seed=seed), "ref_logits": _normal(rows, vocab, seed=seed + 1)}
        given["targets"] = torch.arange(rows) * 3 % vocab
        given["g"] = _normal(rows, seed=seed + 2)
        given["k"] = _normal(rows, seed=seed + 3) * with_kl
        return Case(given, words)

    return (
        case(4, 7, 0),
        case(5, 5, 10, "as many positions as tokens"),
        case(3, 6, 20, "an objective without KL", False),
    )


def _gradient(logits: Tensor, ref_logits: Tensor, targets: Tensor, g: Tensor, k: Tensor, dim: int = -1) -> Tensor:
    p, q = logits.softmax(dim), ref_logits.softmax(dim)
    return g[:, None] * (_one_hot(logits, targets) - p) + k[:, None] * (p - q)


def _one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, targets[:, None], 1.0)


logit_gradient = chapter.exercise(
    "logit_gradient",
    right=_gradient,
    cases=_gradient_cases,
    mistakes={
        "first_sign": lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, -g, k),
        "second_sign": lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, -k),
        "no_target": lambda logits, ref_logits, targets, g, k: (
            _gradient(logits, ref_logits, targets, g, k) - g[:, None] * _one_hot(logits, targets)
        ),
        "no_normaliser": lambda logits, ref_logits, targets, g, k: (
            _gradient(logits, ref_logits, targets, g, k) + g[:, None] * logits.softmax(-1)
        ),
        "no_kl": lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, 0 * k),
        "exchanged": lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, k, g),
        "over_positions": lambda logits, ref_logits, targets, g, k: _gradient(logits, ref_logits, targets, g, k, dim=0),
        "logits_for_q": lambda logits, ref_logits, targets, g, k: (
            _gradient(logits, ref_logits, targets, g, k) + k[:, None] * (ref_logits.softmax(-1) - ref_logits)
        ),
    },
)


# ---- 3. log-sum-exp over tiles of the vocabulary


def _lse_cases() -> tuple[Case, ...]:
    steep = _normal(3, 4, seed=3) * 40
    return (
        Case({"states": _normal(5, 4, seed=1), "weight": _normal(12, 4, seed=2), "columns": 4}),
        Case(
            {"states": _normal(5, 4, seed=1), "weight": _normal(11, 4, seed=2), "columns": 4},
            "a last tile that is not full",
        ),
        Case({"states": _normal(2, 4, seed=4), "weight": _normal(6, 4, seed=5), "columns": 100}, "a single tile"),
        Case({"states": steep, "weight": _normal(9, 4, seed=6) * 30, "columns": 3}, "logits in the thousands"),
    )


def _tiles(states: Tensor, weight: Tensor, columns: int, whole: bool = True):
    last = len(weight) if whole else len(weight) // columns * columns
    return [states @ weight[i : min(i + columns, last)].T for i in range(0, max(last, 1), columns)]


def _fold(parts: list[Tensor], join) -> Tensor:
    found = parts[0]
    for part in parts[1:]:
        found = join(found, part)
    return found


def _not_rescaled(states: Tensor, weight: Tensor, columns: int) -> Tensor:
    peak, total = torch.full((len(states),), -torch.inf, dtype=states.dtype), 0.0
    for z in _tiles(states, weight, columns):
        peak = torch.maximum(peak, z.max(-1).values)
        total = total + (z - peak[:, None]).exp().sum(-1)
    return peak + total.log()


tiled_logsumexp = chapter.exercise(
    "tiled_logsumexp",
    right=lambda states, weight, columns: (states @ weight.T).logsumexp(-1),
    cases=_lse_cases,
    mistakes={
        "added": lambda states, weight, columns: sum(z.logsumexp(-1) for z in _tiles(states, weight, columns)),
        "largest": lambda states, weight, columns: _fold(
            [z.logsumexp(-1) for z in _tiles(states, weight, columns)], torch.maximum
        ),
        "last_tile": lambda states, weight, columns: _tiles(states, weight, columns)[-1].logsumexp(-1),
        "part_tile_missing": lambda states, weight, columns: _fold(
            [z.logsumexp(-1) if z.numel() else z.sum(-1) - torch.inf for z in _tiles(states, weight, columns, False)],
            torch.logaddexp,
        ),
        "overflows": lambda states, weight, columns: sum(
            z.exp().sum(-1) for z in _tiles(states, weight, columns)
        ).log(),
        "not_rescaled": _not_rescaled,
        "averaged": lambda states, weight, columns: (
            (states @ weight.T).logsumexp(-1) - torch.tensor(float(len(weight)), dtype=states.dtype).log()
        ),
    },
)


# ---- 4. batches by tokens


def _budget(lengths: list[int], max_tokens: int, *, sort=True, sides: int = 2, padded=True, strict=False) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: lengths[i]) if sort else range(len(lengths))
    found, number, members = [0] * len(lengths), 0, []
    for i in order:
        more = [*members, lengths[i]]
        cost = sides * (max(more) * len(more) if padded else sum(more))
        if members and (cost >= max_tokens if strict else cost > max_tokens):
            number, more = number + 1, [lengths[i]]
        found[i], members = number, more
    return found


def _budget_cases() -> tuple[Case, ...]:
    return (
        Case({"lengths": [9, 2, 3, 8, 4, 2, 9], "max_tokens": 24}),
        Case({"lengths": [5, 5, 5, 5], "max_tokens": 20}, "a batch that fills the budget exactly"),
        Case({"lengths": [10, 1, 1, 1, 1, 1, 1, 10], "max_tokens": 20}, "two long pairs among short ones"),
        Case({"lengths": [6], "max_tokens": 12}, "a single pair"),
    )


token_batches = chapter.exercise(
    "token_batches",
    right=_budget,
    cases=_budget_cases,
    mistakes={
        "not_sorted": lambda lengths, max_tokens: _budget(lengths, max_tokens, sort=False),
        "one_sequence": lambda lengths, max_tokens: _budget(lengths, max_tokens, sides=1),
        "no_padding": lambda lengths, max_tokens: _budget(lengths, max_tokens, padded=False),
        "not_filled": lambda lengths, max_tokens: _budget(lengths, max_tokens, strict=True),
        "sorted_downwards": lambda lengths, max_tokens: _downwards(lengths, max_tokens),
        "in_sorted_order": lambda lengths, max_tokens: sorted(_budget(lengths, max_tokens)),
    },
)


def _downwards(lengths: list[int], max_tokens: int) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    numbers = _budget([lengths[i] for i in order], max_tokens, sort=False)
    return [numbers[order.index(i)] for i in range(len(lengths))]


quiz = chapter.quiz()

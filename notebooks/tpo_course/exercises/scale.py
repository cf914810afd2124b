"""Exercises of 08_scale.ipynb: bytes, the logits' gradient from two numbers, a softmax in tiles, batches by tokens."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tpo_course.exercise import Case, normal
from tpo_course.words import Chapter

chapter = Chapter(__file__)


# ---- 1. how many bytes


def _bytes(pairs: int, length: int, vocab: int, with_kl: bool) -> int:
    return (7 if with_kl else 3) * 2 * pairs * length * vocab * 4


vocabulary_bytes = chapter.exercise(
    "vocabulary_bytes",
    _bytes,
    lambda: (
        Case("TDPO on GPT-2's vocabulary", pairs=8, length=128, vocab=50257, with_kl=True),
        Case("DPO on Llama 3's vocabulary", pairs=32, length=512, vocab=128256, with_kl=False),
        Case("a tiny batch", pairs=1, length=2, vocab=3, with_kl=True),
    ),
    half=lambda **given: _bytes(**given) // 2,
    one_tensor=lambda pairs, length, vocab, with_kl: 2 * pairs * length * vocab * 4,
    numbers_not_bytes=lambda **given: _bytes(**given) // 4,
    counts_swapped=lambda **given: _bytes(**given | {"with_kl": not given["with_kl"]}),
    always_with_kl=lambda **given: _bytes(**given | {"with_kl": True}),
)


# ---- 2. dL/dz from g and k


def _gradient_cases() -> tuple[Case, ...]:
    def case(rows: int, vocab: int, seed: int, words: str = "", with_kl: bool = True) -> Case:
        given = {"logits": normal(seed)(rows, vocab), "ref_logits": normal(seed + 1)(rows, vocab)}
        given |= {"g": normal(seed + 2)(rows), "k": normal(seed + 3)(rows) * with_kl}
        return Case(words, targets=torch.arange(rows) * 3 % vocab, **given)

    return (
        case(4, 7, 0),
        case(5, 5, 10, "as many positions as tokens"),
        case(3, 6, 20, "an objective without KL", False),
    )


def _of_parts(gradient: Callable[..., Tensor], dim: int = -1) -> Callable[..., Tensor]:
    """dL/dz from g and k as columns (R, 1), the one-hot targets e, and the softmaxes p and q, (R, V) each."""

    def answer(logits: Tensor, ref_logits: Tensor, targets: Tensor, g: Tensor, k: Tensor) -> Tensor:
        e = torch.zeros_like(logits).scatter(-1, targets[:, None], 1.0)
        return gradient(g[:, None], k[:, None], e, logits.softmax(dim), ref_logits.softmax(dim))

    return answer


_gradient = _of_parts(lambda g, k, e, p, q: g * (e - p) + k * (p - q))
logit_gradient = chapter.exercise(
    "logit_gradient",
    _gradient,
    _gradient_cases,
    first_sign=_of_parts(lambda g, k, e, p, q: g * (p - e) + k * (p - q)),
    second_sign=_of_parts(lambda g, k, e, p, q: g * (e - p) + k * (q - p)),
    no_target=_of_parts(lambda g, k, e, p, q: -g * p + k * (p - q)),
    no_normaliser=_of_parts(lambda g, k, e, p, q: g * e + k * (p - q)),
    no_kl=_of_parts(lambda g, k, e, p, q: g * (e - p)),
    exchanged=_of_parts(lambda g, k, e, p, q: k * (e - p) + g * (p - q)),
    over_positions=_of_parts(lambda g, k, e, p, q: g * (e - p) + k * (p - q), dim=0),
    logits_for_q=lambda ref_logits, k, **given: (
        _gradient(ref_logits=ref_logits, k=k, **given) + k[:, None] * (ref_logits.softmax(-1) - ref_logits)
    ),
)


# ---- 3. log-sum-exp over tiles of the vocabulary


def _lse_cases() -> tuple[Case, ...]:
    steep = normal(3)(3, 4) * 40
    return (
        Case(states=normal(1)(5, 4), weight=normal(2)(12, 4), columns=4),
        Case("a last tile that is not full", states=normal(1)(5, 4), weight=normal(2)(11, 4), columns=4),
        Case("a single tile", states=normal(4)(2, 4), weight=normal(5)(6, 4), columns=100),
        Case("logits in the thousands", states=steep, weight=normal(6)(9, 4) * 30, columns=3),
    )


def _of_tiles(combine: Callable[[list[Tensor]], Tensor], whole: bool = True) -> Callable[..., Tensor]:
    """What `combine` makes of the logits' tiles, (R, columns) each; one that is not full is left out unless `whole`."""

    def answer(states: Tensor, weight: Tensor, columns: int) -> Tensor:
        logits = states @ weight[: None if whole else len(weight) // columns * columns].T  # (R, V)
        return combine(list(logits.split(columns, dim=-1)))

    return answer


def _lse(tiles: list[Tensor]) -> Tensor:
    return torch.cat(tiles, dim=-1).logsumexp(-1)


def _not_rescaled(tiles: list[Tensor]) -> Tensor:
    peak, total = torch.full_like(tiles[0][:, 0], -torch.inf), 0.0
    for z in tiles:
        peak = torch.maximum(peak, z.max(-1).values)
        total = total + (z - peak[:, None]).exp().sum(-1)
    return peak + total.log()


tiled_logsumexp = chapter.exercise(
    "tiled_logsumexp",
    _of_tiles(_lse),
    _lse_cases,
    added=_of_tiles(lambda tiles: sum(z.logsumexp(-1) for z in tiles)),
    largest=_of_tiles(lambda tiles: torch.stack([z.logsumexp(-1) for z in tiles]).amax(0)),
    last_tile=_of_tiles(lambda tiles: tiles[-1].logsumexp(-1)),
    part_tile_missing=_of_tiles(_lse, whole=False),
    overflows=_of_tiles(lambda tiles: sum(z.exp().sum(-1) for z in tiles).log()),
    not_rescaled=_of_tiles(_not_rescaled),
    averaged=_of_tiles(lambda tiles: _lse(tiles) - math.log(sum(z.shape[-1] for z in tiles))),
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


def _downwards(lengths: list[int], max_tokens: int) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    numbers = _budget([lengths[i] for i in order], max_tokens, sort=False)
    return [numbers[order.index(i)] for i in range(len(lengths))]


token_batches = chapter.exercise(
    "token_batches",
    _budget,
    lambda: (
        Case(lengths=[9, 2, 3, 8, 4, 2, 9], max_tokens=24),
        Case("a batch that fills the budget exactly", lengths=[5, 5, 5, 5], max_tokens=20),
        Case("two long pairs among short ones", lengths=[10, 1, 1, 1, 1, 1, 1, 10], max_tokens=20),
        Case("a single pair", lengths=[6], max_tokens=12),
    ),
    not_sorted=partial(_budget, sort=False),
    one_sequence=partial(_budget, sides=1),
    no_padding=partial(_budget, padded=False),
    not_filled=partial(_budget, strict=True),
    sorted_downwards=_downwards,
    in_sorted_order=lambda **given: sorted(_budget(**given)),
)


quiz = chapter.quiz()

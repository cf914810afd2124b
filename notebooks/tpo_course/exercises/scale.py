"""Exercises of 08_scale.ipynb: bytes, the logits' gradient from two numbers, a softmax in tiles, a cache, batches by tokens."""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from tpo_course.exercise import Case, Uses, normal
from tpo_course.words import Chapter

chapter = Chapter(__file__)


# ---- 1. how many tensors, how many bytes


alive = chapter.predict("alive", 7, within=0.05, named_ones=5, one_on_the_way=6, both_logits=2, of_one_model=3)


def _bytes(pairs: int, length: int, vocab: int, with_kl: bool, most: int = 7, least: int = 3) -> int:
    return (most if with_kl else least) * 2 * pairs * length * vocab * 4


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
    never_with_kl=lambda **given: _bytes(**given | {"with_kl": False}),
    one_position_less=lambda **given: _bytes(**given | {"length": given["length"] - 1}),
    doubled=lambda **given: 2 * _bytes(**given),
    in_mib=(lambda **given: _bytes(**given) / 2**20, lambda **given: _bytes(**given) / 1e6),
    in_gib=(lambda **given: _bytes(**given) / 2**30, lambda **given: _bytes(**given) / 1e9),
    miscounted=tuple(
        partial(_bytes, most=most, least=least)
        for most in range(4, 9)
        for least in range(1, 5)
        if (most, least) not in ((7, 3), (7, 7), (3, 3), (3, 7))
    ),
)


# ---- 2. dL/dz from g and k

by_vector = chapter.complete(
    "by_vector",
    "plus_g",
    "difference",
    "minus_k",
    score_alone=("plus_g", "minus_g", "minus_k"),
    kl_alone=("plus_g", "plus_k", "minus_k"),
    added=("plus_g", "both", None),
    kl_turned=("plus_g", None, "plus_k"),
    score_turned=("minus_g", None, "minus_k"),
    all_turned=("minus_g", "reversed", "plus_k"),
)


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


def _reverse(p: Tensor, q: Tensor) -> Tensor:
    """dKL(p || q) / dz."""
    return p * ((p / q).log() - (p * (p / q).log()).sum(-1, keepdim=True))


def _by_autograd(logits: Tensor, ref_logits: Tensor, targets: Tensor, g: Tensor, k: Tensor) -> Tensor:
    z, log_q = logits.detach().requires_grad_(), ref_logits.log_softmax(-1)
    logps = z.log_softmax(-1)
    kl = (log_q.exp() * (log_q - logps)).sum(-1)
    return torch.autograd.grad((g * logps.gather(-1, targets[:, None])[:, 0] + k * kl).sum(), z)[0]


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
    both_signs=_of_parts(lambda g, k, e, p, q: g * (p - e) + k * (q - p)),
    g_twice=_of_parts(lambda g, k, e, p, q: g * (e - p) + g * (p - q)),
    models_exchanged=(
        _of_parts(lambda g, k, e, p, q: g * (e - q) + k * (p - q)),
        _of_parts(lambda g, k, e, p, q: g * (e - q) + k * (q - p)),
    ),
    of_the_probability=_of_parts(lambda g, k, e, p, q: g * (e * p).sum(-1, keepdim=True) * (e - p) + k * (p - q)),
    target_alone=_of_parts(lambda g, k, e, p, q: g * e * (1 - p) + k * (p - q)),
    reverse_kl=_of_parts(lambda g, k, e, p, q: g * (e - p) + k * _reverse(p, q)),
    log_for_p=_of_parts(lambda g, k, e, p, q: g * (e - p.log()) + k * (p.log() - q.log())),
    averaged=_of_parts(lambda g, k, e, p, q: (g * (e - p) + k * (p - q)) / len(p)),
    by_autograd=Uses(("autograd", "backward", "grad", "jacobian", "jacrev", "jacfwd", "vjp"), _by_autograd),
    over_positions=_of_parts(lambda g, k, e, p, q: g * (e - p) + k * (p - q), dim=0),
    logits_for_q=lambda ref_logits, k, **given: (
        _gradient(ref_logits=ref_logits, k=k, **given) + k[:, None] * (ref_logits.softmax(-1) - ref_logits)
    ),
)


larger_than_the_room = chapter.order(
    "larger_than_the_room",
    "make",
    "keep",
    "margin",
    "again",
    "rows",
    "outer",
    "body",
    numbers_from_nothing=("keep", "make"),
    gradient_at_first_sight=("rows", "margin"),
    waiting_logits=("again", "margin"),
    margin_from_nothing=("margin", "keep"),
    row_from_nothing=("rows", "again"),
    products_first=("outer", "rows"),
    transformer_first=("body", "outer"),
)


# ---- 3. log-sum-exp over tiles of the vocabulary


@cache
def _watching(columns: int) -> type[Tensor]:
    """Of a weight whose products with plain tensors are nan where more than `columns` logits of a position are made."""

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), named=None):
            found = super().__torch_function__(function, types, arguments, named or {})
            product = isinstance(found, Tensor) and any(type(each) is Tensor for each in arguments)
            if product and max(found.shape, default=0) > columns:
                return torch.full(found.shape, torch.nan, dtype=found.dtype)
            return found

    return Watched


def _lse_cases() -> tuple[Case, ...]:
    def case(words: str, states: Tensor, weight: Tensor, columns: int) -> Case:
        """No size but V may exceed `columns`: see `_watching`."""
        return Case(words, states=states, weight=weight.as_subclass(_watching(columns)), columns=columns)

    return (
        case("tiles of 4 columns (products with more are nan)", normal(1)(3, 4), normal(2)(12, 4), 4),
        case("a last tile that is not full", normal(1)(3, 4), normal(2)(11, 4), 4),
        case("a single tile", normal(4)(2, 4), normal(5)(6, 4), 100),
        case("logits in the thousands", normal(3)(3, 3) * 40, normal(6)(9, 3) * 30, 3),
    )


def _of_tiles(combine: Callable[[list[Tensor]], Tensor], whole: bool = True) -> Callable[..., Tensor]:
    """What `combine` makes of the logits' tiles, (R, columns) each; one that is not full is left out unless `whole`."""

    def answer(states: Tensor, weight: Tensor, columns: int) -> Tensor:
        last = len(weight) if whole else len(weight) // columns * columns
        return combine([states @ weight[i : min(i + columns, last)].T for i in range(0, max(last, 1), columns)])

    return answer


def _lse(tiles: list[Tensor]) -> Tensor:
    return torch.stack([z.logsumexp(-1) for z in tiles]).logsumexp(0)


def _all_at_once(states: Tensor, weight: Tensor, columns: int) -> Tensor:
    return (states @ weight.T).logsumexp(-1)


def _by_positions(states: Tensor, weight: Tensor, columns: int) -> Tensor:
    return torch.stack([(weight @ position).logsumexp(-1) for position in states])


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
    mean_of_tiles=_of_tiles(lambda tiles: torch.stack([z.logsumexp(-1) for z in tiles]).mean(0)),
    all_at_once=(_all_at_once, _by_positions),
    first_tile=_of_tiles(lambda tiles: tiles[0].logsumexp(-1)),
    last_tile_missing=_of_tiles(lambda tiles: _lse(tiles[:-1] or [torch.full_like(tiles[0], -torch.inf)])),
    no_logarithm=_of_tiles(lambda tiles: sum(z.exp().sum(-1) for z in tiles)),
    largest_logit=(
        _of_tiles(lambda tiles: torch.stack([z.amax(-1) for z in tiles]).amax(0)),
        _of_tiles(lambda tiles: torch.stack([z.amax(-1) for z in tiles]).logsumexp(0)),
    ),
    peak_not_added=_of_tiles(lambda tiles: _lse(tiles) - torch.stack([z.amax(-1) for z in tiles]).amax(0)),
    starts_at_zero=_of_tiles(lambda tiles: torch.logaddexp(_lse(tiles), 0 * tiles[0][:, 0])),
)


# ---- 4. what is kept of the reference

kept_by_tdpo2 = chapter.predict(
    "kept_by_tdpo2", 3072, within=0.05, one_number=4, numbers=768, halved=1536, distribution=201028
)


# ---- 5. batches by tokens


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


def _numbered(lengths: list[int], max_tokens: int, cost: Callable[[int, int, int], int], first: int = 0) -> list[int]:
    """As `_budget`, where a batch closes once cost(pairs in it, this length, the one before) is too much."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found, number, size, before = [0] * len(lengths), first, 0, 0
    for i in order:
        if size and cost(size, lengths[i], before) > max_tokens:
            number, size = number + 1, 0
        found[i], size, before = number, size + 1, lengths[i]
    return found


def _closed_too_late(lengths: list[int], max_tokens: int) -> list[int]:
    found, number, size = [0] * len(lengths), 0, 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        found[i], size = number, size + 1
        if 2 * size * lengths[i] > max_tokens:
            number, size = number + 1, 0
    return found


def _of_one_size(lengths: list[int], max_tokens: int) -> list[int]:
    size = max(1, max_tokens // (2 * max(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order.index(i) // size for i in range(len(lengths))]


def _members(lengths: list[int], max_tokens: int) -> list[list[int]]:
    numbers = _budget(lengths, max_tokens)
    return [[i for i, each in enumerate(numbers) if each == number] for number in range(max(numbers) + 1)]


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
    newest_not_counted=partial(_numbered, cost=lambda size, length, before: 2 * size * length),
    older_length=partial(_numbered, cost=lambda size, length, before: 2 * (size + 1) * before),
    closed_too_late=_closed_too_late,
    from_one=partial(_numbered, cost=lambda size, length, before: 2 * (size + 1) * length, first=1),
    of_one_size=_of_one_size,
    order_returned=lambda lengths, max_tokens: sorted(range(len(lengths)), key=lambda i: lengths[i]),
    lists_of_pairs=_members,
)


out_of_memory = chapter.open_ended("out_of_memory")
quiz = chapter.quiz()

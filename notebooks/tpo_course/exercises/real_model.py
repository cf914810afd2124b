"""Exercises of 06b_real_model.ipynb: a KL that two models share, what carries over, how far two rankings agree, and what seeds tell."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case
from tpo_course.words import Chapter

chapter = Chapter(__file__)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 1. a price that two models share


kl_per_token = chapter.exercise(
    "kl_per_token",
    lambda kl, lengths: kl.sum() / lengths.sum(),
    lambda: (
        Case(kl=5 * _draw(31, seed=0), lengths=torch.randint(5, 41, (31,), generator=torch.Generator().manual_seed(1))),
        Case("two samples", kl=torch.tensor([2.0, 8.0]).double(), lengths=torch.tensor([10, 20])),
    ),
    mean_of_ratios=lambda kl, lengths: (kl / lengths).mean(),
    sum_of_ratios=lambda kl, lengths: (kl / lengths).sum(),
    median=lambda kl, lengths: (kl / lengths).median(),
    by_the_longest=(lambda kl, lengths: kl.sum() / (len(kl) * lengths.max()), lambda kl, lengths: kl.mean() / 40),
    upside_down=(lambda kl, lengths: lengths.sum() / kl.sum(), lambda kl, lengths: (lengths / kl).mean()),
    not_divided=(lambda kl, lengths: kl.mean(), lambda kl, lengths: kl.sum()),
    by_the_samples=lambda kl, lengths: kl.sum() / lengths.double().mean(),
    mean_by_all=lambda kl, lengths: kl.mean() / lengths.sum(),
    weighed_twice=lambda kl, lengths: (kl * lengths).sum() / lengths.sum(),
    one_token_less=lambda kl, lengths: kl.sum() / (lengths - 1).sum(),
)


# ---- 2. what carries over


def _side(interval: Tensor) -> Tensor:
    """(D, 2) bounds -> (D,): 1 above zero, -1 below, 0 where zero is inside."""
    return (interval[:, 0] > 0).long() - (interval[:, 1] < 0).long()


def _carried(small: Tensor, large: Tensor) -> Tensor:
    return _side(small) * _side(large)


def _intervals() -> tuple[Case, ...]:
    def around(middles: list[float], width: list[float]) -> Tensor:
        m, w = torch.tensor(middles).double(), torch.tensor(width).double()
        return torch.stack([m - w, m + w], dim=-1)

    small = around([0.3, 0.3, 0.3, -0.2, -0.2, 0.1, 0.1, 0.9], [0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3, 0.1])
    large = around([0.2, -0.2, 0.1, -0.4, 0.3, 0.2, 0.2, 0.3], [0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.4, 0.1])
    touching = around([0.5, -0.5, 0.3], [0.5, 0.5, 0.1])
    return (
        Case(small=small, large=large),
        Case("the models swapped", small=large, large=small),
        Case("a bound that is 0", small=touching, large=around([0.3, -0.3, 0.3], [0.1, 0.1, 0.1])),
    )


def _overlapping(small: Tensor, large: Tensor) -> Tensor:
    return ((small[:, 0] <= large[:, 1]) & (large[:, 0] <= small[:, 1])).long()


def _touching(interval: Tensor) -> Tensor:
    return (interval[:, 0] >= 0).long() - (interval[:, 1] <= 0).long()


def _middle(interval: Tensor) -> Tensor:
    return torch.sign(interval.mean(-1)).long()


def _sides(answer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An answer from the two sides, 1, -1 or 0 each."""
    return lambda small, large: answer(_side(small), _side(large))


carries_over = chapter.exercise(
    "carries_over",
    _carried,
    _intervals,
    middles=lambda small, large: _middle(small) * _middle(large),
    one_is_enough=(
        lambda small, large: _middle(small) * _middle(large) * ((_side(small) != 0) | (_side(large) != 0)),
        lambda small, large: _side(small) * _middle(large),
        lambda small, large: _middle(small) * _side(large),
    ),
    bound_of_zero=(
        lambda small, large: _touching(small) * _touching(large),
        lambda small, large: small.sign().sum(-1) / 2 * (large.sign().sum(-1) / 2),
        lambda small, large: (small.sign().sum(-1) * large.sign().sum(-1)).sign(),
    ),
    overlap=(_overlapping, lambda small, large: 2 * _overlapping(small, large) - 1),
    never_against=_sides(lambda small, large: (small * large > 0).long()),
    both_clear=_sides(lambda small, large: (small * large).abs()),
    added=tuple(
        _sides(of)
        for of in (torch.add, lambda small, large: (small + large) / 2, lambda small, large: (small + large).sign())
    ),
    one_model=(lambda small, large: _side(small), lambda small, large: _side(large)),
    equal=tuple(
        _sides(of)
        for of in (
            lambda small, large: (small == large).long(),
            lambda small, large: 2 * (small == large).long() - 1,
            lambda small, large: torch.where(small == large, 1, small * large),
        )
    ),
    open_as_against=_sides(lambda small, large: torch.where(small * large > 0, 1, -1)),
    both_below=_sides(lambda small, large: (small + large).div(2, rounding_mode="trunc")),
    above_alone=tuple(
        _sides(of)
        for of in (
            lambda small, large: ((small > 0) & (large > 0)).long(),
            lambda small, large: small * large * (small > 0),
            lambda small, large: small * large * (large > 0),
        )
    ),
    one_way_round=tuple(
        _sides(of)
        for of in (
            lambda small, large: small * large * ((small * large > 0) | (small > 0)),
            lambda small, large: small * large * ((small * large > 0) | (large > 0)),
        )
    ),
    sign_reversed=_sides(lambda small, large: -small * large),
)


# ---- 3. findings by name, and two rankings

findings = chapter.predict("findings", 3, within=0.05, all_of_them=7, not_contradicted=4, contradicted=2)


def _signs(values: Tensor) -> Tensor:
    """(n,) -> (n(n-1)/2,): for every pair i < j the sign of values[i] - values[j]."""
    i, j = torch.triu_indices(len(values), len(values), offset=1)
    return torch.sign(values[i] - values[j])


def _tau(first: Tensor, second: Tensor) -> Tensor:
    return (_signs(first) * _signs(second)).mean()


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _twice(values: Tensor) -> Tensor:
    """(n,) -> (n, n): as `_signs`, for every i and j."""
    return torch.sign(values[:, None] - values)


def _places(values: Tensor) -> Tensor:
    return values.argsort().double()  # who stands where, not the rank


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([first, second]))[0, 1]


rank_agreement = chapter.exercise(
    "rank_agreement",
    _tau,
    lambda: (
        Case(first=_draw(6, seed=3), second=_draw(6, seed=4)),
        Case(
            "five objectives",
            first=torch.tensor([1.0, 2, 3, 4, 9]).double(),
            second=torch.tensor([1.0, 3, 2, 4, 5]).double(),
        ),
    ),
    only_concordant=(
        lambda first, second: (_signs(first) * _signs(second) > 0).double().mean(),
        lambda first, second: (_twice(first) == _twice(second)).double().mean(),
    ),
    only_discordant=lambda first, second: (_signs(first) * _signs(second) < 0).double().mean(),
    ratio=lambda first, second: (_signs(first) == _signs(second)).sum() / (_signs(first) != _signs(second)).sum(),
    sign_reversed=lambda first, second: -_tau(first, second),
    pearson=_pearson,
    spearman=lambda first, second: _pearson(_ranks(first), _ranks(second)),
    argsort_for_ranks=(
        lambda first, second: _tau(_places(first), _places(second)),
        lambda first, second: _pearson(_places(first), _places(second)),
    ),
    all_ordered_pairs=lambda first, second: (_twice(first) * _twice(second)).mean(),
    counted_twice=(lambda first, second: 2 * _tau(first, second), lambda first, second: _tau(first, second) / 2),
    by_one_more=lambda first, second: _tau(first, second) * (len(first) - 1) / (len(first) + 1),
    not_divided=tuple(
        lambda first, second, signs=signs: (signs(first) * signs(second)).sum() for signs in (_signs, _twice)
    ),
    neighbours=(
        lambda first, second: torch.sign(first.diff() * second.diff()).mean(),
        lambda first, second: torch.sign(first.diff() * second.diff()).sum() / len(_signs(first)),
    ),
    sizes=lambda first, second: (
        ((first[:, None] - first) * (second[:, None] - second)).sum() / len(first) / (len(first) - 1)
    ),
    across=(
        lambda first, second: torch.sign(first - second).mean(),
        lambda first, second: (
            torch.sign((first[:, None] - second) * (second[:, None] - first)).triu(1).sum() / len(_signs(first))
        ),
    ),
    same_place=(
        lambda first, second: (_ranks(first) == _ranks(second)).double().mean(),
        lambda first, second: (_places(first) == _places(second)).double().mean(),
    ),
)

rare_tau = chapter.predict("rare_tau", 11 / 15, within=0.04, not_yet=0.6, rarer_than_asked=13 / 15, confidence=0.95)
turns_again = chapter.predict("turns_again", "none")
two_errors = chapter.complete(
    "two_errors",
    "seeds",
    "three",
    "prompts",
    "many",
    by_what_was_averaged=("seeds", "many", "prompts", "three"),
    exchanged=("prompts", "many", "seeds", "three"),
    by_the_heap=("seeds", "heap", "prompts", "heap"),
    one_heap=("everything", "heap", None, None),
    one_seed=("seeds", "single", "prompts", "many"),
    unpaired=("apart", "three", None, None),
)
side_by_side = chapter.choose("side_by_side", "sign", "order")
what_carries = chapter.open_ended("what_carries")


quiz = chapter.quiz()

"""Exercises of 06b_real_model.ipynb: a KL that two models share, what carries over, and how far two rankings agree."""

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
    by_the_longest=lambda kl, lengths: kl.sum() / (len(kl) * lengths.max()),
    upside_down=lambda kl, lengths: lengths.sum() / kl.sum(),
    not_divided=lambda kl, lengths: kl.mean(),
    by_the_samples=lambda kl, lengths: kl.sum() / lengths.double().mean(),
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

    small = around([0.3, 0.3, 0.3, -0.2, -0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.3])
    large = around([0.2, -0.2, 0.1, -0.4, 0.3, 0.2, 0.2], [0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.4])
    return (Case(small=small, large=large), Case("the models swapped", small=large, large=small))


def _overlapping(small: Tensor, large: Tensor) -> Tensor:
    return ((small[:, 0] <= large[:, 1]) & (large[:, 0] <= small[:, 1])).long()


carries_over = chapter.exercise(
    "carries_over",
    _carried,
    _intervals,
    middles=lambda small, large: torch.sign(small.mean(-1) * large.mean(-1)).long(),
    one_is_enough=lambda small, large: (
        torch.sign(small.mean(-1) * large.mean(-1)).long() * ((_side(small) != 0) | (_side(large) != 0))
    ),
    overlap=_overlapping,
    never_against=lambda small, large: (_carried(small, large) > 0).long(),
    both_clear=lambda small, large: _carried(small, large).abs(),
)


# ---- 3. two rankings


def _signs(values: Tensor) -> Tensor:
    """(n,) -> (n(n-1)/2,): for every pair i < j the sign of values[i] - values[j]."""
    i, j = torch.triu_indices(len(values), len(values), offset=1)
    return torch.sign(values[i] - values[j])


def _tau(first: Tensor, second: Tensor) -> Tensor:
    return (_signs(first) * _signs(second)).mean()


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _pearson(first: Tensor, second: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([first, second]))[0, 1]


rank_agreement = chapter.exercise(
    "rank_agreement",
    _tau,
    lambda: (
        Case(first=_draw(6, seed=3), second=_draw(6, seed=4)),
        Case("five objectives", first=torch.tensor([1.0, 2, 3, 4, 9]).double(), second=torch.tensor([1.0, 3, 2, 4, 5]).double()),
    ),
    only_concordant=lambda first, second: (_signs(first) * _signs(second) > 0).double().mean(),
    pearson=_pearson,
    spearman=lambda first, second: _pearson(_ranks(first), _ranks(second)),
    all_ordered_pairs=lambda first, second: (
        2 * (_signs(first) * _signs(second)).sum() / len(first) ** 2
    ),
    not_divided=lambda first, second: (_signs(first) * _signs(second)).sum(),
    same_place=lambda first, second: (_ranks(first) == _ranks(second)).double().mean(),
)  # fmt: skip


quiz = chapter.quiz()

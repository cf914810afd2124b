"""Exercises of 06_compare.ipynb: an interval, a paired difference, reward at equal KL, and a correction for many questions."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case
from tpo_course.words import Chapter

chapter = Chapter(__file__)


def _numbers(n: int, seed: int, *, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draws(n: int, seed: int, resamples: int = 400) -> Tensor:
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


# ---- 1. an interval


def _interval_of(resampled: Tensor, mean: Tensor, cut: float = 0.025) -> Tensor:
    return torch.stack([mean, *resampled.quantile(torch.tensor([cut, 1 - cut], dtype=torch.float64))])


def _bootstrap(values: Tensor, draws: Tensor, cut: float = 0.025) -> Tensor:
    return _interval_of(values[draws].mean(-1), values.mean(), cut)


bootstrap_interval = chapter.exercise(
    "bootstrap_interval",
    _bootstrap,
    lambda: (
        Case(values=_numbers(37, 0), draws=_draws(37, 1)),
        Case("five prompts", values=_numbers(5, 2, scale=9.0), draws=_draws(5, 3)),
    ),
    quantiles_of_values=lambda values, draws: _interval_of(values, values.mean()),
    over_resamples=lambda values, draws: _interval_of(values[draws].mean(0), values.mean()),
    ninety_percent=lambda values, draws: _bootstrap(values, draws, cut=0.05),
    smallest_and_largest=lambda values, draws: _bootstrap(values, draws, cut=0.0),
    mean_of_means=lambda values, draws: _interval_of(values[draws].mean(-1), values[draws].mean()),
)


# ---- 2. the difference of two policies


def _paired(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    return _bootstrap(first - second, draws)


def _pair_cases() -> tuple[Case, ...]:
    shared = _numbers(41, 5, scale=3.0)  # what a hard prompt does to both
    return (
        Case(first=shared + _numbers(41, 6), second=shared, draws=_draws(41, 7)),
        Case("unrelated policies", first=_numbers(6, 8), second=_numbers(6, 9), draws=_draws(6, 10)),
    )


def _two_draws(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    apart = first[draws].mean(-1) - second[draws.flip(0)].mean(-1)
    return _interval_of(apart, (first - second).mean())


def _gap_of_intervals(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    a, b = _bootstrap(first, draws), _bootstrap(second, draws)
    return torch.stack([a[0] - b[0], a[1] - b[2], a[2] - b[1]])


paired_difference = chapter.exercise(
    "paired_difference",
    _paired,
    _pair_cases,
    sign_reversed=lambda first, second, draws: _paired(second, first, draws),
    resampled_apart=_two_draws,
    ends_subtracted=_gap_of_intervals,
    absolute_difference=lambda first, second, draws: _bootstrap((first - second).abs(), draws),
    share_of_wins=lambda first, second, draws: _bootstrap((first > second).double(), draws),
)


# ---- 3. reward at equal KL


def _inside(reward_at: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[[Tensor, Tensor, float], Tensor]:
    """The same where the run was, nan elsewhere."""

    def answer(kl: Tensor, reward: Tensor, at: float) -> Tensor:
        return reward_at(kl, reward, at) if kl.min() <= at <= kl.max() else torch.full_like(kl[0], torch.nan)

    return answer


def _extrapolated(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    order = kl.argsort()
    kl, reward = kl[order], reward[order]
    right = int(torch.searchsorted(kl, torch.tensor(at, dtype=kl.dtype)).clamp(1, len(kl) - 1))
    return _between(kl, reward, at, right - 1, right)


def _between(kl: Tensor, reward: Tensor, at: float, left: int, right: int) -> Tensor:
    return reward[left] + (at**0.5 - kl[left] ** 0.5) / (kl[right] ** 0.5 - kl[left] ** 0.5) * (
        reward[right] - reward[left]
    )


def _unsorted(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    for i in range(len(kl) - 1):
        if kl[i] <= at <= kl[i + 1]:
            return _between(kl, reward, at, i, i + 1)
    return reward[-1]


def _curves() -> tuple[Case, ...]:
    kl, reward = torch.tensor([0.0, 3.0, 8.0, 21.0]).double(), torch.tensor([0.5, 0.71, 0.8, 0.93]).double()
    mixed = torch.tensor([2, 0, 3, 1])
    return (
        Case(kl=kl, reward=reward, at=5.0),
        Case("points that are not sorted by KL", kl=kl[mixed], reward=reward[mixed], at=9.0),
        Case("a KL that the run never reached (answer nan)", kl=kl, reward=reward, at=30.0),
    )


reward_at_kl = chapter.exercise(
    "reward_at_kl",
    _inside(_extrapolated),
    _curves,
    nearest=_inside(lambda kl, reward, at: reward[(kl - at).abs().argmin()]),
    extrapolated=_extrapolated,
    held=lambda kl, reward, at: _extrapolated(kl, reward, min(max(at, float(kl.min())), float(kl.max()))),
    unsorted=_inside(_unsorted),
    straight_in_nats=_inside(lambda kl, reward, at: _extrapolated(kl**2, reward, at**2)),
    between_the_ends=_inside(lambda kl, reward, at: _between(kl, reward, at, int(kl.argmin()), int(kl.argmax()))),
)


# ---- 4. a correction for many questions


def _weighted(ranked: Tensor) -> Tensor:
    return ranked * torch.arange(len(ranked), 0, -1, dtype=ranked.dtype)


def _in_place(corrected: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(corrected).scatter(0, order, corrected)


def _holm(p: Tensor) -> Tensor:
    return _in_place(_weighted(p.sort().values).cummax(0).values.clamp(max=1), p.argsort())


def _times_rank(p: Tensor) -> Tensor:
    return _in_place((p.sort().values * torch.arange(1, len(p) + 1)).cummax(0).values.clamp(max=1), p.argsort())


holm = chapter.exercise(
    "holm",
    _holm,
    lambda: (
        Case(p=torch.tensor([0.03, 0.001, 0.2, 0.012]).double()),
        Case("two that are nearly the same", p=torch.tensor([0.021, 0.02, 0.001]).double()),
        Case("large ones", p=torch.tensor([0.6, 0.9, 0.04]).double()),
    ),
    bonferroni=lambda p: (len(p) * p).clamp(max=1),
    may_fall=lambda p: _in_place(_weighted(p.sort().values).clamp(max=1), p.argsort()),
    above_one=lambda p: _in_place(_weighted(p.sort().values).cummax(0).values, p.argsort()),
    as_they_stand=lambda p: _weighted(p).cummax(0).values.clamp(max=1),
    sorted_answer=lambda p: _weighted(p.sort().values).cummax(0).values.clamp(max=1),
    times_rank=_times_rank,
)


quiz = chapter.quiz()

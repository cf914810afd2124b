"""Exercises of 06_compare.ipynb: an interval, a paired difference, its error, reward at equal KL, a correction for many questions."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case, Uses
from tpo_course.words import Chapter

chapter = Chapter(__file__)
RANDOM = ("randint", "randperm", "multinomial", "choice", "choices", "rand", "integers")


def _numbers(n: int, seed: int, *, scale: float = 1.0) -> Tensor:
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draws(n: int, seed: int, resamples: int = 400) -> Tensor:
    return torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))


# ---- 0. which accuracy knows the label

swapped_labels = chapter.predict("swapped_labels", "leans")


# ---- 1. an interval


def _interval_of(resampled: Tensor, mean: Tensor, cut: float = 0.025) -> Tensor:
    return torch.stack([mean, *resampled.quantile(torch.tensor([cut, 1 - cut], dtype=torch.float64))])


def _bootstrap(values: Tensor, draws: Tensor, cut: float = 0.025) -> Tensor:
    return _interval_of(values[draws].mean(-1), values.mean(), cut)


def _around(mean: Tensor, error: Tensor) -> Tensor:
    """The interval by the normal distribution."""
    return torch.stack([mean, mean - 1.96 * error, mean + 1.96 * error])


def _entries(values: Tensor, draws: Tensor, low: int, high: int) -> Tensor:
    means, tail = values[draws].mean(-1).sort().values, len(draws) // 40
    return torch.stack([values.mean(), means[tail - low], means[len(draws) - tail - high]])


def _then(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The right interval, changed."""
    return lambda values, draws: change(_bootstrap(values, draws))


bootstrap_interval = chapter.exercise(
    "bootstrap_interval",
    _bootstrap,
    lambda: (
        Case(values=_numbers(37, 0), draws=_draws(37, 1)),
        Case("five prompts", values=_numbers(5, 2, scale=9.0), draws=_draws(5, 3)),
    ),
    quantiles_of_values=(
        lambda values, draws: _interval_of(values, values.mean()),
        lambda values, draws: _interval_of(values[draws].flatten(), values.mean()),
        lambda values, draws: _around(values.mean(), values.std()),
    ),
    over_resamples=lambda values, draws: _interval_of(values[draws].mean(0), values.mean()),
    ninety_percent=lambda values, draws: _bootstrap(values, draws, cut=0.05),
    smallest_and_largest=lambda values, draws: _bootstrap(values, draws, cut=0.0),
    mean_of_means=lambda values, draws: _interval_of(values[draws].mean(-1), values[draws].mean()),
    by_the_normal=(
        lambda values, draws: _around(values.mean(), values.std() / len(values) ** 0.5),
        lambda values, draws: _around(values.mean(), values.std(correction=0) / len(values) ** 0.5),
        lambda values, draws: _around(values.mean(), values[draws].mean(-1).std()),
    ),
    variance_for_sd=lambda values, draws: _around(values.mean(), values.var() / len(values)),
    entries=tuple(
        lambda values, draws, low=low, high=high: _entries(values, draws, low, high)
        for low in (0, 1)
        for high in (0, 1)
    ),
    median=(
        lambda values, draws: _interval_of(values[draws].mean(-1), values.median()),
        lambda values, draws: _interval_of(values[draws].mean(-1), values[draws].mean(-1).quantile(0.5)),
        lambda values, draws: _interval_of(values[draws].median(-1).values, values.mean()),
        lambda values, draws: _interval_of(values[draws].median(-1).values, values.median()),
    ),
    summed=(
        lambda values, draws: _interval_of(values[draws].sum(-1), values.sum()),
        lambda values, draws: _interval_of(values[draws].sum(-1), values.mean()),
    ),
    by_one_less=lambda values, draws: _interval_of(values[draws].sum(-1) / (len(values) - 1), values.mean()),
    out_of_order=tuple(_then(lambda found, i=i: found[list(i)]) for i in ((1, 0, 2), (1, 2, 0), (0, 2, 1))),
    distances=_then(lambda found: (found - found[0]).abs() + found[0] * torch.eye(3, dtype=found.dtype)[0]),
    of_the_indices=lambda values, draws: _interval_of(draws.double().mean(-1), values.mean()),
    drawn_again=Uses(RANDOM, lambda values, draws: _bootstrap(values, torch.randint(len(values), draws.shape))),
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


def _one_side(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    return _interval_of(first[draws].mean(-1) - second.mean(), (first - second).mean())


def _errors_added(first: Tensor, second: Tensor, draws: Tensor) -> Tensor:
    """Half an interval of the difference, as if the two policies had nothing in common."""
    half = sum(((high - low) / 2) ** 2 for _, low, high in (_bootstrap(first, draws), _bootstrap(second, draws))) ** 0.5
    return _around((first - second).mean(), half / 1.96)


def _of(value: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The interval of another number a prompt."""
    return lambda first, second, draws: _bootstrap(value(first, second), draws)


def _of_gap(interval: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Another interval of the differences."""
    return lambda first, second, draws: interval(first - second, draws)


paired_difference = chapter.exercise(
    "paired_difference",
    _paired,
    _pair_cases,
    sign_reversed=lambda first, second, draws: _paired(second, first, draws),
    resampled_apart=_two_draws,
    drawn_again=Uses(
        RANDOM, lambda first, second, draws: _two_draws(first, second, torch.randint(len(first), draws.shape))
    ),
    one_side_resampled=(_one_side, lambda first, second, draws: -_one_side(second, first, draws)[[0, 2, 1]]),
    ends_subtracted=_gap_of_intervals,
    ends_alike=lambda first, second, draws: _bootstrap(first, draws) - _bootstrap(second, draws),
    unpaired=(
        lambda first, second, draws: _around(
            (first - second).mean(), ((first.var() + second.var()) / len(first)) ** 0.5
        ),
        _errors_added,
    ),
    by_the_normal=(
        _of_gap(lambda gap, _: _around(gap.mean(), gap.std() / len(gap) ** 0.5)),
        _of_gap(lambda gap, draws: _around(gap.mean(), gap[draws].mean(-1).std())),
    ),
    of_single_prompts=(
        _of_gap(lambda gap, _: _interval_of(gap, gap.mean())),
        _of_gap(lambda gap, draws: _interval_of(gap[draws].flatten(), gap.mean())),
        _of_gap(lambda gap, _: _around(gap.mean(), gap.std())),
    ),
    over_resamples=_of_gap(lambda gap, draws: _interval_of(gap[draws].mean(0), gap.mean())),
    ninety_percent=_of_gap(lambda gap, draws: _bootstrap(gap, draws, cut=0.05)),
    mean_of_means=_of_gap(lambda gap, draws: _interval_of(gap[draws].mean(-1), gap[draws].mean())),
    summed=_of_gap(lambda gap, draws: _interval_of(gap[draws].sum(-1), gap.sum())),
    absolute_difference=(
        _of(lambda first, second: (first - second).abs()),
        _of_gap(lambda gap, draws: _bootstrap(gap, draws).abs()),
    ),
    share_of_wins=tuple(
        _of(wins)
        for wins in (
            lambda first, second: (first > second).double(),
            lambda first, second: (first >= second).double() - 0.5,
            lambda first, second: torch.sign(first - second),
        )
    ),
    relative=(
        _of(lambda first, second: first / second),
        _of(lambda first, second: (first - second) / second),
        _of(lambda first, second: (first - second) / first),
    ),
    in_standard_deviations=_of(lambda first, second: (first - second) / (first - second).std()),
    sorted_apart=_of(lambda first, second: first.sort().values - second.sort().values),
)


# ---- 3. many questions by chance, and reward at equal KL

false_stars = chapter.predict("false_stars", 37, within=0.2, one_question=5, independent=54, added=75)


Curve = Callable[[Tensor, Tensor, float], Tensor]


def _inside(reward_at: Curve, ends: Callable[[float, float], bool] = float.__le__, outside: float = torch.nan) -> Curve:
    """The same where the run was, nan elsewhere."""

    def answer(kl: Tensor, reward: Tensor, at: float) -> Tensor:
        was = ends(float(kl.min()), at) and ends(at, float(kl.max()))
        return reward_at(kl, reward, at) if was else torch.full_like(kl[0], outside)

    return answer


def _line(kl: Tensor, reward: Tensor, at: float, bend: float = 0.5, at_bend: float | None = None) -> Tensor:
    """Between two points (2,), straight in kl ** bend."""
    left, right = kl**bend
    share = (at ** (bend if at_bend is None else at_bend) - left) / (right - left)
    return reward[0] + share * (reward[1] - reward[0])


def _neighbours(read: Curve, shift: int = 0) -> Curve:
    """What `read` makes of the two points around `at`, sorted; of the two beside them where `shift` is not 0."""

    def answer(kl: Tensor, reward: Tensor, at: float) -> Tensor:
        order = kl.argsort()
        right = int(torch.searchsorted(kl[order], torch.tensor(at, dtype=kl.dtype)).clamp(1, len(kl) - 1)) + shift
        two = order[[max(0, min(right, len(kl) - 1) - 1), max(1, min(right, len(kl) - 1))]]
        return read(kl[two], reward[two], at)

    return answer


_extrapolated = _neighbours(_line)
_right = _inside(_extrapolated)


def _unsorted(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    for i in range(len(kl) - 1):
        if kl[i] <= at <= kl[i + 1]:
            return _line(kl[i : i + 2], reward[i : i + 2], at)
    return reward[-1]


def _curves() -> tuple[Case, ...]:
    kl, reward = torch.tensor([0.0, 3.0, 8.0, 21.0]).double(), torch.tensor([0.5, 0.71, 0.8, 0.93]).double()
    mixed, falls = torch.tensor([2, 0, 3, 1]), torch.tensor([0.5, 0.71, 0.8, 0.74]).double()
    return (
        Case(kl=kl, reward=reward, at=4.0),
        Case(
            "points that are not sorted by KL, and a reward that falls in the end",
            kl=kl[mixed],
            reward=falls[mixed],
            at=16.0,
        ),
        Case("the KL of the run's last point", kl=kl, reward=reward, at=21.0),
        Case("a KL that the run never reached (answer nan)", kl=kl, reward=reward, at=30.0),
        Case("a KL below the run's first point (answer nan)", kl=kl[1:], reward=reward[1:], at=1.0),
    )


def _held(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    return _extrapolated(kl, reward, min(max(at, float(kl.min())), float(kl.max())))


def _wrapped(kl: Tensor, reward: Tensor, at: float) -> Tensor:
    """The neighbour before the first point is index -1, the last one."""
    ends = kl.argsort()[[-1, 0]]
    return _line(kl[ends], reward[ends], at) if at < kl.min() else _extrapolated(kl, reward, at)


def _one_end(read: Curve, upper: bool = True) -> Curve:
    """What `read` gives, and nan beyond one end of the run alone."""
    return lambda kl, reward, at: (
        torch.full_like(kl[0], torch.nan) if (at > kl.max() if upper else at < kl.min()) else read(kl, reward, at)
    )


reward_at_kl = chapter.exercise(
    "reward_at_kl",
    _right,
    _curves,
    nearest=_inside(lambda kl, reward, at: reward[(kl - at).abs().argmin()]),
    one_of_the_two=tuple(_inside(_neighbours(lambda kl, reward, at, i=i: reward[i])) for i in (0, 1)),
    their_mean=_inside(_neighbours(lambda kl, reward, at: reward.mean())),
    extrapolated=_extrapolated,
    held=_held,
    not_nan=tuple(_inside(_extrapolated, outside=number) for number in (0.0, torch.inf, -1.0)),
    ends_left_out=_inside(_extrapolated, float.__lt__),
    one_end=tuple(
        _one_end(*way) for way in ((_extrapolated,), (_held,), (_wrapped,), (_extrapolated, False), (_held, False))
    ),
    unsorted=_inside(_unsorted),
    kl_sorted_alone=lambda kl, reward, at: _right(kl.sort().values, reward, at),
    sorted_apart=lambda kl, reward, at: _right(kl.sort().values, reward.sort().values, at),
    straight_in_nats=_inside(_neighbours(lambda kl, reward, at: _line(kl, reward, at, 1.0))),
    straight_in_log=_inside(_neighbours(lambda kl, reward, at: _line(kl, reward, at, 1e-9))),
    root_on_one_side=(
        _inside(_neighbours(lambda kl, reward, at: _line(kl, reward, at, 0.5, 1.0))),
        _inside(_neighbours(lambda kl, reward, at: _line(kl, reward, at, 1.0, 0.5))),
        lambda kl, reward, at: _right(kl, reward, at**2),
        lambda kl, reward, at: _right(kl**2, reward, at),
    ),
    root_of_the_share=_inside(
        _neighbours(
            lambda kl, reward, at: reward[0] + ((at - kl[0]) / (kl[1] - kl[0])) ** 0.5 * (reward[1] - reward[0])
        )
    ),
    share_reversed=_inside(_neighbours(lambda kl, reward, at: _line(kl, reward.flip(0), at))),
    wrong_segment=(_inside(_neighbours(_line, -1)), _inside(_neighbours(_line, 1))),
    between_the_ends=_inside(lambda kl, reward, at: _line(*(x[kl.argsort()[[0, -1]]] for x in (kl, reward)), at)),
    the_end=(lambda kl, reward, at: reward[-1], lambda kl, reward, at: reward[kl.argmax()]),
)


# ---- 4. what pairing takes off, and a correction for many questions

paired_error = chapter.complete(
    "paired_error",
    "inverse",
    "one",
    "minus_two",
    unpaired=(None, "one", "nothing"),
    variances_subtracted=(None, "minus_one", None),
    shared_added=(None, "one", "plus_two"),
    product_once=(None, "one", "minus_one"),
    root=("inverse_root", "one", "minus_two"),
    answers_counted=("of_answers", "one", "minus_two"),
    single_prompt=("one", "one", "minus_two"),
)


def _weighted(ranked: Tensor) -> Tensor:
    return ranked * torch.arange(len(ranked), 0, -1, dtype=ranked.dtype)


def _in_place(corrected: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(corrected).scatter(0, order, corrected)


def _holm(p: Tensor) -> Tensor:
    return _in_place(_weighted(p.sort().values).cummax(0).values.clamp(max=1), p.argsort())


def _ranked(correct: Callable[[Tensor, Tensor], Tensor], downwards: bool = False) -> Callable[[Tensor], Tensor]:
    """What `correct` makes of the p-values in order and of their ranks, 1 the smallest, each put back where it came from."""

    def answer(p: Tensor) -> Tensor:
        ranked, order = p.sort(descending=downwards)
        return _in_place(correct(ranked, torch.arange(1, len(p) + 1, dtype=p.dtype)), order)

    return answer


def _highest(corrected: Tensor) -> Tensor:
    return corrected.cummax(0).values.clamp(max=1)


def _from_above(corrected: Tensor) -> Tensor:
    return corrected.flip(0).cummin(0).values.flip(0).clamp(max=1)


holm = chapter.exercise(
    "holm",
    _holm,
    lambda: (
        Case(p=torch.tensor([0.03, 0.001, 0.2, 0.012]).double()),
        Case("two that are nearly the same", p=torch.tensor([0.021, 0.02, 0.001]).double()),
        Case("large ones", p=torch.tensor([0.6, 0.9, 0.04]).double()),
    ),
    bonferroni=(lambda p: (len(p) * p).clamp(max=1), lambda p: len(p) * p),
    may_fall=(
        lambda p: _in_place(_weighted(p.sort().values).clamp(max=1), p.argsort()),
        lambda p: _in_place(_weighted(p.sort().values), p.argsort()),
    ),
    smallest_so_far=_ranked(lambda p, rank: (p * rank.flip(0)).cummin(0).values.clamp(max=1)),
    from_above=_ranked(lambda p, rank: _from_above(p * rank.flip(0))),
    above_one=lambda p: _in_place(_weighted(p.sort().values).cummax(0).values, p.argsort()),
    as_they_stand=(lambda p: _highest(_weighted(p)), lambda p: _weighted(p).clamp(max=1)),
    sorted_answer=lambda p: _highest(_weighted(p.sort().values)),
    put_back_wrongly=lambda p: _highest(_weighted(p.sort().values))[p.argsort()],
    downwards=_ranked(lambda p, rank: _highest(p * rank.flip(0)), downwards=True),
    times_rank=(_ranked(lambda p, rank: _highest(p * rank)), _ranked(lambda p, rank: p * rank)),
    off_by_one=(
        _ranked(lambda p, rank: _highest(p * (rank.flip(0) - 1))),
        _ranked(lambda p, rank: _highest(p * (rank.flip(0) + 1))),
    ),
    false_discoveries=(
        _ranked(lambda p, rank: _from_above(p * len(p) / rank)),
        _ranked(lambda p, rank: (p * len(p) / rank).clamp(max=1)),
    ),
    independent=(
        lambda p: 1 - (1 - p) ** len(p),
        _ranked(lambda p, rank: (1 - (1 - p) ** rank.flip(0)).cummax(0).values),
    ),
    divided=(_ranked(lambda p, rank: p / rank.flip(0)), lambda p: p / len(p)),
    levels=(_ranked(lambda p, rank: 0.05 / rank.flip(0)), lambda p: torch.full_like(p, 0.05 / len(p))),
    verdicts=(lambda p: _holm(p) < 0.05, lambda p: (_holm(p) >= 0.05).double()),
)


after_holm = chapter.predict("after_holm", 4, within=0.05, none_lost=6, one_too_many=5, one_too_few=3)
to_a_verdict = chapter.order(
    "to_a_verdict",
    "setting",
    "number",
    "subtract",
    "average",
    "p_value",
    "holm",
    "verdict",
    setting_afterwards=("number", "setting"),
    subtracted_curves=("subtract", "number"),
    averaged_first=("average", "subtract"),
    p_from_nowhere=("p_value", "average"),
    corrected_too_soon=("holm", "p_value"),
    judged_uncorrected=("verdict", "holm"),
)


# ---- 5. what a term does, and what may be said

it_charges = chapter.predict("it_charges", "both")
what_may_be_said = chapter.open_ended("what_may_be_said")


quiz = chapter.quiz()

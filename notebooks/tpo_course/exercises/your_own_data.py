"""Exercises of 10_your_own_data.ipynb: what to hold out, a rule that needs no model, what to do with an interval; a plan."""

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case
from tpo_course.words import Chapter

chapter = Chapter(__file__)


# ---- 0. what holding out by rows lets through

seen_before = chapter.complete(
    "seen_before",
    "held_out",
    "three",
    one_held_out=("kept", "three"),
    itself_counted=("held_out", "four"),
    any_of_four=("kept", "four"),
)


# ---- 1. how far a silly rule gets


def _longer(chosen: Tensor, rejected: Tensor) -> Tensor:
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()


shortcut = chapter.exercise(
    "shortcut",
    _longer,
    lambda: (
        Case(chosen=torch.tensor([9, 4, 7, 7, 12, 3]), rejected=torch.tensor([5, 8, 7, 2, 12, 2])),
        Case("every pair a tie", chosen=torch.tensor([6, 6, 6]), rejected=torch.tensor([6, 6, 6])),
        Case("one pair", chosen=torch.tensor([5]), rejected=torch.tensor([9])),
    ),
    ties_lost=lambda chosen, rejected: (chosen > rejected).double().mean(),
    ties_won=lambda chosen, rejected: (chosen >= rejected).double().mean(),
    ties_left_out=lambda chosen, rejected: (
        (chosen > rejected)[chosen != rejected].double().mean()
        if (chosen != rejected).any()
        else torch.tensor(0.0).double()
    ),
    the_shorter=(
        lambda chosen, rejected: 1 - _longer(chosen, rejected),
        lambda chosen, rejected: (chosen < rejected).double().mean(),
        lambda chosen, rejected: (chosen <= rejected).double().mean(),
    ),
    signs=lambda chosen, rejected: torch.sign(chosen - rejected).double().mean(),
    percent=lambda chosen, rejected: 100 * _longer(chosen, rejected),
    ties_half_left_out=lambda chosen, rejected: (
        (chosen > rejected).sum() / (len(chosen) - 0.5 * (chosen == rejected).sum()).double()
    ),
    odds=lambda chosen, rejected: (chosen > rejected).sum() / (chosen < rejected).sum().double(),
    share_of_tokens=lambda chosen, rejected: chosen.sum() / (chosen + rejected).sum().double(),
    better_rule=lambda chosen, rejected: 0.5 + (_longer(chosen, rejected) - 0.5).abs(),
    of_the_means=lambda chosen, rejected: _longer(chosen.double().mean()[None], rejected.double().mean()[None]),
    mean_difference=lambda chosen, rejected: (chosen - rejected).double().mean(),
    a_count=lambda chosen, rejected: _longer(chosen, rejected) * len(chosen),
)


# ---- 2. what doctor says, and what an interval lets you decide

doctor_says = chapter.choose("doctor_says", "lengths", "all_learned")


def _decision(low: Tensor, high: Tensor, matters: float) -> Tensor:
    better, worse = (low >= matters).long(), (high <= -matters).long()
    no_gain = ((high < matters) & (worse == 0)).long()
    return better + 2 * no_gain - worse


def _intervals() -> tuple[Case, ...]:
    bounds = torch.tensor(
        [[0.02, 0.05], [0.002, 0.006], [0.004, 0.03], [-0.004, 0.004], [-0.05, -0.02], [-0.03, 0.004], [-0.03, 0.03]],
        dtype=torch.float64,
    )
    others = torch.tensor([[-0.05, -0.02], [-0.03, -0.002], [0.004, 0.013]], dtype=torch.float64)
    edges = torch.tensor([[0.1, 0.3], [-0.3, -0.1], [-0.3, 0.1]], dtype=torch.float64)  # in float32 .1 is above .1
    return (
        Case("intervals of gains and losses, .01 matters", low=bounds[:, 0], high=bounds[:, 1], matters=0.01),
        Case("two losses and a small gain, .01 matters", low=others[:, 0], high=others[:, 1], matters=0.01),
        Case("bounds that stand on the edge, .1 matters", low=edges[:, 0], high=edges[:, 1], matters=0.1),
    )


def _by_zero(low: Tensor, high: Tensor, matters: float) -> Tensor:
    return (low > 0).long() - (high < 0).long()


def _by_middle(low: Tensor, high: Tensor, matters: float) -> Tensor:
    middle = (low + high) / 2
    return (middle >= matters).long() - (middle <= -matters).long() + 2 * (middle.abs() < matters).long()


def _open_is_equal(low: Tensor, high: Tensor, matters: float) -> Tensor:
    found = _decision(low, high, matters)
    return torch.where(found == 0, 2, found)


def _never_two(low: Tensor, high: Tensor, matters: float) -> Tensor:
    found = _decision(low, high, matters)
    return torch.where(found == 2, 0, found)


def _both_sides(low: Tensor, high: Tensor, matters: float) -> Tensor:
    within = ((low > -matters) & (high < matters)).long()
    return (low >= matters).long() + 2 * within - (high <= -matters).long()


def _rule(
    take: Callable[..., Tensor], worse: Callable[..., Tensor], no_gain: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Three conditions on (low, high, matters), asked one after the other, as an answer."""

    def answer(low: Tensor, high: Tensor, matters: float) -> Tensor:
        asked = [condition(low, high, matters) for condition in (take, worse, no_gain)]
        return torch.where(asked[0], 1, torch.where(asked[1], -1, torch.where(asked[2], 2, 0)))

    return answer


def _take(low: Tensor, high: Tensor, matters: float) -> Tensor:
    return low >= matters


def _worse(low: Tensor, high: Tensor, matters: float) -> Tensor:
    return high <= -matters


def _below(low: Tensor, high: Tensor, matters: float) -> Tensor:
    return high < matters


def _losses_unnamed(low: Tensor, high: Tensor, matters: float) -> Tensor:
    return torch.where(high < matters, 2, _decision(low, high, matters))


decision = chapter.exercise(
    "decision",
    _decision,
    _intervals,
    by_zero=_by_zero,
    by_middle=_by_middle,
    open_is_no_gain=_open_is_equal,
    no_gain_is_open=_never_two,
    both_sides=_both_sides,
    strict=(
        _rule(lambda a, b, m: a > m, _worse, _below),
        _rule(_take, lambda a, b, m: b < -m, _below),
        _rule(_take, _worse, lambda a, b, m: b <= m),
        _rule(lambda a, b, m: a > m, lambda a, b, m: b < -m, _below),
        _rule(lambda a, b, m: a > m, lambda a, b, m: b < -m, lambda a, b, m: b <= m),
    ),
    losses_unnamed=(_losses_unnamed, _rule(_take, lambda a, b, m: b < -torch.inf, _below)),
    any_loss=_rule(_take, lambda a, b, m: b < 0, _below),
    any_gain=_rule(lambda a, b, m: a > 0, _worse, _below),
    best_case=_rule(lambda a, b, m: b >= m, _worse, _below),
    worst_case=_rule(_take, lambda a, b, m: a <= -m, _below),
    holds_zero=_rule(_take, _worse, lambda a, b, m: (a <= 0) & (b >= 0)),
    narrow=_rule(_take, _worse, lambda a, b, m: b - a < m),
    added_up=lambda low, high, matters: (
        (low >= matters).long() + 2 * (high < matters).long() - (high <= -matters).long()
    ),
    exchanged=lambda low, high, matters: _decision(-high, -low, matters),
    codes_exchanged=lambda low, high, matters: torch.tensor([2, 1, 0, -1])[_decision(low, high, matters).long()],
)


# ---- 3. what comes before what

to_a_decision = chapter.order(
    "to_a_decision",
    "group",
    "hold_out",
    "rules",
    "settings",
    "scores",
    "interval",
    "decide",
    trained_on_all=("settings", "hold_out"),
    split_through_questions=("hold_out", "group"),
    looked_first=("rules", "hold_out"),
    shortcut_learned=("settings", "rules"),
    chosen_on_the_test=("scores", "settings"),
    nothing_to_subtract=("interval", "scores"),
    decided_by_the_mean=("decide", "interval"),
)


before_you_train = chapter.open_ended("before_you_train")
quiz = chapter.quiz()

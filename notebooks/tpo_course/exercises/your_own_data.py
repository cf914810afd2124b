"""Exercises of 10_your_own_data.ipynb: a rule that needs no model, and what to do with an interval."""

import torch
from torch import Tensor

from tpo_course.exercise import Case
from tpo_course.words import Chapter

chapter = Chapter(__file__)


# ---- 1. how far a silly rule gets


def _longer(chosen: Tensor, rejected: Tensor) -> Tensor:
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()


shortcut = chapter.exercise(
    "shortcut",
    _longer,
    lambda: (
        Case(chosen=torch.tensor([9, 4, 7, 7, 12, 3]), rejected=torch.tensor([5, 8, 7, 2, 12, 9])),
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
    the_shorter=lambda chosen, rejected: 1 - _longer(chosen, rejected),
    of_the_means=lambda chosen, rejected: _longer(chosen.double().mean()[None], rejected.double().mean()[None]),
    mean_difference=lambda chosen, rejected: (chosen - rejected).double().mean(),
    a_count=lambda chosen, rejected: _longer(chosen, rejected) * len(chosen),
)


# ---- 2. what an interval lets you decide


def _decision(low: Tensor, high: Tensor, matters: float) -> Tensor:
    better, worse = (low >= matters).long(), (high <= -matters).long()
    no_gain = ((high < matters) & (worse == 0)).long()
    return better + 2 * no_gain - worse


def _intervals() -> tuple[Case, ...]:
    bounds = torch.tensor(
        [[0.02, 0.05], [0.002, 0.006], [0.004, 0.03], [-0.004, 0.004], [-0.05, -0.02], [-0.03, 0.004], [-0.03, 0.03]]
    ).double()
    edges = torch.tensor([[0.1, 0.3], [-0.3, -0.1], [-0.3, 0.1]]).double()
    return (
        Case(low=bounds[:, 0], high=bounds[:, 1], matters=0.01),
        Case("bounds that stand on the edge", low=edges[:, 0], high=edges[:, 1], matters=0.1),
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


decision = chapter.exercise(
    "decision",
    _decision,
    _intervals,
    by_zero=_by_zero,
    by_middle=_by_middle,
    open_is_no_gain=_open_is_equal,
    no_gain_is_open=_never_two,
    both_sides=_both_sides,
)


quiz = chapter.quiz()

"""Exercises of 01_preferences.ipynb: from scores to probabilities, to a loss, to its gradient, and to pairs."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Uses
from tpo_course.words import Chapter

chapter = Chapter(__file__)


def _leaf(values: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# ---- 1. two rewards -> a probability


win_probability = chapter.exercise(
    "win_probability",
    lambda reward_w, reward_l: torch.sigmoid(reward_w - reward_l),
    lambda: (
        Case(reward_w=_leaf([1.2, -0.4, 0.7, -2.5, 0.3]), reward_l=_leaf([0.5, 0.9, 0.7, -3.0, -1.1])),
        Case("a single pair", reward_w=_leaf([-0.8]), reward_l=_leaf([1.7])),
        Case("rewards near 1,000", reward_w=_leaf([1001.0, 900.0]), reward_l=_leaf([1000.0, 902.0])),
    ),
    gap_reversed=lambda reward_w, reward_l: torch.sigmoid(reward_l - reward_w),
    overflows=lambda reward_w, reward_l: reward_w.exp() / (reward_w.exp() + reward_l.exp()),
    ratio_of_rewards=lambda reward_w, reward_l: reward_w / (reward_w + reward_l),
    squashed_apart=lambda reward_w, reward_l: reward_w.sigmoid() / (reward_w.sigmoid() + reward_l.sigmoid()),
    judged_alone=lambda reward_w, reward_l: reward_w.sigmoid() * (-reward_l).sigmoid(),
    softmax_over_batch=(
        lambda reward_w, reward_l: (reward_w - reward_l).softmax(0),
        lambda reward_w, reward_l: torch.stack([reward_w, reward_l]).softmax(-1)[0],
        lambda reward_w, reward_l: torch.cat([reward_w, reward_l]).softmax(0)[: len(reward_w)],
    ),
    logarithm=lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l),
    no_noise=lambda reward_w, reward_l: (reward_w > reward_l).double(),
)


# ---- 2. a batch of pairs -> a loss


def _batches() -> tuple[Case, ...]:
    far_w, far_l = (_leaf(values, torch.float32) for values in ([0.5, -90.0, 80.0], [1.0, 60.0, -70.0]))
    return (
        Case(reward_w=_leaf([0.9, -1.3, 2.0, 0.1, -0.6]), reward_l=_leaf([0.2, 0.4, -1.5, 0.1, -0.9])),
        Case("a single pair", reward_w=_leaf([-0.3]), reward_l=_leaf([1.1])),
        Case("gaps of 150 nats in float32", reward_w=far_w, reward_l=far_l),
    )


SMALL = (*(10.0**-power for power in range(4, 13)), torch.finfo(torch.float32).eps)  # what people add, or clamp at


def _kept_off_zero(size: float, clamp: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def wrong(reward_w: Tensor, reward_l: Tensor) -> Tensor:
        p = (reward_w - reward_l).sigmoid()
        return -(p.clamp_min(size) if clamp else p + size).log().mean()

    return wrong


preference_nll = chapter.exercise(
    "preference_nll",
    lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).mean(),
    _batches,
    log_of_sigmoid=lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().log().mean(),
    small_constant=tuple(_kept_off_zero(size, clamp) for size in SMALL for clamp in (False, True)),
    no_minus=lambda reward_w, reward_l: F.logsigmoid(reward_w - reward_l).mean(),
    swapped=lambda reward_w, reward_l: -F.logsigmoid(reward_l - reward_w).mean(),
    summed=lambda reward_w, reward_l: -F.logsigmoid(reward_w - reward_l).sum(),
    no_logarithm=lambda reward_w, reward_l: -(reward_w - reward_l).sigmoid().mean(),
    averaged_first=lambda reward_w, reward_l: -F.logsigmoid((reward_w - reward_l).mean()),
)


# ---- 3. its gradient, for a reward that is linear in token counts


def _linear() -> tuple[Case, ...]:
    draw = torch.Generator().manual_seed(3)

    def case(rows: int, weights: list[float], words: str = "") -> Case:
        differences = torch.randint(-2, 3, (rows, len(weights)), generator=draw).double()
        return Case(words, weights=torch.tensor(weights, dtype=torch.float64), differences=differences)

    return case(5, [0.4, -0.7, 0.2]), case(3, [1.5, 0.0, -0.3, 0.8]), case(7, [0.0, 0.0], "weights that are still 0")


def _push(weight: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """(d,) gradient of the mean loss, every pair's difference weighed by -weight(margin)."""
    return lambda weights, differences: -(weight(differences @ weights)[:, None] * differences).mean(0)


def _by_autograd(weights: Tensor, differences: Tensor) -> Tensor:
    at = weights.clone().requires_grad_()
    return torch.autograd.grad(-F.logsigmoid(differences @ at).mean(), at)[0]


AUTOGRAD = ("autograd", "backward", "gradient", "jacobian", "jacrev", "jacfwd", "vjp", "grad", "value_and_grad")
_gradient = _push(lambda margin: torch.sigmoid(-margin))
nll_gradient = chapter.exercise(
    "nll_gradient",
    _gradient,
    _linear,
    by_autograd=Uses(AUTOGRAD, _by_autograd),
    sign_reversed=lambda **given: -_gradient(**given),
    weighted_by_confidence=_push(torch.sigmoid),
    no_factor=_push(torch.ones_like),
    slope_of_sigmoid=_push(lambda margin: torch.sigmoid(margin) * torch.sigmoid(-margin)),
    summed=lambda weights, differences: _gradient(weights, differences) * len(differences),
    averaged_apart=_push(lambda margin: torch.sigmoid(-margin).mean().expand_as(margin)),
)


# ---- 4. scores -> pairs


def _scores() -> tuple[Case, ...]:
    exact = torch.tensor([[0.25, 0.75, 0.5, 0.5], [0.125, 0.125, 1.0, 0.0]])  # gaps that floats hold exactly
    return (
        Case("gaps that equal min_gap exactly", scores=exact, min_gap=0.25),
        Case("min_gap = 0 and equal scores", scores=exact, min_gap=0.0),
        Case("three completions of one prompt", scores=torch.tensor([[0.9, 0.1, 0.4]]), min_gap=0.45),
        Case("scores that differ by a thousandth", scores=torch.tensor([[0.501, 0.5, 0.101]]), min_gap=0.0),
        Case("a gap of a thousandth, min_gap = 0.2", scores=torch.tensor([[0.501, 0.5, 0.2505]]), min_gap=0.2),
    )


def _gaps(scores: Tensor) -> Tensor:
    return scores[:, :, None] - scores[:, None, :]


def _right_pairs(scores: Tensor, min_gap: float) -> Tensor:
    return (_gaps(scores) > 0) & (_gaps(scores) >= min_gap)


def _on_logits(scores: Tensor, min_gap: float) -> Tensor:
    return _right_pairs(scores.logit(), min_gap)


def _best_worst(scores: Tensor, min_gap: float) -> Tensor:
    best, worst = (F.one_hot(i, scores.shape[-1]).bool() for i in (scores.argmax(-1), scores.argmin(-1)))  # (P, K)
    return best[:, :, None] & worst[:, None, :] & _right_pairs(scores, min_gap)


preferred_pairs = chapter.exercise(
    "preferred_pairs",
    _right_pairs,
    _scores,
    swapped=lambda scores, min_gap: _right_pairs(scores, min_gap).mT,
    absolute_gap=lambda scores, min_gap: (_gaps(scores).abs() > 0) & (_gaps(scores).abs() >= min_gap),
    ties=lambda scores, min_gap: _gaps(scores) >= min_gap,
    gap_equal_to_min_gap=lambda scores, min_gap: _gaps(scores) > min_gap,
    gaps_in_logits=_on_logits,
    rounded=tuple(
        lambda scores, min_gap, digits=digits: _right_pairs(scores.round(decimals=digits), min_gap) for digits in (1, 2)
    ),
    no_min_gap=lambda scores, min_gap: _gaps(scores) > 0,
    order_of_sampling=lambda scores, min_gap: _right_pairs(scores, min_gap).triu(),
    best_against_worst=_best_worst,
)


quiz = chapter.quiz()

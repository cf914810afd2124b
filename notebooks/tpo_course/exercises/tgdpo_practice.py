"""Exercises of 05b_tgdpo_practice.ipynb: TGDPO's loss, and what a guide's runs may be compared by."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, loss_of, marks, narrow, normal
from tpo_course.pair_cases import guided, log_ratio
from tpo_course.words import Chapter
from tpo_lib import losses
from tpo_lib.losses import F_FLOOR
from tpo_lib.types import TokenStats

chapter = Chapter(__file__)


# ---- tgdpo_loss


def _far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw, sides = normal(5), {}
    for name, row, shift in (("chosen", "xxx.", -300.0), ("rejected", "xxxx", 5.0)):
        side = guided(marks(row), draw)
        sides[name] = narrow(replace(side, logps=side.logps + shift * side.mask))
    return sides


def _loss_cases() -> tuple[Case, ...]:
    """Gradients at the policy are compared on full rows alone: at padding, where nobody needs them, they may differ."""
    draw = normal(3)
    holes = {
        "chosen": guided(marks(".xxxx.", "..xxx.", "xx.xx."), draw),
        "rejected": guided(marks(".xx...", "..x.xx", "xxxxxx"), draw),
    }
    full = {name: guided(marks("xxxxx", "xxxxx"), draw, learn=True) for name in ("chosen", "rejected")}
    return (
        Case("responses of unequal length", **holes, beta=0.1, alpha=0.5, guide_beta=0.3),
        Case("strong guidance, with gradients", **full, beta=0.5, alpha=1.5, guide_beta=0.8),
        Case("a pair that is wrong by hundreds of nats", **_far_apart(), beta=0.7, alpha=0.5, guide_beta=0.2),
    )


_loss = loss_of(losses.tgdpo)


def _f(signal: Tensor) -> Tensor:
    return (1 + signal).clamp_min(F_FLOOR)


def _per_token(side: TokenStats, values: Tensor) -> Tensor:
    """(B, 1) mean of (B, T-1) values over the tokens of each response."""
    return torch.where(side.mask, values, 0.0).sum(-1, keepdim=True) / side.mask.sum(-1, keepdim=True)


def _weighted(side: TokenStats, signal: Tensor) -> Tensor:
    return _f(signal.detach()) * log_ratio(side)


def _from_rewards(
    reward: Callable[[TokenStats, Tensor], Tensor],
    signs: tuple[int, int] = (1, -1),
    log_sigmoid: Callable[[Tensor], Tensor] = F.logsigmoid,
) -> Callable[..., Tensor]:
    """-log sigma(beta reward(chosen) - beta reward(rejected)); `reward` sees a side and its +-alpha r_hat, not detached."""

    def loss(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
        won, lost = (
            beta * reward(side, sign * alpha * guide_beta * (side.guide_logps - side.ref_logps)).sum(-1)
            for side, sign in zip((chosen, rejected), signs, strict=True)
        )
        return -log_sigmoid(won - lost)

    return loss


def _weighted_pair(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    f = _f(alpha * guide_beta * (chosen.guide_logps - chosen.ref_logps).detach())
    return _per_token(chosen, f)[:, 0] * losses.dpo(chosen, rejected, beta=beta).loss


def _guided_by_itself(chosen: TokenStats, rejected: TokenStats, **given: float) -> Tensor:
    return _loss(*(replace(side, guide_logps=side.logps.detach()) for side in (chosen, rejected)), **given)


tgdpo_loss = chapter.exercise(
    "tgdpo_loss",
    _loss,
    _loss_cases,
    wrong_guide_beta=lambda **given: _loss(**given | {"guide_beta": given["beta"]}),
    same_sign=_from_rewards(_weighted, signs=(1, 1)),
    weights_swapped=_from_rewards(_weighted, signs=(-1, 1)),
    no_floor=_from_rewards(lambda side, signal: (1 + signal.detach()) * log_ratio(side)),
    absolute_value=_from_rewards(lambda side, signal: (1 + signal.detach()).abs() * log_ratio(side)),
    not_detached=_from_rewards(lambda side, signal: _f(signal) * log_ratio(side)),
    normalised=_from_rewards(lambda side, signal: _weighted(side, signal) / _per_token(side, _f(signal.detach()))),
    weighted_pair=_weighted_pair,
    reference_not_weighted=_from_rewards(lambda side, signal: _f(signal.detach()) * side.logps - side.ref_logps),
    mean=_from_rewards(lambda side, signal: _per_token(side, _weighted(side, signal))),
    detached=lambda **given: _loss(**given).detach(),
    no_weights=lambda chosen, rejected, beta, **_: losses.dpo(chosen, rejected, beta=beta).loss,
    guided_by_itself=_guided_by_itself,
    no_reference=_from_rewards(lambda side, signal: _f(signal.detach()) * side.logps),
    no_guide_beta=lambda **given: _loss(**given | {"guide_beta": 1.0}),
    guide_beta_for_beta=lambda **given: _loss(**given | {"beta": given["guide_beta"]}),
    r_hat_summed=_from_rewards(lambda side, signal: _f(signal.detach().sum(-1, keepdim=True)) * log_ratio(side)),
    beta_outside=lambda **given: given["beta"] * _loss(**given | {"beta": 1.0}),
    exponential=_from_rewards(lambda side, signal: signal.detach().exp() * log_ratio(side)),
    no_beta=lambda **given: _loss(**given | {"beta": 1.0}),
    swapped=lambda chosen, rejected, **given: _loss(rejected, chosen, **given),
    no_minus=lambda **given: -_loss(**given),
    log_of_sigmoid=_from_rewards(_weighted, log_sigmoid=lambda margin: torch.sigmoid(margin).log()),
)


# ---- a bug, predictions, a comparison

line_of_tgdpo = chapter.name_the_bug("line_of_tgdpo", "bug_11")
predict = chapter.answer
one_sign = chapter.predict("one_sign", 60, within=0.12, chance=50, nearly_all=95, as_share=0.6)
travels_further = chapter.predict("travels_further", "+")
longer_guide = chapter.predict("longer_guide", "+")
what_the_control_says = chapter.choose("what_the_control_says", "together", "onward")
alpha_that_hides = chapter.predict("alpha_that_hides", 5, within=0.1, unchanged=0.5, other_way=0.05, squared=50)
further_or_better = chapter.choose("further_or_better", "equal_kl", "guide_counts")
train_a_guide = chapter.open_ended("train_a_guide")


quiz = chapter.quiz()

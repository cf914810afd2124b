"""Exercises of 02_dpo.ipynb: the Gibbs optimum, a response's log-probability, DPO's loss, its coefficient on every token."""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations.breaks import BREAKS
from tpo_course.exercise import Case, loss_of, marks, normal
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld
from tpo_lib import losses, stats
from tpo_lib.types import IGNORE, TokenStats

chapter = Chapter(__file__)
_dpo = loss_of(losses.dpo)


# ---- 1. the optimum of the KL-regularised objective


def _gibbs_cases() -> tuple[Case, ...]:
    def case(prompts: int, responses: int, beta: float, seed: int, words: str = "", scale: float = 1.0) -> Case:
        ref_logps = normal(seed)(prompts, responses).log_softmax(-1)
        reward = scale * normal(seed + 1)(prompts, responses)
        return Case(words, ref_logps=ref_logps, reward=reward, beta=beta)

    return (
        case(3, 7, 0.5, seed=0),
        case(1, 4, 2.5, seed=2, words="a single prompt"),
        case(2, 5, 0.01, seed=4, words="rewards of a thousand times beta", scale=10.0),
    )


def _gibbs(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (ref_logps + reward / beta).log_softmax(-1)


def _over_all(scores: Tensor) -> Tensor:
    return scores - scores.logsumexp((0, 1))


def _gibbs_by_exp(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    unnormalised = ref_logps.exp() * (reward / beta).exp()
    return unnormalised / unnormalised.sum(-1, keepdim=True)


gibbs = chapter.exercise(
    "gibbs",
    _gibbs,
    _gibbs_cases,
    times_beta=lambda ref_logps, reward, beta: (ref_logps + beta * reward).log_softmax(-1),
    no_normaliser=lambda ref_logps, reward, beta: ref_logps + reward / beta,
    times_beta_no_normaliser=lambda ref_logps, reward, beta: ref_logps + beta * reward,
    over_all_prompts=lambda ref_logps, reward, beta: _over_all(ref_logps + reward / beta),
    over_prompts=lambda ref_logps, reward, beta: (ref_logps + reward / beta).log_softmax(0),
    no_reference=lambda ref_logps, reward, beta: (reward / beta).log_softmax(-1),
    tempered_reference=lambda ref_logps, reward, beta: ((ref_logps + reward) / beta).log_softmax(-1),
    probabilities=lambda **given: _gibbs(**given).exp(),
    overflowing_probabilities=_gibbs_by_exp,
    overflows=lambda **given: _gibbs_by_exp(**given).log(),
    normalised_apart=lambda ref_logps, reward, beta: ref_logps + (reward / beta).log_softmax(-1),
    beta_log_z=lambda ref_logps, reward, beta: (z := ref_logps + reward / beta) - beta * z.logsumexp(-1, True),
    log_of_softmax=lambda ref_logps, reward, beta: (ref_logps + reward / beta).softmax(-1).log(),
    minus_reward=lambda ref_logps, reward, beta: (ref_logps - reward / beta).log_softmax(-1),
    log_twice=lambda ref_logps, reward, beta: (ref_logps.log() + reward / beta).log_softmax(-1),
    reference_as_probability=lambda ref_logps, reward, beta: (ref_logps.exp() + reward / beta).log_softmax(-1),
)


# ---- 2. logits and labels -> one log-probability a response


def _logits_cases() -> tuple[Case, ...]:
    labels = torch.tensor(
        [
            [IGNORE, IGNORE, 4, 1, 6, IGNORE, IGNORE],
            [IGNORE, 3, IGNORE, 2, 5, 1, 0],  # a hole: this token is not scored
            [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 2, IGNORE],
        ]
    )
    alone = torch.tensor([[IGNORE, IGNORE, 3, 0, 2, 1, IGNORE]])
    steep = normal(12, torch.float32)(1, 7, 5)
    steep[0, 3, 2] = steep[0, 3].max() - 120.0  # the token the fourth position has to predict
    return (
        Case(logits=normal(10)(3, 7, 8).requires_grad_(), labels=labels),
        Case("a single response", logits=normal(11)(1, 7, 5).requires_grad_(), labels=alone),
        Case("a token whose logit lies 120 below the largest", logits=steep, labels=alone),
    )


def _scored(
    score: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1),
    mask: Callable[[Tensor], Tensor] = lambda labels: labels[:, 1:] != IGNORE,
    ids: Callable[[Tensor], Tensor] = lambda labels: labels[:, 1:],
    read: Callable[[Tensor], Tensor] = lambda logits: logits[:, :-1],
    reduce: Callable[[Tensor, Tensor], Tensor] = lambda logps, mask: logps.sum(-1),
) -> Callable[[Tensor, Tensor], Tensor]:
    """(N,) score of every response; the arguments are the five steps, each of which people get wrong."""

    def response_logps(logits: Tensor, labels: Tensor) -> Tensor:
        logps = score(read(logits)).gather(-1, ids(labels).clamp_min(0)[..., None])[..., 0]  # (N, T-1)
        return reduce(torch.where(mask(labels), logps, 0.0), mask(labels))

    return response_logps


def _unshifted(values: Tensor) -> Tensor:
    return values[:, :-1] != IGNORE


response_logps = chapter.exercise(
    "response_logps",
    lambda logits, labels: stats.token_stats(logits, labels, None).logps.sum(-1),
    _logits_cases,
    mean=_scored(reduce=lambda logps, mask: logps.sum(-1) / mask.sum(-1)),
    mean_over_columns=_scored(reduce=lambda logps, mask: logps.mean(-1)),
    no_shift=_scored(read=lambda logits: logits[:, 1:]),
    shifted_backwards=_scored(read=lambda logits: logits[:, 1:], ids=lambda labels: labels[:, :-1], mask=_unshifted),
    mask_off_by_one=_scored(mask=_unshifted),
    no_mask=_scored(mask=lambda labels: torch.ones_like(labels[:, 1:], dtype=torch.bool)),
    raw_logits=_scored(score=lambda z: z),
    log_of_softmax=_scored(score=lambda z: z.softmax(-1).log()),
    over_positions=_scored(score=lambda z: z.log_softmax(1)),
    cross_entropy=lambda **given: -_scored()(**given),
    probability=lambda **given: _scored()(**given).exp(),
    sum_of_probabilities=_scored(score=lambda z: z.softmax(-1)),
    token_0_dropped=_scored(mask=lambda labels: labels[:, 1:] > 0),
    hole_counted=_scored(mask=lambda labels: (labels[:, 1:] != IGNORE).cumsum(-1) > 0),
)


# ---- 3. DPO's loss


def _half(mask: Tensor, seed: int, dtype: torch.dtype = torch.float64) -> TokenStats:
    """Statistics of some responses whose policy lies half a nat a token from the reference."""
    ref = torch.where(mask, normal(seed, dtype)(*mask.shape) - 3.0, 0.0)
    return TokenStats(torch.where(mask, ref + 0.5 * normal(seed + 1, dtype)(*mask.shape), 0.0), ref, mask)


def _stats_cases() -> tuple[Case, ...]:
    chosen = _half(marks("..xx.xx", "xxxxxxx", ".xx...."), seed=20)  # lengths 4, 7, 2, the first with a hole
    rejected = _half(marks("..xxx..", "x......", ".xxxxx."), seed=22)  # and 3, 1, 5
    far, other = (_half(marks("xxxxx"), seed, torch.float32) for seed in (24, 26))
    far = dataclasses.replace(far, logps=far.logps - 100.0)  # margin about -150
    return (
        Case(chosen=chosen, rejected=rejected, beta=0.3),
        Case("a policy that is wrong about the pair by 150 nats", chosen=far, rejected=other, beta=0.3),
    )


def _loss_cases() -> tuple[Case, ...]:
    """As above, and full rows, so that the gradient at padding, which nobody needs, is not asked for."""
    chosen, rejected = (_half(marks("xxxxx", "xxxxx"), seed) for seed in (30, 32))
    for half in (chosen, rejected):
        half.logps.requires_grad_()
    words = "two pairs without padding, with gradients"
    return *_stats_cases(), Case(words, chosen=chosen, rejected=rejected, beta=0.7)


def _tokens(s: TokenStats) -> Tensor:
    return s.logps - s.ref_logps  # (B, T-1), 0 off-mask


def _ratio(s: TokenStats) -> Tensor:
    return _tokens(s).sum(-1)


def _difference(reward: Callable[[TokenStats], Tensor]) -> Callable[..., Tensor]:
    """-log sigma(beta (reward(chosen) - reward(rejected)))."""
    return lambda chosen, rejected, beta: -F.logsigmoid(beta * (reward(chosen) - reward(rejected)))


def _of_ratios(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss as a function of the difference of the log-ratios, (B,), and beta."""
    return lambda chosen, rejected, beta: loss(_ratio(chosen) - _ratio(rejected), beta)


dpo_loss = chapter.exercise(
    "dpo_loss",
    _dpo,
    _loss_cases,
    swapped=_of_ratios(lambda gap, beta: -F.logsigmoid(-beta * gap)),
    no_reference=_difference(lambda s: s.logps.sum(-1)),
    mean=_difference(lambda s: _ratio(s) / s.mask.sum(-1)),
    mean_over_columns=_difference(lambda s: _tokens(s).mean(-1)),
    beta_outside=_of_ratios(lambda gap, beta: -beta * F.logsigmoid(gap)),
    divided_by_beta=_of_ratios(lambda gap, beta: -F.logsigmoid(gap / beta)),
    beta_on_policy_alone=lambda beta, **given: _difference(lambda s: (beta * s.logps - s.ref_logps).sum(-1))(
        **given, beta=1
    ),
    no_minus=_of_ratios(lambda gap, beta: F.logsigmoid(beta * gap)),
    no_logarithm=_of_ratios(lambda gap, beta: -torch.sigmoid(beta * gap)),
    log_of_sigmoid=_of_ratios(lambda gap, beta: -torch.log(torch.sigmoid(beta * gap))),
    token_by_token=lambda **given: _difference(_tokens)(**given).sum(-1),
    reference_added=_difference(lambda s: (s.logps + s.ref_logps).sum(-1)),
    rewards_added=lambda chosen, rejected, beta: -F.logsigmoid(beta * (_ratio(chosen) + _ratio(rejected))),
    judged_alone=lambda chosen, rejected, beta: (
        -F.logsigmoid(beta * _ratio(chosen)) - F.logsigmoid(-beta * _ratio(rejected))
    ),
    margin_alone=_of_ratios(lambda gap, beta: -beta * gap),
    beta_twice=_of_ratios(lambda gap, beta: -beta * F.logsigmoid(beta * gap)),
    small_constant=_of_ratios(lambda gap, beta: -torch.log(torch.sigmoid(beta * gap) + 1e-8)),
    detached=lambda **given: _dpo(**given).detach(),
)


# ---- 4. the coefficient that every token gets


def _slope(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(2B, T-1) derivative of every pair's own loss by its tokens' log-probabilities, from autograd."""
    both = [dataclasses.replace(half, logps=half.logps.detach().requires_grad_()) for half in (chosen, rejected)]
    slopes = torch.autograd.grad(_dpo(*both, beta=beta).sum(), [half.logps for half in both])
    return torch.where(_both(chosen, rejected), torch.cat(slopes), 0.0)


def _both(chosen: TokenStats, rejected: TokenStats) -> Tensor:
    return torch.cat([chosen.mask, rejected.mask])  # (2B, T-1)


def _pull(
    size: Callable[[Tensor, float], Tensor], ratio: Callable = _ratio, masked: bool = True
) -> Callable[..., Tensor]:
    """(2B, T-1) -size on the chosen tokens, +size on the rejected ones; `size` sees the (B,) margins and beta."""

    def coefficient(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
        pull, mask = size(beta * (ratio(chosen) - ratio(rejected)), beta)[:, None], _both(chosen, rejected)
        return torch.where(mask | (not masked), torch.cat([-pull, pull]).expand(mask.shape), 0.0)

    return coefficient


def _per_token(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    chosen_size, rejected_size = (torch.sigmoid(-beta * r) for r in (_tokens(chosen), -_tokens(rejected)))
    return torch.where(_both(chosen, rejected), beta * torch.cat([-chosen_size, rejected_size]), 0.0)


dpo_token_coefficient = chapter.exercise(
    "dpo_token_coefficient",
    _slope,
    _stats_cases,
    weighted_by_confidence=_pull(lambda margin, beta: beta * torch.sigmoid(margin)),
    no_beta=_pull(lambda margin, beta: torch.sigmoid(-margin)),
    signs_swapped=lambda **given: -_slope(**given),
    same_sign=lambda **given: -_slope(**given).abs(),
    no_reference=_pull(lambda margin, beta: beta * torch.sigmoid(-margin), ratio=lambda s: s.logps.sum(-1)),
    divided_by_length=lambda beta, **given: _slope(**given, beta=beta) / _both(**given).sum(-1, keepdim=True),
    no_mask=_pull(lambda margin, beta: beta * torch.sigmoid(-margin), masked=False),
    margin_per_token=_per_token,
    mean_over_batch=lambda chosen, rejected, beta: _slope(chosen, rejected, beta) / len(chosen.logps),
    slope_of_sigmoid=_pull(lambda margin, beta: beta * torch.sigmoid(-margin) * torch.sigmoid(margin)),
    as_at_the_start=_pull(lambda margin, beta: beta / 2 * torch.ones_like(margin)),
    margin_without_beta=_pull(lambda margin, beta: beta * torch.sigmoid(-margin / beta)),
    by_logits=lambda **given: _slope(**given) * (1 - torch.cat([given[s].logps for s in ("chosen", "rejected")]).exp()),
)


# ---- 5. predictions, derivations, explanations


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=3, horizon=2, seed=5, num_prompts=2)


Z_CHANGES = {
    name: BREAKS["dpo.z_cancels"][words]
    for name, words in {
        "seven": "7 added to the reward of both",
        "one_side": "7 added to the chosen reward alone",
        "log_z": "beta log Z added to both rewards",
        "no_beta": "beta left out",
    }.items()
}

predict = chapter.answer
stops_after_b = chapter.predict(
    "stops_after_b", 0.0907, within=0.05, no_eos=0.5593, last_alone=0.1622, added=0.7215, averaged=0.3608
)
one_state = chapter.predict("one_state", 0.2, within=0.02, unweighted=0.5, half=0.25, divided=1.25)
beta_at_the_end = chapter.predict("beta_at_the_end", "-")
beta_at_the_start = chapter.predict("beta_at_the_start", "+")
first_loss = chapter.predict("first_loss", math.log(2), within=0.02, zero=0.0, half=0.5, one=1.0, minus=-math.log(2))
chosen_reward = chapter.predict("chosen_reward", "-")
two_lengths = chapter.predict("two_lengths", "equal")
preferred = chapter.predict("preferred", "night")
after_training = chapter.predict("after_training", "spread")
one_update = chapter.predict("one_update", 1.0, within=0.1, gradient=10.0, squared=100.0, as_at_the_end=0.1)
ten_updates = chapter.predict("ten_updates", "-")
best_rate = chapter.predict("best_rate", "+")
dpo_in_steps = chapter.order(
    "dpo_in_steps",
    "objective",
    "gibbs",
    "solve",
    "preference",
    "cancel",
    "policy",
    z_before_reward=("cancel", "solve"),
    preference_first=("preference", "gibbs"),
    policy_too_soon=("policy", "cancel"),
)
reward_of_policy = chapter.complete(
    "reward_of_policy",
    "beta",
    "star",
    "ref",
    "log_z",
    divided=("inverse", None, None, None),
    upside_down=(None, "ref", "star", None),
    no_prompt_term=("beta", "star", "ref", "zero"),
)
z_notices = chapter.break_it("z_notices", "dpo.z_cancels", _world, Z_CHANGES, beta=0.5)
line_of_dpo = chapter.name_the_bug("line_of_dpo", "bug_8")
both_fall = chapter.open_ended("both_fall")


quiz = chapter.quiz()

"""Exercises of 02_dpo.ipynb: the Gibbs optimum, a response's log-probability, DPO's loss, its coefficient on every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Chapter
from tpo_lib import losses, stats
from tpo_lib.types import IGNORE, TokenStats

NOTEBOOK = "02_dpo.ipynb"
chapter = Chapter(__file__)


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- 1. the optimum of the KL-regularised objective


def _gibbs_cases() -> tuple[Case, ...]:
    def case(prompts: int, responses: int, beta: float, seed: int, words: str = "", scale: float = 1.0) -> Case:
        ref_logps = _normal(prompts, responses, seed=seed).log_softmax(-1)
        reward = scale * _normal(prompts, responses, seed=seed + 1)
        return Case({"ref_logps": ref_logps, "reward": reward, "beta": beta}, words)

    return (
        case(3, 7, 0.5, seed=0),
        case(1, 4, 2.5, seed=2, words="a single prompt"),
        case(2, 5, 0.01, seed=4, words="rewards of a thousand times beta", scale=10.0),
    )


def _gibbs(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (ref_logps + reward / beta).log_softmax(-1)


def _gibbs_by_exp(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    unnormalised = ref_logps.exp() * (reward / beta).exp()
    return unnormalised / unnormalised.sum(-1, keepdim=True)


gibbs = chapter.exercise(
    "gibbs",
    right=_gibbs,
    cases=_gibbs_cases,
    mistakes={
        "times_beta": lambda ref_logps, reward, beta: (ref_logps + beta * reward).log_softmax(-1),
        "no_normaliser": lambda ref_logps, reward, beta: ref_logps + reward / beta,
        "times_beta_no_normaliser": lambda ref_logps, reward, beta: ref_logps + beta * reward,
        "over_all_prompts": lambda ref_logps, reward, beta: (
            (ref_logps + reward / beta).flatten().log_softmax(0).view_as(reward)
        ),
        "over_prompts": lambda ref_logps, reward, beta: (ref_logps + reward / beta).log_softmax(0),
        "no_reference": lambda ref_logps, reward, beta: (reward / beta).log_softmax(-1),
        "tempered_reference": lambda ref_logps, reward, beta: ((ref_logps + reward) / beta).log_softmax(-1),
        "probabilities": lambda ref_logps, reward, beta: _gibbs(ref_logps, reward, beta).exp(),
        "overflowing_probabilities": _gibbs_by_exp,
        "overflows": lambda ref_logps, reward, beta: _gibbs_by_exp(ref_logps, reward, beta).log(),
    },
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
    steep = _normal(1, 7, 5, seed=12, dtype=torch.float32)
    steep[0, 3, 2] = steep[0, 3].max() - 120.0  # the token the fourth position has to predict
    return (
        Case({"logits": _normal(3, 7, 8, seed=10).requires_grad_(), "labels": labels}),
        Case({"logits": _normal(1, 7, 5, seed=11).requires_grad_(), "labels": alone}, "a single response"),
        Case({"logits": steep, "labels": alone}, "a token whose logit lies 120 below the largest"),
    )


def _scored(
    logits: Tensor,
    labels: Tensor,
    score: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1),
    mask: Callable[[Tensor], Tensor] = lambda labels: labels[:, 1:] != IGNORE,
    shift: int = 1,
) -> Tensor:
    """(N, T-1) score of every token, 0 off-mask; score, mask and shift are the parts that people get wrong.

    `shift` says where token t + 1 is looked up: 1 in the logits of position t (right), 0 in those of t + 1. At -1 token t
    is looked up in the logits of t + 1.
    """
    if shift == 1:
        logits, ids, keep = logits[:, :-1], labels[:, 1:], mask(labels)
    elif shift == 0:
        logits, ids, keep = logits[:, 1:], labels[:, 1:], mask(labels)
    else:
        logits, ids, keep = logits[:, 1:], labels[:, :-1], labels[:, :-1] != IGNORE
    per_token = score(logits).gather(-1, ids.clamp_min(0)[..., None])[..., 0]  # (N, T-1)
    return torch.where(keep, per_token, 0.0)


response_logps = chapter.exercise(
    "response_logps",
    right=lambda logits, labels: stats.token_stats(logits, labels, None).logps.sum(-1),
    cases=_logits_cases,
    mistakes={
        "mean": lambda logits, labels: _scored(logits, labels).sum(-1) / (labels[:, 1:] != IGNORE).sum(-1),
        "mean_over_columns": lambda logits, labels: _scored(logits, labels).mean(-1),
        "no_shift": lambda logits, labels: _scored(logits, labels, shift=0).sum(-1),
        "shifted_backwards": lambda logits, labels: _scored(logits, labels, shift=-1).sum(-1),
        "mask_off_by_one": lambda logits, labels: _scored(
            logits, labels, mask=lambda labels: labels[:, :-1] != IGNORE
        ).sum(-1),
        "no_mask": lambda logits, labels: _scored(
            logits, labels, mask=lambda labels: torch.ones_like(labels[:, 1:], dtype=torch.bool)
        ).sum(-1),
        "raw_logits": lambda logits, labels: _scored(logits, labels, score=lambda z: z).sum(-1),
        "log_of_softmax": lambda logits, labels: _scored(logits, labels, score=lambda z: z.softmax(-1).log()).sum(-1),
        "over_positions": lambda logits, labels: _scored(logits, labels, score=lambda z: z.log_softmax(1)).sum(-1),
        "cross_entropy": lambda logits, labels: -_scored(logits, labels).sum(-1),
    },
)


# ---- 3. DPO's loss


def _half(mask: Tensor, seed: int, *, apart: float = 0.5, dtype: torch.dtype = torch.float64) -> TokenStats:
    """Statistics of some responses whose policy lies `apart` nats a token from the reference."""
    ref = torch.where(mask, _normal(*mask.shape, seed=seed, dtype=dtype) - 3.0, 0.0)
    noise = _normal(*mask.shape, seed=seed + 1, dtype=dtype)
    return TokenStats(logps=torch.where(mask, ref + apart * noise, 0.0), ref_logps=ref, mask=mask)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def _padded() -> tuple[TokenStats, TokenStats]:
    """Three pairs: prompts of different lengths, responses of 4 and 3, 7 and 1, 2 and 5 tokens, one with a hole."""
    return (
        _half(_mask("..xx.xx", "xxxxxxx", ".xx...."), seed=20),
        _half(_mask("..xxx..", "x......", ".xxxxx."), seed=22),
    )


def _stats_cases() -> tuple[Case, ...]:
    chosen, rejected = _padded()
    far = _mask("xxxxx")
    case = {"chosen": _half(far, seed=24, dtype=torch.float32), "rejected": _half(far, seed=26, dtype=torch.float32)}
    case["chosen"] = dataclasses.replace(case["chosen"], logps=case["chosen"].logps - 100.0)  # margin about -150
    return (
        Case({"chosen": chosen, "rejected": rejected, "beta": 0.3}),
        Case(case | {"beta": 0.3}, "a policy that is wrong about the pair by 150 nats"),
    )


def _loss_cases() -> tuple[Case, ...]:
    """As above, and full rows, so that the gradient at padding, which nobody needs, is not asked for."""
    mask = _mask("xxxxx", "xxxxx")
    chosen, rejected = (
        dataclasses.replace(half, logps=half.logps.requires_grad_())
        for half in (_half(mask, seed=30), _half(mask, seed=32))
    )
    return (
        *_stats_cases(),
        Case({"chosen": chosen, "rejected": rejected, "beta": 0.7}, "two pairs without padding, with gradients"),
    )


def _ratio(s: TokenStats) -> Tensor:
    return (s.logps - s.ref_logps).sum(-1)


def _mean_ratio(s: TokenStats) -> Tensor:
    return _ratio(s) / s.mask.sum(-1)


dpo_loss = chapter.exercise(
    "dpo_loss",
    right=lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss,
    cases=_loss_cases,
    mistakes={
        "swapped": lambda chosen, rejected, beta: -F.logsigmoid(beta * (_ratio(rejected) - _ratio(chosen))),
        "no_reference": lambda chosen, rejected, beta: (
            -F.logsigmoid(beta * (chosen.logps.sum(-1) - rejected.logps.sum(-1)))
        ),
        "mean": lambda chosen, rejected, beta: -F.logsigmoid(beta * (_mean_ratio(chosen) - _mean_ratio(rejected))),
        "mean_over_columns": lambda chosen, rejected, beta: (
            -F.logsigmoid(
                beta * ((chosen.logps - chosen.ref_logps).mean(-1) - (rejected.logps - rejected.ref_logps).mean(-1))
            )
        ),
        "beta_outside": lambda chosen, rejected, beta: -beta * F.logsigmoid(_ratio(chosen) - _ratio(rejected)),
        "divided_by_beta": lambda chosen, rejected, beta: -F.logsigmoid((_ratio(chosen) - _ratio(rejected)) / beta),
        "beta_on_policy_alone": lambda chosen, rejected, beta: (
            -F.logsigmoid(
                beta * (chosen.logps - rejected.logps).sum(-1) - (chosen.ref_logps - rejected.ref_logps).sum(-1)
            )
        ),
        "no_minus": lambda chosen, rejected, beta: F.logsigmoid(beta * (_ratio(chosen) - _ratio(rejected))),
        "no_logarithm": lambda chosen, rejected, beta: -torch.sigmoid(beta * (_ratio(chosen) - _ratio(rejected))),
        "log_of_sigmoid": lambda chosen, rejected, beta: (
            -torch.log(torch.sigmoid(beta * (_ratio(chosen) - _ratio(rejected))))
        ),
        "token_by_token": lambda chosen, rejected, beta: (
            -F.logsigmoid(beta * ((chosen.logps - chosen.ref_logps) - (rejected.logps - rejected.ref_logps))).sum(-1)
        ),
        "detached": lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss.detach(),
    },
)


# ---- 4. the coefficient that every token gets


def _slope(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(2B, T-1) derivative of every pair's own loss by its tokens' log-probabilities, from autograd."""
    leaf = torch.cat([chosen.logps, rejected.logps]).detach().requires_grad_()
    chosen, rejected = (
        dataclasses.replace(half, logps=part) for half, part in zip((chosen, rejected), leaf.chunk(2), strict=True)
    )
    slope = torch.autograd.grad(losses.dpo(chosen, rejected, beta=beta).loss.sum(), leaf)[0]
    return torch.where(torch.cat([chosen.mask, rejected.mask]), slope, 0.0)


def _pull(chosen: TokenStats, rejected: TokenStats, size: Tensor, *, masked: bool = True) -> Tensor:
    """(2B, T-1) -size on the chosen tokens, +size on the rejected ones; `size` is (B, 1)."""
    mask = torch.cat([chosen.mask, rejected.mask])
    return torch.where(mask | (not masked), torch.cat([-size, size]).expand(mask.shape), 0.0)


def _wrong(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(B, 1) sigma(-margin)."""
    return torch.sigmoid(beta * (_ratio(rejected) - _ratio(chosen)))[:, None]


def _per_token(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    ratio = torch.cat([chosen.logps - chosen.ref_logps, rejected.ref_logps - rejected.logps])
    size = beta * torch.sigmoid(-beta * ratio)  # (2B, T-1)
    sign = torch.cat([-torch.ones_like(chosen.logps), torch.ones_like(rejected.logps)])
    return torch.where(torch.cat([chosen.mask, rejected.mask]), sign * size, 0.0)


dpo_token_coefficient = chapter.exercise(
    "dpo_token_coefficient",
    right=_slope,
    cases=_stats_cases,
    mistakes={
        "weighted_by_confidence": lambda chosen, rejected, beta: _pull(
            chosen, rejected, beta * (1 - _wrong(chosen, rejected, beta))
        ),
        "no_beta": lambda chosen, rejected, beta: _pull(chosen, rejected, _wrong(chosen, rejected, beta)),
        "signs_swapped": lambda chosen, rejected, beta: -_slope(chosen, rejected, beta),
        "same_sign": lambda chosen, rejected, beta: -_slope(chosen, rejected, beta).abs(),
        "no_reference": lambda chosen, rejected, beta: _pull(
            chosen,
            rejected,
            beta * torch.sigmoid(beta * (rejected.logps.sum(-1) - chosen.logps.sum(-1)))[:, None],
        ),
        "divided_by_length": lambda chosen, rejected, beta: (
            _slope(chosen, rejected, beta) / torch.cat([chosen.mask, rejected.mask]).sum(-1, keepdim=True)
        ),
        "no_mask": lambda chosen, rejected, beta: _pull(
            chosen, rejected, beta * _wrong(chosen, rejected, beta), masked=False
        ),
        "margin_per_token": _per_token,
        "mean_over_batch": lambda chosen, rejected, beta: _slope(chosen, rejected, beta) / len(chosen.logps),
    },
)


quiz = chapter.quiz()

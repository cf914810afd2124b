"""Exercises of chapter 4, TDPO: the forward KL of a position and of a response, and the two losses built on it.

>>> import torch
>>> verdict = forward_kl(lambda policy_logits, ref_logits: (policy_logits - ref_logits).sum(-1))
>>> verdict.status
'wrong'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Chapter
from tpo_lib import losses
from tpo_lib.types import IGNORE, TokenStats

NOTEBOOK = "04_tdpo.ipynb"
chapter = Chapter(__file__)


def _draw(seed: int) -> Callable[..., Tensor]:
    """A source of standard normal float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- forward_kl


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two (..., V) tensors of logits, float64 where they are."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return _kl(ref_logits, policy_logits)


def _of_probabilities(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * (ref.log() - policy.log())).sum(-1)


def _of_a_ratio(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * (ref / policy).log()).sum(-1)


def _clamped(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * ((ref + 1e-8).log() - (policy + 1e-8).log())).sum(-1)


def _cross_entropy(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return -(ref_logits.softmax(-1) * policy_logits.log_softmax(-1)).sum(-1)


def _unweighted(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1)).sum(-1)


def _raw_logits(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return (ref_logits.softmax(-1) * (ref_logits - policy_logits)).sum(-1)


def _kl_cases() -> tuple[Case, ...]:
    draw = _draw(0)

    def case(policy: Tensor, ref: Tensor, words: str) -> Case:
        return Case({"policy_logits": policy.requires_grad_(), "ref_logits": ref}, words)

    far = torch.tensor([[0.0, 1.0, -150.0], [2.0, 0.0, -1.0]])
    return (
        case(draw(2, 3, 5), draw(2, 3, 5), "logits of shape (2, 3, 5)"),
        case(draw(7, 4) + 3.0, draw(7, 4) - 1.0, "logits that are far from normalised"),
        case(far, torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, -150.0]]), "a logit 150 below the others, in float32"),
    )


forward_kl = chapter.exercise(
    "forward_kl",
    right=_forward,
    cases=_kl_cases,
    mistakes={
        "reverse": lambda policy_logits, ref_logits: _kl(policy_logits, ref_logits),
        "log_of_softmax": _of_probabilities,
        "log_of_ratio": _of_a_ratio,
        "small_constant": _clamped,
        "sign_reversed": lambda policy_logits, ref_logits: -_forward(policy_logits, ref_logits),
        "cross_entropy": _cross_entropy,
        "no_weights": _unweighted,
        "raw_logits": _raw_logits,
        "mean_over_vocabulary": lambda policy_logits, ref_logits: (
            _forward(policy_logits, ref_logits) / ref_logits.shape[-1]
        ),
        "one_token": lambda policy_logits, ref_logits: (
            (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1))
            .gather(-1, ref_logits.argmax(-1, keepdim=True))
            .squeeze(-1)
        ),
        "detached": lambda policy_logits, ref_logits: _forward(policy_logits.detach(), ref_logits),
    },
)


# ---- seq_kl


def _masked(kl: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, kl, 0.0).sum(-1)


def _shifted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The forward KL of the predicting positions, and which of them predict a response token: (N, T-1) each."""
    return _forward(policy_logits[:, :-1], ref_logits[:, :-1]), labels[:, 1:] != IGNORE


def _sequence(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    return _masked(*_shifted(policy_logits, ref_logits, labels))


def _mean_kl(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    return _masked(kl, mask) / mask.sum(-1)


def _sampled_token(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    log_ratio = (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1))[:, :-1]
    at_label = log_ratio.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]  # (N, T-1)
    return _masked(at_label, labels[:, 1:] != IGNORE)


def _hole_counted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    from_first, to_last = mask.long().cumsum(-1) > 0, mask.flip(-1).long().cumsum(-1).flip(-1) > 0
    return _masked(kl, from_first & to_last)


def _padding_counted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    return _masked(kl, mask.long().cumsum(-1) > 0)


def _labels(rows: list[str]) -> Tensor:
    """One string a sequence: a digit is a response token of that id, "." is prompt or padding."""
    return torch.tensor([[IGNORE if letter == "." else int(letter) for letter in row] for row in rows])


def _sequence_cases() -> tuple[Case, ...]:
    draw = _draw(1)

    def case(labels: list[str], vocab: int, words: str) -> Case:
        shape = (len(labels), len(labels[0]), vocab)
        logits = draw(*shape).requires_grad_()
        return Case({"policy_logits": logits, "ref_logits": draw(*shape), "labels": _labels(labels)}, words)

    return (
        case(["..0312.", ".2....."], 4, "responses of four tokens and of one"),
        case(["..1.20.", ".40123."], 5, "a response with a hole in it"),
        case([".01"], 3, "no padding"),
    )


seq_kl = chapter.exercise(
    "seq_kl",
    right=_sequence,
    cases=_sequence_cases,
    mistakes={
        "no_shift": lambda policy_logits, ref_logits, labels: _masked(
            _forward(policy_logits, ref_logits), labels != IGNORE
        ),
        "mask_off_by_one": lambda policy_logits, ref_logits, labels: _masked(
            _forward(policy_logits[:, :-1], ref_logits[:, :-1]), labels[:, :-1] != IGNORE
        ),
        "shifted_backwards": lambda policy_logits, ref_logits, labels: _masked(
            _forward(policy_logits[:, 1:], ref_logits[:, 1:]), labels[:, :-1] != IGNORE
        ),
        "no_mask": lambda policy_logits, ref_logits, labels: _shifted(policy_logits, ref_logits, labels)[0].sum(-1),
        "padding_counted": _padding_counted,
        "hole_filled": _hole_counted,
        "mean": _mean_kl,
        "sampled_token": _sampled_token,
        "reverse": lambda policy_logits, ref_logits, labels: _sequence(ref_logits, policy_logits, labels),
        "detached": lambda policy_logits, ref_logits, labels: _sequence(policy_logits.detach(), ref_logits, labels),
    },
)


# ---- tdpo1_loss and tdpo2_loss: statistics of pairs as cases


def _side(rows: list[str], draw: Callable[..., Tensor], drift: float = 0.0) -> TokenStats:
    """Statistics of responses drawn as "y" for a scored token; policy log-probabilities and KL are leaves with a gradient."""
    mask = torch.tensor([[letter == "y" for letter in row] for row in rows])  # (B, T-1)

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.3)
    logps = values(ref - draw(*mask.shape).abs() + drift).requires_grad_()
    return TokenStats(logps, ref, mask, kl=values(draw(*mask.shape).square() + 0.1).requires_grad_())


def _pairs_of(seed: int) -> dict[str, TokenStats]:
    draw = _draw(seed)
    chosen = _side([".yyyyy.", "..yyy..", "yy.yy.."], draw)  # the last one has a hole
    return {"chosen": chosen, "rejected": _side([".yyy...", "..y.yyy", "yyyyyyy"], draw)}


def _far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw = _draw(4)
    sides = _side(["yyy.."], draw, drift=-400.0), _side([".yyyy"], draw, drift=2.0)

    def single(stats: TokenStats) -> TokenStats:
        return TokenStats(
            stats.logps.detach().float().requires_grad_(),
            stats.ref_logps.float(),
            stats.mask,
            stats.kl.detach().float().requires_grad_(),
        )

    return {"chosen": single(sides[0]), "rejected": single(sides[1])}


def _reward(stats: TokenStats, beta: float, kl: float | Tensor = 0.0) -> Tensor:
    """beta (sum_t logratio^t + kl), (B,)."""
    return beta * ((stats.logps - stats.ref_logps).sum(-1) + kl)


def _seq(stats: TokenStats) -> Tensor:
    return stats.kl.sum(-1)  # (B, T-1) -> (B,)


def _frozen(stats: TokenStats) -> Tensor:
    return _seq(stats).detach()


def _mean(values: Tensor, stats: TokenStats) -> Tensor:
    return values.sum(-1) / stats.mask.sum(-1)


def _nll(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    return -F.logsigmoid(chosen_reward - rejected_reward)


def _tdpo1(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    return losses.tdpo1(chosen, rejected, beta=beta).loss


def _tdpo2(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float) -> Tensor:
    return losses.tdpo2(chosen, rejected, beta=beta, alpha=alpha).loss


def _without_reference(stats: TokenStats) -> TokenStats:
    return dataclasses.replace(stats, ref_logps=torch.zeros_like(stats.ref_logps))


def _mean_everywhere(stats: TokenStats) -> TokenStats:
    """Statistics whose sums are the means of the old ones."""
    count = stats.mask.sum(-1, keepdim=True)
    return TokenStats(stats.logps / count, stats.ref_logps / count, stats.mask, stats.kl / count)


def _mean_kl_only(stats: TokenStats) -> TokenStats:
    return dataclasses.replace(stats, kl=stats.kl / stats.mask.sum(-1, keepdim=True))


def _tdpo1_cases() -> tuple[Case, ...]:
    return (
        Case({**_pairs_of(2), "beta": 0.1}, "responses of unequal length, beta = 0.1"),
        Case({**_pairs_of(3), "beta": 0.7}, "beta = 0.7"),
        Case({**_far_apart(), "beta": 0.5}, "a pair that is wrong by hundreds of nats, in float32"),
    )


tdpo1_loss = chapter.exercise(
    "tdpo1_loss",
    right=_tdpo1,
    cases=_tdpo1_cases,
    mistakes={
        "sign_of_delta": lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta, -_seq(chosen)), _reward(rejected, beta, -_seq(rejected))
        ),
        "no_beta_on_delta": lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta) + _seq(chosen), _reward(rejected, beta) + _seq(rejected)
        ),
        "no_delta": lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss,
        "chosen_kl_stopped": lambda chosen, rejected, beta: _tdpo2(chosen, rejected, beta, 1.0),
        "rejected_kl_stopped": lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta, _seq(chosen)), _reward(rejected, beta, _frozen(rejected))
        ),
        "both_kl_stopped": lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta, _frozen(chosen)), _reward(rejected, beta, _frozen(rejected))
        ),
        "kl_added": lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta), _reward(rejected, beta, _seq(rejected) + _seq(chosen))
        ),
        "means": lambda chosen, rejected, beta: _tdpo1(_mean_everywhere(chosen), _mean_everywhere(rejected), beta),
        "mean_kl": lambda chosen, rejected, beta: _tdpo1(_mean_kl_only(chosen), _mean_kl_only(rejected), beta),
        "swapped": lambda chosen, rejected, beta: _tdpo1(rejected, chosen, beta),
        "no_minus": lambda chosen, rejected, beta: -_tdpo1(chosen, rejected, beta),
        "no_reference": lambda chosen, rejected, beta: _tdpo1(
            _without_reference(chosen), _without_reference(rejected), beta
        ),
        "log_of_sigmoid": lambda chosen, rejected, beta: (
            -torch.sigmoid(_reward(chosen, beta, _seq(chosen)) - _reward(rejected, beta, _seq(rejected))).log()
        ),
    },
)


def _tdpo2_cases() -> tuple[Case, ...]:
    return (
        Case({**_pairs_of(5), "beta": 0.1, "alpha": 0.5}, "responses of unequal length, beta = 0.1, alpha = 0.5"),
        Case({**_pairs_of(6), "beta": 0.7, "alpha": 0.2}, "beta = 0.7, alpha = 0.2"),
        Case({**_pairs_of(7), "beta": 0.3, "alpha": 1.0}, "alpha = 1, where the value is TDPO1's"),
        Case({**_far_apart(), "beta": 0.5, "alpha": 0.5}, "a pair that is wrong by hundreds of nats, in float32"),
    )


tdpo2_loss = chapter.exercise(
    "tdpo2_loss",
    right=_tdpo2,
    cases=_tdpo2_cases,
    mistakes={
        "nothing_stopped": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, alpha * _seq(chosen)), _reward(rejected, beta, alpha * _seq(rejected))
        ),
        "wrong_side_stopped": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, alpha * _seq(chosen)), _reward(rejected, beta, alpha * _frozen(rejected))
        ),
        "both_stopped": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, alpha * _frozen(chosen)), _reward(rejected, beta, alpha * _frozen(rejected))
        ),
        "chosen_kl_gone": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta), _reward(rejected, beta, alpha * _seq(rejected))
        ),
        "chosen_side_detached": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, alpha * _seq(chosen)).detach(), _reward(rejected, beta, alpha * _seq(rejected))
        ),
        "no_alpha": lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, beta, 1.0),
        "alpha_on_log_ratios": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta * alpha) + beta * _frozen(chosen),
            _reward(rejected, beta * alpha) + beta * _seq(rejected),
        ),
        "alpha_on_margin": lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, alpha * beta, 1.0),
        "alpha_on_rejected_alone": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, _frozen(chosen)), _reward(rejected, beta, alpha * _seq(rejected))
        ),
        "alpha_on_chosen_alone": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta, alpha * _frozen(chosen)), _reward(rejected, beta, _seq(rejected))
        ),
        "sign_of_delta": lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, beta, -alpha),
        "no_beta_on_delta": lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta) + alpha * _frozen(chosen), _reward(rejected, beta) + alpha * _seq(rejected)
        ),
        "means": lambda chosen, rejected, beta, alpha: _tdpo2(
            _mean_everywhere(chosen), _mean_everywhere(rejected), beta, alpha
        ),
        "mean_kl": lambda chosen, rejected, beta, alpha: _tdpo2(
            _mean_kl_only(chosen), _mean_kl_only(rejected), beta, alpha
        ),
        "swapped": lambda chosen, rejected, beta, alpha: _tdpo2(rejected, chosen, beta, alpha),
        "no_minus": lambda chosen, rejected, beta, alpha: -_tdpo2(chosen, rejected, beta, alpha),
        "log_of_sigmoid": lambda chosen, rejected, beta, alpha: (
            -torch.sigmoid(
                _reward(chosen, beta, alpha * _frozen(chosen)) - _reward(rejected, beta, alpha * _seq(rejected))
            ).log()
        ),
    },
)


quiz = chapter.quiz()

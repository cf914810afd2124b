"""Exercises of chapter 3, the token MDP: returns, advantages, the soft backup, and the credit of a token.

>>> soft_backup(lambda ref_logps, q, beta: q.max(-1).values).status
'wrong'
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case, Chapter

NOTEBOOK = "03_token_mdp.ipynb"
chapter = Chapter(__file__)


def _response(rows: list[str]) -> Tensor:
    """One string a sequence, "y" where a response token stands, "." on prompt and padding -> (N, T) bool."""
    return torch.tensor([[letter == "y" for letter in row] for row in rows])


def _zero(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _moved(values: Tensor) -> Tensor:
    """(N, T): in column t what stood in column t + 1, 0 in the last one."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


# ---- return_to_go


def _accumulate(rewards: Tensor, mask: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From the last token to the first: total = step(reward, total of what follows); 0 outside the response."""
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in _zero(mask, rewards).flip(1).unbind(1):
        total = step(reward, total)
        columns.append(total)
    return _zero(mask, torch.stack(columns[::-1], dim=1))


def _to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _accumulate(rewards, mask, lambda reward, total: reward + gamma * total)


def _so_far(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _to_go(rewards.flip(1), mask.flip(1), gamma).flip(1)


def _whole_return(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    powers = gamma ** (mask.long().cumsum(1) - 1)  # counted from the first response token
    return _zero(mask, (_zero(mask, rewards) * powers).sum(1, keepdim=True).expand_as(rewards))


def _from_the_start(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _to_go(rewards * gamma ** (mask.long().cumsum(1) - 1), mask, 1.0)


def _mean_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    left = _to_go(torch.ones_like(rewards), mask, 1.0).clamp_min(1)  # tokens from here to the end
    return _to_go(rewards, mask, gamma) / left


def _return_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[9.0, 1.0, -0.5, 2.0, 0.25, 9.0], [9.0, 9.0, 0.75, -3.0, 9.0, 9.0]])
    mask = _response([".yyyy.", "..yy.."])
    return (
        Case({"rewards": rewards, "mask": mask, "gamma": 0.9}, "responses of 4 and 2 tokens, gamma = 0.9"),
        Case({"rewards": rewards, "mask": mask, "gamma": 1.0}, "the same without discount"),
        Case(
            {"rewards": torch.tensor([[-2.0, 0.5, 4.0]]), "mask": _response(["yyy"]), "gamma": 0.5},
            "no prompt and no padding, gamma = 0.5",
        ),
    )


return_to_go = chapter.exercise(
    "return_to_go",
    right=_to_go,
    cases=_return_cases,
    mistakes={
        "discount_off_by_one": lambda rewards, mask, gamma: _accumulate(
            rewards, mask, lambda reward, total: gamma * (reward + total)
        ),
        "no_discount": lambda rewards, mask, gamma: _to_go(rewards, mask, 1.0),
        "discounted_from_start": _from_the_start,
        "past": _so_far,
        "without_own_reward": lambda rewards, mask, gamma: _zero(mask, _moved(_to_go(rewards, mask, gamma))),
        "whole_return": _whole_return,
        "mean": _mean_to_go,
        "no_mask": lambda rewards, mask, gamma: _zero(mask, _to_go(rewards, torch.ones_like(mask), gamma)),
        "prompt_not_zero": lambda rewards, mask, gamma: _to_go(_zero(mask, rewards), torch.ones_like(mask), gamma),
    },
)


# ---- advantages


def _following(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) value of the state that each token leads to: 0 after the last response token."""
    return _moved(_zero(mask, values))


def _first(values: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) value of the state in which the first response token is written."""
    return values.gather(1, mask.long().argmax(1, keepdim=True))


def _advantage(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _zero(mask, rewards + gamma * _following(values, mask) - values)


def _advantage_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[7.0, 1.0, -0.5, 2.0, 0.25, 7.0], [7.0, 7.0, 0.75, -3.0, 7.0, 7.0]])
    values = torch.tensor([[5.0, 0.3, 1.2, -0.8, 0.6, 5.0], [5.0, 5.0, -1.1, 0.4, 5.0, 5.0]])
    mask = _response([".yyyy.", "..yy.."])
    single = {"rewards": torch.tensor([[2.0, 7.0]]), "values": torch.tensor([[0.5, 5.0]]), "mask": _response(["y."])}
    return (
        Case(
            {"rewards": rewards, "values": values, "mask": mask, "gamma": 1.0},
            "responses of 4 and 2 tokens, no discount",
        ),
        Case({"rewards": rewards, "values": values, "mask": mask, "gamma": 0.9}, "the same with gamma = 0.9"),
        Case({**single, "gamma": 0.9}, "a response of one token"),
    )


advantages = chapter.exercise(
    "advantages",
    right=_advantage,
    cases=_advantage_cases,
    mistakes={
        "value_after_the_end": lambda rewards, values, mask, gamma: _zero(
            mask, rewards + gamma * _moved(values) - values
        ),
        "own_value_ahead": lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * values - values),
        "values_swapped": lambda rewards, values, mask, gamma: _zero(
            mask, rewards + values - gamma * _following(values, mask)
        ),
        "q_function": lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * _following(values, mask)),
        "discount_off_by_one": lambda rewards, values, mask, gamma: _zero(
            mask, gamma * (rewards + _following(values, mask)) - values
        ),
        "no_discount": lambda rewards, values, mask, gamma: _advantage(rewards, values, mask, 1.0),
        "one_sample": lambda rewards, values, mask, gamma: _zero(mask, _to_go(rewards, mask, gamma) - values),
        "value_of_the_start": lambda rewards, values, mask, gamma: _zero(
            mask, rewards + gamma * _following(values, mask) - _first(values, mask)
        ),
        "not_zero_outside": lambda rewards, values, mask, gamma: rewards + gamma * _following(values, mask) - values,
    },
)


# ---- soft_backup


def _soft_backup(ref_logps: Tensor, q: Tensor, beta: float) -> Tensor:
    return beta * torch.logsumexp(ref_logps + q / beta, dim=-1)


def _paid_nothing(ref_logps: Tensor, q: Tensor, beta: float) -> Tensor:
    return ((ref_logps + q / beta).softmax(-1) * q).sum(-1)


def _soft_cases() -> tuple[Case, ...]:
    def case(logits: list, q: list, beta: float, words: str) -> Case:
        ref_logps, q = torch.tensor(logits).log_softmax(-1), torch.tensor(q, requires_grad=True)
        return Case({"ref_logps": ref_logps, "q": q, "beta": beta}, words)

    return (
        case([[0.0, 1.5, -0.5], [2.0, 0.0, -1.0]], [[1.0, -0.5, 0.3], [-0.2, 0.9, 1.4]], 0.5, "beta = 0.5"),
        case([[0.0, 1.5, -0.5], [2.0, 0.0, -1.0]], [[1.0, -0.5, 0.3], [-0.2, 0.9, 1.4]], 2.0, "beta = 2"),
        case([[[0.3, -1.0]], [[0.0, 1.0]]], [[[40.0, 39.8]], [[-40.0, 10.0]]], 0.1, "q / beta = 400, beyond exp"),
    )


soft_backup = chapter.exercise(
    "soft_backup",
    right=_soft_backup,
    cases=_soft_cases,
    mistakes={
        "maximum": lambda ref_logps, q, beta: q.max(dim=-1).values,
        "mean_of_q": lambda ref_logps, q, beta: (ref_logps.exp() * q).sum(-1),
        "no_reference": lambda ref_logps, q, beta: beta * torch.logsumexp(q / beta, dim=-1),
        "beta_on_wrong_side": lambda ref_logps, q, beta: torch.logsumexp(ref_logps + beta * q, dim=-1) / beta,
        "no_beta_in_front": lambda ref_logps, q, beta: torch.logsumexp(ref_logps + q / beta, dim=-1),
        "no_beta_inside": lambda ref_logps, q, beta: beta * torch.logsumexp(ref_logps + q, dim=-1),
        "kl_not_paid": _paid_nothing,
        "overflows": lambda ref_logps, q, beta: beta * (ref_logps.exp() * (q / beta).exp()).sum(-1).log(),
        "probability_in_exponent": lambda ref_logps, q, beta: (
            beta * torch.logsumexp(ref_logps.exp() + q / beta, dim=-1)
        ),
    },
)


# ---- token_credit


def _credit(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    return _zero(mask, beta * (logps - ref_logps))


def _spread(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    credit = _credit(logps, ref_logps, mask, beta)
    return _zero(mask, (credit.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(credit))


def _credit_cases() -> tuple[Case, ...]:
    logps = torch.tensor([[-9.0, -1.0, -0.5, -2.0, -9.0], [-9.0, -9.0, -0.7, -3.0, -1.5]])
    ref_logps = torch.tensor([[-4.0, -1.5, -0.2, -2.6, -4.0], [-4.0, -4.0, -1.9, -2.2, -1.6]])
    mask = _response([".yyy.", "..yyy"])
    endless = torch.full_like(logps, -torch.inf)

    def case(logps: Tensor, ref_logps: Tensor, words: str) -> Case:
        return Case({"logps": logps, "ref_logps": ref_logps, "mask": mask, "beta": 0.1}, words)

    hidden = torch.where(mask, logps, endless), torch.where(mask, ref_logps, endless)
    return case(logps, ref_logps, "beta = 0.1"), case(*hidden, "log-probabilities of -inf on the padding")


token_credit = chapter.exercise(
    "token_credit",
    right=_credit,
    cases=_credit_cases,
    mistakes={
        "no_reference": lambda logps, ref_logps, mask, beta: _zero(mask, beta * logps),
        "swapped": lambda logps, ref_logps, mask, beta: _credit(ref_logps, logps, mask, beta),
        "divided_by_beta": lambda logps, ref_logps, mask, beta: _zero(mask, (logps - ref_logps) / beta),
        "no_beta": lambda logps, ref_logps, mask, beta: _credit(logps, ref_logps, mask, 1.0),
        "ratio": lambda logps, ref_logps, mask, beta: _zero(mask, beta * (logps - ref_logps).exp()),
        "divided_by_length": lambda logps, ref_logps, mask, beta: (
            _credit(logps, ref_logps, mask, beta) / mask.sum(1, keepdim=True)
        ),
        "spread_evenly": _spread,
        "times_mask": lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps) * mask,
        "not_zero_outside": lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps),
    },
)


quiz = chapter.quiz()

"""Derivation 7: what DPO replaced, the policy gradient from samples and what may be subtracted from their returns."""

import torch
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.world import TokenWorld


def _ppo():
    """Imported late: it brings all that trains, and whoever moves a slider needs none of it."""
    from tpo_lib import ppo

    return ppo


def _paid(w: TokenWorld, pi: Tensor, h: Hyper) -> Tensor:
    """(R, T) what PPO pays for every token of every response."""
    return _ppo().token_rewards(w.returns, w.tokenwise(pi), w.tokenwise(w.ref_logps), w.responses.mask, h.beta)


def _chance(w: TokenWorld, pi: Tensor) -> Tensor:
    """(R, 1) probability of prompt and response."""
    return (w.prompt_probs[w.responses.prompt] * w.sequence_logps(pi).exp())[:, None]


def _slope(w: TokenWorld, pi: Tensor, h: Hyper) -> Tensor:
    """(S, V) gradient of J, by Bellman recursion instead of from responses."""
    return tools.gradient(lambda z: tools.objective(w, z.log_softmax(-1), h.beta), pi)


def token_rewards(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    return tools.objective(w, pi, h.beta), (_chance(w, pi) * _paid(w, pi, h)).sum()


def any_critic(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, mask = w.random_policy(1), w.responses.mask
    paid, guess = _paid(w, pi, h), w.tokenwise(w.random_policy(2)[:, 0])  # any function of the states
    to_go = paid.flip(1).cumsum(1).flip(1)
    weights = (to_go - guess, _ppo().gae(paid, guess, mask, gamma=1.0, lam=1.0))
    right = torch.stack([tools.score(w, pi, _chance(w, pi) * weight) for weight in weights])
    return _slope(w, pi, h).expand(2, -1, -1), right


def true_critic(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, mask = w.random_policy(1), w.responses.mask
    rewards = w.tokenwise(w.reward)
    earned = rewards.cumsum(1) - rewards  # of the score, before the token; it is paid at the end
    values = torch.where(mask, earned + w.tokenwise(w.regularised_values(pi, h.beta).v), 0.0)
    weights = [_ppo().gae(_paid(w, pi, h), values, mask, gamma=1.0, lam=lam) for lam in (0.0, 0.5, 1.0)]
    right = torch.stack([tools.score(w, pi, _chance(w, pi) * weight) for weight in weights])
    return _slope(w, pi, h).expand(3, -1, -1), right


def leave_one_out(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, mask = w.random_policy(1), w.responses.mask
    rows = w.by_prompt(torch.arange(len(mask)))  # (P, n)
    count = rows.shape[1]
    both = (rows[:, :, None].expand(-1, -1, count), rows[:, None, :].expand(-1, count, -1))
    two = torch.stack(both, dim=-1).flatten()  # (P n n 2,) every two responses to a prompt, drawn independently
    first = _ppo().leave_one_out(_paid(w, pi, h)[two], mask[two], samples=2)[::2]  # (P n n, T)
    other = w.sequence_logps(pi).exp()[two[1::2], None]
    weight = (other * first).view(len(mask), count, -1).sum(1)  # (R, T) mean over the other response
    return _slope(w, pi, h), tools.score(w, pi, _chance(w, pi) * weight)


STEPS = (
    Step(token_rewards, gamma_one=True, implements="tpo_lib.ppo.token_rewards"),
    Step(any_critic, gamma_one=True),
    Step(true_critic, gamma_one=True, implements="tpo_lib.ppo.gae"),
    Step(leave_one_out, gamma_one=True, implements="tpo_lib.ppo.leave_one_out"),
)

"""Solutions of the exercises of 01_preferences.ipynb."""

import torch
import torch.nn.functional as F


def win_probability(reward_w, reward_l):
    # The softmax over two strengths is a sigmoid of the gap, and the gap does not overflow.
    return torch.sigmoid(reward_w - reward_l)


def preference_nll(reward_w, reward_l):
    # logsigmoid(m) = min(m, 0) - log(1 + exp(-|m|)): finite for every m, with the right slope.
    return -F.logsigmoid(reward_w - reward_l).mean()


def nll_gradient(weights, differences):
    margins = differences @ weights  # (B, d) @ (d,) -> (B,)
    surprise = torch.sigmoid(-margins)  # 1 - P(w beats l), what the model did not expect of the winner
    return -(surprise[:, None] * differences).mean(0)  # (B, d) -> (d,)


def preferred_pairs(scores, min_gap):
    gap = scores[:, :, None] - scores[:, None, :]  # (P, K, 1) - (P, 1, K) -> (P, K, K)
    return (gap > 0) & (gap >= min_gap)  # the first term drops ties, and i against itself, at min_gap = 0


def through_a_third(p_ab, p_bc):
    return torch.sigmoid(torch.logit(p_ab) + torch.logit(p_bc))  # gaps add up


def fit_rewards(wins):
    games, strength = wins + wins.T, torch.ones(len(wins), dtype=wins.dtype)
    for _ in range(5000):  # at the maximum everyone has won as often as the model expects
        strength = wins.sum(1) / (games / (strength[:, None] + strength)).sum(1)  # (n,)
        strength = strength / strength.log().mean().exp()  # mean reward 0
    return strength.log()

"""Solutions of the exercises of 06_compare.ipynb."""

import torch


def bootstrap_interval(values, draws):
    means = values[draws].mean(-1)  # (R, n) -> (R,): the mean of every resample
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype))
    return torch.stack([values.mean(), low, high])


def paired_difference(first, second, draws):
    # One number a prompt; what the prompt does to both has cancelled.
    return bootstrap_interval(first - second, draws)


def reward_at_kl(kl, reward, at):
    order = kl.argsort()
    kl, reward = kl[order], reward[order]
    if not kl[0] <= at <= kl[-1]:
        return torch.tensor(float("nan"), dtype=reward.dtype)  # never measured
    i = int(torch.searchsorted(kl, torch.tensor(at, dtype=kl.dtype)).clamp(min=1))
    roots = kl.sqrt()  # a reward is nearly straight in the root of the KL, not in the KL
    share = (at**0.5 - roots[i - 1]) / (roots[i] - roots[i - 1])
    return reward[i - 1] + share * (reward[i] - reward[i - 1])


def holm(p):
    values, order = p.sort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype)  # n for the smallest, 1 for the largest
    corrected = (values * factors).cummax(0).values.clamp(max=1)
    answer = torch.empty_like(p)
    answer[order] = corrected
    return answer

"""Solutions of chapter 3, the token MDP."""

import torch


def return_to_go(rewards, mask, gamma):
    rewards = torch.where(mask, rewards, 0.0)  # prompt and padding earn nothing
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in rewards.flip(1).unbind(1):  # the last token first
        total = reward + gamma * total  # (N,)
        columns.append(total)
    return torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)  # (N, T)


def advantages(rewards, values, mask, gamma):
    inside = torch.where(mask, values, 0.0)  # whatever follows the last token is worth 0
    following = torch.cat([inside[:, 1:], torch.zeros_like(inside[:, :1])], dim=1)  # V(s_{t+1}) in column t
    return torch.where(mask, rewards + gamma * following - values, 0.0)


def soft_backup(ref_logps, q, beta):
    return beta * torch.logsumexp(ref_logps + q / beta, dim=-1)  # the weight pi_ref enters as its logarithm


def token_credit(logps, ref_logps, mask, beta):
    return torch.where(mask, beta * (logps - ref_logps), 0.0)


def clipped_gain(logps, old_logps, advantages, mask, clip):
    ratio = (logps - old_logps.detach()).exp()  # the old policy is a constant
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    gain = torch.minimum(free, clipped)  # a token that was moved the wrong way keeps its gradient
    return torch.where(mask, gain, 0.0)


def shaped_rewards(rewards, potential, mask, gamma):
    inside = torch.where(mask, potential, 0.0)  # (N, T): nothing is left after the end
    following = torch.cat([inside[:, 1:], torch.zeros_like(inside[:, :1])], dim=1)
    return torch.where(mask, rewards + gamma * following - potential, 0.0)


def first_token(ref_logps, reward, beta):
    whole = ref_logps + reward / beta  # (V, V): the optimum over responses, without its Z
    return whole.logsumexp(-1).log_softmax(-1)  # (V,): sum over what follows, then over what comes first

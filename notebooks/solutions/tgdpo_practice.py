"""Solutions of the exercises in 05b_tgdpo_practice.ipynb."""

import torch.nn.functional as F


def tgdpo_loss(chosen, rejected, beta, alpha, guide_beta):
    rewards = []
    for side, sign in ((chosen, 1), (rejected, -1)):  # a good token is pushed up more, or down less
        r_hat = (guide_beta * (side.guide_logps - side.ref_logps)).detach()  # (B, T-1): the guide is frozen
        weights = (1 + sign * alpha * r_hat).clamp_min(0.01)
        rewards.append(beta * (weights * (side.logps - side.ref_logps)).sum(-1))  # (B,), 0 off-mask already
    return -F.logsigmoid(rewards[0] - rewards[1])

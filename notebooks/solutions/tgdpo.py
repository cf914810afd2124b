"""Solutions of the exercises in 05_tgdpo.ipynb."""

import torch


def r_hat(guide_logps, ref_logps, guide_beta):
    return (guide_beta * (guide_logps - ref_logps)).detach()  # (N, T-1): the guide is frozen


def state_value(q, ref_logps, temperature):
    low, high = q.amin(-1), q.amax(-1)  # (n,): the sum is at least 1 at the smallest q, at most 1 at the largest
    for _ in range(60):
        v = (low + high) / 2
        over = (ref_logps + (q - v[:, None]) / temperature).logsumexp(-1) > 0  # the sum exceeds 1: V must rise
        low, high = torch.where(over, v, low), torch.where(over, high, v)
    return (low + high) / 2


def token_weights(r_hat, alpha):
    as_chosen = (1 + alpha * r_hat).clamp_min(0.01)
    as_rejected = (1 - alpha * r_hat).clamp_min(0.01)
    return as_chosen, as_rejected


def largest_alpha(r_hat, mask):
    strongest = torch.where(mask, r_hat, 0.0).abs().max()  # a token may stand on either side, so both signs count
    return (1 - 0.01) / strongest


def guide_pull(chosen, rejected, beta, alpha, guide_beta):
    pull = 0.0
    for side in (chosen, rejected):  # two minus signs meet on the rejected side
        pull = pull + (r_hat(side.guide_logps, side.ref_logps, guide_beta) * (side.logps - side.ref_logps)).sum(-1)
    return alpha * beta * pull  # (B,)

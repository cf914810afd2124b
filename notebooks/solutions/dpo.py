"""Solutions of the exercises in 02_dpo.ipynb."""

import torch
import torch.nn.functional as F


def gibbs(ref_logps, reward, beta):
    unnormalised = ref_logps + reward / beta  # (P, n), the logarithm of pi_ref exp(r / beta)
    log_z = unnormalised.logsumexp(-1, keepdim=True)  # (P, 1): one Z a prompt
    return unnormalised - log_z


def response_logps(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]  # position t predicts token t + 1
    mask = labels != -100
    ids = labels.clamp_min(0)  # -100 is no index; the mask removes what stands there
    per_token = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (N, T-1)
    return torch.where(mask, per_token, 0.0).sum(-1)


def dpo_loss(chosen, rejected, beta):
    chosen_logratio = (chosen.logps - chosen.ref_logps).sum(-1)  # (B,), 0 off-mask already
    rejected_logratio = (rejected.logps - rejected.ref_logps).sum(-1)
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))


def dpo_token_coefficient(chosen, rejected, beta):
    margin = beta * ((chosen.logps - chosen.ref_logps).sum(-1) - (rejected.logps - rejected.ref_logps).sum(-1))
    size = beta * torch.sigmoid(-margin)[:, None]  # (B, 1): one number a pair
    mask = torch.cat([chosen.mask, rejected.mask])  # (2B, T-1)
    return torch.where(mask, torch.cat([-size, size]), 0.0)

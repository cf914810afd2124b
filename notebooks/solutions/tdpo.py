"""Solutions of the exercises in 04_tdpo.ipynb."""

import torch
import torch.nn.functional as F


def forward_kl(policy_logits, ref_logits):
    policy = policy_logits.log_softmax(-1)  # (..., V)
    ref = ref_logits.log_softmax(-1)
    return (ref.exp() * (ref - policy)).sum(-1)  # (...,): the reference weighs, and comes first


def seq_kl(policy_logits, ref_logits, labels):
    kl = forward_kl(policy_logits[:, :-1], ref_logits[:, :-1])  # (N, T-1): position t predicts token t + 1
    mask = labels[:, 1:] != -100  # (N, T-1)
    return torch.where(mask, kl, 0.0).sum(-1)  # (N,)


def tdpo1_loss(chosen, rejected, beta):
    u = beta * (chosen.logps - chosen.ref_logps).sum(-1) - beta * (rejected.logps - rejected.ref_logps).sum(-1)  # (B,)
    delta = beta * rejected.kl.sum(-1) - beta * chosen.kl.sum(-1)
    return -F.logsigmoid(u - delta)


def tdpo2_loss(chosen, rejected, beta, alpha):
    u = beta * (chosen.logps - chosen.ref_logps).sum(-1) - beta * (rejected.logps - rejected.ref_logps).sum(-1)  # (B,)
    delta = beta * rejected.kl.sum(-1) - beta * chosen.kl.detach().sum(-1)  # the chosen side is only looked at
    return -F.logsigmoid(u - alpha * delta)


def chosen_kl_pull(chosen, rejected, beta):
    u = beta * ((chosen.logps - chosen.ref_logps).sum(-1) - (rejected.logps - rejected.ref_logps).sum(-1))  # (B,)
    delta = beta * rejected.kl.sum(-1) - beta * chosen.kl.sum(-1)
    return -beta * torch.sigmoid(-(u - delta))  # the margin grows by beta for each nat of the chosen KL

"""Solutions of the exercises in 07_break_it.ipynb."""

import math

import torch
import torch.nn.functional as F


def name_the_bug(loss, chosen, rejected, beta):
    value = loss(chosen, rejected)
    (slopes,) = torch.autograd.grad(value.sum(), chosen.logps)
    unit = slopes[chosen.mask] / (-beta / 2)  # (5,), all 1 if nothing is wrong
    if not math.isclose(value.item(), math.log(2), rel_tol=1e-6):
        return 8  # beta stands outside
    if (unit < 0).all():
        return 10
    if torch.allclose(unit, torch.ones_like(unit)):
        return 0
    if torch.allclose(unit * len(unit), torch.ones_like(unit)):
        return 1  # divided by the length
    return 8


def padding_invariant(loss_of, logits, ref_logits, labels):
    n, _, vocab = logits.shape
    new = torch.randn(n, 3, vocab, dtype=logits.dtype)
    other = torch.randn(n, 3, vocab, dtype=logits.dtype)  # were they alike, their log-ratio would be 0
    before = loss_of(logits, ref_logits, labels)
    after = loss_of(
        torch.cat([logits, new], dim=1), torch.cat([ref_logits, other], dim=1), F.pad(labels, (0, 3), value=-100)
    )
    return torch.allclose(before, after)


padding_report = 2  # one token after the response's last is scored, and only one


unknown_run = 5  # the reference is overwritten with the policy every fourth update


def repaired_loss(logits, ref_logits, labels, beta):
    mask = labels[:, 1:] != -100  # (2B, T-1): without the first column, like the labels
    ids = labels[:, 1:].clamp_min(0)[..., None]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids)[..., 0]
    ref_logps = ref_logits.detach()[:, :-1].log_softmax(-1).gather(-1, ids)[..., 0]
    logratio = torch.where(mask, logps - ref_logps, 0.0).sum(-1)  # (2B,)
    chosen, rejected = logratio.chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))

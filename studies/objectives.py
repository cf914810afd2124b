"""Objectives that the studies vary, each a change of one that the library has: `--loss-type studies/objectives.py:NAME`.

In all of them w is the chosen and l the rejected response, lr = log pi - log pi_ref of a token, KL = KL(pi_ref || pi) over the
vocabulary at a token, sg(.) passes no gradient, r = guide_beta (log pi_hat - log pi_ref) is the guide's token reward, and sums
run over the response, in nats. The rewards that are logged are the two terms of the margin.

Which side of TDPO2's margin, -log sigma(beta sum [lr + alpha KL](w) - beta sum [lr + alpha KL](l)), has its KL held constant:

    neither     tdpo1_alpha
    chosen      the library's tdpo2
    rejected    tdpo2_rejected_stopped
    both        tdpo2_both_stopped
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from tpo_lib import LossOutput


def tdpo1_alpha(chosen, rejected, *, beta=0.1, alpha=0.5):
    """TDPO1 with its KL terms at coefficient alpha: TDPO2 without the stop-gradient. Alpha 1 is TDPO1, alpha 0 DPO.

    loss = -log sigma(beta sum [lr + alpha KL](w) - beta sum [lr + alpha KL](l))
    """
    return _margin(beta, _ratio(chosen) + alpha * chosen.kl, _ratio(rejected) + alpha * rejected.kl)


def tdpo2_both_stopped(chosen, rejected, *, beta=0.1, alpha=0.5):
    """TDPO2 with both KL terms constant: they weigh the pairs, by sigma(-margin), and pull at no distribution.

    loss = -log sigma(beta sum [lr + alpha sg(KL)](w) - beta sum [lr + alpha sg(KL)](l))
    """
    return _margin(beta, _ratio(chosen) + alpha * chosen.kl.detach(), _ratio(rejected) + alpha * rejected.kl.detach())


def tdpo2_rejected_stopped(chosen, rejected, *, beta=0.1, alpha=0.5):
    """TDPO2 with the wrong side constant: what is left of the KL's gradient raises it on the chosen response.

    loss = -log sigma(beta sum [lr + alpha KL](w) - beta sum [lr + alpha sg(KL)](l))
    """
    return _margin(beta, _ratio(chosen) + alpha * chosen.kl, _ratio(rejected) + alpha * rejected.kl.detach())


def tdpo2_ramp(chosen, rejected, *, beta=0.1, alpha=0.5, slope=1.0):
    """TDPO2 whose KL weight runs linearly over the response, from alpha (1 - slope) to alpha (1 + slope), its mean alpha.

    loss = -log sigma(beta sum [lr + a_t sg(KL)](w) - beta sum [lr + a_t KL](l))

    Slope 1 holds the end of a response, -1 its beginning, 0 is TDPO2. Raises ValueError where it lies outside [-1, 1].
    """
    if not -1 <= slope <= 1:
        raise ValueError(f"slope={slope!r} must lie in [-1, 1]: outside, the KL would be rewarded at one end")
    held = alpha * _ramp(chosen, slope) * chosen.kl.detach()
    return _margin(beta, _ratio(chosen) + held, _ratio(rejected) + alpha * _ramp(rejected, slope) * rejected.kl)


def tdpo2_guided(chosen, rejected, *, beta=0.1, alpha=0.5, guidance=0.5, guide_beta=0.1, floor=0.01):
    """TDPO2 with TGDPO's token weights: beta becomes beta f at every token, in the log-ratio and the KL alike.

    loss = -log sigma(beta sum f [lr + alpha sg(KL)](w) - beta sum f [lr + alpha KL](l)), f = max(1 +- guidance r, floor)

    guidance 0 is TDPO2, alpha 0 is TGDPO at alpha = guidance.
    """
    f_w = _linear(chosen, guidance * guide_beta, floor)
    f_l = _linear(rejected, -guidance * guide_beta, floor)
    w = f_w * (_ratio(chosen) + alpha * chosen.kl.detach())
    return _margin(beta, w, f_l * (_ratio(rejected) + alpha * rejected.kl), f_w, f_l)


def tgdpo_one_f(chosen, rejected, *, beta=0.1, alpha=0.5, guide_beta=0.1, floor=0.01):
    """TGDPO with one f for both sides, the form for which its theorem is exact: f = max(1 + alpha r, floor).

    loss = -log sigma(beta sum f lr(w) - beta sum f lr(l))

    Its margin does not know which response is called chosen, so it ranks held-out pairs as DPO's does.
    """
    f_w, f_l = (_linear(side, alpha * guide_beta, floor) for side in (chosen, rejected))
    return _margin(beta, f_w * _ratio(chosen), f_l * _ratio(rejected), f_w, f_l)


def tgdpo_softmax(chosen, rejected, *, beta=0.1, alpha=0.5, guide_beta=0.1):
    """TGDPO with weights by a softmax over the response, whose mean is 1 whatever the guide says: no floor, no change of scale.

    loss = -log sigma(beta sum f lr(w) - beta sum f lr(l)), f_t = T softmax_t(+-alpha r_t), T the response's length
    """
    f_w, f_l = (_softmax(side, sign * alpha * guide_beta) for side, sign in ((chosen, 1), (rejected, -1)))
    return _margin(beta, f_w * _ratio(chosen), f_l * _ratio(rejected), f_w, f_l)


def dpo_weighted(chosen, rejected, *, beta=0.1, mix=1.0):
    """DPO with tokens weighed by how much they matter to the guide, good or bad, their mean 1: with an oracle, by true credit.

    loss = -log sigma(beta sum f lr(w) - beta sum f lr(l)), f_t = 1 - mix + mix |r_t| / mean |r|

    mix 0 is DPO. guide_beta, or the scale of an oracle, cancels. A response whose r is 0 throughout has f = 1.
    """
    f_w, f_l = _by_size(chosen, mix), _by_size(rejected, mix)
    return _margin(beta, f_w * _ratio(chosen), f_l * _ratio(rejected), f_w, f_l)


def _margin(beta, w, l, f_w=None, f_l=None):  # noqa: E741
    """Bradley-Terry on the sums of two (B, T-1) terms; f_w, f_l are kept as the token weights."""
    w, l = beta * w.sum(-1), beta * l.sum(-1)  # noqa: E741  (B,)
    weights = None if f_w is None else torch.cat([f_w, f_l])
    return LossOutput(-logsigmoid(w - l), w.detach(), l.detach(), weights)


def _ratio(side):
    return side.logps - side.ref_logps  # (B, T-1)


def _guide_ratio(side):
    return (side.guide_logps - side.ref_logps).detach()  # (B, T-1), r / guide_beta


def _linear(side, strength, floor):
    """max(1 + strength (log pi_hat - log pi_ref), floor) on response tokens, 0 elsewhere."""
    return torch.where(side.mask, (1 + strength * _guide_ratio(side)).clamp_min(floor), 0.0)


def _softmax(side, strength):
    scores = (strength * _guide_ratio(side)).masked_fill(~side.mask, -torch.inf)
    return side.mask.sum(-1, keepdim=True) * scores.softmax(-1)  # (B, T-1), 0 off-mask


def _by_size(side, mix):
    size, length = _guide_ratio(side).abs(), side.mask.sum(-1, keepdim=True)
    total = size.sum(-1, keepdim=True)
    share = torch.where(total > 0, size * length / total.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
    return torch.where(side.mask, 1 - mix + mix * share, 0.0)


def _ramp(side, slope):
    """(B, T-1) weights of mean 1 over a response: linear in the token's place, 1 where there is one token."""
    mask = side.mask.to(side.kl.dtype)
    place, last = mask.cumsum(-1) - 1, mask.sum(-1, keepdim=True) - 1
    return torch.where(last > 0, 1 + slope * (2 * place / last.clamp_min(1) - 1), 1.0) * mask

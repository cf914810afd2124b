"""Statistics of pairs, as cases for losses that see the policy's KL, and changes to both sides of a pair."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import marks, narrow, normal
from tpo_lib.types import TokenStats


def stats_of(mask: Tensor, draw: Callable[..., Tensor], drift: float = 0.0) -> TokenStats:
    """Statistics of responses; the policy's log-probabilities and the KL are leaves with a gradient."""

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.3)
    logps = values(ref - draw(*mask.shape).abs() + drift).requires_grad_()
    return TokenStats(logps, ref, mask, kl=values(draw(*mask.shape).square() + 0.1).requires_grad_())


def pairs_of(seed: int) -> dict[str, TokenStats]:
    """Three pairs in float64, of unequal length, one response with a hole; the arguments `chosen` and `rejected` of a loss."""
    draw = normal(seed)
    chosen = stats_of(marks(".xxxxx.", "..xxx..", "xx.xx.."), draw)  # the last one has a hole
    return {"chosen": chosen, "rejected": stats_of(marks(".xxx...", "..x.xxx", "xxxxxxx"), draw)}


def far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw = normal(4)
    sides = {
        "chosen": stats_of(marks("xxx.."), draw, drift=-400.0),
        "rejected": stats_of(marks(".xxxx"), draw, drift=2.0),
    }
    return {name: narrow(side) for name, side in sides.items()}


def means(side: TokenStats) -> TokenStats:
    """Statistics whose sums are the means of the old ones."""
    return side.map(lambda field: field / side.mask.sum(-1, keepdim=True) if field.is_floating_point() else field)


def on_both(change: Callable[[TokenStats], TokenStats], loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of pairs whose two sides were changed."""
    return lambda chosen, rejected, **given: loss(change(chosen), change(rejected), **given)


def still(side: TokenStats) -> TokenStats:
    """The same without gradients."""
    return side.map(Tensor.detach)


def loss_of_margin(
    margin: Callable[..., Tensor], log_sigmoid: Callable[[Tensor], Tensor] = F.logsigmoid
) -> Callable[..., Tensor]:
    """-log sigma(margin(u, c, r, ...)) of u and beta SeqKL of chosen and rejected, (B,) each, beta and alpha."""

    def loss(chosen: TokenStats, rejected: TokenStats, **given: float) -> Tensor:
        won, lost = ((s.logps - s.ref_logps).sum(-1) for s in (chosen, rejected))
        kl = (given["beta"] * s.kl.sum(-1) for s in (chosen, rejected))
        return -log_sigmoid(margin(given["beta"] * (won - lost), *kl, **given))

    return loss


def in_both(loss: Callable[..., Tensor], margin: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The mistakes that TDPO1 and TDPO2 share; `margin` is the right one."""
    return {
        "means": on_both(means, loss),
        "mean_kl": on_both(lambda side: replace(side, kl=means(side).kl), loss),
        "swapped": lambda chosen, rejected, **given: loss(rejected, chosen, **given),
        "no_beta": loss_of_margin(lambda u, c, r, beta, **given: margin(u, c, r, beta=beta, **given) / beta),
        "penalty_outside": lambda **given: loss_of_margin(lambda u, c, r, **_: u)(**given) + _delta(**given),
        "no_minus": lambda **given: -loss(**given),
        "log_of_sigmoid": loss_of_margin(margin, lambda x: torch.sigmoid(x).log()),
    }


def _delta(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float = 1.0) -> Tensor:
    return alpha * beta * (rejected.kl.sum(-1) - chosen.kl.sum(-1))


def guided(mask: Tensor, draw: Callable[..., Tensor], *, learn: bool = False) -> TokenStats:
    """Statistics of responses with a guide, whose log-probabilities are leaves with a gradient; the policy's are, if `learn`."""

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.5)
    logps = values(ref + 0.7 * draw(*mask.shape))
    guide = values(ref + 1.5 * draw(*mask.shape))
    return TokenStats(logps.requires_grad_(learn), ref, mask, guide_logps=guide.requires_grad_())


def log_ratio(side: TokenStats) -> Tensor:
    """(B, T-1) log pi/pi_ref of every token, 0 off-mask."""
    return side.logps - side.ref_logps

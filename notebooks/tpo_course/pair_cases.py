"""Statistics of pairs, as cases for losses that see the policy's KL, and changes to both sides of a pair."""

from collections.abc import Callable

import torch
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

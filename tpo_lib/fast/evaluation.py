"""`evaluation.evaluate` on the fast path: held-out pairs are read without all logits of a batch."""

from __future__ import annotations

from functools import wraps

from tpo_lib import evaluation
from tpo_lib.fast.fused import pair_loss


@wraps(evaluation.evaluate)
def evaluate(*args, **settings) -> evaluation.Evaluation:
    return evaluation.evaluate(*args, **{"pair_loss": pair_loss} | settings)

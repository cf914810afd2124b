"""Less memory for more time: what a layer keeps for backward is computed again there instead of being kept.

The body keeps one hidden state a layer instead of some twenty tensors, and reads its batch once more: about a third more time
of an update. transformers does this in training mode alone, which would turn dropout on: here the layers that it marks are
wrapped, in whatever mode they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(model) -> Iterator[None]:
    """While the block runs, backward computes the activations of each of the model's layers anew.

    Raises:
        ValueError: it has no layers that transformers marks as made for it.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"checkpointing: {type(model).__name__} has no layers made for it; train without --checkpointing"
        )
    for layer in layers:
        # dropout is off: there is no random state to bring back
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class has the plain one

"""How a model is read without its logits, and what TRL logs of the whole distribution all the same."""

from __future__ import annotations

import functools
from types import MethodType

import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.fast.tiles import Tile
from tpo_lib.models import ResponseReader
from tpo_lib.types import PairBatch, Reading


def teach(model) -> None:
    """Let a causal model's forward take `then`: it returns then(reading, labels) of what it says at the response tokens.

    Whatever is computed of the reading is computed within forward: wrappers (DDP, PEFT, hooks) see every weight that has a part.

    Raises:
        ValueError: as `ResponseReader`; or it has an adapter whose tokens stand before the sequence.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError("prompt and prefix tuning put tokens before a sequence, which cannot be read so; use LoRA")
    inner = model.eval().get_base_model() if hasattr(model, "peft_config") else model.eval()
    plain = inner.forward
    # wrapped by accelerate's autocast, say: the head is tried without that
    wrapped = {name: inner.__dict__.pop(name) for name in ("forward",) if name in inner.__dict__}
    reader = ResponseReader(inner)
    inner.__dict__.update(wrapped)

    @functools.wraps(type(inner).forward)  # `generate` asks for its parameters
    def forward(self, *args, then=None, **inputs):
        if then is None:
            return plain(*args, **inputs)
        labels = inputs["labels"]
        rows = torch.arange(len(labels) // 2)
        return then(reader(PairBatch(inputs["input_ids"], inputs["attention_mask"], labels, rows)), labels)

    inner.forward = MethodType(forward, inner)


class Look:
    """Entropy, mean logit and whether the token is the likeliest one, at each of R response positions: TRL's metrics."""

    def __init__(self, reading: Reading, labels: Tensor) -> None:
        self.mask = stats.response_mask(labels)  # (N, T-1)
        self.numbers = torch.empty(3, len(reading.states), device=labels.device)
        if reading.head is None:  # these are logits, and are not read in tiles
            logits = reading.states.detach().float()
            lse = logits.logsumexp(-1, keepdim=True)
            self.numbers[:] = _numbers(logits - lse, lse, labels[:, 1:][self.mask][:, None])

    def __call__(self, index: Tensor, tile: Tile) -> None:
        for block in tile.tiles.blocks(len(index)):
            self.numbers[:, index[block]] = _numbers(tile.logp[block], tile.lse[block], tile.targets[block]).float()

    def sums(self) -> dict[str, tuple[Tensor, Tensor | int]]:
        """{metric: (sum, count)} over the tokens."""
        (entropy, logit, top), (chosen, rejected) = self.numbers, (side.sum() for side in self.mask.chunk(2))
        return {
            "entropy": (entropy.sum(), len(entropy)),
            "logits/chosen": (logit[:chosen].sum(), chosen),
            "logits/rejected": (logit[chosen:].sum(), rejected),
            "mean_token_accuracy": (top[:chosen].sum(), chosen),
        }


def _numbers(logp: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """(3, rows) of log pi (rows, V), the logits' logsumexp (rows, 1) and the tokens (rows, 1)."""
    entropy = -logp.exp().mul_(logp).nan_to_num_().sum(-1)  # p log p of a token that is forbidden is 0
    return torch.stack([entropy, logp.mean(-1) + lse[:, 0], (logp.argmax(-1) == targets[:, 0]).to(logp.dtype)])

"""What turns the fast path on: how a run reads its models, and the step it takes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields

from tpo_lib import stats
from tpo_lib.config import TrainConfig, check_setting, setting
from tpo_lib.fast.checkpointing import recomputing
from tpo_lib.fast.fused import pair_loss
from tpo_lib.fast.prefix import DistinctReader, SharedReader
from tpo_lib.models import ResponseReader


@dataclass(frozen=True)
class FastPath:
    """How a run reads its models; what is computed stays the same, to rounding.

    Example:
        >>> FastPath(fused=False).pair_loss is stats.pair_loss
        True
    """

    share_prefix: bool = setting(
        False, "read a prompt once for all its responses in a batch (prefix.py), which pays where prompts are long"
    )
    fused: bool = setting(
        True, "head, statistics and gradient tile by tile (fused.py); False is the textbook path, all logits at once"
    )
    checkpointing: bool = setting(
        False, "compute a layer's activations again in backward instead of keeping them: less memory, more time"
    )
    cache_dir: str | None = setting(
        None,
        "where what the frozen models say is kept on disk, to be read instead of them (frozen.py); None reads them anew for "
        "every batch. It may come and go on a resume",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            check_setting(each, getattr(self, each.name))

    def around(self, model) -> AbstractContextManager:
        """What a policy is trained within."""
        return recomputing(model) if self.checkpointing else nullcontext()

    @property
    def pair_loss(self):
        """The step, for `train.fit`."""
        return pair_loss if self.fused else stats.pair_loss

    def reader(self, model, config: TrainConfig) -> ResponseReader:
        """What reads a model in a run of this config."""
        if self.share_prefix:
            return SharedReader(model)
        return (DistinctReader if config.group_prompts else ResponseReader)(model)

"""What turns the fast path on: how a run reads its models, and the step it takes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tpo_lib import stats
from tpo_lib.config import check_setting, setting
from tpo_lib.fast.fused import pair_loss
from tpo_lib.fast.prefix import SharedReader
from tpo_lib.models import ResponseReader


@dataclass(frozen=True)
class FastPath:
    """How a run reads its models; what is computed stays the same, to rounding.

    Example:
        >>> FastPath(fused=False).pair_loss is stats.pair_loss
        True
    """

    share_prefix: bool = setting(
        False, "read the prompt of a pair once instead of twice (prefix.py), which pays where prompts are long"
    )
    fused: bool = setting(
        True, "head, statistics and gradient tile by tile (fused.py); False is the textbook path, all logits at once"
    )
    cache_dir: str | None = setting(
        None,
        "where what the frozen models say is kept on disk, to be read instead of them (frozen.py); None reads them anew for "
        "every batch. It may come and go on a resume",
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            check_setting(each, getattr(self, each.name))

    @property
    def pair_loss(self):
        """The step, for `train.fit`."""
        return pair_loss if self.fused else stats.pair_loss

    def reader(self, model) -> ResponseReader:
        """What reads a model."""
        return SharedReader(model) if self.share_prefix else ResponseReader(model)

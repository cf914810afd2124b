"""What a comparison is made of: a stage, settings, seeds; what its runs are called and where they lie."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tpo_lib.config import TrainConfig
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import runs
from tpo_lib.runs.stage import StageConfig


class Run(NamedTuple):
    """A setting with a seed."""

    name: str  # the setting's label, and the seed where there are several
    label: str
    config: TrainConfig
    folder: str  # below that of the comparison


@dataclass(frozen=True)
class CompareConfig:
    """One comparison.

    Attributes:
        objectives: the settings, as they are reported: an objective with its hyperparameters and all else.
        evaluations: how often each run is evaluated at most, at the updates of `schedule`.
        seeds: every setting is trained once with each, which orders its data; none, and it is trained with the seed it has.
    """

    stage: StageConfig
    objectives: tuple[TrainConfig, ...]
    evaluations: int
    seeds: tuple[int, ...] = ()

    def runs(self) -> list[Run]:
        """All runs that are reported, those of a setting together; ValueError where two settings are the same."""
        return self._seeded(labels(self.objectives))

    def guides(self) -> dict[str, Run]:
        """{a run: the one that guides it, of its seed and beta}; where none is reported that could, one made for this alone."""
        guided = [each for each in self.objectives if "guide_logps" in OBJECTIVES[each.loss_type].needs]
        wanted = [runs.guide_settings(each).to_dict() for each in guided]
        reported = [each.to_dict() for each in self.objectives]
        own = [TrainConfig(**each) for i, each in enumerate(wanted) if each not in [*reported, *wanted[:i]]]
        named = {label.replace(each.loss_type, "guide", 1): each for label, each in labels(own).items()}
        every = self.runs() + self._seeded(named)
        return {
            run.name: next(each for each in every if each.config.to_dict() == runs.guide_settings(run.config).to_dict())
            for run in self.runs()
            if "guide_logps" in OBJECTIVES[run.config.loss_type].needs
        }

    def _seeded(self, named: dict[str, TrainConfig]) -> list[Run]:
        made = []
        for label, config in named.items():
            folder = label if label in (config.loss_type, "guide") else _folder(label)
            if len(self.seeds) < 2:
                config = replace(config, seed=self.seeds[0]) if self.seeds else config
                made.append(Run(label, label, config, folder))
                continue
            for seed in self.seeds:
                seeded = replace(config, seed=seed)
                made.append(Run(f"{label} seed {seed}", label, seeded, f"{folder}/seed-{seed}"))
        return made


def schedule(updates: int, evaluations: int) -> list[int]:
    """The updates after which a run is evaluated: dense at first, where a nat of KL buys most, and the end.

    The first comes after a twentieth of the updates, but not before the second: after one, of a warm-up, there is nothing to
    see. Every other comes after as many times more as the one before, rounded up; of two that fall together one is made.

    Example:
        >>> schedule(40, 10)
        [2, 3, 4, 6, 8, 11, 15, 21, 29, 40]
    """
    shares = (20 ** (-i / max(1, evaluations - 1)) for i in range(evaluations))  # of the updates, the last first
    return sorted({min(updates, max(2, math.ceil(updates * share - 1e-9))) for share in shares})


def labels(settings: Sequence[TrainConfig]) -> dict[str, TrainConfig]:
    """Settings by name: the objective's where it has one, else with its hyperparameters, and more where these are equal.

    Example:
        >>> list(labels([TrainConfig(), *(TrainConfig(loss_type="tdpo2", alpha=alpha) for alpha in (0, 0.5))]))
        ['dpo', 'tdpo2 β0.1 α0', 'tdpo2 β0.1 α0.5']
    """
    return {label: mine for mine, label in zip(settings, (_label(each, settings) for each in settings), strict=True)}


def _label(mine: TrainConfig, settings: Sequence[TrainConfig]) -> str:
    alike = [each for each in settings if each.loss_type == mine.loss_type]
    if len(alike) == 1:
        return mine.loss_type
    differing = [name for name in mine.to_dict() if any(getattr(each, name) != getattr(mine, name) for each in alike)]
    for also, exact in (((), False), (differing, False), (differing, True)):
        said = [runs.words(each, also, exact=exact) for each in alike]
        if len(set(said)) == len(said):
            return runs.words(mine, also, exact=exact)
    raise ValueError(f"{runs.words(mine)} is there twice; leave one out")


def _folder(label: str) -> str:
    """A label as the name of a folder that every system takes: "tdpo2 β0.1" is tdpo2-beta0.1."""
    spelt = re.sub(r"[^\x00-\x7f]", lambda found: unicodedata.name(found[0]).split()[-1].lower(), label)
    return re.sub(r"[^\w.=+-]+", "-", spelt)

"""The bundled model, a whole training run: the textbook path against the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import measure
from tpo_lib.fast import FastPath
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import runs
from tpo_lib.runs.presets import PRESETS
from tpo_lib.runs.stage import Stage, pocket_stage

# AdamW divides by the size of a gradient, so where one is nearly 0 its rounding decides the step
TOLERANCE = 1e-3


def whole_runs(
    repetitions: int,
    stage: Stage | None = None,
    *,
    objectives: Sequence[str] = tuple(OBJECTIVES),
    updates: int = 12,
    batch_size: int = 8,
) -> dict:
    """Every objective trained with all logits at once and by default, interleaved.

    Args:
        repetitions: rounds; a round is one run of every objective on each of the two paths.
        stage: start and pairs; None samples them from the bundled model (half a minute, kept for the next call).
        objectives: keys of losses.OBJECTIVES.
        updates, batch_size: of a run.

    Raises:
        measure.Disagreement: the two end at different weights.
    """
    stage = stage or pocket_stage()
    changes = {"max_steps": updates, "epochs": updates, "batch_size": batch_size, "device": "cpu"}
    base, ends = replace(PRESETS["pocket"].train, **changes), {}
    few = replace(base, max_steps=min(4, updates))  # the warm-up too
    guide = runs.train_guide(few, stage.policy(), stage.start, stage.pairs).policy.requires_grad_(False)

    def run(objective: str, path: str) -> None:
        guided = "guide_logps" in OBJECTIVES[objective].needs
        config = replace(base, loss_type=objective, guide_beta=0.1 if guided else None)
        more = {"guide": guide if guided else None, "fast": FastPath(fused=path == "default")}
        ends[objective, path] = runs.train(config, stage.policy(), stage.start, stage.pairs, **more).policy

    steps = {f"{name}/{path}": partial(run, name, path) for name in objectives for path in ("textbook", "default")}
    times = measure.interleave(steps, repetitions)
    gaps = {name: _gap(ends[name, "default"], ends[name, "textbook"], stage.start) for name in objectives}
    for name, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise measure.Disagreement(
                f"{name} on the pocket model: after {updates} updates the default path's weights differ from the textbook's "
                f"by {gap:.1e} of the way from the start; at most {TOLERANCE:.0e} is allowed"
            )
    sizes = {"updates": updates, "batch_size": base.batch_size, "pairs": len(stage.pairs)}
    return {"kind": "pocket"} | sizes | {"times": times, "gaps": gaps}


def _gap(one, other, start) -> float:
    """Distance of two trained models over the way the second one went."""
    one, other, start = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in (one, other, start))
    return ((one - other).double().norm() / (other - start).double().norm()).item()

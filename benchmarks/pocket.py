"""The bundled model, a whole training run: the textbook path against the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks import measure
from tpo_lib.config import PRESETS
from tpo_lib.fast import FastPath
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs.run import fit
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
    guide = stage.policy()  # trained below, which is the warm-up too
    fit(replace(base, loss_type="dpo", max_steps=min(4, updates)), guide, stage.start, stage.pairs, progress=False)
    guide.requires_grad_(False)

    def run(objective: str, path: str) -> None:
        policy = stage.policy()
        guided = "guide_logps" in OBJECTIVES[objective].needs
        more = {"guide_beta": 0.1} if guided else {}
        config, fast = replace(base, loss_type=objective, **more), FastPath(fused=path == "default")
        guide_model = guide if guided else None
        fit(config, policy, stage.start, stage.pairs, guide=guide_model, fast=fast, progress=False)
        ends[objective, path] = policy

    steps = {f"{name}/{path}": partial(run, name, path) for name in objectives for path in ("textbook", "default")}
    times = measure.interleave(steps, repetitions)
    gaps = {name: _gap(ends[name, "default"], ends[name, "textbook"], stage.start) for name in objectives}
    for name, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise measure.Disagreement(
                f"{name} on the pocket model: after {updates} updates the default path's weights differ from the textbook's "
                f"by {gap:.1e} of the way from the start; at most {TOLERANCE:.0e} is allowed"
            )
    return {
        "kind": "pocket",
        "updates": updates,
        "batch_size": base.batch_size,
        "pairs": len(stage.pairs),
        "times": times,
        "gaps": gaps,
    }


def _gap(one, other, start) -> float:
    """Distance of two trained models over the way the second one went."""
    weights = [dict(model.named_parameters()) for model in (one, other, start)]
    apart, way = (
        sum((a[name] - b[name]).double().square().sum().item() for name in a)
        for a, b in ((weights[0], weights[1]), (weights[1], weights[2]))
    )
    return (apart / way) ** 0.5

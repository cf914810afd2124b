"""What is measured: every section is one function's result, kept under its name in results.json."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from benchmarks import contestants, loops, measure, pocket
from benchmarks.cases import Shape, build
from tpo_lib.losses import OBJECTIVES

GPT2 = Shape(vocab=50257)
BASE = replace(GPT2, pairs=4)  # of the scaling curves
AXES = {  # the other two sizes stay as in BASE
    "vocab": (1024, 4096, 16384, 50257),
    "length": (32, 64, 128, 256),
    "pairs": (1, 2, 4, 8),
}
IMDB = Shape(vocab=50257, length=53, ragged=False, layers=12, width=768)  # of IMDb's lengths: a prompt and 48 tokens
REAL = {  # the bodies that people train, with random weights
    "gpt2-small": IMDB,
    "smollm2-135m": replace(IMDB, vocab=49152, layers=30, width=576, family="llama", inner=1536, kv_heads=3),
}
FLOOR = {  # body forwards b and head GEMMs u that cannot be left out: uncached, cached
    "tdpo2": ((4, 4), (3, 4)),
    "tdpo1": ((4, 3), (3, 3)),
    "dpo": ((4, 4), (3, 3)),
    "tgdpo": ((5, 5), (3, 3)),
}


@dataclass(frozen=True)
class Plan:
    """How thoroughly to measure."""

    quick: bool = False  # half the pairs, fewer sections and contestants
    repetitions: int = 4  # rounds of timing
    labels: tuple[str, ...] = ()  # contestants; empty means all
    memory: bool = True  # measure peak memory too
    model: str | None = None  # folder of SmolLM2-135M; None: see loops.Loop


def step(objective: str, shape: Shape, plan: Plan, *, labels: Collection[str] = ()) -> dict:
    """One training step of one objective: agreement, interleaved times with the floor's units beside them, memory.

    Raises:
        measure.Disagreement: a contestant's loss or gradient is another; nothing was timed.
    """
    entries = _chosen(objective, plan.labels or labels)
    case = build(shape, guide="guide_logps" in OBJECTIVES[objective].needs)
    entries = _chosen(objective, plan.labels or labels)
    agreement = measure.check_agreement(entries, case)
    todo = {**entries, "bodies": contestants.bodies}
    steps = {label: partial(measure.gradient_step, fn, case) for label, fn in todo.items()} | measure.floor_steps(case)
    times = measure.interleave(steps, plan.repetitions)
    positions = int(case.mask.sum())
    del case, steps
    return {
        "kind": "step",
        "objective": objective,
        "shape": asdict(shape) | {"text": shape.describe()},
        "response_positions": positions,
        "agreement": agreement,
        "times": times,
        "memory_mib": {name: measure.peak_memory(shape, objective, name) for name in (todo if plan.memory else ())},
        "missing": contestants.missing(objective),
    }


def _chosen(objective: str, labels: Collection[str]) -> dict[str, measure.Step]:
    found = contestants.available(objective)
    return {label: fn for label, fn in found.items() if not labels or label in labels or label == "textbook"}


def scaling(plan: Plan, axis: str) -> dict:
    """TDPO2 along one axis: times and memory of the textbook, ours and the floor."""
    points = []
    for value in AXES[axis]:
        shape = replace(BASE, **{axis: value})
        found = step("tdpo2", shape, replace(plan, repetitions=min(2, plan.repetitions)), labels=("fused",))
        points.append({"value": value} | {key: found[key] for key in ("times", "memory_mib", "response_positions")})
    return {"kind": "scaling", "axis": axis, "objective": "tdpo2", "points": points}


def finite(plan: Plan) -> dict:
    """Which contestants stay finite where logits lie more than 104 apart, so that softmax().log() is -inf."""
    case = build(Shape(vocab=512, pairs=2, length=16, layers=1, width=64, spread=20.0))
    found = {}
    for label, fn in _chosen("tdpo2", plan.labels).items():
        loss = torch.tensor(measure.gradient_step(fn, case))
        found[label] = all(bool(x.isfinite().all()) for x in (loss, *case.gradients().values()))
    return {"kind": "finite", "objective": "tdpo2", "finite": found}


def every(plan: Plan) -> dict[str, Callable[[], dict]]:
    """{name: what measures it}, the most wanted first."""
    gpt2 = replace(GPT2, pairs=4) if plan.quick else GPT2
    few = ("trl", "liger", "fused", "cached")
    found = {}
    for vocab in (50257, 8192):
        for objective in ("tdpo2", "dpo", "tdpo1", "tgdpo"):
            labels = few if plan.quick else ()
            found[f"{objective}-{vocab}"] = partial(step, objective, replace(gpt2, vocab=vocab), plan, labels=labels)
    found["finite"] = partial(finite, plan)
    if plan.quick:
        return {name: fn for name, fn in found.items() if name not in ("tdpo1-50257", "tgdpo-50257", "tdpo1-8192")}
    shorter = replace(plan, repetitions=min(3, plan.repetitions))
    for objective in ("tdpo2", "dpo"):
        shape = replace(GPT2, ragged=False)
        found[f"{objective}-unpadded"] = partial(step, objective, shape, shorter, labels=("liger", "fused", "cached"))
    found["pocket"] = partial(pocket.whole_runs, plan.repetitions)
    found |= {f"scaling-{axis}": partial(scaling, plan, axis) for axis in AXES}
    for body, shape in REAL.items():
        for objective in ("tdpo2", "dpo"):
            found[f"{objective}-{body}"] = partial(step, objective, shape, shorter, labels=few)
    found |= {
        name: partial(loops.whole_loops, loop, min(2, plan.repetitions), plan.labels)
        for name, loop in loops.every(plan.model).items()
    }
    return found

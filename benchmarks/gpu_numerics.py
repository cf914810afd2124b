"""Part 1 of `make gpu`: what is computed tile by tile, cached, shared or sampled equals the textbook, on this device.

Every check is one row: what was compared, in which type, the largest relative error, the tolerance, and whether it holds.
The reference of a loss is the textbook path in float64 on the same device; beside our error stands the textbook's own in
the same short type, for bfloat16 and float16 round logits before anybody can do anything about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.contestants import of_readings, pair_losses
from benchmarks.measure import autocast
from tpo_lib import stats
from tpo_lib.losses import OBJECTIVES
from tpo_lib.types import IGNORE, Head, Reading

# ||found - exact|| / ||exact||. 16-bit products are rounded to 2^-9 (bf16) or 2^-12 (fp16) of each logit, and a sum of
# hundreds of log-probabilities carries that: twice the textbook's own error is allowed too, whichever is larger.
TOLERANCE = {"float32": 1e-5, "bf16": 2e-2, "fp16": 4e-3}
WIDE = 2.0
SHAPES = {  # pairs, longest response, V, d
    "odd": (3, 7, 23, 5),
    "ragged": (5, 19, 1031, 33),
    "large": (8, 48, 49152, 576),
}
SMALL = {"odd": (3, 7, 23, 5), "ragged": (2, 9, 131, 17)}
WAYS = {"pair_loss": {"logged": True}, "statistics": {"statistics": True}, "merged": {}}


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Rows of checks; stops where no time is left."""
    shapes = SMALL if small else SHAPES
    for name, precision, objective in itertools.product(shapes, TOLERANCE, OBJECTIVES):
        if left() <= 0:
            return
        yield from losses_agree(name, shapes[name], objective, precision, device)
    yield from extremes(device)


def make_case(shape: tuple[int, int, int, int], device: str, *, spread: float = 1.0) -> dict:
    """Ragged labels and three models' readings in float32: logits of standard deviation about 2 x spread."""
    pairs, longest, vocab, d = shape
    draw = torch.Generator().manual_seed(0)
    labels = torch.full((2 * pairs, longest + 3), IGNORE)
    for row in labels:
        start = int(torch.randint(1, 3, (1,), generator=draw))
        length = int(torch.randint(1, longest + 1, (1,), generator=draw))
        row[start : start + length] = torch.randint(0, vocab, (length,), generator=draw)
    count = int((labels[:, 1:] != IGNORE).sum())

    def reading(size: int, bias: bool) -> Reading:
        states = torch.randn(count, size, generator=draw)
        weight = 2 * spread * torch.randn(vocab, size, generator=draw) / size**0.5
        extra = torch.randn(vocab, generator=draw).to(device) if bias else None
        return Reading(states.to(device), Head(weight.to(device), extra))

    policy = reading(d, bias=True)
    near = policy.states + 0.3 * torch.randn(count, d, generator=draw).to(device)  # as references lie in training
    readings = {"policy": policy, "ref": Reading(near, policy.head), "guide": reading(d + 2, bias=False)}
    return {"labels": labels.to(device)} | readings


def forbidding(device: str) -> dict:
    """A case where the head's bias forbids a third of the vocabulary to policy and reference."""
    case = make_case((3, 7, 60, 5), device)
    head = case["policy"].head
    bias = torch.where(torch.arange(60, device=device) < 40, head.bias, -torch.inf)
    labels = torch.where(case["labels"] == IGNORE, IGNORE, case["labels"] % 40)
    own = {name: replace(case[name], head=replace(head, bias=bias)) for name in ("policy", "ref")}
    return case | {"labels": labels} | own


def to_type(case: Mapping, dtype: torch.dtype) -> dict:
    """The same case with its floating-point tensors in another type; those of the policy are leaves."""

    def cast(reading: Reading) -> Reading:
        weight, bias = (x if x is None else x.detach().to(dtype) for x in (reading.head.weight, reading.head.bias))
        return Reading(reading.states.detach().to(dtype), replace(reading.head, weight=weight, bias=bias))

    new = {name: value if name == "labels" else cast(value) for name, value in case.items()}
    for leaf in leaves(new).values():
        leaf.requires_grad_()
    return new


def leaves(case: Mapping) -> dict[str, Tensor]:
    """States, weight and bias of the policy."""
    policy = case["policy"]
    return {"states": policy.states, "weight": policy.head.weight, "bias": policy.head.bias}


def textbook(name: str, *, policy: Reading, labels: Tensor, ref: Reading, guide: Reading) -> Tensor:
    """All logits at once: (B,) losses."""
    return pair_losses(
        name, stats.from_readings(policy, labels, ref, guide=guide, with_kl="kl" in OBJECTIVES[name].needs)
    )


def ours(name: str, way: str) -> Callable[..., Tensor]:
    """(B,) losses by `pair_loss`, merged or not, or `token_stats`; tiles are small, so that there are several."""
    return lambda **case: of_readings(name, **case, **WAYS[way], tile_bytes=4 * case["policy"].vocab * 64)


def evaluated(fn: Callable, case: Mapping, precision: str, device: str) -> dict[str, Tensor]:
    """{"loss", "states", "weight", "bias"}: the losses and the gradients of their mean, in float64."""
    scale = 2.0**12 if precision == "fp16" else 1.0  # fp16 is trained with a loss scale; this is a modest one
    for leaf in leaves(case).values():
        leaf.grad = None
    with autocast(device, precision):
        loss = fn(**case)
    (loss.mean() * scale).backward()
    found = {"loss": loss} | {name: leaf.grad / scale for name, leaf in leaves(case).items()}
    return {name: x.detach().double() for name, x in found.items()}


def exactly(objective: str, case: Mapping, device: str) -> dict[str, Tensor]:
    """`evaluated` of the textbook in float64."""
    return evaluated(partial(textbook, objective), to_type(case, torch.float64), "float32", device)


def error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; NaN where something is not finite."""
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def losses_agree(shape_name: str, shape: tuple, objective: str, precision: str, device: str) -> Iterator[dict]:
    """Value and every gradient of one objective, in one type, by each of our ways."""
    case = make_case(shape, device)
    exact, single = exactly(objective, case, device), to_type(case, torch.float32)
    peer = evaluated(partial(textbook, objective), single, precision, device)
    for way in WAYS if objective == "tdpo1" else ("pair_loss", "statistics"):
        where = f"{shape_name} (pairs, longest, V, d = {', '.join(map(str, shape))}), {way}"
        found = evaluated(ours(objective, way), single, precision, device)
        for what in exact:
            if what == "loss" or exact[what].norm() > 0:
                textbooks = error(peer[what], exact[what])
                most = max(TOLERANCE[precision], WIDE * textbooks if textbooks == textbooks else 0.0)
                gap = error(found[what], exact[what])
                yield row(f"{objective}: {what}", where, precision, gap, most, textbook=textbooks)


def extremes(device: str) -> Iterator[dict]:
    """Logits of -inf, and logits more than 104 apart, where log(softmax) is -inf: ours stays finite and exact."""
    hard = {
        "a third of the logits -inf": (forbidding(device), tuple(TOLERANCE)),
        "logits up to 300 apart": (make_case((3, 7, 300, 16), device, spread=40.0), ("float32",)),
    }
    for (where, (case, precisions)), objective in itertools.product(hard.items(), OBJECTIVES):
        exact = exactly(objective, case, device)
        for precision in precisions:
            found = evaluated(ours(objective, "pair_loss"), to_type(case, torch.float32), precision, device)
            worst = max(error(found[what], exact[what]) for what in ("loss", "states"))
            yield row(f"{objective}: loss and states", where, precision, worst, TOLERANCE[precision])


def row(what: str, case: str, precision: str, found: float, tolerance: float, **more: float) -> dict:
    """One check; an error that is not a number does not hold."""
    told = {"what": what, "case": case, "precision": precision, "error": found, "tolerance": tolerance}
    return told | {"holds": bool(found <= tolerance)} | more

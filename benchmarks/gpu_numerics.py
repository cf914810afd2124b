"""Part 1 of `make gpu`: what is computed tile by tile, cached, shared or sampled equals the textbook, on this device.

Every check is one row: what was compared, in which type, the largest relative error, the tolerance, and whether it holds.
The reference of a loss is the textbook path in float64 on the same device; beside our error stands the textbook's own in
the same short type, for bfloat16 and float16 round logits before anybody can do anything about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_device import autocast
from tpo_course import ladder
from tpo_lib import losses, stats
from tpo_lib.fast import fused
from tpo_lib.types import IGNORE, Head, Reading

HYPERPARAMETERS = {"beta": 0.1, "alpha": 0.5, "gamma": 0.2, "guide_beta": 0.1, "shaping": "linear", "floor": 0.01}
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


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Rows of checks; stops where no time is left."""
    for name, shape in (SMALL if small else SHAPES).items():
        for precision in TOLERANCE:
            for objective in losses.OBJECTIVES:
                if left() <= 0:
                    return
                yield from losses_agree(name, shape, objective, precision, device)
    yield from forbidden(device)
    yield from far_apart(device)


def objective_of(name: str):
    """An objective with its hyperparameters filled in."""
    entry = losses.OBJECTIVES[name]
    return partial(entry.fn, **{key: HYPERPARAMETERS[key] for key in entry.hyperparameters})


def make_case(shape: tuple[int, int, int, int], device: str, *, spread: float = 1.0, seed: int = 0) -> dict:
    """Ragged labels and three models' readings in float32: logits of standard deviation about 2 x spread."""
    pairs, longest, vocab, d = shape
    draw = torch.Generator().manual_seed(seed)
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
    near = Reading(  # the reference lies near the policy, as it does in training
        policy.states + 0.3 * torch.randn(count, d, generator=draw).to(device), policy.head
    )
    return {"labels": labels.to(device), "policy": policy, "ref": near, "guide": reading(d + 2, bias=False)}


def to_type(case: dict, dtype: torch.dtype) -> dict:
    """The same case with its floating-point tensors in another type; those of the policy are leaves."""

    def cast(reading: Reading) -> Reading:
        head = reading.head
        bias = None if head.bias is None else head.bias.detach().to(dtype)
        return Reading(
            reading.states.detach().to(dtype), replace(head, weight=head.weight.detach().to(dtype), bias=bias)
        )

    new = {name: value if name == "labels" else cast(value) for name, value in case.items()}
    for leaf in leaves(new):
        leaf.requires_grad_()
    return new


def leaves(case: dict) -> list[Tensor]:
    """States, weight and bias of the policy."""
    policy = case["policy"]
    return [x for x in (policy.states, policy.head.weight, policy.head.bias) if x is not None]


def textbook(name: str, case: dict) -> Tensor:
    """All logits at once: (B,) losses."""
    tokens = stats.token_stats(
        case["policy"].logits(),
        case["labels"],
        case["ref"].logits(),
        guide_logits=case["guide"].logits(),
        with_kl="kl" in losses.OBJECTIVES[name].needs,
    )
    return objective_of(name)(*stats.split(tokens)).loss


def ours(name: str, case: dict, *, way: str) -> Tensor:
    """(B,) losses by `pair_loss`, merged or not, or `token_stats`; tiles are small, so that there are several."""
    with_kl = "kl" in losses.OBJECTIVES[name].needs
    policy, labels, ref, guide = (case[key] for key in ("policy", "labels", "ref", "guide"))
    tile = 4 * policy.vocab * 64
    if way == "statistics":
        tokens = ladder.token_stats(policy, labels, ref, guide=guide, with_kl=with_kl, tile_bytes=tile)
        return objective_of(name)(*stats.split(tokens)).loss
    return fused.pair_loss(
        objective_of(name), policy, labels, ref, guide=guide, with_kl=with_kl, logged=way != "merged", tile_bytes=tile
    )[0].loss


def evaluated(fn: Callable[[dict], Tensor], case: dict, precision: str, device: str, scale: float = 1.0) -> dict:
    """{"loss", "states", "weight", "bias"}: the losses and the gradients of their mean, in float64."""
    for leaf in leaves(case):
        leaf.grad = None
    with autocast(device, precision):
        loss = fn(case)
    (loss.mean() * scale).backward()
    names = ("loss", "states", "weight", "bias")
    found = [loss, *(leaf.grad / scale for leaf in leaves(case))]
    return {name: x.detach().double() for name, x in zip(names, found, strict=False)}


def error(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact||; NaN where something is not finite."""
    return ((found - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def losses_agree(shape_name: str, shape: tuple, objective: str, precision: str, device: str) -> Iterator[dict]:
    """Value and every gradient of one objective, in one type, by each of our ways."""
    case = make_case(shape, device)
    exact = evaluated(partial(textbook, objective), to_type(case, torch.float64), "float32", device)
    single = to_type(case, torch.float32)
    scale = 2.0**12 if precision == "fp16" else 1.0  # fp16 is trained with a loss scale; this is a modest one
    peer = evaluated(partial(textbook, objective), single, precision, device, scale)
    ways = ["pair_loss", "statistics"] + ["merged"] * (objective == "tdpo1")
    for way in ways:
        found = evaluated(partial(ours, objective, way=way), single, precision, device, scale)
        for what in exact:
            if what != "loss" and exact[what].norm() == 0:
                continue
            textbooks = error(peer[what], exact[what])
            yield row(
                f"{objective}: {what}",
                f"{shape_name} (pairs, longest, V, d = {', '.join(map(str, shape))}), {way}",
                precision,
                error(found[what], exact[what]),
                max(TOLERANCE[precision], WIDE * textbooks if textbooks == textbooks else 0.0),
                textbook=textbooks,
            )


def forbidden(device: str) -> Iterator[dict]:
    """Logits of -inf: the head's bias forbids a third of the vocabulary to policy and reference; the rest must agree."""
    shape = (3, 7, 60, 5)
    for precision in TOLERANCE:
        for objective in losses.OBJECTIVES:
            case = make_case(shape, device)
            case["labels"] = torch.where(case["labels"] == IGNORE, IGNORE, case["labels"] % 40)
            for name in ("policy", "ref"):
                bias = case[name].head.bias.clone()
                bias[40:] = -torch.inf
                case[name] = replace(case[name], head=replace(case[name].head, bias=bias))
            exact = evaluated(partial(textbook, objective), to_type(case, torch.float64), "float32", device)
            found = evaluated(
                partial(ours, objective, way="pair_loss"), to_type(case, torch.float32), precision, device
            )
            worst = max(error(found[what], exact[what]) for what in ("loss", "states"))
            yield row(
                f"{objective}: loss and states", "a third of the logits -inf", precision, worst, TOLERANCE[precision]
            )


def far_apart(device: str) -> Iterator[dict]:
    """Logits more than 104 apart, where log(softmax) is -inf: ours stays finite and exact."""
    for objective in losses.OBJECTIVES:
        case = make_case((3, 7, 300, 16), device, spread=40.0)
        exact = evaluated(partial(textbook, objective), to_type(case, torch.float64), "float32", device)
        found = evaluated(partial(ours, objective, way="pair_loss"), to_type(case, torch.float32), "float32", device)
        worst = max(error(found[what], exact[what]) for what in ("loss", "states"))
        yield row(f"{objective}: loss and states", "logits up to 300 apart", "float32", worst, TOLERANCE["float32"])


def row(what: str, case: str, precision: str, found: float, tolerance: float, **more: float) -> dict:
    """One check; an error that is not a number does not hold."""
    return {
        "what": what,
        "case": case,
        "precision": precision,
        "error": found,
        "tolerance": tolerance,
        "holds": bool(found <= tolerance),
    } | more

"""Part 2 of `make gpu`: what a step costs on the shapes that people train, beside the peers, and how much fits.

A step is forward and backward of the mean loss, every frozen model's forward pass included unless it is cached, under
bfloat16 autocast with float32 weights. Nothing is timed before it agrees with the textbook at the very batch that is timed.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial

import torch

from benchmarks import contestants
from benchmarks.cases import Case, Shape, build
from benchmarks.measure import Step, check_agreement, gradient_step, interleave
from tpo_lib.losses import OBJECTIVES

SMOL = Shape(vocab=49152, pairs=64, length=56, layers=30, width=576, family="llama", inner=1536, kv_heads=3)
GPT2, SMOLLM2, LLAMA, CHAT = "gpt2-small, IMDb", "smollm2-135m, IMDb", "llama-1b, 4 pairs", "smollm2-135m, chat"
SHAPES = {
    GPT2: Shape(vocab=50257, pairs=64, length=56, layers=12, width=768),
    SMOLLM2: SMOL,
    LLAMA: Shape(vocab=128256, pairs=4, length=512, ragged=False, layers=16, width=2048, family="llama", spread=0.04),
    CHAT: replace(SMOL, pairs=16, length=512),
}
TINY = {"vocab": 131, "pairs": 4, "length": 20, "layers": 1, "width": 64, "inner": 64, "kv_heads": 1}
FIRST = [(name, objective) for name in (GPT2, SMOLLM2, LLAMA) for objective in ("dpo", "tdpo2")]
THEN = [(GPT2, "tdpo1"), (GPT2, "tgdpo"), (CHAT, "dpo"), (CHAT, "tdpo2"), (SMOLLM2, "tdpo1"), (SMOLLM2, "tgdpo"),
        (LLAMA, "tdpo1")]  # fmt: skip
COMPILED = (LLAMA, GPT2)  # Liger compiles its loss for each shape, which takes its time
TIMED = ("textbook", "trl", "liger", "fused", "cached")
MOST = 512  # pairs that are tried at most


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Sections, the most wanted first; stops where no time is left."""
    shapes = {name: replace(shape, device=device, **(TINY if small else {})) for name, shape in SHAPES.items()}
    few, many = (2, 2) if small else (3, 7)  # repetitions
    plan = [(steps, name, objective, many) for name, objective in FIRST]
    plan += [(largest, LLAMA, "tdpo2", few), (largest, LLAMA, "dpo", few), (precisions, GPT2, "dpo", many)]
    plan += [(steps, name, objective, many) for name, objective in (THEN[:2] if small else THEN)]
    for section, name, objective, repetitions in plan:
        if left() <= 0:
            return
        row = {"kind": section.__name__, "name": name, "objective": objective}
        try:
            row |= section(name, shapes[name], objective, repetitions)
        except Exception as problem:  # out of memory, say: the sections that follow are wanted all the same
            problem.__traceback__ = None  # it holds the tensors
            row |= {"kind": "failed", "problem": f"{type(problem).__name__}: {problem}"[:300]}
        yield row
        _tidy(device)


def steps(name: str, shape: Shape, objective: str, repetitions: int) -> dict:
    """Who agrees, time of a step, peak memory, share of the ceilings."""
    case = build(shape, guide="guide_logps" in OBJECTIVES[objective].needs)
    entries = {label: fn for label, fn in contestants.available(objective).items() if label in TIMED}
    if name not in COMPILED:
        entries.pop("liger", None)
    said = check_agreement(entries, case, catch=Exception)  # a peer that does not run is a result too
    agreeing = {label: fn for label, fn in entries.items() if "refused" not in said.get(label, ())}
    told = {"shape": asdict(shape) | {"text": shape.describe()}, "agreement": said}
    return timed(agreeing, case, objective, repetitions) | told | {"missing": contestants.missing(objective)}


def timed(entries: Mapping[str, Step], case: Case, objective: str, repetitions: int) -> dict:
    """Seconds, memory and rates of those that fit, and of the bodies alone."""
    memory = {label: peak(fn, case) for label, fn in entries.items()}
    todo = {label: fn for label, fn in entries.items() if memory[label] is not None} | {"bodies": contestants.bodies}
    gradient_step(contestants.bodies, case)
    return clocked({label: partial(gradient_step, fn, case) for label, fn in todo.items()}, case, repetitions) | {
        "memory_gib": memory,
        "tokens": int(case.batch.attention_mask.sum()),
        "response_tokens": int(case.mask.sum()),
        "flops": {"uncached": flops(case, objective, False), "cached": flops(case, objective, True)},
        "head_bytes": head_bytes(case, objective),
        "pairs": case.shape.pairs,
    }


def clocked(todo: Mapping[str, Callable], case: Case, repetitions: int) -> dict:
    """{"seconds": one number a round, "median_s"} of each."""
    times = interleave(todo, repetitions, case.shape.device)
    seconds = {label: clocks["wall_s"] for label, clocks in times.items()}
    return {"seconds": seconds, "median_s": {label: statistics.median(values) for label, values in seconds.items()}}


def peak(fn: Step, case: Case) -> float | None:
    """GiB that a step needs above the loaded models, gradients included; None where it does not fit; 0 on a CPU."""
    if case.shape.device != "cuda":
        gradient_step(fn, case)
        return 0.0
    case.policy.zero_grad(set_to_none=True)
    _tidy("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        gradient_step(fn, case)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    used = (torch.cuda.max_memory_allocated() - before) / 2**30
    case.policy.zero_grad(set_to_none=True)
    _tidy("cuda")
    return used if fits else None


def _tidy(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def largest(name: str, shape: Shape, objective: str, repetitions: int) -> dict:
    """The most pairs that fit, by each contestant; and ours beside the textbook at the textbook's largest batch."""
    case, there = build(shape), contestants.available(objective)
    most = {label: fit_most(there[label], case) for label in ("textbook", "trl", "fused", "cached") if label in there}

    def at(label: str, *labels: str) -> dict:
        pairs = max(2, int(0.97 * most[label]["pairs"]))  # a little room: blocks of memory fall apart
        return timed({label: there[label] for label in labels}, case.resized(pairs=pairs), objective, repetitions)

    told = {"most": most, "beside": at("textbook", "textbook", "fused", "cached"), "alone": at("fused", "fused")}
    cuda = shape.device == "cuda"
    told["loaded_gib"] = torch.cuda.memory_allocated() / 2**30 if cuda else 0.0
    # above the loaded models, a step of 32 pairs; None where it does not fit or is not measured
    told["gib_of_32"] = peak(there["fused"], case.resized(pairs=32)) if cuda else None
    return told


def fit_most(fn: Step, case: Case) -> dict:
    """Pairs that fit: predicted from the memory of two and four pairs, then tried."""

    def of(pairs: int) -> float | None:
        return peak(fn, case.resized(pairs=pairs))

    two, four = of(2), of(4)
    if case.shape.device != "cuda" or two is None or four is None:
        return {"pairs": 4 if four is not None else 2, "gib": four or two, "gib_a_pair": None}
    each = (four - two) / 2
    free = torch.cuda.mem_get_info()[0] / 2**30
    pairs = min(MOST, int((0.97 * free - (two - 2 * each)) / max(each, 1e-6)))
    while pairs > 4 and (used := of(pairs)) is None:
        pairs = int(0.95 * pairs)
    return {"pairs": pairs, "gib": used if pairs > 4 else four, "gib_a_pair": each}


def precisions(name: str, shape: Shape, objective: str, repetitions: int) -> dict:
    """The same step of ours in float32 (TF32 off) and under bf16 autocast."""
    case, fn = build(shape), contestants.CONTESTANTS[objective]["fused"]
    todo = {kind: partial(gradient_step, fn, case, kind) for kind in ("float32", "bf16")}
    return {"losses": {kind: call() for kind, call in todo.items()}} | clocked(todo, case, repetitions)


def flops(case: Case, objective: str, cached: bool) -> float:
    """Floating-point operations that a step cannot leave out: no padding, the head at response positions alone.

    A product of an (m, k) and a (k, n) matrix is 2 m k n; backward is two of them. The policy takes 3 passes, every
    frozen model 1. Causal attention looks at half of the T^2 places.
    """
    policy, lengths = case.policy, case.batch.attention_mask.sum(1).double()
    embedded = {id(p) for m in policy.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    body = sum(p.numel() for p in policy.parameters() if id(p) not in embedded and p.ndim == 2)
    tokens, rows = lengths.sum().item(), int(case.mask.sum())
    attention = 4 * case.shape.layers * case.shape.width * (lengths.square() / 2).sum().item()
    one_pass, head = 2 * body * tokens + attention, 2 * case.shape.width * case.shape.vocab * rows
    needs = OBJECTIVES[objective].needs
    frozen = 0 if cached else sum(need.endswith("_logps") for need in needs)
    heads = 2 if objective == "tdpo1" else 3  # TDPO1: logits cancel
    return (3 + frozen) * one_pass + (heads + (1 if "kl" in needs else frozen)) * head


def head_bytes(case: Case, objective: str) -> float:
    """Bytes that a textbook step moves for its vocabulary tensors alone: written once and read once, in float32."""
    live = {"tdpo1": 8, "tdpo2": 8, "tgdpo": 5}.get(objective, 4)
    n, t = case.batch.labels.shape
    return 2.0 * 4 * live * n * t * case.shape.vocab

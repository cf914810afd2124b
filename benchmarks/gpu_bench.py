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
from benchmarks.cases import Case, Shape, build, make_batch
from benchmarks.gpu_device import autocast
from benchmarks.measure import interleave

SMOL = Shape(vocab=49152, pairs=64, length=56, layers=30, width=576, family="llama", inner=1536, kv_heads=3)
SHAPES = {
    "gpt2-small, IMDb": Shape(vocab=50257, pairs=64, length=56, layers=12, width=768),
    "smollm2-135m, IMDb": SMOL,
    "llama-1b, 4 pairs": Shape(
        vocab=128256, pairs=4, length=512, ragged=False, layers=16, width=2048, family="llama", spread=0.04
    ),
    "smollm2-135m, chat": replace(SMOL, pairs=16, length=512),
}
FIRST = (("gpt2-small, IMDb", ("dpo", "tdpo2")), ("smollm2-135m, IMDb", ("dpo", "tdpo2")),
         ("llama-1b, 4 pairs", ("dpo", "tdpo2")))  # fmt: skip
THEN = (("gpt2-small, IMDb", ("tdpo1", "tgdpo")), ("smollm2-135m, chat", ("dpo", "tdpo2")),
        ("smollm2-135m, IMDb", ("tdpo1", "tgdpo")), ("llama-1b, 4 pairs", ("tdpo1",)))  # fmt: skip
COMPILED = ("llama-1b, 4 pairs", "gpt2-small, IMDb")  # Liger compiles its loss for each shape, which takes its time
TIMED = ("textbook", "trl", "liger", "fused", "cached")
MOST = 512  # pairs that are tried at most
AGREE = {"float32": 1e-4, "bf16": 3e-2}
Step = Callable[[Case], torch.Tensor]


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Sections, the most wanted first; stops where no time is left."""
    shapes = {name: _fitted(shape, device, small) for name, shape in SHAPES.items()}
    repetitions = 2 if small else 7
    plan = [partial(steps, name, shapes[name], of, repetitions) for name, of in FIRST]
    plan += [partial(largest, "llama-1b, 4 pairs", shapes["llama-1b, 4 pairs"], 2 if small else 3)]
    plan += [partial(precisions, "gpt2-small, IMDb", shapes["gpt2-small, IMDb"], repetitions)]
    plan += [partial(steps, name, shapes[name], of, repetitions) for name, of in (THEN[:1] if small else THEN)]
    for section in plan:
        if left() <= 0:
            return
        try:
            yield from section(left)
        except Exception as problem:  # out of memory, say: the sections that follow are wanted all the same
            problem.__traceback__ = None  # it holds the tensors
            yield {
                "kind": "failed",
                "name": str(section.args[0]),
                "problem": f"{type(problem).__name__}: {problem}"[:300],
            }
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _fitted(shape: Shape, device: str, small: bool) -> Shape:
    if not small:
        return replace(shape, device=device)
    tiny = {"vocab": 131, "pairs": 4, "length": 20, "layers": 1, "width": 64, "inner": 64, "kv_heads": 1}
    return replace(shape, device=device, **tiny)


def step(fn: Step, case: Case, precision: str | None = None) -> float:
    """Forward and backward; gradients are made anew."""
    device = case.shape.device
    case.policy.zero_grad(set_to_none=True)
    with autocast(device, precision or ("bf16" if device == "cuda" else "float32")):
        loss = fn(case)
    loss.backward()
    return loss.item()


def steps(name: str, shape: Shape, objectives: tuple[str, ...], repetitions: int, left: Callable) -> Iterator[dict]:
    """One section an objective: who agrees, time of a step, peak memory, share of the ceilings."""
    for objective in objectives:
        if left() <= 0:
            return
        case = build(shape, guide=objective == "tgdpo")
        entries = {label: fn for label, fn in contestants.available(objective).items() if label in TIMED}
        if name not in COMPILED:
            entries.pop("liger", None)
        agreeing, said = agree(entries, case)
        yield (
            {"kind": "steps", "name": name, "objective": objective}
            | timed(agreeing, case, objective, repetitions)
            | {
                "shape": asdict(shape) | {"text": shape.describe()},
                "agreement": said,
                "missing": {k: v for k, v in contestants.MISSING.items() if v},
            }
        )
        del case, agreeing
        gc.collect()


def timed(entries: Mapping[str, Step], case: Case, objective: str, repetitions: int) -> dict:
    """Seconds, memory and rates of those that fit, and of the bodies alone."""
    device = case.shape.device
    memory = {label: peak(fn, case) for label, fn in entries.items()}
    todo = {label: partial(step, fn, case) for label, fn in entries.items() if memory[label] is not None}
    todo["bodies"] = partial(step, contestants.bodies, case)
    todo["bodies"]()
    times = {label: clocks["wall_s"] for label, clocks in interleave(todo, repetitions, device).items()}
    return {
        "seconds": times,
        "median_s": {label: statistics.median(values) for label, values in times.items()},
        "memory_gib": memory,
        "tokens": int(case.batch.attention_mask.sum()),
        "response_tokens": int(case.mask.sum()),
        "flops": {"uncached": flops(case, objective, False), "cached": flops(case, objective, True)},
        "head_bytes": head_bytes(case, objective),
        "pairs": len(case.batch.labels) // 2,
    }


def agree(entries: Mapping[str, Step], case: Case) -> tuple[dict[str, Step], dict[str, dict]]:
    """Those whose loss and gradient are the textbook's, and by how much everyone differs, or why it could not run."""
    tolerance = AGREE["bf16" if case.shape.device == "cuda" else "float32"]
    said, good, expected, gradient = {}, {}, None, None
    for label, fn in entries.items():
        try:
            loss = step(fn, case)
            found = [p.grad for p in case.policy.parameters() if p.grad is not None]
            if label == "textbook":
                expected, gradient = loss, [g.clone() for g in found]
                good[label] = fn
                continue
            gap = sum((a - b).double().square().sum() for a, b in zip(found, gradient, strict=True)).sqrt()
            size = sum(g.double().square().sum() for g in gradient).sqrt()
            said[label] = {"loss": abs(loss - expected) / abs(expected), "gradient": (gap / size).item()}
            if max(said[label].values()) <= tolerance:
                good[label] = fn
            else:
                said[label]["refused"] = f"more than {tolerance:g} from the textbook; not timed"
        except Exception as problem:  # a peer that does not run is a result too
            said[label] = {"refused": f"{type(problem).__name__}: {str(problem)[:200]}"}
        finally:
            found = None
            case.policy.zero_grad(set_to_none=True)
    return good, said


def peak(fn: Step, case: Case) -> float | None:
    """GiB that a step needs above the loaded models, gradients included; None where it does not fit; 0 on a CPU."""
    if case.shape.device != "cuda":
        step(fn, case)
        return 0.0
    case.policy.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        step(fn, case)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    used = (torch.cuda.max_memory_allocated() - before) / 2**30
    case.policy.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    return used if fits else None


def largest(name: str, shape: Shape, repetitions: int, left: Callable) -> Iterator[dict]:
    """The most pairs that fit, by each contestant; and ours beside the textbook at the textbook's largest batch."""
    for objective in ("tdpo2", "dpo"):
        if left() <= 0:
            return
        case = build(shape)
        most, there = {}, contestants.available(objective)
        for label in ("textbook", "trl", "fused", "cached"):
            if label in there and left() > 0:
                most[label] = fit_most(there[label], case)
        entries = {label: there[label] for label in ("textbook", "fused", "cached")}
        together = max(2, int(0.97 * most["textbook"]["pairs"]))  # a little room: blocks of memory fall apart
        at = case.on(make_batch(replace(shape, pairs=together)).to(torch.device(shape.device)))
        beside = timed(entries, at, objective, repetitions)
        ours = case.on(
            make_batch(replace(shape, pairs=int(0.97 * most["fused"]["pairs"]))).to(torch.device(shape.device))
        )
        alone = timed({"fused": there["fused"]}, ours, objective, repetitions)
        yield {"kind": "largest", "name": name, "objective": objective, "most": most, "beside": beside, "alone": alone,
               "loaded_gib": loaded(shape.device), "gib_of_32": in_all(there["fused"], case)}  # fmt: skip
        del case, at, ours
        gc.collect()


def loaded(device: str) -> float:
    """GiB that the models take before a step."""
    return torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0


def in_all(fn: Step, case: Case) -> float | None:
    """GiB that a step of 32 pairs takes above the loaded models; None where it does not fit or is not measured."""
    if case.shape.device != "cuda":
        return None
    return peak(fn, case.on(make_batch(replace(case.shape, pairs=32)).to(torch.device("cuda"))))


def fit_most(fn: Step, case: Case) -> dict:
    """Pairs that fit: predicted from the memory of two and four pairs, then tried."""
    device = torch.device(case.shape.device)

    def of(pairs: int) -> float | None:
        return peak(fn, case.on(make_batch(replace(case.shape, pairs=pairs)).to(device)))

    two, four = of(2), of(4)
    if device.type != "cuda" or two is None or four is None:
        return {"pairs": 4 if four is not None else 2, "gib": four or two, "gib_a_pair": None}
    each = (four - two) / 2
    free = torch.cuda.mem_get_info()[0] / 2**30
    pairs = min(MOST, int((0.97 * free - (two - 2 * each)) / max(each, 1e-6)))
    while pairs > 4 and (used := of(pairs)) is None:
        pairs = int(0.95 * pairs)
    return {"pairs": pairs, "gib": used if pairs > 4 else four, "gib_a_pair": each}


def precisions(name: str, shape: Shape, repetitions: int, left: Callable) -> Iterator[dict]:
    """The same step of ours in float32 (TF32 off) and under bf16 autocast."""
    case = build(shape)
    fn = contestants.CONTESTANTS["dpo"]["fused"]
    todo = {kind: partial(step, fn, case, kind) for kind in ("float32", "bf16")}
    losses = {kind: call() for kind, call in todo.items()}
    times = {kind: clocks["wall_s"] for kind, clocks in interleave(todo, repetitions, shape.device).items()}
    yield {"kind": "precisions", "name": name, "objective": "dpo", "losses": losses, "seconds": times,
           "median_s": {kind: statistics.median(values) for kind, values in times.items()}}  # fmt: skip


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
    frozen = {"tgdpo": 2, "simpo": 0, "sft": 0}.get(objective, 1)
    with_kl = objective.startswith("tdpo")
    bodies = 3 + (0 if cached else frozen)
    heads = (2 if objective == "tdpo1" else 3) + (1 if with_kl else 0 if cached else frozen)  # TDPO1: logits cancel
    return bodies * one_pass + heads * head


def head_bytes(case: Case, objective: str) -> float:
    """Bytes that a textbook step moves for its vocabulary tensors alone: written once and read once, in float32."""
    live = {"tdpo1": 8, "tdpo2": 8, "tgdpo": 5}.get(objective, 4)
    n, t = case.batch.labels.shape
    return 2.0 * 4 * live * n * t * case.shape.vocab

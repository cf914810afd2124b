"""Agreement first, then time (interleaved, in one process), then peak memory (each in a process of its own)."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import contestants
from benchmarks.cases import Case, Shape, build, make_batch
from tpo_lib.losses import OBJECTIVES

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
TOLERANCE = {"cpu": 1e-5, "cuda": 3e-2}  # fp32; bfloat16 autocast


class Disagreement(RuntimeError):
    """A contestant computes something else: its time would mean nothing."""


def gradient_step(fn: Callable[[Case], Tensor], case: Case) -> float:
    """One forward and backward pass; gradients are left in the policy, made anew."""
    case.policy.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16) if case.shape.device == "cuda" else nullcontext():
        loss = fn(case)
    loss.backward()
    return loss.item()


def check_agreement(entries: Mapping[str, Callable], case: Case, against: str = "textbook") -> dict[str, dict]:
    """Loss and gradient of every contestant against one of them, relative; this is the warm-up too.

    Returns:
        {name: {"loss": relative difference, "gradient": norm of the difference over the norm, of the whole gradient,
        "tensor": the same of the worst single tensor, among those with at least 1e-3 of the whole norm}}.

    Raises:
        Disagreement: names contestant, quantity and size.
    """
    expected = gradient_step(entries[against], case)
    gradients = {name: p.grad.clone() for name, p in case.parameters().items() if p.grad is not None}
    whole = _norm(gradients.values())
    differences = {}
    for label, fn in entries.items():
        if label == against:
            continue
        loss = gradient_step(fn, case)
        gaps = {name: p.grad - gradients[name] for name, p in case.parameters().items() if name in gradients}
        large = [name for name, g in gradients.items() if g.norm() > 1e-3 * whole]
        differences[label] = found = {
            "loss": abs(loss - expected) / abs(expected),
            "gradient": _norm(gaps.values()) / whole,
            "tensor": max((gaps[name].norm() / gradients[name].norm()).item() for name in large),
        }
        for what in ("loss", "gradient"):
            if not found[what] <= TOLERANCE[case.shape.device]:
                raise Disagreement(
                    f"{label} differs from {against} in its {what} by {found[what]:.1e} of it "
                    f"({case.shape.describe()}); at most {TOLERANCE[case.shape.device]:.0e} is allowed, nothing was timed"
                )
    return differences


def _norm(tensors) -> float:
    return sum(x.double().square().sum().item() for x in tensors) ** 0.5


def interleave(steps: Mapping[str, Callable[[], object]], repetitions: int, device: str = "cpu") -> dict[str, dict]:
    """Run every step `repetitions` times, all of them in every round, in an order that rotates.

    Returns:
        {name: {"cpu_s": [...], "wall_s": [...]}}, one number a round: seconds of all threads, and of the clock.
    """
    names = list(steps)
    times = {name: {"cpu_s": [], "wall_s": []} for name in names}
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronise(device)
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name]()
            _synchronise(device)
            times[name]["cpu_s"].append(time.process_time() - cpu)
            times[name]["wall_s"].append(time.perf_counter() - wall)
    return times


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def floor_steps(case: Case) -> dict[str, Callable]:
    """The two units of the computed floor: b, one body forward, and u, one head GEMM over the response positions.

    The body is read as ResponseReader reads it, most padding left out. On a CPU the GEMM runs in blocks of columns that
    are thrown away in its cache: there is no faster one.
    """
    states = case.read("policy").states.detach()
    weight = case.policy.get_output_embeddings().weight.detach()
    cuda = case.shape.device == "cuda"
    if cuda:
        states, weight = states.bfloat16(), weight.bfloat16()
    blocks = weight.split(len(weight) if cuda else 512)  # (columns, d) each

    def body() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            case.read("policy")

    def head() -> None:
        for block in blocks:
            torch.mm(states, block.T)  # (R, columns)

    return {"b": body, "u": head}


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratio(times: Mapping[str, Mapping], name: str, against: str, clock: str = "cpu_s") -> dict[str, float]:
    """Of the quotients within each round: median and quartiles."""
    return summary([a / b for a, b in zip(times[name][clock], times[against][clock], strict=True)])


def peak_memory(shape: Shape, objective: str, label: str) -> float | None:
    """MiB that one step needs above the loaded models, measured in a new process (None where it cannot be measured).

    The process is forked from a server that has imported everything, so it starts within a moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.contestants", "transformers.models.gpt2.modeling_gpt2"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, shape, objective, label, torch.get_num_threads()).result()


def _peak_here(shape: Shape, objective: str, label: str, threads: int) -> float | None:
    torch.set_num_threads(threads)
    fn = contestants.bodies if label == "bodies" else contestants.CONTESTANTS[objective][label]
    case = build(shape, guide="guide_logps" in OBJECTIVES[objective].needs)
    small = replace(shape, pairs=1, length=8)
    gradient_step(fn, case.on(make_batch(small).to(torch.device(shape.device))))  # libraries take their buffers now
    if label == "cached":
        _ = case.known_states, case.known_logps
    case.policy.zero_grad(set_to_none=True)
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient_step(fn, case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    for option in (
        M_MMAP_THRESHOLD,
        M_TRIM_THRESHOLD,
    ):  # what is freed is given back, so that what is counted is in use
        libc.mallopt(option, 1 << 20)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    gradient_step(fn, case)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

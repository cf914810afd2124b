"""Agreement first, then time (interleaved, in one process), then peak memory (each in a process of its own)."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import contestants
from benchmarks.cases import Case, Shape, build
from tpo_lib.losses import OBJECTIVES

RESET = Path("/proc/self/clear_refs")  # Linux alone has it
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"float32": 1e-5, "bf16": 3e-2}
Step = Callable[[Case], Tensor]


class Disagreement(RuntimeError):
    """A contestant computes something else: its time would mean nothing."""


def autocast(device: str, precision: str) -> AbstractContextManager:
    """Autocast to "bf16" or "fp16"; "float32" changes nothing."""
    return torch.autocast(device, TYPES[precision]) if precision in TYPES else nullcontext()


def gradient_step(fn: Step, case: Case, precision: str | None = None) -> float:
    """One forward and backward pass; gradients are left in the policy, made anew."""
    case.policy.zero_grad(set_to_none=True)
    with autocast(case.shape.device, precision or case.shape.precision):
        loss = fn(case)
    loss.backward()
    return loss.item()


def check_agreement(
    entries: Mapping[str, Step], case: Case, precision: str | None = None, *,
    against: str = "textbook", catch: type[Exception] | tuple = (),
) -> dict[str, dict]:  # fmt: skip
    """Loss and gradient of every contestant against one of them, relative; this is the warm-up too.

    Args:
        catch: errors that are written down, as "refused", instead of raised.

    Returns:
        {name: {"loss": relative difference, "gradient": norm of the difference over the norm, of the whole gradient,
        "tensor": the same of the worst single tensor, among those with at least 1e-3 of the whole norm}}.

    Raises:
        Disagreement: names contestant, quantity and size.
    """
    expected = gradient_step(entries[against], case, precision)
    exact = {name: grad.clone() for name, grad in case.gradients().items()}
    sizes = {name: _norm(grad) for name, grad in exact.items()}
    whole, most, found = math.hypot(*sizes.values()), TOLERANCE[precision or case.shape.precision], {}
    for label in entries:
        if label == against:
            continue
        found[label] = said = {}
        try:
            loss = gradient_step(entries[label], case, precision)
            gaps = {name: _norm(case.policy.get_parameter(name).grad - grad) for name, grad in exact.items()}
            said["loss"] = abs(loss - expected) / abs(expected)
            said["gradient"] = math.hypot(*gaps.values()) / whole
            said["tensor"] = max(gaps[name] / size for name, size in sizes.items() if size > 1e-3 * whole)
            for what in ("loss", "gradient"):
                if not said[what] <= most:
                    raise Disagreement(
                        f"{label} differs from {against} in its {what} by {said[what]:.1e} of it "
                        f"({case.shape.describe()}); at most {most:.0e} is allowed, nothing was timed"
                    )
        except catch as problem:
            said["refused"] = f"{type(problem).__name__}: {problem}"[:300]
        case.policy.zero_grad(set_to_none=True)
    return found


def _norm(tensor: Tensor) -> float:
    return tensor.double().square().sum().item() ** 0.5


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
            synchronise(device)
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name]()
            synchronise(device)
            times[name]["cpu_s"].append(time.process_time() - cpu)
            times[name]["wall_s"].append(time.perf_counter() - wall)
    return times


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def floor_steps(case: Case) -> dict[str, Callable]:
    """The two units of the computed floor: b, one body forward, and u, one head GEMM over the response positions.

    The body is read as ResponseReader reads it, most padding left out. The GEMM runs in blocks of columns that are thrown
    away in the cache: there is no faster one on a CPU.
    """
    states = case.read("policy").states.detach()
    blocks = case.policy.get_output_embeddings().weight.detach().split(512)  # (512, d) each

    def head() -> None:
        for block in blocks:
            torch.mm(states, block.T)  # (R, 512)

    return {"b": torch.no_grad()(partial(case.read, "policy")), "u": head}


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
    """MiB that one step on the CPU needs above the loaded models, measured in a new process; None where it cannot be.

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
    gradient_step(fn, case.resized(pairs=1, length=8))  # libraries take their buffers now
    if label == "cached":
        _ = case.known_states, case.known_logps
    case.policy.zero_grad(set_to_none=True)
    gc.collect()
    before = start_of_peak()
    gradient_step(fn, case)
    return peak_since(before)


def start_of_peak() -> int | None:
    """Memory in use, in KiB, from where a peak is now counted; None where it cannot be read."""
    if not RESET.exists():
        return None
    libc = ctypes.CDLL(None)
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):  # what is freed is given back: what is counted is in use
        libc.mallopt(option, 1 << 20)
    libc.malloc_trim(0)
    RESET.write_text("5")  # the high-water mark starts anew
    return _status("VmRSS")


def peak_since(before: int | None) -> float | None:
    """MiB above what `start_of_peak` found."""
    return None if before is None else (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

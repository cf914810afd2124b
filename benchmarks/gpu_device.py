"""What every part of `make gpu` asks of the device: its name, its ceilings, its clock, and a 16-bit context."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "T4": 65e12}  # dense 16-bit FLOP/s


def best() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device: str, precision: str) -> AbstractContextManager:
    """Autocast to "bf16" or "fp16"; "float32" changes nothing."""
    return torch.autocast(device, TYPES[precision]) if precision in TYPES else nullcontext()


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(fn: Callable[[], object], device: str, repetitions: int = 5) -> float:
    """Median seconds of a call, after one to warm up."""
    fn()
    times = []
    for _ in range(repetitions):
        synchronise(device)
        start = time.perf_counter()
        fn()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device: str) -> dict[str, float | None]:
    """The two rates nothing can pass: a large bf16 product (FLOP/s) and a large copy (bytes read and written a second)."""
    n = 8192 if device == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * n**3 / seconds(lambda: a @ b, device, 20)
    source = torch.randn(2**28 if device == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 20)
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    sheet = next((rate for key, rate in DATASHEET.items() if key in name), None)
    return {"product_flops": product, "copy_bytes": copy, "datasheet_flops": sheet}


def about(device: str) -> dict:
    """Card, driver and memory."""
    if device != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }

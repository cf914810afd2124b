"""What a piece of work costs: seconds, and the most memory this process held meanwhile."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux alone has them


@contextmanager
def measured() -> Iterator[dict]:
    """Seconds and peak memory of the block, in a dict that is filled at its end; seconds that the block put there are deducted.

    `peak_gb` is the GPU's where there is one, else this process's; it is missing where neither can be read.

    Example:
        >>> with measured() as cost:
        ...     _ = sum(range(1000))
        >>> 0 <= cost["seconds"] < 60
        True
    """
    cost: dict = {}
    _reset_peak()
    clock = time.monotonic()
    try:
        yield cost
    finally:
        peak = _peak()
        cost["seconds"] = time.monotonic() - clock - cost.get("seconds", 0.0)
        if peak:
            cost["peak_gb"] = peak / 1e9


def total(before: dict | None, cost: dict) -> dict:
    """Costs of one piece of work done in two goes: seconds add up, of the rest the larger counts."""
    before = before or {}
    together = {name: max(before.get(name, value), value) for name, value in cost.items()}
    return before | together | {"seconds": before.get("seconds", 0.0) + cost["seconds"]}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        RESET.write_text("5")  # the peak is what it is now


def _peak() -> int | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return None
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

"""What to change when memory runs out in training: what an update takes by `fast.memory`, and what it would take otherwise."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair
from tpo_lib.fast import FastPath
from tpo_lib.fast.memory import from_config, step_memory
from tpo_lib.models import choose_precision

CONTAINER = Path("/sys/fs/cgroup/memory.max")  # Linux: what this process and those beside it in a container may take
RANK = 16  # of the adapters that are advised


class OutOfMemory(MemoryError):
    """Memory ran out; the message says how much an update takes, and what takes less."""


def ran_out(error: BaseException) -> bool:
    """Whether this is what torch, or Python, raises where there is no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


@contextmanager
def advised(config: TrainConfig, fast: FastPath, model, pairs: Sequence[EncodedPair], accelerator) -> Iterator[None]:
    """Where memory runs out in the block, raise OutOfMemory, with advice for this run."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not ran_out(error):
            raise
        text = " ".join(str(error).split())[:200]
        where = {"precision": accelerator.mixed_precision, "device": accelerator.device}
        where["shards"] = accelerator.num_processes if accelerator.sharded else 1
        said = advice(config, fast, model.config, pairs, **where)
        raise OutOfMemory(f"{text}; {said}") from error


def advice(
    config: TrainConfig, fast: FastPath, model_config, pairs: Sequence[EncodedPair], *, precision: str, device, shards=1
) -> str:
    """What an update takes, of what there is, and what it would take with each remedy that is not in use, the least first."""
    now = update_of(config, fast, pairs, precision) | {"shards": shards}
    short = "fp16" if choose_precision(torch.device(device)) == "fp16" else "bf16"
    remedies = remedies_of(config, fast, now, model_config.get_text_config().hidden_size, short)
    if len(remedies) > 1:
        remedies["all of these"] = {name: value for change in remedies.values() for name, value in change.items()}
    begin = "" if not config.output_dir else " (of these --checkpointing and --cache-dir go with --resume)"
    try:
        shape = from_config(model_config)
    except ValueError:
        flags = ", ".join(name for name in remedies if name.startswith("--")) or "a smaller model or a larger device"
        return f"what takes less: {flags}{begin}"
    takes = {name: step_memory(shape, **now | change).total for name, change in remedies.items()}
    total, room = step_memory(shape, **now).total, room_of(device)
    less = sorted((size, name) for name, size in takes.items() if size < 0.95 * total)
    listed = ", ".join(f"{name}: {size / 1e9:.2f} GB{' (fits)' if size < room else ''}" for size, name in less)
    there = f", {device} has {room / 1e9:.2f} GB" if room < float("inf") else ""
    return f"an update takes about {total / 1e9:.2f} GB{there}; it would take with {listed}{begin}"


def update_of(config: TrainConfig, fast: FastPath, pairs: Sequence[EncodedPair], precision: str) -> dict:
    """What `step_memory` is told of the largest forward pass of a run."""
    longest = max(pairs, key=lambda pair: pair.length)
    together = config.batch_size
    if config.max_tokens:
        together = max(1, min(together * config.accumulation, config.max_tokens // (2 * longest.length)))
    scored = (len(longest.chosen_ids) + len(longest.rejected_ids)) / (2 * longest.length)
    told = {"length": longest.length, "pairs": together, "objective": config.loss_type, "scored": scored}
    told |= {"precision": precision, "optimizer": config.optimizer, "lora_rank": config.lora_rank}
    return told | {"fused": fast.fused, "cached": fast.cache_dir is not None, "checkpointing": fast.checkpointing}


def remedies_of(config: TrainConfig, fast: FastPath, now: dict, width: int, short: str) -> dict[str, dict]:
    """{flags: what they change of `update_of`, which is `now`}, of the remedies that a model of this width has left.

    `short` is the 16-bit type that the device has.
    """
    found: dict[str, dict] = {}
    if config.max_tokens and now["pairs"] > 1:
        found[f"--max-tokens {config.max_tokens // 2}"] = {"pairs": now["pairs"] // 2}
    elif now["pairs"] > 1:
        half = config.batch_size // 2
        more = -(-config.batch_size * config.accumulation // half)
        found[f"--batch-size {half} --accumulation {more}"] = {"pairs": half}
    if not fast.checkpointing:
        found["--checkpointing"] = {"checkpointing": True}
    if not fast.cache_dir and now.get("shards", 1) == 1:  # shards have no caches
        found["--cache-dir DIR"] = {"cached": True}
    if not config.lora_rank and width > RANK:
        found[f"--lora-rank {RANK}"] = {"lora_rank": RANK}
    if now["precision"] == "no":
        found[f"--precision {short}"] = {"precision": short}
    if not fast.fused:
        found["--fused"] = {"fused": True}
    if now["length"] > 16:
        found[f"--max-length {now['length'] // 2}"] = {"length": now["length"] // 2}
    return found


def room_of(device: torch.device) -> float:
    """Bytes of memory that a device has, whoever uses it; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return float("inf")
    here, bound = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), CONTAINER
    told = bound.read_text().strip() if bound.is_file() else ""
    return min(here, int(told)) if told.isdigit() else here

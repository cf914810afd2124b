"""What several GPUs take to train a model in shards: memory, arithmetic and messages of an update, from the shapes alone.

Nothing here was measured on several GPUs: it is what docs/scale.md plans with.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpo_lib.fast.memory import FULL, HALF, SHAPES, ModelShape, StepMemory, step_memory
from tpo_lib.losses import OBJECTIVES

LLAMA_70B = ModelShape("llama", 80, 8192, 28672, 1024, 128256, tied=False)  # from its published config


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs on equal machines."""

    gpus: int
    memory: int  # bytes a GPU
    flops: float  # a second and GPU, in 16 bits, that are reached, not those of the data sheet
    bandwidth: float  # bytes a second and GPU that its messages reach, over the slowest link they pass


@dataclass(frozen=True)
class Plan:
    """One forward and backward pass of one GPU of a cluster."""

    memory: StepMemory
    compute: float  # seconds of arithmetic
    traffic: int  # bytes a GPU receives, or sends
    messages: float  # seconds of it

    @property
    def seconds(self) -> tuple[float, float]:
        """With messages wholly behind the arithmetic, and with none behind it."""
        return max(self.compute, self.messages), self.compute + self.messages


def plan(
    shape: ModelShape,
    cluster: Cluster,
    *,
    length: int,
    pairs: int,
    objective: str,
    scored: float,
    tile_bytes: int = 1 << 30,
) -> Plan:
    """A pass of `pairs` pairs on each GPU: bf16, AdamW, --checkpointing, shards over all GPUs.

    Args:
        length, pairs, objective, scored: as in `step_memory`, of one GPU.
        tile_bytes: of a GPU with room (`tiles.choose_tile_bytes`).

    Example:
        >>> box = Cluster(gpus=8, memory=80 * 10**9, flops=4e14, bandwidth=2e11)
        >>> found = plan(SHAPES["Llama-3.1-8B"], box, length=1024, pairs=4, objective="dpo", scored=0.5)
        >>> found.memory.total < box.memory
        True
    """
    needs = OBJECTIVES[objective].needs
    frozen = sum(name in needs for name in ("ref_logps", "guide_logps"))
    told = {"length": length, "pairs": pairs, "objective": objective, "scored": scored, "tile_bytes": tile_bytes}
    memory = step_memory(shape, precision="bf16", checkpointing=True, shards=cluster.gpus, **told)
    tokens = 2 * pairs * length
    body = 2 * (shape.matrices - shape.head) * tokens + 2 * 2 * shape.layers * shape.hidden * length * tokens // 2
    head = 2 * shape.head * round(scored * tokens)
    # the policy's body forward, again (--checkpointing), and twice as much backward; its head forward and two gradients
    arithmetic = body * (4 + frozen) + head * (3 + frozen)
    away = (cluster.gpus - 1) / cluster.gpus
    layers = shape.parameters - shape.root
    gathered = HALF * (layers * (2 + frozen) + shape.root)  # the policy's twice; roots of frozen models stay
    traffic = round(away * (gathered + FULL * shape.parameters))  # gradients travel once, in float32
    return Plan(memory, arithmetic / cluster.flops, traffic, traffic / cluster.bandwidth)


# What docs/scale.md lists: (model, GPUs, pairs of a pass on each, bandwidth), of 80 GB, 1,024 tokens, half of them scored.
CASES = {
    "8 B on 8 GPUs": (SHAPES["Llama-3.1-8B"], Cluster(8, 80 * 10**9, 4e14, 2e11), 4),
    "70 B on 64 GPUs": (LLAMA_70B, Cluster(64, 80 * 10**9, 4e14, 4e10), 2),
}


def table(length: int = 1024, scored: float = 0.5, objectives: tuple[str, ...] = ("dpo", "tdpo2", "tgdpo")) -> str:
    """The table of docs/scale.md, in Markdown."""
    head = ["", "pairs a pass and GPU", "memory a GPU", "of it shards", "gathered", "arithmetic", "messages", "a pass"]
    lines = [head, ["---"] * len(head)]
    for name, (shape, cluster, pairs) in CASES.items():
        for objective in objectives:
            found = plan(shape, cluster, length=length, pairs=pairs, objective=objective, scored=scored)
            parts, (least, most) = found.memory.parts, found.seconds
            shards = sum(parts[part] for part in ("weights", "gradients", "optimizer", "frozen models"))
            gb = [f"{size / 1e9:.1f} GB" for size in (found.memory.total, shards, parts["gathered"])]
            times = [f"{found.compute:.1f} s", f"{found.traffic / 1e9:.0f} GB, {found.messages:.1f} s"]
            lines.append([f"{name}, {objective}", f"{pairs}", *gb, *times, f"{least:.1f} to {most:.1f} s"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

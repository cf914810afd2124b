"""One update's loss and gradient in four ways, from all logits at once to none that stay, and what each of them takes.

The functions of `STEPS` give the same LossOutput, with the same gradient, on the same `Scene`: read them from top to bottom.
`breakdown` and `timed` measure seconds, `LiveVocabulary` counts tensors, `peak_bytes` measures memory in a process of its own
(`python -m tpo_course.ladder` is that process).
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpo_lib import losses, stats
from tpo_lib.config import TrainConfig
from tpo_lib.fast import FastPath, fused
from tpo_lib.fast.tiles import Asked, Gradients, Tiles, spread
from tpo_lib.files import adapters
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.types import IGNORE, LossOutput, PairBatch, Reading, TokenStats

PROMPT = 8  # tokens of every prompt of a scene


@dataclass(frozen=True)
class Scene:
    """A batch, the models that read it, and the objective."""

    policy: ResponseReader  # trained
    frozen: dict[str, ResponseReader]  # "ref" and "guide", as far as the objective needs them
    batch: PairBatch  # of B pairs
    objective: Callable[[TokenStats, TokenStats], LossOutput]  # its hyperparameters filled in
    with_kl: bool  # the objective reads KL(ref || policy)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        return {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask}


def gpt2_scene(
    objective: str,
    *,
    vocab: int,
    pairs: int,
    length: int,
    ragged: bool = True,
    layers: int = 4,
    hidden: int = 256,
    lora_rank: int = 0,
) -> Scene:
    """Random models in GPT-2's architecture and random pairs; ragged responses fill a quarter of the room to all of it.

    With a rank the policy, and the guide, are adapters on the reference.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_positions": length, "n_embd": hidden, "n_layer": layers, "n_head": hidden // 32}
    config = GPT2Config(vocab_size=vocab, **sizes, **ends)
    entry = losses.OBJECTIVES[objective]
    policy = GPT2LMHeadModel(config).eval()
    made = {
        name: policy if lora_rank else frozen_copy(GPT2LMHeadModel(config))
        for name in ("ref", "guide")
        if f"{name}_logps" in entry.needs
    }
    if lora_rank:
        made |= {name: adapters.add_lora(adapters.twin(policy), lora_rank, seed=1) for name in made if name == "guide"}
        policy = adapters.add_lora(adapters.twin(policy), lora_rank, seed=0)
    frozen = {name: ResponseReader(model) for name, model in made.items()}
    room = length - PROMPT
    counts = torch.randint(room // 4, room + 1, (2 * pairs, 1)) if ragged else torch.full((2 * pairs, 1), room)
    counts[0] = room  # one response fills its row: T is what was asked for
    ids = torch.randint(1, vocab, (2 * pairs, length))
    ids[pairs:, :PROMPT] = ids[:pairs, :PROMPT]
    place = torch.arange(length)
    there = place < PROMPT + counts  # (N, T)
    labels = torch.where(there & (place >= PROMPT), ids, IGNORE)
    batch = PairBatch(torch.where(there, ids, 0), there.long(), labels, torch.arange(pairs))
    settings = TrainConfig(loss_type=objective, guide_beta=0.1).hyperparameters()
    return Scene(ResponseReader(policy), frozen, batch, partial(entry.fn, **settings), "kl" in entry.needs)


# ---- the four steps


def textbook(scene: Scene) -> LossOutput:
    """All logits of all positions, as published code has it."""

    def logits(name: str) -> Tensor:
        reader = scene.policy if name == "policy" else scene.frozen[name]
        return reader.model(**scene.inputs, use_cache=False).logits.float()[:, :-1].contiguous()  # (N, T-1, V)

    return scene.objective(*stats.split(textbook_stats(scene, logits)))


def textbook_stats(scene: Scene, logits: Callable[[str], Tensor]) -> TokenStats:
    """`stats.token_stats` as published code has it: nothing is left out, and for the KL the logits of both models are kept.

    Args:
        logits: ("policy", "ref" or "guide") -> (N, T-1, V).
    """
    mask, targets = stats.response_mask(scene.batch.labels), scene.batch.labels[:, 1:].clamp_min(0)[..., None]

    def at_targets(logps: Tensor) -> Tensor:
        return torch.where(mask, logps.gather(-1, targets)[..., 0], 0.0)  # (N, T-1, V) -> (N, T-1)

    if scene.with_kl:
        z = logits("policy")
        with torch.no_grad():
            z_ref = logits("ref")
            q, log_q = z_ref.softmax(-1), z_ref.log_softmax(-1)
        logp = z.log_softmax(-1)
        kl = torch.where(mask, (q * (log_q - logp)).sum(-1), 0.0)
        return TokenStats(at_targets(logp), at_targets(log_q), mask, kl)
    logps = at_targets(logits("policy").log_softmax(-1))
    with torch.no_grad():
        frozen = {name: at_targets(logits(name).log_softmax(-1)) for name in scene.frozen}
    return TokenStats(logps, frozen.get("ref"), mask, None, frozen.get("guide"))


def response_positions(scene: Scene) -> LossOutput:
    """The head on response positions alone: (R, V) logits instead of (N, T, V)."""
    policy, labels, ref, given = _read(scene)
    ref, guide = (reading and reading.logits() for reading in (ref, given.pop("guide")))
    return scene.objective(*stats.split(stats.token_stats(policy.logits(), labels, ref, guide_logits=guide, **given)))


def tiles_twice(scene: Scene, tile_bytes: int | None = None) -> LossOutput:
    """Tile by tile, nothing kept: backward makes every tile a second time."""
    policy, labels, ref, given = _read(scene)
    return scene.objective(*stats.split(token_stats(policy, labels, ref, **given, tile_bytes=tile_bytes)))


def tiles_once(scene: Scene, tile_bytes: int | None = None) -> LossOutput:
    """Tile by tile, and the gradient made while a pair's tile is there: what `train.fit` does."""
    policy, labels, ref, given = _read(scene)
    return fused.pair_loss(scene.objective, policy, labels, ref, **given, tile_bytes=tile_bytes)[0]


def token_stats(
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    tile_bytes: int | None = None,
) -> TokenStats:
    """`stats.from_readings`, which any loss may differentiate, without a vocabulary-sized tensor.

    Matrix products with the vocabulary: policy 1 + reference 1 forward, the same again and 2 for h and W backward.
    """
    if policy.head is None:
        return stats.from_readings(policy, labels, ref, guide=guide, with_kl=with_kl)
    policy = spread(policy)
    tiles, numbers = fused.prepare(policy, labels, ref, guide=guide, with_kl=with_kl, tile_bytes=tile_bytes)
    logps, kl = _Statistics.apply(policy.states, policy.head.weight, policy.head.bias, tiles, numbers)
    return numbers.token_stats(logps=logps, kl=kl if with_kl else None)


class _Statistics(torch.autograd.Function):
    """Hidden states and head -> (R,) log-probabilities and KL; backward makes every tile once more."""

    @staticmethod
    def forward(ctx, states, weight, bias, tiles: Tiles, numbers: fused.Numbers):
        ctx.tiles, ctx.with_kl = tiles, numbers.kl is not None
        ctx.save_for_backward(states, weight, bias)
        for index in tiles.slices():
            numbers.put(index, tiles.read(index))
        tiles.free()
        return numbers.logps, numbers.kl if ctx.with_kl else torch.zeros_like(numbers.logps)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, k):
        tiles, _ = ctx.tiles, ctx.saved_tensors  # which asks whether they are what they were
        gradients = Gradients(tiles, ctx.needs_input_grad[:3])
        for index in tiles.slices():
            asked = Asked(slice(0, index.stop - index.start), g[index], k[index] if ctx.with_kl else None)
            _, dz, _ = tiles.read(index).gradient([asked])
            gradients.add(index, dz)
        tiles.free()
        return *gradients.take(), None, None


STEPS = {
    "textbook": textbook,
    "response positions": response_positions,
    "tiles, made twice": tiles_twice,
    "tiles, made once": tiles_once,
}


def _read(scene: Scene) -> tuple[Reading, Tensor, Reading | None, dict]:
    """What the policy and the reference say, the labels between them, and the settings: the guide's reading, with_kl."""
    with torch.no_grad():
        frozen = {name: reader(scene.batch) for name, reader in scene.frozen.items()}
    given = {"guide": frozen.get("guide"), "with_kl": scene.with_kl}
    return scene.policy(scene.batch), scene.batch.labels, frozen.get("ref"), given


# ---- what a step takes


def timed(scene: Scene, steps: Mapping[str, Callable[[Scene], LossOutput]], repeats: int = 3) -> dict[str, float]:
    """CPU seconds of each step with its backward: the best of some, taken in turns. What other programs take does not count."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.process_time()
            step(scene).loss.mean().backward()
            best[name] = min(best[name], time.process_time() - began)
            scene.policy.zero_grad()
    return best


def breakdown(scene: Scene, repeats: int = 3) -> dict[str, float]:
    """CPU seconds of the parts of the textbook step, cut at the policy's hidden states: the best of some, part by part."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        for name, seconds in _parts(scene).items():
            best[name] = min(best.get(name, float("inf")), seconds)
        scene.policy.zero_grad()
    return best


def _parts(scene: Scene) -> dict[str, float]:
    found: dict[str, float] = {}
    last = time.process_time()

    def lap(name: str) -> None:
        nonlocal last
        now = time.process_time()
        found[name], last = now - last, now

    def body(reader: ResponseReader) -> Tensor:
        return reader.model.base_model(**scene.inputs, use_cache=False)[0]  # (N, T, d)

    states = body(scene.policy)
    with torch.no_grad():
        said = {name: body(reader) for name, reader in scene.frozen.items()}
    lap("bodies, forward")
    leaf = states.detach().requires_grad_()
    z = scene.policy.head.logits(leaf)  # (N, T, V)
    with torch.no_grad():
        known = {name: scene.frozen[name].head.logits(h) for name, h in said.items()}
    known["policy"] = z
    lap("heads, forward")
    tokens = textbook_stats(scene, lambda name: known[name][:, :-1].contiguous())
    loss = scene.objective(*stats.split(tokens)).loss.mean()
    lap("softmax, KL, loss")
    (slope,) = torch.autograd.grad(loss, z)
    lap("softmax, KL, backward")
    z.backward(slope)
    lap("head, backward")
    states.backward(leaf.grad)
    lap("body, backward")
    return found


class LiveVocabulary(TorchDispatchMode):
    """Follows the bytes of all tensors with a vocabulary as last dimension that are alive.

    Attributes:
        timeline: bytes after every operation that ran inside the `with` block; a kernel's own scratch space is not seen.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.timeline, self._live = vocab, [], {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        old = {x.untyped_storage()._cdata for x in given}  # a view, such as W^T, is nothing new
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == self.vocab:
                storage = x.untyped_storage()
                if storage._cdata not in {*old, *self._live}:
                    self._live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, storage._cdata)
        self.timeline.append(sum(self._live.values()))
        return result


def peak_bytes(cases: Sequence[Mapping]) -> list[int]:
    """Peak resident memory of AdamW's update and a pass on top of its gradients, each case in a process of its own.

    Args:
        cases: {"step": key of STEPS, "scene": arguments of `gpt2_scene`, "tile_bytes": optional, "checkpointing": optional}.

    Returns:
        For each case the bytes over what the process took before the models were made.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    tuned = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    tuned["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed is given back
    done = subprocess.run(
        [sys.executable, "-m", "tpo_course.ladder"],
        input=json.dumps(list(cases)), capture_output=True, text=True, env=os.environ | tuned, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"measuring {len(cases)} steps failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(case: Mapping) -> int:
    """Run in a child, whose high-water mark begins at what its parent holds at the fork."""
    _update({**case, "scene": {**case["scene"], "vocab": 50, "length": 16, "pairs": 1, "layers": 1, "hidden": 32}})
    before = _high_water()  # the libraries have been loaded, and the models above were small
    _update(case)
    return _high_water() - before


def _update(case: Mapping) -> None:
    scene = gpt2_scene(**case["scene"])
    step = STEPS[case["step"]]
    step = partial(step, tile_bytes=case["tile_bytes"]) if "tile_bytes" in case else step
    optimizer = torch.optim.AdamW(scene.policy.parameters(), lr=1e-5)
    with FastPath(checkpointing=case.get("checkpointing", False)).around(scene.policy.model):
        for passes in (1, 2):  # the optimizer has its state from the second update on
            for _ in range(passes):  # there are gradients from the second pass on
                step(scene).loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def _high_water() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    # Linux: ru_maxrss of a process begins at the peak of the one that started it; VmHWM is of its own memory.
    own = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    peak = int(own[1]) if own else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    from transformers import GPT2LMHeadModel  # noqa: F401  once, so that the children need not

    # elsewhere a fork is not safe: the threads of a Mac's matrix products do not survive it
    with get_context("fork" if sys.platform == "linux" else "spawn").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(_measure, json.load(sys.stdin), chunksize=1)))

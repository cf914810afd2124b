"""Part 1 of `make gpu`, continued: training, resuming, caches, shared prompts and sampling, on whole small models.

The device is what is new here, so most rows set a run on it beside the same run on the CPU, or two ways of one run that
must agree: resumed and straight, cached and live, shared prompts and plain, sampled and scored.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.cases import Shape, make_model
from benchmarks.gpu_numerics import error, row
from benchmarks.measure import autocast
from tpo_course import ladder
from tpo_lib import sampling
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import FastPath
from tpo_lib.fast.tiles import response_logps
from tpo_lib.losses import OBJECTIVES
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs import runs

VOCAB, UPDATES, PAIRS = 1031, 4, 8
SHAPES = {  # logits of about 1; the Llama's two heads share one for keys
    "llama": Shape(VOCAB, layers=2, width=128, family="llama", spread=0.12, inner=128, kv_heads=1),
    "gpt2": Shape(VOCAB, layers=2, width=128, spread=0.08),
}
# of a loss: rounding differs with the order of sums, and four updates of AdamW carry it on
TOLERANCE = {"float32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Rows of checks; stops where no time is left."""
    precisions = ("float32", "bf16", "fp16") if device == "cuda" else ("float32", "bf16")
    checks = [partial(sampled_is_scored, family) for family in SHAPES] + [draws_are_fair]
    checks += [partial(shared_prompts, *both) for both in itertools.product(SHAPES, precisions)]
    for number, objective in enumerate(OBJECTIVES):
        checks += [partial(trained, objective, p) for p in (precisions[:1] if small and number else precisions)]
    for check in checks:
        if left() <= 0:
            return
        yield from check(device)


def random_pairs(count: int) -> list[EncodedPair]:
    """Pairs of 2 to 8 prompt tokens and responses of 3 to 20."""
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(1, VOCAB, (length,), generator=draw).tolist()

    return [EncodedPair(i, ids(2, 8), ids(3, 20), ids(3, 20)) for i in range(count)]


class Stopped(Exception):
    """Ends a run in the middle, as a kill does."""


def one_run(objective: str, precision: str, device: str, *, stop=False, fast=None, **settings) -> tuple[Tensor, Tensor]:
    """Train a small Llama for UPDATES updates, on where `output_dir` has a beginning; (weights, losses)."""
    start, guide = (make_model(SHAPES["llama"], seed).to(device) for seed in (0, 1))
    guided = "guide_logps" in OBJECTIVES[objective].needs
    config = TrainConfig(
        loss_type=objective, lr=1e-3, batch_size=PAIRS, warmup_steps=1, log_every=1, eval_every=2, save_every=2,
        precision="no" if precision == "float32" else precision, device=device,
        guide_beta=0.1 if guided else None, **settings,
    )  # fmt: skip

    def callback(step: int, policy) -> None:
        if stop and step == UPDATES // 2:
            raise Stopped

    more = {"guide": frozen_copy(guide) if guided else None, "callbacks": [callback], "fast": fast}
    with contextlib.redirect_stderr(io.StringIO()):
        made = runs.train(config, start, frozen_copy(start), random_pairs(UPDATES * PAIRS), **more)
    return flat(made.policy).cpu(), torch.tensor([r["loss"] for r in made.rows])


def flat(model: nn.Module) -> Tensor:
    """All weights in one vector."""
    return parameters_to_vector(model.parameters()).detach().float()


def trained(objective: str, precision: str, device: str) -> Iterator[dict]:
    """`fit` on this device against: the CPU in float32, its own resumed run, its cached run, the textbook's path."""
    weights, loss = one_run(objective, precision, device)

    def losses(against: str, found: Tensor, expected: Tensor) -> dict:
        return row(f"{objective}: losses of fit", against, precision, error(found, expected), TOLERANCE[precision])

    if device != "cpu":
        yield losses("against the CPU in float32", loss, one_run(objective, "float32", "cpu")[1])
    plain = one_run(objective, precision, device, fast=FastPath(fused=False))[1]
    yield losses("against all logits at once", loss, plain)
    with tempfile.TemporaryDirectory() as folder:
        where = {"output_dir": str(Path(folder) / "run")}
        with contextlib.suppress(Stopped):
            one_run(objective, precision, device, stop=True, **where)
        again, _ = one_run(objective, precision, device, **where)
        moved = (weights - flat(make_model(SHAPES["llama"], 0))).norm()
        yield row(
            f"{objective}: weights after a resume", "against the straight run, over the distance moved", precision,
            ((again - weights).norm() / moved).item(), TOLERANCE[precision], identical=bool(torch.equal(again, weights)),
        )  # fmt: skip
        if OBJECTIVES[objective].needs:  # else there is nothing to cache
            cached = one_run(objective, precision, device, fast=FastPath(cache_dir=str(Path(folder) / "cache")))[1]
            yield losses("with caches against without", cached, loss)


def shared_prompts(family: str, precision: str, device: str) -> Iterator[dict]:
    """Hidden states and gradient where a pair's prompt is read once, against twice."""
    body = make_model(SHAPES[family], 0).to(device)
    batch = collate(random_pairs(6), 0).to(torch.device(device))

    def read(share: bool) -> tuple[Tensor, Tensor]:
        body.zero_grad(set_to_none=True)
        reader = FastPath(share_prefix=share).reader(body, TrainConfig())
        with autocast(device, precision):
            logps = ladder.token_stats(reader(batch), batch.labels, None).logps
        logps.sum().backward()
        return logps.detach(), torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None])

    plain, shared = read(False), read(True)
    tolerance = {"float32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}[precision]
    for what, a, b in zip(("log-probabilities", "gradient"), shared, plain, strict=True):
        yield row(what, f"{family}, prompts shared against read twice", precision, error(a, b), tolerance)


def sampled_is_scored(family: str, device: str) -> Iterator[dict]:
    """What `generate` samples from left-padded prompts has the log-probabilities that right-padded scoring gives it."""
    from transformers import GenerationConfig, LogitsProcessorList

    body = make_model(SHAPES[family], 0).to(device)
    prompts = [pair.prompt_ids for pair in random_pairs(16)]
    width, new = max(map(len, prompts)), 12
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (n, width); no prompt holds a 0
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    with torch.inference_mode():
        output = body.generate(
            input_ids=ids, attention_mask=(ids > 0).long(), generation_config=config,
            logits_processor=LogitsProcessorList([sampling.Sampler(new)]),
        )  # fmt: skip
        drawn = output.sequences[:, width:]  # (n, new)
        logps = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        rows = [EncodedPair(i, p, d.tolist()) for i, (p, d) in enumerate(zip(prompts, drawn, strict=True))]
        batch = collate(rows, 0).to(torch.device(device))
        scored = response_logps(ResponseReader(body)(batch), batch.labels).view(len(prompts), new)
    yield row("log-probabilities", f"{family}, sampled against scored", "float32", error(logps, scored), 1e-5)


def draws_are_fair(device: str) -> Iterator[dict]:
    """The sampler draws as often as the distribution says, and never what it forbids."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], device=device).repeat(200_000, 1)
    torch.manual_seed(0)
    share = torch.bincount(sampling.Sampler(1).draw(logits), minlength=4).double().cpu() / len(logits)
    expected = logits[0].double().softmax(-1).cpu()
    yield row("shares of 200,000 drawn tokens", "against the distribution", "float32", error(share, expected), 5e-3)

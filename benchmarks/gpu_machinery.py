"""Part 1 of `make gpu`, continued: training, resuming, caches, shared prompts and sampling, on whole small models.

The device is what is new here, so most rows set a run on it beside the same run on the CPU, or two ways of one run that
must agree: resumed and straight, cached and live, shared prompts and plain, sampled and scored.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_device import autocast
from benchmarks.gpu_numerics import error, row
from tpo_course import ladder
from tpo_lib import losses, sampling
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, collate
from tpo_lib.fast import FastPath
from tpo_lib.models import ResponseReader, frozen_copy
from tpo_lib.runs.run import fit

VOCAB, UPDATES, PAIRS = 1031, 4, 8
# of a loss: rounding differs with the order of sums, and four updates of AdamW carry it on
TOLERANCE = {"float32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}
SETTINGS = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


def run(*, device: str, small: bool, left: Callable[[], float]) -> Iterator[dict]:
    """Rows of checks; stops where no time is left."""
    precisions = ("float32", "bf16", "fp16") if device == "cuda" else ("float32", "bf16")
    checks = [sampled_is_scored]
    checks += [lambda d, f=f, p=p: shared_prompts(f, p, d) for f in ("llama", "gpt2") for p in precisions]
    for number, objective in enumerate(losses.OBJECTIVES):
        few = precisions[:1] if small and number else precisions
        checks += [lambda d, o=objective, p=p: trained(o, p, d) for p in few]
    for check in checks:
        if left() <= 0:
            return
        yield from check(device)


def model(family: str, seed: int = 0, layers: int = 2) -> nn.Module:
    """A small random model with logits of about 1, on the CPU."""
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.08}
    if family == "gpt2":
        config = transformers.GPT2Config(n_positions=128, n_embd=64, n_layer=layers, n_head=4, **common)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        **common,
    )
    return transformers.LlamaForCausalLM(config).eval()


def random_pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs of 2 to 8 prompt tokens and responses of 3 to 20."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(1, VOCAB, (length,), generator=draw).tolist()

    return [EncodedPair(i, ids(2, 8), ids(3, 20), ids(3, 20)) for i in range(count)]


class Stopped(Exception):
    """Ends a run in the middle."""


def one_run(objective: str, precision: str, device: str, *, stop=False, resume=False, fast=None, **settings):
    """Train a small Llama for UPDATES updates; returns the weights and the metrics rows (None where it was stopped)."""
    start = model("llama")
    reference, guide = frozen_copy(start), frozen_copy(model("llama", seed=1))
    needs = losses.OBJECTIVES[objective].needs
    config = TrainConfig(
        loss_type=objective, lr=1e-3, batch_size=PAIRS, warmup_steps=1, log_every=1, eval_every=2, save_every=2,
        precision=SETTINGS[precision], device=device,
        guide_beta=0.1 if "guide_logps" in needs else None, **settings,
    )  # fmt: skip

    def callback(step: int, policy) -> None:
        if stop and step == UPDATES // 2:
            raise Stopped

    with contextlib.redirect_stderr(io.StringIO()):
        try:
            result = fit(
                config, start.to(device), reference.to(device), random_pairs(UPDATES * PAIRS),
                guide=guide.to(device) if "guide_logps" in needs else None,
                callbacks=[callback], fast=fast, resume=resume, progress=False,
            )  # fmt: skip
        except Stopped:
            return None
    weights = torch.cat([p.detach().float().flatten().cpu() for p in result.policy.parameters()])
    return weights, torch.tensor([r["loss"] for r in result.metrics])


def trained(objective: str, precision: str, device: str) -> Iterator[dict]:
    """`fit` on this device against: the CPU in float32, its own resumed run, its cached run, the textbook's path."""
    weights, loss = one_run(objective, precision, device)
    tolerance = TOLERANCE[precision]
    if device != "cpu":
        _, expected = one_run(objective, "float32", "cpu")
        yield row(
            f"{objective}: losses of fit", "against the CPU in float32", precision, error(loss, expected), tolerance
        )
    _, plain = one_run(objective, precision, device, fast=FastPath(fused=False))
    yield row(f"{objective}: losses of fit", "against all logits at once", precision, error(loss, plain), tolerance)
    with tempfile.TemporaryDirectory() as folder:
        where = {"output_dir": str(Path(folder) / "run")}
        one_run(objective, precision, device, stop=True, **where)
        again, _ = one_run(objective, precision, device, resume=True, **where)
        moved = (weights - torch.cat([p.detach().flatten() for p in model("llama").parameters()])).norm()
        gap = ((again - weights).norm() / moved).item()
        yield row(
            f"{objective}: weights after a resume", "against the straight run, over the distance moved", precision,
            gap, tolerance, identical=bool(torch.equal(again, weights)),
        )  # fmt: skip
        if objective == "simpo" or objective == "sft":
            return
        _, cached = one_run(objective, precision, device, fast=FastPath(cache_dir=str(Path(folder) / "cache")))
        yield row(
            f"{objective}: losses of fit", "with caches against without", precision, error(cached, loss), tolerance
        )


def shared_prompts(family: str, precision: str, device: str) -> Iterator[dict]:
    """Hidden states and gradient where a pair's prompt is read once, against twice."""
    body = model(family).to(device)
    batch = collate(random_pairs(6), 0).to(torch.device(device))

    def read(share: bool) -> tuple[Tensor, Tensor]:
        body.zero_grad(set_to_none=True)
        reader = FastPath(share_prefix=share).reader(body)
        with autocast(device, precision):
            tokens = ladder.token_stats(reader(batch), batch.labels, None)
        tokens.logps.sum().backward()
        return tokens.logps.detach(), torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None])

    plain, shared = read(False), read(True)
    tolerance = {"float32": 1e-5, "bf16": 3e-2, "fp16": 1e-2}[precision]
    for what, a, b in zip(("log-probabilities", "gradient"), shared, plain, strict=True):
        yield row(what, f"{family}, prompts shared against read twice", precision, error(a, b), tolerance)


def sampled_is_scored(device: str) -> Iterator[dict]:
    """What `generate` samples from left-padded prompts has the log-probabilities that right-padded scoring gives it."""
    from transformers import GenerationConfig, LogitsProcessorList

    for family in ("llama", "gpt2"):
        body = model(family).to(device)
        prompts = [pair.prompt_ids for pair in random_pairs(16)]
        width, new = max(map(len, prompts)), 12
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (n, width)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True, use_cache=True,
        )  # fmt: skip
        with torch.inference_mode():
            output = body.generate(
                input_ids=ids, attention_mask=mask, generation_config=config,
                logits_processor=LogitsProcessorList([sampling.Sampler(new)]),
            )  # fmt: skip
        drawn = output.sequences[:, width:]  # (n, new)
        logps = torch.stack(output.logits, 1).float().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        batch = collate([EncodedPair(i, p, d.tolist()) for i, (p, d) in enumerate(zip(prompts, drawn, strict=True))], 0)
        batch = batch.to(torch.device(device))
        with torch.no_grad():
            read = ResponseReader(body)(batch)
            tokens = ladder.token_stats(read, batch.labels, None)
        scored = tokens.logps[tokens.mask].view(len(prompts), new)
        yield row("log-probabilities", f"{family}, sampled against scored", "float32", error(logps, scored), 1e-5)
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]], device=device).repeat(200_000, 1)
    torch.manual_seed(0)
    share = torch.bincount(sampling.Sampler(1).draw(logits), minlength=4).double().cpu() / len(logits)
    expected = logits[0].double().softmax(-1).cpu()
    yield row("shares of 200,000 drawn tokens", "against the distribution", "float32", error(share, expected), 5e-3)

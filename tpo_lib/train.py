"""The training loop: pairs in, a better policy out. Read `fit` first; everything it calls is below it."""

from __future__ import annotations

import atexit
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch import Tensor
from tqdm.auto import tqdm

from tpo_lib import losses, stats
from tpo_lib.config import TrainConfig
from tpo_lib.data import EncodedPair, bucketed_batches, collate, padding, token_budget
from tpo_lib.fast import caches, fused
from tpo_lib.models import ResponseReader, check_pairs, choose_device, choose_precision
from tpo_lib.runs.run import NonFiniteLoss, Run, Sums
from tpo_lib.types import LossOutput, PairBatch, Reading, TokenStats

Callback = Callable[[int, torch.nn.Module], None]
OnLog = Callable[[dict], bool | None]
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves: the trained policy, updates made, one metrics row per log step, and its folder (or None)."""

    policy: torch.nn.Module
    steps: int
    metrics: list[dict]
    output_dir: Path | None


def fit(
    config: TrainConfig,
    policy,
    reference,
    pairs: Sequence[EncodedPair],
    *,
    eval_pairs: Sequence[EncodedPair] | None = None,
    guide=None,
    tokenizer=None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `policy` in place on preference pairs.

    Args:
        config: the run; `config.batch_size * config.accumulation * processes` pairs make one update.
        policy: causal language model in float32, trained in place. Dropout stays off.
        reference: frozen model of the same vocabulary, or None where the objective needs none (no KL is logged then). It
            may also be a function without arguments that loads one: with `config.cache_dir` it is let go of once it is read.
        pairs: encoded training pairs (data.encode_pairs).
        eval_pairs: held-out pairs, scored every `config.eval_every` updates and at the end (metrics `eval_*`).
        guide: frozen DPO model or a function that loads it, needed by tgdpo alone.
        tokenizer: saved beside the weights, so that checkpoints load on their own.
        callbacks: called as callback(step, policy) before the first update, every `eval_every` updates, and at the end.
        on_log: called with every metrics row of training as it is made; returns True to end the run after that update.
        resume: continue from the newest sound checkpoint in `config.output_dir`, bit for bit. A run leaves one also where an
            error, Ctrl-C or SIGTERM ends it.
        progress: show a progress bar.

    Raises:
        ValueError: the objective lacks a model it needs, or pairs a rejected side; there are fewer pairs than one update
            takes; accelerate is set to what checkpoints do not gather (`accelerated`).
        NonFiniteLoss: names step and rows, or the weights; checkpoints keep the last good state.
        RuntimeError: output_dir is in use, or holds another run: what it was started from is compared, and what differs named.

    A training row averages over the updates since the last one, but for what is computed at that update alone, since the
    loss can do without: kl/* of DPO, TGDPO and SimPO, kl/* and logps/* of TDPO1.

    With `config.cache_dir` the frozen models are read once (caches.py). Nothing else changes, except that the training rows
    of DPO, TGDPO and SimPO then have no kl/*: log-probabilities are cached there, not distributions.
    """
    _check_models(config, reference, guide)
    _check_sides(config, pairs=pairs, eval_pairs=eval_pairs or ())
    check_pairs(policy, [*pairs, *(eval_pairs or [])], name="policy")
    with accelerated(config) as accelerator:
        scorer = PairScorer(config, policy.eval())
        scorer, optimizer = accelerator.prepare(scorer, build_optimizer(config, policy))
        per_update = config.batch_size * config.accumulation * accelerator.num_processes
        steps = planned_steps(config, len(pairs), per_update)
        for remark in config.remarks(steps) if accelerator.is_main_process else ():
            print(remark, file=sys.stderr)
        run = Run(config, tokenizer, accelerator)
        with run.owned():
            models = {"reference": reference, "guide": guide}
            run.begin(policy, optimizer, models, pairs, eval_pairs, per_update, resume=resume)
            frozen, frozen_eval = caches.frozen_readers(
                config,
                {"ref": run.noting("reference", reference), "guide": run.noting("guide", guide)},
                policy,
                pairs,
                eval_pairs,
                accelerator=accelerator,
                progress=progress,
            )
            run.record(pairs)
            bar = tqdm(
                total=steps,
                initial=run.step,
                desc=config.loss_type,
                disable=not (progress and accelerator.is_main_process),
                unit="update",
            )
            for callback in callbacks if run.step == 0 else ():
                callback(0, policy)

            def follow_up() -> bool:
                """What an update entails: its row, an evaluation, the callbacks, a checkpoint. True ends the run."""
                stop, logged = False, run.step % config.log_every == 0 or run.step == steps
                if logged:
                    row = {"step": run.step, "pairs_seen": run.step * per_update}
                    row |= {
                        "lr": learning_rate(config, run.step - 1, steps),
                        "grad_norm": run.norm if math.isfinite(run.norm) else None,
                    }
                    _log(run, row | run.sums.means(accelerator), bar)
                    stop = bool(on_log and on_log(run.rows[-1]))
                last = stop or run.step == steps
                if last or (config.eval_every and run.step % config.eval_every == 0):
                    if eval_pairs:
                        found = evaluate_pairs(config, scorer, frozen_eval, eval_pairs, accelerator)
                        _log(run, {"step": run.step} | found, bar)
                    for callback in callbacks:
                        callback(run.step, policy)
                run.settle(logged)
                if last or run.step % config.save_every == 0:
                    run.save(policy, optimizer)
                return last

            with run.guarded(policy, optimizer):
                over = follow_up() if run.pending else run.step == steps  # it may have been stopped in the midst of one
                for window in updates(config, pairs, per_update, run.step, steps) if not over else ():
                    set_learning_rate(optimizer, learning_rate(config, run.step, steps))
                    log_now = (run.step + 1) % config.log_every == 0 or run.step + 1 == steps
                    chunks = micro_batches(window, pairs, config, accelerator)
                    sums = Sums(run.sums)
                    for number, chunk in enumerate(chunks):
                        batch = collate(chunk).to(accelerator.device)
                        with nullcontext() if number + 1 == len(chunks) else accelerator.no_sync(scorer):
                            output, tokens = score(
                                scorer, frozen, batch, accelerator, with_kl=log_now, step=run.step + 1
                            )
                            accelerator.backward(output.loss.sum() / sum(map(len, chunks)))
                        sums.add(batch_metrics(config, output, tokens) | {"padding": padding(batch)})
                        _stop_if_bad(output.loss.detach(), batch.rows, run.step + 1)
                    norm = accelerator.clip_grad_norm_(policy.parameters(), config.clip)
                    if accelerator.scaler is None:  # fp16 skips an update with overflown gradients by itself
                        _stop_if_bad(norm[None], torch.tensor([pairs[i].row for i in window]), run.step + 1)
                    with run.moving():
                        optimizer.step()
                        optimizer.zero_grad()
                        run.advance(norm.item(), sums)
                    bar.update()
                    if follow_up():
                        break
            bar.close()
            run.finish(policy)
        # DDP must go before the process group: a group that dies with it joins its threads with the GIL held, and may hang.
        scorer = None
        accelerator.free_memory()
        accelerator.wait_for_everyone()  # nobody leaves the process group while the main process still writes
    return TrainResult(policy, run.step, run.rows, run.folder)


@contextmanager
def accelerated(config: TrainConfig) -> Iterator[Accelerator]:
    """accelerate, set up by the run's settings alone; afterwards the process finds accelerate as it left it.

    accelerate keeps its settings in the process, where no second Accelerator may change them, and takes from the
    environment what it is not told.

    Raises:
        ValueError: it is set to another device, or to shard the weights (FSDP, DeepSpeed, Megatron, tensor or context
            parallelism), which checkpoints do not gather.
    """
    device = choose_device(config.device)
    precision = choose_precision(device, config.precision)
    for name, used in {
        "GRADIENT_ACCUMULATION_STEPS": "1",
        "MIXED_PRECISION": precision,
        "DYNAMO_BACKEND": "no",
    }.items():
        value = os.environ.get(f"ACCELERATE_{name}", used)
        if value.lower() != used:
            told = f"ACCELERATE_{name}={value} is not used: the run's own settings decide (--accumulation, --precision)"
            print(told, file=sys.stderr)
    states = (PartialState, AcceleratorState, GradientState)
    before = [(state, dict(state._shared_state)) for state in states]
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    accelerator = None
    try:
        for state in states:
            state._reset_state()
        accelerator = Accelerator(
            mixed_precision=precision,
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            cpu=device.type == "cpu",
            log_with=config.report_to,
            project_dir=config.output_dir,
        )
        _check_accelerator(accelerator, device)
        yield accelerator
        if accelerator.use_distributed and not grouped:
            atexit.register(torch.distributed.destroy_process_group)  # not now: a launcher's group is made only once
    finally:
        for tracker in accelerator.trackers if accelerator else ():
            tracker.finish()
        for state, values in before:
            state._shared_state.clear()
            state._shared_state.update(values)


def _check_accelerator(accelerator: Accelerator, device: torch.device) -> None:
    parallelism = getattr(accelerator, "parallelism_config", None)
    if accelerator.distributed_type in SHARDED or parallelism is not None:
        raise ValueError(
            f"accelerate is set to {parallelism or accelerator.distributed_type.value}, which shards the weights, and "
            "checkpoints are written from whole ones: launch with --multi_gpu instead (a whole copy per process), and "
            "--lora-rank if that does not fit"
        )
    found = accelerator.device
    if found.type != device.type or device.index not in (None, found.index or 0):
        raise ValueError(
            f"the run is on device {device}, accelerate on {found}: unset ACCELERATE_USE_CPU and ACCELERATE_TORCH_DEVICE, and "
            "choose among several GPUs by CUDA_VISIBLE_DEVICES"
        )


class PairScorer(torch.nn.Module):
    """The policy and its objective as one module with one forward, so that DDP sees everything that runs."""

    def __init__(self, config: TrainConfig, policy) -> None:
        super().__init__()
        self.policy, self.fused = ResponseReader(policy, share_prefix=config.share_prefix), config.fused
        objective = losses.OBJECTIVES[config.loss_type]
        self.objective = partial(objective.fn, **config.hyperparameters())
        self.needs_kl = "kl" in objective.needs
        if config.fused and not self.policy.understood:
            print(
                f"{type(policy).__name__}: what follows its head is not understood; all logits are made",
                file=sys.stderr,
            )

    def forward(
        self, batch: PairBatch, frozen: dict[str, Reading | Tensor], with_kl: bool
    ) -> tuple[LossOutput, TokenStats | None]:
        """Loss and statistics of B pairs.

        with_kl asks for the KL also where the objective does not need it; without it the statistics may be None.
        """
        read = self.policy(batch.input_ids, batch.attention_mask, batch.labels)
        read = read if self.fused else Reading(read.logits(), None)
        ref, guide = frozen.get("ref"), frozen.get("guide")
        asked = {"with_kl": self.needs_kl or (with_kl and isinstance(ref, Reading)), "logged": with_kl}
        return fused.pair_loss(self.objective, read, batch.labels, ref, guide=guide, paired=batch.paired, **asked)


def score(
    scorer: PairScorer,
    frozen: dict[str, caches.Read],
    batch: PairBatch,
    accelerator,
    *,
    with_kl: bool,
    step: int | None = None,
) -> tuple[LossOutput, TokenStats | None]:
    """One batch: what the frozen models say, then the policy, the statistics and the loss."""
    with torch.no_grad(), accelerator.autocast():
        said = {name: read(batch) for name, read in frozen.items()}
    try:
        return scorer(batch, said, with_kl)
    except stats.NotFinite as error:
        place = f"step {step}" if step else "held-out pairs"
        raise NonFiniteLoss(
            f"{place}: no finite loss in {error.at(batch.rows)} Nothing was learned from it; lower the learning rate if it went "
            "well before"
        ) from error


def batch_metrics(config: TrainConfig, output: LossOutput, tokens: TokenStats | None) -> dict[str, tuple]:
    """TRL's names plus kl/*: {metric: (sum, count)}, sums of detached tensors over the pairs of a batch.

    Where statistics were left out, logps/* and kl/* are left out, without a rejected side all that speaks of one.
    """
    values = {"loss": output.loss.detach(), "rewards/chosen": output.chosen_reward}
    paired = output.rejected_reward is not None
    if paired:
        margin = output.chosen_reward - output.rejected_reward
        values |= {"rewards/rejected": output.rejected_reward, "rewards/margins": margin}
        values["rewards/accuracies"] = (margin > 0).float()
    if tokens is not None:
        sides = dict(zip(("chosen", "rejected"), stats.split(tokens) if paired else (tokens,), strict=False))
        values |= {f"logps/{name}": side.logps.detach().sum(-1) for name, side in sides.items()}
        if tokens.kl is not None:
            values |= {f"kl/{name}": side.kl.detach().sum(-1) for name, side in sides.items()}
            if paired:
                values["kl/margin"] = values["kl/rejected"] - values["kl/chosen"]
    sums = {name: (value.sum(), len(value)) for name, value in values.items()}
    if output.token_weights is not None:
        sums["guidance/floor_share"] = losses.floor_share(
            output, tokens.mask, config.hyperparameters().get("floor", losses.F_FLOOR)
        )
    return sums


@torch.no_grad()
def evaluate_pairs(config: TrainConfig, scorer, frozen, pairs: Sequence[EncodedPair], accelerator) -> dict:
    """The metrics of training on held-out pairs, under the names eval_*."""
    sums = Sums()
    for start in range(0, len(pairs), config.batch_size):
        batch = collate(pairs[start : start + config.batch_size]).to(accelerator.device)
        sums.add(batch_metrics(config, *score(scorer, frozen, batch, accelerator, with_kl=True)))
    return {f"eval_{name}": value for name, value in sums.means(None).items()}


def build_optimizer(config: TrainConfig, policy) -> torch.optim.Optimizer:
    """AdamW or RMSprop over the trainable parameters."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.lr)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0) of `steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return config.lr * factor


def set_learning_rate(optimizer, rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def planned_steps(config: TrainConfig, pairs: int, per_update: int) -> int:
    """Number of updates of the whole run; incomplete windows at the end of an epoch are left out."""
    if pairs < per_update:
        raise ValueError(
            f"{pairs} pairs are fewer than the {per_update} of one update (batch_size x accumulation x processes); "
            "lower --batch-size or --accumulation, or bring more pairs"
        )
    steps = config.epochs * (pairs // per_update)
    return min(steps, config.max_steps) if config.max_steps else steps


def updates(
    config: TrainConfig, pairs: Sequence[EncodedPair], per_update: int, first: int, steps: int
) -> Iterator[list[int]]:
    """Yield the rows of updates first, ..., steps - 1: a pure function of seed and step, so a resumed run repeats it."""
    lengths = [pair.length for pair in pairs]
    step = 0
    for epoch in range(config.epochs):
        for window in bucketed_batches(lengths, per_update, seed=config.seed, epoch=epoch):
            if first <= step < steps:
                yield window
            step += 1


def micro_batches(window: list[int], pairs, config: TrainConfig, accelerator) -> list[list[EncodedPair]]:
    """Cut this process's share of an update into forward passes: of `batch_size` pairs, or of at most `max_tokens` tokens."""
    mine = [pairs[i] for i in window[accelerator.process_index :: accelerator.num_processes]]
    if config.max_tokens is None:
        return [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    return token_budget(mine, config.max_tokens)


def _check_models(config: TrainConfig, reference, guide) -> None:
    needs = losses.OBJECTIVES[config.loss_type].needs
    if "ref_logps" in needs and reference is None:
        raise ValueError(f"{config.loss_type} needs a reference model; pass a frozen copy of the start policy")
    if "guide_logps" in needs and guide is None:
        raise ValueError(f"{config.loss_type} needs guide=, a frozen DPO model; train one with loss_type='dpo' first")
    known = losses.OBJECTIVES[config.loss_type].hyperparameters
    for name, value in config.hyperparameters().items():
        if value is None:
            raise ValueError(f"{config.loss_type} needs {name}, {known[name].words}")


def _check_sides(config: TrainConfig, **tables: Sequence[EncodedPair]) -> None:
    """Raise where rows have no rejected side and the run needs one."""
    for name, pairs in tables.items():
        bare = [pair.row for pair in pairs if not pair.rejected_ids]
        if bare and losses.OBJECTIVES[config.loss_type].paired:
            raise ValueError(
                f"{config.loss_type} needs a rejected side, which row {bare[0]} of {name} lacks ({len(bare)} of {len(pairs)} "
                "rows do); sft trains without"
            )
        if bare and (len(bare) < len(pairs) or config.share_prefix):
            problem = "there is no pair to share a prompt in" if config.share_prefix else "others have one"
            raise ValueError(
                f"row {bare[0]} of {name} has no rejected side and {problem}; "
                + ("train without share_prefix" if config.share_prefix else "train on the two kinds apart")
            )


def _stop_if_bad(values: Tensor, rows: Tensor, step: int) -> None:
    """Raise before the update if a value is not finite: one synchronisation a step buys a policy that stays good."""
    good = torch.isfinite(values)
    if not good.all():
        bad = rows[~good.cpu()] if len(good) == len(rows) else rows
        raise NonFiniteLoss(
            f"step {step}: non-finite {'loss' if len(good) == len(rows) else 'gradient'} in rows {bad.tolist()[:16]} of the "
            "pairs table; the update was not made. Lower the learning rate or look at these rows"
        )


def _log(run: Run, row: dict, bar) -> None:
    """Keep a metrics row, and show it in the bar."""
    shown = {"loss": "loss", "margin": "rewards/margins", "kl": "kl/rejected", "acc": "rewards/accuracies"}
    bar.set_postfix({short: f"{row[name]:.3f}" for short, name in shown.items() if name in row})
    run.log(row)

"""The training loop: pairs in, a better policy out. Read `fit` first; everything it calls is below it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, state
from torch import Tensor
from tqdm.auto import tqdm

from tpo_lib import losses, stats
from tpo_lib.config import TrainConfig
from tpo_lib.data import (
    EncodedPair,
    bare_rows,
    bucketed_batches,
    collate,
    column,
    padding,
    prompt_numbers,
    token_budget,
)
from tpo_lib.models import ResponseReader, check_pairs, choose_device, choose_precision
from tpo_lib.types import LossOutput, PairBatch, Reading, TokenStats

Callback = Callable[[int, torch.nn.Module], None]
OnLog = Callable[[dict], bool | None]
Read = Callable[[PairBatch], Reading | Tensor | None]


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
    eval_pairs: Sequence[EncodedPair] = (),
    guide=None,
    given: Callable[[PairBatch], dict[str, Tensor]] | None = None,
    loss: Callable[..., LossOutput] | None = None,
    pair_loss: Callable = stats.pair_loss,
    run: Progress | None = None,
    callbacks: Sequence[Callback] = (),
    on_log: OnLog | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train `policy` in place on preference pairs, in memory; `tpo_lib.fit` adds speed and a folder that survives a kill.

    Args:
        config: the run; `config.batch_size * config.accumulation * processes` pairs make one update.
        policy: causal language model in float32, or a ResponseReader of one.
        reference, guide: frozen models of the same vocabulary, None where the objective needs none (without a reference no KL
            is logged). Or readers: batch -> a Reading, or (R,) log-probabilities without KL; their `held_out` reads eval_pairs.
        given: batch -> {"rewards", "weights"} of the response tokens, (R,) each, where they are data (`stats.as_asked`).
        pairs, eval_pairs: encoded; eval_pairs are scored every `config.eval_every` updates and at the end (metrics `eval_*`).
        loss: (chosen, rejected, **config.hyperparameters()) -> LossOutput in the place of the objective's own function.
        pair_loss: the step from what the models said to the loss, see `stats.pair_loss`.
        run: where the run stands; None begins one in memory.
        callbacks: called as callback(step, policy) before the first update, every `eval_every` updates, and at the end.
        on_log: called with every metrics row of training; returns True to end the run after that update.

    Raises:
        ValueError: the objective lacks a model, or pairs a rejected side; there are fewer pairs than one update takes.
        NonFiniteLoss: names step and rows, or the weights.
    """
    check(config, reference, guide or given, pairs, eval_pairs)
    run = run or Progress(config)
    accelerator = run.accelerator
    reader = policy if isinstance(policy, ResponseReader) else ResponseReader(policy.eval())
    policy = reader.model.eval()  # dropout would tell the policy from its reference before the first update
    frozen = frozen_readers(policy, reference, guide, given, (pairs, eval_pairs), accelerator.device)
    scorer = PairScorer(config, reader, pair_loss, loss)
    scorer, optimizer = accelerator.prepare(scorer, build_optimizer(config, policy))
    per_update = config.batch_size * config.accumulation * accelerator.num_processes
    steps = planned_steps(config, len(pairs), per_update)
    run.begin(policy, optimizer, steps, per_update, shown=progress)
    for callback in callbacks if run.step == 0 else ():
        callback(0, policy)
    evaluate = partial(evaluate_pairs, config, scorer, frozen, eval_pairs, accelerator) if eval_pairs else None
    finish_update = partial(after_update, config, run, policy, optimizer, evaluate, callbacks, on_log)
    with run.guarded(policy, optimizer):
        over = finish_update() if run.pending else run.step == steps  # it may have been stopped in the midst of one
        for window in updates(config, pairs, per_update, run.step, steps) if not over else ():
            set_learning_rate(optimizer, learning_rate(config, run.step, steps))
            logged = run.due(config.log_every, ahead=1)
            chunks, sums = micro_batches(window, pairs, config, accelerator), Sums(run.sums)
            for chunk in chunks:
                batch = collate(chunk).to(accelerator.device)
                # gradients add up in .grad; processes exchange them once an update, with the last chunk
                with nullcontext() if chunk is chunks[-1] else accelerator.no_sync(scorer):
                    output, tokens = score(scorer, frozen, batch, accelerator, logged=logged, step=run.step + 1)
                    accelerator.backward(output.loss.sum() / sum(map(len, chunks)))  # mean over the update's pairs
                sums.add(batch_metrics(config, output, tokens) | {"padding": padding(batch)})
                _stop_if_bad(output.loss.detach(), batch.rows, run.step + 1)
            norm = accelerator.clip_grad_norm_(policy.parameters(), config.clip)
            if accelerator.scaler is None:  # fp16 skips an update with overflown gradients by itself: they are counted
                _stop_if_bad(norm[None], torch.tensor([pairs[i].row for i in window]), run.step + 1)
            with run.moving():  # weights and step belong together in every checkpoint
                optimizer.step()
                sums.add({"skipped": (norm.new_tensor(optimizer.step_was_skipped), 1)} if accelerator.scaler else {})
                optimizer.zero_grad()
                run.advance(norm.item(), sums)
            if finish_update():
                break
    run.finish(policy)
    # DDP must go before the process group: a group that dies with it joins its threads with the GIL held, and may hang.
    del scorer, evaluate, finish_update
    accelerator.free_memory()
    accelerator.wait_for_everyone()  # nobody leaves the process group while the main process still writes
    return TrainResult(policy, run.step, run.rows, run.folder)


def after_update(
    config: TrainConfig, run: Progress, policy, optimizer, evaluate: Callable[[], dict] | None, callbacks, on_log
) -> bool:
    """What an update entails: its row, an evaluation, the callbacks, a checkpoint. True ends the run."""
    last, logged = run.step == run.steps, run.due(config.log_every)
    if logged:
        row = {"step": run.step, "pairs_seen": run.step * run.per_update}
        row["lr"] = learning_rate(config, run.step - 1, run.steps)
        row["grad_norm"] = run.norm if math.isfinite(run.norm) else None  # JSON knows no infinity
        run.log(row | run.sums.means(run.accelerator))
        last = bool(on_log and on_log(run.rows[-1])) or last
    if last or run.due(config.eval_every):
        if evaluate:
            run.log({"step": run.step} | evaluate())
        for callback in callbacks:
            callback(run.step, policy)
    run.settle(logged)
    if last or run.due(config.save_every):
        run.save(policy, optimizer)
    return last


class NonFiniteLoss(FloatingPointError):
    """A loss, gradient or weight became NaN or infinite; what is saved is the state before."""


class Sums:
    """Sums and counts of metrics on the device; read back at log steps and in checkpoints alone."""

    def __init__(self, before: Sums | None = None) -> None:
        self.totals: dict[str, tuple] = dict(before.totals) if before else {}

    def add(self, metrics: dict[str, tuple]) -> None:
        for name, (total, count) in metrics.items():
            before = self.totals.get(name, (0.0, 0))
            self.totals[name] = before[0] + total, before[1] + count

    def means(self, accelerator) -> dict[str, float]:
        means = {}
        for name, (total, count) in sorted(self.totals.items()):  # in the same order in every process
            total = torch.as_tensor(total).float()
            pair = torch.stack([total, torch.as_tensor(count).to(total)])
            total, count = (pair if accelerator is None else accelerator.reduce(pair, "sum")).tolist()
            means[name] = total / count
        return {name: means[name] for name in self.totals}


class Progress:
    """Where a run stands, in memory, shown by a bar. `runs.run.Run` is one that keeps it in a folder."""

    folder: Path | None = None  # of the run

    def __init__(self, config: TrainConfig, accelerator: Accelerator | None = None) -> None:
        device = choose_device(config.device)
        precision = choose_precision(device, config.precision)
        if accelerator is None:  # an earlier run in this process may have had another precision
            state.AcceleratorState._reset_state()
        self.config = config
        self.accelerator = accelerator or Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
        self.step, self.rows = 0, []  # updates made, metrics rows so far
        self.sums, self.norm = Sums(), 0.0  # of the metrics since the last row; gradient norm of the last update
        self.pending = False  # the last update's row, evaluation or callbacks are still to come

    def begin(self, policy, optimizer, steps: int, per_update: int, *, shown: bool) -> None:
        """Take up what was left, if anything was: a run of so many updates, of so many pairs each."""
        if self.folder is None and self.config.output_dir:
            raise ValueError(
                f"output_dir={self.config.output_dir!r}: this loop keeps a run in memory; tpo_lib.fit writes one there"
            )
        self.steps, self.per_update, main = steps, per_update, self.accelerator.is_main_process
        for remark in self.config.remarks(steps) if main else ():
            print(remark, file=sys.stderr)
        words = {"desc": self.config.loss_type, "unit": "update"}
        self.bar = tqdm(total=steps, initial=self.step, disable=not (shown and main), **words)

    def due(self, every: int, ahead: int = 0) -> bool:
        """Whether something that happens every so many updates (0: never), and with the last, does so with this one."""
        step = self.step + ahead
        return step == self.steps or bool(every and step % every == 0)

    def log(self, row: dict) -> None:
        """Keep a metrics row, and show it."""
        short = {"loss": "loss", "margin": "rewards/margins", "kl": "kl/rejected", "acc": "rewards/accuracies"}
        self.bar.set_postfix({word: f"{row[name]:.3f}" for word, name in short.items() if name in row})
        self.rows.append(row)

    def moving(self):
        """A context in which weights and step change: neither is saved without the other."""
        return nullcontext()

    def advance(self, norm: float, sums: Sums) -> None:
        """An update was made: its gradient norm, and the metrics with its own."""
        self.step, self.norm, self.sums, self.pending = self.step + 1, norm, sums, True

    def settle(self, logged: bool) -> None:
        """All that an update entails is done."""
        self.bar.update(self.step - self.bar.n)
        self.pending = False
        if logged:
            self.sums = Sums()

    def guarded(self, policy, optimizer):
        """A context that saves the last whole update whatever ends it early."""
        return nullcontext()

    def save(self, policy, optimizer) -> None:
        """Write a checkpoint."""

    def finish(self, policy) -> None:
        """The run is over; raises NonFiniteLoss if its weights are not finite."""
        self.bar.close()
        self.check_finite(policy)

    def check_finite(self, policy) -> None:
        """Raise NonFiniteLoss at the first trained tensor with a NaN or infinity."""
        if name := not_finite(policy):
            raise NonFiniteLoss(
                f"step {self.step}: the weights of {name} are not finite; they were not saved, checkpoints keep the last good "
                "state. Lower the learning rate"
            )


def not_finite(policy) -> str | None:
    """The first trained tensor with a NaN or infinity, None where there is none."""
    bias = getattr(policy.get_output_embeddings(), "bias", None)  # there, -inf forbids a token
    trained = ((name, p) for name, p in policy.named_parameters() if p.requires_grad)
    good = ((name, (p.isfinite() | (p.isneginf() & (p is bias))).all()) for name, p in trained)
    return next((name for name, here in good if not getattr(here, "full_tensor", here.bool)()), None)  # of all shards


def frozen_readers(policy, reference, guide, given, tables: Sequence[Sequence[EncodedPair]], device) -> dict[str, Read]:
    """What reads the frozen models, by the name of their statistics; all models must be able to read the pairs."""
    check_pairs(policy, *tables, name="policy")
    readers = {"given": given}
    for key, name, model in (("ref", "reference", reference), ("guide", "guide", guide)):
        if isinstance(model, torch.nn.Module):
            model = (model if isinstance(model, ResponseReader) else ResponseReader(model)).to(device)
            check_pairs(model.model, *tables, name=name, policy=policy)
        readers[key] = model
    return {key: model for key, model in readers.items() if model is not None}


class PairScorer(torch.nn.Module):
    """The policy and its objective as one module with one forward, so that DDP sees everything that runs."""

    def __init__(self, config: TrainConfig, policy: ResponseReader, pair_loss=stats.pair_loss, loss=None) -> None:
        super().__init__()
        objective = losses.OBJECTIVES[config.loss_type]
        self.policy, self.pair_loss = policy, pair_loss
        self.objective = partial(loss or objective.fn, **config.hyperparameters())
        self.needs_kl = "kl" in objective.needs

    def forward(
        self, batch: PairBatch, said: dict[str, Reading | Tensor | None], logged: bool
    ) -> tuple[LossOutput, TokenStats | None]:
        """Loss and statistics of B pairs; `logged` asks for the KL also where the objective does not need it."""
        ref, guide = said.get("ref"), said.get("guide")
        with_kl = self.needs_kl or (logged and isinstance(ref, Reading))
        settings = {"guide": guide, "with_kl": with_kl, "given": said.get("given"), "logged": logged}
        return self.pair_loss(self.objective, self.policy(batch), batch.labels, ref, paired=batch.paired, **settings)


def score(
    scorer: PairScorer, frozen: dict[str, Read], batch: PairBatch, accelerator, *, logged: bool, step: int | None = None
) -> tuple[LossOutput, TokenStats | None]:
    """One batch: what the frozen models say, then the policy, the statistics and the loss."""
    with torch.no_grad(), accelerator.autocast():
        said = {name: read(batch) for name, read in frozen.items()}
    try:
        return scorer(batch, said, logged)
    except stats.NotFinite as error:
        place = f"step {step}" if step else "held-out pairs"
        raise NonFiniteLoss(
            f"{place}: no finite loss in {error.at(batch.rows)} Nothing was learned from it; lower the learning rate if it went "
            "well before"
        ) from error


def batch_metrics(config: TrainConfig, output: LossOutput, tokens: TokenStats | None) -> dict[str, tuple]:
    """TRL's names plus kl/*: {metric: (sum, count)}, sums of detached tensors over the pairs of a batch.

    Left out is what was not computed: all that speaks of a rejected side where there is none; between two rows the logps/* and
    kl/* that a loss can do without (kl/* of DPO, TGDPO and SimPO, with `fast.pair_loss` both of TDPO1), so that a row
    has those of its own update alone.
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
        floor = config.hyperparameters().get("floor", losses.F_FLOOR)
        sums["guidance/floor_share"] = losses.floor_share(output, tokens.mask, floor)
    return sums


@torch.no_grad()
def evaluate_pairs(config: TrainConfig, scorer, frozen: dict, pairs: Sequence[EncodedPair], accelerator) -> dict:
    """The metrics of training on held-out pairs, under the names eval_*."""
    sums, frozen = Sums(), {name: getattr(read, "held_out", read) for name, read in frozen.items()}
    for start in range(0, len(pairs), config.batch_size):
        batch = collate(pairs[start : start + config.batch_size]).to(accelerator.device)
        sums.add(batch_metrics(config, *score(scorer, frozen, batch, accelerator, logged=True)))
    return {f"eval_{name}": value for name, value in sums.means(None).items()}


def build_optimizer(config: TrainConfig, policy) -> torch.optim.Optimizer:
    """AdamW or RMSprop over the trainable parameters."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.lr)
    # in one pass, equal to rounding and, of 135 M weights on a CPU, seven times as fast; few weights gain nothing by it
    fused = (parameters[0].device.type == "cpu" and sum(p.numel() for p in parameters) > 2**25) or None
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


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
    return min(config.epochs * (pairs // per_update), config.max_steps or math.inf)


def updates(config: TrainConfig, pairs, per_update: int, first: int, steps: int) -> Iterator[list[int]]:
    """Yield the rows of updates first, ..., steps - 1: a pure function of seed and step, so a resumed run repeats it."""
    lengths, step = column(pairs, "length"), 0
    prompts = prompt_numbers(pairs) if config.group_prompts else None
    for epoch in range(config.epochs):
        for window in bucketed_batches(lengths, per_update, seed=config.seed, epoch=epoch, prompts=prompts):
            if first <= step < steps:
                yield window
            step += 1


def micro_batches(window: list[int], pairs, config: TrainConfig, accelerator) -> list[list[EncodedPair]]:
    """Cut this process's share of an update into forward passes: of `batch_size` pairs, or of at most `max_tokens` tokens."""
    mine = [pairs[i] for i in window[accelerator.process_index :: accelerator.num_processes]]
    if config.max_tokens is None:
        return [mine[start : start + config.batch_size] for start in range(0, len(mine), config.batch_size)]
    return token_budget(mine, config.max_tokens)


def check(
    config: TrainConfig, reference, guide, pairs: Sequence[EncodedPair], eval_pairs: Sequence[EncodedPair]
) -> None:
    """Raise ValueError where the objective lacks a model, a hyperparameter, or a rejected side."""
    name, objective = config.loss_type, losses.OBJECTIVES[config.loss_type]
    if "ref_logps" in objective.needs and reference is None:
        raise ValueError(f"{name} needs a reference model; pass a frozen copy of the start policy")
    if "guide_logps" in objective.needs and guide is None:
        raise ValueError(f"{name} needs guide=, a frozen DPO model; train one with loss_type='dpo' first")
    for parameter, value in config.hyperparameters().items():
        if value is None:
            raise ValueError(f"{name} needs {parameter}, {objective.hyperparameters[parameter].words}")
    for table, rows in (("pairs", pairs), ("eval_pairs", eval_pairs)):
        bare = bare_rows(rows)
        if len(bare) and objective.paired:
            raise ValueError(
                f"{name} needs a rejected side, which row {bare[0]} of {table} lacks ({len(bare)} of {len(rows)} rows do); sft "
                "trains without"
            )
        if 0 < len(bare) < len(rows):
            raise ValueError(f"row {bare[0]} of {table} has no rejected side and others have one; train them apart")


def _stop_if_bad(values: Tensor, rows: Tensor, step: int) -> None:
    """Raise before the update if a value is not finite: one synchronisation a step buys a policy that stays good."""
    good = torch.isfinite(values)
    if not good.all():
        bad = rows[~good.cpu()] if len(good) == len(rows) else rows
        raise NonFiniteLoss(
            f"step {step}: non-finite {'loss' if len(good) == len(rows) else 'gradient'} in rows {bad.tolist()[:16]} of the "
            "pairs table; the update was not made. Lower the learning rate or look at these rows"
        )

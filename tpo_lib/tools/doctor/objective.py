"""What neither a log nor a model shows: a loss that is not the one it is meant to be (`doctor LOG --objective FILE.py:NAME`).

Both are asked on the same made-up statistics, for values and for the gradient that reaches each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from tpo_lib import stats
from tpo_lib.losses import OBJECTIVES
from tpo_lib.runs import own
from tpo_lib.tools.doctor.logs import Log
from tpo_lib.tools.doctor.rules import BREAK_IT, Finding
from tpo_lib.types import LossOutput, TokenStats

LENGTHS = (7, 3, 5, 2), (4, 6, 2, 7)  # response tokens of the chosen and rejected sides of the made-up pairs
CLOSE = {"rtol": 1e-5, "atol": 1e-7}  # of numbers in float64: what differs by less may be float32 inside
LEAVES = {"logps": "log π", "kl": "KL"}
Loss = Callable[[TokenStats, TokenStats], LossOutput]


def examine_objective(spec: str, log: Log) -> Finding:
    """Whether an objective of one's own has the value and the gradient of the one that the log's loss_type names.

    Raises:
        OSError, ValueError: as `own.load_objective`; it is not known which it is meant to be, or a hyperparameter of that.
    """
    if log.guessed or log.loss_type not in OBJECTIVES or OBJECTIVES[log.loss_type].source:
        raise ValueError(f"--objective {spec}: say with --loss-type which of {', '.join(OBJECTIVES)} it is meant to be")
    meant = OBJECTIVES[log.loss_type]
    mine = OBJECTIVES[own.load_objective(spec)]
    asked = meant.settings({name: h.default for name, h in mine.hyperparameters.items()} | dict(log.settings))
    given = mine.settings(dict(log.settings) | asked)
    evidence, chapter = _compared(lambda *sides: mine.fn(*sides, **given), meant.fn, asked, meant.paired)
    how = ", ".join(f"{name} {value}" for name, value in asked.items())
    said = f"{spec} beside {log.loss_type} ({how}), on made-up statistics of {len(LENGTHS[0])} pairs: {evidence}"
    if not chapter:
        return Finding("objective", "normal", "The objective is the one it is meant to be", said, "", "", "")
    why = "Its value and its gradient decide what is learned; a log shows neither."
    advice = f"compare it line by line with tpo_lib/losses.py: {log.loss_type}"
    title = "The objective is not the one it is meant to be"
    return Finding("objective", "wrong", title, said, why, f"{BREAK_IT}: {chapter}", advice)


def _compared(mine: Loss, fn: Callable[..., LossOutput], asked: Mapping, paired: bool) -> tuple[str, str]:
    """What was found in words, and the section of chapter 7 it belongs to, "" where all is well."""
    right = _read(lambda *sides: fn(*sides, **asked), paired)
    got = _read(mine, paired)
    differs = [name for name in right if not torch.allclose(got[name], right[name], **CLOSE)]
    if not differs:
        return "loss, rewards and gradients agree", ""
    if "loss" in differs:
        for words, chapter, wrong in _mistakes(fn, asked):
            if torch.allclose(got["loss"], _read(wrong, paired)["loss"], **CLOSE):
                return f"{words} ({_numbers(got, right, 'loss')})", chapter
    chapter = "Run F" if {"loss"}.isdisjoint(differs) and any("KL" in name for name in differs) else "2. Loud bugs"
    return "; ".join(f"{name} {_numbers(got, right, name)}" for name in differs), chapter


def _mistakes(fn: Callable[..., LossOutput], asked: Mapping) -> Iterator[tuple[str, str, Loss]]:
    """Losses that are easily written for the right one."""
    yield "chosen and rejected have changed places", "Run H", lambda chosen, rejected: fn(rejected, chosen, **asked)
    yield "a mean over the tokens stands for the sum", "Run C", lambda *sides: fn(*map(_mean, sides), **asked)
    if "beta" in asked:
        yield (
            "beta divides where it multiplies",
            "Run B",
            lambda *sides: fn(*sides, **asked | {"beta": 1 / asked["beta"]}),
        )
    if "guide_beta" in asked:
        beta = {"guide_beta": asked["beta"]}
        yield "guide_beta is the run's own beta", "Run G", lambda *sides: fn(*sides, **asked | beta)


def _mean(tokens: TokenStats) -> TokenStats:
    """The statistics of which a sum is the mean over the response's tokens."""
    weights = tokens.mask / tokens.mask.sum(-1, keepdim=True)
    return stats.as_asked(replace(tokens, weights=weights))


def _read(loss: Loss, paired: bool) -> dict[str, Tensor]:
    """Loss, rewards, and the gradient in every statistic, by words for them."""
    sides = [_made_up(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    output = loss(sides[0], sides[1] if paired else None)
    names, leaves = [], []
    for (side, tokens), (field, words) in product(zip(("chosen", "rejected"), sides, strict=True), LEAVES.items()):
        names.append(f"the gradient in {words} of the {side} response")
        leaves.append(getattr(tokens, field))
    slopes = torch.autograd.grad(output.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    found = {"loss": output.loss.detach(), "the reward of the chosen response": output.chosen_reward}
    if paired:
        found["the reward of the rejected response"] = output.rejected_reward
    return {name: x.double() for name, x in found.items()} | dict(zip(names, slopes, strict=True))


def _made_up(lengths: tuple[int, ...], seed: int) -> TokenStats:
    """Statistics of responses of these lengths, (n, longest) in float64; a gradient goes to log pi and KL."""
    mask = torch.arange(max(map(max, LENGTHS)))[None] < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(seed)
    logps, ref, guide, kl = torch.where(mask, torch.rand(4, *mask.shape, dtype=torch.float64, generator=draw), 0.0)
    return TokenStats((-logps).requires_grad_(), -ref, mask, kl=kl.requires_grad_(), guide_logps=-guide)


def _numbers(got: Mapping[str, Tensor], right: Mapping[str, Tensor], name: str) -> str:
    at = (got[name] - right[name]).abs().argmax()
    return f"{got[name].flatten()[at]:.4g} for {right[name].flatten()[at]:.4g}"

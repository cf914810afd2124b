"""The exercises of 07_break_it.ipynb; its bugs and checks, which the chapter reads from here too, lie in `tpo_course.bugs`."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.bugs import *  # noqa: F403  (the chapter says check.train_broken as it says check.repaired_loss)
from tpo_course.bugs import BETA, BUGS, LOG2, hand_worked, masked_stats, mean_dpo, unshifted_mask
from tpo_course.exercise import Case, Exercise, loss_of
from tpo_course.words import Chapter
from tpo_lib import losses, stats
from tpo_lib.types import IGNORE, PairBatch, TokenStats

chapter = Chapter(__file__)

# ---- 1. write the check


def _dpo(beta: float) -> Callable[[TokenStats, TokenStats], Tensor]:
    return partial(loss_of(losses.dpo), beta=beta)


LOSSES = {  # words: (a loss, the beta that it is meant to use)
    "the library's DPO": (_dpo(0.1), 0.1),
    "the library's DPO with another beta": (_dpo(0.7), 0.7),
    "a loss with bug 1": (lambda *pair: mean_dpo(*pair).loss, BETA),
    "a loss that divides by beta": (_dpo(1 / 0.3), 0.3),
    "a loss with beta outside the sigmoid": (lambda *pair: 0.3 * _dpo(1.0)(*pair), 0.3),
    "a loss that forgot beta": (_dpo(1.0), 0.3),
    "a loss with bug 10": (lambda chosen, rejected: _dpo(0.3)(rejected, chosen), 0.3),
}


def _named_cases() -> tuple[Case, ...]:
    pairs = [hand_worked(5, 3) for _ in LOSSES]
    return tuple(
        Case(words, loss=loss, chosen=chosen, rejected=rejected, beta=beta)
        for (words, (loss, beta)), (chosen, rejected) in zip(LOSSES.items(), pairs, strict=True)
    )


def _named(loss: Callable, chosen: TokenStats, rejected: TokenStats, beta: float, *, unseen=(), unit=0.5) -> int:
    """The number of the bug; `unseen` is what the check does not look at."""
    out = loss(chosen, rejected)
    slope = torch.autograd.grad(out.sum(), chosen.logps)[0][chosen.mask] / (-beta * unit)  # ones, if all is well
    one = torch.ones_like(slope)
    if "value" not in unseen and not math.isclose(out.item(), LOG2, rel_tol=1e-6):
        return 8
    if "sign" not in unseen and bool((slope < 0).all()):
        return 10
    if "size" in unseen or torch.allclose(slope, one):
        return 0
    return 1 if "length" not in unseen and torch.allclose(slope * len(slope), one) else 8


name_the_bug = chapter.exercise(
    "name_the_bug",
    _named,
    _named_cases,
    value_alone=partial(_named, unseen=("sign", "size")),
    sign_alone=partial(_named, unseen=("value", "size")),
    no_value=partial(_named, unseen=("value",)),
    no_length=partial(_named, unseen=("length",)),
    compared_with_beta=partial(_named, unit=1.0),
    no_sign=partial(_named, unseen=("sign",)),
)


# ---- 2. an invariant


def _padding_loss(reduce: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """DPO of (N, T) labels whose log-ratios are reduced by `reduce(log-ratios, mask)`: (N, T-1) twice -> (N,)."""

    def loss_of(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        every = stats.token_stats(logits, labels.clamp_min(0), ref_logits)  # where the label is -100 it is token 0's
        chosen, rejected = reduce(every.logps - every.ref_logps, labels[:, 1:] != IGNORE).chunk(2)
        return -F.logsigmoid(0.5 * (chosen - rejected))

    return loss_of


def _kept(ratio: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, ratio, 0.0)


MANY = {"repeat": 8, "dtype": torch.float32}
REDUCED = {  # words: (log-ratios and mask -> a response's, settings of the batch)
    "DPO as it should be, on responses of one token": (lambda r, m: _kept(r, m).sum(-1), {"ends": (4, 4, 4, 4)}),
    "a loss that counts padding": (lambda r, m: _kept(r, m.cumsum(1) > 0).sum(-1), {}),
    "a loss that divides by the width of the batch": (lambda r, m: _kept(r, m).mean(-1), {}),
    "a right loss in float32, with its rounding": (lambda r, m: _kept(r, m).mean(-1) * r.shape[-1], MANY),
    "a loss that has no mask at all": (lambda r, m: r.sum(-1), {}),
    "a loss whose mask is off by one": (lambda r, m: _kept(r, F.pad(m[:, :-1], (1, 0))).sum(-1), {}),
}


def _batch(*, ends=(6, 5, 5, 4), repeat: int = 1, dtype=torch.float64) -> dict[str, Tensor]:
    """`ends` of pair 0's and 1's chosen, then rejected responses, in a batch of 6 columns; prompts of 3."""
    draw = torch.Generator().manual_seed(repeat)
    ends = torch.tensor(ends).view(2, 2).repeat(1, repeat).flatten()  # (N,)
    logits, ref_logits = (torch.randn(len(ends), 6, 7, generator=draw, dtype=dtype) for _ in range(2))
    labels, column = torch.randint(1, 7, (len(ends), 6), generator=draw), torch.arange(6)
    labels = torch.where((column >= 3) & (column < ends[:, None]), labels, IGNORE)
    return {"logits": logits, "ref_logits": ref_logits, "labels": labels}


def _padding_cases() -> tuple[Case, ...]:
    return tuple(
        Case(words, loss_of=_padding_loss(reduce), **_batch(**settings))
        for words, (reduce, settings) in REDUCED.items()
    )


def _invariant(loss_of, logits, ref_logits, labels, *, fill=IGNORE, left=False, close=torch.allclose) -> bool:
    """Does appending three columns of padding leave every loss as it is? The keywords are ways to get it wrong."""
    draw = torch.Generator().manual_seed(1)
    shape = (len(logits), 3, logits.shape[-1])
    policy, ref = (torch.randn(shape, generator=draw, dtype=logits.dtype) for _ in range(2))

    def join(old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, old] if left else [old, new], dim=1)

    longer = join(labels, torch.full(shape[:2], fill))
    after = loss_of(join(logits, policy), join(ref_logits, ref), longer)
    return bool(close(loss_of(logits, ref_logits, labels), after))


padding_invariant = chapter.exercise(
    "padding_invariant",
    _invariant,
    _padding_cases,
    padded_with_zero=partial(_invariant, fill=0),
    compared_exactly=partial(_invariant, close=torch.equal),
    padded_left=partial(_invariant, left=True),
    any_pair=partial(_invariant, close=lambda before, after: bool(torch.isclose(before, after).any())),
    answer_reversed=lambda **arguments: not _invariant(**arguments),
    always_true=lambda loss_of, logits, ref_logits, labels: True,
)


# ---- 3. name the bug from numbers, and from curves


def lab_report() -> dict[int, float]:
    """{columns of padding appended: loss of one pair} of a loss that has one of the bugs. Do not read on."""
    draw = torch.Generator().manual_seed(3)
    logits, ref_logits = (torch.randn(2, 13, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(1, 6, (2, 8), generator=draw)
    report = {}
    for columns in (0, 1, 2, 5):
        padded, attention = (F.pad(t, (0, columns)) for t in (ids, torch.ones_like(ids)))  # (2, 8 + columns)
        labels = F.pad(torch.where(torch.arange(8) < 3, IGNORE, ids), (0, columns), value=IGNORE)
        batch = PairBatch(padded, attention, labels, torch.tensor([0]))
        tokens = masked_stats(unshifted_mask)(logits[:, : 8 + columns], batch, ref_logits[:, : 8 + columns])
        report[columns] = losses.dpo(*stats.split(tokens), beta=BETA).loss.item()
    return report


def _which_bug(name: str, right: int) -> Exercise:
    return chapter.exercise(name, right, **{f"bug_{number}": number for number in (0, *BUGS) if number != right})


padding_report = _which_bug("padding_report", 2)
unknown_run = _which_bug("unknown_run", 5)


# ---- 4. repair


FAULTS = ("mask", "mean", "log_of_softmax", "beta_outside", "reference_not_detached")  # of the notebook's loss


def _repair(logits: Tensor, ref_logits: Tensor, labels: Tensor, beta: float, left: tuple[str, ...] = ()) -> Tensor:
    """The broken loss of the notebook with all its faults repaired but those that are left."""
    keep = (labels[:, :-1] if "mask" in left else labels[:, 1:]) != IGNORE
    ids = labels[:, 1:].clamp_min(0)[..., None]

    def score(z: Tensor) -> Tensor:
        log_probs = z[:, :-1].softmax(-1).log() if "log_of_softmax" in left else z[:, :-1].log_softmax(-1)
        return log_probs.gather(-1, ids)[..., 0]

    ref = score(ref_logits if "reference_not_detached" in left else ref_logits.detach())
    ratio = _kept(score(logits) - ref, keep).sum(-1)
    chosen, rejected = (ratio / keep.sum(-1) if "mean" in left else ratio).chunk(2)
    outside = "beta_outside" in left
    return -beta * F.logsigmoid(chosen - rejected) if outside else -F.logsigmoid(beta * (chosen - rejected))


def _repair_cases() -> tuple[Case, ...]:
    draw = torch.Generator().manual_seed(6)
    labels = torch.randint(1, 6, (4, 8), generator=draw)
    for row, (start, end) in enumerate([(3, 8), (2, 4), (3, 6), (2, 8)]):
        labels[row, :start] = labels[row, end:] = IGNORE
    labels[0, 5] = IGNORE  # a hole: this token is not scored
    both = {}
    for name in ("logits", "ref_logits"):
        both[name] = torch.randn(4, 8, 6, generator=draw, dtype=torch.float64).requires_grad_()
    steep = {name: value.detach().float() for name, value in both.items()}
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    for value in steep.values():
        value[rows[:1], columns[:1], labels[rows[:1], columns[:1] + 1]] -= 130.0
    return (
        Case(**both, labels=labels, beta=0.3),
        Case("a token whose logit lies 130 below the largest", **steep, labels=labels, beta=0.3),
    )


repaired_loss = chapter.exercise(
    "repaired_loss",
    lambda logits, ref_logits, labels, beta: _dpo(beta)(*stats.split(stats.token_stats(logits, labels, ref_logits))),
    _repair_cases,
    all_five=partial(_repair, left=FAULTS),
    **{fault: partial(_repair, left=(fault,)) for fault in FAULTS},
    swapped=lambda beta, **given: _repair(**{name: t.roll(len(t) // 2, 0) for name, t in given.items()}, beta=beta),
)


quiz = chapter.quiz()

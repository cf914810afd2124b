"""The exercises of 07_break_it.ipynb; its bugs and checks, which the chapter reads from here too, lie in `tpo_course.bugs`."""

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.bugs import *  # noqa: F403  (the chapter says check.train_broken as it says check.repaired_loss)
from tpo_course.bugs import ALPHA, BETA, BUGS, LOG2, hand_worked, masked_stats, mean_dpo, unshifted_mask
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
    "a loss that forgot a beta above 1": (_dpo(1.0), 2.0),
    "a loss with bug 10": (lambda chosen, rejected: _dpo(0.3)(rejected, chosen), 0.3),
}


def _named_cases() -> tuple[Case, ...]:
    pairs = [hand_worked(5, 3) for _ in LOSSES]
    return tuple(
        Case(words, loss=loss, chosen=chosen, rejected=rejected, beta=beta)
        for (words, (loss, beta)), (chosen, rejected) in zip(LOSSES.items(), pairs, strict=True)
    )


def _named(
    loss: Callable, chosen: TokenStats, rejected: TokenStats, beta: float, *, unseen=(), unit=0.5, value=LOG2
) -> int:
    """The number of the bug; `unseen` is what the check does not look at."""
    out = loss(chosen, rejected)
    slope = torch.autograd.grad(out.sum(), chosen.logps)[0][chosen.mask] / (-beta * unit)  # ones, if all is well
    one = torch.ones_like(slope)
    if "value" not in unseen and not math.isclose(out.item(), value, rel_tol=1e-6):
        return 8
    if "sign" not in unseen and bool((slope < 0).all()):
        return 10
    if "size" in unseen or torch.allclose(slope, one):
        return 0
    small = slope < one if "all_but_small" in unseen else torch.isclose(slope * len(slope), one)
    return 1 if "length" not in unseen and bool(small.all()) else 8


def _with_beta(beta: float) -> Callable[..., int]:
    return lambda **given: _named(**given | {"beta": beta})


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
    plus_for_minus=partial(_named, unit=-0.5),
    other_value=partial(_named, value=0.0),
    beta_not_in_unit=_with_beta(1.0),
    beta_of_the_runs=_with_beta(BETA),
    small_is_a_mean=partial(_named, unseen=("all_but_small",)),
    yes_or_no=(lambda **given: _named(**given) == 0, lambda **given: _named(**given) > 0),
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


def _shifted(ratio: Tensor, mask: Tensor) -> Tensor:
    return _kept(ratio, F.pad(mask[:, :-1], (1, 0))).sum(-1)


def _balanced(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """Losses of two pairs: what padding adds to the one it takes from the other."""
    loss = _padding_loss(lambda r, m: _kept(r, m).sum(-1))(logits, ref_logits, labels)
    return loss + (labels == IGNORE).sum() * torch.tensor([0.01, -0.01])


MANY = {"repeat": 8, "dtype": torch.float32}
REDUCED = {  # words: (log-ratios and mask -> a response's, settings of the batch)
    "DPO as it should be, on responses of one token": (lambda r, m: _kept(r, m).sum(-1), {"ends": (4, 4, 4, 4)}),
    "a loss that counts padding": (lambda r, m: _kept(r, m.cumsum(1) > 0).sum(-1), {}),
    "a loss that divides by the width of the batch": (lambda r, m: _kept(r, m).mean(-1), {}),
    "a right loss in float32, with its rounding": (lambda r, m: _kept(r, m).mean(-1) * r.shape[-1], MANY),
    "a loss that has no mask at all": (lambda r, m: r.sum(-1), {}),
    "a loss whose mask is off by one": (_shifted, {}),
    "a loss whose mask is off by one, on other pairs": (_shifted, {"ends": (5, 6, 5, 4)}),
    "a loss whose mask is off by one, that falls with padding": (_shifted, {"ends": (4, 6, 6, 4)}),
    "DPO as it should be, on responses of other lengths": (lambda r, m: _kept(r, m).sum(-1), {}),
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
    cases = (
        Case(words, loss_of=_padding_loss(reduce), **_batch(**settings))
        for words, (reduce, settings) in REDUCED.items()
    )
    return *cases, Case("a loss whose mean over the pairs stays", loss_of=_balanced, **_batch())


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


def _cut(loss_of, logits, ref_logits, labels, *, columns: int, labels_alone: bool) -> bool:
    """Takes the last columns away, or their labels alone, where some should be appended."""
    if labels_alone:
        after = loss_of(logits, ref_logits, F.pad(labels[:, :-columns], (0, columns), value=IGNORE))
    else:
        after = loss_of(*(each[:, :-columns] for each in (logits, ref_logits, labels)))
    return torch.allclose(loss_of(logits, ref_logits, labels), after)


padding_invariant = chapter.exercise(
    "padding_invariant",
    _invariant,
    _padding_cases,
    padded_with_zero=partial(_invariant, fill=0),
    compared_exactly=partial(_invariant, close=torch.equal),
    padded_left=partial(_invariant, left=True),
    any_pair=tuple(
        partial(_invariant, close=close)
        for close in (
            lambda before, after: torch.isclose(before, after).any(),
            lambda before, after: torch.isclose(before, after)[0],
            lambda before, after: torch.isclose(before, after)[-1],
        )
    ),
    mean_compared=partial(_invariant, close=lambda before, after: torch.isclose(before.mean(), after.mean())),
    one_way=(
        partial(_invariant, close=lambda before, after: (after - before < 1e-5).all()),
        partial(_invariant, close=lambda before, after: (before - after < 1e-5).all()),
    ),
    cut=tuple(partial(_cut, columns=columns, labels_alone=alone) for columns in (1, 2) for alone in (True, False)),
    answer_reversed=lambda **arguments: not _invariant(**arguments),
    always_true=lambda loss_of, logits, ref_logits, labels: True,
    one_model=lambda loss_of, **given: _invariant(lambda z, ref, labels: loss_of(z, z, labels), **given),
)


# ---- 3. the slope in the KL, the silent four

kl_slope = chapter.predict(
    "kl_slope", ALPHA * BETA / 2, within=0.05, minus=-0.025, no_half=0.05, no_beta=0.25, zero=0.0
)
silent_four = chapter.complete(
    "silent_four",
    "bug_2",
    "bug_9",
    "bug_4",
    "bug_10",
    masks_exchanged=("bug_4", None, "bug_2", None),
    death_exchanged=(None, "bug_10", None, "bug_9"),
)


# ---- 4. name the bug from numbers, and from curves


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


# ---- 5. a symptom; which check sees what

both_fall = chapter.predict("both_fall", "both_fall")
share_fallen = chapter.predict("share_fallen", 0.83, within=0.15, none=0.0, half=0.5, everyone=1.0, percent=83)
which_columns = chapter.choose("which_columns", "slopes", "footprint", "same_two")


# ---- 6. repair


def _repair(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    beta: float,
    *,
    keep: Callable[[Tensor], Tensor] = lambda labels: labels[:, 1:] != IGNORE,
    log_probs: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1),
    hold: tuple[Callable, Callable] = (lambda z: z, Tensor.detach),
    over: Callable[[Tensor, Tensor], Tensor] = torch.sub,
    reduce: Callable[[Tensor, Tensor], Tensor] = lambda ratio, mask: _kept(ratio, mask).sum(-1),
    halves: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda ratio: ratio.chunk(2),
    loss: Callable[[float, Tensor, Tensor], Tensor] = lambda beta, c, r: -F.logsigmoid(beta * (c - r)),
) -> Tensor:
    """The notebook's loss, repaired, in its order; the keywords are its lines."""
    ids = labels[:, 1:].clamp_min(0)[..., None]
    scored = (
        log_probs(held(z)[:, :-1]).gather(-1, ids)[..., 0] for held, z in zip(hold, (logits, ref_logits), strict=True)
    )
    return loss(beta, *halves(reduce(over(*scored), keep(labels))))


FAULTS = {  # of the notebook's loss
    "mask": {"keep": lambda labels: labels[:, :-1] != IGNORE},
    "mean": {"reduce": lambda ratio, mask: _kept(ratio, mask).sum(-1) / mask.sum(-1)},
    "log_of_softmax": {"log_probs": lambda z: z.softmax(-1).log()},
    "beta_outside": {"loss": lambda beta, c, r: -beta * F.logsigmoid(c - r)},
    "reference_not_detached": {"hold": (lambda z: z, lambda z: z)},
}


def _left(*names: str) -> Callable[..., Tensor]:
    """The loss with these faults left in it."""
    return partial(_repair, **{key: line for name in names for key, line in FAULTS[name].items()})


def _and_more(first: str) -> tuple[Callable[..., Tensor], ...]:
    """The losses with two to four faults, of which `first` is the first."""
    later = list(FAULTS)[list(FAULTS).index(first) + 1 :]
    sets = (more for size in (1, 2, 3) for more in combinations(later, size))
    return tuple(_left(first, *more) for more in sets)


def _with_loss(*losses: Callable[[float, Tensor, Tensor], Tensor]) -> tuple[Callable[..., Tensor], ...]:
    return tuple(partial(_repair, loss=loss) for loss in losses)


def _repair_cases() -> tuple[Case, ...]:
    draw = torch.Generator().manual_seed(6)
    labels = torch.randint(1, 6, (4, 8), generator=draw)
    for row, (start, end) in enumerate([(3, 8), (2, 4), (3, 6), (2, 8)]):
        labels[row, :start] = labels[row, end:] = IGNORE
    labels[0, 5] = IGNORE  # a hole: this token is not scored
    labels[0, 6] = 0  # a token like any other
    both = {}
    for name in ("logits", "ref_logits"):
        both[name] = torch.randn(4, 8, 6, generator=draw, dtype=torch.float64).requires_grad_()
    steep = {name: value.detach().float() for name, value in both.items()}
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    place = rows[1], columns[1], labels[rows[1], columns[1] + 1]  # of no first token: a shifted mask loses those
    for value in steep.values():
        value[place] -= 130.0
    return (
        Case(**both, labels=labels, beta=0.3),
        Case("a token whose logit lies 130 below the largest", **steep, labels=labels, beta=0.3),
    )


repaired_loss = chapter.exercise(
    "repaired_loss",
    lambda logits, ref_logits, labels, beta: _dpo(beta)(*stats.split(stats.token_stats(logits, labels, ref_logits))),
    _repair_cases,
    all_five=_left(*FAULTS),
    **{fault: _left(fault) for fault in FAULTS},
    **{f"{fault}_and_more": _and_more(fault) for fault in list(FAULTS)[:-1]},
    swapped=partial(_repair, halves=lambda ratio: ratio.chunk(2)[::-1]),
    interleaved=partial(_repair, halves=lambda ratio: (ratio[::2], ratio[1::2])),
    no_mask=partial(_repair, keep=lambda labels: labels[:, 1:] == labels[:, 1:]),
    token_0_dropped=partial(_repair, keep=lambda labels: labels[:, 1:] > 0),
    mean_over_columns=partial(_repair, reduce=lambda ratio, mask: _kept(ratio, mask).mean(-1)),
    no_logps=(partial(_repair, log_probs=lambda z: z), partial(_repair, log_probs=lambda z: z.softmax(-1))),
    small_constant=tuple(
        partial(_repair, log_probs=lambda z, small=small, put=put: put(z.softmax(-1), small).log())
        for small in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-12)
        for put in (torch.add, torch.clamp_min)
    ),
    not_shifted=partial(_repair, hold=(lambda z: z.roll(-1, 1), lambda z: z.detach().roll(-1, 1))),
    no_reference=partial(_repair, over=lambda policy, ref: policy),
    both_detached=partial(_repair, hold=(Tensor.detach, Tensor.detach)),
    policy_detached=partial(_repair, hold=(Tensor.detach, lambda z: z)),
    no_beta=_with_loss(lambda beta, c, r: -F.logsigmoid(c - r)),
    beta_divides=_with_loss(lambda beta, c, r: -F.logsigmoid((c - r) / beta)),
    beta_twice=_with_loss(lambda beta, c, r: -beta * F.logsigmoid(beta * (c - r))),
    beta_on_one=_with_loss(
        lambda beta, c, r: -F.logsigmoid(beta * c - r), lambda beta, c, r: -F.logsigmoid(c - beta * r)
    ),
    no_minus=_with_loss(lambda beta, c, r: F.logsigmoid(beta * (c - r))),
    no_logarithm=_with_loss(
        lambda beta, c, r: -(beta * (c - r)).sigmoid(), lambda beta, c, r: (beta * (c - r)).sigmoid()
    ),
)


looks_well = chapter.open_ended("looks_well")
quiz = chapter.quiz()

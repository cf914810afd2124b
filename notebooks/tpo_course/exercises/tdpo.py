"""Exercises of chapter 4, TDPO: the forward KL of a position and of a response, and the two losses built on it."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from tpo_course.exercise import Case, loss_of, normal
from tpo_course.pair_cases import far_apart, in_both, loss_of_margin, on_both, pairs_of, still
from tpo_course.words import Chapter
from tpo_course.world import TokenWorld
from tpo_lib import losses
from tpo_lib.types import IGNORE, TokenStats

chapter = Chapter(__file__)


# ---- forward_kl


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two (..., V) tensors of logits, float64 where they are."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return _kl(ref_logits, policy_logits)


def _kl_div(first: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(first.log_softmax(-1), target.softmax(-1), reduction="none").sum(-1)


def _of_softmax(log_ratio: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward KL from probabilities: the mean under the reference of a log-ratio of (reference, policy)."""

    def kl(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
        policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
        return (ref * log_ratio(ref, policy)).sum(-1)

    return kl


def _log_ratio(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1)


def _at(values: Tensor, ids: Tensor) -> Tensor:
    return values.gather(-1, ids[..., None])[..., 0]


def _kl_cases() -> tuple[Case, ...]:
    draw = normal(0)

    def case(policy: Tensor, ref: Tensor, words: str) -> Case:
        return Case(words, policy_logits=policy.requires_grad_(), ref_logits=ref)

    far = torch.tensor([[0.0, 1.0, -150.0], [2.0, 0.0, -1.0]])
    return (
        case(draw(2, 3, 5), draw(2, 3, 5), "logits of shape (2, 3, 5)"),
        case(draw(7, 4) + 3.0, draw(7, 4) - 1.0, "logits that are far from normalised"),
        case(far, torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, -150.0]]), "a logit 150 below the others, in float32"),
    )


SMALL = (*(10.0**-power for power in range(6, 13)), torch.finfo(torch.float32).eps)  # what people add, or clamp at
OFF_ZERO = (*(lambda p, s=s: p + s for s in SMALL), *(lambda p, s=s: p.clamp_min(s) for s in SMALL))

forward_kl = chapter.exercise(
    "forward_kl",
    _forward,
    _kl_cases,
    reverse=(
        lambda policy_logits, ref_logits: _kl(policy_logits, ref_logits),
        lambda policy_logits, ref_logits: _kl_div(ref_logits, policy_logits),
    ),
    log_of_softmax=_of_softmax(lambda ref, policy: ref.log() - policy.log()),
    log_of_ratio=(
        _of_softmax(lambda ref, policy: (ref / policy).log()),
        lambda policy_logits, ref_logits: kl_divergence(
            Categorical(logits=ref_logits), Categorical(logits=policy_logits)
        ),
    ),
    small_constant=tuple(
        _of_softmax(lambda ref, policy, change=change: change(ref).log() - change(policy).log()) for change in OFF_ZERO
    ),
    sign_reversed=lambda **given: -_forward(**given),
    cross_entropy=lambda policy_logits, ref_logits: -(ref_logits.softmax(-1) * policy_logits.log_softmax(-1)).sum(-1),
    no_weights=lambda **given: _log_ratio(**given).sum(-1),
    raw_logits=lambda policy_logits, ref_logits: (ref_logits.softmax(-1) * (ref_logits - policy_logits)).sum(-1),
    mean_over_vocabulary=lambda policy_logits, ref_logits: _forward(policy_logits, ref_logits) / ref_logits.shape[-1],
    one_token=lambda policy_logits, ref_logits: _at(_log_ratio(policy_logits, ref_logits), ref_logits.argmax(-1)),
    detached=lambda policy_logits, ref_logits: _forward(policy_logits.detach(), ref_logits),
)


# ---- seq_kl


def _before(values: Tensor) -> Tensor:
    return values[:, :-1]


def _after(values: Tensor) -> Tensor:
    return values[:, 1:]


def _summed(
    cut_logits: Callable[[Tensor], Tensor] = _before,
    cut_labels: Callable[[Tensor], Tensor] = _after,
    mask: Callable[[Tensor], Tensor] = lambda response: response,
    scored: Callable[[Tensor], Tensor] = lambda labels: labels != IGNORE,
) -> Callable[..., Tensor]:
    """(N,) KL summed where `mask` says so of (N, T-1) response tokens; the arguments are what people get wrong."""

    def seq_kl(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
        kl = _forward(cut_logits(policy_logits), cut_logits(ref_logits))
        return torch.where(mask(scored(cut_labels(labels))), kl, 0.0).sum(-1)

    return seq_kl


def _since_first(mask: Tensor) -> Tensor:
    return mask.long().cumsum(-1) > 0


def _sampled_token(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    written = _at(_before(_log_ratio(policy_logits, ref_logits)), _after(labels).clamp_min(0))  # (N, T-1)
    return torch.where(_after(labels) != IGNORE, written, 0.0).sum(-1)


def _labels(rows: list[str]) -> Tensor:
    """One string a sequence: a digit is a response token of that id, "." is prompt or padding."""
    return torch.tensor([[IGNORE if letter == "." else int(letter) for letter in row] for row in rows])


def _sequence_cases() -> tuple[Case, ...]:
    draw = normal(1)

    def case(labels: list[str], vocab: int, words: str) -> Case:
        shape = (len(labels), len(labels[0]), vocab)
        logits = draw(*shape).requires_grad_()
        return Case(words, policy_logits=logits, ref_logits=draw(*shape), labels=_labels(labels))

    return (
        case(["..0312.", ".2....."], 4, "responses of four tokens and of one"),
        case(["..1.20.", ".40123."], 5, "a response with a hole in it"),
        case([".01"], 3, "no padding"),
    )


_sequence = _summed()
seq_kl = chapter.exercise(
    "seq_kl",
    _sequence,
    _sequence_cases,
    no_shift=_summed(torch.clone, torch.clone),
    mask_off_by_one=_summed(cut_labels=_before),
    shifted_backwards=_summed(_after, _before),
    no_mask=_summed(mask=torch.ones_like),
    token_zero=_summed(scored=lambda labels: labels > 0),
    padding_counted=_summed(mask=_since_first),
    hole_filled=_summed(mask=lambda mask: _since_first(mask) & _since_first(mask.flip(-1)).flip(-1)),
    mean=lambda labels, **given: _sequence(labels=labels, **given) / (_after(labels) != IGNORE).sum(-1),
    sampled_token=(_sampled_token, lambda **given: -_sampled_token(**given)),
    reverse=lambda policy_logits, ref_logits, labels: _sequence(ref_logits, policy_logits, labels),
    detached=lambda policy_logits, **given: _sequence(policy_logits.detach(), **given),
)


# ---- tdpo1_loss and tdpo2_loss

_tdpo1, _tdpo2 = loss_of(losses.tdpo1), loss_of(losses.tdpo2)


tdpo1_loss = chapter.exercise(
    "tdpo1_loss",
    _tdpo1,
    lambda: (
        Case("responses of unequal length, beta = 0.1", **pairs_of(2), beta=0.1),
        Case("beta = 0.7", **pairs_of(3), beta=0.7),
        Case("a pair that is wrong by hundreds of nats, in float32", **far_apart(), beta=0.5),
    ),
    sign_of_delta=loss_of_margin(lambda u, c, r, beta: u + (r - c)),
    no_beta_on_delta=loss_of_margin(lambda u, c, r, beta: u - (r - c) / beta),
    no_delta=loss_of(losses.dpo),
    chosen_kl_stopped=loss_of_margin(lambda u, c, r, beta: u - (r - c.detach())),
    rejected_kl_stopped=loss_of_margin(lambda u, c, r, beta: u - (r.detach() - c)),
    both_kl_stopped=loss_of_margin(lambda u, c, r, beta: u - (r - c).detach()),
    kl_added=loss_of_margin(lambda u, c, r, beta: u - (r + c)),
    one_kl=(loss_of_margin(lambda u, c, r, beta: u - r), loss_of_margin(lambda u, c, r, beta: u + c)),
    no_reference=on_both(lambda side: replace(side, ref_logps=torch.zeros_like(side.ref_logps)), _tdpo1),
    **in_both(_tdpo1, lambda u, c, r, beta: u - (r - c)),
)


tdpo2_loss = chapter.exercise(
    "tdpo2_loss",
    _tdpo2,
    lambda: (
        Case("responses of unequal length, beta = 0.1, alpha = 0.5", **pairs_of(5), beta=0.1, alpha=0.5),
        Case("beta = 0.7, alpha = 0.2", **pairs_of(6), beta=0.7, alpha=0.2),
        Case("alpha = 1, where the value is TDPO1's", **pairs_of(7), beta=0.3, alpha=1.0),
        Case("a pair that is wrong by hundreds of nats, in float32", **far_apart(), beta=0.5, alpha=0.5),
    ),
    nothing_stopped=loss_of_margin(lambda u, c, r, beta, alpha: u - alpha * (r - c)),
    wrong_side_stopped=loss_of_margin(lambda u, c, r, beta, alpha: u - alpha * (r.detach() - c)),
    both_stopped=loss_of_margin(lambda u, c, r, beta, alpha: u - alpha * (r - c).detach()),
    chosen_kl_gone=loss_of_margin(lambda u, c, r, beta, alpha: u - alpha * r),
    chosen_side_detached=lambda chosen, **given: _tdpo2(chosen.map(Tensor.detach), **given),
    no_alpha=loss_of_margin(lambda u, c, r, beta, alpha: u - (r - c.detach())),
    alpha_on_log_ratios=loss_of_margin(lambda u, c, r, beta, alpha: alpha * u - (r - c.detach())),
    alpha_on_margin=loss_of_margin(lambda u, c, r, beta, alpha: alpha * (u - (r - c.detach()))),
    alpha_on_rejected_alone=loss_of_margin(lambda u, c, r, beta, alpha: u - (alpha * r - c.detach())),
    alpha_on_chosen_alone=loss_of_margin(lambda u, c, r, beta, alpha: u - (r - alpha * c.detach())),
    sign_of_delta=loss_of_margin(lambda u, c, r, beta, alpha: u + alpha * (r - c.detach())),
    no_beta_on_delta=loss_of_margin(lambda u, c, r, beta, alpha: u - alpha * (r - c.detach()) / beta),
    **in_both(_tdpo2, lambda u, c, r, beta, alpha: u - alpha * (r - c.detach())),
)


# ---- what the stop-gradient removes, as a number


def _extra(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(B,) -beta sigma(-m): the derivative of TDPO1's loss by the SeqKL of the chosen response."""
    u = beta * ((chosen.logps - chosen.ref_logps).sum(-1) - (rejected.logps - rejected.ref_logps).sum(-1))
    margin = u - beta * (rejected.kl.sum(-1) - chosen.kl.sum(-1))
    return -beta * torch.sigmoid(-margin)


chosen_kl_pull = chapter.exercise(
    "chosen_kl_pull",
    _extra,
    lambda: (
        Case("responses of unequal length", **{k: still(v) for k, v in pairs_of(8).items()}, beta=0.1),
        Case("beta = 0.7", **{k: still(v) for k, v in pairs_of(9).items()}, beta=0.7),
    ),
    sign_reversed=lambda **given: -_extra(**given),
    no_beta=lambda beta, **given: _extra(beta=beta, **given) / beta,
    confidence=lambda beta, **given: -beta - _extra(beta=beta, **given),
    of_dpo=lambda chosen, rejected, beta: _extra(
        replace(chosen, kl=torch.zeros_like(chosen.kl)), replace(rejected, kl=torch.zeros_like(rejected.kl)), beta
    ),
    sign_of_delta=lambda chosen, rejected, beta: _extra(
        replace(chosen, kl=-chosen.kl), replace(rejected, kl=-rejected.kl), beta
    ),
    the_loss=lambda **given: _tdpo1(**given),
    slope_of_sigma=lambda beta, **given: _extra(beta=beta, **given) * (1 + _extra(beta=beta, **given) / beta),
    per_token=lambda chosen, rejected, beta: _extra(chosen, rejected, beta) / chosen.mask.sum(-1),
    start_of_training=lambda chosen, rejected, beta: torch.full_like(chosen.kl[:, 0], -beta / 2),
)


# ---- predictions, derivations, explanations


def _world() -> TokenWorld:
    return TokenWorld(vocab_size=3, horizon=2, seed=5, num_prompts=2)


ADDED_BACK = (
    "tools.gap(w, h.beta * tools.logratio(w, star) + h.beta * w.seq_kl(w.ref_logps, star)"
    " + w.values(w.ref_logps).v[w.responses.prompt])"
)
predict = chapter.answer
without_the_stop = chapter.predict("without_the_stop", "0")
chosen_kl_slope = chapter.predict("chosen_kl_slope", "-")
tdpo_in_steps = chapter.order(
    "tdpo_in_steps",
    "improve",
    "solve",
    "average",
    "advantage",
    "sum",
    "preference",
    kl_from_nowhere=("advantage", "average"),
    sum_first=("sum", "advantage"),
)
delta_notices = chapter.break_it(
    "delta_notices",
    "tdpo.preference",
    _world,
    {
        "no_delta": ("u - delta", "u"),
        "start_value": ("u - delta", ADDED_BACK),
        "sign": ("u - delta", "u + delta"),
        "soft_optimum": ("w.one_step_optimum(h.beta)", "w.soft_optimum(h.beta)[1]"),
    },
    beta=0.5,
)
line_of_tdpo2 = chapter.name_the_bug("line_of_tdpo2", "bug_7")
why_stop = chapter.open_ended("why_stop")
eos_at_once = chapter.predict("eos_at_once", "-")
forgotten_token = chapter.predict("forgotten_token", "forward")
gap_by_beta = chapter.predict("gap_by_beta", "large")
rejected_on_reviews = chapter.predict("rejected_on_reviews", "+")
at_equal_reward = chapter.predict("at_equal_reward", "nothing")
states_here = chapter.predict(
    "states_here", 26, within=0.01, eos_goes_on=42, one_too_deep=80, one_prompt=13, all_strings=128
)
how_far_to_lean = chapter.predict("how_far_to_lean", "none")
left_of_the_gradient = chapter.complete(
    "left_of_the_gradient",
    "weight",
    "nothing",
    "minus",
    not_stopped=(None, "plus", "minus"),
    rejected_stopped=(None, "plus", "nothing"),
    both_stopped=(None, "nothing", "nothing"),
    paid_on_rejected=(None, "nothing", "plus"),
    value_gone=("weight_without", "nothing", "minus"),
    wrong_weight=("confidence", "nothing", "minus"),
)
undecided_on_reviews = chapter.predict("undecided_on_reviews", "sides")


quiz = chapter.quiz()

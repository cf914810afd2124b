"""Exercises of chapter 4, TDPO: the forward KL of a position and of a response, and the two losses built on it.

>>> import torch
>>> verdict = forward_kl(lambda policy_logits, ref_logits: (policy_logits - ref_logits).sum(-1))
>>> verdict.status
'wrong'
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz
from tpo_lib import losses
from tpo_lib.types import IGNORE, TokenStats

NOTEBOOK = "04_tdpo.ipynb"


def _draw(seed: int) -> Callable[..., Tensor]:
    """A source of standard normal float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- forward_kl


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two (..., V) tensors of logits, float64 where they are."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _forward(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return _kl(ref_logits, policy_logits)


def _of_probabilities(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * (ref.log() - policy.log())).sum(-1)


def _of_a_ratio(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * (ref / policy).log()).sum(-1)


def _clamped(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy, ref = policy_logits.softmax(-1), ref_logits.softmax(-1)
    return (ref * ((ref + 1e-8).log() - (policy + 1e-8).log())).sum(-1)


def _cross_entropy(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return -(ref_logits.softmax(-1) * policy_logits.log_softmax(-1)).sum(-1)


def _unweighted(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1)).sum(-1)


def _raw_logits(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    return (ref_logits.softmax(-1) * (ref_logits - policy_logits)).sum(-1)


def _kl_cases() -> tuple[Case, ...]:
    draw = _draw(0)

    def case(policy: Tensor, ref: Tensor, words: str) -> Case:
        return Case({"policy_logits": policy.requires_grad_(), "ref_logits": ref}, words)

    far = torch.tensor([[0.0, 1.0, -150.0], [2.0, 0.0, -1.0]])
    return (
        case(draw(2, 3, 5), draw(2, 3, 5), "logits of shape (2, 3, 5)"),
        case(draw(7, 4) + 3.0, draw(7, 4) - 1.0, "logits that are far from normalised"),
        case(far, torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.0, -150.0]]), "a logit 150 below the others, in float32"),
    )


forward_kl = Exercise(
    name="forward_kl",
    title="The forward KL of a position",
    what="Return $\\operatorname{KL}(\\pi_{\\mathrm{ref}}(\\cdot|s) \\,\\|\\, \\pi_\\theta(\\cdot|s))$ in nats at every "
    "position. <code>policy_logits</code> and <code>ref_logits</code> are (..., V), not normalised; the answer is (...). "
    "The gradient has to reach <code>policy_logits</code>.",
    why="It is the one new ingredient of TDPO. Its two arguments are easily swapped, and nothing crashes when they are: "
    "the other KL is a sensible number too, only the derivation is about this one.",
    difficulty=2,
    minutes=6,
    hints=(
        "The distribution that comes first in KL(p || q) is the one that averages: a sum over the whole vocabulary, "
        "weighted by p, of log p - log q.",
        "Logits are logarithms of probabilities up to a constant. log_softmax removes the constant without ever forming "
        "a probability that could be 0.",
        "<code>ref, policy = ref_logits.log_softmax(-1), policy_logits.log_softmax(-1)</code>, then "
        "<code>(ref.exp() * (ref - policy)).sum(-1)</code>.",
    ),
    right=_forward,
    cases=_kl_cases,
    mistakes=(
        Mistake(
            "That is the reverse KL, KL(π_θ || π_ref): the policy does the averaging. TDPO's derivation averages log π* "
            "over the reference, so the reference must come first and weigh.",
            lambda policy_logits, ref_logits: _kl(policy_logits, ref_logits),
        ),
        Mistake(
            "Right on paper, nan or inf in float32: with a logit 150 below the others softmax gives exactly 0, and log(0) "
            "is -inf. Use log_softmax; log(softmax) breaks from a gap of about 104.",
            _of_probabilities,
        ),
        Mistake(
            "Right on paper, nan in float32: with a logit 150 below the others softmax gives exactly 0, and a ratio of "
            "probabilities becomes 0, infinite or 0/0. Take the difference of two log_softmax instead.",
            _of_a_ratio,
        ),
        Mistake(
            "A small constant inside the logarithm hides the infinity and falsifies the KL where it matters: a token that "
            "the policy dropped costs at most log(1e8), and no gradient brings it back. Use log_softmax.",
            _clamped,
        ),
        Mistake(
            "The sign is reversed: your KL is negative. It averages log π_ref - log π_θ, and is never below 0.",
            lambda policy_logits, ref_logits: -_forward(policy_logits, ref_logits),
        ),
        Mistake(
            "That is the cross-entropy: the reference's own entropy is missing. Its gradient is the same, so you would not "
            "notice in training, but it is not 0 where the two models agree.",
            _cross_entropy,
        ),
        Mistake(
            "The weights are missing: every token of the vocabulary counts alike. A KL is a mean under π_ref, so multiply "
            "by the reference's probabilities before the sum.",
            _unweighted,
        ),
        Mistake(
            "You subtracted logits, not log-probabilities. Each row of logits has a constant of its own; log_softmax takes "
            "it out.",
            _raw_logits,
        ),
        Mistake(
            "You averaged over the vocabulary: the weights π_ref sum to 1 already, so the KL is the plain sum. Yours "
            "shrinks with the size of the vocabulary.",
            lambda policy_logits, ref_logits: _forward(policy_logits, ref_logits) / ref_logits.shape[-1],
        ),
        Mistake(
            "You looked at one token alone, the most probable one. The KL is a sum over the whole vocabulary; a single "
            "token's log-ratio can even be negative.",
            lambda policy_logits, ref_logits: (
                (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1))
                .gather(-1, ref_logits.argmax(-1, keepdim=True))
                .squeeze(-1)
            ),
        ),
        Mistake(
            "Your values are right, but they carry no gradient: something is detached or runs under no_grad. The reference "
            "may be frozen; the policy must learn from this number.",
            lambda policy_logits, ref_logits: _forward(policy_logits.detach(), ref_logits),
        ),
    ),
    solution="tdpo",
)


# ---- seq_kl


def _masked(kl: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, kl, 0.0).sum(-1)


def _shifted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The forward KL of the predicting positions, and which of them predict a response token: (N, T-1) each."""
    return _forward(policy_logits[:, :-1], ref_logits[:, :-1]), labels[:, 1:] != IGNORE


def _sequence(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    return _masked(*_shifted(policy_logits, ref_logits, labels))


def _mean_kl(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    return _masked(kl, mask) / mask.sum(-1)


def _sampled_token(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    log_ratio = (ref_logits.log_softmax(-1) - policy_logits.log_softmax(-1))[:, :-1]
    at_label = log_ratio.gather(-1, labels[:, 1:].clamp_min(0)[..., None])[..., 0]  # (N, T-1)
    return _masked(at_label, labels[:, 1:] != IGNORE)


def _hole_counted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    from_first, to_last = mask.long().cumsum(-1) > 0, mask.flip(-1).long().cumsum(-1).flip(-1) > 0
    return _masked(kl, from_first & to_last)


def _padding_counted(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    kl, mask = _shifted(policy_logits, ref_logits, labels)
    return _masked(kl, mask.long().cumsum(-1) > 0)


def _labels(rows: list[str]) -> Tensor:
    """One string a sequence: a digit is a response token of that id, "." is prompt or padding."""
    return torch.tensor([[IGNORE if letter == "." else int(letter) for letter in row] for row in rows])


def _sequence_cases() -> tuple[Case, ...]:
    draw = _draw(1)

    def case(labels: list[str], vocab: int, words: str) -> Case:
        shape = (len(labels), len(labels[0]), vocab)
        logits = draw(*shape).requires_grad_()
        return Case({"policy_logits": logits, "ref_logits": draw(*shape), "labels": _labels(labels)}, words)

    return (
        case(["..0312.", ".2....."], 4, "responses of four tokens and of one"),
        case(["..1.20.", ".40123."], 5, "a response with a hole in it"),
        case([".01"], 3, "no padding"),
    )


seq_kl = Exercise(
    name="seq_kl",
    title="SeqKL: the sum along a response",
    what="Return $\\operatorname{SeqKL}(x, y) = \\sum_t \\operatorname{KL}(\\pi_{\\mathrm{ref}}(\\cdot|s_t) \\,\\|\\, "
    "\\pi_\\theta(\\cdot|s_t))$ of every sequence, (N,). <code>policy_logits</code> and <code>ref_logits</code> are "
    "(N, T, V) as the model gives them; <code>labels</code> (N, T) holds the token id on response positions and -100 on "
    "prompt and padding (and wherever else a token is not scored), not shifted. Use your <code>forward_kl</code>.",
    why="This is where an off-by-one hides best. The KL exists at every position, so a wrong mask gives no error and no "
    "odd number, only the KL of other states than those the derivation sums over.",
    difficulty=2,
    minutes=8,
    hints=(
        "In which state is token t + 1 written? In the one that the logits at position t see.",
        "So the KL at position t counts if the label at t + 1 is a response token: drop the last position of the logits "
        "and the first of the labels.",
        "<code>kl = forward_kl(policy_logits[:, :-1], ref_logits[:, :-1])</code>, "
        "<code>mask = labels[:, 1:] != -100</code>; keep kl where mask holds, then sum.",
    ),
    right=_sequence,
    cases=_sequence_cases,
    mistakes=(
        Mistake(
            "Your mask is off by one: you took the KL at the response tokens. The logits at position t predict token "
            "t + 1, so the states of a response start at the last prompt token.",
            lambda policy_logits, ref_logits, labels: _masked(_forward(policy_logits, ref_logits), labels != IGNORE),
        ),
        Mistake(
            "Your mask is off by one: you cut the last label, labels[:, :-1]. The logits at position t predict token t + 1, so "
            "cut the first label and keep the last: labels[:, 1:].",
            lambda policy_logits, ref_logits, labels: _masked(
                _forward(policy_logits[:, :-1], ref_logits[:, :-1]), labels[:, :-1] != IGNORE
            ),
        ),
        Mistake(
            "You shifted the wrong way: you dropped the first logits and the last labels. Drop the last logits and the "
            "first labels.",
            lambda policy_logits, ref_logits, labels: _masked(
                _forward(policy_logits[:, 1:], ref_logits[:, 1:]), labels[:, :-1] != IGNORE
            ),
        ),
        Mistake(
            "You counted every position, prompt and padding too. SeqKL sums over the states in which a response token is "
            "written; mask the others.",
            lambda policy_logits, ref_logits, labels: _shifted(policy_logits, ref_logits, labels)[0].sum(-1),
        ),
        Mistake(
            "You counted the padding: what comes after the last response token is no state of this response.",
            _padding_counted,
        ),
        Mistake(
            "You filled the hole: a position inside the response whose label is -100 is not scored either. Take the mask "
            "from the labels themselves, not from where the response starts and ends.",
            _hole_counted,
        ),
        Mistake(
            "You averaged over the tokens. The derivation sums advantages along the response, and the KL comes with them "
            "as a sum: a mean would count a token of a long response less.",
            _mean_kl,
        ),
        Mistake(
            "You used the sampled token only: log π_ref - log π_θ at the label. That is one term of the KL, without its "
            "weight; its mean over tokens drawn from π_ref is the KL, but these tokens are given. Sum over the vocabulary.",
            _sampled_token,
        ),
        Mistake(
            "That is the reverse KL, KL(π_θ || π_ref): the reference must come first and weigh.",
            lambda policy_logits, ref_logits, labels: _sequence(ref_logits, policy_logits, labels),
        ),
        Mistake(
            "Your values are right, but they carry no gradient: something is detached or runs under no_grad.",
            lambda policy_logits, ref_logits, labels: _sequence(policy_logits.detach(), ref_logits, labels),
        ),
    ),
    solution="tdpo",
)


# ---- tdpo1_loss and tdpo2_loss: statistics of pairs as cases


def _side(rows: list[str], draw: Callable[..., Tensor], drift: float = 0.0) -> TokenStats:
    """Statistics of responses drawn as "y" for a scored token; policy log-probabilities and KL are leaves with a gradient."""
    mask = torch.tensor([[letter == "y" for letter in row] for row in rows])  # (B, T-1)

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.3)
    logps = values(ref - draw(*mask.shape).abs() + drift).requires_grad_()
    return TokenStats(logps, ref, mask, kl=values(draw(*mask.shape).square() + 0.1).requires_grad_())


def _pairs_of(seed: int) -> dict[str, TokenStats]:
    draw = _draw(seed)
    chosen = _side([".yyyyy.", "..yyy..", "yy.yy.."], draw)  # the last one has a hole
    return {"chosen": chosen, "rejected": _side([".yyy...", "..y.yyy", "yyyyyyy"], draw)}


def _far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw = _draw(4)
    sides = _side(["yyy.."], draw, drift=-400.0), _side([".yyyy"], draw, drift=2.0)

    def single(stats: TokenStats) -> TokenStats:
        return TokenStats(
            stats.logps.detach().float().requires_grad_(),
            stats.ref_logps.float(),
            stats.mask,
            stats.kl.detach().float().requires_grad_(),
        )

    return {"chosen": single(sides[0]), "rejected": single(sides[1])}


def _reward(stats: TokenStats, beta: float, kl: float | Tensor = 0.0) -> Tensor:
    """beta (sum_t logratio^t + kl), (B,)."""
    return beta * ((stats.logps - stats.ref_logps).sum(-1) + kl)


def _seq(stats: TokenStats) -> Tensor:
    return stats.kl.sum(-1)  # (B, T-1) -> (B,)


def _frozen(stats: TokenStats) -> Tensor:
    return _seq(stats).detach()


def _mean(values: Tensor, stats: TokenStats) -> Tensor:
    return values.sum(-1) / stats.mask.sum(-1)


def _nll(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    return -F.logsigmoid(chosen_reward - rejected_reward)


def _tdpo1(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    return losses.tdpo1(chosen, rejected, beta=beta).loss


def _tdpo2(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float) -> Tensor:
    return losses.tdpo2(chosen, rejected, beta=beta, alpha=alpha).loss


def _without_reference(stats: TokenStats) -> TokenStats:
    return dataclasses.replace(stats, ref_logps=torch.zeros_like(stats.ref_logps))


def _mean_everywhere(stats: TokenStats) -> TokenStats:
    """Statistics whose sums are the means of the old ones."""
    count = stats.mask.sum(-1, keepdim=True)
    return TokenStats(stats.logps / count, stats.ref_logps / count, stats.mask, stats.kl / count)


def _mean_kl_only(stats: TokenStats) -> TokenStats:
    return dataclasses.replace(stats, kl=stats.kl / stats.mask.sum(-1, keepdim=True))


def _tdpo1_cases() -> tuple[Case, ...]:
    return (
        Case({**_pairs_of(2), "beta": 0.1}, "responses of unequal length, beta = 0.1"),
        Case({**_pairs_of(3), "beta": 0.7}, "beta = 0.7"),
        Case({**_far_apart(), "beta": 0.5}, "a pair that is wrong by hundreds of nats, in float32"),
    )


_STATS = (
    "<code>chosen</code> and <code>rejected</code> are <code>TokenStats</code> of B pairs: <code>logps</code>, "
    "<code>ref_logps</code> and <code>kl</code> (the forward KL), each (B, T-1) in nats and exactly 0 outside the response, "
    "and <code>mask</code>. "
)

_SWAPPED = "Chosen and rejected are swapped: this teaches the policy that the rejected response won."
_NO_MINUS = "The sign is missing: this is the log-likelihood. A minimiser would make the chosen responses as unlikely as it can."
_NO_REFERENCE = (
    "The reference is missing from u: it is made of log-ratios, log π_θ - log π_ref. Without it a response that the "
    "reference likes starts with a large reward."
)
_OVERFLOWS = (
    "Right on paper, infinite in float32: the sigmoid of a margin of some hundreds below 0 rounds to 0 and its logarithm "
    "is -inf. Take both in one step with F.logsigmoid."
)
_DELTA_SIGN = (
    "The sign of delta is wrong: delta is rejected minus chosen and enters as u - delta. As it stands your loss rewards a KL on "
    "the rejected side and punishes it on the chosen one."
)
_NO_BETA = (
    "Beta is missing on delta: u and delta both carry it. Without it the KL outweighs the log-ratios by a factor 1/beta, "
    "ten times at beta = 0.1."
)
_MEANS = (
    "You averaged over the tokens. Both sums come from adding up advantages along the response; with means a long and a "
    "short response would no longer be compared by their returns."
)
_MEAN_KL = (
    "You averaged the KL over the tokens and summed the log-ratios. SeqKL is a sum, like u: both come from one sum of "
    "advantages along the response."
)

tdpo1_loss = Exercise(
    name="tdpo1_loss",
    title="TDPO1",
    what="Return the loss of every pair, (B,): $-\\log \\sigma(u - \\delta)$ with "
    "$u = \\beta \\sum_t \\log \\frac{\\pi_\\theta}{\\pi_{\\mathrm{ref}}}(y_w^t) - \\beta \\sum_t \\log "
    "\\frac{\\pi_\\theta}{\\pi_{\\mathrm{ref}}}(y_l^t)$ and "
    "$\\delta = \\beta \\operatorname{SeqKL}(x, y_l) - \\beta \\operatorname{SeqKL}(x, y_w)$. "
    + _STATS
    + "<code>beta</code> is a number. Gradients flow through everything that has one.",
    why="This is DPO and one subtraction. Which side is subtracted from which, and what flows backwards, decides what the "
    "loss rewards.",
    difficulty=2,
    minutes=8,
    hints=(
        "Start from DPO's margin u. Then write delta on a line of its own, rejected first.",
        "Off-mask entries are exactly 0, so .sum(-1) is the sum over the response.",
        "<code>delta = beta * rejected.kl.sum(-1) - beta * chosen.kl.sum(-1)</code>, then "
        "<code>-torch.nn.functional.logsigmoid(u - delta)</code>.",
    ),
    right=_tdpo1,
    cases=_tdpo1_cases,
    mistakes=(
        Mistake(_DELTA_SIGN, lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta, -_seq(chosen)), _reward(rejected, beta, -_seq(rejected)))),
        Mistake(_NO_BETA, lambda chosen, rejected, beta: _nll(
            _reward(chosen, beta) + _seq(chosen), _reward(rejected, beta) + _seq(rejected))),
        Mistake(
            "That is DPO: delta is missing.",
            lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss,
        ),
        Mistake(
            "Your values are right, but you stopped the gradient of the chosen KL. That is TDPO2's idea (at alpha = 1), and "
            "comes next; TDPO1 lets it flow.",
            lambda chosen, rejected, beta: _tdpo2(chosen, rejected, beta, 1.0),
        ),
        Mistake(
            "Your values are right, but the gradient of the rejected KL is stopped. TDPO1 lets both flow.",
            lambda chosen, rejected, beta: _nll(
                _reward(chosen, beta, _seq(chosen)), _reward(rejected, beta, _frozen(rejected))),
        ),
        Mistake(
            "Your values are right, but no gradient flows through either KL: delta then only weighs the pairs, and the "
            "policy is not held back anywhere.",
            lambda chosen, rejected, beta: _nll(
                _reward(chosen, beta, _frozen(chosen)), _reward(rejected, beta, _frozen(rejected))),
        ),
        Mistake(
            "The KL terms are added up: delta is their difference, rejected minus chosen.",
            lambda chosen, rejected, beta: _nll(
                _reward(chosen, beta), _reward(rejected, beta, _seq(rejected) + _seq(chosen))),
        ),
        Mistake(_MEANS, lambda chosen, rejected, beta: _tdpo1(
            _mean_everywhere(chosen), _mean_everywhere(rejected), beta)),
        Mistake(_MEAN_KL, lambda chosen, rejected, beta: _tdpo1(
            _mean_kl_only(chosen), _mean_kl_only(rejected), beta)),
        Mistake(_SWAPPED, lambda chosen, rejected, beta: _tdpo1(rejected, chosen, beta)),
        Mistake(_NO_MINUS, lambda chosen, rejected, beta: -_tdpo1(chosen, rejected, beta)),
        Mistake(_NO_REFERENCE, lambda chosen, rejected, beta: _tdpo1(
            _without_reference(chosen), _without_reference(rejected), beta)),
        Mistake(_OVERFLOWS, lambda chosen, rejected, beta: -torch.sigmoid(
            _reward(chosen, beta, _seq(chosen)) - _reward(rejected, beta, _seq(rejected))).log()),
    ),
    solution="tdpo",
)  # fmt: skip


def _tdpo2_cases() -> tuple[Case, ...]:
    return (
        Case({**_pairs_of(5), "beta": 0.1, "alpha": 0.5}, "responses of unequal length, beta = 0.1, alpha = 0.5"),
        Case({**_pairs_of(6), "beta": 0.7, "alpha": 0.2}, "beta = 0.7, alpha = 0.2"),
        Case({**_pairs_of(7), "beta": 0.3, "alpha": 1.0}, "alpha = 1, where the value is TDPO1's"),
        Case({**_far_apart(), "beta": 0.5, "alpha": 0.5}, "a pair that is wrong by hundreds of nats, in float32"),
    )


tdpo2_loss = Exercise(
    name="tdpo2_loss",
    title="TDPO2",
    what="Return the loss of every pair, (B,): $-\\log \\sigma(u - \\alpha \\delta_2)$ with u as in TDPO1 and "
    "$\\delta_2 = \\beta \\operatorname{SeqKL}(x, y_l) - \\mathrm{sg}[\\beta \\operatorname{SeqKL}(x, y_w)]$; sg[.] keeps the "
    "value and stops the gradient. " + _STATS + "<code>beta</code> and <code>alpha</code> are numbers.",
    why="Remove the stop-gradient and not a digit of the loss changes, whatever the policy; only the direction of the next "
    "update does. So this check compares gradients, not only values.",
    difficulty=3,
    minutes=8,
    hints=(
        "Which of the two KLs does the loss pay for when it grows? That is the one to hold constant.",
        "In PyTorch sg[.] is .detach().",
        "<code>delta = beta * rejected.kl.sum(-1) - beta * chosen.kl.detach().sum(-1)</code>; alpha multiplies delta, and "
        "delta alone.",
    ),
    right=_tdpo2,
    cases=_tdpo2_cases,
    mistakes=(
        Mistake(
            "Your values are right, but the stop-gradient is missing: the loss still pays for a growing KL on the chosen "
            "side. Detach the chosen KL.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, alpha * _seq(chosen)), _reward(rejected, beta, alpha * _seq(rejected))),
        ),
        Mistake(
            "The stop-gradient is on the wrong side: you froze the KL of the rejected response, the one that holds the "
            "policy back, and kept the one that pays it to leave.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, alpha * _seq(chosen)), _reward(rejected, beta, alpha * _frozen(rejected))),
        ),
        Mistake(
            "You stopped the gradient of both KLs: delta then only weighs the pairs. The rejected one must flow, it is the "
            "pull back to the reference.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, alpha * _frozen(chosen)), _reward(rejected, beta, alpha * _frozen(rejected))),
        ),
        Mistake(
            "The chosen KL is gone. A stop-gradient keeps its value in the loss: only the gradient stops.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta), _reward(rejected, beta, alpha * _seq(rejected))),
        ),
        Mistake(
            "You detached the whole chosen side, its log-ratio too: nothing raises the chosen response any more. Stop the "
            "gradient of its KL alone.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, alpha * _seq(chosen)).detach(), _reward(rejected, beta, alpha * _seq(rejected))),
        ),
        Mistake(
            "Alpha is missing: you have TDPO2 at alpha = 1.",
            lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, beta, 1.0),
        ),
        Mistake(
            "Alpha is on the wrong term: you scaled the log-ratios and left the KLs at full strength.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta * alpha) + beta * _frozen(chosen),
                _reward(rejected, beta * alpha) + beta * _seq(rejected)),
        ),
        Mistake(
            "Alpha multiplies the whole margin, u too. That is TDPO2 at alpha = 1 with a smaller beta; alpha belongs to "
            "delta alone.",
            lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, alpha * beta, 1.0),
        ),
        Mistake(
            "Alpha scales only the rejected KL in your delta; it scales both.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, _frozen(chosen)), _reward(rejected, beta, alpha * _seq(rejected))),
        ),
        Mistake(
            "Alpha scales only the chosen KL in your delta; it scales both.",
            lambda chosen, rejected, beta, alpha: _nll(
                _reward(chosen, beta, alpha * _frozen(chosen)), _reward(rejected, beta, _seq(rejected))),
        ),
        Mistake(_DELTA_SIGN, lambda chosen, rejected, beta, alpha: _tdpo2(chosen, rejected, beta, -alpha)),
        Mistake(_NO_BETA, lambda chosen, rejected, beta, alpha: _nll(
            _reward(chosen, beta) + alpha * _frozen(chosen), _reward(rejected, beta) + alpha * _seq(rejected))),
        Mistake(_MEANS, lambda chosen, rejected, beta, alpha: _tdpo2(
            _mean_everywhere(chosen), _mean_everywhere(rejected), beta, alpha)),
        Mistake(_MEAN_KL, lambda chosen, rejected, beta, alpha: _tdpo2(
            _mean_kl_only(chosen), _mean_kl_only(rejected), beta, alpha)),
        Mistake(_SWAPPED, lambda chosen, rejected, beta, alpha: _tdpo2(rejected, chosen, beta, alpha)),
        Mistake(_NO_MINUS, lambda chosen, rejected, beta, alpha: -_tdpo2(chosen, rejected, beta, alpha)),
        Mistake(_OVERFLOWS, lambda chosen, rejected, beta, alpha: -torch.sigmoid(
            _reward(chosen, beta, alpha * _frozen(chosen)) - _reward(rejected, beta, alpha * _seq(rejected))).log()),
    ),
    solution="tdpo",
)  # fmt: skip


quiz = Quiz(
    (
        Question(
            "A policy gives a token probability 0.000001 that the reference writes one time in five, and agrees with it "
            "otherwise. Which KL of this state is large?",
            (
                Option(
                    "The forward one, KL(π_ref || π).",
                    True,
                    "The reference averages, and this token alone adds 0.2 log(0.2 / 0.000001) = 2.4 nats. The forward KL asks "
                    "whether the policy still writes everything that the reference writes.",
                ),
                Option(
                    "The reverse one, KL(π || π_ref).",
                    False,
                    "The policy averages there, and it hardly ever writes that token, so dropping it hardly counts: 0.22 nats in "
                    "all, for the mass that went elsewhere.",
                ),
                Option(
                    "Both, they measure the same distance.",
                    False,
                    "They agree to second order for small changes only. When a token is dropped they differ without bound.",
                ),
            ),
        ),
        Question(
            "In a world at gamma = 1 you train TDPO1 on all pairs to the end. Where does it stop?",
            (
                Option(
                    "At the optimum of the KL-regularised return, like DPO.",
                    False,
                    "DPO stops there. TDPO1's reward has a KL term more, so another policy explains the same preferences.",
                ),
                Option(
                    "At π_ref exp(Q_ref/β)/Z, one improvement step away from the reference.",
                    True,
                    "That is the policy of the derivation. It assumes that the reference writes the rest of the response, so "
                    "its return is lower than the optimum's, and the two meet as β grows.",
                ),
                Option(
                    "At the reference, because the loss contains the KL to it.",
                    False,
                    "The KL is in the margin, it is no penalty. At the reference the loss is log 2, and a step away lowers it.",
                ),
            ),
        ),
        Question(
            "You take the stop-gradient out of TDPO2 at alpha = 1 and train. What changes?",
            (
                Option(
                    "The loss: it gets a term more.",
                    False,
                    "A stop-gradient keeps the value. Not a digit of the loss changes.",
                ),
                Option(
                    "Nothing at all.",
                    False,
                    "True for the value. But the gradient gains the term -β σ(-(u-δ)) ∇SeqKL(x, y_w), which is 0 only where π = "
                    "π_ref exactly, or where the pair is already certain.",
                ),
                Option(
                    "Nothing at the very first update, where π = π_ref; from the second one on, the direction of the gradient.",
                    True,
                    "At the reference the KL is at its minimum, 0, so its gradient is 0 too. One update later it is not, and "
                    "the loss starts paying for divergence on the chosen side.",
                ),
            ),
        ),
        Question(
            "Somebody says: 'TDPO1 has the KL to the reference in its loss, so it stays closer to it than DPO.' Your answer?",
            (
                Option(
                    "Right: the KL is a penalty.",
                    False,
                    "Look at the signs. The KL of the rejected response costs, that of the chosen one pays, with the same "
                    "weight.",
                ),
                Option(
                    "Not for that reason: on the chosen side a larger KL lowers the loss.",
                    True,
                    "That is why TDPO2 stops this gradient. After 100 updates in the exact world TDPO1's chosen SeqKL is above DPO's.",
                ),
                Option(
                    "Wrong: the KL cancels out of the loss.",
                    False,
                    "It does not: chosen and rejected pass through different states. Only V(s_0) cancels.",
                ),
            ),
        ),
        Question(
            "After equally many updates TDPO2 has less reward than DPO and less KL. Which of the two is the better objective?",
            (
                Option(
                    "DPO: reward is what counts.",
                    False,
                    "With more updates, a larger step or a smaller alpha TDPO2 would have more reward, and more KL.",
                ),
                Option(
                    "TDPO2: it stayed closer to the reference.",
                    False,
                    "So does a run that was stopped early, or one with a smaller learning rate.",
                ),
                Option(
                    "These two points do not say: compare rewards at equal KL, with intervals.",
                    True,
                    "Both moved along some path; the question is whose path lies above the other's. Read two curves at one KL, "
                    "not two ends.",
                ),
            ),
        ),
    )
)

"""Exercises of 05_tgdpo.ipynb: the guide's token reward, the weights it gives, TGDPO's loss, the largest safe alpha.

>>> verdict = largest_alpha(lambda r_hat, mask: 1 / r_hat.abs().max())
>>> verdict.status
'wrong'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz
from tpo_lib import losses
from tpo_lib.losses import F_FLOOR
from tpo_lib.types import TokenStats

NOTEBOOK = "05_tgdpo.ipynb"


def _draw(seed: int) -> Callable[..., Tensor]:
    """A source of standard normal float64 tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


# ---- r_hat


def _token_reward(guide_logps: Tensor, ref_logps: Tensor, guide_beta: float) -> Tensor:
    return (guide_beta * (guide_logps - ref_logps)).detach()


def _evenly(guide_logps: Tensor, ref_logps: Tensor, guide_beta: float) -> Tensor:
    values = _token_reward(guide_logps, ref_logps, guide_beta)
    return values.mean(-1, keepdim=True).expand_as(values)


def _reward_cases() -> tuple[Case, ...]:
    draw = _draw(0)

    def case(mask: Tensor, guide_beta: float, words: str) -> Case:
        ref = torch.where(mask, -draw(*mask.shape).abs() - 0.5, 0.0)
        guide = torch.where(mask, ref + draw(*mask.shape), 0.0).requires_grad_()
        return Case({"guide_logps": guide, "ref_logps": ref, "guide_beta": guide_beta}, words)

    return (
        case(_mask(".xxxx.x", "xx....."), 0.1, "responses of five tokens and of two, guide_beta = 0.1"),
        case(_mask("xxx"), 2.0, "a single response, guide_beta = 2"),
    )


r_hat = Exercise(
    name="r_hat",
    title="What the guide says about every token",
    what="Return $\\hat r(s_t, y^t) = \\hat\\beta \\log \\frac{\\hat\\pi(y^t|s_t)}{\\pi_{\\mathrm{ref}}(y^t|s_t)}$ of every "
    "token. <code>guide_logps</code> and <code>ref_logps</code> are (N, T-1) log-probabilities of the guide and the reference, "
    "0 where no response token is scored; <code>guide_beta</code> is the number the guide was trained with. The result is "
    "(N, T-1), a constant: no gradient may flow through it.",
    why="This is the one new ingredient of TGDPO. The guide is a model like the policy, so a gradient that leaks into it, or "
    "the wrong beta, changes the training and raises no error.",
    difficulty=1,
    minutes=4,
    hints=(
        "It is the implicit reward of DPO, as in chapter 3, of the guide instead of the policy, and before the sum over tokens.",
        "Both arguments are logarithms, so the log of the ratio is their difference.",
        "<code>(guide_beta * (guide_logps - ref_logps)).detach()</code>",
    ),
    right=_token_reward,
    cases=_reward_cases,
    mistakes=(
        Mistake(
            "Your values are right, but a gradient flows into the guide. r&#770; is data: the guide was trained before, and is "
            "frozen. Detach it.",
            lambda guide_logps, ref_logps, guide_beta: guide_beta * (guide_logps - ref_logps),
        ),
        Mistake(
            "The sign is reversed: a token that the guide likes more than the reference does must get a positive r&#770;.",
            lambda guide_logps, ref_logps, guide_beta: -_token_reward(guide_logps, ref_logps, guide_beta),
        ),
        Mistake(
            "guide_beta is missing. Log-ratios of a guide trained with a small beta are large; its beta turns them back into "
            "units of reward.",
            lambda guide_logps, ref_logps, guide_beta: _token_reward(guide_logps, ref_logps, 1.0),
        ),
        Mistake(
            "You divided by guide_beta. In the optimum the reward is divided by beta; solved for the reward, beta is a factor.",
            lambda guide_logps, ref_logps, guide_beta: _token_reward(guide_logps, ref_logps, 1 / guide_beta),
        ),
        Mistake(
            "guide_beta reaches the guide but not the reference. It multiplies the whole log-ratio; otherwise r&#770; is not 0 "
            "where guide and reference agree.",
            lambda guide_logps, ref_logps, guide_beta: (guide_beta * guide_logps - ref_logps).detach(),
        ),
        Mistake(
            "You subtracted probabilities. The reward lives in the logarithms: a token that went from 0.001 to 0.01 gained as "
            "much as one that went from 0.1 to 1.",
            lambda guide_logps, ref_logps, guide_beta: _token_reward(guide_logps.exp(), ref_logps.exp(), guide_beta),
        ),
        Mistake(
            "You took the ratio of the probabilities, not its logarithm: it is never negative, so no token could be called bad.",
            lambda guide_logps, ref_logps, guide_beta: (guide_beta * (guide_logps - ref_logps).exp()).detach(),
        ),
        Mistake(
            "Every token of a response has the same value: you averaged. Telling the tokens apart is all the guide is for.",
            _evenly,
        ),
        Mistake(
            "You subtracted the response's mean. The derivation does not: 0 means that guide and reference agree on the token, "
            "and a response may be good, or bad, throughout.",
            lambda guide_logps, ref_logps, guide_beta: (
                _token_reward(guide_logps, ref_logps, guide_beta) - _evenly(guide_logps, ref_logps, guide_beta)
            ),
        ),
    ),
    solution="tgdpo",
)


# ---- token_weights


def _weights(r_hat: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    return (1 + alpha * r_hat).clamp_min(F_FLOOR), (1 - alpha * r_hat).clamp_min(F_FLOOR)


def _normalised(f: Tensor) -> Tensor:
    return f / f.mean(-1, keepdim=True)


def _switched_off(f: Tensor) -> Tensor:
    return torch.where(f < F_FLOOR, 1.0, f)


def _weights_cases() -> tuple[Case, ...]:
    by_hand = torch.tensor([[0.0, 1.0, -1.0, 1.9, -1.9, 2.5, -7.0]], dtype=torch.float64)  # f = 0.05 at 1.9
    return (
        Case({"r_hat": by_hand, "alpha": 0.5}, "r_hat from -7 to 2.5 and alpha = 0.5"),
        Case({"r_hat": 0.2 * _draw(1)(3, 5), "alpha": 0.3}, "small r_hat, where no floor is needed"),
        Case({"r_hat": 3 * _draw(2)(2, 3), "alpha": 2.0}, "alpha = 2"),
    )


token_weights = Exercise(
    name="token_weights",
    title="One weight a token",
    what="Return the pair <code>(f_w, f_l)</code>: the weight of every token if it stands in a chosen response, "
    "$f_w = \\max(1 + \\alpha \\hat r, 0.01)$, and if it stands in a rejected one, $f_l = \\max(1 - \\alpha \\hat r, 0.01)$. "
    "<code>r_hat</code> has any shape, and so have both results; <code>alpha</code> is a number.",
    why="Four kinds of token come out of these two lines. The sign on the rejected side and the floor are where they go wrong.",
    difficulty=2,
    minutes=5,
    hints=(
        "A good token (r&#770; above 0) should be pushed up more in a chosen response, and pushed down <i>less</i> in a "
        "rejected one.",
        "The floor is a maximum, taken after everything else: a weight of -2 becomes 0.01, not 2 and not 1.",
        "<code>(1 + alpha * r_hat).clamp_min(0.01), (1 - alpha * r_hat).clamp_min(0.01)</code>",
    ),
    right=_weights,
    cases=_weights_cases,
    mistakes=(
        Mistake(
            "You used 1 + &alpha; r&#770; for both sides. In a rejected response a good token would then be pushed down "
            "<i>more</i> for being good; there the sign is minus.",
            lambda r_hat, alpha: (_weights(r_hat, alpha)[0], _weights(r_hat, alpha)[0]),
        ),
        Mistake(
            "The signs are the wrong way round on both sides: you push hardest what the guide likes least. (Or you returned "
            "f_l first.)",
            lambda r_hat, alpha: _weights(r_hat, -alpha),
        ),
        Mistake(
            "The floor is missing. Below f = 0 the push turns round: a chosen token is pushed down, and the derivation, which "
            "divides by f, no longer holds.",
            lambda r_hat, alpha: (1 + alpha * r_hat, 1 - alpha * r_hat),
        ),
        Mistake(
            "abs() is no floor: it gives the worst token of all one of the largest weights. A weight below 0.01 becomes 0.01.",
            lambda r_hat, alpha: ((1 + alpha * r_hat).abs(), (1 - alpha * r_hat).abs()),
        ),
        Mistake(
            "Your floor is 0. The derivation divides by f, so it must stay above: 0.01.",
            lambda r_hat, alpha: ((1 + alpha * r_hat).clamp_min(0.0), (1 - alpha * r_hat).clamp_min(0.0)),
        ),
        Mistake(
            "The floor holds on the chosen side alone. 1 - &alpha; r&#770; falls below it too, where the guide likes a token of "
            "the rejected response very much.",
            lambda r_hat, alpha: (_weights(r_hat, alpha)[0], 1 - alpha * r_hat),
        ),
        Mistake(
            "You set the weights that fall below the floor back to 1, DPO's weight: a slightly worse token then suddenly counts "
            "a hundred times more. The floor takes them to 0.01.",
            lambda r_hat, alpha: (_switched_off(1 + alpha * r_hat), _switched_off(1 - alpha * r_hat)),
        ),
        Mistake(
            "You floored r&#770; instead of f: every token the guide dislikes then counts as if it were neutral. Floor the "
            "weight, at the end.",
            lambda r_hat, alpha: (1 + alpha * r_hat.clamp_min(F_FLOOR), 1 - alpha * r_hat.clamp_min(F_FLOOR)),
        ),
        Mistake(
            "&alpha; multiplies the 1 as well. At &alpha; = 0 every weight must be 1 (that is DPO); yours are 0 there.",
            lambda r_hat, alpha: (
                (alpha * (1 + r_hat)).clamp_min(F_FLOOR),
                (alpha * (1 - r_hat)).clamp_min(F_FLOOR),
            ),
        ),
        Mistake(
            "&alpha; is missing: it says how strongly the guide is heard.",
            lambda r_hat, alpha: _weights(r_hat, 1.0),
        ),
        Mistake(
            "You normalised the weights to a mean of 1. Then a token's weight depends on what else the response holds, and one "
            "the guide dislikes throughout is treated like a neutral one.",
            lambda r_hat, alpha: tuple(_normalised(f) for f in _weights(r_hat, alpha)),
        ),
        Mistake(
            "That is the exponential shaping, exp(&plusmn;&alpha; r&#770;): positive by itself, and a good idea further down. "
            "Asked for is the paper's linear one with its floor.",
            lambda r_hat, alpha: ((alpha * r_hat).exp(), (-alpha * r_hat).exp()),
        ),
    ),
    solution="tgdpo",
)


# ---- tgdpo_loss


def _side(mask: Tensor, draw: Callable[..., Tensor], *, learn: bool = False) -> TokenStats:
    """Statistics of responses; the guide's are a leaf with a gradient, the policy's are one if `learn`."""

    def values(raw: Tensor) -> Tensor:
        return torch.where(mask, raw, 0.0)

    ref = values(-draw(*mask.shape).abs() - 0.5)
    logps = values(ref + 0.7 * draw(*mask.shape))
    guide = values(ref + 1.5 * draw(*mask.shape))
    return TokenStats(logps.requires_grad_(learn), ref, mask, guide_logps=guide.requires_grad_())


def _far_apart() -> dict[str, TokenStats]:
    """One pair that the policy has wrong by hundreds of nats, in float32 as in training."""
    draw = _draw(5)

    def single(mask: Tensor, shift: float) -> TokenStats:
        side = _side(mask, draw)
        logps, guide = (values.detach().float() for values in (side.logps + shift * mask, side.guide_logps))
        return TokenStats(logps, side.ref_logps.float(), mask, guide_logps=guide.requires_grad_())

    return {"chosen": single(_mask("xxx."), -300.0), "rejected": single(_mask("xxxx"), 5.0)}


def _loss_cases() -> tuple[Case, ...]:
    """Gradients at the policy are compared on full rows alone: at padding, where nobody needs them, they may differ."""
    draw = _draw(3)
    holes = {
        "chosen": _side(_mask(".xxxx.", "..xxx.", "xx.xx."), draw),
        "rejected": _side(_mask(".xx...", "..x.xx", "xxxxxx"), draw),
    }
    full = {name: _side(_mask("xxxxx", "xxxxx"), draw, learn=True) for name in ("chosen", "rejected")}
    return (
        Case({**holes, "beta": 0.1, "alpha": 0.5, "guide_beta": 0.3}, "responses of unequal length"),
        Case({**full, "beta": 0.5, "alpha": 1.5, "guide_beta": 0.8}, "strong guidance, with gradients"),
        Case(
            {**_far_apart(), "beta": 0.7, "alpha": 0.5, "guide_beta": 0.2}, "a pair that is wrong by hundreds of nats"
        ),
    )


def _loss(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    return losses.tgdpo(chosen, rejected, beta=beta, alpha=alpha, guide_beta=guide_beta).loss


def _ratio(side: TokenStats) -> Tensor:
    return side.logps - side.ref_logps  # (B, T-1), 0 off-mask


def _f(signal: Tensor) -> Tensor:
    return (1 + signal.detach()).clamp_min(F_FLOOR)


def _per_token(side: TokenStats, values: Tensor) -> Tensor:
    """(B, 1) mean of (B, T-1) values over the tokens of each response."""
    return torch.where(side.mask, values, 0.0).sum(-1, keepdim=True) / side.mask.sum(-1, keepdim=True)


def _from_rewards(
    reward: Callable[[TokenStats, Tensor], Tensor], signs: tuple[int, int] = (1, -1)
) -> Callable[..., Tensor]:
    """-log sigma(beta reward(chosen) - beta reward(rejected)); `reward` sees a side and its +-alpha r_hat, not detached."""

    def loss(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
        won, lost = (
            beta * reward(side, sign * alpha * guide_beta * (side.guide_logps - side.ref_logps)).sum(-1)
            for side, sign in zip((chosen, rejected), signs, strict=True)
        )
        return -F.logsigmoid(won - lost)

    return loss


def _weighted_loss(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    f = _f(alpha * guide_beta * (chosen.guide_logps - chosen.ref_logps))
    return _per_token(chosen, f)[:, 0] * losses.dpo(chosen, rejected, beta=beta).loss


def _guided_by_itself(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    own = [replace(side, guide_logps=side.logps.detach()) for side in (chosen, rejected)]
    return _loss(*own, beta, alpha, guide_beta)


def _overflowing(chosen: TokenStats, rejected: TokenStats, beta: float, alpha: float, guide_beta: float) -> Tensor:
    output = losses.tgdpo(chosen, rejected, beta=beta, alpha=alpha, guide_beta=guide_beta)
    f_w, f_l = output.token_weights.chunk(2)
    return -torch.sigmoid(beta * (f_w * _ratio(chosen)).sum(-1) - beta * (f_l * _ratio(rejected)).sum(-1)).log()


tgdpo_loss = Exercise(
    name="tgdpo_loss",
    title="TGDPO's loss",
    what="Return the loss of every pair, (B,): $-\\log \\sigma\\bigl(\\beta \\sum_t f_w(\\hat r^t) \\log "
    "\\frac{\\pi_\\theta}{\\pi_{\\mathrm{ref}}}(y_w^t) - \\beta \\sum_t f_l(\\hat r^t) \\log "
    "\\frac{\\pi_\\theta}{\\pi_{\\mathrm{ref}}}(y_l^t)\\bigr)$. <code>chosen</code> and <code>rejected</code> are "
    "<code>TokenStats</code> of B pairs: <code>logps</code>, <code>ref_logps</code> and <code>guide_logps</code>, each (B, T-1) "
    "in nats and exactly 0 outside the response, and <code>mask</code>. <code>beta</code> is this run's, "
    "<code>guide_beta</code> the guide's. Use your <code>r_hat</code> and <code>token_weights</code>.",
    why="It is DPO's loss and one factor a token. That the factor may not carry a gradient is what makes it a weight, and "
    "not a second model in training.",
    difficulty=3,
    minutes=10,
    hints=(
        "Take DPO's loss from chapter 2 and put the weight where each token still stands alone: inside the sum.",
        "Two betas: guide_beta makes r&#770; out of the guide's log-ratios, beta makes the reward out of the policy's.",
        "<code>f_w, _ = token_weights(r_hat(chosen.guide_logps, chosen.ref_logps, guide_beta), alpha)</code>, then "
        "<code>beta * (f_w * (chosen.logps - chosen.ref_logps)).sum(-1)</code>; the same with f_l for the rejected side.",
    ),
    right=_loss,
    cases=_loss_cases,
    mistakes=(
        Mistake(
            "The wrong guide beta: you made r&#770; with this run's beta. The guide's log-ratios are worth guide_beta each. (The "
            "published code does what you did; it matters as soon as the two runs differ in beta.)",
            lambda chosen, rejected, beta, alpha, guide_beta: _loss(chosen, rejected, beta, alpha, beta),
        ),
        Mistake(
            "You used 1 + &alpha; r&#770; on both sides. On the rejected side the sign is minus: a good token is pushed down "
            "less.",
            _from_rewards(lambda side, signal: _f(signal) * _ratio(side), signs=(1, 1)),
        ),
        Mistake(
            "f_w and f_l are swapped: you push hardest what the guide likes least.",
            _from_rewards(lambda side, signal: _f(signal) * _ratio(side), signs=(-1, 1)),
        ),
        Mistake(
            "The floor is forgotten: some weights are negative here, and their tokens are pushed the wrong way.",
            _from_rewards(lambda side, signal: (1 + signal.detach()) * _ratio(side)),
        ),
        Mistake(
            "abs() is no floor: it gives the worst tokens some of the largest weights. A weight below 0.01 becomes 0.01.",
            _from_rewards(lambda side, signal: (1 + signal.detach()).abs() * _ratio(side)),
        ),
        Mistake(
            "Your values are right, but a gradient flows into the guide. r&#770; is a constant: detach it.",
            _from_rewards(lambda side, signal: (1 + signal).clamp_min(F_FLOOR) * _ratio(side)),
        ),
        Mistake(
            "You normalised the weights of a response to a mean of 1. The derivation does not: a response full of tokens that "
            "the guide likes counts more as a whole.",
            _from_rewards(lambda side, signal: _f(signal) / _per_token(side, _f(signal)) * _ratio(side)),
        ),
        Mistake(
            "You weighted the loss of a pair, not the log-ratios of its tokens: all tokens of a response still get the same "
            "coefficient, as in DPO.",
            _weighted_loss,
        ),
        Mistake(
            "The weight reaches the policy's log-probability but not the reference's. It multiplies the whole log-ratio; "
            "otherwise the loss does not start at log 2.",
            _from_rewards(lambda side, signal: _f(signal) * side.logps - side.ref_logps),
        ),
        Mistake(
            "You averaged over the tokens. The derivation adds up token rewards, so it is a sum.",
            _from_rewards(lambda side, signal: _per_token(side, _f(signal) * _ratio(side))),
        ),
        Mistake(
            "Your values are right, but no gradient reaches the policy. Detach r&#770; alone, not what it multiplies.",
            lambda chosen, rejected, beta, alpha, guide_beta: _loss(chosen, rejected, beta, alpha, guide_beta).detach(),
        ),
        Mistake(
            "That is DPO: the weights are missing.",
            lambda chosen, rejected, beta, alpha, guide_beta: losses.dpo(chosen, rejected, beta=beta).loss,
        ),
        Mistake(
            "You took the policy as its own guide. r&#770; comes from guide_logps, a model that was trained before and does not "
            "move.",
            _guided_by_itself,
        ),
        Mistake(
            "beta is missing from the rewards; guide_beta does not replace it.",
            lambda chosen, rejected, beta, alpha, guide_beta: _loss(chosen, rejected, 1.0, alpha, guide_beta),
        ),
        Mistake(
            "Chosen and rejected are swapped: this teaches the policy that the rejected response won.",
            lambda chosen, rejected, beta, alpha, guide_beta: _loss(rejected, chosen, beta, alpha, guide_beta),
        ),
        Mistake(
            "The minus is missing: log &sigma; is what you want to be large, a loss is what you want to be small.",
            lambda chosen, rejected, beta, alpha, guide_beta: -_loss(chosen, rejected, beta, alpha, guide_beta),
        ),
        Mistake(
            "Right on paper, infinite in float32: the sigmoid of a margin of some hundreds below 0 rounds to 0. Take both in one "
            "step with F.logsigmoid.",
            _overflowing,
        ),
    ),
    solution="tgdpo",
)


# ---- largest_alpha


def _largest(r_hat: Tensor, mask: Tensor) -> Tensor:
    return (1 - F_FLOOR) / r_hat[mask].abs().max()


def _alpha_cases() -> tuple[Case, ...]:
    def case(strongest: float, other: float, words: str) -> Case:
        mask = _mask(".xxxx.x", "xx.....")
        r_hat = torch.where(mask, 0.1 * _draw(6)(*mask.shape), 9.0)  # prompt and padding hold anything
        r_hat[0, 3], r_hat[1, 1] = strongest, other
        return Case({"r_hat": r_hat, "mask": mask}, words)

    return (
        case(-2.5, 1.25, "a token that the guide dislikes most of all"),
        case(1.5, -0.75, "a token that the guide likes most of all"),
    )


largest_alpha = Exercise(
    name="largest_alpha",
    title="How much guidance before the floor?",
    what="Return the largest &alpha; at which no weight lies below 0.01, whichever side a token stands on. <code>r_hat</code> is "
    "(N, T-1); <code>mask</code>, of the same shape, is True on response tokens, and r_hat holds anything elsewhere. "
    "The result is one number.",
    why="The derivation asks for f above 0, so for a small enough &alpha;. This is the number those words stand for.",
    difficulty=2,
    minutes=5,
    hints=(
        "Which token reaches the floor first as &alpha; grows? The one with the strongest r&#770;, in either direction.",
        "Solve 1 - &alpha; |r&#770;| = 0.01 for &alpha;.",
        "<code>(1 - 0.01) / r_hat[mask].abs().max()</code>",
    ),
    right=_largest,
    cases=_alpha_cases,
    mistakes=(
        Mistake(
            "The mask is forgotten: prompt and padding hold numbers too, and yours comes from one of them.",
            lambda r_hat, mask: (1 - F_FLOOR) / r_hat.abs().max(),
        ),
        Mistake(
            "You looked at the most negative r&#770; alone. That is the chosen side; on the rejected one it is the most positive "
            "that brings 1 - &alpha; r&#770; down.",
            lambda r_hat, mask: (1 - F_FLOOR) / -r_hat[mask].min(),
        ),
        Mistake(
            "You looked at the most positive r&#770; alone. That is the rejected side; on the chosen one it is the most negative "
            "that brings 1 + &alpha; r&#770; down.",
            lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].max(),
        ),
        Mistake(
            "You put the floor at 0: at your &alpha; one weight is 0, and the floor of 0.01 has taken hold before.",
            lambda r_hat, mask: 1 / r_hat[mask].abs().max(),
        ),
        Mistake(
            "You solved for the average token. The floor is about the most extreme one.",
            lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].abs().mean(),
        ),
        Mistake(
            "That is the strongest r&#770;, not the &alpha; it allows: divide 0.99 by it.",
            lambda r_hat, mask: r_hat[mask].abs().max(),
        ),
        Mistake(
            "You took the weakest token. It reaches the floor last; the strongest reaches it first.",
            lambda r_hat, mask: (1 - F_FLOOR) / r_hat[mask].abs().min(),
        ),
    ),
    solution="tgdpo",
)


quiz = Quiz(
    (
        Question(
            "Theorem 4.4 removes the partition functions. When may you rely on it?",
            (
                Option(
                    "For a single pair: the order of policies and the direction of the gradient stay.",
                    True,
                    "&delta; does not contain the policy, so it only changes how hard the pair pushes.",
                ),
                Option(
                    "For the mean over all pairs: the optimum stays.",
                    False,
                    "Each pair has its own &delta;, which rescales that pair's push. Two pairs that disagree then balance "
                    "elsewhere: 0.693 became -0.941.",
                ),
                Option(
                    "Always, as long as f is positive.",
                    False,
                    "f above 0 is needed for the closed form; it does not make the sum over pairs indifferent to &delta;.",
                ),
            ),
        ),
        Question(
            "A token stands in a <i>rejected</i> response and the guide likes it (r&#770; above 0). What does TGDPO do with it, "
            "compared with DPO?",
            (
                Option(
                    "It pushes it up.",
                    False,
                    "The weight is small but positive, so the push keeps its direction: down.",
                ),
                Option(
                    "It pushes it down less.",
                    True,
                    "f_l = 1 - &alpha; r&#770; lies below 1. The response lost, but probably not for this token.",
                ),
                Option(
                    "It pushes it down more.",
                    False,
                    "That happens to the tokens the guide dislikes, where f_l lies above 1.",
                ),
            ),
        ),
        Question(
            "Your guide was trained with &beta; = 0.1, this run uses &beta; = 0.01. What goes wrong if r&#770; is made with this "
            "run's &beta;, as in the published code?",
            (
                Option(
                    "The weights come out ten times closer to 1: TGDPO is nearly DPO, and you blame &alpha;.",
                    True,
                    "r&#770; is 0.01 times the log-ratio instead of 0.1 times it; only the product &alpha; r&#770; matters.",
                ),
                Option("The loss becomes negative.", False, "-log &sigma; never is."),
                Option(
                    "Nothing: only the sign of r&#770; matters.",
                    False,
                    "f is linear in r&#770;, so its size is all that matters beside the sign.",
                ),
            ),
        ),
        Question(
            "f = 1 + &alpha; r&#770; on one side and 1 - &alpha; r&#770; on the other. What do the two &alpha; terms "
            "add to the margin?",
            (
                Option(
                    "Nothing, they cancel.",
                    False,
                    "The rejected side is subtracted, so its minus becomes a plus: they add up.",
                ),
                Option(
                    "A pull along the guide on every token of both responses, whoever won.",
                    True,
                    "&alpha; &beta; times the sum of r&#770; log(&pi;/&pi;<sub>ref</sub>) over both responses; it does "
                    "not change its sign when the two are swapped, so the margin is no difference of rewards any more.",
                ),
                Option(
                    "A KL penalty that holds the policy near the reference.",
                    False,
                    "On the contrary: it grows as the policy moves along the guide, away from the reference.",
                ),
            ),
        ),
        Question(
            "TGDPO ends with a higher reward than DPO after the same number of updates. What do you conclude?",
            (
                Option(
                    "Token guidance gives better credit.",
                    False,
                    "Perhaps. But it may only have travelled further: a larger KL buys reward too.",
                ),
                Option(
                    "Nothing yet: compare at equal KL, with an interval, and count the guide's training.",
                    True,
                    "Weights above 1 and the pull along the guide make larger steps. Only at the same distance from the "
                    "reference is a higher reward a better use of it.",
                ),
                Option(
                    "The learning rate of DPO was wrong.",
                    False,
                    "Possible, but that is a guess. The comparison at equal KL needs no guess.",
                ),
            ),
        ),
    )
)

"""Exercises of 02_dpo.ipynb: the Gibbs optimum, a response's log-probability, DPO's loss, its coefficient on every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz
from tpo_lib import losses, stats
from tpo_lib.types import IGNORE, TokenStats

NOTEBOOK = "02_dpo.ipynb"


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- 1. the optimum of the KL-regularised objective


def _gibbs_cases() -> tuple[Case, ...]:
    def case(prompts: int, responses: int, beta: float, seed: int, words: str = "", scale: float = 1.0) -> Case:
        ref_logps = _normal(prompts, responses, seed=seed).log_softmax(-1)
        reward = scale * _normal(prompts, responses, seed=seed + 1)
        return Case({"ref_logps": ref_logps, "reward": reward, "beta": beta}, words)

    return (
        case(3, 7, 0.5, seed=0),
        case(1, 4, 2.5, seed=2, words="a single prompt"),
        case(2, 5, 0.01, seed=4, words="rewards of a thousand times beta", scale=10.0),
    )


def _gibbs(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    return (ref_logps + reward / beta).log_softmax(-1)


def _gibbs_by_exp(ref_logps: Tensor, reward: Tensor, beta: float) -> Tensor:
    unnormalised = ref_logps.exp() * (reward / beta).exp()
    return unnormalised / unnormalised.sum(-1, keepdim=True)


gibbs = Exercise(
    name="gibbs",
    title="The best policy there is",
    what="Return log &pi;*(y|x) of the Gibbs optimum. <code>ref_logps</code> and <code>reward</code> are (P, n): "
    "P prompts, and all n responses of each. <code>beta</code> is a number. It must work for a very small beta too.",
    why="Every objective of this course has such an optimum, and DPO's loss is nothing but this formula read backwards.",
    difficulty=2,
    minutes=6,
    hints=(
        "Take the logarithm of the equation first: a product becomes a sum.",
        "log Z(x) is a <code>logsumexp</code> over the responses of one prompt.",
        "Adding logits and normalising them is what <code>log_softmax(dim=-1)</code> does.",
    ),
    right=_gibbs,
    cases=_gibbs_cases,
    mistakes=(
        Mistake(
            "You multiplied the reward by beta; the optimum divides by it. A large beta is a strong pull towards the "
            "reference, so it must make the reward count <i>less</i>.",
            lambda ref_logps, reward, beta: (ref_logps + beta * reward).log_softmax(-1),
        ),
        Mistake(
            "Z is missing: your numbers are not log-probabilities yet. Subtract log Z(x), the logsumexp over the "
            "responses of the prompt.",
            lambda ref_logps, reward, beta: ref_logps + reward / beta,
        ),
        Mistake(
            "Two things: beta divides the reward (a large beta is a strong pull towards the reference), and Z is missing: "
            "subtract the logsumexp over the responses of the prompt.",
            lambda ref_logps, reward, beta: ref_logps + beta * reward,
        ),
        Mistake(
            "You normalised over all prompts together. Z(x) carries an x: every row is a distribution of its own.",
            lambda ref_logps, reward, beta: (ref_logps + reward / beta).flatten().log_softmax(0).view_as(reward),
        ),
        Mistake(
            "You normalised over the prompts (dimension 0) instead of over the responses (the last one).",
            lambda ref_logps, reward, beta: (ref_logps + reward / beta).log_softmax(0),
        ),
        Mistake(
            "The reference is missing: this is a softmax of the reward alone, the optimum for a uniform reference.",
            lambda ref_logps, reward, beta: (reward / beta).log_softmax(-1),
        ),
        Mistake(
            "You divided the reference's log-probabilities by beta as well. Beta tempers the reward only; the reference "
            "enters with exponent 1.",
            lambda ref_logps, reward, beta: ((ref_logps + reward) / beta).log_softmax(-1),
        ),
        Mistake(
            "You returned probabilities; their logarithms are asked for.",
            lambda ref_logps, reward, beta: _gibbs(ref_logps, reward, beta).exp(),
        ),
        Mistake(
            "You returned probabilities, and exp(reward/beta) overflows for a small beta. Log-probabilities are asked for: "
            "stay with logarithms from the first line to the last.",
            _gibbs_by_exp,
        ),
        Mistake(
            "The formula is right, but exp(reward/beta) overflows for a small beta and inf/inf is nan. Stay with "
            "logarithms: logsumexp subtracts the largest entry first.",
            lambda ref_logps, reward, beta: _gibbs_by_exp(ref_logps, reward, beta).log(),
        ),
    ),
    solution="dpo",
)


# ---- 2. logits and labels -> one log-probability a response


def _logits_cases() -> tuple[Case, ...]:
    labels = torch.tensor(
        [
            [IGNORE, IGNORE, 4, 1, 6, IGNORE, IGNORE],
            [IGNORE, 3, IGNORE, 2, 5, 1, 0],  # a hole: this token is not scored
            [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 2, IGNORE],
        ]
    )
    alone = torch.tensor([[IGNORE, IGNORE, 3, 0, 2, 1, IGNORE]])
    steep = _normal(1, 7, 5, seed=12, dtype=torch.float32)
    steep[0, 3, 2] = steep[0, 3].max() - 120.0  # the token the fourth position has to predict
    return (
        Case({"logits": _normal(3, 7, 8, seed=10).requires_grad_(), "labels": labels}),
        Case({"logits": _normal(1, 7, 5, seed=11).requires_grad_(), "labels": alone}, "a single response"),
        Case({"logits": steep, "labels": alone}, "a token whose logit lies 120 below the largest"),
    )


def _scored(
    logits: Tensor,
    labels: Tensor,
    score: Callable[[Tensor], Tensor] = lambda z: z.log_softmax(-1),
    mask: Callable[[Tensor], Tensor] = lambda labels: labels[:, 1:] != IGNORE,
    shift: int = 1,
) -> Tensor:
    """(N, T-1) score of every token, 0 off-mask; score, mask and shift are the parts that people get wrong.

    `shift` says where token t + 1 is looked up: 1 in the logits of position t (right), 0 in those of t + 1. At -1 token t
    is looked up in the logits of t + 1.
    """
    if shift == 1:
        logits, ids, keep = logits[:, :-1], labels[:, 1:], mask(labels)
    elif shift == 0:
        logits, ids, keep = logits[:, 1:], labels[:, 1:], mask(labels)
    else:
        logits, ids, keep = logits[:, 1:], labels[:, :-1], labels[:, :-1] != IGNORE
    per_token = score(logits).gather(-1, ids.clamp_min(0)[..., None])[..., 0]  # (N, T-1)
    return torch.where(keep, per_token, 0.0)


response_logps = Exercise(
    name="response_logps",
    title="From logits to the log-probability of a response",
    what="Return log &pi;(y|x) of N responses. <code>logits</code> (N, T, V) are what a language model gives for whole "
    "sequences, prompt and padding included; <code>labels</code> (N, T) hold the token id on response positions and -100 "
    "elsewhere, not shifted. The result has shape (N,), in nats.",
    why="Shift, log-softmax, gather, mask, sum: five steps, and a mistake in any of them raises no error. The loss just falls on "
    "the wrong numbers.",
    difficulty=3,
    minutes=10,
    hints=(
        "Which logits predict the token at position t+1? Those at position t. So cut the last column of the logits and the "
        "first column of the labels.",
        "-100 is no token id: <code>gather</code> would fail on it. Clamp it to 0, and put 0 in its place afterwards.",
        "<code>log_softmax(-1)</code>, <code>gather(-1, ids[..., None])</code>, <code>torch.where(mask, ..., 0)</code>, "
        "<code>sum(-1)</code>.",
    ),
    right=lambda logits, labels: stats.token_stats(logits, labels, None).logps.sum(-1),
    cases=_logits_cases,
    mistakes=(
        Mistake(
            "You averaged over the tokens. log &pi;(y|x) is their <i>sum</i>: averaging divides a response's reward by its "
            "length and changes beta from pair to pair. (SimPO does it on purpose.)",
            lambda logits, labels: _scored(logits, labels).sum(-1) / (labels[:, 1:] != IGNORE).sum(-1),
        ),
        Mistake(
            "You averaged over all columns, padding included: the value now depends on the longest sequence of the batch.",
            lambda logits, labels: _scored(logits, labels).mean(-1),
        ),
        Mistake(
            "The shift is missing: you read the logits at the token's own position. A causal model has already seen that "
            "token there; position t predicts token t+1.",
            lambda logits, labels: _scored(logits, labels, shift=0).sum(-1),
        ),
        Mistake(
            "You shifted the wrong way: your position t+1 scores token t, which the model has already read.",
            lambda logits, labels: _scored(logits, labels, shift=-1).sum(-1),
        ),
        Mistake(
            "Your mask is off by one: you shifted the labels but took the mask from the unshifted ones, so each response "
            "loses its first token and gains one beyond its end. Column t of the mask belongs to label t+1.",
            lambda logits, labels: _scored(logits, labels, mask=lambda labels: labels[:, :-1] != IGNORE).sum(-1),
        ),
        Mistake(
            "Prompt and padding are counted: the -100 you clamped to token 0 is scored as if it had been written. Put 0 "
            "wherever the label is -100.",
            lambda logits, labels: _scored(
                logits, labels, mask=lambda labels: torch.ones_like(labels[:, 1:], dtype=torch.bool)
            ).sum(-1),
        ),
        Mistake(
            "You summed raw logits. Only their differences mean anything: normalise with log_softmax over the vocabulary.",
            lambda logits, labels: _scored(logits, labels, score=lambda z: z).sum(-1),
        ),
        Mistake(
            "softmax().log() is -inf as soon as a logit lies about 104 below the largest (in float32 its probability rounds "
            "to 0), and the gradient is nan. log_softmax computes the same without the detour.",
            lambda logits, labels: _scored(logits, labels, score=lambda z: z.softmax(-1).log()).sum(-1),
        ),
        Mistake(
            "You normalised over the positions (dimension 1) instead of over the vocabulary (the last one).",
            lambda logits, labels: _scored(logits, labels, score=lambda z: z.log_softmax(1)).sum(-1),
        ),
        Mistake(
            "The sign is wrong: this is the cross-entropy, -log &pi;(y|x). The log-probability is asked for.",
            lambda logits, labels: -_scored(logits, labels).sum(-1),
        ),
    ),
    solution="dpo",
)


# ---- 3. DPO's loss


def _half(mask: Tensor, seed: int, *, apart: float = 0.5, dtype: torch.dtype = torch.float64) -> TokenStats:
    """Statistics of some responses whose policy lies `apart` nats a token from the reference."""
    ref = torch.where(mask, _normal(*mask.shape, seed=seed, dtype=dtype) - 3.0, 0.0)
    noise = _normal(*mask.shape, seed=seed + 1, dtype=dtype)
    return TokenStats(logps=torch.where(mask, ref + apart * noise, 0.0), ref_logps=ref, mask=mask)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def _padded() -> tuple[TokenStats, TokenStats]:
    """Three pairs: prompts of different lengths, responses of 4 and 3, 7 and 1, 2 and 5 tokens, one with a hole."""
    return (
        _half(_mask("..xx.xx", "xxxxxxx", ".xx...."), seed=20),
        _half(_mask("..xxx..", "x......", ".xxxxx."), seed=22),
    )


def _stats_cases() -> tuple[Case, ...]:
    chosen, rejected = _padded()
    far = _mask("xxxxx")
    case = {"chosen": _half(far, seed=24, dtype=torch.float32), "rejected": _half(far, seed=26, dtype=torch.float32)}
    case["chosen"] = dataclasses.replace(case["chosen"], logps=case["chosen"].logps - 100.0)  # margin about -150
    return (
        Case({"chosen": chosen, "rejected": rejected, "beta": 0.3}),
        Case(case | {"beta": 0.3}, "a policy that is wrong about the pair by 150 nats"),
    )


def _loss_cases() -> tuple[Case, ...]:
    """As above, and full rows, so that the gradient at padding, which nobody needs, is not asked for."""
    mask = _mask("xxxxx", "xxxxx")
    chosen, rejected = (
        dataclasses.replace(half, logps=half.logps.requires_grad_())
        for half in (_half(mask, seed=30), _half(mask, seed=32))
    )
    return (
        *_stats_cases(),
        Case({"chosen": chosen, "rejected": rejected, "beta": 0.7}, "two pairs without padding, with gradients"),
    )


def _ratio(s: TokenStats) -> Tensor:
    return (s.logps - s.ref_logps).sum(-1)


def _mean_ratio(s: TokenStats) -> Tensor:
    return _ratio(s) / s.mask.sum(-1)


dpo_loss = Exercise(
    name="dpo_loss",
    title="DPO's loss",
    what="Return DPO's loss of B pairs, shape (B,). <code>chosen</code> and <code>rejected</code> are <code>TokenStats</code>: "
    "their fields <code>logps</code>, <code>ref_logps</code> and <code>mask</code> are (B, T-1), and 0 (False) wherever no "
    "response token is scored. <code>beta</code> is a number.",
    why="It is one line, and it is the line that trains the model below. The later objectives of this course change "
    "one term of it each.",
    difficulty=2,
    minutes=6,
    hints=(
        "Each response first: the sum over its tokens of log &pi; minus log &pi;<sub>ref</sub>.",
        "The margin is beta times (chosen minus rejected); the loss is -log &sigma;(margin).",
        "<code>F.logsigmoid</code> is log &sigma; without overflow.",
    ),
    right=lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss,
    cases=_loss_cases,
    mistakes=(
        Mistake(
            "Chosen and rejected are swapped: this loss falls as the policy learns to prefer the <i>rejected</i> response.",
            lambda chosen, rejected, beta: -F.logsigmoid(beta * (_ratio(rejected) - _ratio(chosen))),
        ),
        Mistake(
            "The reference is missing. Without it the margin is what the policy finds likelier, not what it has "
            "<i>learned</i> to find likelier, and nothing holds it near its start.",
            lambda chosen, rejected, beta: -F.logsigmoid(beta * (chosen.logps.sum(-1) - rejected.logps.sum(-1))),
        ),
        Mistake(
            "You averaged over the tokens. DPO's log-ratio is a sum: its optimum is a distribution over whole responses. With "
            "the mean, a long response's tokens each count less.",
            lambda chosen, rejected, beta: -F.logsigmoid(beta * (_mean_ratio(chosen) - _mean_ratio(rejected))),
        ),
        Mistake(
            "You averaged over all columns. They include prompt and padding, so the loss of a pair depends on what else "
            "is in its batch.",
            lambda chosen, rejected, beta: (
                -F.logsigmoid(
                    beta * ((chosen.logps - chosen.ref_logps).mean(-1) - (rejected.logps - rejected.ref_logps).mean(-1))
                )
            ),
        ),
        Mistake(
            "Beta stands outside the sigmoid. There it only scales the loss, like a learning rate; inside, it says which "
            "margin counts as convinced.",
            lambda chosen, rejected, beta: -beta * F.logsigmoid(_ratio(chosen) - _ratio(rejected)),
        ),
        Mistake(
            "You divided by beta. In the optimum the <i>reward</i> is divided by beta; solved for the reward, beta is a factor.",
            lambda chosen, rejected, beta: -F.logsigmoid((_ratio(chosen) - _ratio(rejected)) / beta),
        ),
        Mistake(
            "Beta reaches the policy but not the reference. It multiplies the whole log-ratio; otherwise the margin is not "
            "0 where policy and reference agree.",
            lambda chosen, rejected, beta: (
                -F.logsigmoid(
                    beta * (chosen.logps - rejected.logps).sum(-1) - (chosen.ref_logps - rejected.ref_logps).sum(-1)
                )
            ),
        ),
        Mistake(
            "The minus is missing: log &sigma; is what you want to be large, a loss is what you want to be small.",
            lambda chosen, rejected, beta: F.logsigmoid(beta * (_ratio(chosen) - _ratio(rejected))),
        ),
        Mistake(
            "The logarithm is missing: -&sigma;(margin) is no likelihood, and its gradient dies on the pairs that are most "
            "wrong.",
            lambda chosen, rejected, beta: -torch.sigmoid(beta * (_ratio(chosen) - _ratio(rejected))),
        ),
        Mistake(
            "log(sigmoid(x)) is -inf as soon as x lies below about -104 in float32, and the gradient is nan. "
            "F.logsigmoid computes the same safely.",
            lambda chosen, rejected, beta: -torch.log(torch.sigmoid(beta * (_ratio(chosen) - _ratio(rejected)))),
        ),
        Mistake(
            "You applied the sigmoid token by token. Preferences are about whole responses: sum the log-ratios first.",
            lambda chosen, rejected, beta: (
                -F.logsigmoid(beta * ((chosen.logps - chosen.ref_logps) - (rejected.logps - rejected.ref_logps))).sum(
                    -1
                )
            ),
        ),
        Mistake(
            "The values are right, but no gradient reaches the policy: something detaches it (<code>detach</code>, "
            "<code>item</code>, <code>no_grad</code>).",
            lambda chosen, rejected, beta: losses.dpo(chosen, rejected, beta=beta).loss.detach(),
        ),
    ),
    solution="dpo",
)


# ---- 4. the coefficient that every token gets


def _slope(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(2B, T-1) derivative of every pair's own loss by its tokens' log-probabilities, from autograd."""
    leaf = torch.cat([chosen.logps, rejected.logps]).detach().requires_grad_()
    chosen, rejected = (
        dataclasses.replace(half, logps=part) for half, part in zip((chosen, rejected), leaf.chunk(2), strict=True)
    )
    slope = torch.autograd.grad(losses.dpo(chosen, rejected, beta=beta).loss.sum(), leaf)[0]
    return torch.where(torch.cat([chosen.mask, rejected.mask]), slope, 0.0)


def _pull(chosen: TokenStats, rejected: TokenStats, size: Tensor, *, masked: bool = True) -> Tensor:
    """(2B, T-1) -size on the chosen tokens, +size on the rejected ones; `size` is (B, 1)."""
    mask = torch.cat([chosen.mask, rejected.mask])
    return torch.where(mask | (not masked), torch.cat([-size, size]).expand(mask.shape), 0.0)


def _wrong(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    """(B, 1) sigma(-margin)."""
    return torch.sigmoid(beta * (_ratio(rejected) - _ratio(chosen)))[:, None]


def _per_token(chosen: TokenStats, rejected: TokenStats, beta: float) -> Tensor:
    ratio = torch.cat([chosen.logps - chosen.ref_logps, rejected.ref_logps - rejected.logps])
    size = beta * torch.sigmoid(-beta * ratio)  # (2B, T-1)
    sign = torch.cat([-torch.ones_like(chosen.logps), torch.ones_like(rejected.logps)])
    return torch.where(torch.cat([chosen.mask, rejected.mask]), sign * size, 0.0)


dpo_token_coefficient = Exercise(
    name="dpo_token_coefficient",
    title="What DPO does to every token",
    what="Return the derivative of each pair's DPO loss by log &pi;(y<sup>t</sup>|s<sub>t</sub>) of each of its tokens: shape "
    "(2B, T-1), the chosen responses first, 0 where no response token is scored. Arguments as for <code>dpo_loss</code>.",
    why="This is the sense in which DPO assigns credit: every token of a response gets the same share. Everything that follows "
    "in this course changes this matrix.",
    difficulty=3,
    minutes=8,
    hints=(
        "Chain rule: the loss depends on a token's log-probability only through the margin. What is the slope of -log "
        "&sigma;(m) in m?",
        "It is -&sigma;(-m). And the slope of m in a chosen token's log-probability is +beta, in a rejected one's -beta.",
        "Stack -beta &sigma;(-m) for the chosen and +beta &sigma;(-m) for the rejected rows, spread them over the columns, "
        "and put 0 off the mask. (Autograd gives the same: detach <code>logps</code>, require a gradient, differentiate.)",
    ),
    right=_slope,
    cases=_stats_cases,
    mistakes=(
        Mistake(
            "You used &sigma;(m) instead of &sigma;(-m): then the pairs the policy already gets right are pushed hardest. "
            "DPO pushes where it is still wrong.",
            lambda chosen, rejected, beta: _pull(chosen, rejected, beta * (1 - _wrong(chosen, rejected, beta))),
        ),
        Mistake(
            "Beta is missing: the margin is beta times the log-ratios, so the chain rule brings down a factor beta.",
            lambda chosen, rejected, beta: _pull(chosen, rejected, _wrong(chosen, rejected, beta)),
        ),
        Mistake(
            "The signs are swapped: this is the direction of the update. The derivative of the loss is negative on chosen "
            "tokens, because raising them lowers the loss.",
            lambda chosen, rejected, beta: -_slope(chosen, rejected, beta),
        ),
        Mistake(
            "Both responses got the same sign. The margin rises with the chosen tokens and falls with the rejected ones.",
            lambda chosen, rejected, beta: -_slope(chosen, rejected, beta).abs(),
        ),
        Mistake(
            "The reference is missing from the margin: sigma looks at beta times the <i>log-ratios</i>.",
            lambda chosen, rejected, beta: _pull(
                chosen,
                rejected,
                beta * torch.sigmoid(beta * (rejected.logps.sum(-1) - chosen.logps.sum(-1)))[:, None],
            ),
        ),
        Mistake(
            "You divided by the response's length. That is the coefficient of a mean over tokens; DPO sums, so a long "
            "response is pushed as hard per token as a short one.",
            lambda chosen, rejected, beta: (
                _slope(chosen, rejected, beta) / torch.cat([chosen.mask, rejected.mask]).sum(-1, keepdim=True)
            ),
        ),
        Mistake(
            "You gave prompt and padding a coefficient too. Only response tokens are scored: put 0 where the mask is False.",
            lambda chosen, rejected, beta: _pull(chosen, rejected, beta * _wrong(chosen, rejected, beta), masked=False),
        ),
        Mistake(
            "You gave each token its own margin. DPO has one margin a pair, shared by all its tokens; that is the whole point.",
            _per_token,
        ),
        Mistake(
            "You took the derivative of the mean over the batch: it is smaller by the number of pairs. Each pair's own loss "
            "is asked for.",
            lambda chosen, rejected, beta: _slope(chosen, rejected, beta) / len(chosen.logps),
        ),
    ),
    solution="dpo",
)


quiz = Quiz(
    (
        Question(
            "You double beta and train DPO to convergence on the exact loss. The policy ends ...",
            (
                Option("further from the reference", False, "That is what the first steps look like, not the end."),
                Option(
                    "nearer to the reference",
                    True,
                    "&pi;* &prop; &pi;<sub>ref</sub> exp(r/beta): a larger beta shrinks what the reward can do. The slope of "
                    "KL(&pi;* || &pi;<sub>ref</sub>) in beta is minus a variance, so it is never positive.",
                ),
                Option(
                    "at the same place; beta only scales the loss",
                    False,
                    "A factor outside the sigmoid would only scale. Beta stands inside it and changes the margin at which the "
                    "loss is content.",
                ),
            ),
        ),
        Question(
            "You double beta and take one plain gradient step from the reference. The step is ...",
            (
                Option(
                    "twice as long",
                    True,
                    "At the reference every margin is 0, so the gradient is -beta/2 times a fixed vector. With AdamW or "
                    "RMSprop you would hardly see it: they divide the scale of the gradient out.",
                ),
                Option("half as long", False, "That mixes up the first step with the optimum, where beta divides."),
                Option("as long as before", False, "True for AdamW, nearly; a plain gradient step scales with beta."),
            ),
        ),
        Question(
            "Both implicit rewards fall during training, the rejected one faster. The run is ...",
            (
                Option(
                    "broken: the chosen responses should become more likely",
                    False,
                    "The loss sees the difference alone. Even the exact optimum makes a chosen response less likely if it is "
                    "worse than the soft maximum beta log Z(x): its probability is needed for better ones.",
                ),
                Option(
                    "not broken by that alone: look at the margin, at the KL and at samples",
                    True,
                    "At the optimum the chosen reward is r(x, y<sub>w</sub>) - beta log Z(x), often negative. It becomes a "
                    "problem where the fall buys nothing: the KL grows, and the score of new samples does not.",
                ),
                Option(
                    "a sign that chosen and rejected are swapped",
                    False,
                    "Swapped, the margin of the true labels would fall below 0; here it grows.",
                ),
            ),
        ),
        Question(
            "Z(x) is a sum over all responses. Why does DPO never compute it?",
            (
                Option(
                    "It is 1 for a good reference",
                    False,
                    "It is E<sub>ref</sub>[exp(r/beta)], rarely 1 and different for each x.",
                ),
                Option(
                    "Both responses of a pair share the prompt, and preferences see reward gaps only",
                    True,
                    "beta log Z(x) is added to both rewards and cancels in their difference.",
                ),
                Option(
                    "It is estimated from the batch",
                    False,
                    "Nothing in the loss looks at other pairs: it is one number a pair.",
                ),
            ),
        ),
        Question(
            "A chosen response has 12 tokens; one word made it win. Which token gets the largest coefficient?",
            (
                Option("the word that made it win", False, "DPO does not know which one that is: it sees who won."),
                Option(
                    "the least likely token",
                    False,
                    "A rare token's <i>logits</i> move more, but the coefficient on its log-probability is the same.",
                ),
                Option(
                    "all get the same",
                    True,
                    "-beta &sigma;(-m) on every one. Token-level methods, the rest of this course, start here.",
                ),
            ),
        ),
    )
)

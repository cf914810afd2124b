"""Exercises of chapter 3, the token MDP: returns, advantages, the soft backup, and the credit of a token.

>>> soft_backup(lambda ref_logps, q, beta: q.max(-1).values).status
'wrong'
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpo_course.exercise import Case, Exercise, Mistake, Option, Question, Quiz

NOTEBOOK = "03_token_mdp.ipynb"


def _response(rows: list[str]) -> Tensor:
    """One string a sequence, "y" where a response token stands, "." on prompt and padding -> (N, T) bool."""
    return torch.tensor([[letter == "y" for letter in row] for row in rows])


def _zero(mask: Tensor, values: Tensor) -> Tensor:
    return torch.where(mask, values, torch.zeros_like(values))


def _moved(values: Tensor) -> Tensor:
    """(N, T): in column t what stood in column t + 1, 0 in the last one."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)


# ---- return_to_go


def _accumulate(rewards: Tensor, mask: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From the last token to the first: total = step(reward, total of what follows); 0 outside the response."""
    total, columns = torch.zeros_like(rewards[:, 0]), []
    for reward in _zero(mask, rewards).flip(1).unbind(1):
        total = step(reward, total)
        columns.append(total)
    return _zero(mask, torch.stack(columns[::-1], dim=1))


def _to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _accumulate(rewards, mask, lambda reward, total: reward + gamma * total)


def _so_far(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _to_go(rewards.flip(1), mask.flip(1), gamma).flip(1)


def _whole_return(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    powers = gamma ** (mask.long().cumsum(1) - 1)  # counted from the first response token
    return _zero(mask, (_zero(mask, rewards) * powers).sum(1, keepdim=True).expand_as(rewards))


def _from_the_start(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _to_go(rewards * gamma ** (mask.long().cumsum(1) - 1), mask, 1.0)


def _mean_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    left = _to_go(torch.ones_like(rewards), mask, 1.0).clamp_min(1)  # tokens from here to the end
    return _to_go(rewards, mask, gamma) / left


def _return_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[9.0, 1.0, -0.5, 2.0, 0.25, 9.0], [9.0, 9.0, 0.75, -3.0, 9.0, 9.0]])
    mask = _response([".yyyy.", "..yy.."])
    return (
        Case({"rewards": rewards, "mask": mask, "gamma": 0.9}, "responses of 4 and 2 tokens, gamma = 0.9"),
        Case({"rewards": rewards, "mask": mask, "gamma": 1.0}, "the same without discount"),
        Case(
            {"rewards": torch.tensor([[-2.0, 0.5, 4.0]]), "mask": _response(["yyy"]), "gamma": 0.5},
            "no prompt and no padding, gamma = 0.5",
        ),
    )


return_to_go = Exercise(
    name="return_to_go",
    title="What is still to come",
    what="Return the (N, T) tensor of returns to go: at every response token $t$ the sum "
    r"$\sum_{k \ge t} \gamma^{k-t} R(s_k, y^k)$ over this token and all that follow, 0 outside the response. "
    "<code>rewards</code> (N, T) holds one number a position, <code>mask</code> (N, T) is True on the response (the prompt "
    "stands to its left, padding to its right, and both hold meaningless numbers), <code>gamma</code> is the discount.",
    why="V and Q are averages of exactly this number. Whoever gets its direction or its discount wrong trains on something else.",
    difficulty=2,
    minutes=8,
    hints=(
        "Walk from the last column to the first: what is still to come at t is the reward at t plus gamma times what is still "
        "to come at t + 1.",
        "Set the rewards outside the response to 0 before you add (torch.where), and the result once more at the end.",
        "Keep a running <code>total</code> of shape (N,); in each column <code>total = reward + gamma * total</code>; collect "
        "the totals, reverse them, and stack along dim 1.",
    ),
    right=_to_go,
    cases=_return_cases,
    mistakes=(
        Mistake(
            "Your discount is off by one: the token's own reward is due now and counts in full; only what follows it waits.",
            lambda rewards, mask, gamma: _accumulate(rewards, mask, lambda reward, total: gamma * (reward + total)),
        ),
        Mistake(
            "You left the discount out: what comes k tokens later counts gamma ** k.",
            lambda rewards, mask, gamma: _to_go(rewards, mask, 1.0),
        ),
        Mistake(
            "You discount from the start of the response. Seen from token t the wait is k - t: the reward at t counts in full.",
            _from_the_start,
        ),
        Mistake(
            "You added up the past, not the future: a return to go runs from the token to the end of the response.",
            _so_far,
        ),
        Mistake(
            "You left out the token's own reward. That is the return of the next state; Q asks what this token earns as well.",
            lambda rewards, mask, gamma: _zero(mask, _moved(_to_go(rewards, mask, gamma))),
        ),
        Mistake(
            "Every token of a response got the whole return. A token cannot earn what was paid before it was written.",
            _whole_return,
        ),
        Mistake(
            "You divided by the number of tokens: that is a mean. A return is a sum; a mean would make long responses look poor.",
            _mean_to_go,
        ),
        Mistake(
            "You counted prompt or padding: the numbers there mean nothing. Set them to 0 with the mask before you add.",
            lambda rewards, mask, gamma: _zero(mask, _to_go(rewards, torch.ones_like(mask), gamma)),
        ),
        Mistake(
            "Right on the response, but the prompt is not 0 in your answer: returns to go are asked for at response tokens.",
            lambda rewards, mask, gamma: _to_go(_zero(mask, rewards), torch.ones_like(mask), gamma),
        ),
    ),
    solution="token_mdp",
)


# ---- advantages


def _following(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) value of the state that each token leads to: 0 after the last response token."""
    return _moved(_zero(mask, values))


def _first(values: Tensor, mask: Tensor) -> Tensor:
    """(N, 1) value of the state in which the first response token is written."""
    return values.gather(1, mask.long().argmax(1, keepdim=True))


def _advantage(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return _zero(mask, rewards + gamma * _following(values, mask) - values)


def _advantage_cases() -> tuple[Case, ...]:
    rewards = torch.tensor([[7.0, 1.0, -0.5, 2.0, 0.25, 7.0], [7.0, 7.0, 0.75, -3.0, 7.0, 7.0]])
    values = torch.tensor([[5.0, 0.3, 1.2, -0.8, 0.6, 5.0], [5.0, 5.0, -1.1, 0.4, 5.0, 5.0]])
    mask = _response([".yyyy.", "..yy.."])
    single = {"rewards": torch.tensor([[2.0, 7.0]]), "values": torch.tensor([[0.5, 5.0]]), "mask": _response(["y."])}
    return (
        Case(
            {"rewards": rewards, "values": values, "mask": mask, "gamma": 1.0},
            "responses of 4 and 2 tokens, no discount",
        ),
        Case({"rewards": rewards, "values": values, "mask": mask, "gamma": 0.9}, "the same with gamma = 0.9"),
        Case({**single, "gamma": 0.9}, "a response of one token"),
    )


advantages = Exercise(
    name="advantages",
    title="Better than expected",
    what="Return the (N, T) advantages along some responses, "
    r"$A(s_t, y^t) = R(s_t, y^t) + \gamma V(s_{t+1}) - V(s_t)$, 0 outside the response. "
    "<code>rewards</code> and <code>mask</code> are as before; <code>values</code> (N, T) holds in column t the value "
    "$V(s_t)$ of the state in which token t is written. What follows the last response token is worth 0.",
    why="The advantage is the credit of a single token. Every token-level method of this course is about this difference.",
    difficulty=2,
    minutes=8,
    hints=(
        "The state after token t is the state before token t + 1: its value stands one column to the right.",
        "After the last response token nothing follows, so its value is 0, not what happens to stand in the padding.",
        "Set the values outside the response to 0, move them one column to the left and put a column of zeros at the right; "
        "then rewards + gamma * moved - values, and 0 outside the response.",
    ),
    right=_advantage,
    cases=_advantage_cases,
    mistakes=(
        Mistake(
            "The value after the end is not 0 in your answer: you read it from the padding. The episode is over there.",
            lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * _moved(values) - values),
        ),
        Mistake(
            "You look ahead from the wrong state: gamma multiplies the value of the state the token leads to, V(s_{t+1}), one "
            "column to the right.",
            lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * values - values),
        ),
        Mistake(
            "The two values have changed places: the state you arrive in counts with a plus, the one you leave with a minus.",
            lambda rewards, values, mask, gamma: _zero(mask, rewards + values - gamma * _following(values, mask)),
        ),
        Mistake(
            "That is Q, not A: subtract V(s_t), what you expected before you saw the token.",
            lambda rewards, values, mask, gamma: _zero(mask, rewards + gamma * _following(values, mask)),
        ),
        Mistake(
            "Your discount is off by one: the token's own reward counts in full; only the value of the next state waits.",
            lambda rewards, values, mask, gamma: _zero(mask, gamma * (rewards + _following(values, mask)) - values),
        ),
        Mistake(
            "You left the discount out: the value of the next state counts gamma times.",
            lambda rewards, values, mask, gamma: _advantage(rewards, values, mask, 1.0),
        ),
        Mistake(
            "You took what this one response earned afterwards: one sample. V(s_{t+1}) is the mean over all ways to go on.",
            lambda rewards, values, mask, gamma: _zero(mask, _to_go(rewards, mask, gamma) - values),
        ),
        Mistake(
            "You compare with the value of the start throughout: subtract V(s_t) of the state the token is written in.",
            lambda rewards, values, mask, gamma: _zero(
                mask, rewards + gamma * _following(values, mask) - _first(values, mask)
            ),
        ),
        Mistake(
            "Right on the response, but prompt and padding are not 0 in your answer: whoever sums it would count them.",
            lambda rewards, values, mask, gamma: rewards + gamma * _following(values, mask) - values,
        ),
    ),
    solution="token_mdp",
)


# ---- soft_backup


def _soft_backup(ref_logps: Tensor, q: Tensor, beta: float) -> Tensor:
    return beta * torch.logsumexp(ref_logps + q / beta, dim=-1)


def _paid_nothing(ref_logps: Tensor, q: Tensor, beta: float) -> Tensor:
    return ((ref_logps + q / beta).softmax(-1) * q).sum(-1)


def _soft_cases() -> tuple[Case, ...]:
    def case(logits: list, q: list, beta: float, words: str) -> Case:
        ref_logps, q = torch.tensor(logits).log_softmax(-1), torch.tensor(q, requires_grad=True)
        return Case({"ref_logps": ref_logps, "q": q, "beta": beta}, words)

    return (
        case([[0.0, 1.5, -0.5], [2.0, 0.0, -1.0]], [[1.0, -0.5, 0.3], [-0.2, 0.9, 1.4]], 0.5, "beta = 0.5"),
        case([[0.0, 1.5, -0.5], [2.0, 0.0, -1.0]], [[1.0, -0.5, 0.3], [-0.2, 0.9, 1.4]], 2.0, "beta = 2"),
        case([[[0.3, -1.0]], [[0.0, 1.0]]], [[[40.0, 39.8]], [[-40.0, 10.0]]], 0.1, "q / beta = 400, beyond exp"),
    )


soft_backup = Exercise(
    name="soft_backup",
    title="The soft maximum",
    what="Return the soft value of every state, "
    r"$V^*(s) = \beta \log \sum_a \pi_{\mathrm{ref}}(a|s)\, e^{Q^*(s,a)/\beta}$. "
    "<code>ref_logps</code> (..., V) holds $\\log \\pi_{\\mathrm{ref}}(a|s)$, <code>q</code> (..., V) holds $Q^*(s,a)$, "
    "<code>beta</code> is a number above 0; the answer has shape (...).",
    why="This one line, applied backwards through the tree, is the whole optimum that DPO, TDPO and TGDPO are derived from.",
    difficulty=2,
    minutes=6,
    hints=(
        "A weighted sum of exponentials is a sum of exponentials: move the weight into the exponent.",
        "exp(400) is infinite in float32. torch.logsumexp takes the logarithm of a sum of exponentials without forming it.",
        "<code>beta * torch.logsumexp(something + q / beta, dim=-1)</code>; what is the something?",
    ),
    right=_soft_backup,
    cases=_soft_cases,
    mistakes=(
        Mistake(
            "That is the plain maximum: what you get for beta = 0, where leaving the reference is free.",
            lambda ref_logps, q, beta: q.max(dim=-1).values,
        ),
        Mistake(
            "That is the reference's mean of Q: what you get for beta = infinity, where nobody dares to leave it.",
            lambda ref_logps, q, beta: (ref_logps.exp() * q).sum(-1),
        ),
        Mistake(
            "You forgot to weight with the reference: a token that pi_ref hardly writes counts as much as one it writes always.",
            lambda ref_logps, q, beta: beta * torch.logsumexp(q / beta, dim=-1),
        ),
        Mistake(
            "Beta stands on the wrong side: divide Q by it inside the exponential, multiply the logarithm by it outside.",
            lambda ref_logps, q, beta: torch.logsumexp(ref_logps + beta * q, dim=-1) / beta,
        ),
        Mistake(
            "The beta in front is missing: without it the result is no longer in units of reward.",
            lambda ref_logps, q, beta: torch.logsumexp(ref_logps + q / beta, dim=-1),
        ),
        Mistake(
            "The beta inside is missing: Q has to be divided by it before the exponential.",
            lambda ref_logps, q, beta: beta * torch.logsumexp(ref_logps + q, dim=-1),
        ),
        Mistake(
            "You averaged Q under pi* but forgot what pi* pays: the log-sum-exp has beta KL(pi* || pi_ref) subtracted already.",
            _paid_nothing,
        ),
        Mistake(
            "The formula is right, but exp overflows at q / beta = 400 and you get inf; torch.logsumexp does not.",
            lambda ref_logps, q, beta: beta * (ref_logps.exp() * (q / beta).exp()).sum(-1).log(),
        ),
        Mistake(
            "You added the reference's probabilities to the exponent; a weight becomes a summand there as its logarithm.",
            lambda ref_logps, q, beta: beta * torch.logsumexp(ref_logps.exp() + q / beta, dim=-1),
        ),
    ),
    solution="token_mdp",
)


# ---- token_credit


def _credit(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    return _zero(mask, beta * (logps - ref_logps))


def _spread(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float) -> Tensor:
    credit = _credit(logps, ref_logps, mask, beta)
    return _zero(mask, (credit.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(credit))


def _credit_cases() -> tuple[Case, ...]:
    logps = torch.tensor([[-9.0, -1.0, -0.5, -2.0, -9.0], [-9.0, -9.0, -0.7, -3.0, -1.5]])
    ref_logps = torch.tensor([[-4.0, -1.5, -0.2, -2.6, -4.0], [-4.0, -4.0, -1.9, -2.2, -1.6]])
    mask = _response([".yyy.", "..yyy"])
    endless = torch.full_like(logps, -torch.inf)

    def case(logps: Tensor, ref_logps: Tensor, words: str) -> Case:
        return Case({"logps": logps, "ref_logps": ref_logps, "mask": mask, "beta": 0.1}, words)

    hidden = torch.where(mask, logps, endless), torch.where(mask, ref_logps, endless)
    return case(logps, ref_logps, "beta = 0.1"), case(*hidden, "log-probabilities of -inf on the padding")


token_credit = Exercise(
    name="token_credit",
    title="The credit a trained policy gives",
    what=r"Return the (N, T) token rewards $\beta \log \frac{\pi(y^t|s_t)}{\pi_{\mathrm{ref}}(y^t|s_t)}$ that a trained policy "
    "implies, 0 outside the response. <code>logps</code> and <code>ref_logps</code> (N, T) are the log-probabilities of the "
    "tokens that were written; outside the response they may hold anything, even -inf.",
    why="It turns any DPO-trained model into a token reward model, for free. TGDPO is built on this number.",
    difficulty=1,
    minutes=4,
    hints=(
        "The logarithm of a ratio is a difference.",
        "-inf minus -inf is nan, and nan times 0 is nan: torch.where drops what a product cannot.",
        "<code>torch.where(mask, beta * (logps - ref_logps), 0.0)</code>",
    ),
    right=_credit,
    cases=_credit_cases,
    mistakes=(
        Mistake(
            "The reference is missing: a log-probability says how likely a token is, not what training thought of it.",
            lambda logps, ref_logps, mask, beta: _zero(mask, beta * logps),
        ),
        Mistake(
            "Policy and reference have changed places: a token that training made likelier must get a positive credit.",
            lambda logps, ref_logps, mask, beta: _credit(ref_logps, logps, mask, beta),
        ),
        Mistake(
            "Beta stands on the wrong side: the log-ratio is multiplied by it.",
            lambda logps, ref_logps, mask, beta: _zero(mask, (logps - ref_logps) / beta),
        ),
        Mistake(
            "Beta is missing: without it the log-ratio is in nats, not in units of reward.",
            lambda logps, ref_logps, mask, beta: _credit(logps, ref_logps, mask, 1.0),
        ),
        Mistake(
            "You took the ratio itself; its logarithm is asked for (a token left as it was must get 0).",
            lambda logps, ref_logps, mask, beta: _zero(mask, beta * (logps - ref_logps).exp()),
        ),
        Mistake(
            "You divided by the number of tokens. Credits add up to DPO's reward of the response: it is a sum, not a mean.",
            lambda logps, ref_logps, mask, beta: _credit(logps, ref_logps, mask, beta) / mask.sum(1, keepdim=True),
        ),
        Mistake(
            "You gave every token the same share of the response's log-ratio: then no token is told apart from another.",
            _spread,
        ),
        Mistake(
            "You multiplied by the mask: 0 times nan is nan. torch.where drops whatever stands outside the response.",
            lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps) * mask,
        ),
        Mistake(
            "Right on the response, but prompt and padding are not 0 in your answer: whoever sums it would count them.",
            lambda logps, ref_logps, mask, beta: beta * (logps - ref_logps),
        ),
    ),
    solution="token_mdp",
)


quiz = Quiz(
    (
        Question(
            "In most of reinforcement learning Q(s, a) averages over next states. Why is there no such average here?",
            (
                Option(
                    "Because gamma = 1.",
                    False,
                    "The discount says how much later rewards count; it has nothing to do with which state comes next.",
                ),
                Option(
                    "Because the next state is the prefix with the token appended, nothing else.",
                    True,
                    "Transitions are deterministic: all randomness is in the choice of the token, and Q has fixed that choice.",
                ),
                Option(
                    "Because the reward is a sum over tokens.",
                    False,
                    "That makes the reward a return. With random transitions Q would still need an average over next states.",
                ),
            ),
        ),
        Question(
            "You let beta grow without bound. What does the soft value V*(s) become?",
            (
                Option(
                    "The largest return that can be reached from s.",
                    False,
                    "That is the other end, beta towards 0, where leaving the reference costs nothing.",
                ),
                Option(
                    "Infinity: there is a beta in front of the logarithm.",
                    False,
                    "The logarithm shrinks as 1 / beta at the same time; the product tends to the mean of Q under pi_ref.",
                ),
                Option(
                    "The value of s under pi_ref.",
                    True,
                    "Leaving the reference costs too much, so nobody does, and what is left is the reference's mean return.",
                ),
            ),
        ),
        Question(
            "At the exact optimum a token with a negative reward R(s, a) has a positive credit beta log(pi*/pi_ref). A bug?",
            (
                Option(
                    "Yes: the optimum lowers every token with a negative reward.",
                    False,
                    "Only a myopic policy would. The optimum looks at the rest of the response too.",
                ),
                Option(
                    "No: the credit also counts how the prospects change, V*(s') - V*(s).",
                    True,
                    "A token may cost something and still open the way to a better ending. The log-ratio is an advantage, not R.",
                ),
                Option(
                    "No: rewards are identified only up to their sign.",
                    False,
                    "The sign of a response's reward gap is the very thing a preference shows.",
                ),
            ),
        ),
        Question(
            "Two tables of token rewards give every complete response the same total. What tells them apart?",
            (
                Option(
                    "The preferences: a chosen response shows which tokens were good.",
                    False,
                    "A preference shows which total was larger. How the total was split is not in the data.",
                ),
                Option(
                    "pi*: it puts more weight on the tokens that are rewarded.",
                    False,
                    "It puts more weight on the responses with the larger total, and those are the same under both tables.",
                ),
                Option(
                    "Neither the preferences nor pi* do; only the credit of single tokens differs.",
                    True,
                    "They differ by a potential. Sums over whole responses are all that Bradley-Terry and the optimum see.",
                ),
            ),
        ),
        Question(
            "A DPO-trained model ranks held-out pairs well, but its token credits follow the true ones only loosely. And now?",
            (
                Option(
                    "It is a usable but noisy token reward: right on average, unreliable for a single token.",
                    True,
                    "Totals are trained and identified, their split is neither. Average over many tokens, or measure first.",
                ),
                Option(
                    "The loss is broken: DPO should recover R at every token.",
                    False,
                    "Even at its exact optimum DPO recovers the soft advantage, and that is not R.",
                ),
                Option(
                    "Token credits from DPO are worthless.",
                    False,
                    "You measured a correlation whose interval lies clearly above 0: there is signal in them.",
                ),
            ),
        ),
    )
)

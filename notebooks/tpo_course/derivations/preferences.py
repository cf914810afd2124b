"""Derivation 1: what preferences say about rewards, and what they cannot say."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Derivation, Hyper, Step
from tpo_course.world import TokenWorld

BT = "Bradley and Terry 1952"
DPO = "DPO, arXiv 2305.18290"


def _noise(world: TokenWorld, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(world.seed + 1), dtype=torch.float64)


def _win_matrix(world: TokenWorld, rewards: Tensor) -> Tensor:
    """(P, n, n) probability that response i beats response j."""
    r = world.by_prompt(rewards)
    return torch.sigmoid(r[:, :, None] - r[:, None, :])


def bradley_terry(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    strength = w.returns.exp()
    chosen, rejected = strength[w.pairs.chosen], strength[w.pairs.rejected]
    return w.pairs.prob, chosen / (chosen + rejected)


def log_odds(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    wins = _win_matrix(w, w.returns)
    r = w.by_prompt(w.returns)
    return wins.log() - wins.mT.log(), r[:, :, None] - r[:, None, :]


def cross_entropy(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    guess = _noise(w, len(w.returns))
    p, d = w.pairs.prob, tools.gap(w, guess)
    q = torch.sigmoid(-tools.gap(w, w.returns))  # 1 - p
    drawn = w.pairs.weight / p / 2
    divergence = drawn * (p * (p.log() - F.logsigmoid(d)) + q * (q.log() - F.logsigmoid(-d)))
    return tools.nll(w, guess), tools.preference_entropy(w) + divergence.sum()


def likelihood_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    guess = _noise(w, len(w.returns))
    drawn = w.pairs.weight / w.pairs.prob
    surplus = drawn * (w.pairs.prob - torch.sigmoid(tools.gap(w, guess)))
    by_hand = -torch.zeros_like(guess).index_add(0, w.pairs.chosen, surplus)
    return tools.gradient(lambda r: tools.nll(w, r), guess), by_hand


def maximum_likelihood(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    truth = w.by_prompt(w.returns)[0, :40]
    share = w.by_prompt(w.sequence_logps(w.ref_logps)).exp()[0, :40]
    fitted = fit_rewards(torch.sigmoid(truth[:, None] - truth), share)
    return fitted - fitted[0], truth - truth[0]


def shift(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    f = 3 * _noise(w, w.num_prompts)
    return _win_matrix(w, w.returns), _win_matrix(w, w.returns + f[w.responses.prompt])


def canonical(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.by_prompt(w.sequence_logps(w.ref_logps)).exp()  # (P, n)
    r = w.by_prompt(w.returns)
    wins = _win_matrix(w, w.returns)
    log_odds = wins.log() - wins.mT.log()  # (P, n, n), all that preferences reveal
    return r - (ref * r).sum(-1, keepdim=True), (log_odds * ref[:, None, :]).sum(-1)


def fit_rewards(wins: Tensor, share: Tensor, rounds: int = 60) -> Tensor:
    """(n,) rewards that maximise the Bradley-Terry likelihood, the first held at 0, by Newton's method from 0.

    Args:
        wins: (n, n) probability that i beats j.
        share: (n,) how often each response is drawn.
    """
    rewards = torch.zeros_like(share)

    def loss(r: Tensor) -> Tensor:
        return -(share[:, None] * share * wins * F.logsigmoid(r[:, None] - r)).sum()

    for _ in range(rounds):
        guess = torch.sigmoid(rewards[:, None] - rewards)
        surplus = (share * (wins - guess)).sum(-1)  # each row divided by its share, which keeps rare rows accurate
        weights = share * guess * guess.mT
        step = torch.zeros_like(rewards)
        step[1:] = torch.linalg.solve((weights.sum(-1).diag() - weights)[1:, 1:], surplus[1:])
        before = loss(rewards)
        while loss(rewards + step) > before + 1e-13 and step.abs().max() > 1e-6:
            step = step / 2
        rewards = rewards + step
    return rewards


def _symbolic_sigmoid() -> object:
    import sympy as sp

    a, b = sp.symbols("r_w r_l", real=True)
    return sp.simplify(sp.exp(a) / (sp.exp(a) + sp.exp(b)) - 1 / (1 + sp.exp(-(a - b))))


def _symbolic_shift() -> object:
    import sympy as sp

    a, b, f = sp.symbols("r_w r_l f", real=True)
    wins = sp.exp(a) / (sp.exp(a) + sp.exp(b))
    return sp.simplify(wins.subs({a: a + f, b: b + f}, simultaneous=True) - wins)


PREFERENCES = Derivation(
    name="preferences",
    title="From preferences to rewards",
    question="You only see which of two answers people preferred. Which reward does that pin down?",
    assumptions=(
        "Bradley-Terry: the answer depends on the reward gap alone",
        "both responses are drawn from pi_ref and differ",
    ),
    source=f"{BT}; {DPO}",
    steps=(
        Step(
            title="The Bradley-Terry model",
            latex=r"P(y_w \succ y_l \mid x) = \sigma\bigl(r(x,y_w) - r(x,y_l)\bigr) = \frac{e^{r(x,y_w)}}{e^{r(x,y_w)} + e^{r(x,y_l)}}",
            words="Give each response a strength exp(r). The chance to win is its share of the two strengths: a softmax "
            "over two, which is a sigmoid of the gap.",
            sides=bradley_terry,
            assumption="Preferences are noisy comparisons of one number per response.",
            source=BT,
            implements="tpo_course.world.TokenWorld.pair_chunks",
            changed=r"\sigma\bigl(r(x,y_w) - r(x,y_l)\bigr)",
            symbolic=_symbolic_sigmoid,
        ),
        Step(
            title="Log-odds are reward gaps",
            latex=r"\log \frac{P(y_w \succ y_l \mid x)}{P(y_l \succ y_w \mid x)} = r(x,y_w) - r(x,y_l)",
            words="Turn the equation round: if you knew the probabilities, you could read off every reward gap.",
            sides=log_odds,
            source=BT,
            changed=r"r(x,y_w) - r(x,y_l)",
        ),
        Step(
            title="Maximum likelihood is a cross-entropy",
            latex=r"\mathbb{E}\bigl[-\log \sigma(\hat r(x,y_w) - \hat r(x,y_l))\bigr] = \mathbb{E}\bigl[H(P)\bigr] "
            r"+ \mathbb{E}\bigl[\operatorname{KL}(P \,\|\, \hat P)\bigr]",
            words="The loss of any reward model r̂ splits into the annotators' own noise, which you cannot remove, and the "
            "distance between their probabilities and yours, which you can. It is the cross-entropy you know, on two classes.",
            sides=cross_entropy,
            source=DPO,
            changed=r"\operatorname{KL}(P \,\|\, \hat P)",
        ),
        Step(
            title="Its gradient",
            latex=r"\frac{\partial L}{\partial \hat r(x,y)} = -\sum_{y'} p(x,y,y') \bigl[P(y \succ y') - \hat P(y \succ y')\bigr]",
            words="You push a response up by as much as it wins more often than your model expects. The gradient is zero where "
            "model and annotators agree. Here p(x,y,y') says how often the two meet.",
            sides=likelihood_gradient,
            source=DPO,
            changed=r"\bigl[P(y \succ y') - \hat P(y \succ y')\bigr]",
        ),
        Step(
            title="What the fit finds",
            latex=r"\hat r(x,y) - \hat r(x,y_0) = r(x,y) - r(x,y_0)",
            words="Start at zero, fit to the end, compare: every reward gap is found. (One prompt, up to 40 of its "
            "responses, Newton's method.)",
            sides=maximum_likelihood,
            assumption="Infinite data, and every response has a chance to be drawn.",
            source=DPO,
            implements="tpo_course.derivations.preferences.fit_rewards",
            changed=r"\hat r(x,y) - \hat r(x,y_0)",
        ),
        Step(
            title="A shift per prompt is invisible",
            latex=r"r'(x,y) = r(x,y) + f(x) \;\Rightarrow\; P'(y_w \succ y_l \mid x) = P(y_w \succ y_l \mid x)",
            words="Add any number that depends on the prompt alone: both responses gain it, the gap stays. Preferences cannot "
            "tell the two rewards apart. This freedom is what DPO will use to get rid of Z(x).",
            sides=shift,
            source=DPO,
            changed=r"f(x)",
            symbolic=_symbolic_shift,
        ),
        Step(
            title="And nothing else is",
            latex=r"r(x,y) - \mathbb{E}_{y' \sim \pi_{\mathrm{ref}}}[r(x,y')] = \mathbb{E}_{y' \sim \pi_{\mathrm{ref}}}"
            r"\left[\log \frac{P(y \succ y' \mid x)}{P(y' \succ y \mid x)}\right]",
            words="Fix the free number by asking that rewards average to zero under the reference. What is left can be computed "
            "from the preferences alone: they pin down the reward up to f(x), no less and no more.",
            sides=canonical,
            source=DPO,
            changed=r"\mathbb{E}_{y' \sim \pi_{\mathrm{ref}}}[r(x,y')]",
        ),
    ),
)

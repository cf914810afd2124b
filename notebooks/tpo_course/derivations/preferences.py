"""Derivation 1: what preferences say about rewards, and what they cannot say."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.world import TokenWorld


def _noise(world: TokenWorld, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(world.seed + 1), dtype=torch.float64)


def _win_matrix(world: TokenWorld) -> Tensor:
    """(P, n, n) the annotators' probability that response i beats response j, 1/2 on the diagonal."""
    count = len(world.returns) // world.num_prompts
    wins = torch.full((len(world.returns), count), 0.5, dtype=torch.float64)
    index = (world.pairs.chosen, world.pairs.rejected % count)
    return wins.index_put(index, world.pairs.prob).view(world.num_prompts, count, count)


def bradley_terry(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    strength = w.returns.exp()
    chosen, rejected = strength[w.pairs.chosen], strength[w.pairs.rejected]
    return w.pairs.prob, chosen / (chosen + rejected)


def log_odds(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    wins, r = _win_matrix(w), w.by_prompt(w.returns)
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
    fitted = fit_rewards(_win_matrix(w)[0, :40, :40], share)
    return fitted - fitted[0], truth - truth[0]


def shift(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    b = 3 * _noise(w, w.num_prompts)
    moved = w.by_prompt(w.returns + b[w.responses.prompt])
    return _win_matrix(w), torch.sigmoid(moved[:, :, None] - moved[:, None, :])


def canonical(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.by_prompt(w.sequence_logps(w.ref_logps)).exp()  # (P, n)
    wins, r = _win_matrix(w), w.by_prompt(w.returns)
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


STEPS = (
    Step(bradley_terry, implements="tpo_course.world.TokenWorld.pair_chunks", symbolic=_symbolic_sigmoid),
    Step(log_odds),
    Step(cross_entropy),
    Step(likelihood_gradient),
    Step(maximum_likelihood, implements="tpo_course.derivations.preferences.fit_rewards"),
    Step(shift, symbolic=_symbolic_shift),
    Step(canonical),
)

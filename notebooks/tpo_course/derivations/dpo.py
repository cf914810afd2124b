"""Derivation 2: from reward maximisation under a KL penalty to DPO."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.tabular import fit_tabular
from tpo_course.world import TokenWorld

BETAS = (0.1, 0.5, 1.0, 5.0)


def gibbs(w: TokenWorld, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """log pi*(y|x) and log Z(x), (P, n) and (P,): the Gibbs distribution over whole responses."""
    unnormalised = w.by_prompt(w.sequence_logps(w.ref_logps)) + w.by_prompt(w.returns) / beta
    log_z = unnormalised.logsumexp(-1)
    return unnormalised - log_z[:, None], log_z


def optimum(w: TokenWorld, beta: float) -> Tensor:
    """(S, V) the token probabilities of that distribution."""
    return w.factorise(gibbs(w, beta)[0].flatten())


def by_tokens(w: TokenWorld, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """The same optimum without enumerating responses: log pi*(a|s) (S, V) and log Z(x) (P,), from one pass over tokens.

    It reads R(s, a) where `gibbs` reads r(x, y), so the two check each other. The KL of whole responses carries no discount: gamma moves into the rewards.
    """
    ref = w.ref_logps

    def soft_maximum(q: Tensor, rows: slice) -> Tensor:
        return beta * (ref[rows] + q / beta).logsumexp(-1)

    soft = w.backup(w.reward * w.discount[:, None], soft_maximum, gamma=1.0)
    return ref + soft.a / beta, soft.v[: w.num_prompts] / beta


def _sequence_objective(w: TokenWorld, logps: Tensor, beta: float) -> Tensor:
    """(P,) E_{y~pi}[r - beta log(pi(y)/pi_ref(y))], summed over all responses."""
    probs = w.by_prompt(w.sequence_logps(logps)).exp()
    return (probs * w.by_prompt(w.returns - beta * tools.logratio(w, logps))).sum(-1)


def chain_rule(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    whole = w.expected(_sequence_objective(w, pi, h.beta))
    return whole, w.expected(w.values(pi).v) - h.beta * (w.visits(pi) * w.kl(pi, w.ref_logps)).sum()


def objective_gap(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(2)
    log_pi = w.by_prompt(w.sequence_logps(pi))  # (P, n)
    log_star, log_z = w.by_prompt(w.sequence_logps(by_tokens(w, h.beta)[0])), gibbs(w, h.beta)[1]
    divergence = (log_pi.exp() * (log_pi - log_star)).sum(-1)
    return _sequence_objective(w, pi, h.beta), h.beta * log_z - h.beta * divergence


def optimum_value(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.by_prompt(w.sequence_logps(w.ref_logps)).exp()
    mean = (ref * (w.by_prompt(w.returns) / h.beta).exp()).sum(-1)  # E_ref exp(r / beta)
    attained = _sequence_objective(w, by_tokens(w, h.beta)[0], h.beta)
    return attained.expand(2, -1), torch.stack([h.beta * gibbs(w, h.beta)[1], h.beta * mean.log()])


def no_policy_is_better(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    scores = _best_attempts(w, h.beta)
    return scores, w.expected(h.beta * gibbs(w, h.beta)[1]).expand_as(scores)


def _best_attempts(w: TokenWorld, beta: float) -> Tensor:
    """J of 40 random policies, of the reference, and of what gradient ascent makes of two of them."""

    def score(pi: Tensor) -> Tensor:
        return w.expected(_sequence_objective(w, pi, beta))

    tried = [w.ref_logps, *tools.rivals(w)]
    climbed = tools.ascend(score, [w.ref_logps, w.random_policy(1, 3.0)])
    return torch.stack([score(pi) for pi in [*tried, *climbed]])


def _closest_attempt(w: TokenWorld, h: Hyper) -> dict[str, float]:
    below = w.expected(h.beta * gibbs(w, h.beta)[1]) - _best_attempts(w, h.beta)
    return {
        "closest random policy, below the bound by": float(below[:-2].min()),
        "closest after gradient ascent": float(below[-2:].min()),
    }


def reparametrisation(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = w.sequence_logps(by_tokens(w, h.beta)[0])
    ref = w.sequence_logps(w.ref_logps)
    return w.returns, h.beta * (star - ref) + h.beta * gibbs(w, h.beta)[1][w.responses.prompt]


def z_cancels(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    u = h.beta * tools.logratio(w, by_tokens(w, h.beta)[0])
    return w.pairs.prob, torch.sigmoid(u[w.pairs.chosen] - u[w.pairs.rejected])


def loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(3)
    margin = h.beta * tools.gap(w, tools.logratio(w, pi))
    return w.expected_loss("dpo", pi, beta=h.beta), tools.mean_over_pairs(w, -F.logsigmoid(margin))


def loss_minimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = optimum(w, h.beta)
    return tools.at_rest(w, lambda z: w.expected_loss("dpo", z, beta=h.beta), star)


def gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(4)
    # how wrong the policy still is about each pair
    wrong = torch.sigmoid(-h.beta * tools.gap(w, tools.logratio(w, pi)))
    pull = -h.beta * w.pairs.weight * wrong
    by_hand = tools.score(w, pi, tools.onto_responses(w, pull, -pull))
    return tools.loss_gradient(w, "dpo", pi, beta=h.beta), by_hand


def one_coefficient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(5)
    wrong = torch.sigmoid(-h.beta * tools.gap(w, tools.logratio(w, pi)))[:, None]  # (B, 1)
    mask = w.responses.mask.double()
    by_hand = torch.cat([-h.beta * wrong * mask[w.pairs.chosen], h.beta * wrong * mask[w.pairs.rejected]])
    found = tools.pushes(w, "dpo", pi, beta=h.beta)
    return torch.cat([found.chosen.logps, found.rejected.logps]), by_hand


def beta_at_the_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    def divergence(beta: Tensor, prompt: int) -> Tensor:
        star, _ = by_tokens(w, beta)
        return tools.per_prompt(w, w.visits(star) * w.kl(star, w.ref_logps))[prompt] / w.prompt_probs[prompt]

    beta = torch.tensor(h.beta, dtype=torch.float64)
    slope = torch.stack([tools.gradient(lambda b, i=i: divergence(b, i), beta) for i in range(w.num_prompts)])  # (P,)
    star = gibbs(w, h.beta)[0].exp()
    r = w.by_prompt(w.returns)
    variance = (star * r.square()).sum(-1) - (star * r).sum(-1).square()
    return slope * h.beta**3, -variance


def _kl_at_the_optimum(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {beta: tools.mean_seq_kl(w, optimum(w, beta), w.ref_logps) for beta in BETAS}
    return {f"KL(pi*||pi_ref) at beta={beta:g}": float(kl) for beta, kl in found.items()}


def beta_in_the_first_step(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.ref_logps
    pull = -h.beta / 2 * w.pairs.weight
    by_hand = tools.score(w, ref, tools.onto_responses(w, pull, -pull))
    return tools.loss_gradient(w, "dpo", ref, beta=h.beta), by_hand


def _kl_after_ten_steps(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for beta in BETAS[:3]:
        fit = fit_tabular(w, "dpo", steps=10, optimizer="sgd", lr=0.5, beta=beta)
        moved = tools.mean_seq_kl(w, fit.policy.logps(), w.ref_logps)
        found[f"KL(pi||pi_ref) after 10 gradient steps at beta={beta:g}"] = float(moved)
    return found


def _symbolic_cancel() -> object:
    import sympy as sp

    beta, z, w, rw, l, rl = sp.symbols("beta Z pi_w ref_w pi_l ref_l", positive=True)

    def reward(pi: object, ref: object) -> object:
        return beta * sp.log(pi / ref) + beta * sp.log(z)

    return sp.simplify(sp.expand_log(reward(w, rw) - reward(l, rl) - beta * sp.log(w / rw) + beta * sp.log(l / rl)))


def _symbolic_slope() -> object:
    import sympy as sp

    m = sp.symbols("m", real=True)
    beta = sp.symbols("beta", positive=True)

    def sigma(x: object) -> object:
        return 1 / (1 + sp.exp(-x))

    return sp.simplify(sp.diff(-sp.log(sigma(beta * m)), m) + beta * sigma(-beta * m))


STEPS = (
    Step(chain_rule, implements="tpo_course.derivations.tools.objective"),
    Step(objective_gap),
    Step(optimum_value, implements="tpo_course.world.TokenWorld.soft_optimum"),
    Step(no_policy_is_better, relation="<=", numbers=_closest_attempt),
    Step(reparametrisation),
    Step(z_cancels, symbolic=_symbolic_cancel),
    Step(loss, implements="tpo_lib.losses.dpo"),
    Step(loss_minimum, implements="tpo_course.tabular.fit_tabular"),
    Step(gradient, symbolic=_symbolic_slope),
    Step(one_coefficient),
    Step(beta_at_the_optimum, numbers=_kl_at_the_optimum),
    Step(beta_in_the_first_step, numbers=_kl_after_ten_steps),
)

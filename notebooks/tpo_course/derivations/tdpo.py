"""Derivation 4: TDPO, from policy improvement to the sequential KL in the loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.tabular import fit_tabular
from tpo_course.world import TokenWorld, Values


def policy_improvement(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    left, right = [], []
    for pi in (w.ref_logps, w.random_policy(9), w.random_policy(9, 3.0)):
        old = w.values(pi)
        tilted = (pi + old.a / h.beta).log_softmax(-1)
        for new in (tilted, *tools.rivals(w, 4), *_climbed(w, old)):
            better = improved(old.a, new)
            left += [torch.zeros_like(old.v), old.v]
            right += [(better.exp() * old.a).sum(-1), w.values(better).v]  # the premise, the conclusion
    return torch.stack(left), torch.stack(right)


def improved(advantage: Tensor, logps: Tensor) -> Tensor:
    """(S, V) a policy that meets the premise: where logps would lose advantage, mixed with the best token until it gains 0."""
    probs = logps.exp()
    gain, best = (probs * advantage).sum(-1), advantage.max(-1)
    tiny = 1e-300  # where the policy is deterministic already
    share = (-gain / (best.values - gain).clamp_min(tiny)).clamp(0, 1)[:, None]  # of the best token
    mixed = (1 - share) * probs + share * F.one_hot(best.indices, logps.shape[-1])
    return mixed.clamp_min(tiny).log()


def _climbed(w: TokenWorld, old: Values) -> list[Tensor]:
    """What gradient ascent on V_pi - V_pi' finds among policies that meet the premise."""

    def lost(logps: Tensor) -> Tensor:
        return (old.v - w.values(improved(old.a, logps)).v).sum()

    return tools.ascend(lost, [w.random_policy(8)])


def _closest_to_worse(w: TokenWorld, h: Hyper) -> dict[str, float]:
    before, after = policy_improvement(w, h)
    gained = (after - before)[1::2].sum(-1).view(3, -1)  # over all states: (old policies, new ones)
    return {
        "smallest total gain of a random policy": float(gained[:, :-1].min()),
        "after gradient ascent against it": float(gained[:, -1].max()),
    }


def state_objective(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, values = w.random_policy(2), w.values(w.ref_logps)
    star, log_z = w.gibbs(values.q / h.beta)
    left = (pi.exp() * _advantages(w, w.ref_logps)).sum(-1) - h.beta * w.kl(pi, w.ref_logps)  # (2, S)
    return left, (h.beta * log_z - values.v - h.beta * w.kl(pi, star)).expand_as(left)


def _advantages(w: TokenWorld, logps: Tensor) -> Tensor:
    """(2, S, V) A of a policy twice: by recursion, and from every way to finish every response."""
    return torch.stack([w.values(logps).a, tools.enumerated(w, logps).a])


def closed_form(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    advantage = w.values(w.ref_logps).a

    def total(logits: Tensor) -> Tensor:
        pi = logits.log_softmax(-1)
        return ((pi.exp() * advantage).sum(-1) - h.beta * w.kl(pi, w.ref_logps)).sum()

    star = w.one_step_optimum(h.beta)
    by_a = w.ref_logps.exp() * (advantage / h.beta).exp()
    log_z = w.gibbs(w.values(w.ref_logps).q / h.beta)[1]
    by_q = w.ref_logps.exp() * (tools.enumerated(w, w.ref_logps).q / h.beta - log_z[:, None]).exp()
    left = torch.cat([star.exp(), star.exp(), tools.gradient(total, star)])
    return left, torch.cat([by_a / by_a.sum(-1, keepdim=True), by_q, torch.zeros_like(star)])


def regret_preference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    margins = [tools.gap(w, w.along(w.values(pi).a, gamma=w.gamma)) for pi in (w.ref_logps, w.random_policy(3))]
    return w.pairs.prob.expand(2, -1), torch.sigmoid(torch.stack(margins))


def value_and_partition(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    values = w.values(w.ref_logps)
    star, log_z = w.gibbs(values.q / h.beta)
    return values.v, h.beta * log_z - h.beta * w.kl(w.ref_logps, star)


def advantage_from_policy(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star, q = w.one_step_optimum(h.beta), tools.enumerated(w, w.ref_logps).q
    ratio = h.beta * (star - w.ref_logps)
    a = ratio + h.beta * w.kl(w.ref_logps, star)[:, None]
    log_z = w.gibbs(w.values(w.ref_logps).q / h.beta)[1]
    return torch.cat([_advantages(w, w.ref_logps), q[None]]), torch.stack([a, a, ratio + h.beta * log_z[:, None]])


def reward_from_policy(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = w.one_step_optimum(h.beta)
    seq_kl = w.along(w.kl(w.ref_logps, star), gamma=w.gamma)
    start = w.values(w.ref_logps).v[w.responses.prompt]
    total = h.beta * w.along(star - w.ref_logps, gamma=w.gamma) + h.beta * seq_kl
    summed = w.along(w.values(w.ref_logps).a, gamma=w.gamma)
    return torch.stack([w.returns, start + summed]), (start + total).expand(2, -1)


def u_and_delta(w: TokenWorld, logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(B,) u and delta of every pair, from whole responses."""
    seq_kl = w.seq_kl(w.ref_logps, logps)
    return beta * tools.gap(w, tools.logratio(w, logps)), -beta * tools.gap(w, seq_kl)  # delta: rejected minus chosen


def margin(w: TokenWorld, logps: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """(B,) u - alpha delta of every pair."""
    u, delta = u_and_delta(w, logps, beta)
    return u - alpha * delta


def preference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = w.one_step_optimum(h.beta)
    u, delta = u_and_delta(w, star, h.beta)
    return w.pairs.prob, torch.sigmoid(u - delta)


def _discount_error(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for gamma in (1.0, 0.9, 0.5):
        other = w.with_gamma(gamma)
        claimed = torch.sigmoid(margin(other, other.one_step_optimum(h.beta), h.beta))
        found[f"largest error of the probability at gamma={gamma:g}"] = float((claimed - other.pairs.prob).abs().max())
    return found


def tdpo1_loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(4)
    u, delta = u_and_delta(w, pi, h.beta)
    return w.expected_loss("tdpo1", pi, beta=h.beta), tools.mean_over_pairs(w, -F.logsigmoid(u - delta))


def tdpo1_minimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = w.one_step_optimum(h.beta)
    return tools.at_rest(w, lambda z: w.expected_loss("tdpo1", z, beta=h.beta), star)


def _tdpo2_moves_on(w: TokenWorld, h: Hyper) -> dict[str, float]:
    star, found = w.one_step_optimum(h.beta), {}
    found["steepest slope of tdpo1 at pi*_one"] = float(tools.loss_gradient(w, "tdpo1", star, beta=h.beta).abs().max())
    for alpha in (0.5, 1.0):
        slope = tools.loss_gradient(w, "tdpo2", star, beta=h.beta, alpha=alpha)
        found[f"steepest slope of tdpo2 at pi*_one, alpha={alpha:g}"] = float(slope.abs().max())
    return found


def margin_is_linear(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    logits = 2 * w.random_policy(5) + w.depth[:, None]  # not normalised on purpose
    stats = w.stats(logits)
    p = w.ref_logps.exp()
    entropy = -(p * w.ref_logps).sum(-1, keepdim=True)
    pi = logits.log_softmax(-1)
    margins = torch.stack([stats.logps + stats.kl, w.tokenwise(pi + w.kl(w.ref_logps, pi)[:, None])])
    return margins, w.tokenwise(logits - (p * logits).sum(-1, keepdim=True) - entropy).expand_as(margins)


def tdpo1_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(6)
    pull = -h.beta * w.pairs.weight * torch.sigmoid(-margin(w, pi, h.beta))
    # e_y - pi_ref at every token: the score of pi_ref, whatever pi is.
    by_hand = tools.score(w, w.ref_logps, tools.onto_responses(w, pull, -pull))
    return tools.loss_gradient(w, "tdpo1", pi, beta=h.beta), by_hand


def rewards_kl_of_chosen(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(7)
    wrong = torch.sigmoid(-margin(w, pi, h.beta))
    found = tools.pushes(w, "tdpo1", pi, beta=h.beta)
    left = torch.cat([found.chosen.kl, found.rejected.kl])[:, 0]  # the first token's: every response has one
    return left, torch.cat([-h.beta * wrong, h.beta * wrong])


def _kl_of_chosen_in_training(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for name, hyper in (("dpo", {}), ("tdpo1", {}), ("tdpo2", {"alpha": 1.0})):
        fit = fit_tabular(w, name, steps=100, optimizer="adam", beta=h.beta, **hyper)
        chosen_kl = w.seq_kl(w.ref_logps, fit.policy.logps())[w.pairs.chosen]
        found[f"SeqKL of the chosen after 100 steps of {name}"] = float(tools.mean_over_pairs(w, chosen_kl))
    return found


def stop_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(8)
    both = tools.loss_gradient(w, "tdpo1", pi, beta=h.beta)
    stopped = tools.loss_gradient(w, "tdpo2", pi, beta=h.beta, alpha=1.0)
    pull = -h.beta * w.pairs.weight * torch.sigmoid(-margin(w, pi, h.beta))
    chosen_kl = tools.kl_score(w, pi, tools.onto_responses(w, pull, torch.zeros_like(pull)))
    values = [w.expected_loss("tdpo1", pi, beta=h.beta), w.expected_loss("tdpo2", pi, beta=h.beta, alpha=1.0)]
    left = torch.cat([(both - stopped).flatten(), values[0][None]])
    return left, torch.cat([chosen_kl.flatten(), values[1][None]])


def tdpo2_loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(9)
    u, delta = u_and_delta(w, pi, h.beta)
    by_hand = tools.mean_over_pairs(w, -F.logsigmoid(u - h.alpha * delta))
    return w.expected_loss("tdpo2", pi, beta=h.beta, alpha=h.alpha), by_hand


def tdpo2_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(10)
    pull = -h.beta * w.pairs.weight * torch.sigmoid(-margin(w, pi, h.beta, h.alpha))
    likelihood = tools.score(w, pi, tools.onto_responses(w, pull, -pull))
    rejected_kl = tools.kl_score(w, pi, tools.onto_responses(w, torch.zeros_like(pull), -h.alpha * pull))
    return tools.loss_gradient(w, "tdpo2", pi, beta=h.beta, alpha=h.alpha), likelihood + rejected_kl


def one_step_is_not_optimal(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    one = w.one_step_optimum(h.beta)
    soft, star = w.soft_optimum(h.beta)
    lost = h.beta * (w.visits(one) * w.discount * w.kl(one, star)).sum()
    return w.expected(soft.v) - tools.objective(w, one, h.beta), lost


def _three_policies(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {"J(pi_ref)": float(tools.objective(w, w.ref_logps, h.beta))}
    for beta in (0.1, 0.5, 1.0, 5.0):
        found[f"J(one-step pi*) at beta={beta:g}"] = float(tools.objective(w, w.one_step_optimum(beta), beta))
        found[f"J(optimum) at beta={beta:g}"] = float(w.expected(w.soft_optimum(beta)[0].v))
    return found


def _symbolic_log_sum_exp_cancels() -> object:
    import sympy as sp

    z = sp.symbols("z1:4", real=True)
    p1, p2 = sp.symbols("p1 p2", positive=True)
    p = (p1, p2, 1 - p1 - p2)
    norm = sp.symbols("L", real=True)  # log-sum-exp of the logits
    logps = [x - norm for x in z]
    kl = sum(a * (sp.log(a) - b) for a, b in zip(p, logps, strict=True))
    entropy = -sum(a * sp.log(a) for a in p)
    mean = sum(a * x for a, x in zip(p, z, strict=True))
    return sp.simplify(sp.expand(logps[0] + kl - (z[0] - mean - entropy)))


def _symbolic_kl_slope() -> object:
    import sympy as sp

    u, kw, kl = sp.symbols("u k_w k_l", real=True)
    beta = sp.symbols("beta", positive=True)
    m = u - beta * (kl - kw)
    return sp.simplify(sp.diff(-sp.log(1 / (1 + sp.exp(-m))), kw) + beta / (1 + sp.exp(m)))


STEPS = (
    Step(policy_improvement, relation="<=", numbers=_closest_to_worse),
    Step(state_objective),
    Step(closed_form, implements="tpo_course.world.TokenWorld.one_step_optimum"),
    Step(regret_preference),
    Step(value_and_partition),
    Step(advantage_from_policy),
    Step(reward_from_policy),
    Step(preference, gamma_one=True, numbers=_discount_error),
    Step(tdpo1_loss, implements="tpo_lib.losses.tdpo1"),
    Step(tdpo1_minimum, gamma_one=True, implements="tpo_lib.losses.tdpo1", numbers=_tdpo2_moves_on),
    Step(margin_is_linear, implements="tpo_lib.stats.token_stats", symbolic=_symbolic_log_sum_exp_cancels),
    Step(tdpo1_gradient, implements="tpo_lib.losses.tdpo1"),
    Step(
        rewards_kl_of_chosen,
        implements="tpo_lib.losses.tdpo1",
        symbolic=_symbolic_kl_slope,
        numbers=_kl_of_chosen_in_training,
    ),
    Step(stop_gradient, implements="tpo_lib.losses.tdpo2"),
    Step(tdpo2_loss, implements="tpo_lib.losses.tdpo2"),
    Step(tdpo2_gradient, implements="tpo_lib.losses.tdpo2"),
    Step(one_step_is_not_optimal, implements="tpo_course.world.TokenWorld.one_step_optimum", numbers=_three_policies),
)

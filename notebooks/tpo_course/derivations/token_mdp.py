"""Derivation 3: the token MDP, and why DPO was a token-level method all along."""

import torch
from torch import Tensor

from tpo_course.derivations import dpo, tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.world import TokenWorld


def returns_by_token(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    whole = (w.by_prompt(w.sequence_logps(pi)).exp() * w.by_prompt(w.returns)).sum(-1)
    left = torch.cat([whole, w.returns])
    return left, torch.cat([w.values(pi).v[: w.num_prompts], w.along(w.reward, gamma=w.gamma)])


def bellman(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(2)
    values, enumerated = w.values(pi), tools.enumerated(w, pi)
    averaged = (pi.exp() * values.q).sum(-1)
    return torch.stack([values.v, averaged]), enumerated.v.expand(2, -1)


def action_values(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(2)
    values = w.values(pi)
    one_step = w.reward + w.gamma * tools.arrival(w, values.v)
    return torch.stack([values.q, one_step]), tools.enumerated(w, pi).q.expand(2, -1, -1)


def telescope(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    values = w.values(w.random_policy(3))
    return w.along(values.a, gamma=w.gamma), w.returns - values.v[w.responses.prompt]


def performance_difference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    old, new = w.random_policy(4), w.random_policy(5)
    gained = (new.exp() * w.values(old).a).sum(-1)  # (S,)
    return w.expected(w.values(new).v) - w.expected(w.values(old).v), (w.visits(new) * w.discount * gained).sum()


def soft_bellman(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    chance, reward = tools.continuations(w, w.ref_logps)
    soft, _ = w.soft_optimum(h.beta)
    backed_up = h.beta * (w.ref_logps + soft.q / h.beta).logsumexp(-1)
    enumerated = h.beta * tools.state_sums(w, chance * (reward / h.beta).exp()).log()
    log_z = h.beta * dpo.gibbs(w, h.beta)[1]  # of whole responses, as DPO has it
    return torch.cat([soft.v, backed_up, soft.v[: w.num_prompts]]), torch.cat([enumerated, enumerated, log_z])


def soft_value_is_attained(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    paid = w.along(w.reward - h.beta * (star - w.ref_logps), gamma=w.gamma)
    achieved = (w.by_prompt(w.sequence_logps(star)).exp() * w.by_prompt(paid)).sum(-1)
    return soft.v[: w.num_prompts], achieved


def soft_performance_difference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    pi = w.random_policy(6)
    lost = h.beta * (w.visits(pi) * w.discount * w.kl(pi, star)).sum()
    return w.expected(soft.v) - tools.objective(w, pi, h.beta), lost


def same_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, _ = w.soft_optimum(h.beta)
    return dpo.optimum(w, h.beta).exp(), (w.ref_logps + (soft.q - soft.v[:, None]) / h.beta).exp()


def reward_from_tokens(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    total = soft.v[w.responses.prompt] + h.beta * w.along(star - w.ref_logps, gamma=w.gamma)
    return torch.stack([w.along(w.reward, gamma=w.gamma), w.returns]), total.expand(2, -1)


def token_reward_up_to_shaping(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    shaped = w.reward + w.gamma * tools.arrival(w, soft.v) - soft.v[:, None]
    return torch.stack([h.beta * (star - w.ref_logps), soft.a]), shaped.expand(2, -1, -1)


def dpo_agrees(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, star = w.soft_optimum(h.beta)
    return tools.at_rest(w, lambda z: w.expected_loss("dpo", z, beta=h.beta), star)


def _needs_no_discount(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for gamma in (1.0, 0.9, 0.5):
        other = w.with_gamma(gamma)
        _, star = other.soft_optimum(h.beta)
        excess = other.expected_loss("dpo", star, beta=h.beta) - tools.preference_entropy(other)
        found[f"DPO loss of pi* above its minimum at gamma={gamma:g}"] = float(excess)
    return found


def _symbolic_soft_backup() -> object:
    """Two actions: the maximum of E[q] - beta KL(p || ref) over p, found by calculus, is the log-sum-exp."""
    import sympy as sp

    q1, q2 = sp.symbols("q1 q2", real=True)
    beta, odds = sp.symbols("beta k", positive=True)
    ref = odds / (1 + odds)
    p = odds * sp.exp(q1 / beta) / (odds * sp.exp(q1 / beta) + sp.exp(q2 / beta))
    x = sp.symbols("x", positive=True)
    value = x * q1 + (1 - x) * q2 - beta * (x * sp.log(x / ref) + (1 - x) * sp.log((1 - x) / (1 - ref)))
    return sp.simplify(sp.expand_log(sp.simplify(sp.diff(value, x).subs(x, p)), force=True))


STEPS = (
    Step(returns_by_token, implements="tpo_course.world.TokenWorld.values"),
    Step(bellman, implements="tpo_course.world.TokenWorld.backup"),
    Step(action_values, implements="tpo_course.world.TokenWorld.values"),
    Step(telescope),
    Step(performance_difference, implements="tpo_course.world.TokenWorld.visits"),
    Step(
        soft_bellman,
        gamma_one=True,
        implements="tpo_course.world.TokenWorld.soft_optimum",
        symbolic=_symbolic_soft_backup,
    ),
    Step(soft_value_is_attained),
    Step(soft_performance_difference),
    Step(same_optimum, gamma_one=True, implements="tpo_course.world.TokenWorld.soft_optimum"),
    Step(token_reward_up_to_shaping),
    Step(reward_from_tokens),
    Step(dpo_agrees, gamma_one=True, implements="tpo_lib.losses.dpo", numbers=_needs_no_discount),
)

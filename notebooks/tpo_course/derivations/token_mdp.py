"""Derivation 3: the token MDP, and why DPO was a token-level method all along."""

from __future__ import annotations

import torch
from torch import Tensor

from tpo_course.derivations import dpo, tools
from tpo_course.derivations.steps import Derivation, Hyper, Step
from tpo_course.world import TokenWorld

RQ = "r to Q*, arXiv 2404.12358"
MDP = "textbook (Markov decision processes)"


def _to_go(table: Tensor, gamma: float) -> Tensor:
    """(R, T) entries of every token -> (R, T) discounted sums from that token to the end."""
    sums, total = [], torch.zeros_like(table[:, 0])
    for column in reversed(table.unbind(1)):
        total = column + gamma * total
        sums.append(total)
    return torch.stack(sums[::-1], dim=1)


def _state_sums(w: TokenWorld, per_token: Tensor) -> Tensor:
    """(R, T) -> (S,): add up what every response contributes to the states it passes through."""
    mask = w.responses.mask
    return torch.zeros(w.num_states, dtype=per_token.dtype).index_add(0, w.responses.states[mask], per_token[mask])


def _continuations(w: TokenWorld, logps: Tensor) -> tuple[Tensor, Tensor]:
    """(R, T) probability of the rest of a response given the state, and its reward from there on."""
    return _to_go(w.tokenwise(logps), 1.0).exp(), _to_go(w.tokenwise(w.reward), w.gamma)


def returns_by_token(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    whole = (w.by_prompt(w.sequence_logps(pi)).exp() * w.by_prompt(w.returns)).sum(-1)
    return whole, w.values(pi).v[: w.num_prompts]


def bellman(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(2)
    chance, reward = _continuations(w, pi)
    return w.values(pi).v, _state_sums(w, chance * reward)


def action_values(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(2)
    values = w.values(pi)
    chance, reward = _continuations(w, pi)
    here = w.tokenwise(pi).exp()  # chance = here * chance of what follows
    follow = torch.where(w.responses.mask, chance / here * reward, 0.0)
    index = (w.responses.states, w.responses.tokens.clamp_min(0))
    return values.q, torch.zeros_like(values.q).index_put(index, follow, accumulate=True)


def telescope(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    values = w.values(w.random_policy(3))
    return w.along(values.a, gamma=w.gamma), w.returns - values.v[w.responses.prompt]


def performance_difference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    old, new = w.random_policy(4), w.random_policy(5)
    gained = (new.exp() * w.values(old).a).sum(-1)  # (S,)
    return w.expected(w.values(new).v) - w.expected(w.values(old).v), (w.visits(new) * w.discount * gained).sum()


def soft_bellman(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    chance, reward = _continuations(w, w.ref_logps)
    soft, _ = w.soft_optimum(h.beta)
    return soft.v, h.beta * _state_sums(w, chance * (reward / h.beta).exp()).log()


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
    return w.returns, soft.v[w.responses.prompt] + h.beta * w.along(star - w.ref_logps, gamma=w.gamma)


def token_reward_up_to_shaping(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    soft, star = w.soft_optimum(h.beta)
    arrival = soft.q - w.reward  # gamma V*(s'), 0 at the end
    return h.beta * (star - w.ref_logps), w.reward + arrival - soft.v[:, None]


def dpo_agrees(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, star = w.soft_optimum(h.beta)
    slope = tools.gradient(lambda z: w.expected_loss("dpo", z, beta=h.beta), star)
    left = torch.stack([w.expected_loss("dpo", star, beta=h.beta), slope.abs().max()])
    return left, torch.stack([tools.preference_entropy(w), torch.zeros_like(slope.max())])


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


TOKEN_MDP = Derivation(
    name="token_mdp",
    title="The token MDP: from r to Q*",
    question="DPO looks at whole responses. What does it say about single tokens?",
    assumptions=(
        "deterministic transitions: the next state is the prefix with the new token",
        "the reward of a response is a sum over its tokens, value 0 after the end",
    ),
    source=RQ,
    steps=(
        Step(
            title="A response's reward is a return",
            latex=r"\mathbb{E}_{y \sim \pi}[r(x,y)] = V_\pi(s_0), \quad r(x,y) = \sum_t \gamma^t R(s_t, y^t)",
            words="Read the prompt as the first state, each token as an action. Writing a response is an episode, and its reward "
            "is the return. Left: the sum over all responses. Right: one number from backward recursion.",
            sides=returns_by_token,
            assumption="The reward splits into token rewards R(s, a).",
            source=MDP,
            implements="tpo_course.world.TokenWorld.values",
            changed=r"\sum_t \gamma^t R(s_t, y^t)",
        ),
        Step(
            title="Bellman: the value of a state",
            latex=r"V_\pi(s) = \sum_a \pi(a|s)\, Q_\pi(s,a) = \mathbb{E}_\pi\Bigl[\sum_{k \ge t} \gamma^{k-t} R(s_k, y^k) \,\Big|\, s_t = s\Bigr]",
            words="The recursion on the left looks one token ahead. The right side enumerates every way to finish the response "
            "from s. They agree in every state, not only at the start.",
            sides=bellman,
            source=MDP,
            implements="tpo_course.world.TokenWorld.backup",
            changed=r"V_\pi(s) = \sum_a \pi(a|s)\, Q_\pi(s,a)",
        ),
        Step(
            title="Bellman: the value of a token",
            latex=r"Q_\pi(s,a) = R(s,a) + \gamma V_\pi(s') = \mathbb{E}_\pi\Bigl[\sum_{k \ge t} \gamma^{k-t} R(s_k, y^k) \,\Big|\, s_t = s,\, y^t = a\Bigr]",
            words="Q asks the same after you have committed to token a. Since s' is just the longer prefix, no average over next "
            "states is needed.",
            sides=action_values,
            assumption="Deterministic transitions enter here.",
            source=MDP,
            implements="tpo_course.world.TokenWorld.values",
            changed=r"\gamma V_\pi(s')",
        ),
        Step(
            title="Advantages telescope",
            latex=r"\sum_t \gamma^t A_\pi(s_t, y^t) = r(x,y) - V_\pi(s_0), \quad A_\pi = Q_\pi - V_\pi",
            words="Add up the advantages along a response: each V cancels the one before it, the last is 0. What remains is the "
            "reward minus a number of the prompt alone, the kind preferences cannot see.",
            sides=telescope,
            source=MDP,
            changed=r"- V_\pi(s_0)",
        ),
        Step(
            title="Performance difference",
            latex=r"J(\pi') - J(\pi) = \sum_t \gamma^t\, \mathbb{E}_{s_t \sim D_t^{\pi'}}\, \mathbb{E}_{a \sim \pi'}\bigl[A_\pi(s_t, a)\bigr]",
            words="To compare two policies, walk with the new one and collect the old one's advantages. The states are those the "
            "new policy visits. Keep that in mind: TGDPO will replace exactly this D_t.",
            sides=performance_difference,
            source=MDP,
            implements="tpo_course.world.TokenWorld.visits",
            changed=r"\mathbb{E}_{s_t \sim D_t^{\pi'}}",
        ),
        Step(
            title="Soft Bellman optimality",
            latex=r"V^*(s) = \beta \log \sum_a \pi_{\mathrm{ref}}(a|s)\, e^{Q^*(s,a)/\beta} "
            r"= \beta \log \mathbb{E}_{\pi_{\mathrm{ref}}}\bigl[e^{\text{reward to go}/\beta} \,\big|\, s\bigr]",
            words="Pay beta KL at every token and the maximum over tokens turns into a log-sum-exp. Unrolled to the end it is DPO's "
            "beta log Z, with the prefix s as the prompt. So V*(s_0) = beta log Z(x).",
            sides=soft_bellman,
            assumption="gamma = 1 for the second equality.",
            source=RQ,
            implements="tpo_course.world.TokenWorld.soft_optimum",
            gamma_one=True,
            changed=r"\beta \log \sum_a \pi_{\mathrm{ref}}(a|s)\, e^{Q^*(s,a)/\beta}",
            symbolic=_symbolic_soft_backup,
        ),
        Step(
            title="The soft value is attained",
            latex=r"V^*(s_0) = \mathbb{E}_{y \sim \pi^*}\Bigl[\sum_t \gamma^t \Bigl(R(s_t, y^t) - \beta \log "
            r"\frac{\pi^*(y^t|s_t)}{\pi_{\mathrm{ref}}(y^t|s_t)}\Bigr)\Bigr]",
            words="V* is no mere bound. Let pi* write all its responses, subtract what it pays in KL, and you get V* back.",
            sides=soft_value_is_attained,
            source=RQ,
            changed=r"\mathbb{E}_{y \sim \pi^*}",
        ),
        Step(
            title="What any other policy loses",
            latex=r"J(\pi^*) - J(\pi) = \beta \sum_t \gamma^t\, \mathbb{E}_{s_t \sim D_t^\pi} "
            r"\operatorname{KL}\bigl(\pi(\cdot|s_t) \,\|\, \pi^*(\cdot|s_t)\bigr)",
            words="The gap to the optimum is a sum of KLs, never negative, and zero only if you match pi* in every state you "
            "reach. This proves that pi* is optimal, and it prices every mistake.",
            sides=soft_performance_difference,
            source="derived here",
            changed=r"\operatorname{KL}\bigl(\pi(\cdot|s_t) \,\|\, \pi^*(\cdot|s_t)\bigr)",
        ),
        Step(
            title="Bandit view and token view agree",
            latex=r"\pi^*(a|s) = \pi_{\mathrm{ref}}(a|s)\, e^{(Q^*(s,a) - V^*(s))/\beta}",
            words="Take DPO's optimum over whole responses, cut it into token probabilities, and compare with the soft recursion: "
            "the same policy in every state.",
            sides=same_optimum,
            source=RQ,
            implements="tpo_course.world.TokenWorld.soft_optimum",
            gamma_one=True,
            assumption="gamma = 1: the KL of whole responses is not discounted.",
            changed=r"e^{(Q^*(s,a) - V^*(s))/\beta}",
        ),
        Step(
            title="A token's log-ratio is its advantage",
            latex=r"\beta \log \frac{\pi^*(a|s)}{\pi_{\mathrm{ref}}(a|s)} = R(s,a) + \gamma V^*(s') - V^*(s)",
            words="So a trained model's log-ratio is an estimate of token credit: the reward plus the change in prospects. It is the "
            "soft advantage, not R itself; the V terms shape it. TGDPO will use this number as its token reward.",
            sides=token_reward_up_to_shaping,
            source=RQ,
            changed=r"\gamma V^*(s') - V^*(s)",
        ),
        Step(
            title="And they add up to the reward",
            latex=r"\sum_t \gamma^t R(s_t, y^t) = V^*(s_0) + \beta \sum_t \gamma^t \log \frac{\pi^*(y^t|s_t)}{\pi_{\mathrm{ref}}(y^t|s_t)}",
            words="Sum along the response and the V terms telescope. At gamma = 1 this is DPO's reparametrisation, derived a second "
            "time, token by token.",
            sides=reward_from_tokens,
            source=RQ,
            changed=r"V^*(s_0)",
        ),
        Step(
            title="DPO finds the token-level optimum",
            latex=r"L_{\mathrm{DPO}}(\pi^*_{\mathrm{token}}) = \mathbb{E}[H(P)], \quad \nabla L_{\mathrm{DPO}}(\pi^*_{\mathrm{token}}) = 0",
            words="Feed the policy of the soft recursion to the DPO loss: it sits at the minimum. DPO solves the token problem "
            "without ever naming a token reward. The numbers show that a discount breaks this.",
            sides=dpo_agrees,
            source=RQ,
            implements="tpo_lib.losses.dpo",
            gamma_one=True,
            assumption="gamma = 1.",
            changed=r"\pi^*_{\mathrm{token}}",
            numbers=_needs_no_discount,
        ),
    ),
)

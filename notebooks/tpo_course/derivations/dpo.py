"""Derivation 2: from reward maximisation under a KL penalty to DPO."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Derivation, Hyper, Step
from tpo_course.tabular import minimise
from tpo_course.world import TokenWorld
from tpo_lib import losses

DPO = "DPO, arXiv 2305.18290"
BETAS = (0.1, 0.5, 1.0, 5.0)


def gibbs(w: TokenWorld, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """log pi*(y|x) and log Z(x), (P, n) and (P,): the Gibbs distribution over whole responses."""
    unnormalised = w.by_prompt(w.sequence_logps(w.ref_logps)) + w.by_prompt(w.returns) / beta
    log_z = unnormalised.logsumexp(-1)
    return unnormalised - log_z[:, None], log_z


def optimum(w: TokenWorld, beta: float) -> Tensor:
    """(S, V) the token probabilities of that distribution."""
    return w.factorise(gibbs(w, beta)[0].flatten())


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
    log_star, log_z = gibbs(w, h.beta)
    divergence = (log_pi.exp() * (log_pi - log_star)).sum(-1)
    return _sequence_objective(w, pi, h.beta), h.beta * log_z - h.beta * divergence


def optimum_value(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.by_prompt(w.sequence_logps(w.ref_logps)).exp()
    mean = (ref * (w.by_prompt(w.returns) / h.beta).exp()).sum(-1)  # E_ref exp(r / beta)
    return _sequence_objective(w, optimum(w, h.beta), h.beta), h.beta * mean.log()


def no_policy_is_better(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    rivals = [w.ref_logps, w.soft_optimum(2 * h.beta)[1], *(w.random_policy(i, scale=i / 4) for i in range(1, 9))]
    scores = torch.stack([w.expected(_sequence_objective(w, pi, h.beta)) for pi in rivals])
    return scores, w.expected(h.beta * gibbs(w, h.beta)[1]).expand_as(scores)


def reparametrisation(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = w.sequence_logps(optimum(w, h.beta))
    ref = w.sequence_logps(w.ref_logps)
    return w.returns, h.beta * (star - ref) + h.beta * gibbs(w, h.beta)[1][w.responses.prompt]


def z_cancels(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    u = h.beta * tools.logratio(w, optimum(w, h.beta))
    return w.pairs.prob, torch.sigmoid(u[w.pairs.chosen] - u[w.pairs.rejected])


def loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(3)
    margin = h.beta * tools.gap(w, tools.logratio(w, pi))
    return w.expected_loss("dpo", pi, beta=h.beta), tools.mean_over_pairs(w, -F.logsigmoid(margin))


def loss_minimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    star = optimum(w, h.beta)
    slope = tools.gradient(lambda z: w.expected_loss("dpo", z, beta=h.beta), star)
    left = torch.stack([w.expected_loss("dpo", star, beta=h.beta), slope.abs().max()])
    return left, torch.stack([tools.preference_entropy(w), torch.zeros_like(slope.max())])


def gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(4)
    wrong = torch.sigmoid(
        -h.beta * tools.gap(w, tools.logratio(w, pi))
    )  # how wrong the policy still is about each pair
    pull = -h.beta * w.pairs.weight * wrong
    by_hand = tools.score(w, pi, tools.onto_responses(w, pull, -pull))
    return tools.gradient(lambda z: w.expected_loss("dpo", z, beta=h.beta), pi), by_hand


def token_coefficients(w: TokenWorld, objective: str, logps: Tensor, guide: Tensor | None = None, **hyper) -> Tensor:
    """(2B, T) derivative of every pair's own loss by log pi(y^t|s_t), the chosen responses first."""
    chosen, rejected = w.pair_stats(w.stats(logps, guide=guide), w.pairs)
    leaf = torch.cat([chosen.logps, rejected.logps]).detach().requires_grad_()  # (2B, T)
    half = len(leaf) // 2
    chosen = dataclasses.replace(chosen, logps=leaf[:half])
    rejected = dataclasses.replace(rejected, logps=leaf[half:])
    value = losses.OBJECTIVES[objective].fn(chosen, rejected, **hyper).loss.sum()
    slope = torch.autograd.grad(value, leaf)[0]
    return torch.where(torch.cat([chosen.mask, rejected.mask]), slope, 0.0)  # padding is no log-probability


def one_coefficient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(5)
    wrong = torch.sigmoid(-h.beta * tools.gap(w, tools.logratio(w, pi)))[:, None]  # (B, 1)
    mask = w.responses.mask.double()
    by_hand = torch.cat([-h.beta * wrong * mask[w.pairs.chosen], h.beta * wrong * mask[w.pairs.rejected]])
    return token_coefficients(w, "dpo", pi, beta=h.beta), by_hand


def beta_at_the_optimum(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    def divergence(beta: Tensor) -> Tensor:
        log_star, _ = gibbs(w, beta)
        return (log_star.exp() * (log_star - w.by_prompt(w.sequence_logps(w.ref_logps)))).sum()

    slope = tools.gradient(divergence, torch.full((w.num_prompts, 1), h.beta, dtype=torch.float64))[:, 0]  # (P,)
    star = gibbs(w, h.beta)[0].exp()
    r = w.by_prompt(w.returns)
    variance = (star * r.square()).sum(-1) - (star * r).sum(-1).square()
    return slope * h.beta**3, -variance


def _kl_at_the_optimum(w: TokenWorld, h: Hyper) -> dict[str, float]:
    return {
        f"KL(pi*||pi_ref) at beta={beta:g}": float(tools.mean_seq_kl(w, optimum(w, beta), w.ref_logps))
        for beta in BETAS
    }


def beta_in_the_first_step(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    ref = w.ref_logps
    pull = -h.beta / 2 * w.pairs.weight
    by_hand = tools.score(w, ref, tools.onto_responses(w, pull, -pull))
    return tools.gradient(lambda z: w.expected_loss("dpo", z, beta=h.beta), ref), by_hand


def _kl_after_ten_steps(w: TokenWorld, h: Hyper) -> dict[str, float]:
    found = {}
    for beta in BETAS[:3]:
        fit = minimise(
            lambda z, b=beta: w.expected_loss("dpo", z, beta=b), w.ref_logps, steps=10, optimizer="sgd", lr=0.5
        )
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


DPO_DERIVATION = Derivation(
    name="dpo",
    title="DPO",
    question="Can you train on preferences directly, without a reward model and without sampling?",
    assumptions=(
        "Bradley-Terry preferences from a reward r(x, y)",
        "pi_ref gives every response a positive probability",
        "the policy can represent any distribution over responses (a tabular one can)",
    ),
    source=DPO,
    steps=(
        Step(
            title="The objective, by response and by token",
            latex=r"J(\pi) = \mathbb{E}_{y \sim \pi}[r(x,y)] - \beta \operatorname{KL}(\pi \,\|\, \pi_{\mathrm{ref}}) "
            r"= \mathbb{E}_{y \sim \pi}[r(x,y)] - \beta\, \mathbb{E}_{y \sim \pi}"
            r"\Bigl[\sum_t \operatorname{KL}\bigl(\pi(\cdot|s_t) \,\|\, \pi_{\mathrm{ref}}(\cdot|s_t)\bigr)\Bigr]",
            words="You want reward and you want to stay near the reference; beta sets the exchange rate. The KL of whole "
            "responses is the expected sum of the KLs of their tokens. That is the chain rule of log-probabilities.",
            sides=chain_rule,
            source=DPO,
            implements="tpo_course.derivations.tools.objective",
            changed=r"\beta \operatorname{KL}(\pi \,\|\, \pi_{\mathrm{ref}})",
        ),
        Step(
            title="Complete the KL",
            latex=r"J(\pi) = \beta \log Z(x) - \beta \operatorname{KL}(\pi \,\|\, \pi^*), \quad "
            r"\pi^*(y|x) = \frac{\pi_{\mathrm{ref}}(y|x)\, e^{r(x,y)/\beta}}{Z(x)}",
            words="Write r as beta log exp(r/beta), pull everything into one logarithm and normalise it by Z. The only place "
            "left for your policy is a KL to a fixed distribution pi*.",
            sides=objective_gap,
            source=DPO,
            changed=r"\beta \operatorname{KL}(\pi \,\|\, \pi^*)",
        ),
        Step(
            title="The optimum's value",
            latex=r"J(\pi^*) = \beta \log Z(x) = \beta \log \mathbb{E}_{y \sim \pi_{\mathrm{ref}}}\bigl[e^{r(x,y)/\beta}\bigr]",
            words="At pi = pi* the KL is zero. What remains is beta log Z: a soft maximum of the reward over what the reference "
            "would write.",
            sides=optimum_value,
            source=DPO,
            implements="tpo_course.world.TokenWorld.soft_optimum",
            changed=r"\log \mathbb{E}_{y \sim \pi_{\mathrm{ref}}}\bigl[e^{r(x,y)/\beta}\bigr]",
        ),
        Step(
            title="No policy is better",
            latex=r"J(\pi) \le \beta\, \mathbb{E}_x[\log Z(x)] \quad \text{for every } \pi",
            words="A KL is never negative, so nothing beats pi*. Ten rivals try: the reference, the optimum of another beta, "
            "and eight random policies.",
            sides=no_policy_is_better,
            relation="<=",
            source=DPO,
            changed=r"\le",
        ),
        Step(
            title="Reward from policy",
            latex=r"r(x,y) = \beta \log \frac{\pi^*(y|x)}{\pi_{\mathrm{ref}}(y|x)} + \beta \log Z(x)",
            words="Solve the Gibbs form for r. Every reward is the log-ratio of its own optimal policy, plus a number that "
            "depends on the prompt alone.",
            sides=reparametrisation,
            source=DPO,
            changed=r"\beta \log Z(x)",
        ),
        Step(
            title="Z cancels",
            latex=r"P(y_w \succ y_l \mid x) = \sigma\Bigl(\beta \log \frac{\pi^*(y_w|x)}{\pi_{\mathrm{ref}}(y_w|x)} "
            r"- \beta \log \frac{\pi^*(y_l|x)}{\pi_{\mathrm{ref}}(y_l|x)}\Bigr)",
            words="Preferences see gaps only, and both responses share Z(x). The one quantity you could not compute is gone.",
            sides=z_cancels,
            assumption="Bradley-Terry enters here.",
            source=DPO,
            changed=r"- \beta \log \frac{\pi^*(y_l|x)}{\pi_{\mathrm{ref}}(y_l|x)}",
            symbolic=_symbolic_cancel,
        ),
        Step(
            title="The loss",
            latex=r"L_{\mathrm{DPO}}(\pi) = -\mathbb{E}\Bigl[\log \sigma\Bigl(\beta \sum_t \log \frac{\pi(y_w^t|s_t)}"
            r"{\pi_{\mathrm{ref}}(y_w^t|s_t)} - \beta \sum_t \log \frac{\pi(y_l^t|s_t)}{\pi_{\mathrm{ref}}(y_l^t|s_t)}\Bigr)\Bigr]",
            words="Put your policy where pi* stood and maximise the likelihood of the preferences. The left number comes from "
            "the loss that trains language models, the right one from the formula.",
            sides=loss,
            source=DPO,
            implements="tpo_lib.losses.dpo",
            changed=r"\log \sigma",
        ),
        Step(
            title="Its minimum is the optimum",
            latex=r"L_{\mathrm{DPO}}(\pi^*) = \mathbb{E}[H(P)], \quad \nabla L_{\mathrm{DPO}}(\pi^*) = 0",
            words="At pi* the loss equals the annotators' own entropy, which no model can beat, and its gradient is zero: "
            "one classification loss has found the optimum of the KL-regularised objective.",
            sides=loss_minimum,
            assumption="Exact expectation over all pairs: infinite data.",
            source=DPO,
            implements="tpo_course.tabular.fit_tabular",
            changed=r"\mathbb{E}[H(P)]",
        ),
        Step(
            title="The gradient",
            latex=r"\nabla L_{\mathrm{DPO}} = -\beta\, \mathbb{E}\bigl[\sigma(-m) \bigl(\nabla \log \pi(y_w|x) "
            r"- \nabla \log \pi(y_l|x)\bigr)\bigr], \quad m = \beta \log \frac{\pi(y_w|x)}{\pi_{\mathrm{ref}}(y_w|x)} "
            r"- \beta \log \frac{\pi(y_l|x)}{\pi_{\mathrm{ref}}(y_l|x)}",
            words="Raise the chosen response, lower the rejected one, and weigh the pair by how wrong you still are about it. "
            "Autograd on the left, the formula on the right, logit by logit.",
            sides=gradient,
            source=DPO,
            changed=r"\sigma(-m)",
            symbolic=_symbolic_slope,
        ),
        Step(
            title="One coefficient for every token",
            latex=r"\frac{\partial \ell}{\partial \log \pi(y_w^t|s_t)} = -\beta\, \sigma(-m), \quad "
            r"\frac{\partial \ell}{\partial \log \pi(y_l^t|s_t)} = +\beta\, \sigma(-m) \quad \text{for all } t",
            words="Look at one pair, token by token: the coefficient does not depend on t. The token that made the response good "
            "and the comma beside it get the same push. Everything that follows in this course starts here.",
            sides=one_coefficient,
            source=DPO,
            changed=r"\text{for all } t",
        ),
        Step(
            title="Beta at the optimum: larger stays closer",
            latex=r"\beta^3\, \frac{d}{d\beta} \operatorname{KL}(\pi^*_\beta \,\|\, \pi_{\mathrm{ref}}) = "
            r"-\operatorname{Var}_{y \sim \pi^*_\beta}[r(x,y)] \le 0",
            words="Train to the end and a larger beta always leaves you nearer to the reference: the slope is minus a variance.",
            sides=beta_at_the_optimum,
            source="derived here",
            changed=r"-\operatorname{Var}_{y \sim \pi^*_\beta}[r(x,y)]",
            numbers=_kl_at_the_optimum,
        ),
        Step(
            title="Beta in the first steps: larger moves further",
            latex=r"\nabla L_{\mathrm{DPO}}(\pi_{\mathrm{ref}}) = -\frac{\beta}{2}\, \mathbb{E}\bigl[\nabla \log \pi(y_w|x) "
            r"- \nabla \log \pi(y_l|x)\bigr]",
            words="At the start every margin is 0 and the gradient is proportional to beta. With plain gradient steps of one "
            "size, a larger beta takes you further away first. Both readings of beta are right, at different times.",
            sides=beta_in_the_first_step,
            assumption="Plain gradient descent; Adam divides the scale of the gradient out.",
            source="derived here",
            changed=r"\frac{\beta}{2}",
            numbers=_kl_after_ten_steps,
        ),
    ),
)

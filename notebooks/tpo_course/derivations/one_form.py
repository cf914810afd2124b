"""Derivation 6: SimPO and PPO in the same notation, and one map of what every objective keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Derivation, Hyper, Step
from tpo_course.derivations.tgdpo import guide, token_reward
from tpo_course.world import TokenWorld
from tpo_lib import losses
from tpo_lib.types import TokenStats

SIMPO = "SimPO, Meng et al. 2024"
PPO = "PPO, Schulman et al. 2017"
HERE = "derived here"


@dataclass(frozen=True)
class Terms:
    """What one objective keeps of -log sigma(sum_t c_w (logratio_w + k_w KL_w) - sum_t c_l (logratio_l + k_l KL_l) - m).

    Attributes:
        token_weight: (tokens' r_hat (R, T), +1 chosen or -1 rejected, Hyper) -> c / beta.
        kl_weight: Hyper -> k.
        reference: whether log-ratios are taken against pi_ref.
        length_mean: whether sums over tokens are means.
        margin: Hyper -> m.
        weights, kl, stop: the same in words, for the map.
    """

    token_weight: Callable[[Tensor, int, Hyper], Tensor] = lambda r_hat, side, h: torch.ones_like(r_hat)
    kl_weight: Callable[[Hyper], float] = lambda h: 0.0
    reference: bool = True
    length_mean: bool = False
    margin: Callable[[Hyper], float] = lambda h: 0.0
    weights: str = "1"
    kl: str = "no"
    stop: str = "-"


TERMS = {
    "dpo": Terms(),
    "tdpo1": Terms(kl_weight=lambda h: 1.0, kl="1"),
    "tdpo2": Terms(kl_weight=lambda h: h.alpha, kl="alpha", stop="chosen KL"),
    "tgdpo": Terms(
        token_weight=lambda r_hat, side, h: (1 + side * h.alpha * r_hat).clamp_min(losses.F_FLOOR),
        weights="1 + alpha r_hat (chosen), 1 - alpha r_hat (rejected)",
        stop="r_hat",
    ),
    "simpo": Terms(reference=False, length_mean=True, margin=lambda h: h.margin),
}


def objective_map() -> str:
    """The map as a Markdown table: one row per objective, one column per term of the common form."""
    lines = [
        "| objective | reference | token weight f | KL weight | no gradient through | over tokens | margin |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, t in TERMS.items():
        margin = "gamma" if t.margin(Hyper(margin=1.0)) else "0"
        tokens, ref = ("mean" if t.length_mean else "sum"), ("pi_ref" if t.reference else "none")
        lines.append(f"| {name} | {ref} | {t.weights} | {t.kl} | {t.stop} | {tokens} | {margin} |")
    return "\n".join(lines)


def options(name: str, h: Hyper) -> dict[str, float]:
    """The hyperparameters of an objective out of Hyper."""
    known = {"beta": h.beta, "alpha": h.alpha, "guide_beta": h.guide_beta, "gamma": h.margin}
    return {key: known[key] for key in losses.OBJECTIVES[name].hyperparameters if key in known}


def _library(w: TokenWorld, name: str, logits: Tensor, h: Hyper) -> Tensor:
    return w.expected_loss(name, logits, guide=guide(w, h), **options(name, h))


def common_form(w: TokenWorld, name: str, logps: Tensor, h: Hyper) -> Tensor:
    """The expected loss of an objective from the common form and its Terms: token tables in, a scalar out."""
    terms, mask = TERMS[name], w.responses.mask
    gained = w.tokenwise(logps - w.ref_logps if terms.reference else logps)  # (R, T)
    gained = gained + terms.kl_weight(h) * w.tokenwise(w.kl(w.ref_logps, logps))
    r_hat = w.tokenwise(token_reward(w, h))
    lengths = mask.sum(-1) if terms.length_mean else torch.ones(len(mask))
    won, lost = (h.beta * (terms.token_weight(r_hat, side, h) * gained).sum(-1) / lengths for side in (1, -1))
    return -tools.mean_over_pairs(w, F.logsigmoid(won[w.pairs.chosen] - lost[w.pairs.rejected] - terms.margin(h)))


def one_form(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    library = torch.stack([_library(w, name, pi, h) for name in TERMS])
    return library, torch.stack([common_form(w, name, pi, h) for name in TERMS])


def at_the_reference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    found = torch.stack([_library(w, name, w.ref_logps, h) for name in ("dpo", "tdpo1", "tdpo2", "tgdpo")])
    return found, torch.full_like(found, 2.0).log()


def _value_and_gradient(w: TokenWorld, name: str, logits: Tensor, h: Hyper) -> Tensor:
    slope = tools.gradient(lambda z: _library(w, name, z, h), logits)
    return torch.cat([_library(w, name, logits, h)[None], slope.flatten()])


def alpha_zero(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, none = w.random_policy(2), Hyper(beta=h.beta, alpha=0.0, guide_beta=h.guide_beta)
    both = torch.stack([_value_and_gradient(w, "tdpo2", pi, none), _value_and_gradient(w, "tgdpo", pi, none)])
    return both, _value_and_gradient(w, "dpo", pi, h).expand_as(both)


def alpha_one(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    policies = [w.random_policy(3 + i) for i in range(4)]
    first = [_library(w, "tdpo1", pi, h) for pi in policies]
    second = [_library(w, "tdpo2", pi, Hyper(beta=h.beta, alpha=1.0)) for pi in policies]
    return torch.stack(first), torch.stack(second)


def _gradients_differ(w: TokenWorld, h: Hyper) -> dict[str, float]:
    pi, full = w.random_policy(3), Hyper(beta=h.beta, alpha=1.0)
    gap = _value_and_gradient(w, "tdpo1", pi, h) - _value_and_gradient(w, "tdpo2", pi, full)
    return {"largest difference of the two gradients": float(gap.abs().max())}


def simpo_loss(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(4)
    average = w.sequence_logps(pi) / w.responses.lengths
    margin = h.beta * average[w.pairs.chosen] - h.beta * average[w.pairs.rejected]
    return _library(w, "simpo", pi, h), tools.mean_over_pairs(w, -F.logsigmoid(margin - h.margin))


def simpo_is_dpo(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    """Pairs of one length n, a uniform reference: DPO with beta / n is SimPO with beta and no margin."""
    stats = w.stats(w.random_policy(5))
    uniform = torch.where(stats.mask, -torch.tensor(float(w.vocab_size), dtype=torch.float64).log(), 0.0)
    lengths = w.responses.lengths
    left, right = [], []
    for n in range(1, w.horizon + 1):
        same = (lengths[w.pairs.chosen] == n) & (lengths[w.pairs.rejected] == n)

        def take(rows: Tensor, same: Tensor = same) -> TokenStats:
            rows = rows[same]
            return TokenStats(logps=stats.logps[rows], ref_logps=uniform[rows], mask=stats.mask[rows])

        chosen, rejected = take(w.pairs.chosen), take(w.pairs.rejected)
        left.append(losses.dpo(chosen, rejected, beta=h.beta / n).loss)
        right.append(losses.simpo(chosen, rejected, beta=h.beta, gamma=0.0).loss)
    return torch.cat(left), torch.cat(right)


def simpo_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, lengths = w.random_policy(6), w.responses.lengths
    margin = h.beta * tools.gap(w, w.sequence_logps(pi) / lengths)
    pull = -h.beta * w.pairs.weight * torch.sigmoid(h.margin - margin)
    by_hand = tools.score(w, pi, tools.onto_responses(w, pull, -pull) / lengths)
    return tools.gradient(lambda z: _library(w, "simpo", z, h), pi), by_hand


def _regularised_objective(w: TokenWorld, logits: Tensor, beta: float) -> Tensor:
    return tools.objective(w, logits.log_softmax(-1), beta)


def policy_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(7)
    advantage = w.tokenwise(w.regularised_values(pi, h.beta).a)
    discount = w.gamma ** torch.arange(w.horizon, dtype=torch.float64)
    chance = (w.prompt_probs[w.responses.prompt] * w.sequence_logps(pi).exp())[:, None]  # (R, 1)
    by_hand = tools.score(w, pi, chance * discount * advantage)
    return tools.gradient(lambda z: _regularised_objective(w, z, h.beta), pi), by_hand


def ppo_surrogate(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    old = w.random_policy(8)
    advantage = w.regularised_values(old, h.beta).a
    met = (w.visits(old) * w.discount)[:, None] * old.exp()  # (S, V) how often the old policy writes a in s

    def surrogate(logits: Tensor) -> Tensor:
        ratio = (logits.log_softmax(-1) - old).exp()
        return (met * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()

    return tools.gradient(surrogate, old), tools.gradient(lambda z: _regularised_objective(w, z, h.beta), old)


def same_fixed_point(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, star = w.soft_optimum(h.beta)
    advantage = w.regularised_values(star, h.beta).a
    slope = tools.gradient(lambda z: w.expected_loss("dpo", z, beta=h.beta), star)
    left = torch.cat([advantage, slope])
    return left, torch.zeros_like(left)


def _symbolic_equal_lengths() -> object:
    import sympy as sp

    beta, n, v = sp.symbols("beta n V", positive=True)
    w, rejected = sp.symbols("l_w l_l", real=True)
    uniform = -n * sp.log(v)
    return sp.simplify(beta / n * ((w - uniform) - (rejected - uniform)) - (beta * w / n - beta * rejected / n))


ONE_FORM = Derivation(
    name="one_form",
    title="One form for all: DPO, TDPO, TGDPO, SimPO, and PPO beside them",
    question="Which objective keeps which term?",
    assumptions=("pairwise data for the five losses", "exact expectations throughout"),
    source=HERE,
    steps=(
        Step(
            title="The common form",
            latex=r"L = -\mathbb{E}\Bigl[\log \sigma\Bigl(\sum_t c_w^t \bigl(\log \tfrac{\pi}{\pi_{\mathrm{ref}}} + k\, \operatorname{KL}_w^t\bigr) "
            r"- \sum_t c_l^t \bigl(\log \tfrac{\pi}{\pi_{\mathrm{ref}}} + k\, \operatorname{KL}_l^t\bigr) - m\Bigr)\Bigr]",
            words="Five losses, one formula. DPO: c = beta, k = 0, m = 0. TDPO1: k = 1. TDPO2: k = alpha and a stop-gradient. TGDPO: "
            "c = beta f. SimPO: no reference, c = beta/|y|, m = gamma. The map is `objective_map()`; all five rows are checked.",
            sides=one_form,
            source=HERE,
            implements="tpo_lib.losses.OBJECTIVES",
            changed=r"k\, \operatorname{KL}_w^t",
        ),
        Step(
            title="Everyone starts at log 2",
            latex=r"\pi = \pi_{\mathrm{ref}} \;\Rightarrow\; L_{\mathrm{DPO}} = L_{\mathrm{TDPO1}} = L_{\mathrm{TDPO2}} = L_{\mathrm{TGDPO}} = \log 2",
            words="At the reference all log-ratios and KLs are zero, the margin is 0 and sigma(0) = 1/2. If your first logged loss is "
            "not .693, policy and reference are not the same model. SimPO has no reference and is exempt.",
            sides=at_the_reference,
            source=HERE,
            implements="tpo_lib.losses.OBJECTIVES",
            changed=r"\log 2",
        ),
        Step(
            title="At alpha = 0 you are back at DPO",
            latex=r"L_{\mathrm{TDPO2}}\big|_{\alpha=0} = L_{\mathrm{TGDPO}}\big|_{\alpha=0} = L_{\mathrm{DPO}}, \quad \text{and so are their gradients}",
            words="alpha switches off the KL terms of TDPO2 and the weights of TGDPO. Value and gradient agree with DPO's, logit by logit.",
            sides=alpha_zero,
            source=HERE,
            implements="tpo_lib.losses.tdpo2",
            changed=r"L_{\mathrm{TDPO2}}\big|_{\alpha=0} = L_{\mathrm{TGDPO}}\big|_{\alpha=0}",
        ),
        Step(
            title="At alpha = 1 TDPO2 has TDPO1's value",
            latex=r"L_{\mathrm{TDPO2}}\big|_{\alpha=1} = L_{\mathrm{TDPO1}}, \quad \nabla L_{\mathrm{TDPO2}}\big|_{\alpha=1} \ne \nabla L_{\mathrm{TDPO1}}",
            words="Same value, another gradient: the stop-gradient. So TDPO2 follows a field that is not the gradient of its own value, "
            "and line-search optimisers (L-BFGS) do not fit it.",
            sides=alpha_one,
            source=HERE,
            implements="tpo_lib.losses.tdpo2",
            changed=r"\ne",
            numbers=_gradients_differ,
        ),
        Step(
            title="SimPO",
            latex=r"L_{\mathrm{SimPO}} = -\mathbb{E}\Bigl[\log \sigma\Bigl(\frac{\beta}{|y_w|} \log \pi(y_w|x) - \frac{\beta}{|y_l|} \log \pi(y_l|x) - \gamma\Bigr)\Bigr]",
            words="No reference: the reward is the mean log-probability of a token, and the chosen one must lead by gamma. "
            "(This gamma is a margin, not the discount.)",
            sides=simpo_loss,
            source=SIMPO,
            implements="tpo_lib.losses.simpo",
            changed=r"- \gamma",
        ),
        Step(
            title="When SimPO is DPO",
            latex=r"|y_w| = |y_l| = n, \; \pi_{\mathrm{ref}} \text{ uniform}, \; \gamma = 0: \quad L_{\mathrm{SimPO}}(\beta) = L_{\mathrm{DPO}}(\beta / n)",
            words="A uniform reference gives every response of one length the same probability, so it cancels. What is left of the "
            "difference is the scale. The beta of the two losses are not comparable: SimPO's multiplies a mean.",
            sides=simpo_is_dpo,
            source=HERE,
            implements="tpo_lib.losses.simpo",
            changed=r"L_{\mathrm{DPO}}(\beta / n)",
            symbolic=_symbolic_equal_lengths,
        ),
        Step(
            title="SimPO's gradient",
            latex=r"\nabla L_{\mathrm{SimPO}} = -\beta\, \mathbb{E}\Bigl[\sigma(\gamma - m) \Bigl(\frac{\nabla \log \pi(y_w|x)}{|y_w|} - \frac{\nabla \log \pi(y_l|x)}{|y_l|}\Bigr)\Bigr]",
            words="Again one coefficient per response, but shorter responses get more per token. The margin keeps pushing pairs "
            "that are already in the right order.",
            sides=simpo_gradient,
            source=SIMPO,
            implements="tpo_lib.losses.simpo",
            changed=r"\sigma(\gamma - m)",
        ),
        Step(
            title="The policy gradient",
            latex=r"\nabla J(\pi) = \mathbb{E}_{y \sim \pi}\Bigl[\sum_t \gamma^t\, \nabla \log \pi(y^t|s_t)\, A^\beta_\pi(s_t, y^t)\Bigr]",
            words="PPO climbs J itself. It writes responses and weighs each token by its advantage, with the KL cost inside the reward. "
            "Token-level credit is what DPO's single coefficient replaced.",
            sides=policy_gradient,
            source=PPO,
            implements="tpo_course.world.TokenWorld.regularised_values",
            changed=r"A^\beta_\pi(s_t, y^t)",
        ),
        Step(
            title="PPO's clipped surrogate",
            latex=r"\nabla_\pi\, \mathbb{E}_{\pi_{\mathrm{old}}}\Bigl[\sum_t \gamma^t \min\bigl(\rho_t A^\beta_t, \operatorname{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A^\beta_t\bigr)\Bigr]"
            r"\Big|_{\pi=\pi_{\mathrm{old}}} = \nabla J(\pi_{\mathrm{old}}), \quad \rho_t = \frac{\pi(y^t|s_t)}{\pi_{\mathrm{old}}(y^t|s_t)}",
            words="At the old policy every ratio is 1 and nothing is clipped: the first step of PPO is the policy gradient. Clipping "
            "only limits the steps after it. Here epsilon is 0.2.",
            sides=ppo_surrogate,
            source=PPO,
            changed=r"\operatorname{clip}(\rho_t, 1-\epsilon, 1+\epsilon)",
        ),
        Step(
            title="DPO and PPO rest at the same policy",
            latex=r"A^\beta_{\pi^*}(s,a) = 0 \;\; \forall s, a \quad \text{and} \quad \nabla L_{\mathrm{DPO}}(\pi^*) = 0",
            words="At pi* no token has any regularised advantage left, so PPO stops; and DPO's gradient is zero there too. With all "
            "the data and an exact policy they agree. What you see them differ in is data, sampling and generalisation.",
            sides=same_fixed_point,
            assumption="gamma = 1, infinite data, tabular policy.",
            source=HERE,
            gamma_one=True,
            changed=r"A^\beta_{\pi^*}(s,a) = 0",
        ),
    ),
)

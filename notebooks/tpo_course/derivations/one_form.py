"""Derivation 6: SimPO and PPO in the same notation, and one map of what every objective keeps."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_course.derivations import tools
from tpo_course.derivations.steps import Hyper, Step
from tpo_course.derivations.tgdpo import guide, token_reward
from tpo_course.world import TokenWorld
from tpo_lib import losses
from tpo_lib.types import TokenStats


@dataclass(frozen=True)
class Terms:
    """What one objective keeps of -log sigma(sum_t c_w (logratio_w + kappa KL_w) - sum_t c_l (logratio_l + kappa KL_l) - gamma_m)."""

    # c / beta of tokens with r_hat (R, T); side is +1 where they are chosen, -1 where rejected
    token_weight: Callable[[Tensor, int, Hyper], Tensor] = lambda r_hat, side, h: torch.ones_like(r_hat)
    kl_weight: Callable[[Hyper], float] = lambda h: 0.0  # kappa
    reference: bool = True  # whether log-ratios are taken against pi_ref
    length_mean: bool = False  # whether sums over tokens are means
    margin: Callable[[Hyper], float] = lambda h: 0.0  # gamma_m
    weights: str = "1"  # the same in words, for the map
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
        margin = "gamma_m" if t.margin(Hyper(margin=1.0)) else "0"
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
    kl = terms.kl_weight(h) * w.tokenwise(w.kl(w.ref_logps, logps))
    r_hat = w.tokenwise(token_reward(w, h))
    lengths = mask.sum(-1) if terms.length_mean else torch.ones(len(mask))

    def total(side: int, kl: Tensor) -> Tensor:  # (R,) what each response adds to the margin
        return h.beta * (terms.token_weight(r_hat, side, h) * (gained + kl)).sum(-1) / lengths

    won, lost = total(1, kl.detach() if terms.stop == "chosen KL" else kl), total(-1, kl)
    return -tools.mean_over_pairs(w, F.logsigmoid(won[w.pairs.chosen] - lost[w.pairs.rejected] - terms.margin(h)))


def one_form(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(1)
    by_terms = [
        _value_and_gradient(lambda z, name=name: common_form(w, name, z.log_softmax(-1), h), pi) for name in TERMS
    ]
    return torch.stack([_of_library(w, name, pi, h) for name in TERMS]), torch.stack(by_terms)


def at_the_reference(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    found = torch.stack([_library(w, name, w.ref_logps, h) for name in ("dpo", "tdpo1", "tdpo2", "tgdpo")])
    kl = w.kl(w.ref_logps, w.ref_logps)
    return torch.cat([found, kl]), torch.cat([torch.full_like(found, 2.0).log(), torch.zeros_like(kl)])


def _value_and_gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """(1 + S V,) both in one row."""
    return torch.cat([function(logits)[None], tools.gradient(function, logits).flatten()])


def _of_library(w: TokenWorld, name: str, logits: Tensor, h: Hyper) -> Tensor:
    return _value_and_gradient(lambda z: _library(w, name, z, h), logits)


def alpha_zero(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi, none = w.random_policy(2), Hyper(beta=h.beta, alpha=0.0, guide_beta=h.guide_beta)
    both = torch.stack([_of_library(w, "tdpo2", pi, none), _of_library(w, "tgdpo", pi, none)])
    return both, _of_library(w, "dpo", pi, h).expand_as(both)


def alpha_one(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    policies, full = [w.random_policy(3 + i) for i in range(4)], Hyper(beta=h.beta, alpha=1.0)
    first, second = (torch.stack([_of_library(w, name, pi, full) for pi in policies]) for name in ("tdpo1", "tdpo2"))
    differ = ((first - second)[:, 1:].abs().amax(-1) > 1e-6).double()  # the gradients, at every policy
    return torch.cat([first[:, 0], differ]), torch.cat([second[:, 0], torch.ones_like(differ)])


def _gradients_differ(w: TokenWorld, h: Hyper) -> dict[str, float]:
    pi, full = w.random_policy(3), Hyper(beta=h.beta, alpha=1.0)
    gap = _of_library(w, "tdpo1", pi, h) - _of_library(w, "tdpo2", pi, full)
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


def policy_gradient(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    pi = w.random_policy(7)
    advantage = w.tokenwise(w.regularised_values(pi, h.beta).a)
    discount = w.gamma ** torch.arange(w.horizon, dtype=torch.float64)
    chance = (w.prompt_probs[w.responses.prompt] * w.sequence_logps(pi).exp())[:, None]  # (R, 1)
    by_hand = tools.score(w, pi, chance * discount * advantage)
    return tools.gradient(lambda z: tools.objective(w, z.log_softmax(-1), h.beta), pi), by_hand


def ppo_surrogate(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    old = w.random_policy(8)
    advantage = w.regularised_values(old, h.beta).a
    met = (w.visits(old) * w.discount)[:, None] * old.exp()  # (S, V) how often the old policy writes a in s

    def surrogate(logits: Tensor) -> Tensor:
        ratio = (logits.log_softmax(-1) - old).exp()
        return (met * torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)).sum()

    return tools.gradient(surrogate, old), tools.gradient(lambda z: tools.objective(w, z.log_softmax(-1), h.beta), old)


def same_fixed_point(w: TokenWorld, h: Hyper) -> tuple[Tensor, Tensor]:
    _, star = w.soft_optimum(h.beta)
    advantage = w.regularised_values(star, h.beta).a
    left = torch.cat([advantage, tools.loss_gradient(w, "dpo", star, beta=h.beta)])
    return left, torch.zeros_like(left)


def _symbolic_equal_lengths() -> object:
    import sympy as sp

    beta, n, v = sp.symbols("beta n V", positive=True)
    w, rejected = sp.symbols("l_w l_l", real=True)
    uniform = -n * sp.log(v)
    return sp.simplify(beta / n * ((w - uniform) - (rejected - uniform)) - (beta * w / n - beta * rejected / n))


STEPS = (
    Step(one_form, implements="tpo_lib.losses.OBJECTIVES"),
    Step(at_the_reference, implements="tpo_lib.losses.OBJECTIVES"),
    Step(alpha_zero, implements="tpo_lib.losses.tdpo2"),
    Step(alpha_one, implements="tpo_lib.losses.tdpo2", numbers=_gradients_differ),
    Step(simpo_loss, implements="tpo_lib.losses.simpo"),
    Step(simpo_is_dpo, implements="tpo_lib.losses.simpo", symbolic=_symbolic_equal_lengths),
    Step(simpo_gradient, implements="tpo_lib.losses.simpo"),
    Step(policy_gradient, implements="tpo_course.world.TokenWorld.regularised_values"),
    Step(ppo_surrogate, implements="tpo_lib.ppo.objective"),
    Step(same_fixed_point, gamma_one=True),
)

"""The objectives, as pure functions of per-token statistics: one pair in, one number out.

Every function takes the statistics of B chosen and B rejected responses (see `stats.split`) and returns a LossOutput.
Below, logratio^t = log pi_theta(y^t|s_t) - log pi_ref(y^t|s_t), w is the chosen response, l the rejected one.

Reference-based objectives share one form, -log sigma(chosen_reward - rejected_reward), and differ in the reward alone:

    dpo     beta sum_t logratio^t
    tdpo1   beta sum_t (logratio^t + KL^t)                 KL^t = KL(pi_ref(.|s_t) || pi_theta(.|s_t))
    tdpo2   beta sum_t (logratio^t + alpha KL^t)           no gradient through KL^t of the chosen response
    tgdpo   beta sum_t f^t logratio^t                      f^t = 1 + alpha r_hat^t (chosen), 1 - alpha r_hat^t (rejected)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_lib.types import LossOutput, TokenStats

# Smallest weight TGDPO gives a token: its derivation needs f > 0 and the published code does not ensure it.
F_FLOOR = 0.01
FLOAT32_MAX = torch.finfo(torch.float32).max

_HOW_TO_GET = {
    "ref_logps": "pass ref_logits to token_stats",
    "kl": "pass with_kl=True to token_stats",
    "guide_logps": "pass guide_logits (a frozen DPO model's) to token_stats",
}


def sft(chosen: TokenStats, rejected: TokenStats | None) -> LossOutput:
    """Supervised fine-tuning: the chosen response's negative log-likelihood per token.

    loss = -(1/|y_w|) sum_t log pi_theta(y_w^t | s_t). The rejected response is read for the logged reward only, and may be
    missing.
    """
    chosen_mean = _mean(chosen.logps, chosen.mask)
    rejected_mean = None if rejected is None else _mean(rejected.logps, rejected.mask).detach()
    return LossOutput(-chosen_mean, chosen_mean.detach(), rejected_mean)


def dpo(chosen: TokenStats, rejected: TokenStats, *, beta: float) -> LossOutput:
    """Direct preference optimization (arXiv 2305.18290): every token of a response shares one coefficient.

    loss = -log sigma(beta sum_t logratio_w^t - beta sum_t logratio_l^t).

    Args:
        chosen, rejected: statistics of B pairs; needs ref_logps.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        LossOutput; rewards are beta sum_t logratio^t, in nats.

    Example:
        >>> from tpo_lib.types import TokenStats
        >>> def one(gap): return TokenStats(torch.tensor([[gap]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        >>> dpo(one(-1.0), one(-3.0), beta=0.5).loss  # -log sigma(0.5 * (-1 + 3)) = log(1 + e^-1)
        tensor([0.3133])
    """
    return _bradley_terry(beta * _logratio(chosen).sum(-1), beta * _logratio(rejected).sum(-1))


def tdpo1(chosen: TokenStats, rejected: TokenStats, *, beta: float) -> LossOutput:
    """Token-level DPO, first form (arXiv 2404.11999): the forward KL of every token joins the reward.

    loss = -log sigma(u - delta), u = beta sum_t logratio_w^t - beta sum_t logratio_l^t,
    delta = beta SeqKL(y_l) - beta SeqKL(y_w), SeqKL(y) = sum_t KL(pi_ref(.|s_t) || pi_theta(.|s_t)).

    Gradients flow through both KL terms, so the loss rewards a growing KL on the chosen side; `tdpo2` removes that.

    Args:
        chosen, rejected: statistics of B pairs; needs ref_logps and kl.
        beta: strength of the pull towards the reference, > 0.

    Returns:
        LossOutput; rewards are beta sum_t (logratio^t + KL^t), in nats.
    """
    return _bradley_terry(
        beta * (_logratio(chosen) + _need(chosen, "kl")).sum(-1),
        beta * (_logratio(rejected) + _need(rejected, "kl")).sum(-1),
    )


def tdpo2(chosen: TokenStats, rejected: TokenStats, *, beta: float, alpha: float) -> LossOutput:
    """Token-level DPO, second form (arXiv 2404.11999): alpha scales the KL terms, the chosen one is held constant.

    loss = -log sigma(u - alpha delta2), delta2 = beta SeqKL(y_l) - stop_gradient(beta SeqKL(y_w)); u as in `tdpo1`.
    At alpha = 1 the value equals `tdpo1`, the gradient does not; at alpha = 0 it is `dpo`.

    Args:
        chosen, rejected: statistics of B pairs; needs ref_logps and kl.
        beta: strength of the pull towards the reference, > 0.
        alpha: weight of the KL terms, >= 0 (0.5 in the paper).

    Returns:
        LossOutput; rewards are beta sum_t (logratio^t + alpha KL^t), in nats. (The authors' code logs them with
        coefficient 1 whatever alpha is; ours are those of the loss.)
    """
    return _bradley_terry(
        beta * (_logratio(chosen) + alpha * _need(chosen, "kl").detach()).sum(-1),  # the stop-gradient
        beta * (_logratio(rejected) + alpha * _need(rejected, "kl")).sum(-1),
    )


def tgdpo(
    chosen: TokenStats,
    rejected: TokenStats,
    *,
    beta: float,
    alpha: float,
    guide_beta: float,
    shaping: str = "linear",
    floor: float = F_FLOOR,
) -> LossOutput:
    """DPO with token-level reward guidance (arXiv 2506.14574): a frozen DPO model weighs every token.

    loss = -log sigma(beta sum_t f_w(r_hat^t) logratio_w^t - beta sum_t f_l(r_hat^t) logratio_l^t),
    r_hat^t = guide_beta (log pi_hat(y^t|s_t) - log pi_ref(y^t|s_t)), constant in theta;
    linear (the paper's): f_w = 1 + alpha r_hat, f_l = 1 - alpha r_hat; exp: f = exp(+-alpha r_hat), always positive.

    The derivation divides by f, so f must stay positive. The paper asks for a small enough alpha; the published code has
    no guard. Here f = max(f, floor), and `floor_share` counts the tokens that hit it.

    Args:
        chosen, rejected: statistics of B pairs; needs ref_logps and guide_logps.
        beta: strength of the pull towards the reference, > 0.
        alpha: strength of the guidance, >= 0; 0 is `dpo`.
        guide_beta: the beta the guide was trained with, > 0. (The published code uses the current run's beta instead.)
        shaping: "linear" or "exp".
        floor: smallest weight of a token, > 0.

    Returns:
        LossOutput; rewards are beta sum_t f^t logratio^t, in nats; token_weights holds f.

    Raises:
        ValueError: shaping is not one of the two.
    """
    weights_w = _guidance(chosen, alpha * guide_beta, shaping, floor)  # (B, T-1)
    weights_l = _guidance(rejected, -alpha * guide_beta, shaping, floor)
    chosen_reward = beta * (weights_w * _logratio(chosen)).sum(-1)
    rejected_reward = beta * (weights_l * _logratio(rejected)).sum(-1)
    return _bradley_terry(chosen_reward, rejected_reward, torch.cat([weights_w, weights_l]))


def simpo(chosen: TokenStats, rejected: TokenStats, *, beta: float, gamma: float) -> LossOutput:
    """Simple preference optimization (Meng et al. 2024): length-averaged likelihood with a margin, no reference.

    loss = -log sigma((beta/|y_w|) sum_t log pi(y_w^t) - (beta/|y_l|) sum_t log pi(y_l^t) - gamma).

    Args:
        chosen, rejected: statistics of B pairs.
        beta: scale of the reward, > 0 (2 in the authors' code, up to 10 in use: it multiplies a mean).
        gamma: target margin, >= 0, in units of the reward (a quarter of beta in the authors' code).

    Returns:
        LossOutput; rewards are (beta/|y|) sum_t log pi(y^t).
    """
    chosen_reward, rejected_reward = (
        beta * _mean(chosen.logps, chosen.mask),
        beta * _mean(rejected.logps, rejected.mask),
    )
    loss = -F.logsigmoid(chosen_reward - rejected_reward - gamma)
    return LossOutput(loss, chosen_reward.detach(), rejected_reward.detach())


def floor_share(output: LossOutput, mask: Tensor, floor: float = F_FLOOR) -> tuple[Tensor, Tensor]:
    """Number of response tokens whose weight sits on the floor, and the number of response tokens, both scalar tensors."""
    return ((output.token_weights <= floor) & mask).sum(), mask.sum()


@dataclass(frozen=True)
class Hyperparameter:
    """What an objective takes beside the statistics; flags, help texts and range checks are made from it.

    Attributes:
        default: taken where nothing is given; None: it has to be given.
        symbol: as in the papers.
        words: what it does, half a line.
        above, least: it must be greater than the one and at least the other.
        usual: the range in use; values outside are said, not refused.
        choices: of a word.
    """

    default: float | str | None
    symbol: str
    words: str
    above: float = -math.inf
    least: float = -math.inf
    usual: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: float | str) -> None:
        """Raise ValueError, naming the value, where it is out of range."""
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(self.choices)}")
        elif isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name}={value!r} must be a number")
        elif not value > self.above:
            raise ValueError(f"{name}={value!r} must be greater than {self.above:g}")
        elif not value >= self.least:
            raise ValueError(f"{name}={value!r} must be at least {self.least:g}")
        elif abs(value) > FLOAT32_MAX:
            raise ValueError(f"{name}={value!r} must be finite in float32")


@dataclass(frozen=True)
class Objective:
    """An entry of OBJECTIVES. One of your own is trained, evaluated and drawn like ours once it stands there.

    Attributes:
        fn: the function.
        needs: the optional TokenStats fields it reads.
        hyperparameters: what it takes beside the statistics, by name.
        merged: it reads logps and kl as their sum alone, which `fused.pair_loss` can make cheaper.
        paired: it needs a rejected side; otherwise it is also called with None for it.
    """

    fn: Callable[..., LossOutput]
    needs: tuple[str, ...] = ()
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)
    merged: bool = False
    paired: bool = True

    def settings(self, given: Mapping) -> dict:
        """The keyword arguments of `fn`: what is given (names it does not take are passed over), else the defaults.

        Raises:
            ValueError: a value is out of range.
        """
        known = self.hyperparameters
        found = {name: known[name].default if given.get(name) is None else given[name] for name in known}
        for name, value in found.items():
            if value is not None:
                known[name].check(name, value)
        return found


_BETA = Hyperparameter(0.1, "β", "strength of the pull towards the reference", above=0)
_GUIDED = {
    "beta": _BETA,
    "alpha": Hyperparameter(0.5, "α", "strength of the guidance", least=0),
    "guide_beta": Hyperparameter(None, "β̂", "the beta its guide was trained with", above=0),
    "shaping": Hyperparameter("linear", "f", "how a token's weight grows with r̂", choices=("linear", "exp")),
    "floor": Hyperparameter(F_FLOOR, "f_min", "smallest token weight", above=0),
}
# The defaults of SimPO are those of its authors' code: beta 2, gamma / beta 1/4. Its beta scales a mean over tokens.
_SIMPO = {
    "beta": Hyperparameter(2.0, "β", "scale of the mean log-probability", above=0, usual=(1.0, 10.0)),
    "gamma": Hyperparameter(0.5, "γ", "target margin", least=0),
}

OBJECTIVES = {
    "sft": Objective(sft, paired=False),
    "dpo": Objective(dpo, ("ref_logps",), {"beta": _BETA}),
    "tdpo1": Objective(tdpo1, ("ref_logps", "kl"), {"beta": _BETA}, merged=True),
    "tdpo2": Objective(
        tdpo2,
        ("ref_logps", "kl"),
        {"beta": _BETA, "alpha": Hyperparameter(0.5, "α", "weight of the KL terms (the paper's 0.5)", least=0)},
    ),
    "tgdpo": Objective(tgdpo, ("ref_logps", "guide_logps"), _GUIDED),
    "simpo": Objective(simpo, (), _SIMPO),
}


def _need(stats: TokenStats, field: str) -> Tensor:
    value = getattr(stats, field)
    if value is None:
        raise ValueError(f"this objective needs TokenStats.{field}, which is None: {_HOW_TO_GET[field]}")
    return value


def _logratio(stats: TokenStats) -> Tensor:
    return stats.logps - _need(stats, "ref_logps")  # (B, T-1), 0 off-mask


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum(-1) / mask.sum(-1)  # (B, T-1) -> (B,)


def _guidance(stats: TokenStats, strength: float, shaping: str, floor: float) -> Tensor:
    """f(r_hat) on every response token, 0 elsewhere: (B, T-1), detached."""
    scaled = strength * (_need(stats, "guide_logps") - _need(stats, "ref_logps")).detach()  # +-alpha r_hat
    if shaping == "linear":
        weights = 1 + scaled
    elif shaping == "exp":
        weights = scaled.exp()
    else:
        raise ValueError(f"shaping={shaping!r} is unknown; choose 'linear' (the paper's) or 'exp'")
    return torch.where(stats.mask, weights.clamp_min(floor), 0.0)


def _bradley_terry(chosen_reward: Tensor, rejected_reward: Tensor, token_weights: Tensor | None = None) -> LossOutput:
    """-log P(chosen beats rejected) when P = sigma(reward difference): (B,), (B,) -> LossOutput."""
    loss = -F.logsigmoid(chosen_reward - rejected_reward)
    return LossOutput(loss, chosen_reward.detach(), rejected_reward.detach(), token_weights)

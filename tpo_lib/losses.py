"""The objectives, as pure functions of per-token statistics, and their records: all that is known of an objective.

Every function takes the statistics of B chosen and B rejected responses (see `stats.split`) and returns a LossOutput.
Below, w is the chosen and l the rejected response, lr = log pi_theta(y^t|s_t) - log pi_ref(y^t|s_t) at a token,
KL = KL(pi_ref(.|s_t) || pi_theta(.|s_t)) over the vocabulary, and sums run over the response, in nats. The rewards that are
logged are the two terms of the objective's own margin. What beta, alpha, ... may be stands in OBJECTIVES.

To add an objective, write its function and its entry in OBJECTIVES, or `tpo_lib.register` one from outside. Training, flags,
range checks, sliders, colours, `run`, the sweep and README's table follow from the entry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from tpo_lib.types import LossOutput, TokenStats

F_FLOOR = 0.01  # TGDPO's smallest weight of a token: its derivation needs f > 0, the authors' code does not ensure it
FLOAT32_MAX = torch.finfo(torch.float32).max

HOW_TO_GET = {
    "ref_logps": "pass ref_logits to token_stats",
    "kl": "pass with_kl=True to token_stats",
    "guide_logps": "pass guide_logits (a frozen DPO model's) to token_stats",
}


def sft(chosen: TokenStats, rejected: TokenStats | None) -> LossOutput:
    """Supervised fine-tuning: the chosen response's negative log-likelihood per token.

    loss = -mean log pi(w)

    The rejected response is read for the logged reward alone, and may be missing.
    """
    likelihood = _mean_logps(chosen)
    return LossOutput(-likelihood, likelihood.detach(), None if rejected is None else _mean_logps(rejected).detach())


def dpo(chosen: TokenStats, rejected: TokenStats, *, beta: float) -> LossOutput:
    """Direct preference optimization (arXiv 2305.18290): every token of a response shares one coefficient.

    loss = -log sigma(beta sum lr(w) - beta sum lr(l))

    Example:
        >>> from tpo_lib.types import TokenStats
        >>> def one(gap): return TokenStats(torch.tensor([[gap]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        >>> dpo(one(-1.0), one(-3.0), beta=0.5).loss  # -log sigma(0.5 * (-1 + 3)) = log(1 + e^-1)
        tensor([0.3133])
    """
    return _bradley_terry(beta * _logratio(chosen).sum(-1), beta * _logratio(rejected).sum(-1))


def tdpo1(chosen: TokenStats, rejected: TokenStats, *, beta: float) -> LossOutput:
    """Token-level DPO, first form (arXiv 2404.11999): the forward KL of every token joins the reward.

    loss = -log sigma(beta sum [lr + KL](w) - beta sum [lr + KL](l))

    The paper writes it -log sigma(u - delta) with delta = beta SeqKL(l) - beta SeqKL(w).
    """
    # gradients flow through both KL terms, so the loss rewards a growing KL on the chosen side; tdpo2 removes that
    return _bradley_terry(
        beta * (_logratio(chosen) + _need(chosen, "kl")).sum(-1),
        beta * (_logratio(rejected) + _need(rejected, "kl")).sum(-1),
    )


def tdpo2(chosen: TokenStats, rejected: TokenStats, *, beta: float, alpha: float) -> LossOutput:
    """Token-level DPO, second form (arXiv 2404.11999): alpha scales the KL terms, the chosen one is held constant.

    loss = -log sigma(beta sum [lr + alpha sg(KL)](w) - beta sum [lr + alpha KL](l)), sg: no gradient

    At alpha = 1 the value equals `tdpo1`, the gradient does not; at alpha = 0 it is `dpo`. The logged rewards have the loss's
    alpha too. (The authors' code logs them with coefficient 1 whatever alpha is.)
    """
    return _bradley_terry(
        # the stop-gradient: what the loss would gain by moving the chosen KL is not followed
        beta * (_logratio(chosen) + alpha * _need(chosen, "kl").detach()).sum(-1),
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

    loss = -log sigma(beta sum f lr(w) - beta sum f lr(l)), f = 1 +- alpha r_hat, r_hat from a frozen DPO model

    r_hat^t = guide_beta (log pi_hat(y^t|s_t) - log pi_ref(y^t|s_t)) is constant in theta. guide_beta is what the guide was
    trained with: our reading, the paper prints one beta; the authors' code takes this run's. With shaping "exp"
    f = exp(+-alpha r_hat); + is the chosen side's. The derivation divides by f, so f must stay positive: the paper asks for a
    small enough alpha, the authors' code has no guard. Here f = max(f, floor), and `floor_share` counts the tokens that hit
    it. The logged rewards have the loss's f. (The authors' code logs DPO's, without f.)

    Returns:
        LossOutput; token_weights holds f.

    Raises:
        ValueError: shaping is neither "linear" nor "exp".
    """
    f_w = _guidance(chosen, alpha * guide_beta, shaping, floor)  # (B, T-1)
    f_l = _guidance(rejected, -alpha * guide_beta, shaping, floor)
    return _bradley_terry(
        beta * (f_w * _logratio(chosen)).sum(-1),
        beta * (f_l * _logratio(rejected)).sum(-1),
        token_weights=torch.cat([f_w, f_l]),
    )


def simpo(chosen: TokenStats, rejected: TokenStats, *, beta: float, gamma: float) -> LossOutput:
    """Simple preference optimization (arXiv 2405.14734): length-averaged likelihood with a margin, no reference.

    loss = -log sigma(beta mean log pi(w) - beta mean log pi(l) - gamma)

    beta multiplies a mean, so its values are of another scale than the others'; gamma is in units of the reward.
    """
    return _bradley_terry(beta * _mean_logps(chosen), beta * _mean_logps(rejected), target=gamma)


def ipo(chosen: TokenStats, rejected: TokenStats, *, beta: float) -> LossOutput:
    """Identity preference optimization (arXiv 2310.12036): the margin is drawn to one value, not ever further.

    loss = (sum lr(w) - sum lr(l) - 1 / (2 beta))^2

    It is 0 where the margin of the logged rewards, beta sum lr, is 1/2. Sums as in the paper; TRL takes means over the tokens.
    """
    gap = _logratio(chosen).sum(-1), _logratio(rejected).sum(-1)
    loss = (gap[0] - gap[1] - 1 / (2 * beta)) ** 2
    return LossOutput(loss, beta * gap[0].detach(), beta * gap[1].detach())


def _need(stats: TokenStats, field: str) -> Tensor:
    value = getattr(stats, field)
    if value is None:
        raise ValueError(f"this objective needs TokenStats.{field}, which is None: {HOW_TO_GET[field]}")
    return value


def _logratio(stats: TokenStats) -> Tensor:
    return stats.logps - _need(stats, "ref_logps")  # (B, T-1), 0 off-mask


def _mean_logps(stats: TokenStats) -> Tensor:
    return stats.logps.sum(-1) / stats.mask.sum(-1)  # (B, T-1) -> (B,), over response tokens alone


def _guidance(stats: TokenStats, strength: float, shaping: str, floor: float) -> Tensor:
    """f(r_hat) on every response token, 0 elsewhere: (B, T-1)."""
    # detached: the weights say which tokens matter, and are not themselves learned
    scaled = strength * (_need(stats, "guide_logps") - _need(stats, "ref_logps")).detach()  # +-alpha r_hat
    if shaping == "linear":
        weights = 1 + scaled
    elif shaping == "exp":
        weights = scaled.exp()
    else:
        raise ValueError(f"shaping={shaping!r} is unknown; choose 'linear' (the paper's) or 'exp'")
    return torch.where(stats.mask, weights.clamp_min(floor), 0.0)


def _bradley_terry(
    chosen_reward: Tensor, rejected_reward: Tensor, *, target: float = 0.0, token_weights: Tensor | None = None
) -> LossOutput:
    """-log P(chosen beats rejected by the target) when P = sigma(reward difference): (B,), (B,) -> LossOutput."""
    loss = -F.logsigmoid(chosen_reward - rejected_reward - target)  # log(sigmoid(x)) would be -inf at x = -800
    return LossOutput(loss, chosen_reward.detach(), rejected_reward.detach(), token_weights)


def floor_share(output: LossOutput, mask: Tensor, floor: float = F_FLOOR) -> tuple[Tensor, Tensor]:
    """Response tokens whose weight sits on the floor, and response tokens in all, both scalar tensors."""
    return ((output.token_weights <= floor) & mask).sum(), mask.sum()


@dataclass(frozen=True)
class Hyperparameter:
    """What an objective takes beside the statistics."""

    default: float | str | None  # taken where nothing is given; None: it has to be given
    symbol: str  # as in the papers
    words: str  # what it does, half a line
    above: float = -math.inf  # it must be greater than this
    least: float = -math.inf  # and at least this
    usual: tuple[float, float] | None = None  # the range in use; values outside are said, not refused
    choices: tuple[str, ...] = ()  # of a word
    pocket: float | None = None  # its value in `run`, on the pocket model, where the default does not suit
    swept: tuple[float, ...] = ()  # its values in the sweep

    def check(self, name: str, value: float | str) -> None:
        """Raise ValueError, naming the value, where it is out of range."""
        if not self.choices:
            check_number(name, value, above=self.above, least=self.least)
        elif value not in self.choices:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(self.choices)}")


def check_number(name: str, value, *, above=-math.inf, least=-math.inf, most: float = FLOAT32_MAX) -> None:
    """Raise ValueError, naming the value, where it is no number (NaN is none), or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, Real) or value != value:
        raise ValueError(f"{name}={value!r} must be a number")
    if not value > above:
        raise ValueError(f"{name}={value!r} must be greater than {above:g}")
    if not value >= least:
        raise ValueError(f"{name}={value!r} must be at least {least:g}")
    if abs(value) > most:
        raise ValueError(
            f"{name}={value!r} must be {'finite in float32' if abs(value) == math.inf else f'at most {most}'}"
        )


@dataclass(frozen=True)
class Objective:
    """An entry of OBJECTIVES."""

    fn: Callable[..., LossOutput]  # the first line of its docstring is shown wherever the objective is explained
    needs: tuple[str, ...] = ()  # the optional TokenStats fields it reads
    hyperparameters: Mapping[str, Hyperparameter] = field(default_factory=dict)  # what it takes beside them, by name
    label: str | None = None  # in pictures; None is the name of the function
    look: tuple[str, str, str | tuple] | None = None  # colour, marker and dashes in pictures; None takes free ones
    paired: bool = True  # it has a margin and needs a rejected side; otherwise it is also called with None for it
    source: str | None = None  # SHA-256 of the file of your own that it was loaded from

    @property
    def words(self) -> str:
        """One sentence: the first line of the function's docstring."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    def settings(self, given: Mapping) -> dict:
        """The keyword arguments of `fn`: what is given (names it does not take are passed over), else the defaults.

        Raises:
            ValueError: a value is out of range.
        """
        found = {}
        for name, known in self.hyperparameters.items():
            found[name] = known.default if given.get(name) is None else given[name]
            if found[name] is not None:
                known.check(name, found[name])
        return found


_REF, _KL = ("ref_logps",), ("ref_logps", "kl")
_BETA = Hyperparameter(0.1, "β", "strength of the pull towards the reference", above=0, swept=(0.05, 0.1, 0.5))
_DPO_BETA = replace(_BETA, swept=(0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0))
# Alpha decides where TDPO2 comes to rest. The authors' 0.5 holds the pocket model at a reward of about 0.74 and a KL of 4, so
# that there is little to compare; 0.2 lies in the range the paper sweeps (0.1 to 0.7).
_KL_WEIGHT = Hyperparameter(
    0.5, "α", "weight of the KL terms (its authors' 0.5)", least=0, pocket=0.2, swept=(0.1, 0.3, 0.5, 1.0)
)
_GUIDED = {
    "beta": _BETA,
    "alpha": Hyperparameter(0.5, "α", "strength of the guidance", least=0, swept=(0.5, 1.0, 2.0)),
    "guide_beta": Hyperparameter(None, "β̂", "the beta its guide was trained with", above=0, pocket=0.1),
    "shaping": Hyperparameter("linear", "f", "how a token's weight grows with r̂", choices=("linear", "exp")),
    "floor": Hyperparameter(F_FLOOR, "f_min", "smallest token weight", above=0),
}
_SIMPO = {  # defaults of its authors' code, where gamma / beta is 1/4
    "beta": Hyperparameter(
        2.0, "β", "scale of the mean log-probability", above=0, usual=(1.0, 10.0), swept=(1.0, 2.0, 4.0)
    ),
    "gamma": Hyperparameter(0.5, "γₘ", "target margin", least=0),
}

# Colours are Okabe and Ito's, without their yellow, which is lost on white. Colour, marker and dashes differ together, so that
# curves stay apart in greyscale and for colour-blind readers.
OBJECTIVES = {
    "sft": Objective(sft, (), {}, "SFT", ("#8A8A8A", "P", (0, (4, 1, 1, 1, 1, 1))), paired=False),
    "dpo": Objective(dpo, _REF, {"beta": _DPO_BETA}, "DPO", ("#0072B2", "o", "-")),
    "tdpo1": Objective(tdpo1, _KL, {"beta": _BETA}, "TDPO1", ("#E69F00", "^", (0, (5, 1.5)))),
    "tdpo2": Objective(
        tdpo2, _KL, {"beta": _BETA, "alpha": _KL_WEIGHT}, "TDPO2", ("#D55E00", "s", (0, (6, 1.5, 1, 1.5)))
    ),
    "tgdpo": Objective(tgdpo, ("ref_logps", "guide_logps"), _GUIDED, "TGDPO", ("#009E73", "D", (0, (3, 1)))),
    "simpo": Objective(simpo, (), _SIMPO, "SimPO", ("#CC79A7", "v", (0, (1.5, 1)))),
    "ipo": Objective(ipo, _REF, {"beta": _BETA}, "IPO", ("#8B5A2B", ">", (0, (8, 1.5, 2, 1.5)))),
}

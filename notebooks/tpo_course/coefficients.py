"""Which way, and how hard, an objective pushes every token: the loss's derivatives by autograd, never by formula.

By the chain rule the gradient of a pair's loss in the policy's parameters is

    sum_t c^t grad log pi_theta(y^t|s_t) + sum_t k^t grad KL^t,    KL^t = KL(pi_ref(.|s_t) || pi_theta(.|s_t)),

over both responses, with c^t = d loss / d log pi_theta(y^t|s_t) and k^t = d loss / d KL^t. Two objectives that share model and
pair differ in these numbers alone. A step of gradient descent raises what has a negative coefficient.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tpo_lib.losses import OBJECTIVES, Objective
from tpo_lib.types import LossOutput, TokenStats


@dataclass(frozen=True)
class TokenCoefficients:
    """The coefficients of one side of the pairs, (B, T-1) each; detached, exactly 0 off-mask."""

    logps: Tensor  # c^t = d loss / d log pi_theta(y^t|s_t), pure numbers (nats per nat)
    kl: Tensor | None  # k^t = d loss / d KL^t, 0 where a stop-gradient holds it; None for an objective that reads no KL
    weights: Tensor | None  # TGDPO's f(r_hat); None for every other objective


@dataclass(frozen=True)
class PairCoefficients:
    """What `coefficients` returns for B pairs: the LossOutput (detached), and the coefficients of either side."""

    output: LossOutput
    chosen: TokenCoefficients
    rejected: TokenCoefficients

    @property
    def margin(self) -> Tensor:
        """(B,) reward of the chosen response minus that of the rejected one, in the objective's own rewards."""
        return self.output.chosen_reward - self.output.rejected_reward


def coefficients(objective: str, chosen: TokenStats, rejected: TokenStats, **hyper) -> PairCoefficients:
    """The derivatives of every pair's loss in every token's log-probability and KL, as if nothing else were shared.

    Args:
        objective: a key of `losses.OBJECTIVES`.
        chosen, rejected: statistics of B pairs, from `stats.split` or written by hand; not changed, gradients are cut.
        hyper: what the objective takes.

    Returns:
        PairCoefficients; every pair on its own (divide by B for a batch's mean loss).

    Raises:
        ValueError: the objective is unknown, or a statistic that it needs is missing.

    Example:
        >>> def one(gap): return TokenStats(torch.tensor([[gap]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        >>> found = coefficients("dpo", one(-1.0), one(-3.0), beta=0.5)  # margin 0.5 * (-1 + 3) = 1
        >>> found.chosen.logps, found.rejected.logps  # -/+ beta * sigmoid(-1)
        (tensor([[-0.1345]]), tensor([[0.1345]]))
    """
    entry = _entry(objective)
    with torch.enable_grad():
        sides = [_leaves(chosen), _leaves(rejected)]
        output = entry.fn(*sides, **hyper)
        leaves = [leaf for side in sides for leaf in (side.logps, side.kl) if leaf is not None]
        # A pair's loss depends on its own row only, so one sum gives every pair's gradient.
        grads = torch.autograd.grad(output.loss.sum(), leaves, allow_unused=True, materialize_grads=True)
    slopes = iter(grads)
    weights = (None, None) if output.token_weights is None else output.token_weights.split(len(chosen.mask))
    found = []
    for side, f in zip(sides, weights, strict=True):
        logps = torch.where(side.mask, next(slopes), 0.0)
        kl = None if side.kl is None else torch.where(side.mask, next(slopes), 0.0)
        found.append(TokenCoefficients(logps, kl if "kl" in entry.needs else None, f))
    return PairCoefficients(replace(output, loss=output.loss.detach()), *found)


def margin_terms(objective: str, chosen: TokenStats, rejected: TokenStats, **hyper) -> dict[str, Tensor]:
    """What the margin is made of: {"chosen logps", "rejected logps", "chosen kl", "rejected kl"} -> (B,), signed.

    The four sum to the margin. The KL terms are what the rewards lose when KL is set to 0 (rewards are linear in it), 0 for
    an objective that reads no KL; the log-probability terms are the rest: weighted log-ratios, or SimPO's mean log pi.

    Args, Raises: as for `coefficients`.
    """
    fn, sides = _entry(objective).fn, (chosen, rejected)
    bare = fn(*(replace(s, kl=None if s.kl is None else torch.zeros_like(s.kl)) for s in sides), **hyper)
    full = fn(*sides, **hyper)
    return {
        "chosen logps": bare.chosen_reward,
        "rejected logps": -bare.rejected_reward,
        "chosen kl": full.chosen_reward - bare.chosen_reward,
        "rejected kl": bare.rejected_reward - full.rejected_reward,
    }


def loss_at(objective: str, margins: Tensor, **hyper) -> tuple[Tensor, Tensor]:
    """The loss and its slope d loss / d margin as functions of the objective's own margin: (B,) -> (B,), (B,).

    Computed by the objective itself, on responses of one token whose reward is the margin wanted: no KL, f = 1.

    Args:
        objective: a key of `losses.OBJECTIVES` other than "sft", which knows no margin.
        margins: (B,) in the objective's rewards.
        hyper: as for `coefficients`, the objective's defaults where they are missing.

    Example:
        >>> loss, slope = loss_at("dpo", torch.tensor([0.0]), beta=0.1)
        >>> loss, slope  # log 2, and -sigmoid(-0)
        (tensor([0.6931]), tensor([-0.5000]))
    """
    entry = _entry(objective)
    if not entry.paired:
        raise ValueError(f"{objective!r} has no margin: its loss reads the chosen response alone")
    hyper, zero = entry.settings(hyper), torch.zeros_like(margins)[:, None]  # (B, 1)

    def one_token(logps: Tensor) -> TokenStats:
        return TokenStats(logps, zero, torch.ones_like(zero, dtype=torch.bool), kl=zero, guide_logps=zero)

    def pair(logps: Tensor) -> PairCoefficients:
        return coefficients(objective, one_token(logps), one_token(zero), **hyper)

    nat = (pair(zero + 1).margin - pair(zero).margin)[:, None]  # what a nat of log-probability adds to the margin
    found = pair(margins[:, None] / nat)
    return found.output.loss, (found.chosen.logps / nat)[:, 0]


def spread(
    logratio: float, seq_kl: float, guide_rewards: Tensor, *, guide_beta: float, ref_logp: float = -2.0
) -> TokenStats:
    """One response given by its totals, spread evenly over its tokens: a small TokenStats to try an objective on.

    Args:
        logratio: sum_t log pi_theta - log pi_ref, nats.
        seq_kl: sum_t KL^t, nats, >= 0.
        guide_rewards: (T,) r_hat^t = guide_beta (log pi_hat - log pi_ref) of every token, nats; its length is the response's.
        guide_beta: the guide's beta, > 0.
        ref_logp: log pi_ref of every token, nats.

    Returns:
        TokenStats with (1, T) fields.
    """
    ref, tokens = torch.full_like(guide_rewards, ref_logp)[None], len(guide_rewards)  # (1, T)
    kl, guide = torch.full_like(ref, seq_kl / tokens), ref + guide_rewards / guide_beta
    return TokenStats(ref + logratio / tokens, ref, torch.ones_like(ref, dtype=torch.bool), kl, guide)


def least_kl(logratio: Tensor | float, tokens: int, *, ref_logp: float) -> Tensor:
    """The smallest SeqKL(pi_ref || pi) that a response's log-ratio leaves possible: the two are not free of each other.

    In one state, with p = pi_ref(y|s) and x = log pi(y|s) - log pi_ref(y|s), the policy gives its token p e^x, so x < -log p, and
    the other tokens 1 - p e^x. Merging those into one event cannot raise a KL, and leaves it as it is where they keep their
    shares of one another (data processing), so

        KL(pi_ref || pi) >= b(x) = -p x + (1 - p) log((1 - p) / (1 - p e^x)),    b(0) = 0,

    with equality there, and b is convex, b'' = p (1 - p) e^x / (1 - p e^x)^2. So over T tokens with one p the sum is at least
    T b(X / T), reached where the log-ratio X is spread evenly (Jensen). With three tokens or more in the vocabulary every larger
    SeqKL is reached too, by moving probability among the others. Nothing else is out of reach.

    Args:
        logratio: X = sum_t log pi - log pi_ref over the response, nats, any shape.
        tokens: T, at least 1.
        ref_logp: log p, nats, below 0, of every token.

    Returns:
        Nats, float64, in the shape of `logratio`; inf from X = -T log p on, where no policy is.

    Raises:
        ValueError: `tokens` or `ref_logp` is out of range.

    Example:
        >>> least_kl(torch.tensor([0.0, 15.0, 18.0]), 6, ref_logp=-3.0)
        tensor([0.0000, 4.2799,    inf], dtype=torch.float64)
    """
    if tokens < 1 or not ref_logp < 0:
        raise ValueError(f"tokens={tokens}, ref_logp={ref_logp}: at least one token, of a log-probability below 0")
    x = torch.as_tensor(logratio, dtype=torch.float64) / tokens
    p, log_q = math.exp(ref_logp), x + ref_logp  # log pi(y|s)
    rest = torch.log1p(-log_q.clamp(max=-1e-12).exp())  # of what is beyond 1 nothing is taken
    bound = tokens * (-p * x + (1 - p) * (math.log1p(-p) - rest))
    return torch.where(log_q < 0, bound.clamp(min=0.0), math.inf)  # a rounding may lie below 0


def _entry(objective: str) -> Objective:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]


def _leaves(stats: TokenStats) -> TokenStats:
    """The same statistics, log-probabilities and KL as leaves of a new graph."""
    there = {"logps": stats.logps, "kl": stats.kl}
    fresh = {name: t.detach().clone().requires_grad_() for name, t in there.items() if t is not None}
    return replace(stats, **fresh)

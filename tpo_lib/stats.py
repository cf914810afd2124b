"""Logits and labels in, per-token statistics out: the only place where labels are shifted, masked and scored.

The position that predicts token t+1 is t, so column t of every statistic belongs to label t+1. All arithmetic is
float32 (float64 stays float64) and goes through log_softmax, never through log(softmax): the latter is -inf as soon as
one logit lies about 104 below the largest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tpo_lib.types import IGNORE, LossOutput, Reading, TokenStats

KL_NEEDS_READING = (
    "with_kl=True needs ref_logits (readings: needs ref as a Reading): the KL is over the whole distribution"
)


def response_mask(labels: Tensor) -> Tensor:
    """(N, T-1) bool: True in column t where token t+1 belongs to the response.

    Args:
        labels: (N, T) integer, -100 outside the response, not shifted.

    Raises:
        ValueError: labels are not a 2-D integer tensor, or a row, which is named, has no response token to score.

    Example:
        >>> response_mask(torch.tensor([[-100, -100, 7, 9]]))
        tensor([[False,  True,  True]])
    """
    if labels.ndim != 2 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be an (N, T) integer tensor, got {tuple(labels.shape)} {labels.dtype}")
    mask = labels[:, 1:] != IGNORE  # (N, T-1); a first token is never scored, for nothing predicts it
    empty = (~mask.any(dim=1)).nonzero().flatten()
    if len(empty):
        rows = ", ".join(map(str, empty.tolist()[:8])) + (f" and {len(empty) - 8} more" if len(empty) > 8 else "")
        raise ValueError(
            f"labels row {rows} of {len(labels)} has no response token to score (all {IGNORE} after the first column); "
            "drop the pair or raise max_length so that its response is not cut away"
        )
    return mask


def token_stats(
    policy_logits: Tensor,
    labels: Tensor,
    ref_logits: Tensor | None,
    *,
    guide_logits: Tensor | None = None,
    with_kl: bool = False,
) -> TokenStats:
    """Score every response token under policy, reference and guide.

    logps = log_softmax(policy_logits_t)[y^{t+1}];  kl = sum_z pi_ref(z|s_t) [log pi_ref(z|s_t) - log pi_theta(z|s_t)],
    the term of TDPO's sequential KL (arXiv 2404.11999; direction as in its objective: reference first).

    Args:
        policy_logits: (N, T, V) logits of the policy, or (R, V) logits at the R response positions alone, in the order
            of `response_mask(labels)`: the cheap way, since most positions of a padded batch are not scored.
        labels: (N, T) integer, -100 outside the response, not shifted.
        ref_logits: as policy_logits, from the frozen reference (no gradient flows into it), or None.
        guide_logits: as ref_logits, from the frozen guide of TGDPO, or None.
        with_kl: also compute the forward KL over the whole vocabulary (needs ref_logits).

    Returns:
        TokenStats with (N, T-1) fields in nats, exactly 0 off-mask.

    Raises:
        ValueError: shapes disagree, a label lies outside the vocabulary, a row has no response token, or with_kl is
            asked for without ref_logits.

    Example:
        >>> logits = torch.zeros(2, 3, 4)  # uniform over 4 tokens
        >>> stats = token_stats(logits, torch.tensor([[-100, 1, 2], [-100, 3, -100]]), logits, with_kl=True)
        >>> stats.logps
        tensor([[-1.3863, -1.3863],
                [-1.3863,  0.0000]])
    """
    mask = response_mask(labels)  # (N, T-1)
    targets = labels[:, 1:][mask]  # (R,): the shift, what is said at t is scored on token t+1
    policy = _log_probs("policy_logits", policy_logits, mask)  # (R, V)
    check_vocabulary(labels, policy.shape[-1])
    if with_kl and ref_logits is None:
        raise ValueError(KL_NEEDS_READING)
    # a model that is not trained gives constants: its graph is cut before anything is computed
    frozen = {"ref_logits": ref_logits, "guide_logits": guide_logits}
    ref, guide = (
        None if logits is None else _log_probs(name, logits.detach(), mask, vocab=policy.shape[-1])
        for name, logits in frozen.items()
    )

    def at_targets(log_probs: Tensor | None) -> Tensor | None:
        return None if log_probs is None else unpack(log_probs.gather(-1, targets[:, None])[:, 0], mask)

    # the reference comes first: its expectation keeps the policy from dropping what the reference says (mass-covering)
    kl = unpack(_kl(ref, policy), mask) if with_kl else None
    return TokenStats(at_targets(policy), at_targets(ref), mask, kl, at_targets(guide))


def _log_probs(name: str, logits: Tensor, mask: Tensor, vocab: int | None = None) -> Tensor:
    """(N, T, V) or (R, V) logits -> (R, V) log-probabilities at the response positions."""
    if vocab is not None and logits.shape[-1] != vocab:
        raise ValueError(
            f"{name} has {logits.shape[-1]} vocabulary entries, the policy {vocab}; they must share one tokenizer"
        )
    n, t, r = mask.shape[0], mask.shape[1] + 1, int(mask.sum())
    if logits.ndim == 3 and logits.shape[:2] == (n, t):
        logits = logits[:, :-1][mask]  # (N, T, V) -> (R, V); nothing is scored on what follows the last token
    elif logits.ndim != 2 or len(logits) != r:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}; labels of shape {(n, t)} with {r} response tokens "
            f"need ({n}, {t}, V) or ({r}, V)"
        )
    return _log_softmax(logits)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities: (R, V), (R, V) -> (R,)."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # p log p -> 0: a token that p excludes adds nothing


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """(R,) values at response positions -> (N, T-1), exactly 0 elsewhere."""
    # by scatter, not by a product with the mask: 0 * inf is NaN
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def kl_entropy_surprisal(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(pi_theta || pi_ref), H(pi_theta) and -log pi_ref(y) of steps, in nats: 2 x (R, V), (N, T) -> 3 x (N, T-1), 0 off-mask.

    Example:
        >>> even, odd = torch.zeros(1, 2), torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])  # 1/2 1/2 and 1/4 3/4
        >>> [round(x.item(), 4) for x in kl_entropy_surprisal(even, odd, torch.tensor([[-100, 0]]))]  # the last: log 4
        [0.1438, 0.6931, 1.3863]
    """
    mask, found = response_mask(labels), []
    parts = (each.split(64) for each in (policy_logits, ref_logits, labels[:, 1:][mask]))  # 64 rows stay in the cache
    for policy, ref, targets in zip(*parts, strict=True):
        log_p, log_q = _log_softmax(policy), _log_softmax(ref)
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        found.append((_kl(log_p, log_q), entropy, -log_q.gather(-1, targets[:, None])[:, 0]))
    return tuple(unpack(torch.cat(steps), mask) for steps in zip(*found, strict=True))


def from_readings(
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None = None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    given: Mapping[str, Tensor] | None = None,
) -> TokenStats:
    """`token_stats` of what the models said, or (R,) log-probabilities of a frozen one; `given`: (R,) rewards, weights."""
    logits = [said.logits() if isinstance(said, Reading) else None for said in (ref, guide)]
    tokens = token_stats(policy.logits(), labels, logits[0], guide_logits=logits[1], with_kl=with_kl)
    known = {"ref_logps": ref, "guide_logps": guide, **(given or {})}
    known = {name: unpack(said.detach(), tokens.mask) for name, said in known.items() if isinstance(said, Tensor)}
    return replace(tokens, **known)


def as_asked(tokens: TokenStats) -> TokenStats:
    """The statistics as an objective reads them, where rewards or weights of the tokens are data.

    A reward r makes log pi_hat = log pi_ref + r, so that TGDPO's r_hat is guide_beta r; a weight w multiplies every log-ratio,
    log-probability and KL, and leaves r_hat as it is.
    """
    ref, guide, w = tokens.ref_logps, tokens.guide_logps, tokens.weights
    guide = guide if tokens.rewards is None else ref + tokens.rewards
    if w is None:
        return replace(tokens, guide_logps=guide)
    scaled = {name: w * x for name in ("logps", "ref_logps", "kl") if (x := getattr(tokens, name)) is not None}
    return replace(tokens, **scaled, guide_logps=None if guide is None else w * ref + (guide - ref))


def pair_loss(
    objective: Callable[[TokenStats, TokenStats | None], LossOutput],
    policy: Reading,
    labels: Tensor,
    ref: Reading | Tensor | None = None,
    *,
    guide: Reading | Tensor | None = None,
    with_kl: bool = False,
    given: Mapping[str, Tensor] | None = None,
    paired: bool = True,
    logged: bool = True,
) -> tuple[LossOutput, TokenStats | None]:
    """From what the models said to the loss, as a textbook has it; `fast.pair_loss` is the same without keeping the logits.

    Args:
        objective: (chosen, rejected) -> LossOutput, its hyperparameters filled in.
        policy, labels, ref, guide, with_kl, given: as in `from_readings`, all chosen sequences first.
        paired: there is a rejected side; otherwise the objective gets None for it.
        logged: the statistics will be read. Where they will not, a faster path may leave them out and return None for them.

    Raises:
        NotFinite: see `check_finite`.
        ValueError: as `from_readings` and `split`.
    """
    tokens = from_readings(policy, labels, ref, guide=guide, with_kl=with_kl, given=given)
    check_finite(tokens)
    asked = as_asked(tokens)
    return objective(*(split(asked) if paired else (asked, None))), tokens


def split(stats: TokenStats) -> tuple[TokenStats, TokenStats]:
    """Cut the statistics of N = 2B sequences into those of the B chosen and the B rejected ones.

    Raises:
        ValueError: N is odd.
    """
    chosen, rejected = halves(len(stats.mask))
    return stats.map(lambda field: field[chosen]), stats.map(lambda field: field[rejected])


def halves(n: int) -> tuple[slice, slice]:
    """The chosen and the rejected ones of n sequences; ValueError where n is odd."""
    if n % 2:
        raise ValueError(f"{n} sequences cannot be split into pairs; stack all chosen first, then all rejected")
    return slice(0, n // 2), slice(n // 2, n)


class NotFinite(FloatingPointError):
    """A statistic is not finite, so nothing can be learned from its sequence; `sequence` is its row in the batch."""

    def __init__(self, message: str, sequence: int) -> None:
        super().__init__(message)
        self.sequence = sequence

    def at(self, rows: Tensor) -> str:
        """The message with its place in the table of pairs, from the (B,) rows of the batch."""
        side = ("chosen", "rejected")[self.sequence // len(rows)]
        return f"row {int(rows[self.sequence % len(rows)])} ({side}), {self}"


def check_finite(tokens: TokenStats) -> None:
    """Raise NotFinite at the first statistic that is not finite: its place, the model, and what is wrong with its logits.

    A model may forbid tokens (logits of -inf) as long as no response holds them; the policy, where the KL is taken, those
    alone that the reference forbids too.
    """
    models = {"logps": "policy", "ref_logps": "reference", "guide_logps": "guide", "kl": ""}
    found = {name: values.detach() for name in models if (values := getattr(tokens, name)) is not None}
    if sum(values.sum() for values in found.values()).isfinite():  # the one synchronisation that the check costs
        return
    for name, values in found.items():
        bad = (~values.isfinite()).nonzero()  # (bad, 2)
        if not len(bad):
            continue
        row, column = bad[0].tolist()
        value = values[row, column].item()
        if name == "kl":
            problem = f"KL(reference || policy) is {value}: the policy forbids a token that the reference allows."
        else:
            problem = f"the {models[name]}'s log-probability of the token is {value}: " + (
                "it forbids this token; a response may hold no token that a model forbids."
                if value < 0
                else "its logits there hold NaN or inf, or forbid every token; are its weights sound?"
            )
        raise NotFinite(f"column {column + 1}: {problem}", row)


def check_vocabulary(labels: Tensor, vocab: int) -> None:
    """Raise ValueError where a label lies outside the vocabulary; the message names its place."""
    outside = ((labels != IGNORE) & ((labels < 0) | (labels >= vocab))).nonzero()  # (bad, 2)
    if len(outside):
        row, column = outside[0].tolist()
        raise ValueError(
            f"label {int(labels[row, column])} in row {row}, column {column} lies outside the vocabulary of {vocab} logits; "
            "do tokenizer and model belong together?"
        )


def close(found: Tensor, expected: Tensor, tolerance: float, rtol: float = 0.0) -> bool:
    """Whether two tensors agree to a share of the largest finite entry; inf and NaN are in the same places or they do not."""
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().max().item()  # a forbidden token's -inf would let all else pass
    return torch.allclose(found, expected, rtol=rtol, atol=tolerance * scale, equal_nan=True)
